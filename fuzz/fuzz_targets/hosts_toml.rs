//! hosts.toml: whatever stood there, the merged file is one that containerd takes, asks us first,
//! stays as it is, and gives back what the user wrote.

#![no_main]

use std::collections::BTreeMap;
use std::time::Duration;

use darter_core::hosts_toml::{Wanted, is_ours, marked_url, merge, own_server, usable, verify, without};
use libfuzzer_sys::fuzz_target;
use toml_edit::{DocumentMut, Item};

const OURS: &str = "http://127.0.0.1:4001";

fuzz_target!(|text: &str| {
    for adopt in [false, true] {
        goes_in_and_out(text, adopt);
    }
});

fn goes_in_and_out(text: &str, adopt: bool) {
    let registry = "reg.example:5000".parse().expect("a registry");
    let wanted = Wanted {
        server: own_server(&registry),
        registry,
        mirror_url: OURS.into(),
        resolve: true,
        dial_timeout: Duration::from_millis(200),
        adopt,
    };
    let Ok(once) = merge(Some(text), &wanted) else { return };

    usable(&once.text).unwrap_or_else(|error| panic!("{error}\n{}", once.text));
    let document: DocumentMut = once.text.parse().expect("valid TOML");
    asks_us_first(&document);
    let server = document.get("server").and_then(Item::as_str);
    assert!(server.is_some_and(|server| !server.is_empty() && server.trim_end_matches('/') != OURS), "{}", once.text);

    let twice = merge(Some(&once.text), &wanted).expect("what was merged can be merged");
    assert_eq!(twice.text, once.text, "a second merge changes something");
    assert_eq!(twice.foreign_origins, once.foreign_origins);
    assert!(twice.woken.is_empty() && twice.unusable.is_none());
    assert!(verify(&once.text, &wanted) && is_ours(&once.text, &wanted));

    let back = without(&once.text, &wanted).unwrap_or_default();
    assert!(back.is_empty() || usable(&back).is_ok(), "{back}");
    assert_eq!(without(&back, &wanted).unwrap_or_default(), back, "taking out twice");
    // A comment of ours with a control character in it is no TOML, and the rest is, without it.
    if once.unusable.is_none() && usable(text).is_ok() && !adopt {
        let marked = marked_url(text);
        // A line inside a text of several lines that looks like our comment is taken for it.
        if marked.is_none() || !text.contains("\"\"\"") && !text.contains("'''") {
            assert_eq!(values(&back, marked), values(text, marked), "what the user wrote has changed");
        }
        // Where nothing but blanks is left there is no file.
        let again = merge(Some(&back), &wanted).expect("it went before").text;
        assert!(back.is_empty() || again == once.text, "out and in again: {again}");
    }
    if once.unusable.is_some() {
        assert_eq!(once.text, merge(None, &wanted).expect("no file is no hindrance").text, "not a fresh start");
    }
}

/// Our table is the first of the hosts, and a header of its own: containerd 2.x lists headers only.
fn asks_us_first(document: &DocumentMut) {
    let hosts = document["host"].as_table().expect("a table of hosts");
    let position = |item: &Item| item.as_table().and_then(|table| table.position()).unwrap_or(isize::MAX);
    let first = hosts.iter().min_by_key(|(_, item)| position(item)).expect("a host");
    assert_eq!(first.0, OURS, "{document}");
    assert!(position(first.1) < isize::MAX, "{document}");
    let ours = first.1.as_table().expect("a table");
    assert!(ours.len() == 2 && ours.contains_key("capabilities") && ours.contains_key("dial_timeout"), "{document}");
}

/// Everything but `server` and our own table, also at the address where the mirror was before, as
/// containerd would decode it.
fn values(text: &str, marked: Option<&str>) -> BTreeMap<Vec<String>, String> {
    let Ok(document) = text.parse::<DocumentMut>() else { return BTreeMap::new() };
    let mut all = BTreeMap::new();
    flatten(&mut Vec::new(), document.as_item(), &mut all);
    let is_our_host = |url: &String| url == OURS || Some(url.as_str()) == marked;
    all.retain(|path, _| path[0] != "server" && !(path[0] == "host" && path.get(1).is_some_and(is_our_host)));
    all
}

fn flatten(path: &mut Vec<String>, item: &Item, all: &mut BTreeMap<Vec<String>, String>) {
    if let Some(tables) = item.as_array_of_tables() {
        for (n, table) in tables.iter().enumerate() {
            path.push(n.to_string());
            flatten(path, &Item::Table(table.clone()), all);
            path.pop();
        }
    } else if let Some(table) = item.as_table_like() {
        for (key, item) in table.iter() {
            path.push(key.to_owned());
            flatten(path, item, all);
            path.pop();
        }
    } else if let Some(value) = item.as_value() {
        all.insert(path.clone(), value.clone().decorated("", "").to_string());
    }
}
