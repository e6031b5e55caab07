//! Which blobs were complete and safely on disk when this agent last ran, and which images are pinned.
//!
//! A blob is named here only after its bytes, its record and its rename were synced, so a blob that
//! is named needs no hashing at start, only a look at its size. Losing the journal, or any line of
//! it, costs that hashing and nothing else; hence a line is appended without a sync. The one order
//! that matters is a loss remembered after a blob came back under its name, see `settle`.
//!
//! One line a change: `blob <hex> <size> <check>`, `gone <hex> <check>`,
//! `pin <until, in Unix seconds> <image> <hex>… <check>`, `unpin <image> <check>`. The check is 8 hex digits of the line's BLAKE3.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use darter_core::Digest;

use super::disk::Disk;
use super::pins::Pin;
use super::state::DiskError;

/// Lines that may be dead before the file is worth writing anew.
const DEAD_LINES: usize = 4096;
/// A journal that grew past this was not written by us; the rest of it is not read.
const BYTES_MAX: u64 = 128 * 1024 * 1024;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line {
    /// Complete and synced, with its size.
    Blob(Digest, u64),
    /// Deleted.
    Gone(Digest),
    /// Eviction spares the blobs of an image, in place of what its last pin said.
    Pin(String, Pin),
    /// An image is released.
    Unpin(String),
}

impl Line {
    fn text(&self) -> String {
        let body = match self {
            Self::Blob(digest, size) => format!("blob {} {size}", digest.hex()),
            Self::Gone(digest) => format!("gone {}", digest.hex()),
            Self::Pin(image, pin) => {
                let until = pin.until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
                let digests: String = pin.digests.iter().map(|digest| format!(" {}", digest.hex())).collect();
                format!("pin {until} {image}{digests}")
            }
            Self::Unpin(image) => format!("unpin {image}"),
        };
        format!("{body} {}\n", check(&body))
    }

    fn parse(line: &str) -> Option<Self> {
        let (body, given) = line.rsplit_once(' ')?;
        if check(body) != given {
            return None;
        }
        let (verb, rest) = body.split_once(' ')?;
        let words: Vec<&str> = rest.split(' ').collect();
        let digest = |word: &&str| Digest::from_hex(word).ok();
        match (verb, words.as_slice()) {
            ("blob", [hex, size]) => Some(Self::Blob(digest(hex)?, size.parse().ok()?)),
            ("gone", [hex]) => Some(Self::Gone(digest(hex)?)),
            ("pin", [until, image, digests @ ..]) => {
                let until = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(until.parse().ok()?))?;
                let digests = digests.iter().map(digest).collect::<Option<_>>()?;
                Some(Self::Pin((*image).to_owned(), Pin { until, digests }))
            }
            ("unpin", [image]) => Some(Self::Unpin((*image).to_owned())),
            _ => None,
        }
    }
}

fn check(body: &str) -> String {
    blake3::hash(body.as_bytes()).to_hex()[..8].to_owned()
}

/// What a journal says, once all its lines are applied.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    /// Blobs that are complete and synced, with their sizes.
    pub(super) blobs: HashMap<Digest, u64>,
    /// Images that eviction spares.
    pub(super) pins: BTreeMap<String, Pin>,
}

impl Contents {
    fn apply(&mut self, line: Line) {
        match line {
            Line::Blob(digest, size) => {
                self.blobs.insert(digest, size);
            }
            Line::Gone(digest) => {
                self.blobs.remove(&digest);
            }
            Line::Pin(image, pin) => {
                self.pins.insert(image, pin);
            }
            Line::Unpin(image) => {
                self.pins.remove(&image);
            }
        }
    }
}

/// The open journal.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// `None` while it cannot be written: the disk is read-only, full, or failed.
    file: Option<File>,
    lines: usize,
    /// The file does not end in a line end: a crash or a full disk cut the last line.
    torn: bool,
    /// A line that must not be lost is in the page cache only.
    unsettled: bool,
}

impl Journal {
    /// Reads what is there and opens it for more. Damage is skipped.
    pub(super) fn open(path: PathBuf) -> (Self, Contents) {
        let bytes = read(&path).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "cannot read the journal; stored blobs will be hashed again");
            Vec::new()
        });
        let mut contents = Contents::default();
        let (mut lines, mut damaged) = (0, 0_u32);
        for line in bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            lines += 1;
            match std::str::from_utf8(line).ok().and_then(Line::parse) {
                Some(line) => contents.apply(line),
                None => damaged += 1,
            }
        }
        if damaged > 0 {
            tracing::warn!(path = %path.display(), damaged, "skipped damaged lines of the journal");
        }
        let torn = bytes.last().is_some_and(|b| *b != b'\n');
        let file = append_to(&path).ok();
        (Self { path, file, lines, torn, unsettled: false }, contents)
    }

    /// Adds a line. Where it cannot, the next `rewrite` makes up for it.
    pub(super) fn append(&mut self, line: &Line) {
        self.unsettled |= !matches!(line, Line::Blob(..));
        let Some(file) = &mut self.file else { return };
        let mut text = line.text();
        if self.torn {
            text.insert(0, '\n');
        }
        let written = file.write_all(text.as_bytes());
        self.torn = written.is_err();
        self.lines += 1;
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "cannot write the journal");
            self.file = None;
        }
    }

    /// To be called before a blob gets its final name, and after a pin. A `gone` that a power loss takes back would
    /// leave an older line that vouches for the new file, whose bytes may not be on disk yet.
    pub(super) fn settle(&mut self) -> Result<(), DiskError> {
        if self.unsettled {
            let Some(file) = &self.file else {
                let lost = io::Error::other("it could not be written before");
                return Err(DiskError::on("sync", &self.path)(lost));
            };
            file.sync_data().map_err(DiskError::on("sync", &self.path))?;
            self.unsettled = false;
        }
        Ok(())
    }

    /// Whether `rewrite` is due: most lines are dead, or lines were lost.
    pub(super) fn wants_rewrite(&self, live: usize) -> bool {
        self.file.is_none() || self.lines > live.saturating_mul(2).saturating_add(DEAD_LINES)
    }

    /// As after a failed write.
    #[cfg(test)]
    pub(super) fn lose_file(&mut self) {
        self.file = None;
    }

    /// Writes it anew with what holds now, replaced by rename.
    pub(super) fn rewrite(&mut self, contents: &Contents) -> Result<(), DiskError> {
        let new = self.path.with_extension("new");
        let mut text = String::new();
        contents.pins.iter().for_each(|(image, pin)| text.push_str(&Line::Pin(image.clone(), pin.clone()).text()));
        contents.blobs.iter().for_each(|(digest, size)| text.push_str(&Line::Blob(*digest, *size).text()));
        let write = || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &self.path)
        };
        write().map_err(DiskError::on("write", &new))?;
        if let Some(dir) = self.path.parent() {
            Disk::sync_dir(dir)?;
        }
        self.file = Some(append_to(&self.path).map_err(DiskError::on("open", &self.path))?);
        self.lines = contents.pins.len() + contents.blobs.len();
        (self.torn, self.unsettled) = (false, false);
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(BYTES_MAX).read_to_end(&mut bytes).map(|_| bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(bytes),
        Err(error) => Err(error),
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines() -> Vec<Line> {
        let [a, b, c] = [b"a", b"b", b"c"].map(|x| Digest::of(x));
        let pin = |image: &str, digests: &[Digest]| {
            let until = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
            Line::Pin(image.to_owned(), Pin { until, digests: digests.to_vec() })
        };
        let unpin = Line::Unpin("r.example/a:1".to_owned());
        vec![
            Line::Blob(a, 7),
            pin("r.example/a:1", &[a]),
            Line::Blob(b, 9),
            Line::Gone(a),
            pin("r.example/b:2", &[b, c]),
            unpin,
        ]
    }

    fn contents(lines: &[Line]) -> Contents {
        let mut contents = Contents::default();
        lines.iter().for_each(|line| contents.apply(line.clone()));
        contents
    }

    #[test]
    fn a_rewritten_journal_says_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, _) = Journal::open(path.clone());
        lines().iter().for_each(|line| journal.append(line));
        let (mut journal, before) = Journal::open(path.clone());
        assert_eq!(before, contents(&lines()));
        journal.rewrite(&before).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
        assert_eq!(Journal::open(path).1, before);
    }

    proptest! {
        #[test]
        fn a_torn_last_line_loses_only_itself(cut in 0usize..800) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            let text: String = lines().iter().map(Line::text).collect();
            let cut = cut.min(text.len());
            fs::write(&path, &text[..cut]).unwrap();
            // A line is whole even where only its line end is missing.
            let whole = (0..=lines().len()).rev().find(|n| {
                let bytes: usize = lines()[..*n].iter().map(|line| line.text().len()).sum();
                bytes <= cut + 1
            }).unwrap();
            let (mut journal, read) = Journal::open(path.clone());
            prop_assert_eq!(read, contents(&lines()[..whole]));
            // What is appended next does not run into the torn line.
            let next = Line::Blob(Digest::of(b"next"), 1);
            journal.append(&next);
            let mut wanted = lines()[..whole].to_vec();
            wanted.push(next);
            prop_assert_eq!(Journal::open(path).1, contents(&wanted));
        }

        #[test]
        fn garbage_is_skipped(garbage: Vec<u8>, flip in 0usize..300) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            fs::write(&path, &garbage).unwrap();
            prop_assert_eq!(Journal::open(path.clone()).1, Contents::default());
            let mut bytes: Vec<u8> = lines().iter().flat_map(|line| line.text().into_bytes()).collect();
            bytes[flip] ^= 4;
            fs::write(&path, &bytes).unwrap();
            let _ = Journal::open(path);
        }
    }
}
