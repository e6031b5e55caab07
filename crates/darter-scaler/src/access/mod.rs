//! Who may report as which node, say demand, freeze.
//!
//! By where it comes from, by a token of a file, or by what the API server says of a service account.

mod tokens;

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;

pub use self::tokens::{TokenFile, TokenFileError};
use crate::config::{self, AccessMode};

/// What somebody wants to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// Report as a node: which is for the answer to say.
    Report,
    /// Say demand of this workload, `namespace/name`.
    Demand(String),
    /// Hold everything, or let go.
    Freeze,
}

/// That somebody may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Granted {
    /// As which node a report may be; none: as any.
    pub node: Option<String>,
}

/// Why somebody may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// There is nothing to go by.
    #[error("a token is needed: authorization: Bearer …")]
    NoToken,
    /// Nobody knows it.
    #[error("this token is not known here")]
    BadToken,
    /// It is known, and may not.
    #[error("{0}")]
    Forbidden(String),
    /// Nobody can say.
    #[error("it cannot be told now who this is: {0}")]
    Unavailable(String),
}

impl Denied {
    /// As in `darter_scaler_access_refusals_total{reason}`.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::BadToken => "bad_token",
            Self::Forbidden(_) => "forbidden",
            Self::Unavailable(_) => "unavailable",
        }
    }
}

/// Asks the API server: who has this token, and whether they may. The answer is remembered there, for a while.
pub type Review = Arc<dyn Fn(String, Wish) -> BoxFuture<'static, Result<Granted, Denied>> + Send + Sync>;

/// The ways to tell.
#[derive(Clone)]
pub enum Access {
    /// Whoever is on this machine.
    Loopback,
    /// Who has a token of a file.
    Tokens(Arc<TokenFile>),
    /// Service accounts.
    Kubernetes(Review),
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "Loopback",
            Self::Tokens(_) => "Tokens",
            Self::Kubernetes(_) => "Kubernetes",
        })
    }
}

impl Access {
    /// As configured; `review` is how the API server is asked, where there is one.
    pub fn new(settings: &config::Access, review: Option<Review>) -> Result<Self, TokenFileError> {
        Ok(match (settings.mode, review) {
            (AccessMode::Tokens, _) => Self::Tokens(Arc::new(TokenFile::open(&settings.token_file)?)),
            (AccessMode::Kubernetes, Some(review)) => Self::Kubernetes(review),
            // Nobody to ask: nobody may.
            (AccessMode::Kubernetes, None) => {
                let said = "kubernetes is not asked by this scaler";
                Self::Kubernetes(Arc::new(move |_, _| {
                    Box::pin(async move { Err(Denied::Unavailable(said.to_owned())) })
                }))
            }
            (AccessMode::Loopback, _) => Self::Loopback,
        })
    }

    /// Whether who comes from there, with this token, may.
    pub async fn may(&self, from: SocketAddr, token: Option<&str>, wish: Wish) -> Result<Granted, Denied> {
        match self {
            Self::Loopback if from.ip().to_canonical().is_loopback() => Ok(Granted::default()),
            Self::Loopback => Err(Denied::Forbidden(format!(
                "{from} is not this machine, and access.mode is loopback: take tokens or kubernetes"
            ))),
            Self::Tokens(file) => file.may(token.ok_or(Denied::NoToken)?, &wish),
            Self::Kubernetes(review) => review(token.ok_or(Denied::NoToken)?.to_owned(), wish).await,
        }
    }
}

/// The token of an `authorization` header.
pub fn bearer(header: Option<&str>) -> Option<&str> {
    let (kind, token) = header?.split_once(' ')?;
    let token = token.trim();
    (kind.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// What is longer is no file of tokens.
pub(crate) const FILE_MAX: u64 = 1 << 20;

/// The text of a small file.
pub(crate) fn read(path: &Path) -> std::io::Result<String> {
    let length = std::fs::metadata(path)?.len();
    if length > FILE_MAX {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, format!("longer than {FILE_MAX} bytes")));
    }
    std::fs::read_to_string(path)
}
