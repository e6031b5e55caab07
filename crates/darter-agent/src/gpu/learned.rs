//! What this agent learns of its GPUs in time, kept for the next one: how many there are, and how little power
//! each takes when it does nothing.
//!
//! For this boot only: at the next one the node may have other GPUs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use darter_core::gpu::idle::Floor;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::files;
use crate::log::chain;

/// How often the file is written at most: a floor sinks a little at a time.
const EVERY: Duration = Duration::from_secs(60);

/// What is stored.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
struct Known {
    boot_id: String,
    /// The most GPUs that were seen.
    gpus: Option<u32>,
    /// By uuid.
    floors: BTreeMap<String, Floor>,
}

/// The file, and what is in it.
pub(super) struct Learned {
    file: PathBuf,
    known: Known,
    written: Option<Instant>,
    fails: bool,
}

impl Learned {
    /// What an earlier agent learned in this boot.
    pub(super) fn open(data: &Path, boot_id: &str) -> Self {
        let file = data.join("gpus.json");
        let stored = match fs::read(&file) {
            Ok(text) => serde_json::from_slice::<Known>(&text)
                .inspect_err(|error| info!(file = %file.display(), %error, "what was learned of GPUs is not readable: learning it anew"))
                .ok(),
            Err(_) => None,
        };
        let known = stored.filter(|known| known.boot_id == boot_id);
        let new = || Known { boot_id: boot_id.to_owned(), ..Known::default() };
        Self { file, known: known.unwrap_or_else(new), written: None, fails: false }
    }

    pub(super) const fn gpus(&self) -> Option<u32> {
        self.known.gpus
    }

    pub(super) fn floor(&self, uuid: &str) -> Floor {
        self.known.floors.get(uuid).copied().unwrap_or_default()
    }

    /// Stores what is known by now, if it is news and the last time was not a moment ago. A GPU that is away
    /// keeps its floor.
    pub(super) fn keep(&mut self, gpus: Option<u32>, floors: impl Iterator<Item = (String, Floor)>) {
        let mut known = Known { gpus, ..self.known.clone() };
        known.floors.extend(floors.filter(|(_, floor)| *floor != Floor::default()));
        // A count is worth a write at once: the next agent misses a GPU by it.
        let is_due = gpus != self.known.gpus || self.written.is_none_or(|at| at.elapsed() >= EVERY);
        if known == self.known || !is_due {
            return;
        }
        self.known = known;
        self.written = Some(Instant::now());
        let stored = self.store();
        if let Err(error) = &stored
            && !self.fails
        {
            warn!(file = %self.file.display(), error = %chain(error), "what is learned of GPUs is not stored: a restart forgets it");
        }
        self.fails = stored.is_err();
    }

    fn store(&self) -> std::io::Result<()> {
        files::replace(&self.file, &serde_json::to_vec_pretty(&self.known)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(milliwatts: f64) -> Floor {
        Floor { empty_milliwatts: Some(milliwatts), loaded_milliwatts: None }
    }

    #[test]
    fn what_was_learned_is_there_after_a_restart_and_gone_after_a_reboot() {
        let data = tempfile::tempdir().unwrap();
        let mut first = Learned::open(data.path(), "this-boot");
        assert_eq!((first.gpus(), first.floor("GPU-a")), (None, Floor::default()));
        first.keep(Some(8), [("GPU-a".to_owned(), floor(77_000.0))].into_iter());
        // Not again so soon, but for a count.
        first.keep(Some(8), [("GPU-a".to_owned(), floor(76_000.0))].into_iter());
        assert_eq!(Learned::open(data.path(), "this-boot").floor("GPU-a"), floor(77_000.0));
        first.keep(Some(9), [("GPU-b".to_owned(), floor(70_000.0))].into_iter());
        let second = Learned::open(data.path(), "this-boot");
        assert_eq!(
            (second.gpus(), second.floor("GPU-a"), second.floor("GPU-b")),
            (Some(9), floor(77_000.0), floor(70_000.0))
        );
        assert_eq!(Learned::open(data.path(), "another-boot").gpus(), None);
        fs::write(data.path().join("gpus.json"), "{half").unwrap();
        assert_eq!(Learned::open(data.path(), "this-boot").gpus(), None);
    }
}
