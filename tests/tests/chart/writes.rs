//! An agent itself, under the rights and the policies of the chart: all that it writes is let through.

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{Directive, Protect, Release};
use darter_tests::agent::Agent;
use darter_tests::chart::NAMESPACE;
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::reports::Ear;
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::admission::Cluster;

const NODE: &str = "/api/v1/nodes/a";
const POD: &str = "/api/v1/namespaces/gpu-system/pods/agent-a";
const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// Says what a kubelet says: the node has a GPU to give, and the pod runs.
async fn kubelet(cluster: &Cluster) -> Result<()> {
    let resources = json!({ "cpu": "8", "memory": "64Gi", "pods": "110", "nvidia.com/gpu": "1" });
    let node = json!({ "status": { "capacity": resources, "allocatable": resources } });
    let pod = json!({ "status": { "phase": "Running", "startTime": "2026-01-01T00:00:00Z" } });
    for (path, status) in [(NODE, node), (POD, pod)] {
        let path = format!("{path}/status");
        cluster.plane.call(Method::PATCH, &path, Some((STRATEGIC, &status))).await?;
    }
    Ok(())
}

#[tokio::test]
async fn all_that_an_agent_writes_is_let_through_by_the_charts_rights_and_policies() -> Result<()> {
    let name = "all_that_an_agent_writes_is_let_through_by_the_charts_rights_and_policies";
    if !can_run(name, &[Need::Helm, Need::Kubernetes, Need::Darter, Need::MockNvml]) {
        return Ok(());
    }
    let cluster = Cluster::start().await?;
    let plane = &cluster.plane;
    kubelet(&cluster).await?;
    let token = cluster.token_for(Some("agent-a"), &json!({})).await?;
    cluster.holds(&token).await?;
    // The one for the scaler, as the chart has it projected: the API server does not take it.
    let shown = cluster.token_for(Some("agent-a"), &json!({ "audiences": ["darter-scaler"] })).await?;
    ensure!(plane.call_as(&shown, Method::GET, NODE, None).await?.status == StatusCode::UNAUTHORIZED);
    let (dir, ear) = (Scratch::new()?, Ear::start(&Place::Host, None).await?);
    std::fs::write(dir.join("token"), &shown)?;
    ear.want(Some(&format!("Bearer {shown}")));
    let mock = Mock::fixture("h200-idle")?;
    let options = mock
        .options(1)?
        .set("kubernetes.node", "a")
        .set("kubernetes.pod", "agent-a")
        .set("kubernetes.kubeconfig", plane.kubeconfig(NAMESPACE, &token)?.display().to_string())
        .set("report.scaler", ear.url())
        .set("report.token_file", dir.join("token").display().to_string());
    let agent = Agent::start(options).await?;
    let log = || process::tail(&agent.log());
    let get = async |path: &str| plane.call(Method::GET, path, None).await;
    let has_taint = |node: &Value| node["spec"]["taints"].to_string().contains("darter.dev/not-ready");
    eventually("the taint goes", async || Ok(!has_taint(&get(NODE).await?))).await.with_context(log)?;
    let is_ready = async || {
        let node = get(NODE).await?;
        let mut conditions = node["status"]["conditions"].as_array().context("no conditions")?.iter();
        Ok(conditions.any(|condition| condition["type"] == "darter.dev/GpuReady" && condition["status"] == "True"))
    };
    eventually("the condition comes", is_ready).await.with_context(log)?;
    let is_told = async || {
        let events = get("/apis/events.k8s.io/v1/namespaces/default/events").await?;
        let mut events = events["items"].as_array().context("no list")?.iter();
        Ok(events.any(|event| event["reason"] == "StartupTaintRemoved" && event["regarding"]["name"] == "a"))
    };
    eventually("an Event", is_told).await.with_context(log)?;
    // A lease, and none any more.
    ear.next(0).await?;
    let annotation = async || {
        Ok::<_, anyhow::Error>(get(POD).await?["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"].clone())
    };
    ensure!(annotation().await?.is_null());
    let protect = Protect { for_ms: 600_000, reason: "a job runs".to_owned() };
    ear.say(Directive { protect: Some(protect), ..Directive::default() })?;
    eventually("a lease", async || Ok(annotation().await?.is_string())).await.with_context(log)?;
    ear.say(Directive { release: Some(Release {}), ..Directive::default() })?;
    eventually("no lease", async || Ok(annotation().await?.is_null())).await.with_context(log)?;
    let metrics = agent.metrics().await?;
    for errors in ["darter_node_write_errors_total", "darter_node_watch_errors_total", "darter_report_refusals_total"] {
        ensure!(metrics.sum(errors, &[]) == 0.0, "{errors}: {}", log());
    }
    Ok(())
}
