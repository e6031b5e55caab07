//! Everything that was written is found again and taken back, and nothing else.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_scaler::fleet::Outcome;
use darter_scaler::kubernetes::{Settings, Undone, undo};
use darter_tests::net::Place;
use darter_tests::process;
use darter_tests::tools::{Need, can_run, darter};
use http::Method;
use serde_json::json;

use crate::actuators::rank;
use crate::spare::{buffer, keep, placeholders, pool};
use crate::{BUFFERS, Cluster, Hands, KARPENTER, NEEDS, node, pod};

#[tokio::test]
async fn what_was_written_is_found_again_and_taken_back_and_what_users_wrote_stays() -> Result<()> {
    let needs = [NEEDS.as_slice(), &[Need::Darter]].concat();
    if !can_run("what_was_written_is_found_again_and_taken_back_and_what_users_wrote_stays", &needs) {
        return Ok(());
    }
    let kinds: Vec<_> = KARPENTER.into_iter().chain(BUFFERS).collect();
    let cluster = Cluster::start(&kinds, &[]).await?;
    let settings = Settings { static_pools: true, ..cluster.settings.clone() };
    let client = cluster.client().await?;
    cluster.plane.apply(&node("gpu-1")).await?;
    let ranked = cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    let mut own = pod("serve-2", "gpu-1");
    own["metadata"]["annotations"] = json!({ "controller.kubernetes.io/pod-deletion-cost": "5" });
    cluster.plane.apply(&own).await?;
    let mut hands = Hands::start(&client, &settings);
    ensure!(hands.act(rank(&ranked, -300)?).await? == Outcome::Done);
    // The pool of fixed size, then placeholders, then a CapacityBuffer, as each comes.
    cluster.plane.apply(&pool(Some(3))).await?;
    ensure!(hands.act(keep(8)).await? == Outcome::Done);
    cluster.plane.apply(&placeholders(1)).await?;
    ensure!(hands.act(keep(2)).await? == Outcome::Done);
    cluster.plane.apply(&buffer(1)).await?;
    ensure!(hands.act(keep(4)).await? == Outcome::Done);
    drop(hands);
    // As an operator does it.
    let mut command = Place::Host.command(darter()?);
    command.args(["scaler", "disable", "--set", "kubernetes.enabled=true", "--set", "kubernetes.static_pools=true"]);
    command.arg("--set").arg(format!("kubernetes.kubeconfig={}", cluster.kubeconfig()?.display()));
    let output = process::run("darter scaler disable", command, Duration::from_secs(60)).await?;
    let all = "taken back: 1 deletion costs of pods, 1 CapacityBuffers, 1 placeholder Deployments, 1 NodePools\n";
    ensure!(output.status.success() && output.stdout == all, "{}{}", output.stdout, output.stderr);
    let ranked = cluster.get("/api/v1/namespaces/team/pods/serve-1").await?;
    ensure!(ranked["metadata"]["annotations"].is_null(), "{ranked}");
    let own = cluster.get("/api/v1/namespaces/team/pods/serve-2").await?;
    ensure!(own["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"] == "5");
    let buffer = cluster.get("/apis/autoscaling.x-k8s.io/v1beta1/namespaces/gpu/capacitybuffers/spare").await?;
    ensure!(buffer["spec"]["replicas"] == 1, "{buffer}");
    ensure!(buffer["metadata"]["annotations"] == json!({ "darter.dev/gpus": "1" }), "{buffer}");
    let placeholders = cluster.get("/apis/apps/v1/namespaces/gpu/deployments/spare").await?;
    ensure!(placeholders["spec"]["replicas"] == 0, "{placeholders}");
    let pool = cluster.get("/apis/karpenter.sh/v1/nodepools/gpu").await?;
    ensure!(pool["spec"]["replicas"] == 3, "{pool}");
    // A second time there is nothing.
    let again = undo(&client, &settings).await;
    ensure!(again == Undone::default(), "{again:?}");
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_taken_back_is_named_and_the_rest_is_taken_back() -> Result<()> {
    if !can_run("what_cannot_be_taken_back_is_named_and_the_rest_is_taken_back", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&BUFFERS, &[]).await?;
    let client = cluster.client().await?;
    cluster.plane.apply(&node("gpu-1")).await?;
    let ranked = cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    cluster.plane.apply(&buffer(1)).await?;
    let mut hands = Hands::start(&client, &cluster.settings);
    ensure!(hands.act(rank(&ranked, -300)?).await? == Outcome::Done);
    ensure!(hands.act(keep(4)).await? == Outcome::Done);
    // Somebody takes away the right to the namespace's objects.
    let role = "/apis/rbac.authorization.k8s.io/v1/namespaces/gpu/roles/darter-scaler";
    cluster.plane.call(Method::DELETE, role, None).await?;
    let mut undone = undo(&client, &cluster.settings).await;
    // RBAC hears of it in a moment.
    darter_tests::stage::eventually("the right is gone", async || {
        undone = undo(&client, &cluster.settings).await;
        Ok(undone.failed.len() >= 2)
    })
    .await?;
    let told = undone.failed.iter().find(|told| told.starts_with("CapacityBuffers: ")).context("not told")?;
    ensure!(told.contains("needs a Role in its namespace that lets it list and patch capacitybuffers"), "{undone:?}");
    let ranked = cluster.get("/api/v1/namespaces/team/pods/serve-1").await?;
    ensure!(ranked["metadata"]["annotations"].is_null(), "{ranked}");
    Ok(())
}
