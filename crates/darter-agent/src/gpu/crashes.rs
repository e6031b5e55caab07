//! A library that takes the whole agent down as it is loaded or asked: after some times nobody asks it any more,
//! and the node pulls images still.
//!
//! A mark in a file stands from before the first call until a whole round of questions came back. An agent that finds
//! it there at its start is the next of one that ended in between. Whatever killed that one, it counts: an agent
//! cannot tell, and one that is killed for its memory within its first seconds, again and again, is as well off.
//! Not here: calls that hang, which harm nobody.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use crate::files;
use crate::log::chain;

/// So many crashes within this time, and NVML is asked no more. The kubelet starts a container that crashes again
/// after 10 s, then 20 s: half a minute without a mirror is what it costs.
const CRASHES_MAX: u32 = 3;
const WITHIN: Duration = Duration::from_secs(60 * 60);
/// What the driver writes is a line or two.
const VERSION_MAX: usize = 1024;

/// What is stored.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
struct Known {
    boot_id: String,
    /// What the driver says of itself in /proc: another driver is another library.
    driver: Option<String>,
    /// NVML is being asked, and was not yet seen to answer.
    is_asking: bool,
    /// When an agent was found to have ended while it asked, in seconds since 1970; the newest last.
    crashes: Vec<u64>,
    /// It is not asked any more.
    is_off: bool,
}

/// The file, and what is in it.
#[derive(Debug)]
pub(super) struct Crashes {
    file: PathBuf,
    driver: PathBuf,
    known: Known,
    fails: bool,
}

impl Crashes {
    /// Looks how the agent before this one ended. `root` is the host's.
    pub(super) fn open(data: &Path, root: &Path, boot_id: &str) -> Self {
        Self::open_at(data, root, boot_id, SystemTime::now())
    }

    fn open_at(data: &Path, root: &Path, boot_id: &str, now: SystemTime) -> Self {
        let (file, driver) = (data.join("nvml.json"), root.join("proc/driver/nvidia/version"));
        let stored = match fs::read(&file) {
            Ok(text) => serde_json::from_slice::<Known>(&text)
                .inspect_err(
                    |error| info!(file = %file.display(), %error, "whether NVML crashed is not readable: asking it"),
                )
                .ok(),
            Err(_) => None,
        };
        let known = stored.filter(|known| known.boot_id == boot_id).unwrap_or_default();
        let mut crashes = Self { file, driver, known: Known { boot_id: boot_id.to_owned(), ..known }, fails: false };
        crashes.look(now);
        crashes
    }

    fn look(&mut self, now: SystemTime) {
        self.lift_for_another_driver();
        if !std::mem::take(&mut self.known.is_asking) {
            return;
        }
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // A clock that was set back makes none of them younger.
        self.known.crashes.retain(|at| now.saturating_sub(*at) <= WITHIN.as_secs());
        self.known.crashes.push(now);
        let times = self.times();
        if times >= CRASHES_MAX {
            self.known.is_off = true;
            error!(
                times,
                "NVML is not asked any more: the agents before this one ended while they asked it. \
                 `darter gpu clear` has it asked again, and so has another driver"
            );
        } else {
            warn!(times, "the agent before this one ended while it asked NVML");
        }
        self.store();
    }

    /// How often agents ended over NVML, where it is not asked any more for that.
    pub(super) fn has_turned_off(&mut self) -> Option<u32> {
        if self.known.is_off && self.lift_for_another_driver() {
            self.store();
        }
        self.known.is_off.then(|| self.times())
    }

    /// NVML is about to be loaded and asked.
    pub(super) fn begin(&mut self) {
        self.known.driver = version(&self.driver);
        self.mark(true);
    }

    /// It answered, or said that it does not start, or the agent ends in an orderly way.
    pub(super) fn end(&mut self) {
        self.mark(false);
    }

    /// The operator has it asked again. How often agents had ended over it, if it was not asked.
    pub(super) fn clear(&mut self) -> io::Result<Option<u32>> {
        let times = self.has_turned_off();
        if times.is_some() {
            info!("NVML is asked again: the operator says so");
            self.known.is_off = false;
            self.known.crashes.clear();
            self.write()?;
        }
        Ok(times)
    }

    fn times(&self) -> u32 {
        u32::try_from(self.known.crashes.len()).unwrap_or(u32::MAX)
    }

    fn mark(&mut self, is_asking: bool) {
        if self.known.is_asking != is_asking {
            self.known.is_asking = is_asking;
            self.store();
        }
    }

    /// What crashed with one driver may do well with the next. Whether there is another.
    fn lift_for_another_driver(&mut self) -> bool {
        let now = version(&self.driver);
        let is_another = !self.known.crashes.is_empty() && now.is_some() && now != self.known.driver;
        if is_another {
            info!("another driver: NVML is asked again");
            (self.known.driver, self.known.is_off, self.known.is_asking) = (now, false, false);
            self.known.crashes.clear();
        }
        is_another
    }

    fn store(&mut self) {
        let stored = self.write();
        if let Err(error) = &stored
            && !self.fails
        {
            warn!(file = %self.file.display(), error = %chain(error), "that NVML is asked is not stored: should it crash this agent, the next will not know");
        }
        self.fails = stored.is_err();
    }

    fn write(&self) -> io::Result<()> {
        files::replace(&self.file, &serde_json::to_vec_pretty(&self.known)?)
    }
}

fn version(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    Some(text.chars().take(VERSION_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        data: tempfile::TempDir,
        root: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            let node = Self { data: tempfile::tempdir().unwrap(), root: tempfile::tempdir().unwrap() };
            fs::create_dir_all(node.root.path().join("proc/driver/nvidia")).unwrap();
            node.has("570");
            node
        }

        fn has(&self, driver: &str) {
            fs::write(self.root.path().join("proc/driver/nvidia/version"), driver).unwrap();
        }

        fn agent(&self, boot: &str, seconds: u64) -> Crashes {
            let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds);
            Crashes::open_at(self.data.path(), self.root.path(), boot, now)
        }

        /// So many agents that end while they ask, a minute apart.
        fn crashed(&self, times: u64) -> Crashes {
            for time in 0..times {
                let mut agent = self.agent("boot", 60 * time);
                assert_eq!(agent.has_turned_off(), None, "after {time}");
                agent.begin();
            }
            self.agent("boot", 60 * times)
        }
    }

    #[test]
    fn the_agent_after_the_third_crash_does_not_ask_and_one_after_it_neither() {
        let node = Node::new();
        assert_eq!(node.crashed(3).has_turned_off(), Some(3));
        assert_eq!(node.agent("boot", 90_000).has_turned_off(), Some(3), "it stays off, however long ago it was");
    }

    #[test]
    fn who_was_answered_or_stopped_in_good_order_did_not_crash() {
        let node = Node::new();
        for time in 0..9 {
            let mut agent = node.agent("boot", 60 * time);
            assert_eq!(agent.has_turned_off(), None);
            agent.begin();
            agent.end();
        }
        assert_eq!(node.crashed(2).has_turned_off(), None);
    }

    #[test]
    fn crashes_that_are_far_apart_are_no_loop() {
        let node = Node::new();
        for time in 0..9 {
            let mut agent = node.agent("boot", 3601 * time);
            assert_eq!(agent.has_turned_off(), None);
            agent.begin();
        }
    }

    #[test]
    fn another_driver_another_boot_and_the_operator_have_it_asked_again() {
        let node = Node::new();
        let mut agent = node.crashed(3);
        node.has("580");
        assert_eq!(agent.has_turned_off(), None, "a driver that came while the agent ran");
        assert_eq!(node.agent("boot", 300).has_turned_off(), None);
        let node = Node::new();
        node.crashed(3);
        node.has("580");
        assert_eq!(node.agent("boot", 300).has_turned_off(), None, "and while none ran");
        let node = Node::new();
        assert!(node.crashed(3).has_turned_off().is_some());
        assert_eq!(node.agent("another boot", 300).has_turned_off(), None);
        let node = Node::new();
        let mut agent = node.crashed(3);
        assert_eq!((agent.clear().unwrap(), agent.clear().unwrap()), (Some(3), None));
        assert_eq!((agent.has_turned_off(), node.agent("boot", 300).has_turned_off()), (None, None));
        // From the beginning.
        agent.begin();
        assert_eq!(node.agent("boot", 400).has_turned_off(), None);
    }

    #[test]
    fn a_driver_that_is_away_for_a_moment_is_no_other_one() {
        let node = Node::new();
        let mut agent = node.crashed(3);
        fs::remove_file(node.root.path().join("proc/driver/nvidia/version")).unwrap();
        assert_eq!(agent.has_turned_off(), Some(3));
    }
}
