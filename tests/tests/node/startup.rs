//! The startup taint: when it goes, what goes with it, and what keeps it.

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::fake_ecr::{Auth, FakeEcr, Fault, Rule};
use darter_tests::image::{Format, Image};
use darter_tests::imds::Imds;
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::stage::{REPOSITORY, TAG, ecr, eventually};
use darter_tests::tools::{self, can_run};
use toml_edit::{Array, Value};

use crate::{Cluster, LOST, NEEDS, TAINT, startup};

/// A registry with an image.
fn registry() -> Result<FakeEcr> {
    let ecr = ecr(Auth::Public)?;
    ecr.push(&Image::index(Format::Oci, 7, &[4096])?, REPOSITORY, TAG);
    Ok(ecr)
}

/// An agent that is to have that image.
fn warming(options: Options, ecr: &FakeEcr) -> Options {
    let keys: [(&str, Value); 3] =
        [("endpoint", ecr.url().into()), ("plain_http", true.into()), ("access", "public".into())];
    let image = format!("{}/{REPOSITORY}:{TAG}", ecr.name());
    options
        .registry(&ecr.name(), &keys)
        .set("origin.attempts", 1)
        .set("mirror.platform", "linux/amd64")
        .set("prewarm.images", Array::from_iter([image]))
}

/// A node without GPUs.
fn cpu_node(mock: &Mock) -> Result<Options> {
    Ok(Options::new(&Place::Host)
        .set("gpu.library", "/nowhere/libnvidia-ml.so.1")
        .set("gpu.interval", "1s")
        .set("gpu.slow_interval", "1s")
        .set("gpu.host_root", mock.host(0)?.display().to_string()))
}

/// Waits until the taint stays for these and no others.
async fn waits_for(agent: &Agent, parts: &[&str]) -> Result<()> {
    let mut last = serde_json::Value::Null;
    let is_so = async || {
        last = startup(agent).await?;
        Ok(last["state"] == "stays" && last["waits_for"] == serde_json::json!(parts))
    };
    eventually(&format!("it waits for {parts:?}"), is_so).await.with_context(|| last.to_string())
}

async fn goes(cluster: &Cluster, agent: &Agent) -> Result<()> {
    let is_gone = async || Ok(!cluster.taints().await?.contains(&TAINT.to_owned()));
    eventually("the taint goes", is_gone).await.with_context(|| process::tail(&agent.log()))
}

#[tokio::test]
async fn the_taint_goes_when_all_is_there_and_others_stay() -> Result<()> {
    if !can_run("the_taint_goes_when_all_is_there_and_others_stay", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&["nvidia.com/gpu", TAINT, "team"], 0).await?;
    let (mock, ecr) = (Mock::fixture("h200-idle")?, registry()?);
    ecr.inject(Rule::any().always(), Fault::Status(503, None));
    let agent = Agent::start(cluster.options(warming(mock.options(1)?, &ecr))?).await?;
    // The kubelet has no GPU to give, and the image does not come.
    waits_for(&agent, &["images", "gpu"]).await?;
    cluster.kubelet(1, "True").await?;
    waits_for(&agent, &["images"]).await?;
    assert_eq!(cluster.taints().await?, ["nvidia.com/gpu", TAINT, "team"]);
    let metrics = agent.metrics().await?;
    assert_eq!(metrics.sum("darter_startup_waits", &[("check", "images")]), 1.0);
    assert_eq!(metrics.sum("darter_startup_waits", &[]), 1.0);
    assert_eq!(metrics.sum("darter_startup_taint", &[]), 1.0);
    assert_eq!(
        (metrics.sum("darter_startup_overdue", &[]), metrics.sum("darter_warm_images_missing", &[])),
        (0.0, 1.0)
    );
    ensure!(agent.log().contains("an image that is to be here cannot be brought"), "{}", agent.log());
    ecr.clear_faults();
    goes(&cluster, &agent).await?;
    assert_eq!(cluster.taints().await?, ["nvidia.com/gpu", "team"]);
    eventually("it says so", async || Ok(startup(&agent).await?["state"] == "removed")).await?;
    let told = startup(&agent).await?;
    ensure!(told["failed_open"] == serde_json::json!([]), "{told}");
    let metrics = agent.metrics().await?;
    ensure!(metrics.sum("darter_startup_seconds", &[]) > 0.0);
    assert_eq!(metrics.sum("darter_warm_images_missing", &[]), 0.0);
    let cleared = async || Ok(agent.metrics().await?.sum("darter_startup_taint", &[]) == 0.0);
    eventually("the watch has told it", cleared).await?;
    eventually("an Event", async || Ok(!cluster.events("StartupTaintRemoved").await?.is_empty())).await?;
    let events = cluster.events("StartupTaintRemoved").await?;
    let [(kind, note)] = &events[..] else { anyhow::bail!("{events:?}") };
    ensure!(kind == "Normal" && note.starts_with("Pods may come after"), "{events:?}");
    ensure!(agent.log().matches("removed the startup taint").count() == 1, "{}", agent.log());
    // One line for people.
    let mut command = std::process::Command::new(tools::darter()?);
    command.args(["status", "--admin", &agent.admin_address().to_string()]);
    let output = process::run("darter status", command, std::time::Duration::from_secs(30)).await?;
    let line = output.stdout.lines().find(|line| line.starts_with("kubernetes")).context(output.stdout.clone())?;
    ensure!(line.contains("GpuReady True (GpusReady); startup taint removed after "), "{line}");
    Ok(())
}

#[tokio::test]
async fn a_metadata_service_that_has_not_told_the_nodes_own_registry_is_waited_for() -> Result<()> {
    if !can_run("a_metadata_service_that_has_not_told_the_nodes_own_registry_is_waited_for", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[TAINT], 0).await?;
    let (mock, mut imds) = (Mock::fixture("h200-idle")?, Imds::start(&Place::Host, "123456789012", "us-east-1")?);
    imds.down().await;
    let options = cpu_node(&mock)?.set("aws.discover", "auto").set("aws.imds_endpoint", imds.url());
    let agent = Agent::start(cluster.options(options)?).await?;
    // Pods that come now would pull past the mirror.
    waits_for(&agent, &["hosts_toml"]).await?;
    imds.up()?;
    goes(&cluster, &agent).await
}

#[tokio::test]
async fn who_changes_taints_at_the_same_moment_loses_nothing() -> Result<()> {
    if !can_run("who_changes_taints_at_the_same_moment_loses_nothing", &NEEDS) {
        return Ok(());
    }
    const ROUNDS: usize = 20;
    let cluster = Cluster::start(&["first"], 0).await?;
    let mock = Mock::fixture("h200-idle")?;
    let agent = Agent::start(cluster.options(cpu_node(&mock)?)?).await?;
    let knows = async || Ok(startup(&agent).await?["state"] == "absent");
    eventually("it knows the node", knows).await?;
    let mut all = vec!["first".to_owned()];
    for round in 0..ROUNDS {
        // Each comes before all others, so that every taint has another place than a moment ago.
        cluster.taint(TAINT).await?;
        let other = format!("other-{round}");
        cluster.taint(&other).await?;
        all.insert(0, other);
        goes(&cluster, &agent).await?;
        assert_eq!(cluster.taints().await?, all);
    }
    let metrics = agent.metrics().await?;
    let of = |labels: &[(&str, &str)]| metrics.sum("darter_node_write_errors_total", labels);
    let unsaid = of(&[("reason", "too_many_events")]);
    ensure!(of(&[]) - unsaid == 0.0, "not written: {}", agent.log());
    // Events have a bound, which as many removals in a minute reach.
    ensure!((5.0..=10.0).contains(&unsaid), "{unsaid} of {ROUNDS}");
    Ok(())
}

#[tokio::test]
async fn gpus_that_are_not_ready_keep_the_taint_past_its_deadline_and_that_is_said() -> Result<()> {
    if !can_run("gpus_that_are_not_ready_keep_the_taint_past_its_deadline_and_that_is_said", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[TAINT], 1).await?;
    let mock = Mock::new(LOST)?;
    let options = cluster.options(mock.options(1)?)?.set("kubernetes.startup_deadline", "2s");
    let agent = Agent::start(options).await?;
    let is_late = async || Ok(agent.metrics().await?.sum("darter_startup_overdue", &[]) == 1.0);
    eventually("it is late", is_late).await?;
    eventually("an Event", async || Ok(!cluster.events("StartupGpuNotReady").await?.is_empty())).await?;
    let events = cluster.events("StartupGpuNotReady").await?;
    let [(kind, note)] = &events[..] else { anyhow::bail!("{events:?}") };
    ensure!(kind == "Warning" && note.contains("the GPUs are NotReady: GpuLost"), "{events:?}");
    assert_eq!(cluster.taints().await?, [TAINT]);
    ensure!(agent.log().matches("the startup taint stays past its deadline").count() == 1, "{}", agent.log());
    let told = startup(&agent).await?;
    ensure!(told["is_late"] == true && told["waits_for"] == serde_json::json!(["gpu"]), "{told}");
    // However late: once they are ready it goes.
    mock.set("base = 'h200-idle'")?;
    goes(&cluster, &agent).await?;
    let over = async || Ok(agent.metrics().await?.sum("darter_startup_overdue", &[]) == 0.0);
    eventually("it is not late any more", over).await
}

#[tokio::test]
async fn hosts_toml_and_images_are_not_waited_for_past_the_deadline() -> Result<()> {
    if !can_run("hosts_toml_and_images_are_not_waited_for_past_the_deadline", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[TAINT, "team"], 0).await?;
    let (mock, ecr) = (Mock::fixture("h200-idle")?, registry()?);
    ecr.inject(Rule::any().always(), Fault::Status(503, None));
    let options = warming(cpu_node(&mock)?, &ecr)
        // In no directory: there is no containerd.
        .set("certs_d.path", mock.dir().join("nowhere/certs.d").display().to_string())
        .set("kubernetes.startup_deadline", "6s");
    let agent = Agent::start_unready(cluster.options(options)?).await?;
    waits_for(&agent, &["hosts_toml", "images"]).await?;
    assert_eq!(cluster.taints().await?, [TAINT, "team"]);
    goes(&cluster, &agent).await?;
    assert_eq!(cluster.taints().await?, ["team"]);
    eventually("it says so", async || Ok(startup(&agent).await?["state"] == "removed")).await?;
    let told = startup(&agent).await?;
    ensure!(told["failed_open"] == serde_json::json!(["hosts_toml", "images"]), "{told}");
    ensure!(told["after_seconds"].as_u64().is_some_and(|seconds| seconds >= 6), "{told}");
    let metrics = agent.metrics().await?;
    for part in ["hosts_toml", "images"] {
        assert_eq!(metrics.sum("darter_startup_failed_open_total", &[("check", part)]), 1.0);
    }
    eventually("an Event", async || Ok(!cluster.events("StartupTaintRemoved").await?.is_empty())).await?;
    let events = cluster.events("StartupTaintRemoved").await?;
    ensure!(events[0].0 == "Warning" && events[0].1.contains("hosts_toml, images"), "{events:?}");
    ensure!(cluster.condition("darter.dev/GpuReady").await?.is_null(), "a node without GPUs");
    Ok(())
}

#[tokio::test]
async fn a_node_that_should_have_gpus_and_shows_none_keeps_the_taint() -> Result<()> {
    if !can_run("a_node_that_should_have_gpus_and_shows_none_keeps_the_taint", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[TAINT], 0).await?;
    let labels = serde_json::json!({ "karpenter.k8s.aws/instance-gpu-manufacturer": "nvidia" });
    let node = serde_json::json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1", "labels": labels },
        "spec": { "taints": [{ "key": TAINT, "effect": "NoSchedule" }] } });
    cluster.plane.apply(&node).await?;
    let mock = Mock::fixture("h200-idle")?;
    let options = cluster.options(cpu_node(&mock)?)?.set("kubernetes.startup_deadline", "1s");
    let agent = Agent::start(options).await?;
    let is_late = async || Ok(agent.metrics().await?.sum("darter_startup_overdue", &[]) == 1.0);
    eventually("it is late", is_late).await?;
    let lost = async || Ok(cluster.condition("darter.dev/GpuReady").await?["status"] == "False");
    eventually("its condition says so", lost).await?;
    ensure!(cluster.taints().await? == [TAINT], "{}", agent.log());
    Ok(())
}

#[tokio::test]
async fn gpus_that_nobody_is_to_look_at_are_not_waited_for() -> Result<()> {
    if !can_run("gpus_that_nobody_is_to_look_at_are_not_waited_for", &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(&[TAINT], 0).await?;
    let mock = Mock::new(LOST)?;
    let agent = Agent::start(cluster.options(mock.options(1)?)?.set("gpu.mode", "off")).await?;
    goes(&cluster, &agent).await?;
    ensure!(cluster.condition("darter.dev/GpuReady").await?.is_null());
    // With a taint that is another's key nothing is touched.
    let cluster = Cluster::start(&[TAINT], 0).await?;
    let options = cluster.options(cpu_node(&mock)?)?.set("kubernetes.startup_taint", "team.example/not-ready");
    let agent = Agent::start(options).await?;
    eventually("it knows the node", async || Ok(startup(&agent).await?["state"] == "absent")).await?;
    assert_eq!(cluster.taints().await?, [TAINT]);
    Ok(())
}
