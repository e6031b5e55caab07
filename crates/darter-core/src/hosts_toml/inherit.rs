//! What containerd used for a registry before darter had a directory for it, kept in force.
//!
//! containerd takes the first directory that exists and reads nothing else. So a new directory of
//! ours hides a `_default`, and the registry's directory under a later root of `config_path`; and a
//! new hosts.toml hides the docker-style certificates beside it, which are loaded only where there
//! is none. Whatever would be hidden is folded into our file: `ca` and
//! `client` at the top of a hosts.toml belong to its `server`.

use toml_edit::{Array, DocumentMut, Item, Table, Value};

use super::document::Document;

/// The certificate files of a directory, as Docker lays them out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Certificates {
    ca: Vec<String>,
    /// Certificate and key. Where there is no key file, containerd looks for the key in the first.
    client: Vec<[String; 2]>,
}

impl Certificates {
    /// Picks them out of the file names of a directory: `*.crt` is a CA, `*.cert` and the `*.key` of
    /// the same name are a client's.
    pub fn among(names: &[String]) -> Self {
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.sort_unstable();
        let ca = names.iter().filter(|name| name.ends_with(".crt")).map(|name| (*name).to_owned()).collect();
        let pair = |name: &str| {
            let key = format!("{}.key", name.strip_suffix(".cert")?);
            let key = if names.contains(&key.as_str()) { key } else { name.to_owned() };
            Some([name.to_owned(), key])
        };
        Self { ca, client: names.iter().filter_map(|name| pair(name)).collect() }
    }

    fn text(&self) -> Option<String> {
        let mut document = DocumentMut::new();
        if !self.ca.is_empty() {
            document.insert("ca", Item::Value(self.ca.iter().collect::<Array>().into()));
        }
        if !self.client.is_empty() {
            let pairs = self.client.iter().map(|pair| Value::from(pair.iter().collect::<Array>()));
            document.insert("client", Item::Value(pairs.collect::<Array>().into()));
        }
        (!document.is_empty()).then(|| document.to_string())
    }
}

/// The text that says what a directory says to containerd: its hosts.toml where that is in force,
/// else its certificates.
///
/// `dir` makes its relative paths absolute, because they are relative to the directory of the file
/// they stand in. `None`: the text is for the same directory.
pub fn inherit(hosts_toml: Option<&str>, certificates: &Certificates, dir: Option<&str>) -> Option<String> {
    // An empty file counts as none (containerd's loadHostDir).
    let in_force = hosts_toml.filter(|text| !text.is_empty() && Document::parse(text).is_ok());
    let text = in_force.map(str::to_owned).or_else(|| certificates.text())?;
    let Some(dir) = dir else { return Some(text) };
    let Ok(mut document) = text.parse::<DocumentMut>() else { return Some(text) };
    make_absolute(document.as_table_mut(), dir);
    Some(document.to_string())
}

fn make_absolute(table: &mut Table, dir: &str) {
    for key in ["ca", "client"] {
        if let Some(value) = table.get_mut(key).and_then(Item::as_value_mut) {
            join(value, dir);
        }
    }
    let Some(hosts) = table.get_mut("host").and_then(Item::as_table_like_mut) else { return };
    for (_, host) in hosts.iter_mut() {
        let Some(host) = host.as_table_like_mut() else { continue };
        for key in ["ca", "client"] {
            if let Some(value) = host.get_mut(key).and_then(Item::as_value_mut) {
                join(value, dir);
            }
        }
    }
}

fn join(value: &mut Value, dir: &str) {
    match value {
        Value::String(path) if !path.value().starts_with('/') => {
            let decor = path.decor().clone();
            let mut joined = Value::from(format!("{}/{}", dir.trim_end_matches('/'), path.value()));
            *joined.decor_mut() = decor;
            *value = joined;
        }
        Value::Array(values) => values.iter_mut().for_each(|value| join(value, dir)),
        _ => (),
    }
}
