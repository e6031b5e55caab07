//! Spare GPUs, by what a cluster has for that: a CapacityBuffer, placeholders, or a fixed number of nodes.

use anyhow::{Context as _, Result, ensure};
use darter_scaler::decide::Action;
use darter_scaler::fleet::{Act, Outcome, Target};
use darter_scaler::kubernetes::Settings;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use serde_json::{Value, json};

use crate::{BUFFERS, Cluster, Hands, KARPENTER, NEEDS};

const BUFFER: &str = "/apis/autoscaling.x-k8s.io/v1beta1/namespaces/gpu/capacitybuffers/spare";
const PLACEHOLDERS: &str = "/apis/apps/v1/namespaces/gpu/deployments/spare";

pub(crate) fn keep(gpus: u32) -> Act {
    Act {
        action: Action::Buffer { pool: "gpu".to_owned(), gpus },
        reason: "demand rose by two GPUs".to_owned(),
        target: Target::Pool { name: "gpu".to_owned() },
    }
}

fn metadata(gpus: u32) -> Value {
    json!({ "namespace": "gpu", "name": "spare", "labels": { "darter.dev/pool": "gpu" },
        "annotations": { "darter.dev/gpus": gpus.to_string() } })
}

pub(crate) fn buffer(gpus: u32) -> Value {
    json!({ "apiVersion": "autoscaling.x-k8s.io/v1beta1", "kind": "CapacityBuffer", "metadata": metadata(gpus),
        "spec": { "podTemplateRef": { "name": "spare" }, "replicas": 1 } })
}

pub(crate) fn placeholders(gpus: u32) -> Value {
    let labels = json!({ "app": "spare" });
    let pod = json!({ "terminationGracePeriodSeconds": 0, "containers": [{ "name": "c", "image": "i",
        "resources": { "limits": { "nvidia.com/gpu": gpus.to_string() } } }] });
    json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(gpus), "spec": {
        "selector": { "matchLabels": labels }, "replicas": 0,
        "template": { "metadata": { "labels": labels }, "spec": pod } } })
}

pub(crate) fn pool(replicas: Option<u32>) -> Value {
    let reference = json!({ "group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": "gpu" });
    let template = json!({ "spec": { "nodeClassRef": reference, "requirements": [] } });
    let mut pool = json!({ "apiVersion": "karpenter.sh/v1", "kind": "NodePool",
        "metadata": { "name": "gpu", "annotations": { "darter.dev/gpus": "8" } }, "spec": { "template": template } });
    if let Some(replicas) = replicas {
        pool["spec"]["replicas"] = json!(replicas);
    }
    pool
}

async fn replicas(cluster: &Cluster, path: &str) -> Result<Option<u64>> {
    Ok(cluster.get(path).await?["spec"]["replicas"].as_u64())
}

#[tokio::test]
async fn a_capacity_buffer_gets_as_many_replicas_as_hold_the_gpus_and_its_event_says_why() -> Result<()> {
    if !can_run("a_capacity_buffer_gets_as_many_replicas_as_hold_the_gpus_and_its_event_says_why", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&BUFFERS, &[]).await?;
    cluster.plane.apply(&buffer(2)).await?;
    // A Deployment stands by, for clusters without the kind.
    cluster.plane.apply(&placeholders(2)).await?;
    let mut hands = Hands::start(&cluster.client().await?, &cluster.settings);
    for (gpus, wanted) in [(5, 3), (5, 3), (0, 0)] {
        ensure!(hands.act(keep(gpus)).await? == Outcome::Done);
        ensure!(replicas(&cluster, BUFFER).await? == Some(wanted));
    }
    let before = &cluster.get(BUFFER).await?["metadata"]["annotations"]["darter.dev/replicas-before"];
    ensure!(before == "1", "what it was before us is noted once: {before}");
    ensure!(replicas(&cluster, PLACEHOLDERS).await? == Some(0));
    let events = async || cluster.events("gpu", "SpareChanged").await;
    eventually("two changes, two Events", async || Ok(events().await?.len() == 2)).await?;
    let said = events().await?;
    ensure!(
        said.contains(&("spare".to_owned(), "Spare replicas 1 -> 3: demand rose by two GPUs".to_owned())),
        "{said:?}"
    );
    Ok(())
}

#[tokio::test]
async fn without_the_kind_placeholders_are_scaled_and_without_these_it_is_said_what_to_make() -> Result<()> {
    if !can_run("without_the_kind_placeholders_are_scaled_and_without_these_it_is_said_what_to_make", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&KARPENTER, &[]).await?;
    cluster.plane.apply(&pool(Some(3))).await?;
    let mut hands = Hands::start(&cluster.client().await?, &cluster.settings);
    ensure!(hands.act(keep(2)).await? == Outcome::Failed, "a pool of fixed size is changed only if that is allowed");
    ensure!(hands.errors("not_found") == 1);
    cluster.plane.apply(&placeholders(1)).await?;
    ensure!(hands.act(keep(2)).await? == Outcome::Done);
    ensure!(replicas(&cluster, PLACEHOLDERS).await? == Some(2));
    // Which one?
    let mut second = placeholders(1);
    second["metadata"]["name"] = json!("second");
    cluster.plane.apply(&second).await?;
    ensure!(hands.act(keep(3)).await? == Outcome::Failed && replicas(&cluster, PLACEHOLDERS).await? == Some(2));
    Ok(())
}

#[tokio::test]
async fn a_pool_of_fixed_size_gets_spare_nodes_over_what_its_owner_wrote() -> Result<()> {
    if !can_run("a_pool_of_fixed_size_gets_spare_nodes_over_what_its_owner_wrote", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&KARPENTER, &[]).await?;
    cluster.plane.apply(&pool(Some(3))).await?;
    let settings = Settings { static_pools: true, ..cluster.settings.clone() };
    let mut hands = Hands::start(&cluster.client().await?, &settings);
    const POOL: &str = "/apis/karpenter.sh/v1/nodepools/gpu";
    for (gpus, wanted) in [(9, 5), (8, 4), (0, 3)] {
        ensure!(hands.act(keep(gpus)).await? == Outcome::Done);
        ensure!(replicas(&cluster, POOL).await? == Some(wanted), "{gpus}");
    }
    let notes = cluster.get("/api/v1/namespaces/gpu/configmaps/darter-scaler-before").await?;
    ensure!(notes["data"] == json!({ "gpu": "3" }), "{notes}");
    let events = cluster.events("default", "SpareChanged").await.context("no Events")?;
    ensure!(events.iter().all(|(about, _)| about == "gpu"), "{events:?}");
    Ok(())
}
