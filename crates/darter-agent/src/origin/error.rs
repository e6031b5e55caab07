//! What can go wrong with an origin, and what each means for the pull that asked.
//!
//! No variant holds a URL, a header or a body: they carry signatures and tokens. A place is named by
//! host and port.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The cause of a failure in another crate, whose type is of no use here.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why an origin did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The origin has no such thing: 404.
    #[error("the origin does not have it")]
    NotFound,
    /// The origin, or its token server, does not let this credential read it: 401 or 403.
    #[error("the origin refuses access: {status}")]
    Denied {
        /// Its status code.
        status: u16,
    },
    /// A body ended early.
    #[error("the body ended at offset {got} instead of {wanted}")]
    Truncated {
        /// Offset after the last byte that came.
        got: u64,
        /// Offset after the last byte that was announced.
        wanted: u64,
    },
    /// Any other status.
    #[error("{host} answers {status}")]
    Status {
        /// Who answered.
        host: String,
        /// The status code.
        status: u16,
        /// The pause that it asks for.
        retry_after: Option<Duration>,
    },
    /// No connection, or it broke before response headers.
    #[error("cannot reach {host}")]
    Unreachable {
        /// Who was to answer.
        host: String,
        /// Why not.
        #[source]
        source: Cause,
    },
    /// No response headers in time.
    #[error("no answer from {host} within {after:?}")]
    TimedOut {
        /// Who was to answer.
        host: String,
        /// How long it had.
        after: Duration,
    },
    /// A body sent nothing for too long.
    #[error("the body sent nothing for {after:?}")]
    Stalled {
        /// How long.
        after: Duration,
    },
    /// The connection broke in mid-body.
    #[error("the body broke off")]
    Broken(#[source] hyper::Error),
    /// The answer contradicts the question or itself: never used.
    #[error("the origin contradicts itself: {0}")]
    Lied(&'static str),
    /// More bytes than a thing of this kind may have.
    #[error("more than {limit} bytes")]
    TooLarge {
        /// How many may come.
        limit: u64,
    },
    /// A redirect, or a token realm, to where a registry has no business.
    #[error("not going to {host}: {reason}")]
    Refused {
        /// Where to.
        host: String,
        /// Why not.
        reason: &'static str,
    },
    /// AWS gives no token.
    #[error("no ECR token: {reason}")]
    Aws {
        /// What failed.
        reason: &'static str,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
    /// A file that the configuration names cannot be used.
    #[error("cannot read {}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A credential helper of docker gives nothing. Its output is not kept: it may be a secret.
    #[error("credential helper {program}: {reason}")]
    Helper {
        /// Which.
        program: String,
        /// What it did.
        reason: &'static str,
        /// Why.
        #[source]
        source: Option<io::Error>,
    },
    /// Something configured is not a URL that can be asked.
    #[error("`{0}` is not a URL of a registry")]
    Url(String),
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
}

impl OriginError {
    /// Whether the origin cannot be asked at the moment, so that what it said before may still hold.
    pub fn is_away(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            Self::Unreachable { .. }
            | Self::TimedOut { .. }
            | Self::Stalled { .. }
            | Self::Broken(_)
            | Self::Truncated { .. }
            | Self::Aws { .. } => true,
            _ => false,
        }
    }

    /// Whether asking again may help.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Status { status, .. } => matches!(status, 400 | 401 | 403 | 408 | 429 | 500..),
            _ => self.is_away(),
        }
    }

    /// The word for `darter_origin_retries_total`, and whether this client repeats the request
    /// itself. What breaks later than the response head is resumed by the pull.
    pub(super) fn retry_reason(&self) -> Option<&'static str> {
        match self {
            Self::Status { status: 429, .. } => Some("throttled"),
            Self::Status { status: 500.., .. } => Some("server_error"),
            Self::Unreachable { .. } => Some("unreachable"),
            Self::TimedOut { .. } => Some("timeout"),
            _ => None,
        }
    }

    /// Whether the origin wants fewer requests.
    pub(super) fn is_throttling(&self) -> bool {
        matches!(self, Self::Status { status: 429 | 503, .. })
    }

    /// The pause that the origin asked for.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
