//! Merging: file, environment, command line. Every error names the layer and the key.

use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use toml_edit::{DocumentMut, Item, Table};

/// A whole configuration, and what its layers need to know of it.
pub trait Settings: DeserializeOwned + Serialize {
    /// The commented default.
    const DEFAULT: &'static str;
    /// What the names of its environment variables begin with.
    const PREFIX: &'static str;
    /// Variables that begin so and are no keys, without the prefix.
    const RESERVED: &'static [&'static str];
    /// The command that shows all keys.
    const SHOWN_BY: &'static str;
    /// A list of tables of which one is picked by its name: `<list>.<name>.<key>`.
    const NAMED: Option<&'static str>;
    /// The same with every section optional: a file may leave out what the default has, and reading its own
    /// text gives positions in it.
    type Partial: DeserializeOwned;

    /// Checks what the types cannot.
    fn check(&self) -> Result<(), Fault>;
}

/// What is wrong, and at which key: `mirror.listen`, or `registry[0].ca`.
#[derive(Debug)]
pub struct Fault {
    /// Which key.
    pub key: String,
    /// What is wrong with it.
    pub message: String,
}

/// A fault unless this holds.
pub fn require(holds: bool, key: &str, message: impl FnOnce() -> String) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(Fault { key: key.to_owned(), message: message() }) }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file says something wrong. The text holds the position, the line and what is wrong.
    #[error("{}:{line}: {message}", .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, with the key.
        message: String,
    },
    /// An environment variable or a `--set` says something wrong.
    #[error("{origin}: {message}")]
    Override {
        /// Such as `--set mirror.listen=x` or `DARTER_MIRROR_LISTEN`.
        origin: String,
        /// What is wrong.
        message: String,
    },
}

/// The layers of a configuration, merged one after the other.
#[derive(Debug)]
pub struct Layers<C> {
    merged: DocumentMut,
    file: Option<(PathBuf, String)>,
    /// Each with its key, in the order they were made.
    overrides: Vec<(String, String)>,
    of: std::marker::PhantomData<C>,
}

impl<C: Settings> Layers<C> {
    /// Only the embedded default.
    pub fn embedded() -> Self {
        let merged = match C::DEFAULT.parse() {
            Ok(document) => document,
            // Covered by a test: the embedded text is part of the program.
            Err(error) => unreachable!("the embedded default is not TOML: {error}"),
        };
        Self { merged, file: None, overrides: Vec::new(), of: std::marker::PhantomData }
    }

    /// A file over the embedded default.
    pub fn file(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::text(path, text)
    }

    /// The text of a file over the embedded default.
    pub fn text(path: &Path, text: String) -> Result<Self, ConfigError> {
        let mut layers = Self::embedded();
        let document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| ConfigError::File {
            path: path.to_owned(),
            line: line_at(&text, error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        merge(layers.merged.as_table_mut(), document.as_table());
        layers.file = Some((path.to_owned(), text));
        layers.config()?;
        Ok(layers)
    }

    /// The `<PREFIX><SECTION>_<KEY>` variables of an environment over what is there, in order of name.
    ///
    /// Variables of other programs in that name space are errors too: a misspelt key that
    /// is silently ignored costs a night.
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let mut variables: Vec<_> = variables
            .into_iter()
            .filter_map(|(name, value)| Some((name.strip_prefix(C::PREFIX)?.to_owned(), value)))
            .filter(|(name, _)| !C::RESERVED.contains(&name.as_str()))
            .filter(|(name, value)| !is_service_link(name, value))
            .collect();
        variables.sort();
        for (name, value) in variables {
            let origin = format!("environment variable {}{name}", C::PREFIX);
            let lower = name.to_lowercase();
            let sections = sections(self.merged.as_table(), "").into_iter();
            let is_of = |section: &String| lower.starts_with(&format!("{}_", section.replace('.', "_")));
            let Some(section) = sections.filter(is_of).max_by_key(String::len) else {
                let message = format!("no such section; `{}` shows them", C::SHOWN_BY);
                return Err(ConfigError::Override { origin, message });
            };
            let key = format!("{section}.{}", &lower[section.len() + 1..]);
            self = self.set_one(&origin, &key, &value)?;
        }
        Ok(self)
    }

    /// One `key=value` over what is there, such as `mirror.listen=127.0.0.1:4001`.
    pub fn set(self, assignment: &str) -> Result<Self, ConfigError> {
        let origin = format!("--set {assignment}");
        match assignment.split_once('=') {
            Some((key, value)) => self.set_one(&origin, key.trim(), value.trim()),
            None => Err(ConfigError::Override { origin, message: "expected key=value".to_owned() }),
        }
    }

    fn set_one(mut self, origin: &str, key: &str, value: &str) -> Result<Self, ConfigError> {
        let wrong = |message: String| ConfigError::Override { origin: origin.to_owned(), message };
        let unknown = || wrong(format!("unknown key `{key}`; `{}` shows all keys", C::SHOWN_BY));
        let (section, name) = key.rsplit_once('.').ok_or_else(unknown)?;
        let named = C::NAMED.and_then(|list| Some((list, section.strip_prefix(list)?.strip_prefix('.')?)));
        let table = match named {
            // A list; a name picks one of it and makes it if it is not there yet.
            Some((list, of)) => named_table(&mut self.merged, list, of.trim_matches('"')),
            None => section
                .split('.')
                .try_fold(self.merged.as_table_mut(), |table, part| table.get_mut(part).and_then(Item::as_table_mut)),
        };
        let table = table.ok_or_else(unknown)?;
        if named.is_none() && !table.contains_key(name) {
            return Err(unknown());
        }
        // Values are TOML where they read as TOML (numbers, booleans, lists), else text. A key whose
        // default is a text takes the value as it is: a password file may be called `true`.
        let is_text = table.get(name).is_some_and(Item::is_str);
        let parsed = value.parse::<toml_edit::Value>().ok().filter(|parsed| !is_text || parsed.is_str());
        table.insert(name, Item::Value(parsed.unwrap_or_else(|| value.into())));
        self.overrides.push((key.to_owned(), origin.to_owned()));
        // Keys that belong together come one after the other: whether they do is for the end.
        self.parsed()?;
        Ok(self)
    }

    fn parsed(&self) -> Result<C, ConfigError> {
        toml_edit::de::from_document(self.merged.clone()).map_err(|error| self.blame(error.message(), None))
    }

    /// The merged configuration, checked.
    pub fn config(&self) -> Result<C, ConfigError> {
        let config = self.parsed()?;
        config.check().map_err(|fault| self.blame(&fault.message, Some(&fault.key)))?;
        Ok(config)
    }

    /// Faults that are no errors, as errors are told. Unlike those they may be in any layer, and are mostly in
    /// the file.
    pub fn warn(&self, faults: &[Fault]) -> Vec<ConfigError> {
        let blame = |fault: &Fault| {
            let message = format!("{}: {}", fault.key, fault.message);
            self.blame_file(message, Some(&fault.key))
        };
        faults.iter().map(blame).collect()
    }

    /// The merged configuration as TOML.
    pub fn print(&self) -> Result<String, ConfigError> {
        let config = self.config()?;
        toml_edit::ser::to_string_pretty(&config).map_err(|error| self.blame(&error.to_string(), None))
    }

    /// An error in what was set last, of the key if it is known: what was there before was right.
    fn blame(&self, message: &str, key: Option<&str>) -> ConfigError {
        let message = key.map_or_else(|| message.to_owned(), |key| format!("{key}: {message}"));
        let of_key = self.overrides.iter().rev().find(|(name, _)| Some(name.as_str()) == key);
        if let Some((_, origin)) = of_key.or_else(|| self.overrides.last()) {
            return ConfigError::Override { origin: origin.clone(), message };
        }
        self.blame_file(message, key)
    }

    fn blame_file(&self, message: String, key: Option<&str>) -> ConfigError {
        match &self.file {
            Some((path, text)) => {
                // serde's own errors know the span if they are found in the file's text itself.
                let (line, told) = match key {
                    Some(key) => (line_of_key(text, key), None),
                    None => match toml::from_str::<C::Partial>(text) {
                        Err(error) => {
                            let line = line_at(text, error.span().map_or(0, |span| span.start));
                            let source = text.lines().nth(line - 1).unwrap_or_default().trim();
                            (line, Some(format!("{} (in `{source}`)", error.message())))
                        }
                        Ok(_) => (1, None),
                    },
                };
                ConfigError::File { path: path.clone(), line, message: told.unwrap_or(message) }
            }
            None => {
                let origin = self.overrides.last().map_or("embedded default", |(_, origin)| origin);
                ConfigError::Override { origin: origin.to_owned(), message }
            }
        }
    }
}

/// The paths of all tables, those in tables too.
fn sections(table: &Table, above: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (key, item) in table {
        let path = if above.is_empty() { key.to_owned() } else { format!("{above}.{key}") };
        // A list of tables is a section too, to be told that its keys are not set this way.
        if let Some(table) = item.as_table() {
            found.extend(sections(table, &path));
        }
        if item.is_table() || item.is_array_of_tables() {
            found.push(path);
        }
    }
    found
}

/// Whether Kubernetes made this variable: it puts the addresses of every Service of a namespace into
/// every pod there, and ours may be called `darter-scaler`.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_port = |rest: &str| {
        let mut parts = rest.splitn(3, '_');
        let number = parts.next().is_some_and(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
        number && parts.next().is_some_and(|part| matches!(part, "TCP" | "UDP" | "SCTP"))
    };
    name == "SERVICE_HOST"
        // Such as tcp://10.0.0.7:4001. Without it, this is somebody's misspelt key.
        || (name == "PORT" || name.ends_with("_PORT")) && value.contains("://")
        || name.ends_with("_SERVICE_HOST")
        || name.starts_with("SERVICE_PORT")
        || name.contains("_SERVICE_PORT")
        || name.strip_prefix("PORT_").is_some_and(is_port)
        || name.split_once("_PORT_").is_some_and(|(_, rest)| is_port(rest))
}

fn merge(below: &mut Table, above: &Table) {
    for (key, item) in above {
        match (below.get_mut(key), item) {
            (Some(Item::Table(below)), Item::Table(above)) => merge(below, above),
            _ => {
                below.insert(key, item.clone());
            }
        }
    }
}

fn named_table<'a>(document: &'a mut DocumentMut, list: &str, name: &str) -> Option<&'a mut Table> {
    let list = document.entry(list).or_insert_with(|| Item::ArrayOfTables(toml_edit::ArrayOfTables::new()));
    let list = list.as_array_of_tables_mut()?;
    let is_it = |table: &Table| table.get("name").and_then(Item::as_str) == Some(name);
    let found = list.iter().position(is_it);
    let index = match found {
        Some(index) => index,
        None => {
            let mut table = Table::new();
            table.insert("name", toml_edit::value(name));
            list.push(table);
            list.len() - 1
        }
    };
    list.get_mut(index)
}

fn line_at(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

/// The line of a dotted key: its own, else its section's, else the first.
fn line_of_key(text: &str, key: &str) -> usize {
    let Ok(document) = toml_edit::Document::parse(text) else { return 1 };
    let mut item: Option<&Item> = None;
    let mut table = Some(document.as_table());
    for part in key.split('.') {
        let (name, index) = part
            .split_once('[')
            .map_or((part, None), |(name, index)| (name, index.trim_end_matches(']').parse::<usize>().ok()));
        let Some((found, next)) = table.and_then(|table| table.get_key_value(name)) else { break };
        let span = found.span();
        table = match (next, index) {
            (Item::ArrayOfTables(list), Some(index)) => list.get(index),
            (next, _) => next.as_table(),
        };
        item = Some(next);
        if table.is_none()
            && let Some(span) = span
        {
            return line_at(text, span.start);
        }
    }
    let span = table.and_then(Table::span).or_else(|| item.and_then(Item::span));
    span.map_or(1, |span| line_at(text, span.start))
}

/// A table of which every key may be missing: reading it finds what is wrong in a file, at its own place.
#[derive(Debug)]
pub struct Section<T>(std::marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Section<T> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_map(Keys(std::marker::PhantomData))
    }
}

/// Reads the keys of a section one at a time, each as if it were the whole section: a missing
/// key is then no error, and a wrong one is reported at its own place.
struct Keys<T>(std::marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Keys<T> {
    type Value = Section<T>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a table")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Section<T>, A::Error> {
        match T::deserialize(serde::de::value::MapAccessDeserializer::new(map)) {
            Ok(_) => Ok(Section(std::marker::PhantomData)),
            Err(error) if error.to_string().contains("missing field") => Ok(Section(std::marker::PhantomData)),
            Err(error) => Err(error),
        }
    }
}
