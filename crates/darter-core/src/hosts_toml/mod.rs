//! The text of containerd's `hosts.toml`: how darter gets into it, and out of it again.
//!
//! containerd asks the hosts of this file in its order before it asks the registry. darter owns one
//! table in it and nothing else, so what a user wrote there must survive: comments, other hosts,
//! keys we do not know. Merging is always "take ours out, put ours in", so that a second merge
//! changes nothing, and drift is "a merge would change something".
//!
//! Sources: containerd `core/remotes/docker/config/hosts.go` (1.6 to 2.3). Not here: files,
//! directories, backups (`agent::certs_d`).

mod document;
mod inherit;
mod p2p;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::names::Registry;

pub use document::Unusable;
pub use inherit::{Certificates, inherit};
pub use p2p::Foreign;

use document::Document;

const MARK_START: &str = "# darter owns only the [host.\"";
const MARK_END: &str = "\"] table; other edits stay";

/// What darter's part of a registry's hosts.toml should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The registry, as containerd names it in `ns=`.
    pub registry: Registry,
    /// Where the registry itself is: added where the file names no `server`. See [`own_server`].
    pub server: Option<String>,
    /// Where containerd reaches the mirror, such as `http://127.0.0.1:4001`.
    pub mirror_url: String,
    /// Whether containerd asks the mirror what a tag means.
    pub resolve: bool,
    /// When containerd gives up connecting to the mirror (2.0.7 and later).
    pub dial_timeout: Duration,
    /// Take out what Dragonfly or Spegel left.
    pub adopt: bool,
}

/// A hosts.toml with darter in it, and what was found on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// The whole file.
    pub text: String,
    /// What others want asked for this registry, in their order: hosts that may pull, then a
    /// `server` that is not the registry itself. Dragonfly and Spegel are no origins.
    ///
    /// `/v2` belongs after each, but where the path already has a `/v2` segment (an `override_path`
    /// such as Harbor's `https://harbor.example/v2/proxy`): that is the API root as it stands.
    ///
    /// Without those of `left_out`, which only containerd can ask.
    pub foreign_origins: Vec<ForeignOrigin>,
    /// Hosts that would be among them, but for a key that we cannot honour.
    pub left_out: Vec<LeftOut>,
    /// Whose hosts are in the file, each once, in order.
    pub found: Vec<Foreign>,
    /// Hosts of others that containerd 2.x skipped silently, because they were inline tables or
    /// dotted keys. They have table headers now, and count.
    pub woken: Vec<String>,
    /// The existing file was ignored by containerd as a whole, for this reason: the text is a fresh
    /// start, and the old file belongs in a backup.
    pub unusable: Option<Unusable>,
}

/// A host that others want asked for a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignOrigin {
    /// Where it is.
    pub url: String,
    /// Whether it may say what a tag means: containerd asks a host with `pull` alone by digest only.
    pub resolve: bool,
}

/// A host that wants more of whoever asks it than a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The host, as the file names it.
    pub host: String,
    /// The first key that says so.
    pub key: &'static str,
}

/// Why there is no merged text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostsTomlError {
    /// Two programs cannot have the same address.
    #[error("{url} is {by}'s address in this file: stop {by} and set certs_d.adopt = true, or change mirror.listen")]
    AddressTaken {
        /// The address that both want.
        url: String,
        /// Whose it is now.
        by: Foreign,
    },
}

/// Where a registry is when nobody says otherwise.
///
/// `None` for localhost names: containerd tries https, then http for them, and only while `server`
/// is absent.
pub fn own_server(registry: &Registry) -> Option<String> {
    match registry.as_str() {
        "docker.io" => Some("https://registry-1.docker.io".to_owned()),
        _ if is_local(registry.host()) => None,
        name => Some(format!("https://{name}")),
    }
}

/// containerd's `docker.IsLocalhost`.
fn is_local(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether darter wrote this file: it has our comment, or the table that only we write.
pub fn is_ours(text: &str, wanted: &Wanted) -> bool {
    marked_url(text).is_some() || Document::parse(text).is_ok_and(|document| document.has_our_table(&wanted.mirror_url))
}

/// The mirror's address in the comment that darter leaves in its files.
pub fn marked_url(text: &str) -> Option<&str> {
    text.lines().find_map(url_in_mark)
}

fn url_in_mark(line: &str) -> Option<&str> {
    line.trim_end().strip_prefix(MARK_START)?.strip_suffix(MARK_END).filter(|url| !url.contains('"'))
}

/// Whether containerd takes the file at all.
pub fn usable(text: &str) -> Result<(), Unusable> {
    Document::parse(text).map(|_| ())
}

/// Puts darter's table into a file, first of all hosts; `None` is no file.
pub fn merge(existing: Option<&str>, wanted: &Wanted) -> Result<Merged, HostsTomlError> {
    let base = existing.map(|text| bare(text, wanted)).unwrap_or_default();
    let (mut document, unusable) = match Document::parse(&base) {
        Ok(document) => (document, None),
        Err(reason) => (Document::default(), Some(reason)),
    };
    let woken = document.give_headers();
    if let Some(by) = document.holder(&wanted.mirror_url).filter(|by| *by != Foreign::Other && !wanted.adopt) {
        return Err(HostsTomlError::AddressTaken { url: wanted.mirror_url.clone(), by });
    }
    let found = document.found(&wanted.mirror_url);
    if wanted.adopt {
        document.take_out_p2p();
    }
    document.drop_server(&wanted.mirror_url);
    let (foreign_origins, left_out) = document.foreign_origins(wanted);
    let adds_server = !document.has_server();
    document.put_ours(wanted);
    let text = with_mark(&document.to_string(), wanted, adds_server);
    Ok(Merged { text, foreign_origins, left_out, found, woken, unusable })
}

/// The file without darter: `None` where nothing is left. A file that we never touched stays as it is.
pub fn without(text: &str, wanted: &Wanted) -> Option<String> {
    let rest = bare(text, wanted);
    (!rest.trim().is_empty()).then_some(rest)
}

/// Whether the file is what a merge would make of it.
pub fn verify(text: &str, wanted: &Wanted) -> bool {
    merge(Some(text), wanted).is_ok_and(|merged| merged.text == text)
}

/// A server line directly under our comment is ours; a blank line between says it is the user's.
fn with_mark(body: &str, wanted: &Wanted, adds_server: bool) -> String {
    let mark = format!("{MARK_START}{}{MARK_END}\n", wanted.mirror_url);
    match &wanted.server {
        Some(server) if adds_server => format!("{mark}{}{body}", server_line(server)),
        _ => format!("{mark}\n{}", body.strip_prefix('\n').filter(|_| adds_server).unwrap_or(body)),
    }
}

fn server_line(server: &str) -> String {
    format!("server = {}\n", toml_edit::Value::from(server))
}

/// The text without our comment, our server line and our table. As it is where none is there or it
/// is not TOML.
fn bare(text: &str, wanted: &Wanted) -> String {
    let marked = marked_url(text).map(str::to_owned);
    let unmarked = without_mark(text, wanted);
    let Ok(mut document) = Document::parse(&unmarked) else { return unmarked };
    let mut changed = false;
    if let Some(url) = &marked {
        changed |= document.take_out(url);
    }
    if document.has_our_table(&wanted.mirror_url) {
        changed |= document.take_out(&wanted.mirror_url);
    }
    if changed { document.to_string() } else { unmarked }
}

fn without_mark(text: &str, wanted: &Wanted) -> String {
    let own_line = wanted.server.as_deref().map(server_line);
    let mut kept = String::with_capacity(text.len());
    let mut follows_mark = false;
    for line in text.split_inclusive('\n') {
        if url_in_mark(line).is_some() {
            follows_mark = true;
            continue;
        }
        let is_ours = follows_mark && (line.trim().is_empty() || Some(line) == own_line.as_deref());
        follows_mark = false;
        if !is_ours {
            kept.push_str(line);
        }
    }
    kept
}
