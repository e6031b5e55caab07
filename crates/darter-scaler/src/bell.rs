//! Says when there is something to decide: at once for what cannot wait, a little later for what comes often.
//!
//! It rings once however many things happen before it does.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::clock::stopwatch;

/// What changes within this is decided together: a push reaches KEDA after it.
pub const SOON: Duration = Duration::from_millis(5);
/// A report that says nothing new in kind waits for others: a thousand agents report two hundred times a
/// second, and one decision hears all of them.
pub const LATER: Duration = Duration::from_millis(500);

/// One listener, any number of ringers.
#[derive(Debug, Default)]
pub struct Bell {
    due: Mutex<Option<Instant>>,
    news: Notify,
}

impl Bell {
    /// It rings after so long at the latest.
    pub fn ring(&self, within: Duration) {
        let at = stopwatch() + within;
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        if due.is_none_or(|due| at < due) {
            *due = Some(at);
            self.news.notify_one();
        }
    }

    /// Waits until it rings, or until `latest`; never returns before `earliest`.
    pub async fn rung(&self, earliest: Instant, latest: Instant) {
        loop {
            let due = *self.due.lock().unwrap_or_else(PoisonError::into_inner);
            let at = due.map_or(latest, |due| due.min(latest)).max(earliest);
            tokio::select! {
                () = sleep_until(at) => {
                    *self.due.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return;
                }
                () = self.news.notified() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_rings_for_what_is_due_first_and_once_for_all_that_came_before() {
        let (bell, began) = (Bell::default(), stopwatch());
        let due = || *bell.due.lock().unwrap();
        let far = began + Duration::from_secs(3600);
        bell.ring(LATER);
        let first = due().unwrap();
        bell.ring(SOON);
        let sooner = due().unwrap();
        assert!(sooner < first);
        bell.ring(LATER);
        assert_eq!(due(), Some(sooner), "what can wait does not put off what cannot");
        bell.rung(began, far).await;
        assert!(stopwatch() >= sooner && due().is_none(), "nothing rang since");
        // Whatever rings, a decision that took long has its rest first.
        bell.ring(Duration::ZERO);
        let rest = stopwatch() + SOON;
        bell.rung(rest, far).await;
        assert!(stopwatch() >= rest);
    }
}
