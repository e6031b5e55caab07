//! The agent from start to stop: bind, spawn, drain.
//!
//! The order matters. The mirror listens before hosts.toml names it, and hosts.toml is withdrawn
//! before the mirror stops: containerd is never sent where nobody answers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::admin::{About, Admin, AdminError, Orders, Watched};
use crate::certs_d::{self, CertsD};
use crate::config::{Config, ContentStore};
use crate::containerd::Known;
use crate::going::Notices;
use crate::gpu::Gpus;
use crate::images::Images;
use crate::metrics::Metrics;
use crate::mirror::{BindError, Mirror};
use crate::node::{Around, OwnNode};
use crate::origin::{OriginError, Shared};
use crate::own_registry::OwnRegistry;
use crate::parts::{Part, first_end};
use crate::prewarm::{Prewarm, Warm};
use crate::pulls::Pulls;
use crate::report::{self, Reporter};
use crate::self_test::SelfTest;
use crate::sites::Sites;
use crate::store::{Checkup, Store};
use crate::swarm::part::{STOP, SwarmError, SwarmPart};

/// How long each part gets to put away what it holds after the stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Why the agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The mirror's address.
    #[error(transparent)]
    Mirror(#[from] BindError),
    /// The admin endpoint's address.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// A part that was to run for ever ended.
    #[error("the part `{part}` of the agent ended by itself; the log says why")]
    Ended {
        /// Which part.
        part: &'static str,
    },
    /// What all registries share: certificates and credentials.
    #[error("cannot set up connections to registries")]
    Shared(#[source] OriginError),
    /// The swarm, where there is a key for one.
    #[error("cannot join the swarm")]
    Swarm(#[from] SwarmError),
}

/// An agent that listens and has not begun to serve.
pub struct Agent {
    config: Config,
    metrics: Arc<Metrics>,
    sites: Arc<Sites>,
    own: OwnRegistry,
    store: Store,
    pulls: Pulls,
    images: Images,
    mirror: Mirror,
    admin: Admin,
    certs_d: CertsD,
    swarm: Option<SwarmPart>,
    gpus: Gpus,
    node: OwnNode,
    warm: Warm,
    reporter: Reporter,
    /// Why the self-test fails, for people, and whether it passes, for hosts.toml.
    serving: watch::Sender<Result<(), String>>,
    preflight: watch::Sender<certs_d::Preflight>,
    /// Ends pulls and prefetching, after the mirror has drained.
    pulling: CancellationToken,
}

impl Agent {
    /// Reads what is on the node and listens. `revision` is the commit this program was built from.
    pub async fn bind(mut config: Config, version: &str, revision: &str) -> Result<Self, AgentError> {
        darter_base::limits::raise_open_files();
        let mut metrics = Metrics::new(version, revision);
        let node = OwnNode::new(&config.kubernetes);
        let gpus = Gpus::new(&config.gpu, &config.data_dir(), node.view());
        metrics.show(gpus.exposition());
        let metrics = Arc::new(metrics);
        let own = OwnRegistry::look(&mut config, metrics.clone()).await;
        // containerd itself is asked by the first self-test: nothing here hangs on its version.
        let preflight = certs_d::preflight_for(&config, Known::not_asked());
        let certs_d = CertsD::new(&config, &preflight.later_roots, metrics.clone());
        let shared = Shared::new(&config).await.map_err(AgentError::Shared)?;
        let sites = Arc::new(Sites::open(&config, shared, &certs_d.others().borrow(), metrics.clone()));
        own.announce(&sites);
        let certs_d = certs_d.without(sites.unserved()).with(sites.registries());
        let content_store = preflight.content_store().filter(|_| config.containerd.content_store == ContentStore::Auto);
        let store = Store::open(config.data_dir(), &config.store, content_store, metrics.clone()).await;
        let pulling = CancellationToken::new();
        let swarm = SwarmPart::bind(&config, version, &store, &metrics, node.notes()).await?;
        let handle = swarm.as_ref().map(SwarmPart::handle);
        let pulls = Pulls::new(&config, store.clone(), handle, metrics.clone(), pulling.clone());
        let images = Images::new(&config, store.clone(), pulls.clone(), metrics.clone(), pulling.clone());
        images.recall().await;
        if let Some(swarm) = &swarm {
            swarm.answer_from(images.memory());
        }
        let mirror = Mirror::bind(&config, sites.clone(), images.clone(), metrics.clone())?;
        let serving = watch::Sender::new(Err("the self-test has not run yet".to_owned()));
        let preflight = watch::Sender::new(preflight);
        let address = mirror.address().unwrap_or(config.mirror.listen);
        let about = About { node: name(&config), version: version.to_owned(), mirror: address };
        let (reported, report) = report::standing(&config);
        let watched = Watched {
            about,
            serving: serving.subscribe(),
            store: store.clone(),
            registries: sites.registries(),
            hosts: certs_d.states(),
            preflight: preflight.subscribe(),
            seen: mirror.seen(),
            swarm: swarm.as_ref().map(SwarmPart::standing),
            gpus: gpus.view(),
            node: node.view(),
            report,
        };
        let prewarm = Prewarm::new(&config, sites.clone(), images.clone(), store.clone());
        let warm = Warm::new(prewarm.clone(), config.prewarm.images.clone(), config.kubernetes.startup_deadline.0);
        let carries_out = (pulls.clone(), images.clone(), prewarm.clone());
        let reporter = Reporter::new(&config, watched.clone(), carries_out, metrics.clone(), reported);
        let orders = Orders { prewarm, uninstall: certs_d.uninstaller() };
        let admin = Admin::bind(config.admin.listen, &config.admin_socket(), metrics.clone(), watched, orders).await?;
        Ok(Self {
            config,
            metrics,
            sites,
            own,
            store,
            pulls,
            images,
            mirror,
            admin,
            certs_d,
            swarm,
            gpus,
            node,
            warm,
            reporter,
            serving,
            preflight,
            pulling,
        })
    }

    /// Serves until `stop`, then drains. An agent of which one part ends early stops as a whole:
    /// half an agent would be worse than none, because containerd goes around none.
    pub async fn run(self, stop: CancellationToken) -> Result<(), AgentError> {
        let Self {
            config,
            metrics,
            sites,
            own,
            store,
            pulls,
            images,
            mirror,
            admin,
            certs_d,
            swarm,
            gpus,
            node,
            warm,
            reporter,
            ..
        } = self;
        let (serving, preflight, pulling) = (self.serving, self.preflight, self.pulling);
        let (files, serve, keep) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let seen = mirror.seen();
        let address = mirror.address().unwrap_or(config.mirror.listen);
        let drain = config.agent.drain.0 + DRAIN;
        let swarm_stop = config.swarm.handover.0 + STOP;
        info!(mirror = %address, admin = %config.admin.listen, data = %config.data_dir().display(),
            registries = config.registries.len(), "darter agent is up");
        let (passing, passes) = watch::channel(false);
        let notices = Notices::new(&config, node.view(), metrics.clone());
        let (around, in_place) = (around(&sites, &gpus, &serving, &certs_d, &warm), certs_d.states());
        let (registries, known) = (sites.registries(), own.run(sites.clone(), files.clone()));
        let mut own = Part::start("own registry", known);
        let mut follow = Part::start("origins", sites.follow(certs_d.others(), files.clone()));
        let mut hosts = Part::start("hosts.toml", certs_d.run(passes, files.clone()));
        let mut mirror = Part::start("mirror", mirror.run(serve.clone()));
        let mut admin = Part::start("admin", admin.run(keep.clone()));
        let (disk, checkup, said, notes) = (store.clone(), Checkup::default(), BTreeSet::new(), node.notes());
        let mut store = Part::start("store", store.run(keep.clone()));
        let checks = SelfTest {
            config,
            registries,
            address,
            store: disk,
            checkup,
            seen,
            serving,
            passing,
            preflight,
            said,
            notes,
            store_stopped: false,
        };
        let mut checks = Part::start("self-test", checks.run(files.clone()));
        let (leaving, sharing) = (CancellationToken::new(), CancellationToken::new());
        let (leave, share, shared) = (leaving.clone(), sharing.clone(), pulls.clone());
        let (notice, noticed) = watch::channel(None);
        let mut reporter = Part::start("report", reporter.run(noticed.clone(), keep.clone()));
        let mut notices = Part::start("notices", notices.run(notice, files.clone()));
        let mut memory = Part::start("memory", images.remember(keep.clone()));
        let mut gpus = Part::start("gpus", gpus.run(metrics.clone(), keep.clone()));
        let mut node = Part::start("node", node.run(around, metrics.clone(), files.clone()));
        let warming = files.clone();
        let mut warm = Part::start("warm images", async move { warm.run(in_place, &metrics, warming).await });
        let mut swarm = Part::start("swarm", async move {
            match swarm {
                Some(swarm) => swarm.run(shared, noticed, leave, share).await,
                None => share.cancelled().await,
            }
        });
        let outcome = tokio::select! {
            () = stop.cancelled() => {
                info!("stopping: hosts.toml first, then the mirror");
                Ok(())
            }
            part = first_end([&mut hosts, &mut mirror, &mut admin, &mut store, &mut checks, &mut follow, &mut own, &mut swarm, &mut notices, &mut gpus, &mut node, &mut warm, &mut memory, &mut reporter]) => {
                error!(part, "a part of the agent ended; stopping all of it");
                Err(AgentError::Ended { part })
            }
        };
        // While the rest stops, what only this node has goes to others.
        leaving.cancel();
        // hosts.toml goes before the mirror does.
        files.cancel();
        tokio::join!(hosts.finish(DRAIN), checks.finish(DRAIN), follow.finish(DRAIN), notices.finish(DRAIN));
        tokio::join!(node.finish(DRAIN), own.finish(DRAIN), warm.finish(DRAIN));
        serve.cancel();
        mirror.finish(drain).await;
        pulling.cancel();
        if tokio::time::timeout(DRAIN, pulls.drained()).await.is_err() {
            warn!("pulls did not end in time; what they hold is checked at the next start");
        }
        sharing.cancel();
        // What it still gives to others is in the store.
        swarm.finish(swarm_stop).await;
        keep.cancel();
        tokio::join!(
            admin.finish(DRAIN),
            store.finish(DRAIN),
            gpus.finish(DRAIN),
            memory.finish(DRAIN),
            reporter.finish(DRAIN)
        );
        info!("stopped");
        outcome
    }
}

/// What a startup taint waits for.
fn around(
    sites: &Sites,
    gpus: &Gpus,
    serving: &watch::Sender<Result<(), String>>,
    certs_d: &CertsD,
    warm: &Warm,
) -> Around {
    Around {
        gpus: gpus.view(),
        serving: serving.subscribe(),
        hosts: certs_d.states(),
        registries: sites.registries(),
        missing_images: warm.missing(),
    }
}

/// This node's name: Kubernetes', where it was told.
fn name(config: &Config) -> String {
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    config.kubernetes.node.clone().unwrap_or_else(host)
}
