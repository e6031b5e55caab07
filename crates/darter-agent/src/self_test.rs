//! Looks again and again at what containerd meets: the mirror's answer, the disk behind it, and its own
//! configuration.
//!
//! hosts.toml is there only while mirror and disk pass.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::certs_d::{Preflight, preflight_for};
use crate::config::Config;
use crate::containerd::{self, Known};
use crate::log::chain;
use crate::mirror::{self, Seen};
use crate::node::{Note, Notes};
use crate::sites::Registries;
use crate::store::{Checkup, State, Store};

/// A handful of small files, and one question.
const CONTAINERD_PATIENCE: Duration = Duration::from_secs(3);

/// The task, and whom it tells.
pub struct SelfTest {
    /// How often (`certs_d.check_every`), and where containerd's configuration is.
    pub config: Config,
    /// Whose files are looked at.
    pub registries: watch::Receiver<Registries>,
    /// The mirror.
    pub address: SocketAddr,
    /// What it gives blobs from.
    pub store: Store,
    /// The look at its disk.
    pub checkup: Checkup,
    /// Which containerd asked last: some traps are of some versions only.
    pub seen: Seen,
    /// Why the mirror fails, for people.
    pub serving: watch::Sender<Result<(), String>>,
    /// Whether it passes, for hosts.toml.
    pub passing: watch::Sender<bool>,
    /// What containerd's configuration says.
    pub preflight: watch::Sender<Preflight>,
    /// The problems with it that the log has.
    pub said: BTreeSet<String>,
    /// Whom it tells that the store stopped taking blobs.
    pub notes: Notes,
    /// Whether it has been told so.
    pub store_stopped: bool,
}

impl SelfTest {
    /// Looks until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = interval(self.config.certs_d.check_every.0);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled() => return,
            }
            // Each is waited for in turn; a stop waits for none.
            if stop.run_until_cancelled(self.mirror()).await.is_none() {
                return;
            }
            // A file system that hangs must not keep the mirror from being looked at, nor the stop.
            let looked = stop.run_until_cancelled(timeout(CONTAINERD_PATIENCE, self.containerd())).await;
            if let Some(Err(_)) = looked {
                warn!(path = %self.config.containerd.config.display(), "containerd's configuration cannot be read in time");
            }
        }
    }

    async fn mirror(&mut self) {
        let mut outcome = mirror::self_test(self.address).await.map_err(|error| chain(&error).to_string());
        if outcome.is_ok() {
            // A disk that needs longer than an answer may take makes every answer a late 404.
            let looked = self.checkup.look(&self.store, self.config.mirror.answer_within.0).await;
            outcome = looked.map_err(|error| chain(&error).to_string());
        }
        let passes = outcome.is_ok();
        self.serving.send_if_modified(|before| {
            let changed = *before != outcome;
            match &outcome {
                Ok(()) if changed => info!("the mirror answers its self-test"),
                Err(reason) if changed => error!(%reason, "the mirror fails its self-test; hosts.toml is withdrawn"),
                _ => {}
            }
            *before = outcome;
            changed
        });
        self.passing.send_if_modified(|before| std::mem::replace(before, passes) != passes);
        self.note_store();
    }

    fn note_store(&mut self) {
        let state = self.store.state();
        let is_stopped = state != State::Ok;
        if std::mem::replace(&mut self.store_stopped, is_stopped) != is_stopped {
            let stopped = || Note::StoreStopped { reason: state.to_string() };
            self.notes.say(if is_stopped { stopped() } else { Note::StoreWorks });
        }
    }

    async fn containerd(&mut self) {
        let containerd = match self.seen.version() {
            Some(version) => Known::by_requests(version),
            // A containerd that does not look at our files never asks us: its socket tells.
            None => {
                let named = || self.preflight.borrow().judgement.socket.clone();
                containerd::known(self.config.containerd.socket.clone().or_else(named)).await
            }
        };
        let mut config = self.config.clone();
        config.registries.clone_from(&self.registries.borrow().all);
        // It reads files, which may be on a slow disk.
        match tokio::task::spawn_blocking(move || preflight_for(&config, containerd)).await {
            Ok(found) => {
                for problem in found.problems().filter(|problem| self.said.insert(problem.clone())) {
                    warn!(%problem, "containerd may not use the mirror");
                }
                // What went away is said again when it comes back; so the set stays as small as the list.
                self.said.retain(|said| found.problems().any(|problem| problem == *said));
                self.preflight.send_replace(found);
            }
            Err(error) => error!(%error, "cannot look at containerd's configuration"),
        }
    }
}
