//! The chart at a real API server: every object of every shape is taken, strictly, and helm installs, upgrades and
//! uninstalls it while real controllers make pods of it.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use darter_tests::chart::{self, Helm, NAMESPACE, RELEASE};
use darter_tests::controllers::Controllers;
use darter_tests::kubeconform::Schemas;
use darter_tests::kubernetes::{ControlPlane, path};
use darter_tests::net::Place;
use darter_tests::stage::eventually;
use darter_tests::tools::{self, Need, can_run};
use http::Method;
use serde_json::{Value, json};

use super::shapes;

const APPLY: &str = "application/apply-patch+yaml";

/// Applies an object as the API server checks it at its strictest: with nothing unknown and nothing twice in it.
async fn apply(plane: &ControlPlane, object: &Value, dry: bool) -> Result<Value> {
    let dry = if dry { "&dryRun=All" } else { "" };
    let path = format!("{}?fieldManager=tests&force=true&fieldValidation=Strict{dry}", path(object)?);
    plane.call(Method::PATCH, &path, Some((APPLY, object))).await
}

#[tokio::test]
async fn a_real_api_server_takes_every_object_of_every_shape() -> Result<()> {
    let needs = [Need::Helm, Need::Kubernetes, Need::Kubeconform, Need::PrometheusOperator];
    if !can_run("a_real_api_server_takes_every_object_of_every_shape", &needs) {
        return Ok(());
    }
    let (helm, plane) = (Helm::new()?, ControlPlane::start(&Place::Host).await?);
    plane.namespace(NAMESPACE).await?;
    with_prometheus_operator(&plane).await?;
    let schemas = Schemas::of(&plane).await?;
    for (name, values) in shapes() {
        let objects = helm.render(&values).await?;
        assert_eq!(schemas.check(&objects).await?, [""; 0], "{name}: kubeconform");
        for object in &objects {
            apply(&plane, object, true).await.with_context(|| format!("{name}, only tried: {object}"))?;
            let made = apply(&plane, object, false).await.with_context(|| format!("{name}: {object}"))?;
            ensure!(made["metadata"]["uid"].is_string(), "{name}: nothing was made of {object}");
        }
        // Selectors of a DaemonSet cannot be changed: the next shape begins anew.
        for object in &objects {
            plane.delete(object).await.with_context(|| format!("{name}: {object}"))?;
        }
        // What is unknown is refused, so that what was taken above is known.
        let mut wrong = objects.iter().find(|object| object["kind"] == "DaemonSet").context("no DaemonSet")?.clone();
        wrong["spec"]["template"]["spec"]["hostNetwrk"] = json!(true);
        let told = schemas.check(std::slice::from_ref(&wrong)).await?;
        ensure!(told.len() == 1 && told[0].contains("hostNetwrk"), "kubeconform: {told:?}");
        let error = apply(&plane, &wrong, true).await.err().context("an unknown field was taken")?;
        ensure!(format!("{error:#}").contains("hostNetwrk"), "{error:#}");
    }
    Ok(())
}

/// Makes the kinds of the Prometheus Operator, as its own manifests do, and waits until they are served.
async fn with_prometheus_operator(plane: &ControlPlane) -> Result<()> {
    let dir = tools::prometheus_operator().context("no kinds of the Prometheus Operator")?;
    for kind in ["podmonitors", "prometheusrules"] {
        let text = fs::read_to_string(dir.join(format!("monitoring.coreos.com_{kind}.yaml")))?;
        for definition in chart::objects(&text)? {
            plane.apply(&definition).await?;
        }
        // With it come its paths, and what /openapi/v2 says of it.
        let described = format!("/apis/monitoring.coreos.com/v1/namespaces/{{namespace}}/{kind}");
        eventually(kind, async || {
            let openapi = plane.call(Method::GET, "/openapi/v2", None).await?;
            Ok(openapi["paths"].get(&described).is_some())
        })
        .await?;
    }
    Ok(())
}

/// Pods of the DaemonSet, which are not about to go.
async fn pods(plane: &ControlPlane) -> Result<Vec<Value>> {
    let list = plane.call(Method::GET, &format!("/api/v1/namespaces/{NAMESPACE}/pods"), None).await?;
    Ok(list["items"].as_array().context("no list")?.clone())
}

/// The node for which the controller made a pod: a scheduler would find it by this.
fn wanted_node(pod: &Value) -> Result<String> {
    let required = "requiredDuringSchedulingIgnoredDuringExecution";
    let term = &pod["spec"]["affinity"]["nodeAffinity"][required]["nodeSelectorTerms"][0];
    Ok(term["matchFields"][0]["values"][0].as_str().with_context(|| format!("for no node: {pod}"))?.to_owned())
}

#[tokio::test]
async fn helm_installs_upgrades_and_uninstalls_and_every_node_gets_an_agent() -> Result<()> {
    let needs = [Need::Helm, Need::Kubernetes, Need::Controllers];
    if !can_run("helm_installs_upgrades_and_uninstalls_and_every_node_gets_an_agent", &needs) {
        return Ok(());
    }
    let place = Place::Host;
    let plane = ControlPlane::start(&place).await?;
    let names = [
        "daemonset-controller",
        "endpointslice-controller",
        "garbage-collector-controller",
        "validatingadmissionpolicy-status-controller",
    ];
    let controllers = Controllers::start(&place, &plane, &names)?;
    installed(&plane).await.with_context(|| controllers.log())
}

async fn installed(plane: &ControlPlane) -> Result<()> {
    // One node is new, one is tainted in every way, as one with GPUs that is about to go.
    let every: Vec<_> = ["NoSchedule", "NoExecute", "PreferNoSchedule"]
        .iter()
        .map(|effect| json!({ "key": format!("taint-{effect}"), "effect": effect }))
        .collect();
    let disrupted = json!({ "key": "karpenter.sh/disrupted", "effect": "NoSchedule" });
    for (name, taints) in [("new", vec![]), ("tainted", [every, vec![disrupted]].concat())] {
        let labels = json!({ "kubernetes.io/os": "linux", "topology.kubernetes.io/zone": format!("zone-of-{name}") });
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": labels },
            "spec": { "taints": taints } });
        plane.apply(&node).await?;
    }
    let helm = Helm::new()?.with(plane.admin_kubeconfig(NAMESPACE)?);
    let chart = chart::path().display().to_string();
    let install = ["install", RELEASE, &chart, "--namespace", NAMESPACE, "--create-namespace"];
    let scaler = json!({ "enabled": true, "actuators": { "deletionCost": "on" } });
    let output = helm.run(&install, &json!({ "scaler": scaler })).await?;
    ensure!(output.status.success(), "helm install: {}", output.stderr);
    for note in ["darter preflight", "no node can pull that", "upgrades keep it", "darter-scaler decides"] {
        ensure!(output.stdout.contains(note), "the notes do not say `{note}`: {}", output.stdout);
    }
    eventually("every node has a pod", async || Ok(pods(plane).await?.len() == 2)).await?;
    let mut nodes = Vec::new();
    for pod in pods(plane).await? {
        let (name, node) = (pod["metadata"]["name"].as_str().context("no name")?, wanted_node(&pod)?);
        bind(plane, name, &node).await?;
        let bound = plane.call(Method::GET, &format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}"), None).await?;
        // The kubelet mounts a token only where this was added.
        let mut volumes = bound["spec"]["volumes"].as_array().context("no volumes")?.iter();
        let is_token =
            |volume: &Value| volume["name"].as_str().is_some_and(|name| name.starts_with("kube-api-access-"));
        ensure!(volumes.any(is_token), "no token: {bound}");
        // What DARTER_SWARM_ZONE is taken from.
        assert_eq!(bound["metadata"]["labels"]["topology.kubernetes.io/zone"], json!(format!("zone-of-{node}")));
        nodes.push(node);
    }
    nodes.sort();
    assert_eq!(nodes, ["new", "tainted"]);
    discovered(plane).await?;
    type_checked(plane).await?;
    // An upgrade changes the pods, and keeps the key, and the scaler's certificate.
    let secret = format!("/api/v1/namespaces/{NAMESPACE}/secrets/darter-swarm");
    let tls = format!("/api/v1/namespaces/{NAMESPACE}/secrets/darter-scaler-tls");
    let certificate = plane.call(Method::GET, &tls, None).await?;
    ensure!(certificate["data"]["tls.crt"].is_string(), "no certificate");
    let set = format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/darter");
    let (key, before) = (plane.call(Method::GET, &secret, None).await?, plane.call(Method::GET, &set, None).await?);
    let upgrade = ["upgrade", RELEASE, &chart, "--namespace", NAMESPACE];
    let output = helm.run(&upgrade, &json!({ "config": { "log": { "format": "json" } }, "scaler": scaler })).await?;
    ensure!(output.status.success(), "helm upgrade: {}", output.stderr);
    assert_eq!(plane.call(Method::GET, &secret, None).await?["data"], key["data"], "another swarm key");
    assert_eq!(plane.call(Method::GET, &tls, None).await?["data"], certificate["data"], "another certificate");
    let after = plane.call(Method::GET, &set, None).await?;
    let config = |set: &Value| set["spec"]["template"]["metadata"]["annotations"]["darter.dev/config"].clone();
    assert_ne!(config(&before), config(&after));
    // helm asks this cluster, and it has no such kind: what runs stays as it is.
    let output = helm.run(&upgrade, &json!({ "podMonitor": { "enabled": true } })).await?;
    let told = output.stderr.contains("podMonitor.enabled: this cluster has no monitoring.coreos.com/v1");
    ensure!(!output.status.success() && told, "{}", output.stderr);
    helm.call(&["uninstall", RELEASE, "--namespace", NAMESPACE]).await?;
    // Each agent is asked to stop, and has time to put hosts.toml back: no pod is just taken away.
    eventually("the pods are asked to stop", async || {
        Ok(pods(plane).await?.iter().all(|pod| pod["metadata"]["deletionTimestamp"].is_string()))
    })
    .await?;
    let graces: Vec<_> = pods(plane)
        .await?
        .iter()
        .filter(|pod| pod["spec"]["nodeName"].is_string())
        .map(|pod| pod["metadata"]["deletionGracePeriodSeconds"].clone())
        .collect();
    assert_eq!(graces, [30, 30]);
    for gone in [secret, tls, set] {
        let answer = plane.call(Method::GET, &gone, None).await;
        ensure!(answer.is_err_and(|error| format!("{error:#}").contains("404")), "{gone} is still there");
    }
    Ok(())
}

/// As the scheduler and the kubelet do: the pod has its node, and there its address.
async fn bind(plane: &ControlPlane, pod: &str, node: &str) -> Result<()> {
    let at = format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}");
    let binding = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": pod, "namespace": NAMESPACE },
        "target": { "apiVersion": "v1", "kind": "Node", "name": node } });
    plane.call(Method::POST, &format!("{at}/binding"), Some(("application/json", &binding))).await?;
    let ip = if node == "new" { "10.0.0.1" } else { "10.0.0.2" };
    let status = json!({ "status": { "phase": "Running", "hostIP": ip, "podIP": ip, "podIPs": [{ "ip": ip }] } });
    plane.call(Method::PATCH, &format!("{at}/status"), Some(("application/merge-patch+json", &status))).await?;
    Ok(())
}

/// Agents find each other by the Service though none of them is ready, at the port that their configuration names.
async fn discovered(plane: &ControlPlane) -> Result<()> {
    let path = format!(
        "/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices?labelSelector=kubernetes.io/service-name=darter"
    );
    let mut found = Value::Null;
    let both = eventually("both are endpoints", async || {
        found = plane.call(Method::GET, &path, None).await?;
        let endpoints = found["items"].as_array().into_iter().flatten();
        let endpoints = endpoints.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        // As good as ready, for those who ask the DNS.
        let endpoints = endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true);
        let mut addresses: Vec<_> = endpoints.map(|endpoint| endpoint["addresses"][0].clone()).collect();
        addresses.sort_by_key(Value::to_string);
        Ok(addresses == ["10.0.0.1", "10.0.0.2"])
    });
    both.await.with_context(|| found.to_string())?;
    let ports = found["items"][0]["ports"].as_array().context("no ports")?;
    let control = ports.iter().find(|port| port["name"] == "control").context("no port `control`")?;
    assert_eq!(control["port"], 4002);
    Ok(())
}

/// The admission policies' expressions have the types that they should.
async fn type_checked(plane: &ControlPlane) -> Result<()> {
    let policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies";
    let checked = async |name: &str| -> Result<Value> {
        let mut policy = Value::Null;
        let done = eventually("the policy is type-checked", async || {
            policy = plane.call(Method::GET, &format!("{policies}/{name}"), None).await?;
            Ok(policy["status"]["observedGeneration"] == policy["metadata"]["generation"])
        });
        done.await?;
        Ok(policy["status"]["typeChecking"].clone())
    };
    for name in ["gpu-system-darter-node", "gpu-system-darter-pod", "gpu-system-darter-scaler"] {
        assert_eq!(checked(name).await?, json!({}), "{name}");
    }
    // The checker finds what is wrong.
    let mut wrong = plane.call(Method::GET, &format!("{policies}/gpu-system-darter-node"), None).await?;
    wrong["metadata"] = json!({ "name": "wrong" });
    wrong["spec"]["validations"] = json!([{ "expression": "object.spec.taint.size() == 0" }]);
    plane.call(Method::POST, policies, Some(("application/json", &wrong))).await?;
    let told = checked("wrong").await?.to_string();
    ensure!(told.contains("undefined field 'taint'"), "{told}");
    Ok(())
}
