//! The text of a trace: of a file, or of the one in a compressed archive.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;

/// Ten times the largest public trace, unpacked: an archive must not fill the memory.
const TEXT_MAX: u64 = 1 << 30;

/// The text at `path`: of `.tar.gz` the first file that is no metadata of macOS, of `.gz` what is in it.
pub(crate) fn text(path: &Path) -> Result<String> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let name = path.to_string_lossy();
    let read = if name.ends_with(".tar.gz") || name.ends_with(".tgz") {
        of_archive(MultiGzDecoder::new(BufReader::new(file)))
    } else if name.ends_with(".gz") {
        all(MultiGzDecoder::new(BufReader::new(file)))
    } else {
        all(file)
    };
    read.with_context(|| format!("cannot read {}", path.display()))
}

fn of_archive(from: impl Read) -> Result<String> {
    let mut archive = tar::Archive::new(from);
    for entry in archive.entries()? {
        let entry = entry?;
        let path = entry.path()?.into_owned();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if entry.header().entry_type().is_file() && !name.starts_with("._") {
            return all(entry).with_context(|| format!("{name} in it"));
        }
    }
    bail!("no file is in it")
}

fn all(from: impl Read) -> Result<String> {
    let mut text = String::new();
    let read = from.take(TEXT_MAX + 1).read_to_string(&mut text)?;
    ensure!(u64::try_from(read).is_ok_and(|read| read <= TEXT_MAX), "longer than {} MiB", TEXT_MAX >> 20);
    Ok(text)
}
