//! An API server that says no, is away, or is none.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::{Method, StatusCode};
use serde_json::json;

use crate::{Cluster, LOST, NEEDS, TAINT, rules, startup};

#[tokio::test]
async fn rights_that_are_missing_are_named_once_each_and_asked_for_again() -> Result<()> {
    if !can_run("rights_that_are_missing_are_named_once_each_and_asked_for_again", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::without_rights(&[TAINT], 1).await?;
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
    let said = |text: &str| agent.log().matches(text).count();
    let watch = "needs a ClusterRole that lets it get, list and watch the node gpu-1";
    eventually("it says what the watch needs", async || Ok(said(watch) == 1)).await?;
    ensure!(agent.admin("/readyz").await?.status == 200, "it mirrors all the same");
    // To look is not to write.
    let look = json!([{ "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"] }]);
    cluster.plane.allow_everywhere("gpu", "darter", &look).await?;
    let needs = [
        "needs a ClusterRole that lets it patch nodes/status (off: kubernetes.gpu_condition = false)",
        "needs a ClusterRole that lets it get and patch nodes (off: kubernetes.startup_taint = \\\"\\\")",
    ];
    let all = async || Ok(needs.iter().all(|text| said(text) == 1));
    eventually("it says what the condition and the taint need", all)
        .await
        .with_context(|| process::tail(&agent.log()))?;
    let refused = async || {
        let metrics = agent.metrics().await?;
        Ok(metrics.sum("darter_node_write_errors_total", &[("reason", "forbidden")]) >= 4.0)
    };
    eventually("each is tried again", refused).await?;
    ensure!(needs.iter().all(|text| said(text) == 1) && agent.admin("/readyz").await?.status == 200, "{}", agent.log());
    assert_eq!(cluster.taints().await?, [TAINT]);
    // All but Events.
    let mut most = rules();
    most.as_array_mut().context("rules are a list")?.pop();
    cluster.plane.allow_everywhere("gpu", "darter", &most).await?;
    eventually("the taint goes", async || Ok(cluster.taints().await?.is_empty())).await?;
    let is_ready = async || Ok(cluster.condition("darter.dev/GpuReady").await?["status"] == "True");
    eventually("the condition comes", is_ready).await?;
    let events = "needs a Role in the namespace default that lets it create and patch events (events.k8s.io)";
    eventually("it says what Events need", async || Ok(said(events) == 1)).await?;
    cluster.plane.allow_everywhere("gpu", "darter", &rules()).await?;
    eventually("the Event comes", async || Ok(!cluster.events("StartupTaintRemoved").await?.is_empty())).await?;
    let works = ["write the condition", "remove the startup taint", "write an Event"];
    for what in works {
        eventually(what, async || Ok(said(&format!("it works again: {what}")) == 1)).await?;
    }
    Ok(())
}

/// Forbids agents every change there. It names no reason, so that the API server answers 422.
async fn policy(cluster: &Cluster, name: &str, resource: &str) -> Result<()> {
    let api = "admissionregistration.k8s.io/v1";
    let rule = json!({ "apiGroups": [""], "apiVersions": ["v1"], "resources": [resource], "operations": ["UPDATE"] });
    let agents =
        json!([{ "name": "agents", "expression": "request.userInfo.username == 'system:serviceaccount:gpu:darter'" }]);
    let spec = json!({ "failurePolicy": "Fail", "matchConstraints": { "resourceRules": [rule] }, "matchConditions": agents,
        "validations": [{ "expression": "false", "message": format!("not with {name}") }] });
    let object =
        json!({ "apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": { "name": name }, "spec": spec });
    cluster.plane.apply(&object).await?;
    let binding = json!({ "apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": { "name": name },
        "spec": { "policyName": name, "validationActions": ["Deny"] } });
    cluster.plane.apply(&binding).await?;
    Ok(())
}

#[tokio::test]
async fn what_a_policy_of_others_refuses_is_said_in_its_words_and_counted() -> Result<()> {
    if !can_run("what_a_policy_of_others_refuses_is_said_in_its_words_and_counted", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[TAINT], 1).await?;
    policy(&cluster, "no-conditions", "nodes/status").await?;
    policy(&cluster, "no-taints", "nodes").await?;
    // A policy holds a moment after it is made.
    let probe = json!({ "metadata": { "annotations": { "a": "b" } } });
    for path in ["/api/v1/nodes/gpu-1", "/api/v1/nodes/gpu-1/status"] {
        let holds = async || {
            let body = Some(("application/merge-patch+json", &probe));
            let path = format!("{path}?dryRun=All");
            let answer = cluster.plane.call_as(&cluster.token, Method::PATCH, &path, body).await?;
            Ok(answer.status == StatusCode::UNPROCESSABLE_ENTITY && answer.text().contains("not with no-"))
        };
        eventually("the policies hold", holds).await?;
    }
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
    let said = |trouble: &str, policy: &str| {
        agent.log().lines().filter(|line| line.contains(trouble) && line.contains(policy)).count()
    };
    let condition = "cannot write the condition darter.dev/GpuReady of this node";
    let taint = "cannot remove the startup taint of this node";
    for (trouble, policy) in [(condition, "not with no-conditions"), (taint, "not with no-taints")] {
        eventually(trouble, async || Ok(said(trouble, policy) == 1))
            .await
            .with_context(|| process::tail(&agent.log()))?;
    }
    let counted = async |reason: &str| {
        Ok::<_, anyhow::Error>(agent.metrics().await?.sum("darter_node_write_errors_total", &[("reason", reason)]))
    };
    eventually("each is tried again", async || Ok(counted("forbidden").await? >= 4.0)).await?;
    ensure!(counted("conflict").await? == 0.0, "nobody else changes anything: {}", agent.log());
    ensure!(said(condition, "") == 1 && said(taint, "") == 1, "{}", agent.log());
    for name in ["no-conditions", "no-taints"] {
        let binding = json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": { "name": name } });
        cluster.plane.delete(&binding).await?;
    }
    eventually("the taint goes", async || Ok(cluster.taints().await?.is_empty())).await?;
    let is_ready = async || Ok(cluster.condition("darter.dev/GpuReady").await?["status"] == "True");
    eventually("the condition comes", is_ready).await
}

#[tokio::test]
async fn what_changes_while_the_api_server_is_away_is_there_when_it_is_back() -> Result<()> {
    if !can_run("what_changes_while_the_api_server_is_away_is_there_when_it_is_back", &NEEDS) {
        return Ok(());
    }
    let mut cluster = Cluster::start(&[TAINT, "team"], 1).await?;
    let mock = Mock::new(LOST)?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?).await?;
    let is = async |cluster: &Cluster, status: &str| {
        let is_so = async || Ok(cluster.condition("darter.dev/GpuReady").await?["status"] == status);
        eventually(status, is_so).await.with_context(|| process::tail(&agent.log()))
    };
    is(&cluster, "False").await?;
    cluster.plane.kill_api().await?;
    mock.set("base = 'h200-idle'")?;
    let said = |text: &str| agent.log().matches(text).count();
    let trouble = "cannot write the condition darter.dev/GpuReady of this node";
    eventually("it says so", async || Ok(said(trouble) > 0)).await.with_context(|| process::tail(&agent.log()))?;
    let failed = async || {
        let metrics = agent.metrics().await?;
        Ok::<_, anyhow::Error>(metrics.sum("darter_node_write_errors_total", &[("reason", "unreachable")]))
    };
    let before = failed().await?;
    eventually("it tries again", async || Ok(failed().await? >= before + 2.0)).await?;
    ensure!(agent.admin("/readyz").await?.status == 200, "nothing waits for an API server");
    ensure!(said(trouble) == 1, "{}", agent.log());
    cluster.plane.start_api().await?;
    is(&cluster, "True").await?;
    let is_gone = async || Ok(cluster.taints().await? == ["team"]);
    eventually("the taint goes", is_gone).await.with_context(|| process::tail(&agent.log()))?;
    Ok(())
}

#[tokio::test]
async fn a_name_that_is_no_node_is_said_with_the_key_to_look_at() -> Result<()> {
    if !can_run("a_name_that_is_no_node_is_said_with_the_key_to_look_at", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], 1).await?;
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?.set("kubernetes.node", "gpu-2")).await?;
    let advice = "there is no such node; is kubernetes.node its name in Kubernetes (spec.nodeName)?";
    eventually("it says so", async || Ok(agent.log().matches(advice).count() == 1)).await?;
    ensure!(cluster.condition("darter.dev/GpuReady").await?.is_null(), "of another node");
    Ok(())
}

#[tokio::test]
async fn without_the_name_of_the_node_no_api_server_is_asked() -> Result<()> {
    let needs = [Need::Darter, Need::MockNvml, Need::Root];
    if !can_run("without_the_name_of_the_node_no_api_server_is_asked", &needs) {
        return Ok(());
    }
    // In the place where a pod would find one.
    let port = Place::Host.port()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.number()));
    let listener = Place::Host.listen(address)?;
    let account = Scratch::new()?;
    for (file, text) in [("token", "a"), ("namespace", "gpu"), ("ca.crt", "")] {
        std::fs::write(account.join(file), text)?;
    }
    let mock = Mock::fixture("h200-idle")?;
    let options: Options = mock.options(1)?.pod(account.path(), address);
    let agent = Agent::start(options).await?;
    // By then a condition would be due.
    let is_judged = async || {
        let metrics = agent.metrics().await?;
        Ok(metrics.sum("darter_node_gpu_ready", &[("state", "Ready")]) == 1.0)
    };
    eventually("the GPUs are judged", is_judged).await?;
    ensure!(startup(&agent).await?.is_null(), "it says something of Kubernetes");
    let asked = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    ensure!(asked.is_err(), "somebody asked: {asked:?}");
    Ok(())
}
