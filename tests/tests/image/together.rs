//! Two nodes of a cluster: real controllers make pods and EndpointSlices of the chart's objects, and the agents in its
//! containers find each other by them, and hear what becomes of their node, with the rights that the chart grants.

use anyhow::{Context as _, Result, ensure};
use darter_core::status::Status;
use darter_tests::chart::NAMESPACE;
use darter_tests::controllers::Controllers;
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::node_address;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::Method;
use serde_json::{Value, json};

use crate::pod::{Cluster, NEEDS, Pod, Running};

#[tokio::test]
async fn agents_of_the_chart_find_each_other_and_hear_of_their_nodes_end() -> Result<()> {
    let needs = [&NEEDS[..], &[Need::Kubernetes, Need::Controllers]].concat();
    if !can_run("agents_of_the_chart_find_each_other_and_hear_of_their_nodes_end", &needs) {
        return Ok(());
    }
    let cluster = Cluster::start(2).await?;
    let place = cluster.network.hub();
    let plane = ControlPlane::start(&place).await?;
    let _controllers = Controllers::start(&place, &plane, &["daemonset-controller", "endpointslice-controller"])?;
    let objects = Cluster::chart(json!({})).await?;
    plane.namespace(NAMESPACE).await?;
    for node in ["a", "b"] {
        let metadata = json!({ "name": node, "labels": { "kubernetes.io/os": "linux" } });
        plane.apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata })).await?;
    }
    for object in &objects {
        plane.apply(object).await?;
    }
    let (mut agents, mut pods) = (Vec::new(), Vec::new());
    for (number, node) in ["a", "b"].into_iter().enumerate() {
        let (agent, pod) = start(&cluster, &plane, &objects, number, node).await?;
        agents.push(agent);
        // With it go its directories.
        pods.push(pod);
    }
    for agent in &agents {
        let both = eventually("the agents are connected", async || {
            let status: Status = serde_json::from_str(&agent.get("/v1/status").await?)?;
            Ok(status.swarm.is_some_and(|swarm| swarm.members == 1))
        });
        both.await.with_context(|| agent.log())?;
    }
    let taint = json!({ "spec": { "taints": [{ "key": "karpenter.sh/disrupted", "effect": "NoSchedule" }] } });
    plane.call(Method::PATCH, "/api/v1/nodes/b", Some(("application/merge-patch+json", &taint))).await?;
    let going = "darter_node_going{reason=\"taint\"} 1";
    let heard = eventually("b hears that it is to go", async || Ok(agents[1].get("/metrics").await?.contains(going)));
    heard.await.with_context(|| agents[1].log())?;
    ensure!(!agents[0].get("/metrics").await?.contains(going), "the other node heard it too");
    for agent in &mut agents {
        let log = agent.log();
        ensure!(log.contains("this node is in a swarm") && !log.contains("cannot watch"), "{log}");
        agent.stop().await?;
    }
    // Not before the agents are gone.
    drop(pods);
    Ok(())
}

/// Starts the pod that the controller made for a node, as the scheduler and the kubelet do.
async fn start(
    cluster: &Cluster,
    plane: &ControlPlane,
    objects: &[Value],
    number: usize,
    node: &str,
) -> Result<(Running, Pod)> {
    let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    let mut made = Value::Null;
    eventually("the node has a pod", async || {
        let list = plane.call(Method::GET, &pods, None).await?;
        let wants = |pod: &&Value| pod["spec"]["affinity"].to_string().contains(&format!("[\"{node}\"]"));
        made = list["items"].as_array().into_iter().flatten().find(wants).cloned().unwrap_or_default();
        Ok(!made.is_null())
    })
    .await?;
    let name = made["metadata"]["name"].as_str().context("no name")?;
    let binding = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": name, "namespace": NAMESPACE },
        "target": { "apiVersion": "v1", "kind": "Node", "name": node } });
    plane.call(Method::POST, &format!("{pods}/{name}/binding"), Some(("application/json", &binding))).await?;
    let ip = node_address(number)?.to_string();
    let status = json!({ "status": { "phase": "Running", "hostIP": ip, "podIP": ip, "podIPs": [{ "ip": ip }] } });
    let merge = "application/merge-patch+json";
    plane.call(Method::PATCH, &format!("{pods}/{name}/status"), Some((merge, &status))).await?;
    let bound = json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": made["metadata"]["uid"] });
    let request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": { "boundObjectRef": bound } });
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/darter/token");
    let token = plane.call(Method::POST, &path, Some(("application/json", &request))).await?;
    let account = plane.mounted(NAMESPACE, token["status"]["token"].as_str().context("no token")?)?;
    let mut pod = cluster.pod(number, objects, node).await?;
    pod.mount(&account, "/var/run/secrets/kubernetes.io/serviceaccount", false);
    pod.set(&format!("KUBERNETES_SERVICE_HOST={}", plane.address().ip()));
    pod.set(&format!("KUBERNETES_SERVICE_PORT={}", plane.address().port()));
    Ok((pod.start().await?, pod))
}
