//! Which errors the GPUs of this boot had: each counted once, and none forgotten that still counts.
//!
//! One error comes from NVML and from the kernel's log, and the log comes again with every start of the
//! agent. So an error is known by GPU, code and time, and what was cleared stays cleared. The agent stores
//! the record and loads it; with another boot it begins anew.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Facts, LinkFault, Policy, Verdict};
use crate::gpu::{PciAddress, Time};

/// NVML's event and the kernel's line of one error are read at most this far apart.
const SAME: Duration = Duration::from_secs(2);

/// GPU and code pairs: 16 GPUs with 32 codes each, in 40 KiB of JSON. A GPU that is broken has a few codes, and
/// programs that are broken have a dozen.
const NOTED_MAX: usize = 512;

/// GPUs that were cleared by themselves; a node has 16 at most.
const CLEARED_MAX: usize = 64;

/// An error, as it was heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When, since the boot.
    pub at: Time,
    /// Which GPU.
    pub pci: PciAddress,
    /// Which code.
    pub xid: u32,
    /// What an NVLink error says besides.
    pub link: Option<LinkFault>,
}

/// One code of one GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// Which GPU.
    pub pci: PciAddress,
    /// Which code.
    pub xid: u32,
    /// When it came first in this boot.
    pub first: Time,
    /// And last.
    pub last: Time,
    /// How often.
    pub count: u64,
    /// Which NVLink had it last, where the driver said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<u8>,
}

/// A code that still stands against a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outstanding {
    /// Which GPU.
    pub pci: PciAddress,
    /// Which code.
    pub xid: u32,
    /// Degraded or fatal.
    pub verdict: Verdict,
}

/// The errors of one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The kernel's boot id.
    boot_id: String,
    noted: Vec<Noted>,
    /// What came until then counts no more, on any GPU.
    cleared_all: Option<Time>,
    /// Or on one.
    cleared: BTreeMap<PciAddress, Time>,
}

impl Record {
    /// None yet.
    pub fn new(boot_id: impl Into<String>) -> Self {
        Self { boot_id: boot_id.into(), noted: Vec::new(), cleared_all: None, cleared: BTreeMap::new() }
    }

    /// What was stored, if it is of this boot.
    pub fn restore(stored: Self, boot_id: &str) -> Self {
        // Of unknown origin, if larger than it ever gets.
        let is_ours = stored.noted.len() <= NOTED_MAX && stored.cleared.len() <= CLEARED_MAX;
        if stored.boot_id == boot_id && is_ours { stored } else { Self::new(boot_id) }
    }

    /// Notes an error. False if it was known already.
    pub fn note(&mut self, event: &Event, policy: &Policy) -> bool {
        let link = event.link.as_ref().and_then(|link| link.link);
        let found = self.noted.iter_mut().find(|noted| (noted.pci, noted.xid) == (event.pci, event.xid));
        let Some(noted) = found else {
            let Event { at, pci, xid, .. } = *event;
            self.noted.push(Noted { pci, xid, first: at, last: at, count: 1, link });
            if self.noted.len() > NOTED_MAX {
                self.forget_least(policy);
            }
            return true;
        };
        // Between the first and the last: the log is read again. Around them: the other source.
        if event.at + SAME >= noted.first && event.at <= noted.last + SAME {
            return false;
        }
        noted.first = noted.first.min(event.at);
        noted.last = noted.last.max(event.at);
        noted.count = noted.count.saturating_add(1);
        noted.link = link.or(noted.link);
        true
    }

    /// A GPU was reset, or the operator says that it is well: what came until now counts no more. `None` is
    /// all GPUs.
    pub fn clear(&mut self, now: Time, pci: Option<PciAddress>) {
        let Some(pci) = pci else {
            self.cleared_all = Some(now);
            self.cleared.clear();
            return;
        };
        self.cleared.insert(pci, now);
        if self.cleared.len() > CLEARED_MAX {
            let oldest = self.cleared.iter().min_by_key(|(_, at)| **at).map(|(pci, _)| *pci);
            oldest.map(|pci| self.cleared.remove(&pci));
        }
    }

    /// What still stands, by GPU and code. `facts` are those of a GPU now.
    pub fn outstanding(&self, policy: &Policy, facts: impl Fn(PciAddress) -> Facts) -> Vec<Outstanding> {
        let stands = self.noted.iter().filter(|noted| self.cleared_at(noted.pci).is_none_or(|at| noted.last > at));
        let judged = stands.map(|noted| Outstanding {
            pci: noted.pci,
            xid: noted.xid,
            verdict: policy.verdict(noted.xid, facts(noted.pci)),
        });
        let mut judged: Vec<_> = judged.filter(|found| found.verdict > Verdict::MetricOnly).collect();
        judged.sort_by_key(|found| (found.pci, found.xid));
        judged
    }

    /// Everything noted in this boot, cleared or not, for counters.
    pub fn noted(&self) -> &[Noted] {
        &self.noted
    }

    fn cleared_at(&self, pci: PciAddress) -> Option<Time> {
        self.cleared_all.max(self.cleared.get(&pci).copied())
    }

    /// The least severe goes, and of these the oldest: a fatal one is never lost to what programs do.
    fn forget_least(&mut self, policy: &Policy) {
        let least = self.noted.iter().enumerate().min_by_key(|(_, noted)| {
            let is_cleared = self.cleared_at(noted.pci).is_some_and(|at| noted.last <= at);
            (policy.worst(noted.xid), !is_cleared, noted.last)
        });
        least.map(|(at, _)| at).map(|at| self.noted.swap_remove(at));
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn pci(bus: u8) -> PciAddress {
        PciAddress { domain: 0, bus, device: 0 }
    }

    fn event(seconds: u64, bus: u8, xid: u32) -> Event {
        Event { at: Time::ZERO + Duration::from_secs(seconds), pci: pci(bus), xid, link: None }
    }

    fn standing(record: &Record) -> Vec<(u8, u32)> {
        let found = record.outstanding(&Policy::default(), |_| Facts::default());
        found.iter().map(|found| (found.pci.bus, found.xid)).collect()
    }

    #[test]
    fn one_error_from_two_sources_is_one() {
        let (mut record, policy) = (Record::new("boot"), Policy::default());
        assert!(record.note(&event(100, 1, 79), &policy));
        assert!(!record.note(&event(102, 1, 79), &policy));
        assert!(!record.note(&event(98, 1, 79), &policy));
        assert!(record.note(&event(103, 1, 79), &policy));
        assert!(record.note(&event(103, 2, 79), &policy), "another GPU");
        assert!(record.note(&event(103, 1, 48), &policy), "another code");
        assert_eq!(record.noted().iter().map(|noted| noted.count).collect::<Vec<_>>(), [2, 1, 1]);
    }

    #[test]
    fn a_restart_neither_raises_again_nor_forgets() {
        let (mut record, policy) = (Record::new("boot"), Policy::default());
        let log = [event(10, 1, 79), event(20, 1, 13), event(500, 1, 13), event(900, 1, 13)];
        assert!(log.iter().all(|event| record.note(event, &policy)));
        let stored = serde_json::to_string(&record).unwrap();
        let mut record = Record::restore(serde_json::from_str(&stored).unwrap(), "boot");
        assert_eq!(standing(&record), [(1, 79)]);
        assert!(!log.iter().any(|event| record.note(event, &policy)), "the log comes again");
        let record = Record::restore(record, "another boot");
        assert_eq!(record, Record::new("another boot"));
    }

    #[test]
    fn what_is_cleared_stays_cleared_until_it_comes_again() {
        let (mut record, policy) = (Record::new("boot"), Policy::default());
        for known in [event(10, 1, 79), event(10, 2, 48), event(30, 3, 63)] {
            record.note(&known, &policy);
        }
        record.clear(event(100, 0, 0).at, Some(pci(1)));
        assert_eq!(standing(&record), [(2, 48), (3, 63)]);
        record.note(&event(10, 1, 79), &policy);
        record.note(&event(90, 1, 62), &policy);
        assert_eq!(standing(&record), [(2, 48), (3, 63)], "heard of late");
        record.note(&event(101, 1, 79), &policy);
        assert_eq!(standing(&record), [(1, 79), (2, 48), (3, 63)]);
        record.clear(event(200, 0, 0).at, None);
        assert_eq!(standing(&record), []);
    }

    #[test]
    fn a_verdict_follows_what_is_known_of_the_gpu_now() {
        let (mut record, policy) = (Record::new("boot"), Policy::default());
        record.note(&event(10, 1, 154), &policy);
        record.note(&event(10, 1, 74), &policy);
        let facts = Facts { has_nvlink: Some(true), recovery_action: Some(1) };
        let verdicts: Vec<_> = record.outstanding(&policy, |_| facts).iter().map(|found| found.verdict).collect();
        assert_eq!(verdicts, [Verdict::Fatal, Verdict::Degraded]);
        assert_eq!(standing(&record), []);
    }

    #[test]
    fn a_stored_record_that_is_too_large_is_not_ours() {
        let mut stored = Record::new("boot");
        let noted = |n| Noted { pci: pci(1), xid: n, first: Time::ZERO, last: Time::ZERO, count: 1, link: None };
        stored.noted = (0..=512).map(noted).collect();
        assert_eq!(Record::restore(stored, "boot"), Record::new("boot"));
    }

    proptest! {
        // Hundreds of events a case are cases enough.
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_record_is_bounded_and_programs_cannot_push_out_what_is_fatal(
            before in vec((0u64..10_000, 0u8..16, 162u32..4000), 0..400), fatal in 0u8..16,
            after in vec((0u64..10_000, 0u8..16, 162u32..4000), 520..700),
        ) {
            let (mut record, policy) = (Record::new("boot"), Policy::default());
            for (at, bus, xid) in before {
                record.note(&event(at, bus, xid), &policy);
            }
            record.note(&event(0, fatal, 79), &policy);
            for (at, bus, xid) in after {
                record.note(&event(at, bus, xid), &policy);
            }
            prop_assert!(record.noted().len() <= NOTED_MAX);
            prop_assert_eq!(standing(&record), [(fatal, 79)]);
        }

    }

    proptest! {
        #[test]
        fn a_log_that_is_read_twice_counts_once(log in vec((0u64..100, 0u8..3, 78u32..81), 0..60)) {
            let mut log: Vec<_> = log.into_iter().map(|(at, bus, xid)| event(at, bus, xid)).collect();
            log.sort_by_key(|event| event.at);
            let (mut record, policy) = (Record::new("boot"), Policy::default());
            for event in &log {
                record.note(event, &policy);
            }
            let once = record.clone();
            for event in &log {
                prop_assert!(!record.note(event, &policy));
            }
            prop_assert_eq!(record, once);
        }
    }
}
