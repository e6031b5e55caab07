//! Carries out what waits at the desk: the lease on the own pod, and images one after the other.

use std::collections::HashMap;
use std::pin::pin;
use std::time::{Duration, Instant};

use darter_api::report::PrewarmState;
use futures_util::StreamExt as _;

use super::clip;
use super::desk::{Desk, Held, LeaseOrder};
use super::lease::{Lease, Wish};
use super::pod::{Fault, Left, OwnPod};
use crate::prewarm::{Event, Order, Pin, Prewarm};

/// Between two writes to the API server, whatever the scaler asks for.
const REST: Duration = Duration::from_secs(1);
/// Before a write that failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// Before what nobody waits for is tried again: to take off a lease that is over, which counts no more anyway, or to
/// look for one of an earlier life.
const TIDY_AGAIN: Duration = Duration::from_secs(60);
/// An image that is not here by then does not come.
const IMAGE_PATIENCE: Duration = Duration::from_secs(3600);
/// What a lease is for that an earlier life of the agent wrote: why, only the scaler knows.
const EARLIER: &str = "an earlier life of this agent wrote it";

/// Keeps the lease what it is asked to be. Never ends.
pub(super) async fn leases(desk: &Desk, mut pod: OwnPod, protect_max: Duration) {
    let lease = Lease::new(protect_max);
    let mut keeper = Keeper { desk, lease, is_known: false, is_written: false, order: None };
    let mut wanted = desk.lease();
    let mut again = Some(Instant::now());
    loop {
        let due = again.or_else(|| keeper.lease.until(Instant::now()));
        tokio::select! {
            // The desk lives as long as this.
            _ = wanted.changed() => keeper.order = wanted.borrow_and_update().clone(),
            () = sleep_until(due) => {}
        }
        again = keeper.keep(&mut pod).await.map(|wait| Instant::now() + wait);
        tokio::time::sleep(REST).await;
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

struct Keeper<'a> {
    desk: &'a Desk,
    lease: Lease,
    /// Whether it is known what an earlier life of the agent left on this pod.
    is_known: bool,
    /// There may be an annotation of ours.
    is_written: bool,
    /// What is still to be done.
    order: Option<LeaseOrder>,
}

impl Keeper<'_> {
    /// Does what is to be done now. When it is to be tried again, if it has to be.
    async fn keep(&mut self, pod: &mut OwnPod) -> Option<Duration> {
        if let Err(fault) = self.recall(pod).await {
            self.order = self.order.take().filter(|order| !order.is_over(Instant::now()));
            let Some(order) = &self.order else { return self.troubled(fault) };
            return self.failed(order.sequence(), fault);
        }
        match self.order.clone() {
            Some(LeaseOrder::Protect { sequence, received, length, reason }) => {
                let now = Instant::now();
                let left = (received + length).saturating_duration_since(now);
                match self.lease.wish(now, left) {
                    _ if left.is_zero() => {
                        self.order = None;
                        return Some(Duration::ZERO);
                    }
                    Wish::Spent => {
                        self.refused(sequence, "spent", "it had as much as report.protect_max in one row".to_owned())
                    }
                    Wish::Holds => self.holds(sequence, &reason, now),
                    Wish::Write(until) => match self.write(pod, now, until).await {
                        Ok(()) => {
                            self.lease.written(now, until);
                            self.holds(sequence, &reason, now);
                        }
                        Err(fault) => return self.failed(sequence, fault),
                    },
                }
                self.order = None;
                None
            }
            Some(LeaseOrder::Release { sequence }) => match self.take_off(pod).await {
                Ok(()) => {
                    self.order = None;
                    self.desk.holds(None);
                    None
                }
                Err(fault) => self.failed(sequence, fault),
            },
            // A lease that ran out by itself.
            None if self.is_written && self.lease.until(Instant::now()).is_none() => {
                self.desk.holds(None);
                self.take_off(pod).await.err().and_then(|fault| self.troubled(fault))
            }
            None => None,
        }
    }

    /// Finds out what an earlier life of the agent left, once.
    async fn recall(&mut self, pod: &mut OwnPod) -> Result<(), Fault> {
        if self.is_known {
            return Ok(());
        }
        let left = pod.left().await?;
        self.is_known = true;
        if let Some(Left { began, until }) = left {
            self.is_written = true;
            self.lease.resume(began, until);
            self.holds(0, EARLIER, Instant::now());
        }
        Ok(())
    }

    async fn write(&mut self, pod: &mut OwnPod, now: Instant, until: Instant) -> Result<(), Fault> {
        // Also one whose answer is lost is written.
        self.is_written = true;
        pod.protect(self.lease.row(now), until).await
    }

    async fn take_off(&mut self, pod: &mut OwnPod) -> Result<(), Fault> {
        if self.is_written {
            pod.release().await?;
            self.is_written = false;
        }
        self.lease.ended(Instant::now());
        Ok(())
    }

    fn holds(&self, sequence: u64, reason: &str, now: Instant) {
        let held = self.lease.until(now).map(|until| {
            let (reason, most) = (reason.to_owned(), now + self.lease.most(now));
            Held { until, reason, sequence, most }
        });
        self.desk.holds(held);
    }

    fn refused(&self, sequence: u64, reason: &'static str, detail: String) {
        self.desk.lease_refused(sequence, reason, detail);
    }

    /// What nobody waits for did not work.
    fn troubled(&self, fault: Fault) -> Option<Duration> {
        self.desk.lease_trouble(fault.reason, &fault.detail);
        Some(TIDY_AGAIN)
    }

    fn failed(&mut self, sequence: u64, fault: Fault) -> Option<Duration> {
        let Fault { reason, detail, may_pass } = fault;
        self.refused(sequence, reason, detail);
        if may_pass {
            return Some(AGAIN);
        }
        self.order = None;
        None
    }
}

/// Brings what is ordered, one image at a time. Never ends.
pub(super) async fn images(desk: &Desk, prewarm: &Prewarm) {
    loop {
        while let Some(image) = desk.next_image() {
            let bring = bring(desk, prewarm, &image);
            if tokio::time::timeout(IMAGE_PATIENCE, bring).await.is_err() {
                let hours = IMAGE_PATIENCE.as_secs() / 3600;
                desk.note_image(&image, |told| fail(told, &format!("it was not here after {hours} h")));
            }
        }
        desk.images.notified().await;
    }
}

async fn bring(desk: &Desk, prewarm: &Prewarm, image: &str) {
    let order = Order { image: image.to_owned(), store_only: false, pin: None, login: None };
    let mut events = pin!(prewarm.clone().run(order));
    let mut came = HashMap::new();
    while let Some(event) = events.next().await {
        desk.note_image(image, |told| match event {
            Event::Image { digest, blobs } => {
                told.digest = Some(digest);
                told.total_bytes = Some(blobs.iter().map(|blob| blob.size).fold(0, u64::saturating_add));
            }
            Event::Blob { digest, bytes } => {
                came.insert(digest, bytes);
                told.done_bytes = came.values().copied().fold(0, u64::saturating_add);
            }
            Event::Unpacking | Event::Unpinned { .. } => {}
            Event::Done { bytes, pin, .. } => {
                (told.done_bytes, told.is_pinned) = (bytes, Some(matches!(pin, Pin::Set { .. })));
                told.set_state(PrewarmState::Done);
            }
            Event::Failed { reason } => fail(told, &reason),
        });
    }
    // Its task ended without a last word.
    desk.note_image(image, |told| {
        if told.state() == PrewarmState::Coming {
            fail(told, "it ended early; the agent's log may say why");
        }
    });
}

fn fail(told: &mut darter_api::report::Prewarm, reason: &str) {
    told.error = Some(clip(reason));
    told.set_state(PrewarmState::Failed);
}
