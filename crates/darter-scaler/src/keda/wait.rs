//! One stream on which KEDA waits: how it is now, `true` at once when that changes, and again and again while it is
//! wanted.
//!
//! KEDA drops what is pushed while it looks elsewhere, and acts on `true` alone: once is never enough, and `false`
//! is for people who look at the stream.

use std::sync::Arc;
use std::time::Duration;

use darter_api::externalscaler::IsActiveResponse;
use futures_util::{StreamExt as _, stream};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use super::{Active, Keda};
use crate::clock::stopwatch;
use crate::hub::Moment;

/// While a replica is wanted that is said again so often.
const AGAIN: Duration = Duration::from_secs(5);

struct Waiting {
    keda: Keda,
    name: String,
    newest: watch::Receiver<Arc<Moment>>,
    /// What was said last, and when.
    said: Option<(bool, Instant)>,
    _place: OwnedSemaphorePermit,
    _count: Count,
}

/// One stream more, for as long as this is there.
struct Count(Keda);

impl Count {
    fn new(keda: Keda) -> Self {
        keda.hub.metrics.keda_streams.inc();
        Self(keda)
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.hub.metrics.keda_streams.dec();
    }
}

/// The stream. It ends cleanly when the scaler stops or leads no more: KEDA then comes back without a pause.
pub(super) fn active(keda: Keda, name: String, place: OwnedSemaphorePermit) -> Active {
    let newest = keda.hub.newest.subscribe();
    let count = Count::new(keda.clone());
    let waiting = Waiting { keda, name, newest, said: None, _place: place, _count: count };
    stream::unfold(waiting, |mut waiting| async move {
        let result = waiting.next().await?;
        Some((Ok::<_, Status>(IsActiveResponse { result }), waiting))
    })
    .boxed()
}

impl Waiting {
    async fn next(&mut self) -> Option<bool> {
        let stop = self.keda.stop.clone();
        loop {
            self.newest.mark_unchanged();
            if !self.keda.hub.lead.holds() {
                return None;
            }
            // What is not known is not said: the stream stays open, and says it once it is.
            let is_wanted = self.keda.replicas(&self.name).ok().map(|replicas| replicas > 0);
            let is_due = match (is_wanted, self.said) {
                (None, _) => false,
                (Some(true), Some((true, at))) => at.elapsed() >= AGAIN,
                (Some(wanted), Some((said, _))) => wanted != said,
                (Some(_), None) => true,
            };
            if let Some(wanted) = is_wanted.filter(|_| is_due) {
                self.said = Some((wanted, stopwatch()));
                return Some(wanted);
            }
            let again = match self.said {
                Some((true, at)) if is_wanted == Some(true) => at + AGAIN,
                _ => stopwatch() + AGAIN,
            };
            tokio::select! {
                changed = self.newest.changed() => changed.ok()?,
                () = sleep_until(again) => {}
                () = stop.cancelled() => return None,
            }
        }
    }
}
