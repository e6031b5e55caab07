//! `darter scaler` itself, watching a real API server: it leads, knows the nodes, takes agents by their tokens, and
//! leaves the Lease to the next when it ends.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use darter_tests::scaler::{Mouth, Scaler, channel, report};
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::Method;
use serde_json::Value;
use tonic::Code;

use crate::{Cluster, KARPENTER, KEDA, claim, node, pod};

const NEEDS: [Need; 4] = [Need::Kubernetes, Need::KarpenterKinds, Need::KedaKinds, Need::Darter];
const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/gpu/leases/darter-scaler";

/// A scaler of this cluster, which has a pool of nodes with GPUs.
fn text(kubeconfig: &Path) -> String {
    format!(
        "[access]\nmode = 'kubernetes'\n[kubernetes]\nenabled = true\nkubeconfig = '{}'\n\
         [[pools]]\nname = 'gpu'\nprice_per_hour = '1'\ngpus = 1\n",
        kubeconfig.display()
    )
}

async fn state(scaler: &Scaler) -> Result<Value> {
    Ok(serde_json::from_slice(&scaler.get("/v1/state").await?.body)?)
}

#[tokio::test]
async fn a_scaler_leads_knows_what_kubernetes_knows_and_leaves_the_lease_when_it_ends() -> Result<()> {
    if !can_run("a_scaler_leads_knows_what_kubernetes_knows_and_leaves_the_lease_when_it_ends", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&KARPENTER, &KEDA).await?;
    let joined = cluster.plane.apply(&node("gpu-1")).await?;
    cluster.plane.apply(&claim("c")).await?;
    let made = cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    // It is ready once it leads.
    let mut scaler = Scaler::start(&text(&cluster.kubeconfig()?)).await?;
    let lease = cluster.get(LEASE).await?;
    ensure!(lease["spec"]["holderIdentity"].as_str().is_some_and(|holder| !holder.is_empty()), "{lease}");
    ensure!(scaler.metrics().await?.sum("darter_scaler_leads", &[]) == 1.0);
    let uid = joined["metadata"]["uid"].as_str().context("no uid")?;
    eventually("it knows the node, its pod and the one that comes", async || {
        let state = state(&scaler).await?.to_string();
        let pod = made["metadata"]["uid"].as_str().context("no uid")?;
        Ok(state.contains(uid) && state.contains(pod) && state.contains("\"c\""))
    })
    .await
    .with_context(|| scaler.log())?;
    // Whoever is known and has no right is told which one it is, and who is not known that he is not.
    let token = cluster.token("darter-scaler", "darter-scaler", None).await?;
    for (token, status, says) in [(Some(token.as_str()), 403, "apiGroups darter.dev"), (Some("made-up"), 401, "")] {
        let put = scaler.order(Method::PUT, "/v1/demand/team/serve", token, "{\"backlog\": 1}").await?;
        ensure!(put.status == status && put.text().contains(says), "{}: {}", put.status, put.text());
    }
    // An agent reports as the node of its pod, by its token and nothing else.
    cluster.plane.service_account("gpu", "darter").await?;
    cluster.agent("agent-1", "darter", "gpu-1").await?;
    let token = cluster.token("darter", "darter-scaler", Some("agent-1")).await?;
    let channel = channel(&scaler.grpc(), None).await?;
    Mouth::open(channel.clone(), Some(&token)).await?.say(report("gpu-1", 1)).await?;
    let lie = Mouth::open(channel, Some(&token)).await?.say(report("gpu-2", 1)).await;
    ensure!(lie.as_ref().is_err_and(|status| status.code() == Code::PermissionDenied), "{lie:?}");
    scaler.until("/v1/status", "one is fresh", |page| page["nodes"]["fresh"] == 1).await?;
    scaler.stop().await?;
    let lease = cluster.get(LEASE).await?;
    ensure!(lease["spec"]["holderIdentity"] == "", "{lease}\n{}", scaler.log());
    Ok(())
}
