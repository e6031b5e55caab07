//! Nodes and claims as they come and go.

use serde_json::{Value, json};

use super::*;

const NOW: &str = "2026-01-01T00:10:00Z";

struct Cluster {
    nodes: Nodes,
    settings: Settings,
}

impl Cluster {
    fn new() -> Self {
        Self { nodes: Nodes::default(), settings: Settings::default() }
    }

    fn node(&mut self, event: Event<Value>) -> Vec<Fact> {
        let event = map(event, |value| serde_json::from_value(value).unwrap());
        self.nodes.node(&self.settings, event, NOW.parse().unwrap())
    }

    fn claim(&mut self, event: Event<Value>) -> Vec<Fact> {
        let event = map(event, |value| serde_json::from_value(value).unwrap());
        self.nodes.claim(&self.settings, event, NOW.parse().unwrap())
    }
}

fn claim(name: &str, node: Option<&str>) -> Value {
    json!({
        "metadata": { "name": name, "uid": format!("uid-{name}"), "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": { "karpenter.sh/nodepool": "gpu", "topology.kubernetes.io/zone": "a" } },
        "spec": { "resources": { "requests": { "nvidia.com/gpu": "1", "cpu": "4" } } },
        "status": { "nodeName": node.unwrap_or_default(), "capacity": { "nvidia.com/gpu": "8" } },
    })
}

fn node(name: &str, taints: &[&str]) -> Value {
    let taints: Vec<_> = taints.iter().map(|key| json!({ "key": key, "effect": "NoSchedule" })).collect();
    json!({
        "metadata": { "name": name, "uid": format!("uid-{name}"), "creationTimestamp": "2026-01-01T00:01:00Z",
            "labels": { "karpenter.sh/nodepool": "gpu" } },
        "spec": { "taints": taints }, "status": { "capacity": { "cpu": "8" } },
    })
}

fn coming(name: &str) -> NodeFact {
    NodeFact {
        uid: format!("uid-{name}"),
        name: name.to_owned(),
        pool: Some("gpu".to_owned()),
        zone: Some("a".to_owned()),
        created_ms_ago: 600_000,
        claim: Some(Claim { name: name.to_owned(), uid: format!("uid-{name}") }),
        gpus: 8,
        ..NodeFact::default()
    }
}

fn joined(node: &str, claim: &str) -> NodeFact {
    NodeFact { uid: format!("uid-{node}"), name: node.to_owned(), registered: true, ..coming(claim) }
}

#[test]
fn a_claim_is_a_node_that_is_coming_until_its_node_comes_and_the_node_is_as_old_as_the_claim() {
    let mut cluster = Cluster::new();
    assert_eq!(cluster.claim(Event::Apply(claim("c", None))), [Fact::Node(coming("c"))]);
    // Named, and not there yet.
    assert_eq!(cluster.claim(Event::Apply(claim("c", Some("n")))), []);
    let tainted = NodeFact { tainted: true, ..joined("n", "c") };
    let gone = Fact::NodeGone { uid: "uid-c".to_owned() };
    let came = cluster.node(Event::Apply(node("n", &["darter.dev/not-ready"])));
    assert_eq!(came, [gone, Fact::Node(tainted)]);
    assert_eq!(cluster.node(Event::Apply(node("n", &[]))), [Fact::Node(joined("n", "c"))]);
    // A heartbeat is no news.
    assert_eq!(cluster.node(Event::Apply(node("n", &[]))), []);
}

#[test]
fn in_which_order_node_and_claim_are_heard_makes_no_difference() {
    let mut cluster = Cluster::new();
    cluster.node(Event::Apply(node("n", &[])));
    assert_eq!(cluster.claim(Event::Apply(claim("c", Some("n")))), [Fact::Node(joined("n", "c"))]);
}

#[test]
fn a_node_is_leaving_when_it_or_its_claim_is_deleted_or_karpenter_has_tainted_it() {
    let leaving = |facts: Vec<Fact>| match facts.as_slice() {
        [Fact::Node(node)] => node.deleting,
        other => panic!("{other:?}"),
    };
    let mut cluster = Cluster::new();
    assert!(leaving(cluster.node(Event::Apply(node("a", &["karpenter.sh/disrupted"])))));
    let mut deleted = node("b", &[]);
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:02:00Z");
    assert!(leaving(cluster.node(Event::Apply(deleted))));
    assert!(!leaving(cluster.node(Event::Apply(node("n", &[])))));
    let mut deleted = claim("c", Some("n"));
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:02:00Z");
    assert!(leaving(cluster.claim(Event::Apply(deleted))));
}

#[test]
fn what_a_new_list_does_not_name_is_gone_and_what_it_names_is_not_said_again() {
    let mut cluster = Cluster::new();
    for name in ["a", "b"] {
        cluster.node(Event::Apply(node(name, &[])));
    }
    cluster.claim(Event::Apply(claim("c", None)));
    cluster.node(Event::Init);
    assert_eq!(cluster.node(Event::InitApply(node("b", &[]))), []);
    let only = ["uid-b", "uid-c"].map(ToOwned::to_owned).into_iter().collect();
    let gone = Fact::NodeGone { uid: "uid-a".to_owned() };
    assert_eq!(cluster.node(Event::InitDone), [gone, Fact::Only { kind: Kind::Node, uids: only }]);
}

#[test]
fn a_node_of_the_same_name_is_another_one() {
    let mut cluster = Cluster::new();
    cluster.node(Event::Apply(node("n", &[])));
    let mut second = node("n", &[]);
    second["metadata"]["uid"] = json!("second");
    cluster.node(Event::Apply(second));
    // The delete of the first comes late, and takes nothing from the second.
    assert_eq!(cluster.node(Event::Delete(node("n", &[]))), [Fact::NodeGone { uid: "uid-n".to_owned() }]);
    let found = cluster.claim(Event::Apply(claim("c", Some("n"))));
    assert_eq!(found, [Fact::Node(NodeFact { uid: "second".to_owned(), ..joined("n", "c") })]);
}

#[test]
fn a_node_whose_claim_is_gone_stays_and_a_claim_whose_node_is_gone_is_told_again() {
    let mut cluster = Cluster::new();
    cluster.node(Event::Apply(node("n", &[])));
    cluster.claim(Event::Apply(claim("c", Some("n"))));
    let alone = NodeFact { claim: None, zone: None, gpus: 0, created_ms_ago: 540_000, ..joined("n", "c") };
    assert_eq!(cluster.claim(Event::Delete(claim("c", Some("n")))), [Fact::Node(alone)]);
    cluster.claim(Event::Apply(claim("c", Some("n"))));
    let gone = Fact::NodeGone { uid: "uid-n".to_owned() };
    assert_eq!(cluster.node(Event::Delete(node("n", &[]))), [gone, Fact::Node(coming("c"))]);
}
