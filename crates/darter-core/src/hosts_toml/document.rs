//! hosts.toml as a document: reading it as containerd does, and moving tables without losing a
//! comment.

use std::fmt;

use toml_edit::{Array, ArrayOfTables, Decor, DocumentMut, Item, Table, TableLike, Value};

use super::p2p::{Foreign, recognise};
use super::{ForeignOrigin, LeftOut, Wanted, own_server};

/// Why containerd ignores a whole file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("containerd ignores this file as a whole: {0}")]
pub struct Unusable(String);

/// A file that containerd would accept.
#[derive(Default)]
pub(super) struct Document(DocumentMut);

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Document {
    pub(super) fn parse(text: &str) -> Result<Self, Unusable> {
        let document: DocumentMut =
            text.parse().map_err(|error: toml_edit::TomlError| Unusable(error.message().to_owned()))?;
        accepts_file(document.as_table())?;
        Ok(Self(document))
    }

    fn hosts(&self) -> impl Iterator<Item = (&str, &Table)> {
        let hosts = self.0.get("host").and_then(Item::as_table);
        hosts.into_iter().flat_map(Table::iter).filter_map(|(url, item)| Some((url, item.as_table()?)))
    }

    /// Whether the table at `url` is one that only darter writes.
    pub(super) fn has_our_table(&self, url: &str) -> bool {
        let ours = |table: &&dyn TableLike| {
            table.len() == 2 && table.contains_key("capabilities") && table.contains_key("dial_timeout")
        };
        self.0
            .get("host")
            .and_then(Item::as_table_like)
            .is_some_and(|hosts| hosts.get(url).and_then(Item::as_table_like).as_ref().is_some_and(ours))
    }

    /// Gives every host a `[host."…"]` header of its own, and says which had none: containerd 2.x
    /// lists headers only.
    pub(super) fn give_headers(&mut self) -> Vec<String> {
        let mut woken = Vec::new();
        let Some(item) = self.0.get_mut("host") else { return woken };
        let had_no_header = make_table(item);
        let Some(hosts) = item.as_table_mut() else { return woken };
        if had_no_header {
            hosts.set_implicit(true);
        }
        for (url, item) in hosts.iter_mut() {
            if make_table(item) {
                woken.push(url.get().to_owned());
            }
        }
        self.order();
        woken
    }

    /// Gives every table a position in the file: in the order that the user chose, the sub-tables of
    /// each host directly after it. A host whose sub-table stands elsewhere would be listed twice.
    fn order(&mut self) {
        let mut units: Vec<(isize, &mut Item)> = Vec::new();
        for (key, item) in self.0.as_table_mut().iter_mut() {
            if key.get() == "host"
                && let Item::Table(hosts) = item
            {
                let home = hosts.position().unwrap_or_default();
                // Before its hosts, and not in the order: nothing stands in it.
                hosts.set_position(Some(-1));
                let hosts = hosts.iter_mut().map(|(_, host)| (first_position(host).unwrap_or(home), host));
                units.extend(hosts);
            } else {
                units.push((first_position(item).unwrap_or_default(), item));
            }
        }
        units.sort_by_key(|(place, _)| *place);
        let mut next = 1;
        for (_, item) in units {
            number(item, &mut next);
        }
    }

    pub(super) fn holder(&self, url: &str) -> Option<Foreign> {
        self.hosts().find(|(host, _)| *host == url).map(|(host, table)| recognise(host, table))
    }

    pub(super) fn found(&self, ours: &str) -> Vec<Foreign> {
        let mut found = Vec::new();
        for (url, table) in self.hosts() {
            let by = recognise(url, table);
            // A plain table at our own address means the mirror already, whoever wrote it.
            if !(found.contains(&by) || url == ours && by == Foreign::Other) {
                found.push(by);
            }
        }
        found
    }

    pub(super) fn take_out_p2p(&mut self) {
        let p2p = self.hosts().filter(|(url, table)| recognise(url, table) != Foreign::Other);
        for url in p2p.map(|(url, _)| url.to_owned()).collect::<Vec<_>>() {
            self.take_out(&url);
        }
    }

    /// Removes the host `url`; a comment above it goes to what follows. Whether it was there.
    pub(super) fn take_out(&mut self, url: &str) -> bool {
        self.give_headers();
        let Some(hosts) = self.0.get_mut("host").and_then(Item::as_table_mut) else { return false };
        let Some(item) = hosts.remove(url) else { return false };
        let is_needed = !hosts.is_empty() || !hosts.is_implicit();
        if let Some(table) = item.as_table() {
            let comment = comment_above(table.decor());
            self.hand_down(last_position(table), &comment);
        }
        if !is_needed {
            self.0.remove("host");
        }
        true
    }

    /// Puts the comment of a removed table above the next table, or at the end.
    fn hand_down(&mut self, after: isize, comment: &str) {
        if comment.is_empty() {
            return;
        }
        let next = tables(self.0.as_table()).filter_map(|table| next_header(table, after)).min();
        let next = next.and_then(|position| at(self.0.as_table_mut(), position));
        match next {
            Some(table) => {
                let prefix = format!("{comment}{}", prefix(table.decor()));
                table.decor_mut().set_prefix(prefix);
            }
            None => {
                let trailing = format!("{comment}{}", self.0.trailing().as_str().unwrap_or_default());
                self.0.set_trailing(trailing);
            }
        }
    }

    pub(super) fn has_server(&self) -> bool {
        self.server().is_some_and(|server| !server.is_empty())
    }

    fn server(&self) -> Option<&str> {
        self.0.get("server").and_then(Item::as_str)
    }

    /// Takes out an empty `server` and one that is the mirror: it would leave containerd no way past us.
    pub(super) fn drop_server(&mut self, mirror_url: &str) {
        let is_mirror = |server: &str| {
            let bare = server.trim_end_matches('/').trim_end_matches("/v2");
            bare == mirror_url || Some(bare) == mirror_url.strip_prefix("https://")
        };
        if self.server().is_some_and(|server| server.is_empty() || is_mirror(server)) {
            self.0.remove("server");
        }
    }

    pub(super) fn foreign_origins(&self, wanted: &Wanted) -> (Vec<ForeignOrigin>, Vec<LeftOut>) {
        let own = [Some(format!("https://{}", wanted.registry)), own_server(&wanted.registry), wanted.server.clone()];
        let mut origins: Vec<ForeignOrigin> = Vec::new();
        let mut left_out = Vec::new();
        let hosts = self.hosts().filter(|(url, table)| {
            *url != wanted.mirror_url && recognise(url, table) == Foreign::Other && may(*table, "pull")
        });
        let hosts = hosts.map(|(url, table)| (url, table as &dyn TableLike));
        let server = self.server().map(|server| (server, self.0.as_table() as &dyn TableLike));
        for (url, table) in hosts.chain(server.filter(|(_, table)| may(*table, "pull"))) {
            let Some(origin) = origin_url(url, table).filter(|origin| !own.contains(&Some(origin.clone()))) else {
                continue;
            };
            if let Some(key) = demand(&origin, table) {
                left_out.push(LeftOut { host: url.to_owned(), key });
                continue;
            }
            let resolve = may(table, "resolve");
            match origins.iter_mut().find(|known| known.url == origin) {
                Some(known) => known.resolve |= resolve,
                None => origins.push(ForeignOrigin { url: origin, resolve }),
            }
        }
        (origins, left_out)
    }

    /// Puts our table first, in the form of the design. What stood at our address is replaced.
    pub(super) fn put_ours(&mut self, wanted: &Wanted) {
        self.take_out(&wanted.mirror_url);
        if !self.0.contains_key("host") {
            let mut hosts = Table::new();
            hosts.set_implicit(true);
            self.0.insert("host", Item::Table(hosts));
        }
        let Some(hosts) = self.0.get_mut("host").and_then(Item::as_table_mut) else { return };
        let words: &[&str] = if wanted.resolve { &["pull", "resolve"] } else { &["pull"] };
        let mut ours = Table::new();
        let timeout = format!("{}ms", wanted.dial_timeout.as_millis());
        for (key, value) in
            [("capabilities", Value::Array(words.iter().copied().collect::<Array>())), ("dial_timeout", timeout.into())]
        {
            ours.insert(key, Item::Value(value));
            if let Some(mut key) = ours.key_mut(key) {
                key.leaf_decor_mut().set_prefix("  ");
            }
        }
        ours.decor_mut().set_prefix("\n");
        // Before every other table but an explicit `[host]`, whose sub-table it is.
        ours.set_position(Some(0));
        hosts.insert(&wanted.mirror_url, Item::Table(ours));
    }
}

/// Turns an inline table or dotted keys into a table with a header; whether it was one of these.
fn make_table(item: &mut Item) -> bool {
    let made = match item.as_value_mut().and_then(Value::as_inline_table_mut) {
        Some(inline) => {
            let mut table = std::mem::take(inline).into_table();
            table.set_position(None);
            *item = Item::Table(table);
            true
        }
        None => false,
    };
    let Some(table) = item.as_table_mut() else { return made };
    if !table.is_dotted() {
        return made;
    }
    table.set_dotted(false);
    table.set_implicit(false);
    true
}

fn number(item: &mut Item, next: &mut isize) {
    let mut take = |table: &mut Table| {
        table.set_position(Some(*next));
        *next += 1;
        for (_, item) in table.iter_mut() {
            number(item, next);
        }
    };
    match item {
        Item::Table(table) => take(table),
        Item::ArrayOfTables(tables) => tables.iter_mut().for_each(take),
        _ => (),
    }
}

/// Where the first header of a table stands. A table that was inline or dotted has none.
fn first_position(item: &Item) -> Option<isize> {
    match item {
        Item::Table(table) => table.iter().filter_map(|(_, item)| first_position(item)).chain(table.position()).min(),
        Item::ArrayOfTables(tables) => tables.iter().filter_map(Table::position).min(),
        _ => None,
    }
}

fn last_position(table: &Table) -> isize {
    let nested = table.iter().filter_map(|(_, item)| item.as_table()).map(last_position);
    nested.chain(table.position()).max().unwrap_or_default()
}

/// The tables directly in a table, those of arrays too.
fn tables(table: &Table) -> impl Iterator<Item = &Table> {
    table.iter().flat_map(|(_, item)| {
        item.as_table().into_iter().chain(item.as_array_of_tables().into_iter().flat_map(ArrayOfTables::iter))
    })
}

/// Where the next header after a position stands.
fn next_header(table: &Table, after: isize) -> Option<isize> {
    let own = (!table.is_implicit()).then(|| table.position()).flatten().filter(|position| *position > after);
    own.into_iter().chain(tables(table).filter_map(|table| next_header(table, after))).min()
}

/// The table at a position.
fn at(table: &mut Table, position: isize) -> Option<&mut Table> {
    if table.position() == Some(position) {
        return Some(table);
    }
    table.iter_mut().find_map(|(_, item)| match item {
        Item::Table(table) => at(table, position),
        Item::ArrayOfTables(tables) => tables.iter_mut().find_map(|table| at(table, position)),
        _ => None,
    })
}

fn prefix(decor: &Decor) -> &str {
    decor.prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default()
}

/// The lines above a table header, if one of them is a comment.
fn comment_above(decor: &Decor) -> String {
    let above = prefix(decor);
    if above.contains('#') { above.to_owned() } else { String::new() }
}

/// An empty list of capabilities is all of them.
fn may(table: &dyn TableLike, capability: &str) -> bool {
    let Some(words) = table.get("capabilities").and_then(Item::as_array) else { return true };
    words.is_empty() || words.iter().any(|word| word.as_str().is_some_and(|word| word.eq_ignore_ascii_case(capability)))
}

/// The key by which a host demands what only containerd can give: certificates, or headers. Without
/// TLS, what is said of TLS demands nothing.
fn demand(url: &str, table: &dyn TableLike) -> Option<&'static str> {
    let says = |key: &str| {
        table.get(key).is_some_and(|item| match item {
            Item::Value(Value::Boolean(is)) => *is.value(),
            Item::Value(Value::String(text)) => !text.value().is_empty(),
            Item::Value(Value::Array(list)) => !list.is_empty(),
            _ => item.as_table_like().is_some_and(|all| !all.is_empty()),
        })
    };
    let of_tls = if url.starts_with("http://") { &[][..] } else { &["ca", "client", "skip_verify"] };
    of_tls.iter().chain(&["header"]).copied().find(|key| says(key))
}

/// A host as a URL that `/v2` follows, or that has a `/v2` segment. `None` for an API root that has
/// none: nothing we could ask.
fn origin_url(host: &str, table: &dyn TableLike) -> Option<String> {
    let url = if host.starts_with("http") { host.to_owned() } else { format!("https://{host}") };
    let url = url.trim_end_matches('/');
    let overrides = table.get("override_path").and_then(Item::as_bool).unwrap_or_default();
    let (scheme, rest) = url.split_once("://")?;
    let is_root = rest.contains("/v2/") || rest.ends_with("/v2");
    match scheme {
        "http" | "https" if rest.is_empty() || (overrides && !is_root) => None,
        "http" | "https" => Some(url.strip_suffix("/v2").unwrap_or(url).to_owned()),
        _ => None,
    }
}

/// What `parseHostsFile` refuses, and the whole file with it.
fn accepts_file(root: &Table) -> Result<(), Unusable> {
    text_or_absent(root, "server")?;
    accepts_host("the file itself", root)?;
    let Some(hosts) = root.get("host") else { return Ok(()) };
    let hosts = hosts.as_table_like().ok_or_else(|| Unusable("`host` is not a table".to_owned()))?;
    for (url, item) in hosts.iter() {
        let table = item.as_table_like().ok_or_else(|| Unusable(format!("the host `{url}` is not a table")))?;
        accepts_host(url, table)?;
    }
    Ok(())
}

fn accepts_host(url: &str, table: &dyn TableLike) -> Result<(), Unusable> {
    let wrong = |key: &str, what: &str| Unusable(format!("`{key}` of {url} is not {what}"));
    for key in ["skip_verify", "override_path"] {
        if table.get(key).is_some_and(|item| item.as_bool().is_none()) {
            return Err(wrong(key, "true or false"));
        }
    }
    if !table.get("ca").is_none_or(|item| item.is_str() || item.as_array().is_some_and(are_texts)) {
        return Err(wrong("ca", "a file or a list of files"));
    }
    if !table.get("client").is_none_or(|item| item.is_str() || item.as_array().is_some_and(are_pairs)) {
        return Err(wrong("client", "a file, a list of files or a list of pairs of files"));
    }
    if !table.get("dial_timeout").is_none_or(|item| item.as_str().is_some_and(is_go_duration)) {
        return Err(wrong("dial_timeout", "a duration"));
    }
    if !table.get("capabilities").is_none_or(|item| item.as_array().is_some_and(are_capabilities)) {
        return Err(wrong("capabilities", "a list of pull, resolve, push"));
    }
    let is_header = |item: &Item| item.is_str() || item.as_array().is_some_and(are_texts);
    let are_headers = |item: &Item| item.as_table_like().is_some_and(|all| all.iter().all(|(_, item)| is_header(item)));
    if !table.get("header").is_none_or(are_headers) {
        return Err(wrong("header", "a table of texts"));
    }
    Ok(())
}

fn text_or_absent(table: &Table, key: &str) -> Result<(), Unusable> {
    if table.get(key).is_none_or(Item::is_str) { Ok(()) } else { Err(Unusable(format!("`{key}` is not a text"))) }
}

fn are_texts(array: &Array) -> bool {
    array.iter().all(Value::is_str)
}

fn are_pairs(array: &Array) -> bool {
    array.iter().all(|value| value.is_str() || value.as_array().is_some_and(|pair| pair.len() == 2 && are_texts(pair)))
}

/// `referrers` is a word from 2.2 on; before, it is the user's file that is wrong, not ours.
fn are_capabilities(array: &Array) -> bool {
    let known = |word: &str| matches!(word.to_ascii_lowercase().as_str(), "pull" | "resolve" | "push" | "referrers");
    array.iter().all(|value| value.as_str().is_some_and(known))
}

/// Go's `time.ParseDuration`, as far as people write it.
fn is_go_duration(text: &str) -> bool {
    let mut rest = text.strip_prefix(['+', '-']).unwrap_or(text);
    if matches!(rest, "" | "0") {
        // The empty text is no timeout.
        return true;
    }
    while !rest.is_empty() {
        let number = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let unit = ["ns", "us", "µs", "μs", "ms", "s", "m", "h"].into_iter().find(|unit| number.starts_with(*unit));
        match unit {
            Some(unit) if number.len() < rest.len() => rest = &number[unit.len()..],
            _ => return false,
        }
    }
    true
}
