//! What Prometheus sees. The names are a contract (design): they only ever grow.
//!
//! Labels never carry a peer, a digest, a repository or a tag: their number has no bound.

use std::fmt;
use std::sync::atomic::AtomicU64;

pub use darter_base::metrics::ReasonLabels;
use darter_core::Registry;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry as Metrics_;

/// Where the bytes of an answer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Our own store.
    Cache,
    /// containerd's content store.
    Containerd,
    /// Another node.
    Peer,
    /// The registry that owns the image.
    Origin,
    /// Nowhere: an error was answered.
    None,
}

impl Source {
    /// The label value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Containerd => "containerd",
            Self::Peer => "peer",
            Self::Origin => "origin",
            Self::None => "none",
        }
    }
}

impl EncodeLabelValue for Source {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        self.as_str().encode(encoder)
    }
}

/// The registry of a request as a label: one of the configured ones, or `other`. A name that a
/// client made up must not become a time series.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistryLabel(String);

impl RegistryLabel {
    /// The label of a configured registry.
    pub fn of(registry: &Registry) -> Self {
        Self(registry.to_string())
    }

    /// The label of everything else.
    pub fn other() -> Self {
        Self("other".to_owned())
    }
}

impl fmt::Display for RegistryLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl EncodeLabelValue for RegistryLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.as_str().encode(encoder)
    }
}

macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
        #[allow(missing_docs, reason = "the fields are the labels of the design")]
        pub struct $name { $(pub $field: $type),* }
    )*};
}

labels! {
    /// Of `darter_mirror_requests_total`.
    RequestLabels { registry: RegistryLabel, kind: &'static str, code: u16, source: Source }
    /// Of `darter_mirror_bytes_total`.
    BytesLabels { registry: RegistryLabel, source: Source }
    /// Of `darter_mirror_first_byte_seconds`.
    FirstByteLabels { kind: &'static str, source: Source }
    /// Of `darter_pulls_total`.
    PullLabels { registry: RegistryLabel, outcome: &'static str }
    /// Of `darter_origin_requests_total`.
    OriginLabels { registry: RegistryLabel, kind: &'static str, code: u16 }
    /// Of `darter_peer_bytes_total`.
    PeerBytesLabels { direction: &'static str, zone_relation: &'static str }
    /// One registry.
    RegistryLabels { registry: RegistryLabel }
    /// One registry, and a reason.
    RegistryReasonLabels { registry: RegistryLabel, reason: &'static str }
    /// Of `darter_hosts_toml`.
    HostsTomlLabels { registry: RegistryLabel, state: &'static str }
    /// Of `darter_nvml_errors_total`.
    NvmlErrorLabels { call: &'static str, code: u32 }
    /// One call into NVML.
    CallLabels { call: &'static str }
    /// Of `darter_ready`.
    CheckLabels { check: &'static str }
}

/// A family of one series: unlike a plain gauge it is absent until it is first set.
pub type NoLabels = [(&'static str, &'static str); 0];

/// A gauge of seconds or of a share.
pub type FloatGauge = Gauge<f64, AtomicU64>;

/// Every metric of the agent.
#[derive(Debug)]
#[allow(missing_docs, reason = "the help texts below are the documentation")]
pub struct Metrics {
    registry: Metrics_,
    pub mirror_requests: Family<RequestLabels, Counter>,
    pub mirror_bytes: Family<BytesLabels, Counter>,
    pub mirror_first_byte_seconds: Family<FirstByteLabels, Histogram, fn() -> Histogram>,
    pub mirror_handovers: Family<ReasonLabels, Counter>,
    /// Answers of 404 that this node gave by itself.
    pub mirror_refusals: Family<RegistryReasonLabels, Counter>,
    pub mirror_connections: Gauge,
    pub mirror_rejected: Family<ReasonLabels, Counter>,
    pub mirror_full: Counter,
    pub pulls: Family<PullLabels, Counter>,
    pub origin_requests: Family<OriginLabels, Counter>,
    pub origin_bytes: Family<RegistryLabels, Counter>,
    pub origin_unique_bytes: Family<RegistryLabels, Counter>,
    pub origin_retries: Family<ReasonLabels, Counter>,
    pub peer_bytes: Family<PeerBytesLabels, Counter>,
    pub peer_rejected: Family<ReasonLabels, Counter>,
    pub stale_tags: Family<RegistryLabels, Counter>,
    pub stale_tag_refusals: Family<RegistryReasonLabels, Counter>,
    pub store_bytes: Gauge,
    pub store_limit_bytes: Gauge,
    pub store_pinned_bytes: Gauge,
    pub store_evictions: Family<ReasonLabels, Counter>,
    pub store_corruptions: Counter,
    pub containerd_offered_blobs: Gauge,
    pub containerd_offered_bytes: Gauge,
    pub containerd_corruptions: Counter,
    pub hosts_toml: Family<HostsTomlLabels, Gauge>,
    pub hosts_toml_repairs: Counter,
    /// Absent until containerd has asked once.
    pub containerd_seen_seconds: Family<NoLabels, FloatGauge>,
    pub ready: Family<CheckLabels, Gauge>,
    pub swarm_peers: Gauge,
    pub swarm_connections: Gauge,
    pub swarm_dropped: Family<ReasonLabels, Counter>,
    /// Blobs that this node read alone because the other nodes were of no help.
    pub swarm_fallbacks: Family<ReasonLabels, Counter>,
    pub swarm_watch_errors: Family<ReasonLabels, Counter>,
    /// 1 while this node is about to go, by who says so.
    pub node_going: Family<ReasonLabels, Gauge>,
    pub node_watch_errors: Family<ReasonLabels, Counter>,
    /// Failed questions for a spot interruption notice.
    pub spot_notice_errors: Counter,
    /// Failed questions for this node's account and region, after the start.
    pub own_registry_errors: Counter,
    /// Failed questions for what else the metadata service may announce.
    pub notice_errors: Family<ReasonLabels, Counter>,
    pub node_write_errors: Family<ReasonLabels, Counter>,
    /// Absent until the node is known; so are the next two.
    pub startup_taint: Family<NoLabels, Gauge>,
    pub startup_overdue: Family<NoLabels, Gauge>,
    pub startup_waits: Family<CheckLabels, Gauge>,
    pub startup_failed_open: Family<CheckLabels, Counter>,
    /// Absent until the taint was removed.
    pub startup_seconds: Family<NoLabels, FloatGauge>,
    pub warm_images_missing: Gauge,
    /// Absent without a scaler, as the two gauges below.
    pub report_connected: Family<NoLabels, Gauge>,
    pub report_accepted_seconds: Family<NoLabels, FloatGauge>,
    pub report_protected: Family<NoLabels, Gauge>,
    /// Reports sent.
    pub reports: Counter,
    pub reports_accepted: Counter,
    pub report_errors: Family<ReasonLabels, Counter>,
    /// Directives that asked for something.
    pub report_directives: Counter,
    pub report_refusals: Family<ReasonLabels, Counter>,
    pub nvml_errors: Family<NvmlErrorLabels, Counter>,
    /// How often NVML was started.
    pub nvml_init: Counter,
    pub nvml_call_seconds: Family<CallLabels, Histogram, fn() -> Histogram>,
}

/// First bytes come from a hit in under a millisecond, and from a slow registry after seconds.
fn first_byte_histogram() -> Histogram {
    Histogram::new([0.000_5, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.5, 5.0, 10.0, 30.0])
}

/// Most calls take microseconds; a list of processes takes milliseconds, a sick GPU seconds.
fn call_histogram() -> Histogram {
    Histogram::new([0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0, 10.0])
}

impl Metrics {
    /// All metrics, at nothing. `revision` is the commit this program was built from.
    pub fn new(version: &str, revision: &str) -> Self {
        let mut registry = Metrics_::with_prefix("darter");
        macro_rules! metric {
            ($value:expr, $name:literal, $help:literal) => {{
                let metric = $value;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let info = Info::new([("version", version.to_owned()), ("revision", revision.to_owned())]);
        registry.register("build", "What is running here", info);
        Self {
            mirror_requests: metric!(Family::default(), "mirror_requests", "Requests answered by the mirror"),
            mirror_bytes: metric!(
                Family::default(),
                "mirror_bytes",
                "Body bytes given to clients, by where they came from"
            ),
            mirror_first_byte_seconds: metric!(
                Family::new_with_constructor(first_byte_histogram as fn() -> Histogram),
                "mirror_first_byte_seconds",
                "From the end of the request head to the first body byte"
            ),
            mirror_handovers: metric!(
                Family::default(),
                "mirror_handovers",
                "Bodies cut short so that containerd goes on at the origin"
            ),
            mirror_refusals: metric!(
                Family::default(),
                "mirror_refusals",
                "Requests answered 404, so that containerd goes to the registry, by why"
            ),
            mirror_connections: metric!(Gauge::default(), "mirror_connections", "Open client connections"),
            mirror_rejected: metric!(Family::default(), "mirror_rejected", "Connections ended for what the client did"),
            mirror_full: metric!(
                Counter::default(),
                "mirror_full",
                "Times that no connection more was taken (mirror.max_connections)"
            ),
            pulls: metric!(Family::default(), "pulls", "Blobs brought to this node, by how it ended"),
            origin_requests: metric!(Family::default(), "origin_requests", "Requests to origins; code 0 is no answer"),
            origin_bytes: metric!(Family::default(), "origin_bytes", "Body bytes read from origins"),
            origin_unique_bytes: metric!(
                Family::default(),
                "origin_unique_bytes",
                "Blob bytes of which this node was the cluster's reader"
            ),
            origin_retries: metric!(Family::default(), "origin_retries", "Requests to origins that were repeated"),
            peer_bytes: metric!(
                Family::default(),
                "peer_bytes",
                "Bytes of pieces sent to and received from other nodes"
            ),
            peer_rejected: metric!(Family::default(), "peer_rejected", "What other nodes did that was not taken"),
            stale_tags: metric!(
                Family::default(),
                "stale_tags",
                "Tags answered from this node's memory, or that of all members, while the origin was away"
            ),
            stale_tag_refusals: metric!(
                Family::default(),
                "stale_tag_refusals",
                "Tags on which the members of the swarm had no answer while the origin was away"
            ),
            store_bytes: metric!(Gauge::default(), "store_bytes", "Disk used by blobs and ingests"),
            store_limit_bytes: metric!(
                Gauge::default(),
                "store_limit_bytes",
                "Disk that blobs and ingests may use now"
            ),
            store_pinned_bytes: metric!(
                Gauge::default(),
                "store_pinned_bytes",
                "Disk used by blobs of pinned images, which eviction spares"
            ),
            store_evictions: metric!(Family::default(), "store_evictions", "Blobs deleted to make room"),
            store_corruptions: metric!(Counter::default(), "store_corruptions", "Stored bytes found wrong and dropped"),
            containerd_offered_blobs: metric!(
                Gauge::default(),
                "containerd_offered_blobs",
                "Verified blobs of containerd's content store that other nodes may have"
            ),
            containerd_offered_bytes: metric!(
                Gauge::default(),
                "containerd_offered_bytes",
                "Bytes of containerd's content store that other nodes may have"
            ),
            containerd_corruptions: metric!(
                Counter::default(),
                "containerd_corruptions",
                "Blobs in containerd's content store that are not what their names say"
            ),
            hosts_toml: metric!(Family::default(), "hosts_toml", "1 for the state that a registry's hosts.toml is in"),
            hosts_toml_repairs: metric!(
                Counter::default(),
                "hosts_toml_repairs",
                "hosts.toml files put right after someone changed them"
            ),
            containerd_seen_seconds: metric!(
                Family::default(),
                "containerd_seen_seconds",
                "Age of the last request by containerd"
            ),
            ready: metric!(Family::default(), "ready", "1 where a check of /readyz passes"),
            swarm_peers: metric!(Gauge::default(), "swarm_peers", "Other members that are connected"),
            swarm_connections: metric!(Gauge::default(), "swarm_connections", "Connections of the control plane"),
            swarm_fallbacks: metric!(
                Family::default(),
                "swarm_fallbacks",
                "Blobs that this node read from the origin alone because the other nodes were of no help"
            ),
            swarm_dropped: metric!(
                Family::default(),
                "swarm_dropped",
                "Messages to peers that were dropped instead of queued"
            ),
            swarm_watch_errors: metric!(
                Family::default(),
                "swarm_watch_errors",
                "Failed tries to watch the agents' EndpointSlices"
            ),
            node_going: metric!(Family::default(), "node_going", "1 while this node is about to go, by who says so"),
            node_watch_errors: metric!(
                Family::default(),
                "node_watch_errors",
                "Failed tries to watch this node at the API server"
            ),
            spot_notice_errors: metric!(
                Counter::default(),
                "spot_notice_errors",
                "Failed questions for a spot interruption notice"
            ),
            own_registry_errors: metric!(
                Counter::default(),
                "own_registry_errors",
                "Failed questions for this node's account and region, whose ECR registry is not mirrored meanwhile"
            ),
            notice_errors: metric!(
                Family::default(),
                "notice_errors",
                "Failed questions for what the metadata service may announce besides spot interruptions"
            ),
            node_write_errors: metric!(
                Family::default(),
                "node_write_errors",
                "Failed tries to write this node's condition, taint or Events at the API server"
            ),
            startup_taint: metric!(Family::default(), "startup_taint", "1 while this node has its startup taint"),
            startup_overdue: metric!(
                Family::default(),
                "startup_overdue",
                "1 while this node has its startup taint past the deadline: its GPUs are not ready"
            ),
            startup_waits: metric!(Family::default(), "startup_waits", "1 for what the startup taint waits for"),
            startup_failed_open: metric!(
                Family::default(),
                "startup_failed_open",
                "What was missing when a startup taint was removed at its deadline"
            ),
            startup_seconds: metric!(
                Family::default(),
                "startup_seconds",
                "The node's age when this agent removed its startup taint"
            ),
            warm_images_missing: metric!(
                Gauge::default(),
                "warm_images_missing",
                "Images that are to be on this node (prewarm.images) and are not"
            ),
            report_connected: metric!(
                Family::default(),
                "report_connected",
                "1 while the scaler is connected to hear how this node is"
            ),
            report_accepted_seconds: metric!(
                Family::default(),
                "report_accepted_seconds",
                "Age of the last report that the scaler took"
            ),
            report_protected: metric!(
                Family::default(),
                "report_protected",
                "1 while the scaler has this node protected from being taken away"
            ),
            reports: metric!(Counter::default(), "reports", "Reports sent to the scaler"),
            reports_accepted: metric!(
                Counter::default(),
                "reports_accepted",
                "Reports that the scaler said that it took, the last of each answer"
            ),
            report_errors: metric!(
                Family::default(),
                "report_errors",
                "Connections to the scaler that did not come about or ended, by why"
            ),
            report_directives: metric!(
                Counter::default(),
                "report_directives",
                "Directives of the scaler that asked for something"
            ),
            report_refusals: metric!(
                Family::default(),
                "report_refusals",
                "What the scaler asked for and was not done, by why"
            ),
            nvml_errors: metric!(
                Family::default(),
                "nvml_errors",
                "Calls into NVML that failed, but for what a GPU does not support; code is nvmlReturn_t"
            ),
            nvml_init: metric!(Counter::default(), "nvml_init", "How often NVML was started"),
            nvml_call_seconds: metric!(
                Family::new_with_constructor(call_histogram as fn() -> Histogram),
                "nvml_call_seconds",
                "What calls into NVML take"
            ),
            registry,
        }
    }

    /// Shows what is read at each scrape rather than counted here.
    pub fn show(&mut self, collector: Box<dyn Collector>) {
        self.registry.register_collector(collector);
    }

    /// The exposition, in OpenMetrics text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail; a metric whose encoder does would be a bug to see.
        if let Err(error) = encode(&mut text, &self.registry) {
            tracing::error!(%error, "cannot render metrics");
        }
        text
    }
}
