//! A node's claim is deleted when it is that very claim, and when nobody says that it must not go.

use anyhow::{Context as _, Result, ensure};
use darter_scaler::decide::Action;
use darter_scaler::fleet::{Act, Claim, Outcome, Target};
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use http::Method;
use serde_json::{Value, json};

use crate::{Cluster, Hands, KARPENTER, NEEDS, claim, node, pod};

const CLAIM: &str = "/apis/karpenter.sh/v1/nodeclaims/c";

struct Stage {
    cluster: Cluster,
    hands: Hands,
    claim: Value,
}

fn remove(claim: Option<Claim>) -> Act {
    Act {
        action: Action::Remove { node: "uid-of-gpu-1".to_owned() },
        reason: "its warm-up does not end".to_owned(),
        target: Target::Node { uid: "uid-of-gpu-1".to_owned(), name: "gpu-1".to_owned(), claim },
    }
}

impl Stage {
    async fn start() -> Result<Self> {
        let cluster = Cluster::start(&KARPENTER, &[]).await?;
        cluster.plane.apply(&node("gpu-1")).await?;
        let claim = cluster.plane.apply(&claim("c")).await?;
        let hands = Hands::start(&cluster.client().await?, &cluster.settings);
        Ok(Self { cluster, hands, claim })
    }

    async fn remove(&mut self) -> Result<Outcome> {
        let uid = self.claim["metadata"]["uid"].as_str().context("no uid")?.to_owned();
        self.hands.act(remove(Some(Claim { name: "c".to_owned(), uid }))).await
    }

    async fn is_there(&self) -> Result<bool> {
        let list = self.cluster.get("/apis/karpenter.sh/v1/nodeclaims").await?;
        Ok(list["items"].as_array().context("no list")?.iter().any(|claim| claim["metadata"]["name"] == "c"))
    }

    async fn annotate(&self, path: &str, value: Option<&str>) -> Result<()> {
        let patch = json!({ "metadata": { "annotations": { "karpenter.sh/do-not-disrupt": value } } });
        self.cluster.plane.call(Method::PATCH, path, Some(("application/merge-patch+json", &patch))).await?;
        Ok(())
    }

    async fn held(&mut self, why: &str) -> Result<()> {
        let before = self.hands.errors("held");
        let came = self.remove().await?;
        ensure!(came == Outcome::Failed && self.is_there().await?, "{why}: {came:?}");
        ensure!(self.hands.errors("held") == before + 1, "{why}");
        Ok(())
    }
}

#[tokio::test]
async fn a_claim_is_deleted_with_an_event_on_its_node_and_only_if_it_is_that_very_one() -> Result<()> {
    if !can_run("a_claim_is_deleted_with_an_event_on_its_node_and_only_if_it_is_that_very_one", &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start().await?;
    let other = Claim { name: "c".to_owned(), uid: "another".to_owned() };
    ensure!(stage.hands.act(remove(Some(other))).await? == Outcome::Conflict && stage.is_there().await?);
    ensure!(stage.hands.act(remove(None)).await? == Outcome::Failed, "nothing is deleted but claims");
    ensure!(stage.remove().await? == Outcome::Done && !stage.is_there().await?);
    let events = async || stage.cluster.events("default", "Removed").await;
    eventually("an Event", async || Ok(!events().await?.is_empty())).await?;
    let said = ("gpu-1".to_owned(), "Its NodeClaim is deleted: its warm-up does not end".to_owned());
    ensure!(events().await? == [said]);
    // It is gone by now.
    ensure!(stage.remove().await? == Outcome::Conflict);
    Ok(())
}

#[tokio::test]
async fn a_budget_that_lets_nobody_go_or_a_word_against_it_holds_a_node() -> Result<()> {
    if !can_run("a_budget_that_lets_nobody_go_or_a_word_against_it_holds_a_node", &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start().await?;
    let pod_path = "/api/v1/namespaces/team/pods/serve-1";
    stage.cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    for path in ["/api/v1/nodes/gpu-1", CLAIM, pod_path] {
        stage.annotate(path, Some("true")).await?;
        stage.held(path).await?;
        stage.annotate(path, None).await?;
    }
    // A budget of other pods, and one that lets some go, hold nothing: tried last, as nothing stays then.
    let budget = |name: &str, app: &str| {
        json!({ "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
            "metadata": { "namespace": "team", "name": name },
            "spec": { "maxUnavailable": 1, "selector": { "matchLabels": { "app": app } } } })
    };
    for (name, app) in [("theirs", "other"), ("own", "serve")] {
        stage.cluster.plane.apply(&budget(name, app)).await?;
    }
    let allow = async |stage: &Stage, name: &str, allowed: u32| {
        let status = json!({ "disruptionsAllowed": allowed, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1,
            "observedGeneration": 1 });
        stage.cluster.status(&budget(name, "x"), status).await
    };
    allow(&stage, "theirs", 0).await?;
    allow(&stage, "own", 0).await?;
    stage.held("a budget").await?;
    allow(&stage, "own", 1).await?;
    ensure!(stage.remove().await? == Outcome::Done && !stage.is_there().await?);
    Ok(())
}
