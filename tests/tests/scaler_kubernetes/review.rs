//! Whose a token is, by the word of a real API server: tokens of service accounts, bound to pods, for an audience.

use std::sync::Arc;

use anyhow::{Result, ensure};
use darter_base::metrics::ReasonLabels;
use darter_scaler::kubernetes::{Denied, Metrics, Reviews, Right};
use darter_tests::tools::can_run;
use http::Method;
use serde_json::{Value, json};

use crate::{Cluster, NEEDS, client, node};

const AUDIENCE: &str = "darter-scaler";

struct Stage {
    cluster: Cluster,
    reviews: Reviews,
    metrics: Arc<Metrics>,
}

impl Stage {
    /// Agents on the nodes gpu-1 and gpu-2, and a pod of somebody else on gpu-1.
    async fn start() -> Result<Self> {
        let cluster = Cluster::start(&[], &[]).await?;
        for account in ["darter", "other"] {
            cluster.plane.service_account("gpu", account).await?;
        }
        for name in ["gpu-1", "gpu-2"] {
            cluster.plane.apply(&node(name)).await?;
        }
        for (name, account, node) in
            [("agent-1", "darter", "gpu-1"), ("agent-2", "darter", "gpu-2"), ("other-1", "other", "gpu-1")]
        {
            cluster.agent(name, account, node).await?;
        }
        let metrics = Arc::new(Metrics::default());
        let agents = ["gpu/darter".to_owned()];
        let reviews = Reviews::new(cluster.client().await?, AUDIENCE, &agents, metrics.clone());
        Ok(Self { cluster, reviews, metrics })
    }

    async fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> Result<String> {
        self.cluster.token(account, audience, pod).await
    }

    fn count(&self, outcome: &'static str) -> u64 {
        self.metrics.reviews.get_or_create(&ReasonLabels { reason: outcome }).get()
    }
}

fn forbidden<T>(came: Result<T, Denied>, part: &str) -> Result<()> {
    match came {
        Err(Denied::Forbidden(why)) if why.contains(part) => Ok(()),
        Err(other) => anyhow::bail!("not forbidden by `{part}`: {other:?}"),
        Ok(_) => anyhow::bail!("allowed, and not forbidden by `{part}`"),
    }
}

#[tokio::test]
async fn an_agent_is_taken_for_the_node_of_its_pod_and_for_no_other() -> Result<()> {
    if !can_run("an_agent_is_taken_for_the_node_of_its_pod_and_for_no_other", &NEEDS) {
        return Ok(());
    }
    let stage = Stage::start().await?;
    let agent = stage.token("darter", AUDIENCE, Some("agent-1")).await?;
    let who = stage.reviews.agent_of(&agent, "gpu-1").await?;
    let node = stage.cluster.get("/api/v1/nodes/gpu-1").await?;
    ensure!(who.node.as_deref() == Some("gpu-1") && who.pod == Some(("gpu".to_owned(), "agent-1".to_owned())));
    ensure!(who.node_uid.as_deref() == node["metadata"]["uid"].as_str(), "{who:?}");
    forbidden(stage.reviews.agent_of(&agent, "gpu-2").await, "the agent of node gpu-1 may not report as node gpu-2")?;
    let unbound = stage.token("darter", AUDIENCE, None).await?;
    forbidden(stage.reviews.agent_of(&unbound, "gpu-1").await, "bound to no pod")?;
    let other = stage.token("other", AUDIENCE, Some("other-1")).await?;
    forbidden(stage.reviews.agent_of(&other, "gpu-1").await, "system:serviceaccount:gpu:other is no agent")?;
    ensure!(stage.count("accepted") == 4, "all of these are somebody");
    Ok(())
}

#[tokio::test]
async fn a_token_for_somebody_else_or_of_a_pod_that_is_gone_is_not_accepted_and_not_asked_about_again_at_once()
-> Result<()> {
    let test = "a_token_for_somebody_else_or_of_a_pod_that_is_gone_is_not_accepted_and_not_asked_about_again_at_once";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start().await?;
    let gone = stage.token("darter", AUDIENCE, Some("agent-2")).await?;
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "namespace": "gpu", "name": "agent-2" } });
    let path = format!("{}?gracePeriodSeconds=0", darter_tests::kubernetes::path(&pod)?);
    stage.cluster.plane.call(Method::DELETE, &path, None).await?;
    let theirs = stage.token("darter", "https://kubernetes.default.svc", Some("agent-1")).await?;
    let tokens = [gone, theirs, "made-up".to_owned(), String::new(), "x".repeat(100_000)];
    for token in &tokens {
        let came = stage.reviews.agent_of(token, "gpu-1").await;
        ensure!(matches!(came, Err(Denied::Unauthenticated(_))), "{came:?}");
        // No token is in what is said of it.
        ensure!(token.len() < 8 || !format!("{came:?}").contains(token.as_str()));
    }
    // Nobody is asked about them again: there is nobody to ask.
    stage.cluster.plane.kill_api().await?;
    for token in &tokens {
        let came = stage.reviews.agent_of(token, "gpu-1").await;
        ensure!(matches!(came, Err(Denied::Unauthenticated(_))), "{came:?}");
    }
    Ok(())
}

#[tokio::test]
async fn while_the_api_server_is_away_nobody_new_gets_in_and_who_was_in_stays() -> Result<()> {
    if !can_run("while_the_api_server_is_away_nobody_new_gets_in_and_who_was_in_stays", &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start().await?;
    let (known, new) = (
        stage.token("darter", AUDIENCE, Some("agent-1")).await?,
        stage.token("darter", AUDIENCE, Some("agent-2")).await?,
    );
    stage.reviews.agent_of(&known, "gpu-1").await?;
    stage.cluster.plane.kill_api().await?;
    stage.reviews.agent_of(&known, "gpu-1").await?;
    let came = stage.reviews.agent_of(&new, "gpu-2").await;
    ensure!(matches!(came, Err(Denied::Unavailable(_))), "{came:?}");
    stage.cluster.plane.start_api().await?;
    stage.reviews.agent_of(&new, "gpu-2").await?;
    Ok(())
}

#[tokio::test]
async fn who_may_write_demand_is_said_by_a_role_for_one_namespace_and_a_refusal_names_the_role() -> Result<()> {
    if !can_run("who_may_write_demand_is_said_by_a_role_for_one_namespace_and_a_refusal_names_the_role", &NEEDS) {
        return Ok(());
    }
    let stage = Stage::start().await?;
    let token = stage.token("other", AUDIENCE, None).await?;
    let demand = |namespace: &str| Right {
        verb: "update",
        resource: "demands",
        namespace: Some(namespace.to_owned()),
        name: Some("serve".to_owned()),
    };
    let rules: Value = json!([{ "apiGroups": ["darter.dev"], "resources": ["demands"], "verbs": ["update"] }]);
    let plane = &stage.cluster.plane;
    let metadata = json!({ "namespace": "team", "name": "demand" });
    let api = "rbac.authorization.k8s.io/v1";
    plane.apply(&json!({ "apiVersion": api, "kind": "Role", "metadata": metadata, "rules": rules })).await?;
    plane
        .apply(&json!({ "apiVersion": api, "kind": "RoleBinding", "metadata": metadata,
            "subjects": [{ "kind": "ServiceAccount", "name": "other", "namespace": "gpu" }],
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "demand" } }))
        .await?;
    // RBAC hears of it in a moment; a fresh asker each time, as this one remembers.
    darter_tests::stage::eventually("the right is there", async || {
        let reviews = Reviews::new(client(&stage.cluster.kubeconfig()?).await?, AUDIENCE, &[], stage.metrics.clone());
        Ok(reviews.may(&token, &demand("team")).await.is_ok())
    })
    .await?;
    stage.reviews.may(&token, &demand("team")).await?;
    let way_out = "apiGroups darter.dev, resources demands, verbs update";
    forbidden(stage.reviews.may(&token, &demand("gpu")).await, way_out)?;
    let freeze = Right { verb: "update", resource: "freezes", namespace: None, name: None };
    forbidden(stage.reviews.may(&token, &freeze).await, "may not update freezes")
}

#[tokio::test]
async fn many_agents_that_come_back_at_once_are_all_heard() -> Result<()> {
    if !can_run("many_agents_that_come_back_at_once_are_all_heard", &NEEDS) {
        return Ok(());
    }
    let stage = Stage::start().await?;
    let mut tokens = Vec::new();
    // As many tokens as an API server on a busy machine makes quickly; each is asked about by itself.
    for _ in 0..60 {
        tokens.push(stage.token("darter", AUDIENCE, Some("agent-1")).await?);
    }
    let asks = tokens.iter().map(|token| stage.reviews.agent_of(token, "gpu-1"));
    for came in futures_util::future::join_all(asks).await {
        came?;
    }
    Ok(())
}
