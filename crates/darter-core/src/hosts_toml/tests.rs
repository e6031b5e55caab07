//! What a user finds in the file, and that nothing of theirs is lost.

use std::collections::BTreeMap;

use proptest::prelude::*;
use toml_edit::{DocumentMut, Item};

use super::*;

fn wanted() -> Wanted {
    let registry: Registry = "123456789012.dkr.ecr.eu-west-1.amazonaws.com".parse().unwrap();
    Wanted {
        server: own_server(&registry),
        registry,
        mirror_url: "http://127.0.0.1:4001".into(),
        resolve: true,
        dial_timeout: Duration::from_millis(200),
        adopt: false,
    }
}

fn merged(text: &str) -> Merged {
    merge(Some(text), &wanted()).unwrap()
}

#[test]
fn a_registry_without_a_file_gets_the_one_of_the_design() {
    insta::assert_snapshot!(merge(None, &wanted()).unwrap().text, @r#"
    # darter owns only the [host."http://127.0.0.1:4001"] table; other edits stay
    server = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"

    [host."http://127.0.0.1:4001"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"
    "#);
    let only_pull = Wanted { resolve: false, ..wanted() };
    assert!(merge(None, &only_pull).unwrap().text.contains("capabilities = [\"pull\"]\n"));
    assert_eq!(without(&merge(None, &wanted()).unwrap().text, &wanted()), None);
}

#[test]
fn docker_hub_is_asked_where_it_is_and_localhost_is_left_to_containerd() {
    let server = |name: &str| own_server(&name.parse().unwrap());
    assert_eq!(server("docker.io").as_deref(), Some("https://registry-1.docker.io"));
    assert_eq!(server("reg.example:5000").as_deref(), Some("https://reg.example:5000"));
    for local in ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000"] {
        assert_eq!(server(local), None, "{local}");
    }
    let local = Wanted { server: None, ..wanted() };
    insta::assert_snapshot!(merge(None, &local).unwrap().text, @r#"
    # darter owns only the [host."http://127.0.0.1:4001"] table; other edits stay

    [host."http://127.0.0.1:4001"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"
    "#);
}

const HARBOR: &str = r#"# our Harbor; ask Mia before changing it
server = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
ca = "ecr.crt"

# first the one in this building
[host."https://harbor.example"]
  capabilities = ["pull", "resolve"] # no push
  ca = ["/etc/pki/harbor.crt"]

  [host."https://harbor.example".header]
    X-Team = "ml"

[host."pushed.example"]
  capabilities = ["push"]

[host."https://cache.example/v2/ecr"]
  override_path = true
  future_key = { a = 1 }
# the end
"#;

#[test]
fn what_a_user_wrote_stays_after_our_table() {
    let merged = merged(HARBOR);
    insta::assert_snapshot!(merged.text, @r##"
    # darter owns only the [host."http://127.0.0.1:4001"] table; other edits stay

    # our Harbor; ask Mia before changing it
    server = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
    ca = "ecr.crt"

    [host."http://127.0.0.1:4001"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"

    # first the one in this building
    [host."https://harbor.example"]
      capabilities = ["pull", "resolve"] # no push
      ca = ["/etc/pki/harbor.crt"]

      [host."https://harbor.example".header]
        X-Team = "ml"

    [host."pushed.example"]
      capabilities = ["push"]

    [host."https://cache.example/v2/ecr"]
      override_path = true
      future_key = { a = 1 }
    # the end
    "##);
    assert_eq!(merged.foreign_origins, [origin("https://cache.example/v2/ecr", true)]);
    assert_eq!(merged.left_out, [LeftOut { host: "https://harbor.example".into(), key: "ca" }]);
    assert_eq!(merged.found, [Foreign::Other]);
    assert_eq!(without(&merged.text, &wanted()).as_deref(), Some(HARBOR));
}

#[test]
fn hosts_that_containerd_2_skips_silently_get_headers() {
    let text = r#"
server = "https://elsewhere.example"
host."https://a.example".capabilities = ["pull"]
# why b
host."https://b.example" = { capabilities = ["pull"], header = { X = "1" } }
"#;
    let merged = merged(text);
    insta::assert_snapshot!(merged.text, @r#"
    # darter owns only the [host."http://127.0.0.1:4001"] table; other edits stay


    server = "https://elsewhere.example"

    [host."http://127.0.0.1:4001"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"

    [host."https://a.example"]
    capabilities = ["pull"]
    # why b

    [host."https://b.example"]
    capabilities = ["pull"]
    header = { X = "1" }
    "#);
    assert_eq!(merged.woken, ["https://a.example", "https://b.example"]);
    assert_eq!(merged.foreign_origins, [origin("https://a.example", false), origin("https://elsewhere.example", true)]);
    assert_eq!(merged.left_out, [LeftOut { host: "https://b.example".into(), key: "header" }]);
}

fn origin(url: &str, resolve: bool) -> ForeignOrigin {
    ForeignOrigin { url: url.to_owned(), resolve }
}

#[test]
fn only_who_may_resolve_is_asked_what_a_tag_means() {
    for (says, origins) in [
        ("", vec![origin("https://a.example", true)]),
        ("capabilities = []", vec![origin("https://a.example", true)]),
        ("capabilities = [\"Pull\", \"Resolve\"]", vec![origin("https://a.example", true)]),
        ("capabilities = [\"pull\"]", vec![origin("https://a.example", false)]),
        ("capabilities = [\"pull\", \"push\"]", vec![origin("https://a.example", false)]),
        ("capabilities = [\"resolve\"]", vec![]),
    ] {
        let host = merged(&format!("[host.\"https://a.example\"]\n{says}\n"));
        assert_eq!(host.foreign_origins, origins, "{says}");
        let server = merged(&format!("server = \"https://a.example\"\n{says}\n"));
        assert_eq!(server.foreign_origins, origins, "{says}");
    }
    // containerd would ask it as the server.
    let both = merged("server = \"https://a.example\"\n[host.\"https://a.example\"]\ncapabilities = [\"pull\"]\n");
    assert_eq!(both.foreign_origins, [origin("https://a.example", true)]);
}

#[test]
fn a_host_that_demands_what_only_containerd_can_give_is_no_origin() {
    for (says, key) in [
        ("ca = \"a.crt\"", "ca"),
        ("client = [[\"a.cert\", \"a.key\"]]", "client"),
        ("skip_verify = true", "skip_verify"),
        ("header = { X = \"1\" }", "header"),
        ("header.X = \"1\"", "header"),
    ] {
        let host = merged(&format!("[host.\"https://a.example\"]\n{says}\n"));
        let left_out = [LeftOut { host: "https://a.example".into(), key }];
        assert_eq!((host.foreign_origins.as_slice(), host.left_out.as_slice()), (&[][..], &left_out[..]), "{says}");
        assert!(host.text.contains("https://a.example"), "containerd goes on asking it");
        let server = merged(&format!("server = \"https://a.example\"\n{says}\n"));
        assert_eq!((server.foreign_origins.as_slice(), server.left_out.as_slice()), (&[][..], &left_out[..]), "{says}");
    }
    for (url, says) in [
        ("https://a.example", "skip_verify = false\nca = []\nheader = {}"),
        // There is nothing to verify.
        ("http://a.example", "skip_verify = true"),
    ] {
        let merged = merged(&format!("[host.\"{url}\"]\n{says}\n"));
        assert_eq!((merged.foreign_origins, merged.left_out), (vec![origin(url, true)], vec![]), "{says}");
    }
}

#[test]
fn a_sub_table_far_from_its_host_is_brought_home() {
    let text = "[host.\"https://a\"]\n[host.\"https://b\"]\n[host.\"https://a\".header]\nX = \"1\"\n";
    let order: Vec<String> = headers(&merged(text).text);
    assert_eq!(
        order,
        [
            "[host.\"http://127.0.0.1:4001\"]",
            "[host.\"https://a\"]",
            "[host.\"https://a\".header]",
            "[host.\"https://b\"]"
        ]
    );
}

#[test]
fn a_file_that_containerd_ignores_is_started_afresh_and_says_why() {
    let fresh = merge(None, &wanted()).unwrap().text;
    for (text, reason) in [
        ("server = ", "string values must be quoted"),
        ("host = 3", "`host` is not a table"),
        ("[[host.\"https://a\"]]", "the host `https://a` is not a table"),
        ("[host.\"https://a\"]\ncapabilities = [\"fetch\"]", "`capabilities` of https://a"),
        ("[host.\"https://a\"]\ndial_timeout = \"soon\"", "`dial_timeout` of https://a"),
        ("[host.\"https://a\".header]\nX = 1", "`header` of https://a"),
        ("client = [[\"a\"]]", "`client` of the file itself"),
        ("server = 3", "`server` is not a text"),
    ] {
        let merged = merged(text);
        assert_eq!(merged.text, fresh, "{text}");
        let said = merged.unusable.expect(text).to_string();
        assert!(said.contains(reason) || reason.starts_with("string"), "{text}: {said}");
    }
}

#[test]
fn the_mirror_is_never_the_server() {
    for server in ["http://127.0.0.1:4001", "http://127.0.0.1:4001/v2/", ""] {
        let merged = merged(&format!("server = \"{server}\"\n"));
        assert_eq!(merged.text, merge(None, &wanted()).unwrap().text, "{server}");
    }
}

const DRAGONFLY: &str = r#"server = "https://registry-1.docker.io"

[host."http://127.0.0.1:4001"]
capabilities = ["pull", "resolve"]

[host."http://127.0.0.1:4001".header]
X-Dragonfly-Registry = ["https://registry-1.docker.io"]
"#;

const SPEGEL: &str = r#"server = 'https://123456789012.dkr.ecr.eu-west-1.amazonaws.com'

[host.'http://10.0.3.7:30020']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'

[host.'http://10.0.3.7:30021']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'
"#;

#[test]
fn dragonfly_at_our_address_is_named_and_taken_out_only_when_told() {
    let refused = merge(Some(DRAGONFLY), &wanted()).unwrap_err();
    assert_eq!(refused, HostsTomlError::AddressTaken { url: "http://127.0.0.1:4001".into(), by: Foreign::Dragonfly });
    let adopted = merge(Some(DRAGONFLY), &Wanted { adopt: true, ..wanted() }).unwrap();
    assert_eq!(adopted.found, [Foreign::Dragonfly]);
    insta::assert_snapshot!(adopted.text, @r#"
    # darter owns only the [host."http://127.0.0.1:4001"] table; other edits stay

    server = "https://registry-1.docker.io"

    [host."http://127.0.0.1:4001"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"
    "#);
}

#[test]
fn spegel_stays_behind_us_until_it_is_adopted_and_is_no_origin() {
    let beside = merged(SPEGEL);
    assert_eq!((beside.found, beside.foreign_origins), (vec![Foreign::Spegel], vec![]));
    assert_eq!(headers(&beside.text).len(), 3);
    let adopted = merge(Some(SPEGEL), &Wanted { adopt: true, ..wanted() }).unwrap();
    assert_eq!(adopted.found, [Foreign::Spegel]);
    assert_eq!(headers(&adopted.text), ["[host.\"http://127.0.0.1:4001\"]"]);
}

#[test]
fn peers_are_recognised_by_what_they_write_and_a_plain_registry_is_not_one() {
    for (text, by) in [
        ("[host.\"http://127.0.0.1:65001\"]", Foreign::Dragonfly),
        ("[host.\"http://dfdaemon.dragonfly-system:80\"]", Foreign::Dragonfly),
        ("[host.\"https://x\".header]\nx-dragonfly-registry = \"https://y\"", Foreign::Dragonfly),
        ("[host.\"http://[fd00::7]:30020\"]", Foreign::Spegel),
        ("[host.\"http://10.0.0.9:5000\".header]\nAuthorization = \"Basic eDp5\"", Foreign::Spegel),
        ("[host.\"http://10.0.0.9:5000\"]\ndial_timeout = \"200ms\"", Foreign::Spegel),
        ("[host.\"http://10.0.0.9:5000\"]", Foreign::Other),
        ("[host.\"https://reg.example:30020\"]", Foreign::Other),
        ("[host.\"https://mirror.example:5000\"]\ndial_timeout = \"200ms\"", Foreign::Other),
    ] {
        assert_eq!(merged(text).found, [by], "{text}");
    }
}

#[test]
fn drift_is_whatever_a_merge_would_change() {
    let right = merged(HARBOR).text;
    assert!(verify(&right, &wanted()));
    for (from, to) in [
        ("[\"pull\", \"resolve\"]\n", "[\"pull\"]\n"),
        ("dial_timeout = \"200ms\"", "dial_timeout = \"200ms\"\n  skip_verify = true"),
        ("[host.\"http://127.0.0.1:4001\"]\n  cap", "[host.\"http://127.0.0.1:9\"]\n  cap"),
        ("# darter owns", "# nobody owns"),
    ] {
        let wrong = right.replacen(from, to, 1);
        assert_ne!(wrong, right);
        assert!(!verify(&wrong, &wanted()), "{to}");
    }
    let edited = right.replace("X-Team = \"ml\"", "X-Team = \"vision\"");
    assert!(verify(&edited, &wanted()), "a user's edit is not drift");
}

#[test]
fn a_host_put_before_ours_and_a_comment_above_ours_survive_the_repair() {
    let right = merged(HARBOR).text;
    let edited = right.replace(
        "[host.\"http://127.0.0.1:4001\"]\n",
        "[host.\"https://new.example\"]\n\n# mine\n[host.\"http://127.0.0.1:4001\"]\n",
    );
    let repaired = merged(&edited).text;
    assert_eq!(headers(&repaired)[..2], ["[host.\"http://127.0.0.1:4001\"]", "[host.\"https://new.example\"]"]);
    assert!(repaired.contains("# mine\n"), "{repaired}");
    assert!(verify(&repaired, &wanted()));
}

#[test]
fn a_mirror_that_moved_leaves_no_old_address_behind() {
    let old = Wanted { mirror_url: "http://127.0.0.1:5555".into(), ..wanted() };
    let moved = merged(&merge(Some(HARBOR), &old).unwrap().text);
    assert_eq!(moved.text, merged(HARBOR).text);
}

#[test]
fn our_file_is_known_without_its_comment_and_anothers_is_not() {
    let text = merged(HARBOR).text;
    assert!(is_ours(&text, &wanted()));
    assert!(is_ours(text.split_once('\n').unwrap().1, &wanted()));
    assert!(!is_ours(HARBOR, &wanted()));
    assert!(!is_ours(DRAGONFLY, &wanted()));
}

#[test]
fn certificates_beside_the_file_go_on_to_be_used_for_the_registry() {
    let names = ["b.crt", "a.crt", "c.cert", "c.key", "d.cert", "hosts.toml", "notes"].map(str::to_owned);
    let certificates = Certificates::among(&names);
    let beside = inherit(None, &certificates, None).unwrap();
    insta::assert_snapshot!(merged(&beside).text, @r#"
    # darter owns only the [host."http://127.0.0.1:4001"] table; other edits stay
    server = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
    ca = ["a.crt", "b.crt"]
    client = [["c.cert", "c.key"], ["d.cert", "d.cert"]]

    [host."http://127.0.0.1:4001"]
      capabilities = ["pull", "resolve"]
      dial_timeout = "200ms"
    "#);
    assert_eq!(without(&merged(&beside).text, &wanted()), Some(beside));
    assert_eq!(inherit(None, &Certificates::default(), None), None);
}

#[test]
fn a_file_that_a_new_directory_hides_is_folded_in_with_its_paths() {
    let text = "ca = \"own.crt\"\n[host.\"https://harbor.example\"]\nca = [\"h.crt\", \"/etc/h.crt\"]\n";
    insta::assert_snapshot!(inherit(Some(text), &Certificates::default(), Some("/etc/docker/certs.d/r/")).unwrap(), @r#"
    ca = "/etc/docker/certs.d/r/own.crt"
    [host."https://harbor.example"]
    ca = ["/etc/docker/certs.d/r/h.crt", "/etc/h.crt"]
    "#);
    let certificates = Certificates::among(&["x.crt".to_owned()]);
    for not_in_force in ["", "host = 1"] {
        let inherited = inherit(Some(not_in_force), &certificates, Some("/d"));
        assert_eq!(inherited.as_deref(), Some("ca = [\"/d/x.crt\"]\n"));
    }
}

fn headers(text: &str) -> Vec<String> {
    text.lines().map(str::trim).filter(|line| line.starts_with('[')).map(str::to_owned).collect()
}

/// Everything but our own table and `server`, as containerd would decode it.
fn values(text: &str) -> BTreeMap<String, String> {
    let Ok(document) = text.parse::<DocumentMut>() else { return BTreeMap::new() };
    let mut all = BTreeMap::new();
    flatten("", document.as_item(), &mut all);
    all.retain(|key, _| !key.starts_with("/server") && !key.starts_with("/host/http://127.0.0.1:4001"));
    all
}

fn flatten(path: &str, item: &Item, all: &mut BTreeMap<String, String>) {
    if let Some(table) = item.as_table_like() {
        for (key, item) in table.iter() {
            flatten(&format!("{path}/{key}"), item, all);
        }
    } else {
        let text = item.as_value().map(|value| value.clone().decorated("", "").to_string());
        all.insert(path.to_owned(), text.unwrap_or_else(|| item.to_string()));
    }
}

fn comments(text: &str) -> Vec<String> {
    let mut all: Vec<String> =
        text.lines().filter_map(|line| Some(line.split_once("#c")?.1.trim().to_owned())).collect();
    all.sort();
    all
}

/// One `[host]`-like part of a file, in any of the forms TOML allows.
fn host() -> impl Strategy<Value = String> {
    let url = prop_oneof![
        "https://[a-c]\\.example",
        Just("http://127.0.0.1:4001".to_owned()),
        Just("http://10.0.0.1:30020".to_owned()),
    ];
    (url, 0..6u8, 0..100u8).prop_map(|(url, form, n)| match form {
        0 => format!("#c above{n}\n[host.\"{url}\"]\n  capabilities = [\"pull\"] #c beside{n}\n#c below{n}\n"),
        1 => format!("[host.\"{url}\".header]\n  X-N = [\"{n}\"]\n"),
        2 => format!("\n[host.\"{url}\"]\ncapabilities = [\"pull\"]\ndial_timeout = \"1s\"\n"),
        3 => format!("[other.t{n}]\nkey = {n}\n"),
        4 => format!("[host.\"{url}\"]\noverride_path = true\n[host.\"{url}\".header]\n"),
        _ => format!("[host.\"{url}\"]\nca = \"{n}.crt\"\nunknown = {{ n = {n} }}\n"),
    })
}

fn file() -> impl Strategy<Value = String> {
    let top = prop_oneof![
        Just(String::new()),
        Just("server = \"https://s.example\"\n".to_owned()),
        Just("#c top\nca = \"x.crt\"\n\n".to_owned()),
        Just("host.\"https://d.example\".capabilities = [\"pull\"]\n".to_owned()),
        Just("host.\"https://i.example\" = { capabilities = [\"pull\"] }\n".to_owned()),
    ];
    (top, proptest::collection::vec(host(), 0..5)).prop_map(|(top, hosts)| format!("{top}{}", hosts.concat()))
}

proptest! {
    #[test]
    fn a_merge_is_valid_first_idempotent_and_reversible(text in file(), adopt: bool) {
        let wanted = Wanted { adopt, ..wanted() };
        if let Ok(once) = merge(Some(&text), &wanted) {
            let document: DocumentMut = once.text.parse().expect("valid TOML");
            prop_assert!(document["server"].as_str().is_some_and(|server| server != wanted.mirror_url));
            let first = headers(&once.text).into_iter().find(|header| header != "[host]");
            prop_assert_eq!(first.as_deref(), Some("[host.\"http://127.0.0.1:4001\"]"));
            let twice = merge(Some(&once.text), &wanted).unwrap();
            prop_assert_eq!(&twice.text, &once.text);
            prop_assert!(verify(&once.text, &wanted));
            let back = without(&once.text, &wanted).unwrap_or_default();
            prop_assert_eq!(without(&back, &wanted).unwrap_or_default(), back.clone(), "taking out twice");
            if once.unusable.is_none() && !adopt {
                prop_assert_eq!(values(&back), values(&text));
                prop_assert_eq!(&merge(Some(&back), &wanted).unwrap().text, &once.text);
                if !text.contains("127.0.0.1") {
                    prop_assert_eq!(comments(&back), comments(&text));
                }
            }
        }
    }

    #[test]
    fn no_text_panics(text: String, garbage in "[\\[\\]\\.\"=#\\{\\}a-z\n]{0,40}", adopt: bool) {
        let wanted = Wanted { adopt, ..wanted() };
        for text in [text, garbage.clone(), format!("[host.\"{garbage}\"]\n"), format!("host = {garbage}\n")] {
            if let Ok(merged) = merge(Some(&text), &wanted) {
                prop_assert!(merged.text.parse::<DocumentMut>().is_ok());
                prop_assert!(verify(&merged.text, &wanted));
            }
            let _ = without(&text, &wanted);
        }
    }
}
