//! What an agent may do at a real API server with the rights of the chart: to its own node and its own pod, and
//! there to one taint, one condition and one annotation.

use anyhow::{Context as _, Result, ensure};
use darter_tests::chart::{Helm, NAMESPACE, find};
use darter_tests::http::Answer;
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::Place;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::{Method, StatusCode};
use serde_json::{Value, json};

const MERGE: &str = "application/merge-patch+json";
const JSON: &str = "application/json";
const JSON_PATCH: &str = "application/json-patch+json";
const APPLY: &str = "application/apply-patch+yaml";
const NODE: &str = "/api/v1/nodes/a";
const POD: &str = "/api/v1/namespaces/gpu-system/pods/agent-a";

/// A request of an agent, and what a refusal has to say.
struct Ask {
    what: &'static str,
    method: Method,
    path: String,
    media_type: &'static str,
    body: Value,
    refusal: &'static str,
}

fn patch(what: &'static str, path: &str, body: Value, refusal: &'static str) -> Ask {
    Ask { what, method: Method::PATCH, path: path.to_owned(), media_type: MERGE, body, refusal }
}

impl Ask {
    fn typed(mut self, media_type: &'static str) -> Self {
        self.media_type = media_type;
        self
    }

    fn by(mut self, method: Method) -> Self {
        (self.method, self.media_type) = (method, JSON);
        self
    }

    async fn send(&self, plane: &ControlPlane, token: &str) -> Result<Answer> {
        let body = Some((self.media_type, &self.body));
        plane.call_as(token, self.method.clone(), &self.path, body).await.context(self.what)
    }
}

/// What agents do.
fn allowed() -> Vec<Ask> {
    let now = "2026-01-01T00:00:00Z";
    let condition = json!({ "type": "darter.dev/GpuReady", "status": "True", "reason": "Ready", "message": "",
        "lastHeartbeatTime": now, "lastTransitionTime": now });
    let status = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "a" },
        "status": { "conditions": [condition] } });
    let mut other = status.clone();
    other["status"]["conditions"][0]["status"] = json!("False");
    let gone = json!([{ "op": "test", "path": "/spec/taints/0/key", "value": "darter.dev/not-ready" },
        { "op": "remove", "path": "/spec/taints/0" }]);
    let lease = |value: Value| json!({ "metadata": { "annotations": { "karpenter.sh/do-not-disrupt": value } } });
    let apply = format!("{NODE}/status?fieldManager=darter-agent&force=true");
    vec![
        patch("its condition", &apply, status, "").typed(APPLY),
        patch("its condition, again", &apply, other, "").typed(APPLY),
        patch("the startup taint off", NODE, gone, "").typed(JSON_PATCH),
        patch("a lease", POD, lease(json!("1h10m30s")), ""),
        patch("a longer lease", POD, lease(json!("7200s")), ""),
        patch("no lease", POD, lease(Value::Null), ""),
    ]
}

/// What one agent's token must not be able to do, though RBAC allows it.
fn forbidden() -> Vec<Ask> {
    let labels = json!({ "metadata": { "labels": { "node-role.kubernetes.io/control-plane": "" } } });
    let annotation = |key: &str, value: &str| json!({ "metadata": { "annotations": { key: value } } });
    let lease = annotation("karpenter.sh/do-not-disrupt", "10m");
    let taints = |list: Value| json!({ "spec": { "taints": list } });
    let ours = |effect: &str| json!({ "key": "darter.dev/not-ready", "effect": effect });
    let gpu = json!({ "key": "gpu", "value": "true", "effect": "NoSchedule" });
    let condition = |kind: &str| json!({ "status": { "conditions": [{ "type": kind, "status": "False" }] } });
    let image = json!({ "spec": { "containers": [{ "name": "agent", "image": "evil" }] } });
    let debugger = json!({ "spec": { "ephemeralContainers": [{ "name": "d", "image": "evil" }] } });
    let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "c" } });
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "new", "namespace": NAMESPACE },
        "spec": { "serviceAccountName": "darter", "containers": [{ "name": "a", "image": "evil" }] } });
    let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": { "name": "agent-b", "namespace": NAMESPACE } });
    let (other_node, pods) = (NODE.replace("nodes/a", "nodes/b"), "/api/v1/namespaces/gpu-system/pods");
    let (other_pod, elsewhere) = (format!("{pods}/agent-b"), POD.replace(NAMESPACE, "elsewhere"));
    let status = format!("{NODE}/status");
    let not_own_node = "may change no node but that of its pod";
    let not_own_pod = "may change no pod but its own";
    let strategic = "application/strategic-merge-patch+json";
    vec![
        patch("the taint of another node", &other_node, taints(json!([gpu])), not_own_node),
        patch(
            "a condition of another node",
            &format!("{other_node}/status"),
            condition("darter.dev/GpuReady"),
            not_own_node,
        )
        .typed(strategic),
        patch("a label", NODE, labels.clone(), "labels, annotations or anything else of a node's metadata"),
        patch("a label, by way of the status", &status, labels, "labels, annotations or anything else"),
        patch("an annotation of its node", NODE, annotation("a", "b"), "labels, annotations or anything else"),
        patch(
            "another taint off",
            NODE,
            taints(json!([ours("NoSchedule")])),
            "may change no taint but darter.dev/not-ready",
        ),
        patch(
            "another taint on",
            NODE,
            taints(json!([gpu, { "key": "a", "effect": "NoSchedule" }])),
            "may change no taint but",
        ),
        patch(
            "its own taint, against running pods",
            NODE,
            taints(json!([gpu, ours("NoExecute")])),
            "keeps pods away (NoSchedule)",
        ),
        patch(
            "no pods any more",
            NODE,
            json!({ "spec": { "unschedulable": true } }),
            "nothing of a node's spec but its taints",
        ),
        patch(
            "the provider's name",
            NODE,
            json!({ "spec": { "providerID": "aws:///x/i-1" } }),
            "nothing of a node's spec but",
        ),
        patch("another condition", &status, condition("Ready"), "may change no condition but darter.dev/GpuReady")
            .typed(strategic),
        patch("no conditions", &status, json!({ "status": { "conditions": null } }), "may change no condition but"),
        patch(
            "more GPUs",
            &status,
            json!({ "status": { "capacity": { "nvidia.com/gpu": "8" } } }),
            "nothing of a node's status but",
        ),
        patch("a new node", "/api/v1/nodes", node, "makes and deletes no nodes").by(Method::POST),
        patch("the lease of another pod", &other_pod, lease.clone(), not_own_pod),
        patch("of one of its name elsewhere", &elsewhere, lease, not_own_pod),
        patch("for ever", POD, annotation("karpenter.sh/do-not-disrupt", "true"), "has to be a duration"),
        patch(
            "another annotation",
            POD,
            annotation("a", "b"),
            "may change no annotation but karpenter.sh/do-not-disrupt",
        ),
        patch(
            "a label of its pod",
            POD,
            json!({ "metadata": { "labels": { "a": "b" } } }),
            "nothing of a pod's metadata but",
        ),
        patch("another image", POD, image, "nothing of a pod's spec or status").typed(strategic),
        patch(
            "a pod's status",
            &format!("{POD}/status"),
            json!({ "status": { "podIP": "10.0.0.9" } }),
            "runs nothing in them",
        ),
        patch("a program in its pod", &format!("{POD}/ephemeralcontainers"), debugger, "runs nothing in them")
            .typed(strategic),
        patch("a new pod", pods, pod, "makes, deletes and evicts no pods").by(Method::POST),
        patch(
            "another pod's eviction",
            &format!("{other_pod}/eviction"),
            eviction,
            "makes, deletes and evicts no pods",
        )
        .by(Method::POST),
        patch("its pod's end", POD, json!({}), "makes, deletes and evicts no pods").by(Method::DELETE),
        patch("its node's end", NODE, json!({}), "makes and deletes no nodes").by(Method::DELETE),
    ]
}

/// A cluster with the chart's objects, two nodes with an agent each, and a pod of the same name elsewhere.
pub(crate) struct Cluster {
    pub(crate) plane: ControlPlane,
    pub(crate) objects: Vec<Value>,
}

impl Cluster {
    pub(crate) async fn start() -> Result<Self> {
        Self::with("darter.dev/not-ready", &json!({})).await
    }

    /// Its nodes are made with this taint, the chart with these values.
    pub(crate) async fn with(taint: &str, values: &Value) -> Result<Self> {
        let objects = Helm::new()?.render(values).await?;
        let plane = ControlPlane::start(&Place::Host).await?;
        for namespace in [NAMESPACE, "elsewhere"] {
            plane.namespace(namespace).await?;
        }
        for object in &objects {
            plane.apply(object).await?;
        }
        let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "name": "darter", "namespace": "elsewhere" } });
        plane.apply(&account).await?;
        for (node, namespace) in [("a", NAMESPACE), ("b", NAMESPACE), ("a", "elsewhere")] {
            let taints = json!([{ "key": taint, "effect": "NoSchedule" },
                { "key": "gpu", "value": "true", "effect": "NoSchedule" }]);
            let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node, "labels": { "l": "v" } },
                "spec": { "taints": taints } });
            plane.apply(&object).await?;
            let conditions = json!({ "status": { "conditions": [{ "type": "Ready", "status": "True" }] } });
            let strategic = "application/strategic-merge-patch+json";
            plane.call(Method::PATCH, &format!("/api/v1/nodes/{node}/status"), Some((strategic, &conditions))).await?;
            let template = &find(&objects, "DaemonSet", "darter")?["spec"]["template"];
            let mut pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"] });
            pod["metadata"]["name"] = json!(format!("agent-{node}"));
            pod["metadata"]["namespace"] = json!(namespace);
            pod["spec"]["nodeName"] = json!(node);
            plane.apply(&pod).await?;
        }
        Ok(Self { plane, objects })
    }

    /// A token as the kubelet mounts it in a pod. Without a pod: as anybody gets it who may ask for one.
    async fn token(&self, pod: Option<&str>) -> Result<String> {
        self.token_for(pod, &json!({})).await
    }

    /// The same for an audience of its own, if `spec` says one.
    pub(crate) async fn token_for(&self, pod: Option<&str>, spec: &Value) -> Result<String> {
        let mut request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec });
        if let Some(name) = pod {
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}");
            let uid = &self.plane.call(Method::GET, &path, None).await?["metadata"]["uid"];
            request["spec"]["boundObjectRef"] = json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid });
        }
        let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/darter/token");
        let answer = self.plane.call(Method::POST, &path, Some((JSON, &request))).await?;
        Ok(answer["status"]["token"].as_str().context("no token")?.to_owned())
    }

    /// Waits until the policies hold, which takes a moment after they are made, and with them the rights.
    pub(crate) async fn holds(&self, token: &str) -> Result<()> {
        let annotation = json!({ "metadata": { "annotations": { "a": "b" } } });
        for path in [NODE, POD] {
            let (dry, mut last) = (format!("{path}?dryRun=All"), String::new());
            let holds = eventually("the policies hold", async || {
                let answer = self.plane.call_as(token, Method::PATCH, &dry, Some((MERGE, &annotation))).await?;
                last = answer.text();
                Ok(answer.status.is_client_error() && last.contains("ValidatingAdmissionPolicy 'gpu-system-darter-"))
            });
            holds.await.with_context(|| format!("{path}: {last}"))?;
        }
        let events = async || self.may(token, "default", "create", "events.k8s.io:events").await;
        eventually("the rights are there", events).await
    }

    /// Whether a token's rights reach so far, by RBAC alone.
    pub(crate) async fn may(&self, token: &str, namespace: &str, verb: &str, kind: &str) -> Result<bool> {
        let (group, resource) = kind.split_once(':').unwrap_or(("", kind));
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let asked = json!({ "namespace": namespace, "verb": verb, "group": group, "resource": resource, "subresource": subresource });
        let review = json!({ "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": { "resourceAttributes": asked } });
        let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
        let answer = self.plane.call_as(token, Method::POST, path, Some((JSON, &review))).await?;
        let answer: Value = serde_json::from_slice(&answer.body)?;
        answer["status"]["allowed"].as_bool().with_context(|| format!("no answer: {answer}"))
    }
}

#[tokio::test]
async fn the_chart_grants_what_an_agent_needs_and_no_more() -> Result<()> {
    if !can_run("the_chart_grants_what_an_agent_needs_and_no_more", &[Need::Helm, Need::Kubernetes]) {
        return Ok(());
    }
    let cluster = Cluster::start().await?;
    let token = cluster.token(Some("agent-a")).await?;
    let events = "events.k8s.io:events";
    let granted = [
        ("", "nodes", &["get", "list", "watch", "patch"][..]),
        ("", "nodes/status", &["patch"]),
        (NAMESPACE, "nodes", &["get", "list", "watch", "patch"]),
        (NAMESPACE, "nodes/status", &["patch"]),
        ("elsewhere", "nodes", &["get", "list", "watch", "patch"]),
        ("elsewhere", "nodes/status", &["patch"]),
        ("default", "nodes", &["get", "list", "watch", "patch"]),
        ("default", "nodes/status", &["patch"]),
        (NAMESPACE, "pods", &["get", "patch"]),
        (NAMESPACE, "discovery.k8s.io:endpointslices", &["get", "list", "watch"]),
        ("default", events, &["create", "patch"]),
    ];
    let kinds = [
        "nodes",
        "nodes/status",
        "pods",
        "pods/status",
        "pods/exec",
        "pods/eviction",
        "secrets",
        "configmaps",
        "services",
        "apps:daemonsets",
        "discovery.k8s.io:endpointslices",
        events,
        "serviceaccounts/token",
    ];
    for namespace in ["", NAMESPACE, "elsewhere", "default"] {
        for kind in kinds {
            for verb in ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"] {
                let should =
                    granted.iter().any(|(at, of, verbs)| *at == namespace && *of == kind && verbs.contains(&verb));
                let may = cluster.may(&token, namespace, verb, kind).await?;
                assert_eq!(may, should, "{verb} {kind} in `{namespace}`");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_agent_changes_its_own_node_and_pod_alone_and_of_them_only_what_is_its_business() -> Result<()> {
    let name = "an_agent_changes_its_own_node_and_pod_alone_and_of_them_only_what_is_its_business";
    if !can_run(name, &[Need::Helm, Need::Kubernetes]) {
        return Ok(());
    }
    let cluster = Cluster::start().await?;
    let plane = &cluster.plane;
    // RBAC lets it do everything to nodes and pods: what is refused below is refused by the policies.
    let all = ["nodes", "nodes/status", "pods", "pods/status", "pods/eviction", "pods/ephemeralcontainers"];
    plane
        .allow_everywhere(NAMESPACE, "darter", &json!([{ "apiGroups": [""], "resources": all, "verbs": ["*"] }]))
        .await?;
    let token = cluster.token(Some("agent-a")).await?;
    cluster.holds(&token).await?;
    let refused = |answer: &Answer, why: &str| {
        let text = answer.text();
        // Of which nobody takes it for a conflict.
        answer.status == StatusCode::FORBIDDEN
            && text.contains("ValidatingAdmissionPolicy 'gpu-system-darter-")
            && text.contains(why)
    };
    let asks = forbidden();
    // A token that is bound to no pod has no node of its own, nor has one of a pod on another node this one.
    for (token, which) in [(cluster.token(None).await?, "of no pod"), (cluster.token(Some("agent-b")).await?, "of b")] {
        for ask in allowed() {
            let answer = ask.send(plane, &token).await?;
            let why = "and only with the token of that pod";
            ensure!(refused(&answer, why), "{} with a token {which}: {} {}", ask.what, answer.status, answer.text());
        }
    }
    for ask in allowed() {
        let answer = ask.send(plane, &token).await?;
        ensure!(answer.status.is_success(), "{}: {} {}", ask.what, answer.status, answer.text());
    }
    // As it was before the agent took its taint off.
    let node = plane.call(Method::GET, NODE, None).await?;
    assert_eq!(node["spec"]["taints"], json!([{ "key": "gpu", "value": "true", "effect": "NoSchedule" }]));
    for ask in &asks {
        let answer = ask.send(plane, &token).await?;
        ensure!(refused(&answer, ask.refusal), "{}: {} {}", ask.what, answer.status, answer.text());
    }
    // Whoever is no agent is not met by the policies.
    plane.service_account(NAMESPACE, "other").await?;
    let other = plane.service_account(NAMESPACE, "other").await?;
    plane
        .allow_everywhere(
            NAMESPACE,
            "other",
            &json!([{ "apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"] }]),
        )
        .await?;
    let label = patch("a label", NODE, json!({ "metadata": { "labels": { "l": "w" } } }), "");
    eventually("another account may", async || Ok(label.send(plane, &other).await?.status.is_success())).await?;
    // Without the policies every one of these would have been taken.
    for object in cluster.objects.iter().filter(|object| object["kind"] == "ValidatingAdmissionPolicyBinding") {
        plane.delete(object).await?;
    }
    for ask in &asks {
        let mut last = String::new();
        let taken = eventually(ask.what, async || {
            let answer = ask.send(plane, &token).await?;
            last = format!("{} {}", answer.status, answer.text());
            ensure!(answer.status.is_success() || refused(&answer, ""), "{}", answer.text());
            Ok(answer.status.is_success())
        });
        taken.await.with_context(|| format!("{}, without the policies: {last}", ask.what))?;
    }
    Ok(())
}

#[tokio::test]
async fn the_taint_that_an_agent_may_take_off_is_that_of_its_configuration() -> Result<()> {
    if !can_run("the_taint_that_an_agent_may_take_off_is_that_of_its_configuration", &[Need::Helm, Need::Kubernetes]) {
        return Ok(());
    }
    let off = |key: &str, rest: Value| (format!("{key} off"), json!({ "spec": { "taints": rest } }));
    let gpu = json!({ "key": "gpu", "value": "true", "effect": "NoSchedule" });
    for (key, says) in
        [("team.example/not-ready", "may change no taint but team.example/not-ready"), ("", "may change no taint")]
    {
        let on = if key.is_empty() { "darter.dev/not-ready" } else { key };
        let cluster = Cluster::with(on, &json!({ "config": { "kubernetes": { "startup_taint": key } } })).await?;
        let token = cluster.token(Some("agent-a")).await?;
        let send = async |body: &Value, dry: &str| {
            let path = format!("{NODE}?{dry}");
            cluster.plane.call_as(&token, Method::PATCH, &path, Some((MERGE, body))).await
        };
        // Another taint never, and a policy holds a moment after it is made.
        let (what, other) = off("gpu", json!([{ "key": on, "effect": "NoSchedule" }]));
        let mut last = String::new();
        let refused = eventually(&what, async || {
            let answer = send(&other, "dryRun=All").await?;
            last = answer.text();
            Ok(answer.status == StatusCode::FORBIDDEN && last.contains(says))
        });
        refused.await.with_context(|| format!("`{key}`: {last}"))?;
        let (what, own) = off(on, json!([gpu]));
        let answer = send(&own, "").await?;
        let may = !key.is_empty();
        ensure!(answer.status.is_success() == may, "{what}: {} {}", answer.status, answer.text());
        ensure!(may || answer.text().contains(says), "{what}: {}", answer.text());
    }
    Ok(())
}
