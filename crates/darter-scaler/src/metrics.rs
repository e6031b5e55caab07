//! What Prometheus sees of the scaler. The names are a contract: they only ever grow.
//!
//! Labels carry names of nodes, pools and workloads, whose number is bounded, and fixed words.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;

pub use darter_base::metrics::ReasonLabels;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use serde::Serialize;

use crate::fleet::{Actuator, Outcome, Refusal};
use crate::grpc::Turned;
use crate::hub::Hub;
use crate::reason::{Subject, Verdict};

macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
        #[allow(missing_docs, reason = "the fields are the labels of the contract")]
        pub struct $name { $(pub $field: $type),* }
    )*};
}

labels! {
    /// Of `darter_scaler_actions_total`.
    ActionLabels { actuator: &'static str, outcome: &'static str }
    /// Of `darter_scaler_decisions_total`.
    DecisionLabels { kind: &'static str, reason: String }
    /// One workload.
    WorkloadLabels { workload: String }
    /// One node.
    NodeLabels { node: String }
    /// One pool.
    PoolLabels { pool: String }
    /// One input of decisions.
    InputLabels { input: &'static str }
    /// One word of a rule.
    RuleLabels { reason: String }
    /// One rail.
    RailLabels { rail: String }
    /// One RPC of KEDA's, and how it ended.
    RpcLabels { rpc: &'static str, code: &'static str }
}

/// A gauge of seconds, or of a number with a point.
type Seconds = Gauge<f64, AtomicU64>;

/// Every metric of the scaler.
#[derive(Debug)]
#[allow(missing_docs, reason = "the help texts below are the documentation")]
pub struct Metrics {
    registry: Registry,
    /// One scrape at a time fills what is read then.
    scrape: Mutex<()>,
    pub decision_seconds: Histogram,
    pub decisions: Family<DecisionLabels, Counter>,
    pub actions: Family<ActionLabels, Counter>,
    pub records_lost: Counter,
    pub reports: Counter,
    pub report_refusals: Family<ReasonLabels, Counter>,
    pub streams: Gauge,
    pub keda_streams: Gauge,
    pub keda_requests: Family<RpcLabels, Counter>,
    pub demand_refusals: Family<ReasonLabels, Counter>,
    pub access_refusals: Family<ReasonLabels, Counter>,
    pub connections: Gauge,
    pub tls_refusals: Family<ReasonLabels, Counter>,
    leads: Gauge,
    frozen: Gauge,
    nodes: Gauge,
    images: Gauge,
    report_age: Family<NodeLabels, Seconds>,
    desired: Family<WorkloadLabels, Gauge>,
    queue_depth: Family<WorkloadLabels, Seconds>,
    queue_age: Family<WorkloadLabels, Seconds>,
    input_stale: Family<InputLabels, Gauge>,
    protected: Family<RuleLabels, Gauge>,
    rails: Family<RailLabels, Gauge>,
    buffer: Family<PoolLabels, Gauge>,
}

/// From a millisecond, which is a thousand nodes, to seconds, which is far too long.
fn decision_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 14))
}

impl Metrics {
    /// All metrics, at nothing. `revision` is the commit this program was built from.
    ///
    /// `also` puts in what others count.
    pub fn new(version: &str, revision: &str, also: impl FnOnce(&mut Registry)) -> Self {
        let mut registry = Registry::with_prefix("darter");
        also(&mut registry);
        macro_rules! metric {
            ($value:expr, $name:literal, $help:literal) => {{
                let metric = $value;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let info = Info::new([("version", version.to_owned()), ("revision", revision.to_owned())]);
        registry.register("build", "What is running here", info);
        let metrics = Self {
            scrape: Mutex::default(),
            decision_seconds: metric!(
                decision_histogram(),
                "scaler_decision_seconds",
                "From the look at what is known to the end of a decision"
            ),
            decisions: metric!(
                Family::default(),
                "scaler_decisions",
                "What was decided to be done, by what and by which rule"
            ),
            actions: metric!(
                Family::default(),
                "scaler_actions",
                "Actions, by who carries them out and what came of it; observed: it would have been done"
            ),
            records_lost: metric!(
                Counter::default(),
                "scaler_records_lost",
                "Decisions that the disk of record.dir had no time for"
            ),
            reports: metric!(Counter::default(), "scaler_reports", "Reports of agents that were taken"),
            report_refusals: metric!(
                Family::default(),
                "scaler_report_refusals",
                "Reports of agents that were not believed, by why"
            ),
            streams: metric!(Gauge::default(), "scaler_report_streams", "Agents that are connected"),
            keda_streams: metric!(Gauge::default(), "scaler_keda_streams", "Streams on which KEDA waits for pushes"),
            keda_requests: metric!(
                Family::default(),
                "scaler_keda_requests",
                "Requests of KEDA, by RPC and what was answered"
            ),
            demand_refusals: metric!(
                Family::default(),
                "scaler_demand_refusals",
                "Samples of demand that were not taken, by why"
            ),
            access_refusals: metric!(
                Family::default(),
                "scaler_access_refusals",
                "Requests that were not allowed, by why"
            ),
            connections: metric!(Gauge::default(), "scaler_connections", "Connections to grpc.listen"),
            tls_refusals: metric!(
                Family::default(),
                "scaler_tls_refusals",
                "Connections to grpc.listen that were turned away at the handshake or for their certificate, by why"
            ),
            leads: metric!(Gauge::default(), "scaler_leads", "1 while this scaler is the one that acts"),
            frozen: metric!(Gauge::default(), "scaler_frozen", "1 while somebody said to hold everything"),
            nodes: metric!(Gauge::default(), "scaler_nodes", "Nodes that are known"),
            images: metric!(Gauge::default(), "scaler_images", "Different images that nodes have"),
            report_age: metric!(Family::default(), "scaler_report_age_seconds", "Age of a node's newest report"),
            desired: metric!(
                Family::default(),
                "scaler_desired_replicas",
                "Replicas that KEDA is told; absent where it is told an error"
            ),
            queue_depth: metric!(Family::default(), "scaler_queue_depth", "What waits or runs, by the newest sample"),
            queue_age: metric!(
                Family::default(),
                "scaler_queue_sample_age_seconds",
                "Age of the newest sample of demand"
            ),
            input_stale: metric!(
                Family::default(),
                "scaler_input_stale",
                "How many of these say nothing of now: reports of nodes, samples of demand"
            ),
            protected: metric!(
                Family::default(),
                "scaler_protected_nodes",
                "Nodes that are kept, by the rule that keeps them"
            ),
            rails: metric!(Family::default(), "scaler_rail_hits", "Answers of the newest decision that a rail holds"),
            buffer: metric!(Family::default(), "scaler_buffer_gpus", "Spare GPUs that are asked for"),
            registry,
        };
        metrics.begin();
        metrics
    }

    /// What is looked for before it first happens is there from the start.
    fn begin(&self) {
        for reason in Refusal::WORDS {
            drop(self.report_refusals.get_or_create(&ReasonLabels { reason }));
        }
        for why in Turned::ALL {
            drop(self.tls_refusals.get_or_create(&ReasonLabels { reason: why.word() }));
        }
        for actuator in Actuator::ALL {
            let labels = ActionLabels { actuator: actuator.as_str(), outcome: Outcome::Done.as_str() };
            drop(self.actions.get_or_create(&labels));
        }
    }

    /// Counts what came of an action.
    pub fn act(&self, actuator: Actuator, outcome: Outcome) {
        self.actions.get_or_create(&ActionLabels { actuator: actuator.as_str(), outcome: outcome.as_str() }).inc();
    }

    /// The exposition, in OpenMetrics text, as of now.
    pub fn render(&self, hub: &Hub) -> String {
        let _one = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.look(hub);
        let mut text = String::new();
        // Writing to a String cannot fail; a metric whose encoder does would be a bug to see.
        if let Err(error) = encode(&mut text, &self.registry) {
            tracing::error!(%error, "cannot render metrics");
        }
        text
    }

    /// Fills what is read rather than counted.
    fn look(&self, hub: &Hub) {
        let now = hub.clock.now();
        self.leads.set(i64::from(hub.lead.holds()));
        let newest = hub.newest.borrow().clone();
        let fleet = hub.fleet();
        let counts = fleet.counts();
        self.frozen.set(i64::from(fleet.frozen().is_some()));
        self.nodes.set(count(counts.nodes));
        self.images.set(count(counts.images));
        self.report_age.clear();
        let mut stale = 0;
        for (node, age_ms) in fleet.report_ages(now) {
            stale += i64::from(age_ms > hub.policy.report_lifetime_ms);
            self.report_age.get_or_create(&NodeLabels { node }).set(seconds(age_ms));
        }
        self.input_stale.get_or_create(&InputLabels { input: "reports" }).set(stale);
        self.queue_depth.clear();
        self.queue_age.clear();
        let mut stale = 0;
        for (workload, backlog_milli, age_ms, is_told) in fleet.demands(now) {
            stale += i64::from(!is_told);
            self.queue_depth.get_or_create(&WorkloadLabels { workload: workload.clone() }).set(seconds(backlog_milli));
            self.queue_age.get_or_create(&WorkloadLabels { workload }).set(seconds(age_ms));
        }
        self.input_stale.get_or_create(&InputLabels { input: "demand" }).set(stale);
        self.desired.clear();
        for workload in newest.state.workloads.keys() {
            if let Ok(replicas) = fleet.answer(workload, now) {
                self.desired.get_or_create(&WorkloadLabels { workload: workload.clone() }).set(replicas.into());
            }
        }
        drop(fleet);
        self.protected.clear();
        self.rails.clear();
        for reason in &newest.decision.reasons {
            if let (Subject::Node(_), Verdict::Kept) = (&reason.subject, reason.verdict) {
                self.protected.get_or_create(&RuleLabels { reason: word(&reason.rule) }).inc();
            }
            for hit in &reason.rails {
                self.rails.get_or_create(&RailLabels { rail: word(&hit.rail) }).inc();
            }
        }
        self.buffer.clear();
        for (pool, known) in &newest.state.pools {
            self.buffer.get_or_create(&PoolLabels { pool: pool.clone() }).set(known.buffer.into());
        }
    }
}

/// A rule or a rail as records have it.
pub fn word(of: &impl Serialize) -> String {
    match serde_json::to_value(of) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "other".to_owned(),
    }
}

fn count(things: usize) -> i64 {
    i64::try_from(things).unwrap_or(i64::MAX)
}

/// Of milliseconds, or of thousandths.
#[allow(clippy::cast_precision_loss, reason = "for a graph")]
const fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}
