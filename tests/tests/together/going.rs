//! Nodes that hear that they are about to go, before anybody stops their agent.

use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Pushed, Seat, last};
use darter_tests::emulator::{Emulator, Host};
use darter_tests::fake_ecr::{Fault, Rule};
use darter_tests::imds::Imds;
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::{Network, Place};
use darter_tests::stage::{MIB, REPOSITORY, eventually};
use darter_tests::tools::{Need, Release, can_run};
use serde_json::{Value, json};

/// Whether an agent says that its node is about to go, for this reason.
async fn is_going(agent: &Agent, reason: &str) -> Result<bool> {
    Ok(agent.metrics().await?.sum("darter_node_going", &[("reason", reason)]) == 1.0)
}

#[tokio::test]
async fn a_spot_node_hands_over_at_its_notice_and_may_then_go_without_a_word() -> Result<()> {
    let test = "a_spot_node_hands_over_at_its_notice_and_may_then_go_without_a_word";
    if !can_run(test, &[Need::Containerd(Release::V2), Need::Darter]) {
        return Ok(());
    }
    hands_over(|imds| imds.take_back(true), "spot_notice").await
}

#[tokio::test]
async fn a_spot_node_that_may_be_taken_back_hands_over_while_there_is_time() -> Result<()> {
    let test = "a_spot_node_that_may_be_taken_back_hands_over_while_there_is_time";
    if !can_run(test, &[Need::Containerd(Release::V2), Need::Darter]) {
        return Ok(());
    }
    hands_over(|imds| imds.recommend(true), "rebalance_recommendation").await
}

/// EC2 announces something for this reason, and what only that node has is with others before it goes.
async fn hands_over(announce: impl Fn(&Imds), reason: &str) -> Result<()> {
    let mut imds = None;
    let leaver = Leaver::start(async |swarm| {
        let imds = imds.insert(Imds::start(swarm.origin(), "123456789012", "us-east-1")?);
        Ok(vec![("aws.imds_endpoint", imds.url())])
    });
    let leaver = leaver.await?;
    let mut imds = imds.context("no metadata service")?;
    announce(&imds);
    leaver.hands_over(reason).await?;
    // Who does not answer takes nothing back.
    imds.down().await;
    let going = leaver.agent()?;
    eventually("it misses the metadata service", async || {
        Ok(going.metrics().await?.sum("darter_spot_notice_errors_total", &[]) > 0.0)
    })
    .await?;
    ensure!(is_going(going, reason).await?, "{}", leaver.story());
    ensure!(going.log().contains("cannot ask for a spot interruption notice"), "{}", leaver.story());
    leaver.is_not_missed().await
}

#[tokio::test]
async fn a_node_that_karpenter_disrupts_hands_over_and_may_then_go_without_a_word() -> Result<()> {
    let test = "a_node_that_karpenter_disrupts_hands_over_and_may_then_go_without_a_word";
    if !can_run(test, &[Need::Containerd(Release::V2), Need::Darter, Need::Kubernetes]) {
        return Ok(());
    }
    let mut plane = None;
    let leaver = Leaver::start(async |swarm| {
        let plane = plane.insert(ControlPlane::start(&swarm.network().hub()).await?);
        plane.namespace("gpu").await?;
        let token = plane.service_account("gpu", "darter").await?;
        plane.allow_everywhere("gpu", "darter", &of_its_node()).await?;
        plane.apply(&node(&["nvidia.com/gpu"])).await?;
        let kubeconfig = plane.kubeconfig("gpu", &token)?.display().to_string();
        Ok(vec![("kubernetes.node", "gpu-1".to_owned()), ("kubernetes.kubeconfig", kubeconfig)])
    });
    let leaver = leaver.await?;
    let plane = plane.context("no API server")?;
    plane.apply(&node(&["nvidia.com/gpu", "karpenter.sh/disrupted"])).await?;
    leaver.hands_over("taint").await?;
    leaver.is_not_missed().await
}

/// A swarm whose last node alone has an image. Another has proved that it may read it, and has nothing of it but
/// its manifests.
struct Leaver {
    swarm: Swarm,
    node: usize,
    pushed: Pushed,
}

impl Leaver {
    /// `settings` are those of the last node, known when the others run.
    async fn start(settings: impl AsyncFnOnce(&Swarm) -> Result<Vec<(&'static str, String)>>) -> Result<Self> {
        let later = Arc::new(OnceLock::<Vec<(&'static str, String)>>::new());
        let known = later.clone();
        let configure = move |seat: &Seat, options: Options| {
            let options = options.set("aws.discover", "off");
            match (seat.number, known.get()) {
                (2, Some(settings)) => settings.iter().fold(options, |options, (key, value)| options.set(key, value)),
                // What they have they were given, and did not fetch ahead.
                _ => options.set("mirror.prefetch", "off"),
            }
        };
        let mut swarm = Swarm::start(Plan::new(2, 400, 1), configure).await?;
        later.set(settings(&swarm).await?).ok().context("they were known before")?;
        let node = swarm.add_node().await?;
        swarm.complete().await?;
        let pushed = swarm.push(41, &[12 * MIB, 3 * MIB]).await?;
        last(swarm.pull_on(&[node], &pushed).await)?;
        let client = Emulator::new(&swarm.places()[0], &swarm.ecr().name(), &[Host::new(swarm.agent(0)?.mirror())]);
        client.resolve(REPOSITORY, &pushed.tag).await?;
        client.resolve(REPOSITORY, &pushed.image.child()?.to_string()).await?;
        swarm.copies(&pushed).ensure_exactly(1)?;
        Ok(Self { swarm, node, pushed })
    }

    fn agent(&self) -> Result<&Agent> {
        self.swarm.agent(self.node)
    }

    fn story(&self) -> String {
        self.swarm.story(self.node)
    }

    /// Waits until others have what it has, and it says that it goes for this reason.
    async fn hands_over(&self, reason: &str) -> Result<()> {
        let going = self.agent()?;
        let has = async || Ok(going.log().contains("others have what only this node had"));
        eventually("its blobs are with others", has).await.with_context(|| self.story())?;
        ensure!(is_going(going, reason).await?, "{}", self.story());
        Ok(())
    }

    /// It is killed, the registry gives nothing any more, and the image is pulled all the same.
    async fn is_not_missed(&self) -> Result<()> {
        let Self { swarm, node, pushed } = self;
        swarm.kill_agent(*node)?;
        swarm.ecr().inject(Rule::any().always(), Fault::Status(503, None));
        let by_digest = format!("{}/{REPOSITORY}@{}", swarm.ecr().name(), pushed.image.root.digest());
        let pulled = swarm.node(0).containerd().cri().pull(&by_digest, None).await;
        pulled.with_context(|| format!("{}\n--- the node that went\n{}", swarm.story(0), self.story()))?;
        swarm.copies(pushed).ensure_exactly(1)
    }
}

#[tokio::test]
async fn a_node_without_a_swarm_says_what_ec2_announces_and_takes_it_back() -> Result<()> {
    if !can_run("a_node_without_a_swarm_says_what_ec2_announces_and_takes_it_back", &[Need::Darter]) {
        return Ok(());
    }
    let imds = Imds::start(&Place::Host, "123456789012", "us-east-1")?;
    let agent = Agent::start(Options::new(&Place::Host).set("aws.imds_endpoint", imds.url())).await?;
    let says = async |wanted: [bool; 3]| {
        let reasons = ["spot_notice", "rebalance_recommendation", "scheduled_event"];
        let is_so = async || {
            let mut told = [false; 3];
            for (told, reason) in told.iter_mut().zip(reasons) {
                *told = is_going(&agent, reason).await?;
            }
            Ok(told == wanted)
        };
        eventually(&format!("{wanted:?} of {reasons:?}"), is_so).await.with_context(|| agent.log())
    };
    // What is over is no news.
    imds.plan("completed");
    says([false; 3]).await?;
    imds.plan("active");
    says([false, false, true]).await?;
    imds.recommend(true);
    says([false, true, true]).await?;
    imds.take_back(true);
    says([true, true, true]).await?;
    imds.take_back(false);
    imds.recommend(false);
    imds.plan("canceled");
    says([false; 3]).await?;
    let once = ["EC2 takes this spot instance back", "EC2 recommends to move off", "EC2 plans maintenance"];
    for text in once {
        ensure!(agent.log().matches(text).count() == 1, "{text}\n{}", agent.log());
    }
    let metrics = agent.metrics().await?;
    let errors = ["darter_spot_notice_errors_total", "darter_notice_errors_total"].map(|name| metrics.sum(name, &[]));
    assert_eq!(errors, [0.0; 2]);
    Ok(())
}

/// The least that an agent needs to be told: this one node.
fn of_its_node() -> Value {
    json!([{ "apiGroups": [""], "resources": ["nodes"], "resourceNames": ["gpu-1"],
        "verbs": ["get", "list", "watch"] }])
}

/// A Node with these taints.
fn node(taints: &[&str]) -> Value {
    let taints: Vec<_> = taints.iter().map(|key| json!({ "key": key, "effect": "NoSchedule" })).collect();
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1" }, "spec": { "taints": taints } })
}

#[tokio::test]
async fn a_node_that_karpenter_disrupts_hears_of_it_and_of_the_end_of_it() -> Result<()> {
    let test = "a_node_that_karpenter_disrupts_hears_of_it_and_of_the_end_of_it";
    if !can_run(test, &[Need::Kubernetes, Need::Darter, Need::Root]) {
        return Ok(());
    }
    let (network, dir) = (Network::new(1)?, darter_tests::scratch::Scratch::new()?);
    std::fs::write(dir.join("swarm.key"), darter_agent::swarm::key::make()?)?;
    let plane = ControlPlane::start(&network.hub()).await?;
    plane.namespace("gpu").await?;
    let token = plane.service_account("gpu", "darter").await?;
    plane.apply(&node(&["nvidia.com/gpu"])).await?;
    let place: Place = network.node(0);
    let options = Options::new(&place)
        .set("swarm.key_file", dir.join("swarm.key").display().to_string())
        .set("kubernetes.node", "gpu-1")
        .set("kubernetes.kubeconfig", plane.kubeconfig("gpu", &token)?.display().to_string());
    let agent = Agent::start(options).await?;
    let says = |text: &str| agent.log().contains(text);
    let advice = "needs a ClusterRole that lets it get, list and watch the node gpu-1";
    eventually("it says what it needs", async || Ok(says(advice))).await?;
    plane.allow_everywhere("gpu", "darter", &of_its_node()).await?;
    eventually("it watches", async || Ok(says("watching this node"))).await?;
    ensure!(!is_going(&agent, "taint").await?, "another taint means nothing");
    for taint in ["karpenter.sh/disrupted", "ToBeDeletedByClusterAutoscaler"] {
        plane.apply(&node(&["nvidia.com/gpu", taint])).await?;
        eventually("it hears of it", async || is_going(&agent, "taint").await).await?;
        plane.apply(&node(&["nvidia.com/gpu"])).await?;
        eventually("it hears of the end", async || Ok(!is_going(&agent, "taint").await?)).await?;
    }
    ensure!(!says("there is no such node"), "{}", agent.log());
    let stays = agent.log().matches("this node stays after all").count();
    ensure!(stays == 2, "{stays} times\n{}", agent.log());
    Ok(())
}
