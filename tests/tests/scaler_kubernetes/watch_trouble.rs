//! Watches when the API server is away, has forgotten, has too much to do or says no: what is known stays, what was
//! missed is made up for, and all of it is counted.

use std::time::Duration;

use anyhow::{Result, ensure};
use darter_scaler::fleet::Kind;
use darter_scaler::kubernetes::Settings;
use darter_tests::gate::Gate;
use darter_tests::net::Place;
use darter_tests::proxy::Proxy;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use http::{Method, StatusCode};

use crate::watch::Ear;
use crate::{Cluster, NEEDS, everywhere, node, pod};

/// By way of somebody who stands before the API server.
fn by(cluster: &Cluster, server: &str) -> Result<Settings> {
    let kubeconfig = cluster.plane.kubeconfig_by(server, "gpu", &cluster.token)?;
    Ok(Settings { kubeconfig: Some(kubeconfig), ..cluster.settings.clone() })
}

#[tokio::test]
async fn an_api_server_that_was_killed_and_comes_back_is_heard_again_and_nothing_was_forgotten() -> Result<()> {
    let test = "an_api_server_that_was_killed_and_comes_back_is_heard_again_and_nothing_was_forgotten";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    let mut cluster = Cluster::start(&[], &[]).await?;
    for name in ["gpu-1", "gpu-2"] {
        cluster.plane.apply(&node(name)).await?;
    }
    cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    let mut ear = Ear::start(&cluster.settings);
    ear.hears("all of it", |ear| ear.nodes.len() == 2 && ear.pods.len() == 1).await?;
    cluster.plane.kill_api().await?;
    eventually("it is missed", async || Ok(ear.errors("unreachable") >= 2)).await?;
    ensure!(ear.nodes.len() == 2 && ear.pods.len() == 1, "silence says nothing");
    cluster.plane.start_api().await?;
    cluster.plane.delete(&node("gpu-2")).await?;
    ear.hears("what changed", |ear| ear.nodes.len() == 1).await?;
    ensure!(ear.pods.len() == 1);
    Ok(())
}

#[tokio::test]
async fn a_cluster_in_which_nothing_happens_is_heard_and_one_whose_api_server_is_away_is_not() -> Result<()> {
    if !can_run("a_cluster_in_which_nothing_happens_is_heard_and_one_whose_api_server_is_away_is_not", &NEEDS) {
        return Ok(());
    }
    let mut cluster = Cluster::start(&[], &[]).await?;
    let mut ear = Ear::start(&Settings { heartbeat_ms: 100, ..cluster.settings.clone() });
    ear.hears("it is there", |ear| ear.watched >= 20).await?;
    cluster.plane.kill_api().await?;
    eventually("it is missed", async || Ok(ear.errors("unreachable") >= 4)).await?;
    // What was on its way.
    ear.listens(Duration::from_millis(100)).await?;
    let before = ear.watched;
    let errors = ear.errors("unreachable");
    eventually("it is missed again and again", async || Ok(ear.errors("unreachable") >= errors + 4)).await?;
    ear.listens(Duration::from_millis(100)).await?;
    ensure!(ear.watched == before, "who was heard?");
    cluster.plane.start_api().await?;
    ear.hears("it is there again", |ear| ear.watched > before).await
}

#[tokio::test]
async fn what_happened_while_nobody_listened_and_the_server_forgot_is_made_up_for_by_a_new_list_410() -> Result<()> {
    let test = "what_happened_while_nobody_listened_and_the_server_forgot_is_made_up_for_by_a_new_list_410";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    let mut cluster = Cluster::start(&[], &[]).await?;
    let proxy = Proxy::start(&Place::Host, &Place::Host, cluster.plane.address())?;
    cluster.plane.apply(&node("gpu-1")).await?;
    for name in ["serve-1", "serve-2"] {
        cluster.plane.apply(&pod(name, "gpu-1")).await?;
    }
    let mut ear = Ear::start(&by(&cluster, &format!("https://{}", proxy.address()))?);
    ear.hears("two pods", |ear| ear.pods.len() == 2).await?;
    let lists = ear.lists.get(&Kind::Pod).copied();
    // Cut off, and while it is, everything is another.
    proxy.set_silent(true);
    proxy.break_all();
    cluster.plane.call(Method::DELETE, "/api/v1/namespaces/team/pods/serve-1?gracePeriodSeconds=0", None).await?;
    cluster.plane.apply(&pod("serve-3", "gpu-1")).await?;
    // An API server that has just started knows no older changes.
    cluster.plane.kill_api().await?;
    cluster.plane.start_api().await?;
    proxy.break_all();
    proxy.set_silent(false);
    ear.hears("the new pods", |ear| ear.pod("serve-3").is_some() && ear.pod("serve-1").is_none()).await?;
    ear.hears("a new list", |ear| ear.lists.get(&Kind::Pod).copied() > lists).await?;
    ensure!(ear.pods.len() == 2 && ear.pod("serve-2").is_some(), "{:?}", ear.pods);
    Ok(())
}

#[tokio::test]
async fn a_server_that_has_too_much_to_do_429_is_asked_ever_more_seldom_and_heard_in_the_end() -> Result<()> {
    let test = "a_server_that_has_too_much_to_do_429_is_asked_ever_more_seldom_and_heard_in_the_end";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], &[]).await?;
    cluster.plane.apply(&node("gpu-1")).await?;
    let gate = Gate::start(&cluster.plane)?;
    gate.refuse(|_, uri| uri.path().ends_with("/nodes").then_some(StatusCode::TOO_MANY_REQUESTS));
    let mut ear = Ear::start(&by(&cluster, &format!("http://{}", gate.address()))?);
    eventually("refused", async || Ok(ear.errors("throttled") >= 3)).await?;
    ensure!(
        gate.refused().len() as u64 <= ear.errors("throttled") + 1,
        "asked more often than told: {:?}",
        gate.refused()
    );
    ensure!(ear.nodes.is_empty());
    gate.refuse(|_, _| None);
    ear.hears("a node", |ear| ear.node("gpu-1").is_some()).await
}

#[tokio::test]
async fn a_right_that_is_missing_is_counted_and_what_it_is_for_is_heard_once_it_is_given() -> Result<()> {
    if !can_run("a_right_that_is_missing_is_counted_and_what_it_is_for_is_heard_once_it_is_given", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], &[]).await?;
    cluster.plane.apply(&node("gpu-1")).await?;
    let token = cluster.plane.service_account("gpu", "poor").await?;
    let kubeconfig = cluster.plane.kubeconfig("gpu", &token)?;
    let mut ear = Ear::start(&Settings { kubeconfig: Some(kubeconfig), ..cluster.settings.clone() });
    eventually("refused", async || Ok(ear.errors("forbidden") >= 2)).await?;
    cluster.plane.allow_everywhere("gpu", "poor", &everywhere()).await?;
    ear.hears("a node", |ear| ear.node("gpu-1").is_some()).await
}
