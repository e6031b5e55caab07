//! What the GPUs of this node say of themselves, read from NVML.
//!
//! An NVML call can block in the kernel for ever and cannot be cancelled. So one thread of its own makes all
//! of them and nothing waits for it: a scrape, a pull, liveness and the stop read the last snapshot, with its
//! age. No driver and no GPU are normal states. Not here: what follows from a reading (`darter_core::gpu`).

mod calls;
mod clear;
mod crashes;
mod dcgm;
mod exposition;
mod host;
mod judge;
mod learned;
mod library;
mod mig;
mod pods;
mod processes;
mod read;
mod replaced;
mod sample;
mod sampler;
mod xids;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_core::gpu::readiness::{Upgrade, upgrade as upgrades};
use darter_core::ready::Check;
use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::calls::InCalls;
pub use self::clear::{Clear, ClearError, Cleared};
use self::crashes::Crashes;
use self::exposition::Exposition;
use self::host::Host;
use self::judge::Judge;
pub use self::judge::Judgement;
use self::learned::Learned;
use self::pods::Kubelet;
pub use self::pods::{Allocation, Pods};
use self::processes::Sight;
use self::replaced::Replaced;
pub use self::sample::{Driver, Fast, Gpu, Identity, MigDevice, Slow, Snapshot};
use self::xids::Xids;
use crate::config;
use crate::metrics::Metrics;
use crate::node;

/// A call that takes longer than the longest of these is taken for hung: three of the short intervals, and
/// this. Degrading GPUs answer after tens of seconds under load, and come back.
const HUNG_MIN: Duration = Duration::from_secs(15);
/// For how long what the kubelet said holds, at the least: it restarts in seconds.
const KUBELET_MIN: Duration = Duration::from_secs(30);
/// What hangs where no call does: the thread that asks has ended, or waits for the one that hears events.
const NO_ROUND: &str = "no_round";
/// How long the stop waits for NVML to be shut down. An open handle keeps a driver from being unloaded.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// The GPUs of this node, before anything was asked.
pub struct Gpus {
    shared: Arc<Shared>,
    is_on: bool,
}

/// What the thread that asks and those who want to know share.
#[derive(Debug)]
struct Shared {
    settings: config::Gpu,
    snapshot: Mutex<Arc<Snapshot>>,
    /// Another snapshot is there.
    published: Notify,
    /// The calls that run now.
    calls: InCalls,
    /// What was concluded last; nothing before the first look.
    judgement: watch::Sender<Option<Arc<Judgement>>>,
    xids: Xids,
    crashes: Mutex<Crashes>,
    kubelet: Kubelet,
    /// Whether NVML's lists of processes are those of the whole host.
    sight: Sight,
    /// Where what is learned is kept.
    data: PathBuf,
    /// What the API server says of the node.
    node: node::View,
}

/// How the GPUs are looked at, for whoever wants to know.
#[derive(Debug, Clone)]
pub struct View(Arc<Shared>);

/// What is known now.
#[derive(Debug, Clone)]
pub struct Now {
    /// What was read last.
    pub snapshot: Arc<Snapshot>,
    /// The call that hangs, and for how long it has.
    pub hung: Option<(&'static str, Duration)>,
}

impl Gpus {
    /// Asks nothing yet.
    pub fn new(settings: &config::Gpu, data: &Path, node: node::View) -> Self {
        let is_on = settings.mode == config::GpuMode::Auto;
        let (snapshot, calls) = (Mutex::new(Arc::new(Snapshot::new(is_on))), InCalls::default());
        let judgement = watch::Sender::new(None);
        let xids = Xids::open(settings, data);
        let crashes = Mutex::new(Crashes::open(data, &root(settings), &xids::boot_id()));
        let sight = if is_on { Sight::look(settings, &root(settings)) } else { Sight::Unwanted };
        let (settings, kubelet) = (settings.clone(), Kubelet::default());
        let published = Notify::new();
        let data = data.to_owned();
        Self {
            shared: Arc::new(Shared {
                settings,
                snapshot,
                published,
                calls,
                judgement,
                xids,
                crashes,
                kubelet,
                sight,
                data,
                node,
            }),
            is_on,
        }
    }

    /// For readers.
    pub fn view(&self) -> View {
        View(self.shared.clone())
    }

    /// What a scrape shows of them.
    pub fn exposition(&self) -> Box<Exposition> {
        Box::new(Exposition::new(self.view()))
    }

    /// Asks until `stop`. Ends before only where the driver was replaced and the operator wants that
    /// (`gpu.driver_grace`): a GPU that fails must not stop the pulls.
    pub async fn run(self, metrics: Arc<Metrics>, stop: CancellationToken) {
        if !self.is_on {
            return stop.cancelled().await;
        }
        if self.shared.settings.kmsg {
            let (shared, log) = (self.shared.clone(), self.root().join("dev/kmsg"));
            let reads = std::thread::Builder::new().name("kmsg".to_owned());
            if let Err(error) = reads.spawn(move || shared.xids.read_kernel_log(&log)) {
                warn!(%error, "no thread for the kernel's log");
            }
        }
        let (orders, ordered) = sync_channel(1);
        let (ending, mut ended) = oneshot::channel();
        match start(self.shared.clone(), metrics, ordered, ending) {
            Ok(()) => {
                let stop = stop.child_token();
                let follow = self.follow(stop.clone());
                tokio::join!(self.watch(orders, &mut ended, stop), follow);
            }
            Err(error) => {
                error!(%error, "no thread for NVML: this node does not report its GPUs");
                stop.cancelled().await;
            }
        }
    }

    /// Judges each round, and says what changes: that NVML hangs, that GPUs are not ready any more.
    async fn watch(&self, orders: SyncSender<Wake>, ended: &mut oneshot::Receiver<()>, stop: CancellationToken) {
        let mut judge =
            Judge::new(self.view(), &self.shared.settings, Learned::open(&self.shared.data, &xids::boot_id()));
        let late = self.shared.settings.interval.0 * 2;
        let (mut hangs, mut has_ended) = (false, false);
        let (mut node, mut upgrade) = (self.shared.node.changes(), Upgrade::None);
        let mut replaced = Replaced::after(self.shared.settings.driver_grace.0);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                // Only a panic ends it before the stop. Its last word grows old, and is judged so.
                _ = &mut *ended, if !has_ended => {
                    error!("the thread that asks NVML has ended: this node does not report its GPUs any more");
                    has_ended = true;
                }
                // Nobody tells any more where the node is not watched.
                Ok(()) = node.changed() => {
                    let now = node.borrow_and_update().as_ref().map_or(upgrade, |facts| facts.driver_upgrade);
                    if now == upgrade {
                        continue;
                    }
                    info!(was = upgrade.as_str(), now = now.as_str(), "GPU Operator replaces the driver ({})", upgrades::LABEL);
                    upgrade = now;
                    // Full: it will look anyhow.
                    let _ = orders.try_send(Wake);
                }
                // No round is news too, and the host and the kubelet have theirs.
                _ = tokio::time::timeout(late, self.shared.published.notified()) => {}
            }
            let hung = self.view().now().hung;
            match (hung, hangs) {
                (Some((call, since)), false) => warn!(call, seconds = since.as_secs(), "NVML hangs"),
                (None, true) => info!("NVML answers again"),
                _ => {}
            }
            hangs = hung.is_some();
            let Some(host) = self.judge(&mut judge).await else { continue };
            if replaced.ends_agent(&self.view().now().snapshot.driver, &host, Instant::now()) {
                // Whoever follows the kubelet ends too.
                stop.cancel();
            }
        }
        // Nobody gives orders any more: it stops.
        drop(orders);
        if !has_ended && tokio::time::timeout(SHUTDOWN, ended).await.is_err() {
            warn!("NVML does not let go; ending without its shutdown");
        }
        // Whatever it was asked: this agent ends in good order.
        lock(&self.shared.crashes).end();
    }

    /// Follows what the kubelet says, where there is one.
    async fn follow(&self, stop: CancellationToken) {
        let config::Gpu { pod_resources, interval, .. } = &self.shared.settings;
        if let Some(socket) = pod_resources.clone() {
            // Nobody is asked on a node that has no GPU.
            let has_gpus = || !self.view().now().snapshot.gpus.is_empty();
            self.shared.kubelet.follow(socket, interval.0, has_gpus, stop).await;
        }
    }

    fn root(&self) -> PathBuf {
        root(&self.shared.settings)
    }

    /// Looks at the host, and judges all that is known. What the host showed.
    async fn judge(&self, judge: &mut Judge) -> Option<Host> {
        let (root, fails) = (self.root(), matches!(self.view().now().snapshot.driver, Driver::Failed(..)));
        // A directory of /sys or /dev may wait for a driver, as NVML does.
        let host = tokio::task::spawn_blocking(move || Host::look(&root, fails)).await.ok()?;
        let judgement = Arc::new(judge.look(host.clone()));
        let before = self.shared.judgement.send_replace(Some(judgement.clone()));
        if before.is_none_or(|before| before.verdict != judgement.verdict) {
            let (_, reason) = judge::check(&judgement);
            info!(state = judgement.verdict.state.as_str(), reason, "the GPUs of this node");
        }
        Some(host)
    }
}

fn root(settings: &config::Gpu) -> PathBuf {
    settings.host_root.clone().unwrap_or_else(|| "/".into())
}

/// The order to look at once whether the driver is to be released. That nobody can give it any more is the order to
/// stop.
struct Wake;

fn start(
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    orders: Receiver<Wake>,
    ending: oneshot::Sender<()>,
) -> std::io::Result<()> {
    let run = move || {
        sampler::run(&shared, &metrics, &orders);
        // Nobody waits any more where the stop was impatient.
        let _ = ending.send(());
    };
    std::thread::Builder::new().name("nvml".to_owned()).spawn(run).map(drop)
}

impl View {
    /// What is known at this moment. Never waits for NVML.
    pub fn now(&self) -> Now {
        let limit = HUNG_MIN.max(self.0.settings.interval.0 * 3);
        let calling = self.0.calls.slowest();
        let snapshot = lock(&self.0.snapshot).clone();
        let silent = snapshot.round.map(|round| (NO_ROUND, round.ended.elapsed()));
        let hung = [calling, silent].into_iter().flatten().find(|(_, since)| *since >= limit);
        Now { snapshot, hung }
    }

    /// What is concluded of the GPUs; nothing before the first look, and where nobody looks.
    pub fn judgement(&self) -> Option<Arc<Judgement>> {
        self.0.judgement.borrow().clone()
    }

    /// The same, for whoever waits for the next.
    pub fn judgements(&self) -> watch::Receiver<Option<Arc<Judgement>>> {
        self.0.judgement.subscribe()
    }

    /// Nobody looks at them: `gpu.mode`.
    pub fn is_off(&self) -> bool {
        self.0.settings.mode == config::GpuMode::Off
    }

    /// How that stands among the checks of `/readyz`.
    pub fn check(&self) -> Check {
        let (state, reason) = match (self.judgement(), &self.now().snapshot.driver) {
            (_, Driver::Off) => (darter_core::ready::State::Ok, "off (gpu.mode)".to_owned()),
            (None, _) => (darter_core::ready::State::Ok, "not looked at yet".to_owned()),
            (Some(judgement), _) => judge::check(&judgement),
        };
        Check::new("gpu", state, reason)
    }

    /// Who has which GPU; nothing where nobody tells, or has for long.
    pub fn pods(&self) -> Option<Arc<Pods>> {
        self.0.kubelet.pods(KUBELET_MIN.max(self.0.settings.interval.0 * 3))
    }

    /// How old a reading of each tier may be: what three rounds in a row did not bring is not shown.
    pub(crate) fn patience(&self) -> (Duration, Duration) {
        let config::Gpu { interval, slow_interval, .. } = &self.0.settings;
        (interval.0 * 3, slow_interval.0 * 3)
    }
}

impl Now {
    /// What is not older than this.
    pub(crate) fn young<'a, T>(&self, read: &'a Option<(Instant, T)>, most: Duration) -> Option<&'a T> {
        read.as_ref().filter(|(at, _)| at.elapsed() <= most).map(|(_, value)| value)
    }
}

impl Shared {
    /// Whether GPU Operator may unload the driver at any moment.
    fn is_driver_taken(&self) -> bool {
        self.node.facts().is_some_and(|facts| facts.driver_upgrade.takes_driver())
    }

    fn publish(&self, snapshot: Snapshot) {
        *lock(&self.snapshot) = Arc::new(snapshot);
        self.published.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::calls::{Caller, InCall};
    use super::sample::{Round, Versions};
    use super::*;

    #[test]
    fn a_thread_that_brings_no_round_any_more_hangs_though_no_call_does() {
        let data = tempfile::tempdir().unwrap();
        let config = config::Config::embedded();
        let node = node::OwnNode::new(&config.kubernetes).view();
        let gpus = Gpus::new(&config.gpu, data.path(), node);
        let view = gpus.view();
        let hung_after = |age: Duration| {
            let ended = Instant::now().checked_sub(age).unwrap();
            let round = Some(Round { at: SystemTime::now(), ended, took: Duration::ZERO });
            gpus.shared.publish(Snapshot { driver: Driver::Running(Versions::default()), gpus: Vec::new(), round });
            view.now().hung.map(|(call, _)| call)
        };
        assert_eq!(hung_after(Duration::from_secs(14)), None);
        assert_eq!(hung_after(Duration::from_secs(16)), Some(NO_ROUND));
        let call = InCall { name: "power_usage", since: Instant::now(), meant: Duration::ZERO };
        gpus.shared.calls.set(Caller::Rounds, Some(call));
        assert_eq!(hung_after(Duration::from_secs(16)), Some(NO_ROUND), "the call is new");
        gpus.shared.calls.set(Caller::Rounds, None);
        // A wait is not late before its time is over.
        let waits = |since: Duration| {
            let since = Instant::now().checked_sub(since).unwrap();
            let call = InCall { name: "event_wait", since, meant: Duration::from_secs(1) };
            gpus.shared.calls.set(Caller::Events, Some(call));
            hung_after(Duration::ZERO)
        };
        assert_eq!(waits(Duration::from_millis(15_500)), None, "15 s over its time would be");
        assert_eq!(waits(Duration::from_millis(16_500)), Some("event_wait"));
    }
}
