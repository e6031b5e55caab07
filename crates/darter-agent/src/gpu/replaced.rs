//! A driver that is replaced under a running container: the library that was mounted as it started is of the old
//! version, and no call into NVML brings the new one. Or systemd was reloaded, and the container may not open the
//! devices any more. Only a container that is started anew has both again, so the agent ends, if it is allowed to.
//!
//! Not where NVML never answered this agent: then the next would be no better, and would end too.

use std::time::{Duration, Instant};

use tracing::error;

use super::host::Host;
use super::sample::Driver;

/// NVML's word for a library and a driver of different versions.
const MISMATCH: u32 = 18;

/// Whether the driver was replaced, and since when.
#[derive(Debug)]
pub(super) struct Replaced {
    /// For so long it may be that it still is at it. None: the agent goes on, whatever it is.
    grace: Option<Duration>,
    has_answered: bool,
    since: Option<Instant>,
}

impl Replaced {
    pub(super) fn after(grace: Duration) -> Self {
        Self { grace: Some(grace).filter(|grace| !grace.is_zero()), has_answered: false, since: None }
    }

    /// Takes what is known now. True: the agent is to end.
    pub(super) fn ends_agent(&mut self, driver: &Driver, host: &Host, now: Instant) -> bool {
        let why = match driver {
            Driver::Running(_) => {
                self.has_answered = true;
                None
            }
            Driver::Failed(MISMATCH, _) => Some("the driver was replaced under this agent"),
            Driver::Failed(..) if host.control_node_opens == Some(false) => {
                Some("this agent may not open the driver's devices any more")
            }
            _ => None,
        };
        let Some((why, grace)) = why.zip(self.grace).filter(|_| self.has_answered) else {
            self.since = None;
            return false;
        };
        let lasts = now.saturating_duration_since(*self.since.get_or_insert(now));
        if lasts < grace {
            return false;
        }
        error!(
            seconds = lasts.as_secs(),
            "{why}: ending, to be started anew with the driver as it is now (gpu.driver_grace)"
        );
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::Versions;
    use super::*;

    fn failed(code: u32) -> Driver {
        Driver::Failed(code, String::new())
    }

    fn running() -> Driver {
        Driver::Running(Versions::default())
    }

    /// Whether the agent ends, at each of these seconds.
    fn played(grace: u64, story: &[(u64, Driver, Option<bool>)]) -> Vec<bool> {
        let (mut replaced, start) = (Replaced::after(Duration::from_secs(grace)), Instant::now());
        let mut look = |(at, driver, opens): &(u64, Driver, Option<bool>)| {
            let host = Host { control_node_opens: *opens, ..Host::default() };
            replaced.ends_agent(driver, &host, start + Duration::from_secs(*at))
        };
        story.iter().map(&mut look).collect()
    }

    #[test]
    fn a_driver_that_was_replaced_ends_the_agent_after_the_grace_and_not_before() {
        let story = [(0, running(), None), (5, failed(18), None), (34, failed(18), None), (35, failed(18), None)];
        assert_eq!(played(30, &story), [false, false, false, true]);
    }

    #[test]
    fn devices_that_may_not_be_opened_any_more_do_too_and_another_failure_does_not() {
        let of = |opens| [(0, running(), None), (5, failed(999), opens), (35, failed(999), opens)];
        assert_eq!(played(30, &of(Some(false))), [false, false, true]);
        assert_eq!(played(30, &of(Some(true))), [false, false, false]);
        assert_eq!(played(30, &of(None)), [false, false, false]);
    }

    #[test]
    fn an_agent_that_never_had_an_answer_goes_on_and_so_does_one_without_a_grace() {
        assert_eq!(played(30, &[(0, failed(18), None), (3600, failed(18), None)]), [false, false]);
        assert_eq!(played(0, &[(0, running(), None), (5, failed(18), None), (3600, failed(18), None)]), [false; 3]);
    }

    #[test]
    fn a_driver_that_answers_again_meanwhile_has_its_grace_anew() {
        let story = [
            (0, running(), None),
            (5, failed(18), None),
            (30, running(), None),
            (36, failed(18), None),
            (60, Driver::NoLibrary(String::new()), None),
            (70, failed(18), None),
            (99, failed(18), None),
        ];
        assert_eq!(played(30, &story), [false; 7]);
    }
}
