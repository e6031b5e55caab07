//! The table `[report]`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use darter_core::units::Seconds;
use http::Uri;
use serde::{Deserialize, Serialize};

use super::check::{Fault, require};
use super::optional;

/// More often is no news: what changes is told at once.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Past this a scaler takes a node for one of which nothing is known.
const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// A lease that is shorter is over before it is written.
const PROTECT_MIN: Duration = Duration::from_secs(60);
/// Nobody waits for a GPU that long.
const PROTECT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Whom this node reports to. The keys are described in `default.toml`.
#[allow(missing_docs, reason = "default.toml describes the keys")]
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    #[serde(with = "optional")]
    pub scaler: Option<ScalerUrl>,
    pub interval: Seconds,
    #[serde(with = "optional")]
    pub token_file: Option<PathBuf>,
    #[serde(with = "optional")]
    pub ca: Option<PathBuf>,
    #[serde(with = "optional")]
    pub server_name: Option<String>,
    pub insecure: bool,
    pub protect_max: Seconds,
}

/// Where a scaler listens: `https://host:port`, or `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalerUrl {
    uri: Uri,
    /// The name or address of it.
    host: String,
}

impl ScalerUrl {
    /// For whoever connects.
    pub const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The name or address in it, IPv6 without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether it is asked over TLS.
    pub fn is_tls(&self) -> bool {
        self.uri.scheme_str() == Some("https")
    }

    fn is_loopback(&self) -> bool {
        self.host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }
}

impl std::str::FromStr for ScalerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not https://<host>:<port>, such as https://darter-scaler.kube-system.svc:4010");
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none() && !authority.as_str().contains('@');
        let is_ours = matches!(uri.scheme_str(), Some("https" | "http")) && uri.port_u16().is_some_and(|port| port > 0);
        if !is_bare || !is_ours || authority.host().is_empty() {
            return Err(wrong());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { uri, host })
    }
}

impl std::fmt::Display for ScalerUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.uri.to_string().trim_end_matches('/'))
    }
}

pub(super) fn check_report(report: &Report) -> Result<(), Fault> {
    let Report { scaler, interval, token_file, ca, server_name, insecure, protect_max } = report;
    require((INTERVAL_MIN..=INTERVAL_MAX).contains(&interval.0), "report.interval", || {
        "must be from 1s to 1m: what changes is told at once, and a node that says nothing for a minute is not known"
            .to_owned()
    })?;
    require((PROTECT_MIN..=PROTECT_MAX).contains(&protect_max.0), "report.protect_max", || {
        "must be from 1m to 30d".to_owned()
    })?;
    for (key, path) in [("report.token_file", token_file), ("report.ca", ca)] {
        require(path.as_ref().is_none_or(|path| path.is_absolute()), key, || "must be an absolute path".to_owned())?;
    }
    let Some(scaler) = scaler else {
        return require(ca.is_none() && server_name.is_none() && !insecure, "report.scaler", || {
            "must be set where report.ca, report.server_name or report.insecure are: without it nothing is sent"
                .to_owned()
        });
    };
    if scaler.is_tls() {
        return require(ca.is_some(), "report.ca", || {
            format!("must name the certificates by which {scaler} is known: a PEM file")
        });
    }
    require(scaler.is_loopback() || *insecure, "report.scaler", || {
        format!(
            "{scaler} is plaintext and not a loopback address: whoever is on the way reads the token of this agent and gives \
            it orders; use https:// and report.ca, or say report.insecure = true if that is meant"
        )
    })?;
    require(ca.is_none(), "report.ca", || format!("has no meaning for {scaler}, which is plaintext"))?;
    require(server_name.is_none(), "report.server_name", || format!("has no meaning for {scaler}, which is plaintext"))
}
