//! Nodes by Karpenter: they come for pods that wait, and go when they are empty.

use anyhow::{Context as _, Result, ensure};
use darter_tests::api::{Objects, is_true};
use darter_tests::kube_cluster::{KubeCluster, NAMESPACE};
use darter_tests::kubelets::written;
use darter_tests::tools::{Need, can_run};
use http::Method;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

pub(crate) const CLAIMS: &str = "/apis/karpenter.sh/v1/nodeclaims";
pub(crate) const NODES: &str = "/api/v1/nodes";
pub(crate) const LEASE: &str = "karpenter.sh/do-not-disrupt";
pub(crate) const NEEDS: [Need; 5] = [Need::Root, Need::Kubernetes, Need::Controllers, Need::Scheduler, Need::Karpenter];

#[tokio::test]
#[ignore = "make test-kube"]
async fn a_pod_that_waits_for_a_gpu_gets_a_node_and_the_node_goes_with_it() -> Result<()> {
    if !can_run("a_pod_that_waits_for_a_gpu_gets_a_node_and_the_node_goes_with_it", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_karpenter().await?;
    cluster.deploy("model", 1).await?;
    let pods = cluster.running("model", 1).await?;
    let node = pods[0]["spec"]["nodeName"].as_str().context("no node")?;
    let nodes = cluster.api().list(NODES).await?;
    let labels = &nodes[node]["metadata"]["labels"];
    assert_eq!(labels["karpenter.sh/nodepool"], "gpu");
    assert_eq!(labels["node.kubernetes.io/instance-type"], "g4dn.xlarge");
    assert_eq!(nodes[node]["status"]["allocatable"]["nvidia.com/gpu"], "1");
    let initialized =
        |claims: &Objects| claims.values().all(|claim| is_true(claim, "Initialized")).then_some(claims.len());
    let claims = cluster.api().until(CLAIMS, "the node is initialized", initialized).await;
    assert_eq!(claims.with_context(|| cluster.log())?, 1);
    cluster.scale("model", 0).await?;
    for path in [CLAIMS, NODES] {
        let gone = cluster.api().until(path, "the empty node goes", |all| all.is_empty().then_some(())).await;
        gone.with_context(|| cluster.log())?;
    }
    Ok(())
}

pub(crate) fn text(value: &Value) -> Result<String> {
    Ok(value.as_str().with_context(|| format!("no text: {value}"))?.to_owned())
}

/// The pod of a DaemonSet on a node.
pub(crate) async fn agent_on(cluster: &KubeCluster, node: &str) -> Result<Value> {
    let found = |pod: &&Value| pod["spec"]["nodeName"] == node && pod["status"]["phase"] == "Running";
    let found = |pods: &Objects| pods.values().find(found).cloned();
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=app=agent");
    cluster.api().until(&path, &format!("an agent runs on {node}"), found).await.with_context(|| cluster.log())
}

/// An agent as the chart has it on each node: of a DaemonSet, and whatever the node's taints.
pub(crate) async fn agents(cluster: &KubeCluster) -> Result<()> {
    let labels = json!({ "app": "agent" });
    let pod = json!({ "tolerations": [{ "operator": "Exists" }], "terminationGracePeriodSeconds": 1,
        "containers": [{ "name": "agent", "image": "registry.example.com/darter:v1" }] });
    let set = json!({ "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": { "namespace": NAMESPACE, "name": "agent" }, "spec": { "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": pod } } });
    cluster.api().apply(&set).await.map(|_| ())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn a_lease_of_two_parts_on_an_agents_pod_keeps_its_empty_node_until_their_sum_is_over() -> Result<()> {
    if !can_run("a_lease_of_two_parts_on_an_agents_pod_keeps_its_empty_node_until_their_sum_is_over", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_karpenter().await?;
    let api = cluster.api();
    agents(&cluster).await?;
    cluster.deploy("model", 2).await?;
    let pods = cluster.running("model", 2).await?;
    let [kept, other] = [text(&pods[0]["spec"]["nodeName"])?, text(&pods[1]["spec"]["nodeName"])?];
    assert_ne!(kept, other);
    // The agent runs for an hour, and its lease is of the last moments: 12.5 min from there, as the agent writes it.
    let agent = text(&agent_on(&cluster, &kept).await?["metadata"]["name"])?;
    agent_on(&cluster, &other).await?;
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{agent}");
    let (hour, sum) = (SignedDuration::from_secs(3600), SignedDuration::from_secs(3600 + 750));
    let start_at = async |start: Timestamp| {
        api.patch(&format!("{path}/status"), &json!({ "status": { "startTime": written(start) } })).await
    };
    let start = Timestamp::now() - hour;
    start_at(start).await?;
    api.patch(&path, &json!({ "metadata": { "annotations": { LEASE: "3600s750s" } } })).await?;
    // It says itself how it reads that.
    cluster.scale("model", 0).await?;
    let events = format!("/api/v1/namespaces/{NAMESPACE}/events");
    let told = |event: &&Value| event["reason"] == "DoNotDisruptUntil" && event["involvedObject"]["name"] == agent;
    let told = |events: &Objects| events.values().find(told).map(|event| event["message"].clone());
    let message = api.until(&events, "Karpenter honours the lease", told).await.with_context(|| cluster.log())?;
    let until = text(&message)?.rsplit_once(" at ").context("no time")?.1.parse::<Timestamp>()?;
    assert_eq!(written(until), written(start + sum));
    // Nodes do go meanwhile: the other one, which nobody protects.
    let gone = api.until(NODES, "the other node goes", |nodes| (!nodes.contains_key(&other)).then_some(())).await;
    gone.with_context(|| cluster.log())?;
    let is_of = |claim: &&Value| claim["status"]["nodeName"] == kept.as_str();
    let claims = api.list(CLAIMS).await?;
    let claim = claims.values().find(is_of).context("the node with a lease went")?;
    ensure!(claim["metadata"]["deletionTimestamp"].is_null(), "the node with a lease goes: {claim}");
    // Twelve minutes later. From here on nobody touches anything, and the lease lapses.
    let lapse = Timestamp::now() + SignedDuration::from_secs(40);
    start_at(lapse - sum).await?;
    let goes = |claims: &Objects| match claims.values().find(is_of) {
        Some(claim) => claim["metadata"]["deletionTimestamp"].as_str().map(|time| Some(time.to_owned())),
        // It is gone already.
        None => Some(None),
    };
    let deleted =
        api.until(CLAIMS, "the node goes when its lease is over", goes).await.with_context(|| cluster.log())?;
    let deleted = deleted.map_or_else(|| Ok(Timestamp::now()), |time| time.parse())?;
    ensure!(written(deleted) >= written(lapse), "it went at {deleted}, and the lease held until {lapse}");
    let gone = api.until(NODES, "the node is gone", |nodes| nodes.is_empty().then_some(())).await;
    gone.with_context(|| cluster.log())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn a_lease_does_not_hold_up_a_node_whose_claim_is_deleted() -> Result<()> {
    if !can_run("a_lease_does_not_hold_up_a_node_whose_claim_is_deleted", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_karpenter().await?;
    let api = cluster.api();
    agents(&cluster).await?;
    cluster.deploy("model", 1).await?;
    let node = text(&cluster.running("model", 1).await?[0]["spec"]["nodeName"])?;
    let agent = text(&agent_on(&cluster, &node).await?["metadata"]["name"])?;
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{agent}");
    api.patch(&path, &json!({ "metadata": { "annotations": { LEASE: "0s3600s" } } })).await?;
    let claims = api.list(CLAIMS).await?;
    let claim = claims.values().find(|claim| claim["status"]["nodeName"] == node.as_str()).context("no claim")?;
    // As we delete one: it and no other of its name.
    let options = json!({ "apiVersion": "v1", "kind": "DeleteOptions",
        "preconditions": { "uid": claim["metadata"]["uid"] } });
    let path = format!("{CLAIMS}/{}", text(&claim["metadata"]["name"])?);
    api.call(Method::DELETE, &path, Some(("application/json", &options))).await?;
    let gone = api.until(NODES, "the node goes", |nodes| (!nodes.contains_key(&node)).then_some(())).await;
    gone.with_context(|| cluster.log())?;
    // Its pod is not lost: another node comes for the one that takes its place.
    let again = text(&cluster.running("model", 1).await?[0]["spec"]["nodeName"])?;
    assert_ne!(again, node);
    Ok(())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn the_pod_whose_deletion_costs_least_goes_first_and_its_node_with_it() -> Result<()> {
    if !can_run("the_pod_whose_deletion_costs_least_goes_first_and_its_node_with_it", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_karpenter().await?;
    let api = cluster.api();
    cluster.deploy("model", 1).await?;
    let first = cluster.running("model", 1).await?.remove(0);
    cluster.scale("model", 2).await?;
    let both = cluster.running("model", 2).await?;
    let second = both.iter().find(|pod| pod["metadata"]["uid"] != first["metadata"]["uid"]).context("no second pod")?;
    let [victim, kept] = [text(&first["spec"]["nodeName"])?, text(&second["spec"]["nodeName"])?];
    assert_ne!(victim, kept);
    // Else the younger one would go.
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{}", text(&first["metadata"]["name"])?);
    let cost = json!({ "controller.kubernetes.io/pod-deletion-cost": "-100" });
    api.patch(&path, &json!({ "metadata": { "annotations": cost } })).await?;
    cluster.scale("model", 1).await?;
    let left = cluster.running("model", 1).await?.remove(0);
    assert_eq!(left["metadata"]["uid"], second["metadata"]["uid"]);
    let gone = api.until(NODES, "its node goes", |nodes| (!nodes.contains_key(&victim)).then_some(())).await;
    gone.with_context(|| cluster.log())?;
    let nodes = api.list(NODES).await?;
    assert_eq!(nodes.keys().collect::<Vec<_>>(), [&kept]);
    assert_eq!(cluster.running("model", 1).await?[0]["metadata"]["uid"], second["metadata"]["uid"]);
    Ok(())
}
