//! What is watched becomes facts: of nodes and claims, of pods, pools and workloads; and what is not there is no
//! trouble.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_base::metrics::ReasonLabels;
use darter_scaler::fleet::{Claim, Fact, Kind, NodeFact, PodFact, PoolFact, WorkloadFact};
use darter_scaler::kubernetes::{Metrics, Settings, Watches};
use darter_tests::stage::eventually;
use darter_tests::tools::{self, can_run};
use http::Method;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{Cluster, KARPENTER, KEDA, NEEDS, claim, node, pod};

/// Past this, what is to be heard does not come.
const PATIENCE: Duration = Duration::from_secs(90);

/// Who listens, and what it has heard: as the fleet has it.
pub(crate) struct Ear {
    facts: mpsc::Receiver<Fact>,
    pub(crate) nodes: BTreeMap<String, NodeFact>,
    pub(crate) pods: BTreeMap<String, PodFact>,
    pub(crate) pools: BTreeMap<String, PoolFact>,
    pub(crate) workloads: BTreeMap<String, WorkloadFact>,
    /// How often the API server was heard.
    pub(crate) watched: u32,
    /// Lists that were through, of each kind.
    pub(crate) lists: BTreeMap<Kind, u32>,
    pub(crate) metrics: Arc<Metrics>,
    stop: CancellationToken,
}

impl Ear {
    pub(crate) fn start(settings: &Settings) -> Self {
        // A queue that is soon full: nothing is lost by that.
        let (sender, facts) = mpsc::channel(1);
        let (metrics, stop) = (Arc::new(Metrics::default()), CancellationToken::new());
        tokio::spawn(Watches::new(settings, metrics.clone(), sender).run(stop.clone()));
        Self {
            facts,
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            pools: BTreeMap::new(),
            workloads: BTreeMap::new(),
            watched: 0,
            lists: BTreeMap::new(),
            metrics,
            stop,
        }
    }

    /// Listens until it is so.
    pub(crate) async fn hears(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) -> Result<()> {
        let end = tokio::time::Instant::now() + PATIENCE;
        while !is_so(self) {
            let fact = tokio::time::timeout_at(end, self.facts.recv()).await;
            let fact = fact.with_context(|| format!("not heard: {what}; {:?} {:?}", self.nodes, self.pods))?;
            self.take(fact.context("nobody watches any more")?);
        }
        Ok(())
    }

    /// Listens for so long, whatever comes.
    pub(crate) async fn listens(&mut self, time: Duration) -> Result<()> {
        let end = tokio::time::Instant::now() + time;
        while let Ok(fact) = tokio::time::timeout_at(end, self.facts.recv()).await {
            self.take(fact.context("nobody watches any more")?);
        }
        Ok(())
    }

    fn take(&mut self, fact: Fact) {
        match fact {
            Fact::Node(node) => _ = self.nodes.insert(node.uid.clone(), node),
            Fact::NodeGone { uid } => _ = self.nodes.remove(&uid),
            Fact::Pod(pod) => _ = self.pods.insert(pod.uid.clone(), pod),
            Fact::PodGone { uid } => _ = self.pods.remove(&uid),
            Fact::Pool(pool) => _ = self.pools.insert(pool.name.clone(), pool),
            Fact::PoolGone { name } => _ = self.pools.remove(&name),
            Fact::Workload(workload) => _ = self.workloads.insert(workload.name.clone(), workload),
            Fact::WorkloadGone { name } => _ = self.workloads.remove(&name),
            Fact::Watched => self.watched += 1,
            Fact::Only { kind, uids } => {
                *self.lists.entry(kind).or_default() += 1;
                match kind {
                    Kind::Node => self.nodes.retain(|uid, _| uids.contains(uid)),
                    Kind::Pod => self.pods.retain(|uid, _| uids.contains(uid)),
                    Kind::Pool => self.pools.retain(|name, _| uids.contains(name)),
                    Kind::Workload => self.workloads.retain(|name, _| uids.contains(name)),
                }
            }
        }
    }

    pub(crate) fn node(&self, name: &str) -> Option<&NodeFact> {
        self.nodes.values().find(|node| node.name == name)
    }

    pub(crate) fn pod(&self, name: &str) -> Option<&PodFact> {
        self.pods.values().find(|pod| pod.name == name)
    }

    pub(crate) fn errors(&self, reason: &'static str) -> u64 {
        self.metrics.watch_errors.get_or_create(&ReasonLabels { reason }).get()
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn uid(object: &Value) -> Result<String> {
    Ok(object["metadata"]["uid"].as_str().context("no uid")?.to_owned())
}

#[tokio::test]
async fn a_node_is_heard_from_its_claim_to_its_end() -> Result<()> {
    if !can_run("a_node_is_heard_from_its_claim_to_its_end", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&KARPENTER, &[]).await?;
    let mut ear = Ear::start(&cluster.settings);
    let made = cluster.plane.apply(&claim("c")).await?;
    let claimed = Claim { name: "c".to_owned(), uid: uid(&made)? };
    ear.hears("it is coming", |ear| ear.node("c").is_some()).await?;
    let coming = NodeFact { created_ms_ago: 0, ..ear.node("c").context("gone")?.clone() };
    let expected = NodeFact {
        uid: claimed.uid.clone(),
        name: "c".to_owned(),
        pool: Some("gpu".to_owned()),
        claim: Some(claimed.clone()),
        gpus: 1,
        ..NodeFact::default()
    };
    ensure!(coming == expected, "{coming:?}");
    // It joins, with its startup taint.
    cluster.status(&made, json!({ "nodeName": "gpu-1", "capacity": { "nvidia.com/gpu": "8" } })).await?;
    let mut joining = node("gpu-1");
    joining["spec"] = json!({ "taints": [{ "key": "darter.dev/not-ready", "effect": "NoSchedule" }] });
    let joining = cluster.plane.apply(&joining).await?;
    ear.hears("it joined", |ear| ear.node("gpu-1").is_some_and(|node| node.claim.is_some() && node.gpus == 8)).await?;
    let joined = NodeFact { created_ms_ago: 0, ..ear.node("gpu-1").context("gone")?.clone() };
    let expected = NodeFact {
        uid: uid(&joining)?,
        name: "gpu-1".to_owned(),
        zone: Some("a".to_owned()),
        registered: true,
        tainted: true,
        gpus: 8,
        ..expected
    };
    ensure!(joined == expected, "{joined:?}");
    ear.hears("it is one node", |ear| ear.node("c").is_none()).await?;
    // Its taint goes, Karpenter marks it, and it is gone.
    let mut warm = node("gpu-1");
    warm["spec"] = json!({ "taints": [{ "key": "other", "effect": "NoSchedule" }] });
    cluster.plane.apply(&warm).await?;
    ear.hears("it is warm", |ear| ear.node("gpu-1").is_some_and(|node| !node.tainted && !node.deleting)).await?;
    warm["spec"] = json!({ "taints": [{ "key": "karpenter.sh/disrupted", "effect": "NoSchedule" }] });
    cluster.plane.apply(&warm).await?;
    ear.hears("it is leaving", |ear| ear.node("gpu-1").is_some_and(|node| node.deleting)).await?;
    cluster.plane.delete(&node("gpu-1")).await?;
    cluster.plane.delete(&claim("c")).await?;
    ear.hears("it is gone", |ear| ear.nodes.is_empty()).await
}

#[tokio::test]
async fn pods_with_gpus_pools_and_what_keda_scales_by_our_word_are_heard() -> Result<()> {
    if !can_run("pods_with_gpus_pools_and_what_keda_scales_by_our_word_are_heard", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&KARPENTER, &KEDA).await?;
    let plane = &cluster.plane;
    plane.apply(&node("gpu-1")).await?;
    let mut ear = Ear::start(&cluster.settings);
    let mut replica = pod("serve-5d4f-x", "gpu-1");
    replica["metadata"]["labels"]["pod-template-hash"] = json!("5d4f");
    replica["metadata"]["annotations"] = json!({ "controller.kubernetes.io/pod-deletion-cost": "-7" });
    replica["metadata"]["ownerReferences"] = json!([{ "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "name": "serve-5d4f", "uid": "rs", "controller": true }]);
    let made = plane.apply(&replica).await?;
    let mut plain = pod("web", "gpu-1");
    plain["spec"]["containers"][0]["resources"] = json!({});
    plane.apply(&plain).await?;
    ear.hears("the pod", |ear| ear.pod("serve-5d4f-x").is_some()).await?;
    let expected = PodFact {
        uid: uid(&made)?,
        namespace: "team".to_owned(),
        name: "serve-5d4f-x".to_owned(),
        node: Some("gpu-1".to_owned()),
        workload: Some("team/serve".to_owned()),
        gpus: 1,
        cost: -7,
        agent: false,
    };
    ensure!(ear.pod("serve-5d4f-x") == Some(&expected), "{:?}", ear.pods);
    // One that ended holds no GPU.
    cluster.status(&made, json!({ "phase": "Succeeded" })).await?;
    ear.hears("it ended", |ear| ear.pods.is_empty()).await?;
    plane.apply(&crate::spare::pool(Some(3))).await?;
    ear.hears("a pool", |ear| ear.pools.contains_key("gpu")).await?;
    plane.delete(&crate::spare::pool(None)).await?;
    ear.hears("no pool", |ear| ear.pools.is_empty()).await?;
    let metadata = json!({ "namespace": "team", "name": "serve" });
    let trigger = json!({ "type": "external-push",
        "metadata": { "scalerAddress": "darter-scaler.gpu.svc:4010", "target": "5" } });
    let scaled = json!({ "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": metadata,
        "spec": { "scaleTargetRef": { "name": "serve" }, "minReplicaCount": 1, "triggers": [trigger] } });
    plane.apply(&scaled).await?;
    let mut deployment = crate::spare::placeholders(2);
    deployment["metadata"] = metadata;
    deployment["spec"]["template"]["spec"]["nodeSelector"] = json!({ "karpenter.sh/nodepool": "gpu" });
    plane.apply(&deployment).await?;
    ear.hears("a workload", |ear| ear.workloads.get("team/serve").is_some_and(|serve| serve.gpus == 2)).await?;
    let serve = ear.workloads.get("team/serve").context("gone")?;
    ensure!((serve.pool.as_deref(), serve.least, serve.most) == (Some("gpu"), 1, 100), "{serve:?}");
    ensure!(serve.metadata.get("target").map(String::as_str) == Some("5"), "{serve:?}");
    plane.delete(&scaled).await?;
    ear.hears("no workload", |ear| ear.workloads.is_empty()).await?;
    ensure!(ear.pod("web").is_none());
    Ok(())
}

#[tokio::test]
async fn kinds_that_nobody_installed_are_no_trouble_and_are_heard_once_they_are_there() -> Result<()> {
    if !can_run("kinds_that_nobody_installed_are_no_trouble_and_are_heard_once_they_are_there", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], &[]).await?;
    let mut ear = Ear::start(&cluster.settings);
    cluster.plane.apply(&node("gpu-1")).await?;
    ear.hears("a node", |ear| ear.node("gpu-1").is_some()).await?;
    let known: u64 = ["not_found", "forbidden", "answer"].map(|reason| ear.errors(reason)).iter().sum();
    ensure!(known == 0, "what nobody installed is no error");
    // Another version of a kind is not what can be read, and no trouble either.
    let dir = tools::karpenter_kinds().context("no kinds of Karpenter")?;
    let old = json!({ "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": "nodeclaims.karpenter.sh" }, "spec": { "group": "karpenter.sh", "scope": "Cluster",
        "names": { "kind": "NodeClaim", "listKind": "NodeClaimList", "plural": "nodeclaims", "singular": "nodeclaim" },
        "versions": [{ "name": "v1beta1", "served": true, "storage": true,
            "schema": { "openAPIV3Schema": { "type": "object" } } }] } });
    cluster.plane.apply(&old).await?;
    let served = async || Ok(cluster.get("/apis/karpenter.sh/v1beta1/nodeclaims").await.is_ok());
    eventually("the old version is served", served).await?;
    cluster.plane.delete(&old).await?;
    let gone = async || Ok(cluster.get("/apis/karpenter.sh/v1beta1/nodeclaims").await.is_err());
    eventually("the old version is gone", gone).await?;
    cluster.plane.define(&dir, &KARPENTER).await?;
    cluster.plane.apply(&claim("c")).await?;
    ear.hears("a claim", |ear| ear.node("c").is_some()).await?;
    ensure!(["forbidden", "answer"].iter().all(|reason| ear.errors(reason) == 0));
    let call = cluster.plane.call(Method::GET, "/version", None).await?;
    ensure!(call["major"] == "1", "{call}");
    Ok(())
}
