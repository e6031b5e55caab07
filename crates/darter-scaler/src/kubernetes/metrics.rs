//! What Prometheus sees of the scaler's side of Kubernetes.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use darter_base::metrics::ReasonLabels;

/// Of what was watched.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabels {
    /// The resource, as in an API path.
    pub kind: &'static str,
}

/// Counters; cheap to write.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests for the Lease that failed, by reason.
    pub lease_errors: Family<ReasonLabels, Counter>,
    /// Reviews of tokens and rights, by what came of them.
    pub reviews: Family<ReasonLabels, Counter>,
    /// Watches that failed, by reason.
    pub watch_errors: Family<ReasonLabels, Counter>,
    /// Objects that there was no room for, by kind.
    pub watch_dropped: Family<KindLabels, Counter>,
    /// Writes that failed, by reason.
    pub write_errors: Family<ReasonLabels, Counter>,
    /// Events that were not written, by reason.
    pub event_errors: Family<ReasonLabels, Counter>,
}

impl Metrics {
    /// Puts them into an exposition.
    pub fn register(&self, registry: &mut Registry) {
        let families = [
            ("scaler_lease_errors", "Requests for the Lease that failed, by reason", &self.lease_errors),
            ("scaler_reviews", "Tokens and rights that the API server was asked about, by outcome", &self.reviews),
            ("scaler_watch_errors", "Watches that failed, by reason", &self.watch_errors),
            ("scaler_write_errors", "Writes at the API server that failed, by reason", &self.write_errors),
            ("scaler_event_errors", "Events that were not written, by reason", &self.event_errors),
        ];
        for (name, help, family) in families {
            registry.register(name, help, family.clone());
        }
        let help = "Objects that there was no room for, by kind";
        registry.register("scaler_watch_dropped", help, self.watch_dropped.clone());
    }
}
