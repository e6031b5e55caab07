//! The real scaler with the configuration and the rights of the chart: it leads, watches, and believes an agent that
//! shows the token which the chart has made for it.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Metrics};
use darter_tests::api::define;
use darter_tests::chart::{NAMESPACE, find};
use darter_tests::http::Client;
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::process::{self, Process};
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{self, Need, can_run};
use serde_json::{Value, json};

use crate::admission::Cluster;

#[tokio::test]
async fn with_the_rights_of_the_chart_the_scaler_leads_watches_and_hears_an_agent() -> Result<()> {
    let name = "with_the_rights_of_the_chart_the_scaler_leads_watches_and_hears_an_agent";
    let needs = [Need::Helm, Need::Kubernetes, Need::KarpenterKinds, Need::KedaKinds, Need::LiveScaler, Need::MockNvml];
    if !can_run(name, &needs) {
        return Ok(());
    }
    let cluster = Cluster::with("darter.dev/not-ready", &json!({ "scaler": { "enabled": true } })).await?;
    let plane = &cluster.plane;
    for kinds in [tools::karpenter_kinds(), tools::keda_kinds()] {
        define(&plane.api(), &kinds.context("no kinds")?).await?;
    }
    let (place, dir) = (Place::Host, Scratch::new()?);
    let token = plane.service_account(NAMESPACE, "darter-scaler").await?;
    // They hold a moment after they are made.
    eventually("the rights are there", async || {
        Ok(cluster.may(&token, NAMESPACE, "create", "coordination.k8s.io:leases").await?
            && cluster.may(&token, "", "watch", "keda.sh:scaledobjects").await?)
    })
    .await?;
    let text = &find(&cluster.objects, "ConfigMap", "darter-scaler")?["data"]["scaler.toml"];
    std::fs::write(dir.join("scaler.toml"), text.as_str().context("no scaler.toml")?)?;
    let ports = [place.port()?, place.port()?];
    let [grpc, http] = [0, 1].map(|n: usize| SocketAddr::new(place.address(), ports[n].number()));
    let mut command = place.command(tools::darter()?);
    command.arg("scaler").arg("--config").arg(dir.join("scaler.toml"));
    // What is another one in a pod: addresses, files, and how the API server is found.
    for set in [
        format!("grpc.listen={grpc}"),
        format!("http.listen={http}"),
        "grpc.cert=".to_owned(),
        "grpc.key=".to_owned(),
        format!("record.dir={}", dir.join("record").display()),
        format!("kubernetes.kubeconfig={}", plane.kubeconfig(NAMESPACE, &token)?.display()),
    ] {
        command.args(["--set", &set]);
    }
    let mut scaler = Process::start("darter scaler", command, &dir.join("log"))?;
    let client = Client::new(place);
    let log_file = dir.join("log");
    let log = || process::tail(&std::fs::read_to_string(&log_file).unwrap_or_default());
    let leads = eventually("it leads", async || {
        ensure!(scaler.exited()?.is_none(), "it ended");
        Ok(client.get(&format!("http://{http}/readyz")).await.is_ok_and(|answer| answer.status == 200))
    });
    leads.await.with_context(log)?;
    // An agent as the chart starts it, with the token that it has projected.
    let shown = cluster.token_for(Some("agent-a"), &json!({ "audiences": ["darter-scaler"] })).await?;
    std::fs::write(dir.join("token"), &shown)?;
    let own = cluster.token_for(Some("agent-a"), &json!({})).await?;
    let mock = Mock::fixture("h200-idle")?;
    let options = mock
        .options(1)?
        .set("kubernetes.node", "a")
        .set("kubernetes.pod", "agent-a")
        .set("kubernetes.kubeconfig", plane.kubeconfig(NAMESPACE, &own)?.display().to_string())
        .set("report.scaler", format!("http://{grpc}"))
        .set("report.token_file", dir.join("token").display().to_string());
    let agent = Agent::start(options).await?;
    let both = || format!("== scaler\n{}\n== agent\n{}", log(), process::tail(&agent.log()));
    let state = format!("http://{http}/v1/state");
    let heard = eventually("the scaler hears the agent", async || {
        let page: Value = serde_json::from_slice(&client.get(&state).await?.body)?;
        let mut nodes = page["state"]["nodes"].as_object().into_iter().flatten();
        Ok(nodes.any(|(_, node)| node["name"] == "a" && node["report"].is_object()))
    });
    heard.await.with_context(both)?;
    let metrics = Metrics::parse(&client.get(&format!("http://{http}/metrics")).await?.text());
    for errors in ["darter_scaler_watch_errors_total", "darter_scaler_write_errors_total"] {
        ensure!(metrics.sum(errors, &[("reason", "forbidden")]) == 0.0, "{errors}: {}", both());
    }
    ensure!(metrics.sum("darter_scaler_report_refusals_total", &[]) == 0.0, "{}", both());
    ensure!(!log().contains("forbidden"), "{}", log());
    Ok(())
}
