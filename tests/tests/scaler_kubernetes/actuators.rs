//! The place in the row, at a real API server: one field of a pod, by our name, never over somebody else's word, and
//! only while this scaler leads.

use anyhow::{Context as _, Result, ensure};
use darter_scaler::decide::Action;
use darter_scaler::fleet::{Act, Outcome, Target};
use darter_scaler::kubernetes::{Election, Times, fenced};
use darter_tests::gate::Gate;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{Cluster, Hands, NEEDS, client, node, pod};

const COST: &str = "controller.kubernetes.io/pod-deletion-cost";
const PATH: &str = "/api/v1/namespaces/team/pods/serve-1";

pub(crate) fn rank(pod: &Value, cost: i32) -> Result<Act> {
    let uid = pod["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    Ok(Act {
        action: Action::Rank { node: "n".to_owned(), pod: uid.clone(), cost },
        reason: "it is idle".to_owned(),
        target: Target::Pod { uid, namespace: "team".to_owned(), name: "serve-1".to_owned() },
    })
}

fn cost(pod: &Value) -> Option<&str> {
    pod["metadata"]["annotations"][COST].as_str()
}

async fn start() -> Result<(Cluster, Value)> {
    let cluster = Cluster::start(&[], &[]).await?;
    cluster.plane.apply(&node("gpu-1")).await?;
    let pod = cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    Ok((cluster, pod))
}

#[tokio::test]
async fn a_pods_cost_is_one_field_of_ours_and_a_user_who_set_it_keeps_it() -> Result<()> {
    if !can_run("a_pods_cost_is_one_field_of_ours_and_a_user_who_set_it_keeps_it", &NEEDS) {
        return Ok(());
    }
    let (cluster, first) = start().await?;
    let mut hands = Hands::start(&cluster.client().await?, &cluster.settings);
    ensure!(hands.act(rank(&first, -300)?).await? == Outcome::Done);
    ensure!(hands.act(rank(&first, i32::MIN)?).await? == Outcome::Done);
    let pod = cluster.get(PATH).await?;
    ensure!(cost(&pod) == Some("-1000000"), "never weightless: {pod}");
    let fields = pod["metadata"]["managedFields"].as_array().context("no fields")?;
    let ours: Vec<_> = fields.iter().filter(|fields| fields["manager"] == "darter-scaler").collect();
    let annotation = json!({ "f:metadata": { "f:annotations": { format!("f:{COST}"): {} } } });
    ensure!(ours.len() == 1 && ours[0]["fieldsV1"] == annotation, "{ours:?}");
    // A user says something else: that stands, and is said.
    let users = json!({ "metadata": { "annotations": { COST: "77" } } });
    let body = Some(("application/merge-patch+json", &users));
    cluster.plane.call(Method::PATCH, &format!("{PATH}?fieldManager=a-user"), body).await?;
    ensure!(hands.act(rank(&first, -300)?).await? == Outcome::Conflict);
    ensure!(cost(&cluster.get(PATH).await?) == Some("77") && hands.errors("conflict") == 1);
    Ok(())
}

#[tokio::test]
async fn another_pod_of_the_same_name_is_left_alone_and_one_that_is_gone_is_not_made() -> Result<()> {
    if !can_run("another_pod_of_the_same_name_is_left_alone_and_one_that_is_gone_is_not_made", &NEEDS) {
        return Ok(());
    }
    let (cluster, first) = start().await?;
    let mut hands = Hands::start(&cluster.client().await?, &cluster.settings);
    cluster.plane.call(Method::DELETE, &format!("{PATH}?gracePeriodSeconds=0"), None).await?;
    let gone = hands.act(rank(&first, -300)?).await?;
    ensure!(gone == Outcome::Conflict, "{gone:?}");
    let second = cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    ensure!(hands.act(rank(&first, -300)?).await? == Outcome::Conflict);
    ensure!(cost(&cluster.get(PATH).await?).is_none());
    ensure!(hands.act(rank(&second, -300)?).await? == Outcome::Done);
    Ok(())
}

#[tokio::test]
async fn nothing_is_written_before_this_scaler_leads_and_after_it_led() -> Result<()> {
    if !can_run("nothing_is_written_before_this_scaler_leads_and_after_it_led", &NEEDS) {
        return Ok(());
    }
    let (mut cluster, pod) = start().await?;
    let times = Times { lease: secs(6), renew_within: secs(4), retry: secs(1) };
    let election = Election::new(cluster.client().await?, "darter-scaler", "a", times);
    let (lead, mut leads, stop) = (election.lead(), election.leads(), CancellationToken::new());
    let client = fenced(&cluster.client().await?, &lead, times.write_within());
    let mut hands = Hands::start(&client, &cluster.settings);
    ensure!(hands.act(rank(&pod, -1)?).await? == Outcome::NotLeading);
    ensure!(cost(&cluster.get(PATH).await?).is_none());
    let metrics = hands.metrics.clone();
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { election.run(&metrics, stop).await }
    });
    becomes(&mut leads, true).await?;
    eventually("it is done while it leads", async || Ok(hands.act(rank(&pod, -2)?).await? == Outcome::Done)).await?;
    // The API server is gone: by its own clock this one stops to lead, and tries nothing.
    cluster.plane.kill_api().await?;
    becomes(&mut leads, false).await?;
    ensure!(!lead.holds_now());
    ensure!(hands.act(rank(&pod, -3)?).await? == Outcome::NotLeading);
    cluster.plane.start_api().await?;
    becomes(&mut leads, true).await?;
    stop.cancel();
    running.await?;
    ensure!(hands.act(rank(&pod, -4)?).await? == Outcome::NotLeading, "it left");
    ensure!(cost(&cluster.get(PATH).await?) == Some("-2"));
    let lease = cluster.get("/apis/coordination.k8s.io/v1/namespaces/gpu/leases/darter-scaler").await?;
    ensure!(lease["spec"]["holderIdentity"] == "", "given back: {lease}");
    Ok(())
}

/// Waits until it leads, or does not.
async fn becomes(leads: &mut watch::Receiver<bool>, wanted: bool) -> Result<()> {
    let becomes = tokio::time::timeout(secs(60), leads.wait_for(|leads| *leads == wanted)).await;
    becomes.with_context(|| format!("it never becomes {wanted} that it leads"))??;
    Ok(())
}

const fn secs(seconds: u64) -> std::time::Duration {
    std::time::Duration::from_secs(seconds)
}

#[tokio::test]
async fn a_server_that_has_too_much_to_do_is_left_alone_for_a_while_and_what_waited_is_decided_again() -> Result<()> {
    let test = "a_server_that_has_too_much_to_do_is_left_alone_for_a_while_and_what_waited_is_decided_again";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    let (cluster, pod) = start().await?;
    let gate = Gate::start(&cluster.plane)?;
    let server = format!("http://{}", gate.address());
    let kubeconfig = cluster.plane.kubeconfig_by(&server, "gpu", &cluster.token)?;
    gate.refuse(|method, _| (method == Method::PATCH).then_some(StatusCode::TOO_MANY_REQUESTS));
    let mut hands = Hands::start(&client(&kubeconfig).await?, &cluster.settings);
    // All of these wait when the first is refused, or come soon after.
    for cost in 0..8 {
        hands.acts.send(rank(&pod, cost)?).await?;
    }
    for _ in 0..8 {
        ensure!(hands.done.recv().await.context("nobody acts")?.outcome == Outcome::Failed);
    }
    ensure!(gate.refused().len() < 8, "each was tried: {:?}", gate.refused());
    ensure!(hands.errors("throttled") == gate.refused().len() as u64);
    gate.refuse(|_, _| None);
    ensure!(hands.act(rank(&pod, -5)?).await? == Outcome::Done);
    Ok(())
}
