//! Agents that find each other by the EndpointSlices of a Service, at a real kube-apiserver: what
//! changes there is known within a second, and an API server that is away, slow or says no keeps
//! nobody from anything.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_agent::metrics::Metrics;
use darter_agent::swarm::discovery::{Discovery, ServiceWatch};
use darter_agent::swarm::key;
use darter_tests::agent::{Agent, Options};
use darter_tests::cluster::Copies;
use darter_tests::emulator::{Emulator, Host};
use darter_tests::fake_ecr::{self, Auth, FakeEcr};
use darter_tests::image::{Format, Image};
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::{Network, Place, node_address};
use darter_tests::process;
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, REPOSITORY, TAG};
use darter_tests::tools::{Need, can_run};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Past this it does not happen at all.
const PATIENCE: Duration = Duration::from_secs(60);
/// What changes is known within this.
const SOON: Duration = Duration::from_secs(1);

/// The least that an agent needs: README has it.
fn rules() -> Value {
    json!([{ "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"] }])
}

/// An EndpointSlice of the Service `darter`, with endpoints that are not ready yet.
fn slice(name: &str, addresses: &[&str]) -> Value {
    let conditions = json!({ "ready": false, "serving": false, "terminating": false });
    let endpoints: Vec<_> = addresses.iter().map(|ip| json!({ "addresses": [ip], "conditions": conditions })).collect();
    let labels = json!({ "kubernetes.io/service-name": "darter" });
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "namespace": "gpu", "name": name, "labels": labels },
        "endpoints": endpoints, "ports": [{ "name": "control", "port": 4002, "protocol": "TCP" }],
    })
}

/// A discovery that runs until it is dropped.
struct Found {
    addresses: watch::Receiver<BTreeSet<SocketAddr>>,
    metrics: Arc<Metrics>,
    running: AbortHandle,
}

impl Found {
    /// Watches `darter` in the namespace of the kubeconfig's context.
    fn new(kubeconfig: PathBuf, dir: &Path) -> Result<Self> {
        let metrics = Arc::new(Metrics::new("0", "none"));
        let service = ServiceWatch {
            service: "darter".parse().map_err(anyhow::Error::msg)?,
            port: "control".parse().map_err(anyhow::Error::msg)?,
            is_ipv6: false,
            kubeconfig: Some(kubeconfig),
            file: dir.join("members.json"),
            max: 100,
            metrics: metrics.clone(),
        };
        let discovery = Discovery::new(&[], None, 4002, Duration::from_secs(1), 100).watching(Some(service));
        let (sender, addresses) = watch::channel(BTreeSet::new());
        let running = tokio::spawn(discovery.run(sender)).abort_handle();
        Ok(Self { addresses, metrics, running })
    }

    /// Waits until exactly these are found, and says how long that took.
    async fn are(&mut self, ips: &[&str], within: Duration) -> Result<Duration> {
        let wanted = ips.iter().map(|ip| Ok(SocketAddr::new(ip.parse()?, 4002))).collect::<Result<BTreeSet<_>>>()?;
        let start = Instant::now();
        let waited = tokio::time::timeout(within, self.addresses.wait_for(|found| *found == wanted)).await.is_ok();
        ensure!(waited, "not {wanted:?} within {within:?}, but {:?}", *self.addresses.borrow());
        Ok(start.elapsed())
    }

    /// Whether tries failed for this reason.
    fn failed(&self, reason: &str) -> bool {
        self.metrics.render().contains(&format!("darter_swarm_watch_errors_total{{reason=\"{reason}\"}}"))
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        self.running.abort();
    }
}

async fn control_plane(place: &Place) -> Result<ControlPlane> {
    let plane = ControlPlane::start(place).await?;
    plane.namespace("gpu").await?;
    Ok(plane)
}

#[tokio::test]
async fn members_come_and_go_with_their_endpoints_within_a_second() -> Result<()> {
    if !can_run("members_come_and_go_with_their_endpoints_within_a_second", &[Need::Kubernetes]) {
        return Ok(());
    }
    let (plane, dir) = (control_plane(&Place::Host).await?, Scratch::new()?);
    let token = plane.service_account("gpu", "darter").await?;
    plane.allow("gpu", "darter", &rules()).await?;
    let (first, second) = (slice("darter-a", &["10.0.0.1", "10.0.0.2"]), slice("darter-b", &["10.0.0.3"]));
    plane.apply(&first).await?;
    let mut found = Found::new(plane.kubeconfig("gpu", &token)?, dir.path())?;
    found.are(&["10.0.0.1", "10.0.0.2"], PATIENCE).await?;
    // A second slice of the same Service, and one of another.
    let mut other = slice("other", &["10.0.0.9"]);
    other["metadata"]["labels"]["kubernetes.io/service-name"] = "other".into();
    plane.apply(&other).await?;
    plane.apply(&second).await?;
    found.are(&["10.0.0.1", "10.0.0.2", "10.0.0.3"], SOON).await?;
    plane.apply(&slice("darter-a", &["10.0.0.1"])).await?;
    found.are(&["10.0.0.1", "10.0.0.3"], SOON).await?;
    let mut leaving = slice("darter-a", &["10.0.0.1", "10.0.0.4"]);
    leaving["endpoints"][0]["conditions"] = json!({ "ready": false, "serving": true, "terminating": true });
    plane.apply(&leaving).await?;
    found.are(&["10.0.0.3", "10.0.0.4"], SOON).await?;
    plane.delete(&leaving).await?;
    found.are(&["10.0.0.3"], SOON).await?;
    ensure!(!found.metrics.render().contains("darter_swarm_watch_errors_total"), "{}", found.metrics.render());
    Ok(())
}

#[tokio::test]
async fn an_api_server_that_restarts_or_is_away_takes_no_member_away() -> Result<()> {
    if !can_run("an_api_server_that_restarts_or_is_away_takes_no_member_away", &[Need::Kubernetes]) {
        return Ok(());
    }
    let (mut plane, dir) = (control_plane(&Place::Host).await?, Scratch::new()?);
    let kubeconfig = plane.admin_kubeconfig("gpu")?;
    plane.apply(&slice("darter-a", &["10.0.0.1"])).await?;
    let mut found = Found::new(kubeconfig.clone(), dir.path())?;
    found.are(&["10.0.0.1"], PATIENCE).await?;
    plane.kill_api().await?;
    while !found.failed("unreachable") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    found.are(&["10.0.0.1"], SOON).await?;
    plane.start_api().await?;
    plane.apply(&slice("darter-b", &["10.0.0.2"])).await?;
    found.are(&["10.0.0.1", "10.0.0.2"], PATIENCE).await?;
    // Once it watches again it is as quick as before.
    plane.apply(&slice("darter-c", &["10.0.0.3"])).await?;
    let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
    found.are(&all, SOON).await?;
    written(dir.path(), "10.0.0.3").await?;
    drop(found);
    plane.kill_api().await?;
    // Nobody listens there at all; and then somebody who accepts and says nothing.
    let mut again = Found::new(kubeconfig.clone(), dir.path())?;
    again.are(&all, SOON).await?;
    drop(again);
    let listener = Place::Host.listen(plane.address())?;
    let mut again = Found::new(kubeconfig, dir.path())?;
    again.are(&all, SOON).await?;
    while !again.failed("unreachable") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    again.are(&all, SOON).await?;
    drop(listener);
    // What changed meanwhile is found when it is there again.
    plane.start_api().await?;
    plane.delete(&slice("darter-a", &[])).await?;
    again.are(&["10.0.0.2", "10.0.0.3"], PATIENCE).await?;
    Ok(())
}

/// Waits until the members of the next start have this one.
async fn written(data: &Path, member: &str) -> Result<()> {
    let start = Instant::now();
    while !fs::read_to_string(data.join("members.json")).is_ok_and(|text| text.contains(member)) {
        ensure!(start.elapsed() < PATIENCE, "{member} is not kept for the next start");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// An agent of a swarm.
fn options(place: &Place, dir: &Path) -> Options {
    Options::new(place).set("swarm.key_file", dir.join("swarm.key").display().to_string())
}

/// One that watches `darter` from outside of the cluster.
fn outside(options: Options, kubeconfig: &Path) -> Options {
    options.set("swarm.service", "gpu/darter").set("kubernetes.kubeconfig", kubeconfig.display().to_string())
}

async fn eventually(agent: &Agent, what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds().await? {
        ensure!(start.elapsed() < PATIENCE, "{what}: never\n{}", process::tail(&agent.log()));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_token_without_rights_is_said_once_with_the_way_out_and_the_agent_goes_on() -> Result<()> {
    let test = "a_token_without_rights_is_said_once_with_the_way_out_and_the_agent_goes_on";
    if !can_run(test, &[Need::Kubernetes, Need::Darter]) {
        return Ok(());
    }
    let (plane, dir) = (control_plane(&Place::Host).await?, Scratch::new()?);
    fs::write(dir.join("swarm.key"), key::make()?)?;
    let token = plane.service_account("gpu", "darter").await?;
    let kubeconfig = plane.kubeconfig("gpu", &token)?;
    let ports = [Place::Host.port()?, Place::Host.port()?];
    let [control, exchange] = ports.each_ref().map(|port| format!("127.0.0.1:{}", port.number()));
    let options = outside(options(&Place::Host, dir.path()), &kubeconfig);
    let agent = Agent::start(options.set("swarm.listen", control).set("swarm.exchange_listen", exchange)).await?;
    let refusals =
        async || agent.metrics().await.map(|m| m.sum("darter_swarm_watch_errors_total", &[("reason", "forbidden")]));
    eventually(&agent, "refused", async || Ok(refusals().await? >= 3.0)).await?;
    let said = |text: &str| agent.log().lines().filter(|line| line.contains(text)).count();
    let advice = "needs a Role that lets it get, list and watch endpointslices (discovery.k8s.io) in namespace gpu";
    ensure!(said(advice) == 1 && said("kube_runtime") == 0, "{}", agent.log());
    ensure!(agent.admin("/readyz").await?.status == 200, "a swarm never makes a node unready");
    plane.allow("gpu", "darter", &rules()).await?;
    eventually(&agent, "allowed", async || Ok(said("watching the EndpointSlices of this Service") == 1)).await?;
    Ok(())
}

#[tokio::test]
async fn two_agents_find_each_other_and_do_so_again_while_the_api_server_is_away() -> Result<()> {
    let test = "two_agents_find_each_other_and_do_so_again_while_the_api_server_is_away";
    if !can_run(test, &[Need::Kubernetes, Need::Darter, Need::Root]) {
        return Ok(());
    }
    let (network, dir) = (Network::new(2)?, Scratch::new()?);
    fs::write(dir.join("swarm.key"), key::make()?)?;
    let mut plane = control_plane(&network.hub()).await?;
    let token = plane.service_account("gpu", "darter").await?;
    plane.allow("gpu", "darter", &rules()).await?;
    let [first, second] = [0, 1].map(|number| options(&network.node(number), dir.path()));
    let first = outside(first, &plane.kubeconfig("default", &token)?);
    // A pod needs nothing but the name: its namespace, its credential and the server are there.
    let second = second.set("swarm.service", "darter").pod(&plane.mounted("gpu", &token)?, plane.address());
    let mut agents = [Agent::start(first).await?, Agent::start(second).await?];
    let addresses = [node_address(0)?.to_string(), node_address(1)?.to_string()];
    plane.apply(&slice("darter-a", &[&addresses[0], &addresses[1]])).await?;
    let meet = async |agent: &Agent| {
        eventually(agent, "a peer", async || Ok(agent.metrics().await?.sum("darter_swarm_peers", &[]) == 1.0)).await
    };
    for agent in &agents {
        meet(agent).await?;
        written(&agent.dir().join("data"), &addresses[1]).await?;
    }
    plane.kill_api().await?;
    // Both: either would be called by the other.
    for agent in &mut agents {
        agent.kill().await?;
    }
    for agent in &mut agents {
        let start = Instant::now();
        agent.start_again().await?;
        let started = start.elapsed();
        ensure!(started < Duration::from_secs(3), "an API server that is away held up the start: {started:?}");
    }
    for agent in &agents {
        meet(agent).await?;
    }
    Ok(())
}

#[tokio::test]
async fn agents_that_boot_first_while_the_api_server_says_nothing_serve_and_join_later() -> Result<()> {
    let test = "agents_that_boot_first_while_the_api_server_says_nothing_serve_and_join_later";
    if !can_run(test, &[Need::Kubernetes, Need::Darter, Need::Root]) {
        return Ok(());
    }
    let (network, dir) = (Network::new(2)?, Scratch::new()?);
    fs::write(dir.join("swarm.key"), key::make()?)?;
    let mut plane = control_plane(&network.hub()).await?;
    let token = plane.service_account("gpu", "darter").await?;
    plane.allow("gpu", "darter", &rules()).await?;
    plane.apply(&slice("darter-a", &[&node_address(0)?.to_string(), &node_address(1)?.to_string()])).await?;
    plane.kill_api().await?;
    let listener = network.hub().listen(plane.address())?;
    let ecr = FakeEcr::start(&network.hub(), fake_ecr::Options { auth: Auth::Public, ..fake_ecr::Options::default() })?;
    let image = Image::index(Format::Oci, 7, &[4 * MIB])?;
    ecr.push(&image, REPOSITORY, TAG);
    let keys = [("endpoint", ecr.url().into()), ("plain_http", true.into()), ("access", "public".into())];
    let mut agents = Vec::new();
    for number in 0..2 {
        // A first byte that comes later is a 404, and the client knows no other host.
        let options = options(&network.node(number), dir.path()).set("mirror.answer_within", "3s");
        let options = options.set("mirror.platform", "linux/amd64").registry(&ecr.name(), &keys);
        agents.push(Agent::start(outside(options, &plane.kubeconfig("gpu", &token)?)).await?);
    }
    let pull = async |number: usize| {
        let client = Emulator::new(&network.node(number), &ecr.name(), &[Host::new(agents[number].mirror())]);
        client.pull(REPOSITORY, TAG).await.map(drop)
    };
    pull(0).await.with_context(|| process::tail(&agents[0].log()))?;
    for agent in &agents {
        ensure!(agent.metrics().await?.sum("darter_swarm_peers", &[]) == 0.0, "who told them of each other?");
    }
    drop(listener);
    plane.start_api().await?;
    for agent in &agents {
        eventually(agent, "a peer", async || Ok(agent.metrics().await?.sum("darter_swarm_peers", &[]) == 1.0)).await?;
    }
    pull(1).await.with_context(|| process::tail(&agents[1].log()))?;
    Copies::of_image(&ecr, &image).ensure_exactly(1)
}
