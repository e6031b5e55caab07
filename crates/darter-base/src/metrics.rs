//! The one label that metrics of both processes have.

use prometheus_client::encoding::EncodeLabelSet;

/// A reason: a short fixed word.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[allow(missing_docs, reason = "the field is the label of the design")]
pub struct ReasonLabels {
    pub reason: &'static str,
}
