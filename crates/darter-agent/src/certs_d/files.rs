//! File calls for a directory that a container runtime reads at any instant and people edit.
//!
//! Every change is one rename, so that a reader sees the old file or the new one. A change is made
//! only to the content it was decided on: names are exchanged, and what came out is compared, so
//! that an edit in between is never lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::CertsDError;

/// The one name that containerd reads, besides `*.crt`, `*.cert` and `*.key` (loadHostDir).
pub(super) const HOSTS: &str = "hosts.toml";
/// The user's own file, as it was.
pub(super) const BACKUP: &str = "hosts.toml.darter-backup";
/// The text that ours was made from, where that is not the backup.
pub(super) const BASE: &str = "hosts.toml.darter-base";
/// One of our files that someone made unreadable; theirs to look at.
pub(super) const UNREADABLE: &str = "hosts.toml.darter-unreadable";
/// Says that darter made the directory it is in.
pub(super) const CREATED: &str = ".darter-created";
/// What a crash may leave behind, a file or a directory.
pub(super) const TEMP_PREFIX: &str = ".darter-tmp-";

/// containerd reads hosts.toml at every pull; a larger one is no configuration.
const LARGEST_BYTES: u64 = 1 << 20;

/// What is in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) bytes: Vec<u8>,
    pub(super) text: String,
}

/// The content of a file; `None` where there is none.
pub(super) fn read(path: &Path) -> Result<Option<Content>, CertsDError> {
    let failed = |source| CertsDError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(LARGEST_BYTES + 1).read_to_end(&mut bytes)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(failed(error)),
        Ok(length) if length as u64 > LARGEST_BYTES => Err(failed(io::ErrorKind::FileTooLarge.into())),
        Ok(_) => {
            // A NUL keeps text that is not UTF-8 from being TOML: containerd refuses such a file.
            let text = match String::from_utf8(bytes.clone()) {
                Ok(text) => text,
                Err(_) => format!("\0{}", String::from_utf8_lossy(&bytes)),
            };
            Ok(Some(Content { bytes, text }))
        }
    }
}

/// The names in a directory, sorted; `None` where it does not exist.
pub(super) fn names(dir: &Path) -> Result<Option<Vec<String>>, CertsDError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries,
    };
    let collected = entries.and_then(|entries| {
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()
    });
    let mut names = collected.map_err(|source| CertsDError::Read { path: dir.to_owned(), source })?;
    names.sort_unstable();
    Ok(Some(names))
}

/// Puts `text` in place of `expected`; `false` if the file is not that any more.
pub(super) fn replace(path: &Path, expected: Option<&Content>, text: &str) -> Result<bool, CertsDError> {
    let failed = |source: io::Error| CertsDError::Replace { path: path.to_owned(), source };
    let temp = temp_beside(path);
    write_new(&temp, text).map_err(failed)?;
    let done = match expected {
        None => rename_new(&temp, path),
        Some(expected) => exchange_if(&temp, path, expected),
    };
    remove(&temp)?;
    sync_parent(path).map_err(failed)?;
    done.map_err(failed)
}

/// Removes `path` if it is still `expected`.
pub(super) fn take_away(path: &Path, expected: &Content) -> Result<bool, CertsDError> {
    let failed = |source: io::Error| CertsDError::Remove { path: path.to_owned(), source };
    let temp = temp_beside(path);
    remove(&temp)?;
    fs::rename(path, &temp).map_err(failed)?;
    let still = read(&temp)?.as_ref() == Some(expected);
    if still {
        remove(&temp)?;
    } else {
        rename_new(&temp, path).map_err(failed)?;
    }
    sync_parent(path).map_err(failed)?;
    Ok(still)
}

/// Puts the file `backup` in place of `path`, if that is still `expected`.
pub(super) fn put_back(backup: &Path, path: &Path, expected: Option<&Content>) -> Result<bool, CertsDError> {
    let failed = |source: io::Error| CertsDError::Replace { path: path.to_owned(), source };
    let done = match expected {
        None => rename_new(backup, path).map_err(failed)?,
        Some(expected) => {
            let done = exchange_if(backup, path, expected).map_err(failed)?;
            if done {
                remove(backup)?;
            }
            done
        }
    };
    sync_parent(path).map_err(failed)?;
    Ok(done)
}

/// Keeps the file `path` under a second name, with its owner, mode and times.
pub(super) fn keep_as(path: &Path, kept: &Path) -> Result<(), CertsDError> {
    let failed = |source: io::Error| CertsDError::Backup { path: path.to_owned(), source };
    let temp = temp_beside(kept);
    remove(&temp)?;
    // A file system without hard links gets a copy.
    fs::hard_link(path, &temp).or_else(|_| fs::copy(path, &temp).map(|_| ())).map_err(failed)?;
    fs::rename(&temp, kept).map_err(failed)?;
    // Two names of one file are left alone by a rename.
    remove(&temp)?;
    sync_parent(kept).map_err(failed)
}

/// Writes one of our own side files, as a whole.
pub(super) fn put(path: &Path, text: &str) -> Result<(), CertsDError> {
    let failed = |source: io::Error| CertsDError::Replace { path: path.to_owned(), source };
    let temp = temp_beside(path);
    write_new(&temp, text).and_then(|()| fs::rename(&temp, path)).map_err(failed)?;
    sync_parent(path).map_err(failed)
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> Result<(), CertsDError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CertsDError::Remove { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// Makes a directory with these files in it appear at once; `false` if there is one already. A
/// directory without hosts.toml, if only for an instant, would hide `_default`.
pub(super) fn make_dir(dir: &Path, files: &[(&str, &str)]) -> Result<bool, CertsDError> {
    let failed = |source: io::Error| CertsDError::Replace { path: dir.to_owned(), source };
    let staged = temp_beside(dir);
    clear_staged(&staged)?;
    fs::create_dir(&staged).map_err(failed)?;
    fs::set_permissions(&staged, fs::Permissions::from_mode(0o755)).map_err(failed)?;
    for (name, text) in files {
        write_new(&staged.join(name), text).map_err(failed)?;
    }
    let done = rename_new(&staged, dir).map_err(failed)?;
    clear_staged(&staged)?;
    sync_parent(dir).map_err(failed)?;
    Ok(done)
}

/// Removes a directory that holds only files of ours, at once, if its hosts.toml is `expected`.
pub(super) fn take_away_dir(dir: &Path, expected: Option<&Content>) -> Result<bool, CertsDError> {
    let failed = |source: io::Error| CertsDError::Remove { path: dir.to_owned(), source };
    let staged = temp_beside(dir);
    clear_staged(&staged)?;
    fs::rename(dir, &staged).map_err(failed)?;
    let still = is_only_ours(&staged)? && read(&staged.join(HOSTS))?.as_ref() == expected;
    if still {
        clear_staged(&staged)?;
    } else {
        rename_new(&staged, dir).map_err(failed)?;
    }
    sync_parent(dir).map_err(failed)?;
    Ok(still)
}

/// Whether a directory holds nothing that could be someone else's but, maybe, hosts.toml.
pub(super) fn is_only_ours(dir: &Path) -> Result<bool, CertsDError> {
    let ours = |name: &String| [HOSTS, BASE, CREATED].contains(&name.as_str());
    Ok(names(dir)?.is_some_and(|names| names.iter().all(ours)))
}

/// Removes what a crash left in a directory.
pub(super) fn clear_leftovers(dir: &Path) -> Result<(), CertsDError> {
    for name in names(dir)?.unwrap_or_default().iter().filter(|name| name.starts_with(TEMP_PREFIX)) {
        let path = dir.join(name);
        if path.is_dir() && !path.is_symlink() { clear_staged(&path)? } else { remove(&path)? }
    }
    Ok(())
}

/// Removes a directory of ours that never came into place, with the files that we put there.
fn clear_staged(staged: &Path) -> Result<(), CertsDError> {
    for name in [HOSTS, BASE, CREATED] {
        remove(&staged.join(name))?;
    }
    match fs::remove_dir(staged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CertsDError::Remove { path: staged.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// Removes a directory unless someone else put something there.
pub(super) fn remove_dir_if_empty(dir: &Path) -> Result<(), CertsDError> {
    match fs::remove_dir(dir) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Err(CertsDError::Remove { path: dir.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// In the same directory, so that a rename is one step; by process, so that an agent and
/// `darter uninstall` do not meet.
fn temp_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{TEMP_PREFIX}{}-{name}", std::process::id()))
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => (),
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    // Whatever the umask says: containerd may run as another user than we do.
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Renames to a name that is free; `false` if it is not.
fn rename_new(from: &Path, to: &Path) -> io::Result<bool> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(Errno::INVAL | Errno::NOSYS) if to.symlink_metadata().is_err() => fs::rename(from, to).map(|()| true),
        Err(Errno::INVAL | Errno::NOSYS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Renames `new` over `path` if that is `expected`; the old file stays under the name `new`.
fn exchange_if(new: &Path, path: &Path, expected: &Content) -> io::Result<bool> {
    if !holds(path, expected) {
        return Ok(false);
    }
    match exchange_checked(new, path, expected) {
        // A file system that cannot exchange: the comparison above has to do.
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(new, path).map(|()| true),
        Err(Errno::NOENT) => Ok(false),
        done => Ok(done?),
    }
}

/// Exchanges, looks at what came out, and exchanges back if someone was there first.
pub(super) fn exchange_checked(new: &Path, path: &Path, expected: &Content) -> rustix::io::Result<bool> {
    renameat_with(CWD, new, CWD, path, RenameFlags::EXCHANGE)?;
    let is_expected = holds(new, expected);
    if !is_expected {
        renameat_with(CWD, new, CWD, path, RenameFlags::EXCHANGE)?;
    }
    Ok(is_expected)
}

fn holds(path: &Path, expected: &Content) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes == expected.bytes)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
