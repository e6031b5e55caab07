//! KEDA and an external scaler: what it pushes acts at once, what it is only asked for acts with the next poll.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_tests::api::Objects;
use darter_tests::external_scaler::{ExternalScaler, Says};
use darter_tests::keda_operator::scaled_object;
use darter_tests::kube_cluster::{KubeCluster, NAMESPACE};
use darter_tests::tools::{Need, can_run, say};
use serde_json::{Value, json};

pub(crate) const NEEDS: [Need; 5] = [Need::Root, Need::Kubernetes, Need::Controllers, Need::Scheduler, Need::Keda];
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/inference/deployments";
const OBJECTS: &str = "/apis/keda.sh/v1alpha1/namespaces/inference/scaledobjects";

/// Waits until a Deployment is to have so many replicas.
pub(crate) async fn replicas(cluster: &KubeCluster, name: &str, number: u32) -> Result<()> {
    let key = format!("{NAMESPACE}/{name}");
    let has = |all: &Objects| all.get(&key).is_some_and(|one| one["spec"]["replicas"] == number).then_some(());
    let found = cluster.api().until(DEPLOYMENTS, &format!("{name} has {number} replicas"), has).await;
    found.with_context(|| cluster.log())
}

/// Waits until KEDA knows which metrics a ScaledObject has: an event that is pushed before is dropped.
pub(crate) async fn known(cluster: &KubeCluster, name: &str) -> Result<()> {
    let key = format!("{NAMESPACE}/{name}");
    let is_known = |object: &Value| object["status"]["externalMetricNames"].as_array().is_some_and(|n| !n.is_empty());
    let found = |all: &Objects| all.get(&key).is_some_and(is_known).then_some(());
    cluster.api().until(OBJECTS, "KEDA knows its metrics", found).await.with_context(|| cluster.log())
}

#[tokio::test]
#[ignore = "make test-kube"]
async fn what_is_pushed_scales_from_zero_at_once_and_what_is_polled_with_the_next_poll() -> Result<()> {
    if !can_run("what_is_pushed_scales_from_zero_at_once_and_what_is_polled_with_the_next_poll", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_keda().await?;
    let scaler = ExternalScaler::start(cluster.place(), None)?;
    scaler.say(Some(Says { active: false, replicas: 0.0 }));
    let trigger = |kind: &str| json!({ "type": kind, "metadata": { "scalerAddress": scaler.address().to_string(), "model": "llama" } });
    // Nobody waits for a poll of the one: it would come much later than any test ends.
    let polls = [("pushed", "external-push", 3600), ("polled", "external", 15)];
    for (name, kind, seconds) in polls {
        cluster.deploy(name, 0).await?;
        let spec = json!({ "pollingInterval": seconds, "cooldownPeriod": 0 });
        scaled_object(&cluster.api(), NAMESPACE, name, &trigger(kind), &spec).await?;
        known(&cluster, name).await?;
    }
    let is = |method: &'static str, name: &'static str| {
        move |call: &darter_tests::external_scaler::Call| {
            call.method == method && call.object == format!("{NAMESPACE}/{name}")
        }
    };
    tokio::time::timeout(Duration::from_secs(120), async {
        scaler.called(1, is("StreamIsActive", "pushed")).await?;
        // Right after one poll, so that the next is as far away as it can be.
        let polls = scaler.calls().iter().filter(|call| is("IsActive", "polled")(call)).count();
        scaler.called(polls + 1, is("IsActive", "polled")).await
    })
    .await
    .with_context(|| cluster.log())??;
    let calls = scaler.calls();
    ensure!(calls.iter().all(|call| call.metadata.get("model").is_some_and(|model| model == "llama")), "{calls:?}");
    ensure!(!calls.iter().any(is("StreamIsActive", "polled")), "KEDA listens to a trigger that is no push");
    let (began, before) = (Instant::now(), calls.iter().filter(|call| is("IsActive", "pushed")(call)).count());
    scaler.say(Some(Says { active: true, replicas: 1.0 }));
    replicas(&cluster, "pushed", 1).await?;
    let pushed = began.elapsed();
    let after = scaler.calls().iter().filter(|call| is("IsActive", "pushed")(call)).count();
    assert_eq!(after, before, "it was polled meanwhile: what scaled it is not known");
    replicas(&cluster, "polled", 1).await?;
    let polled = began.elapsed();
    say(&format!("0 -> 1: pushed {pushed:.3?}, polled every 15 s {polled:.3?}"));
    ensure!(pushed < polled, "pushed after {pushed:?}, polled after {polled:?}");
    Ok(())
}
