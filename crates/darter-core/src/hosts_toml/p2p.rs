//! Who else puts hosts into hosts.toml: Dragonfly and Spegel, which darter takes the place of.
//!
//! Both write http addresses of their own node agent. Recognised by what their installers write
//! (dfinit of Dragonfly's client, Spegel's `configuration` command and chart), never by a guess that
//! could hit a user's own registry mirror.

use std::fmt;

use toml_edit::{Item, Table};

/// Whose host it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Foreign {
    /// Dragonfly's dfdaemon on this node.
    Dragonfly,
    /// Spegel on this node.
    Spegel,
    /// A person's, or another program's: a Harbor, a pull-through cache.
    Other,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dragonfly => "Dragonfly",
            Self::Spegel => "Spegel",
            Self::Other => "another program",
        })
    }
}

/// Whose host a `[host."<url>"]` table is.
pub(super) fn recognise(url: &str, table: &Table) -> Foreign {
    if is_dragonfly(url, table) {
        Foreign::Dragonfly
    } else if is_spegel(url, table) {
        Foreign::Spegel
    } else {
        Foreign::Other
    }
}

/// dfinit writes `http://127.0.0.1:4001` with a header that names the registry; version 1 and the
/// first of version 2 listened on 65001.
fn is_dragonfly(url: &str, table: &Table) -> bool {
    let (host, port) = authority(url);
    let is_local = matches!(host, "127.0.0.1" | "localhost" | "[::1]");
    header(table, "x-dragonfly-registry").is_some()
        || (is_local && port == Some("65001"))
        || host.to_ascii_lowercase().contains("dfdaemon")
}

/// Spegel's chart reaches its pod by host port 30020 and node port 30021; K3s and others that embed
/// it use port 5000 of the node. Port 5000 is also every private registry's, so it counts only with
/// what Spegel alone writes beside it.
fn is_spegel(url: &str, table: &Table) -> bool {
    let (host, port) = authority(url);
    let is_address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>().is_ok();
    let is_plain = url.starts_with("http://") && (is_address || host == "localhost");
    let has_its_form = header(table, "authorization").is_some_and(|value| value.starts_with("Basic "))
        || table.get("dial_timeout").and_then(Item::as_str) == Some("200ms");
    match port {
        Some("30020" | "30021") => is_plain,
        Some("5000") => is_plain && has_its_form,
        _ => false,
    }
}

/// Host and port of a URL, as containerd would split it.
fn authority(url: &str) -> (&str, Option<&str>) {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next().unwrap_or(rest);
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (host, Some(port)),
        _ => (authority, None),
    }
}

/// The first value of a header of this host, its name in any case.
fn header<'a>(table: &'a Table, name: &str) -> Option<&'a str> {
    let headers = table.get("header")?.as_table_like()?;
    let (_, value) = headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
    value.as_str().or_else(|| value.as_array()?.get(0)?.as_str())
}
