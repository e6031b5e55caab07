//! All of it as one thing, twice: one leads and acts, both watch, and the one that ends leaves nothing behind.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use darter_scaler::fleet::{Act, Done, Fact, Outcome};
use darter_scaler::kubernetes::{Lead, Metrics, Settings, Side};
use darter_scaler::scaler::Cluster as Ends;
use darter_tests::stage::eventually;
use darter_tests::tools::can_run;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::actuators::rank;
use crate::{Cluster, NEEDS, node, pod};

/// The controller's ends of the queues, and a side that runs.
struct Scaler {
    facts: mpsc::Receiver<Fact>,
    acts: mpsc::Sender<Act>,
    done: mpsc::Receiver<Done>,
    lead: Lead,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Scaler {
    async fn start(settings: &Settings) -> Result<Self> {
        let side = Side::connect(settings, "darter-scaler", &[], Arc::new(Metrics::default())).await?;
        let (lead, stop) = (side.lead(), CancellationToken::new());
        let (told, facts) = mpsc::channel(64);
        let (acts, to_do) = mpsc::channel(8);
        let (answers, done) = mpsc::channel(8);
        let ends = Ends { facts: told, acts: to_do, done: answers };
        let running = tokio::spawn(side.run(ends, stop.clone()));
        Ok(Self { facts, acts, done, lead, stop, running })
    }

    async fn act(&mut self, act: Act) -> Result<Outcome> {
        self.acts.send(act).await?;
        Ok(self.done.recv().await.context("nobody acts")?.outcome)
    }

    async fn hears_a_node(&mut self) -> Result<()> {
        let hear = async {
            while !matches!(self.facts.recv().await.context("nobody watches")?, Fact::Node(_)) {}
            anyhow::Ok(())
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), hear).await.context("no node was heard")?
    }
}

#[tokio::test]
async fn of_two_scalers_one_acts_and_when_it_ends_what_it_wrote_is_gone_and_the_other_leads() -> Result<()> {
    let test = "of_two_scalers_one_acts_and_when_it_ends_what_it_wrote_is_gone_and_the_other_leads";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], &[]).await?;
    cluster.plane.apply(&node("gpu-1")).await?;
    let pod = cluster.plane.apply(&pod("serve-1", "gpu-1")).await?;
    // Nobody waits for the end of this lease: it is given back.
    let settings = Settings {
        lease_seconds: 3600,
        renew_within_seconds: 1800,
        retry_seconds: 1,
        undo_on_exit: true,
        ..cluster.settings.clone()
    };
    let mut first = Scaler::start(&settings).await?;
    eventually("the first leads", async || Ok(first.lead.holds_now())).await?;
    let mut second = Scaler::start(&settings).await?;
    first.hears_a_node().await?;
    second.hears_a_node().await?;
    ensure!(second.act(rank(&pod, -2)?).await? == Outcome::NotLeading);
    ensure!(first.act(rank(&pod, -1)?).await? == Outcome::Done);
    let annotations = async || {
        let pod = cluster.get("/api/v1/namespaces/team/pods/serve-1").await?;
        anyhow::Ok(pod["metadata"]["annotations"].clone())
    };
    ensure!(annotations().await?["controller.kubernetes.io/pod-deletion-cost"] == "-1");
    first.stop.cancel();
    first.running.await?;
    ensure!(!first.lead.holds_now() && annotations().await?.is_null(), "{}", annotations().await?);
    eventually("the other leads", async || Ok(second.lead.holds_now())).await?;
    ensure!(second.act(rank(&pod, -2)?).await? == Outcome::Done);
    second.stop.cancel();
    second.running.await?;
    Ok(())
}
