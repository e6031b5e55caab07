//! Why a request gets nothing here: what the log says of it, and the word that the metrics count it by.

use crate::origin::OriginError;
use crate::pulls::PullError;

/// Why a request gets nothing here.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The credential of the pull is wanted: 401, after which containerd sends it.
    #[error("the pull's own credential is wanted")]
    Challenge,
    /// Not here, not now: 404, and containerd goes to the origin.
    #[error(transparent)]
    NotHere(#[from] NotHere),
    /// The origin was asked and refused or failed.
    #[error("the origin was asked")]
    Origin(#[from] OriginError),
    /// The blob did not come.
    #[error("the blob did not come")]
    Pull(#[from] PullError),
}

/// Why something is not given here although nothing failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotHere {
    /// By the policy of the registry.
    #[error("this registry is not mirrored: access = \"off\"")]
    Off,
    /// A tag, which containerd is to ask the registry for.
    #[error("tags of this registry are resolved by containerd: resolve = false")]
    Unresolved,
    /// A tag, of a registry that is away.
    #[error("the registry is away, and members differ on what this tag means")]
    Differ,
    /// Bytes past the start of a blob of which not all is here.
    #[error("this blob is not complete here")]
    Incomplete,
    /// A blob of which no manifest, and not the registry, told the size.
    #[error("the size of this blob is not known")]
    NoSize,
    /// A body of the blob ended early, and is to go on at the origin.
    #[error("this blob was cut short a moment ago")]
    HandedOver,
}

impl Refusal {
    /// The reason label of `darter_mirror_refusals_total`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Challenge => "challenge",
            Self::NotHere(not_here) => not_here.reason(),
            Self::Origin(error) => of_the_origin(error),
            Self::Pull(error) => of_a_pull(error),
        }
    }
}

impl NotHere {
    const fn reason(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Unresolved => "unresolved",
            Self::Differ => "differ",
            Self::Incomplete => "incomplete",
            Self::NoSize => "no_size",
            Self::HandedOver => "handed_over",
        }
    }
}

fn of_the_origin(error: &OriginError) -> &'static str {
    match error {
        OriginError::NotFound => "not_found",
        OriginError::Denied { .. } => "denied",
        error if error.is_away() => "away",
        // It lies, or sends us where we do not go; or something here is not set up.
        _ => "origin",
    }
}

fn of_a_pull(error: &PullError) -> &'static str {
    match error {
        PullError::Origin(error) => of_the_origin(error),
        PullError::Store(_) | PullError::Unreadable => "store",
        PullError::NoLength | PullError::OtherLength { .. } => "bad_length",
        // What other nodes did not give is asked of the registry (`Pulls::join`), and what somebody waits for is
        // given up only where the agent stops.
        PullError::Others | PullError::Abandoned => "stopping",
        PullError::Busy => "busy",
    }
}
