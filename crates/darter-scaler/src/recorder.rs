//! Decisions on disk, each with all that it was made from: one line of JSON, in two files that take turns.
//!
//! A thread of its own writes: a slow disk delays no decision. What it has no time for is counted, not waited
//! for.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::clock::stopwatch;
use crate::decide::Action;
use crate::hub::Moment;
use crate::record::{LINE_MAX, Record};
use crate::state::{Freeze, Workload};
use crate::{Millis, Policy};

/// Records that wait for the disk: each holds a whole state.
const WAITING_MAX: usize = 2;
const NEW: &str = "decisions.jsonl";
const OLD: &str = "decisions.old.jsonl";

/// Why nothing can be recorded.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {} (record.dir)", .path.display())]
pub struct RecordDirError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A scaler that stops waits for its last record no longer.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// Takes decisions.
#[derive(Debug)]
pub struct Recorder {
    /// None once it stops.
    moments: Option<SyncSender<Arc<Moment>>>,
    /// Ends with the thread.
    writes: Receiver<()>,
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.moments.take());
        // An error is its end.
        let _ = self.writes.recv_timeout(LAST_PATIENCE);
    }
}

impl Recorder {
    /// Goes on in this directory.
    pub fn open(dir: &Path, most: u64, policy: Policy) -> Result<Self, RecordDirError> {
        let wrong = |source| RecordDirError { path: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(wrong)?;
        let log = Log::open(dir, most / 2).map_err(wrong)?;
        let (moments, waiting) = sync_channel(WAITING_MAX);
        let (alive, writes) = sync_channel(1);
        let work = move || {
            let _alive = alive;
            write(log, &policy, &waiting);
        };
        std::thread::Builder::new().name("recorder".to_owned()).spawn(work).map_err(wrong)?;
        Ok(Self { moments: Some(moments), writes })
    }

    /// Keeps it; false where the disk is too slow for that.
    pub fn keep(&self, moment: Arc<Moment>) -> bool {
        self.moments.as_ref().is_some_and(|moments| moments.try_send(moment).is_ok())
    }
}

/// A record of a thousand nodes has ten megabytes: writing takes a quarter of a processor at most, however much is
/// decided. What comes meanwhile is not kept.
const REST: u32 = 3;
/// What took long for want of a processor, or of a disk, is no reason to rest for minutes.
const REST_MAX: Duration = Duration::from_secs(1);

fn write(mut log: Log, policy: &Policy, moments: &Receiver<Arc<Moment>>) {
    let mut is_told = false;
    while let Ok(moment) = moments.recv() {
        let began = stopwatch();
        let record = Record { policy, state: &moment.state, now: moment.now, decision: &moment.decision };
        match log.append(&record) {
            Ok(()) => is_told = false,
            Err(error) if !is_told => {
                is_told = true;
                warn!(%error, dir = %log.dir.display(), "decisions are not recorded (record.dir)");
            }
            Err(_) => {}
        }
        drop(moment);
        std::thread::sleep((began.elapsed() * REST).min(REST_MAX));
    }
}

/// Two files, of which one is written.
struct Log {
    dir: PathBuf,
    file: File,
    bytes: u64,
    /// Of one file.
    most: u64,
}

impl Log {
    fn open(dir: &Path, most: u64) -> io::Result<Self> {
        let path = dir.join(NEW);
        let file = File::options().create(true).append(true).read(true).open(&path)?;
        // A line that was not written to its end is none.
        let whole = whole_lines(&file)?;
        file.set_len(whole)?;
        Ok(Self { dir: dir.to_owned(), file, bytes: whole, most })
    }

    fn append(&mut self, record: &impl Serialize) -> io::Result<()> {
        match self.line(record) {
            // What is there makes room.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge && self.bytes > 0 => {
                fs::rename(self.dir.join(NEW), self.dir.join(OLD))?;
                self.file = File::options().create(true).append(true).open(self.dir.join(NEW))?;
                self.bytes = 0;
                self.line(record)
            }
            written => written,
        }
    }

    /// One line, if it fits.
    fn line(&mut self, record: &impl Serialize) -> io::Result<()> {
        let room = Room { file: &self.file, left: self.most - self.bytes.min(self.most) };
        let mut out = BufWriter::with_capacity(BLOCK, room);
        // Block by block: as a whole it would be in memory twice.
        let written = serde_json::to_writer(&mut out, record).map_err(io::Error::from);
        let written = written.and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
        let left = out.into_parts().0.left;
        if let Err(error) = written {
            // Half a line would make the file one that cannot be read.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes = self.most - left;
        Ok(())
    }
}

/// Bytes that are written at once.
const BLOCK: usize = 256 * 1024;

/// A file that takes so much more.
struct Room<'a> {
    file: &'a File,
    left: u64,
}

impl io::Write for Room<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            let why = "one decision is larger than half of record.max_size";
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        let written = self.file.write(bytes)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes of a file up to the end of its last whole line.
fn whole_lines(file: &File) -> io::Result<u64> {
    Ok(last_break(file, file.metadata()?.len())?.map_or(0, |at| at + 1))
}

/// Where the last line break before this is. Looks no further back than a line can be long.
fn last_break(mut file: &File, before: u64) -> io::Result<Option<u64>> {
    let mut end = before;
    let mut block = vec![0; 64 * 1024];
    while end > 0 && before - end <= LINE_MAX {
        let begin = end.saturating_sub(block.len() as u64);
        let part = &mut block[..usize::try_from(end - begin).unwrap_or(usize::MAX)];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(part)?;
        if let Some(at) = part.iter().rposition(|byte| *byte == b'\n') {
            return Ok(Some(begin + at as u64));
        }
        end = begin;
    }
    Ok(None)
}

/// What a scaler that starts needs of the newest record.
#[derive(Deserialize)]
struct Left {
    now: Millis,
    state: LeftState,
    decision: LeftDecision,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct LeftDecision {
    actions: Vec<Action>,
}

#[derive(Deserialize)]
struct LeftState {
    workloads: BTreeMap<String, Workload>,
    #[serde(default)]
    freeze: Option<Freeze>,
}

/// What a scaler before this one left.
#[derive(Debug, Default)]
pub struct Found {
    /// What they were told, and what was learnt of them.
    pub workloads: BTreeMap<String, Workload>,
    /// Somebody said to hold everything, and nobody said otherwise.
    pub freeze: Option<Freeze>,
}

impl Found {
    /// A record has what was known before it was acted on.
    fn did(&mut self, action: &Action, now: Millis) {
        let Action::Answer { workload, replicas } = action else { return };
        if let Some(workload) = self.workloads.get_mut(workload) {
            workload.tell(*replicas, now);
        }
    }
}

/// What the newest record of this directory has, if it is not older than this, or as much ahead: a clock may
/// have been set. An error is told, and nothing is gone on from.
pub fn left(dir: &Path, within_ms: u64, now: Millis) -> Found {
    let newest = [NEW, OLD].iter().find_map(|name| last_line(&dir.join(name)).transpose());
    let line = match newest {
        Some(Ok(line)) => line,
        None => return Found::default(),
        Some(Err(error)) => {
            warn!(%error, dir = %dir.display(), "cannot read what was decided before");
            return Found::default();
        }
    };
    match serde_json::from_str::<Left>(&line) {
        Ok(left) if now.since(left.now).max(left.now.since(now)) <= within_ms => {
            let mut found = Found { workloads: left.state.workloads, freeze: left.state.freeze };
            for action in left.decision.actions {
                found.did(&action, left.now);
            }
            found
        }
        Ok(_) => Found::default(),
        Err(error) => {
            warn!(%error, dir = %dir.display(), "what was decided before was decided by another version");
            Found::default()
        }
    }
}

fn last_line(path: &Path) -> io::Result<Option<String>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(end) = last_break(&file, file.metadata()?.len())? else { return Ok(None) };
    let begin = last_break(&file, end)?.map_or(0, |at| at + 1);
    if end - begin > LINE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a line that is longer than any record"));
    }
    let mut bytes = Vec::new();
    (&file).seek(SeekFrom::Start(begin))?;
    (&file).take(end - begin).read_to_end(&mut bytes)?;
    String::from_utf8(bytes).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_take_turns_and_a_line_that_was_torn_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path(), 30).unwrap();
        for n in 0..7 {
            log.append(&format!("line-{n}-456")).unwrap();
        }
        let read = |name| fs::read_to_string(dir.path().join(name)).unwrap();
        let wanted = ("\"line-4-456\"\n\"line-5-456\"\n", "\"line-6-456\"\n");
        assert_eq!((read(OLD).as_str(), read(NEW).as_str()), wanted);
        assert!(log.append(&"x".repeat(31)).is_err() && read(NEW).is_empty(), "no file becomes longer than it may");
        drop(log);
        fs::write(dir.path().join(NEW), "whole\ntorn").unwrap();
        let mut log = Log::open(dir.path(), 30).unwrap();
        log.append(&"next").unwrap();
        assert_eq!(read(NEW), "whole\n\"next\"\n");
        assert_eq!(last_line(&dir.path().join(NEW)).unwrap().as_deref(), Some("\"next\""));
    }

    #[test]
    fn only_what_was_decided_lately_is_gone_on_from() {
        let dir = tempfile::tempdir().unwrap();
        assert!(left(dir.path(), 1000, Millis(5000)).workloads.is_empty());
        let line = r#"{"policy":{},"state":{"nodes":{},"workloads":{"a/b":{"pool":"p","gpus":1,"least":0,"most":1,
            "target_milli":1,"cold_start_micros":1,"lead_ms":1,"samples":[],"floors":[],"answered":3,"raised":null,
            "known":0,"needed":[],"gaps":[]}}},"now":5000,
            "decision":{"actions":[{"answer":{"workload":"a/b","replicas":4}}]}}"#;
        fs::write(dir.path().join(NEW), format!("torn\n{}\n", line.replace('\n', ""))).unwrap();
        let answered = |now| left(dir.path(), 1000, Millis(now)).workloads.get("a/b").map(|workload| workload.answered);
        assert_eq!([answered(5000), answered(6000), answered(4000)], [Some(4); 3]);
        assert_eq!([answered(6001), answered(3999)], [None; 2]);
        fs::write(dir.path().join(NEW), "{}\n").unwrap();
        assert_eq!(answered(5000), None, "what is no record keeps no scaler from starting");
    }
}
