//! Nodes that nothing runs on yet: a buffer's, and those of a pool that has a fixed number.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::api::{Objects, is_true};
use darter_tests::karpenter::{INSTANCES, pool};
use darter_tests::kube_cluster::{KubeCluster, NAMESPACE, pod_spec};
use darter_tests::tools::can_run;
use serde_json::{Value, json};

use crate::nodes::{CLAIMS, LEASE, NEEDS, NODES, agent_on, agents, text};

const BUFFERS: &str = "/apis/autoscaling.x-k8s.io/v1beta1/namespaces/inference/capacitybuffers";

/// Waits until there are so many nodes, all of them ready, and gives back their names.
async fn ready(cluster: &KubeCluster, number: usize) -> Result<Vec<String>> {
    let found = |nodes: &Objects| {
        let all = nodes.len() == number && nodes.values().all(|node| is_true(node, "Ready"));
        all.then(|| nodes.keys().cloned().collect())
    };
    cluster.api().until(NODES, &format!("{number} nodes are ready"), found).await.with_context(|| cluster.log())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn a_buffer_keeps_a_spare_node_that_the_next_pod_gets_at_once() -> Result<()> {
    if !can_run("a_buffer_keeps_a_spare_node_that_the_next_pod_gets_at_once", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_karpenter().await?;
    let api = cluster.api();
    let template = json!({ "apiVersion": "v1", "kind": "PodTemplate",
        "metadata": { "namespace": NAMESPACE, "name": "spare" },
        "template": { "metadata": { "labels": { "app": "spare" } }, "spec": pod_spec(1) } });
    api.apply(&template).await?;
    let buffer = json!({ "apiVersion": "autoscaling.x-k8s.io/v1beta1", "kind": "CapacityBuffer",
        "metadata": { "namespace": NAMESPACE, "name": "spare" },
        "spec": { "replicas": 1, "podTemplateRef": { "name": "spare" } } });
    api.apply(&buffer).await?;
    let spare = ready(&cluster, 1).await?.remove(0);
    let told = |buffers: &Objects| buffers.values().any(|one| is_true(one, "Provisioning")).then_some(());
    api.until(BUFFERS, "the buffer says that it is kept", told).await.with_context(|| cluster.log())?;
    // No pod stands for it: nothing is pulled there.
    ensure!(api.list("/api/v1/pods").await?.is_empty());
    cluster.deploy("model", 1).await?;
    let pod = cluster.running("model", 1).await?.remove(0);
    assert_eq!(text(&pod["spec"]["nodeName"])?, spare);
    // Another one takes its place, until none is wanted any more; that of the pod stays.
    ready(&cluster, 2).await?;
    api.patch(&format!("{BUFFERS}/spare"), &json!({ "spec": { "replicas": 0 } })).await?;
    assert_eq!(ready(&cluster, 1).await?, [spare]);
    Ok(())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn of_a_pool_with_a_fixed_number_of_nodes_the_one_with_a_lease_stays() -> Result<()> {
    if !can_run("of_a_pool_with_a_fixed_number_of_nodes_the_one_with_a_lease_stays", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_karpenter().await?;
    let api = cluster.api();
    agents(&cluster).await?;
    pool(&api, "fixed", &[INSTANCES[0].name], Duration::ZERO, &json!({ "replicas": 2 })).await?;
    let nodes = ready(&cluster, 2).await?;
    let initialized = |claims: &Objects| claims.values().all(|claim| is_true(claim, "Initialized")).then_some(());
    api.until(CLAIMS, "both are initialized", initialized).await.with_context(|| cluster.log())?;
    // Both are empty. The second of them by name is to stay, whatever Karpenter's own order.
    agent_on(&cluster, &nodes[0]).await?;
    let agent = text(&agent_on(&cluster, &nodes[1]).await?["metadata"]["name"])?;
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{agent}");
    api.patch(&path, &json!({ "metadata": { "annotations": { LEASE: "0s3600s" } } })).await?;
    let scaled: Value =
        api.patch("/apis/karpenter.sh/v1/nodepools/fixed/scale", &json!({ "spec": { "replicas": 1 } })).await?;
    assert_eq!(scaled["spec"]["replicas"], 1);
    assert_eq!(ready(&cluster, 1).await?, [nodes[1].clone()]);
    Ok(())
}
