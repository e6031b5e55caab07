//! Why something that was said is not believed.

/// One reason, with what was wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Somebody speaks for another node.
    #[error("this token is of node {of}, and the report says that it is {says}")]
    Identity {
        /// Whose token it is.
        of: String,
        /// Who it says that it is.
        says: String,
    },
    /// Somebody says that it is another node, by its uid.
    #[error("{node} says that its uid is {uid}, which is that of {of}")]
    Uid {
        /// Whose report.
        node: String,
        /// What it says.
        uid: String,
        /// Whose that is.
        of: String,
    },
    /// It was said before, or something later was.
    #[error("report {came} of {node} after {had}: it was said before")]
    Sequence {
        /// Whose report.
        node: String,
        /// The newest that was taken.
        had: u64,
        /// What came.
        came: u64,
    },
    /// Of a life of the agent that ended.
    #[error("a report of an earlier life of the agent of {node}")]
    Instance {
        /// Whose report.
        node: String,
    },
    /// More than a report may hold.
    #[error("{what}: {found}, and a report has at most {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many came.
        found: usize,
        /// How many may.
        most: usize,
    },
    /// What no node can be.
    #[error("{what} cannot be what the report says")]
    Nonsense {
        /// What.
        what: &'static str,
    },
    /// More than is ever looked at.
    #[error("there are {most} {what} already, and no more are looked at")]
    Full {
        /// Of what.
        what: &'static str,
        /// How many.
        most: usize,
    },
}

impl Refusal {
    /// As in `darter_scaler_report_refusals_total{reason}`.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Identity { .. } | Self::Uid { .. } => "identity",
            Self::Sequence { .. } => "sequence",
            Self::Instance { .. } => "instance",
            Self::TooMany { .. } => "bounds",
            Self::Nonsense { .. } => "nonsense",
            Self::Full { .. } => "full",
        }
    }

    /// All the words.
    pub const WORDS: [&str; 6] = ["identity", "sequence", "instance", "bounds", "nonsense", "full"];
}
