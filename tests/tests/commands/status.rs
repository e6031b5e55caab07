//! `darter status` against real agents, on nodes with and without GPUs.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::gpu::{idle, readiness};
use darter_core::status::Status;
use darter_tests::agent::{Agent, Options, without_own_environment};
use darter_tests::net::Place;
use darter_tests::nvml::Mock;
use darter_tests::process::{self, Output};
use darter_tests::stage::eventually;
use darter_tests::tools::{self, Need, can_run};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const NEEDS: [Need; 2] = [Need::Darter, Need::MockNvml];

/// Runs `darter status` with the configuration of an agent, into a pipe.
async fn status(agent: &Agent, arguments: &[&str]) -> Result<Output> {
    let mut command = Place::Host.command(tools::darter()?);
    command.arg("status").arg("--config").arg(agent.dir().join("darter.toml")).args(arguments);
    run(command).await
}

async fn run(mut command: std::process::Command) -> Result<Output> {
    without_own_environment(&mut command);
    process::run("darter status", command, Duration::from_secs(30)).await
}

/// What the command says as JSON.
async fn object(agent: &Agent) -> Result<Status> {
    let output = status(agent, &["--output", "json"]).await?;
    ensure!(output.stdout.lines().count() == 1, "one object, one line: {}", output.stdout);
    serde_json::from_str(&output.stdout).with_context(|| format!("{}{}", output.stdout, output.stderr))
}

fn first_line(output: &Output) -> &str {
    output.stdout.lines().next().unwrap_or_default()
}

/// The row of the text that begins with this word.
fn row<'a>(output: &'a Output, word: &str) -> Result<&'a str> {
    let mut lines = output.stdout.lines().filter(|line| line.split_whitespace().next() == Some(word));
    lines.next().with_context(|| format!("no row `{word}` in:\n{}", output.stdout))
}

#[tokio::test]
async fn a_healthy_node_says_so_and_shows_its_gpu() -> Result<()> {
    if !can_run("a_healthy_node_says_so_and_shows_its_gpu", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-busy")?;
    // A containerd that looks where the agent writes: then nothing is left to be said.
    let (certs_d, config) = (mock.dir().join("certs.d"), mock.dir().join("containerd.toml"));
    let registry = "[plugins.'io.containerd.cri.v1.images'.registry]";
    std::fs::write(&config, format!("version = 3\n{registry}\nconfig_path = '{}'\n", certs_d.display()))?;
    let options = mock.options(1)?.set("certs_d.path", certs_d.display().to_string());
    let options = options.set("containerd.socket", mock.dir().join("none.sock").display().to_string());
    let agent = Agent::start(options.set("containerd.config", config.display().to_string())).await?;
    let mut told = None;
    eventually("the GPU was read and judged", async || {
        let status = object(&agent).await?;
        let is_known = status.gpus.state == Some(readiness::State::Ready)
            && status.gpus.gpus.iter().all(|gpu| gpu.power_limit_milliwatts.is_some())
            && status.gpus.gpus.len() == 1;
        told = Some(status);
        Ok(is_known)
    })
    .await?;
    let told = told.context("nothing was told")?;
    ensure!(told.ready && told.problems().is_empty(), "{:?}", told.problems());
    ensure!(told.registries.len() == 1 && told.registries[0].registry == "registry.example", "{:?}", told.registries);
    ensure!(told.registries[0].hosts_toml == "written" && told.swarm.is_none(), "{told:?}");
    ensure!(told.mirror.address == agent.mirror().to_string(), "{:?}", told.mirror);
    ensure!(told.store.blobs == 0 && told.store.limit_bytes > 0, "{:?}", told.store);
    ensure!(told.gpus.xids.is_empty() && told.gpus.reasons.is_empty(), "{:?}", told.gpus);
    let gpu = &told.gpus.gpus[0];
    let card = (gpu.index, gpu.name.as_deref(), gpu.is_lost, gpu.is_mig);
    assert_eq!(card, (0, Some("NVIDIA H200"), false, false));
    // The same facts as text.
    let output = status(&agent, &[]).await?;
    ensure!(output.status.code() == Some(0), "{}: {}", output.status, output.stdout);
    ensure!(first_line(&output) == "ready: all 6 checks pass", "{}", output.stdout);
    ensure!(!output.stdout.contains('\x1b') && output.stderr.is_empty(), "{:?} {}", output.stdout, output.stderr);
    ensure!(row(&output, "mirror")?.contains(&agent.mirror().to_string()), "{}", output.stdout);
    ensure!(row(&output, "hosts.toml")?.contains("registry.example  in force"), "{}", output.stdout);
    ensure!(row(&output, "swarm")?.contains("off: no swarm key (swarm.key_file)"), "{}", output.stdout);
    ensure!(row(&output, "gpu")?.contains("1 ready; driver "), "{}", output.stdout);
    let of_gpu = row(&output, "0")?;
    for fact in [
        "NVIDIA H200".to_owned(),
        format!("of {:.1}", gpu.memory_total_bytes.context("no memory")? as f64 / f64::from(1 << 30)),
        format!("{} %", gpu.utilization_percent.context("no utilisation")?),
        format!("of {}", gpu.power_limit_milliwatts.context("no limit")? / 1000),
        format!("{} C", gpu.temperature_celsius.context("no temperature")?),
        gpu.uuid.clone(),
    ] {
        ensure!(of_gpu.contains(&fact), "no `{fact}` in `{of_gpu}`");
    }
    // What works, in its own time.
    let works = async || {
        let status = object(&agent).await?;
        Ok(status.gpus.gpus[0].state == Some(idle::State::Busy))
    };
    eventually("the GPU is seen at work", works).await?;
    ensure!(row(&status(&agent, &[]).await?, "0")?.contains("  Busy  "));
    Ok(())
}

#[tokio::test]
async fn a_lost_gpu_is_told_first_with_what_to_do_and_the_node_stays_ready() -> Result<()> {
    if !can_run("a_lost_gpu_is_told_first_with_what_to_do_and_the_node_stays_ready", &NEEDS) {
        return Ok(());
    }
    let two = "base = 'h200-idle'\ncount = 2\n[gpus.1]\nuuid = 'GPU-4a2b6f10-0000-4000-8000-000000000201'\n";
    let mock = Mock::new(two)?;
    let agent = Agent::start(mock.options(2)?).await?;
    let all = async || {
        anyhow::Ok(object(&agent).await?.gpus.gpus.iter().filter(|gpu| gpu.power_milliwatts.is_some()).count())
    };
    eventually("both were read", async || Ok(all().await? == 2)).await?;
    mock.set(&format!("{two}lost = true\n"))?;
    let mut told = None;
    eventually("one is lost", async || {
        let status = object(&agent).await?;
        let is_told = status.gpus.reasons.iter().any(|reason| reason.reason == "GpuLost");
        told = Some(status);
        Ok(is_told && all().await? == 1)
    })
    .await?;
    let told = told.context("nothing was told")?;
    let lost = &told.gpus.gpus[1];
    ensure!(lost.is_lost && lost.uuid.ends_with("0201") && lost.state == Some(idle::State::Unknown), "{lost:?}");
    ensure!(told.ready && told.gpus.state == Some(readiness::State::NotReady), "{told:?}");
    let output = status(&agent, &[]).await?;
    ensure!(output.status.code() == Some(0), "degraded counts as ready: {}", output.status);
    let (first, second) = output.stdout.split_once('\n').context("one line")?;
    ensure!(first.starts_with("ready, but degraded: GPU 1: NotReady: GpuLost"), "{}", output.stdout);
    ensure!(second.starts_with("    do: ") && second.contains("drain the node and reboot it"), "{}", output.stdout);
    ensure!(row(&output, "1")?.contains("LOST"), "{}", output.stdout);
    ensure!(row(&output, "0")?.contains("NVIDIA H200") && !row(&output, "0")?.contains("LOST"), "{}", output.stdout);
    // What to do is in /readyz as well.
    ensure!(agent.admin("/readyz").await?.text().contains("drain the node and reboot it"));
    Ok(())
}

#[tokio::test]
async fn an_error_that_stands_has_a_row_and_its_advice() -> Result<()> {
    if !can_run("an_error_that_stands_has_a_row_and_its_advice", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("xid-79")?;
    let agent = Agent::start(mock.options(1)?).await?;
    let stands = async || Ok(!object(&agent).await?.gpus.xids.is_empty());
    eventually("the error stands", stands).await?;
    let told = object(&agent).await?;
    ensure!(told.gpus.xids[0].xid == 79 && told.gpus.xids[0].is_fatal, "{:?}", told.gpus.xids);
    let output = status(&agent, &[]).await?;
    ensure!(row(&output, "xid")?.contains("79 (fatal) stands against GPU 0"), "{}", output.stdout);
    ensure!(output.stdout.contains("    do: drain the node and reboot the machine: XID 79"), "{}", output.stdout);
    Ok(())
}

#[tokio::test]
async fn a_node_without_gpus_says_so_in_one_line() -> Result<()> {
    if !can_run("a_node_without_gpus_says_so_in_one_line", &NEEDS) {
        return Ok(());
    }
    let mock = Mock::fixture("h200-idle")?;
    let without = mock.options(0)?.set("gpu.library", "/nonexistent/libnvidia-ml.so.1");
    let agent = Agent::start(without).await?;
    let is_judged = async || Ok(object(&agent).await?.gpus.state == Some(readiness::State::NotApplicable));
    eventually("the node was looked at", is_judged).await?;
    let output = status(&agent, &[]).await?;
    ensure!(output.status.code() == Some(0), "{}", output.status);
    ensure!(row(&output, "gpu")?.ends_with("no GPU on this node"), "{}", output.stdout);
    ensure!(!output.stdout.contains("uuid"), "{}", output.stdout);
    Ok(())
}

#[tokio::test]
async fn a_node_that_is_not_ready_says_why_and_exits_with_1() -> Result<()> {
    if !can_run("a_node_that_is_not_ready_says_why_and_exits_with_1", &[Need::Darter]) {
        return Ok(());
    }
    let nowhere = Options::new(&Place::Host)
        .plain_registry("registry.example", "http://127.0.0.1:9")
        .set("certs_d.path", "/nonexistent/containerd/certs.d")
        .set("gpu.mode", "off");
    let agent = Agent::start_unready(nowhere).await?;
    let mut output = status(&agent, &[]).await?;
    eventually("the registry's file was looked at", async || {
        output = status(&agent, &[]).await?;
        Ok(first_line(&output).starts_with("not ready: hosts.toml of registry.example: absent: /nonexistent"))
    })
    .await
    .with_context(|| output.stdout.clone())?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    ensure!(output.stdout.lines().nth(1).is_some_and(|line| line.starts_with("    do: ")), "{}", output.stdout);
    ensure!(row(&output, "gpu")?.ends_with("off (gpu.mode)"), "{}", output.stdout);
    ensure!(status(&agent, &["--output", "json"]).await?.status.code() == Some(1));
    ensure!(!object(&agent).await?.ready);
    Ok(())
}

#[tokio::test]
async fn an_agent_that_is_down_is_named_with_the_way_out() -> Result<()> {
    if !can_run("an_agent_that_is_down_is_named_with_the_way_out", &[Need::Darter]) {
        return Ok(());
    }
    let mut agent = Agent::start_unready(Options::new(&Place::Host).set("gpu.mode", "off")).await?;
    let url = format!("http://{}", agent.admin_address());
    // By address, wherever the configuration points.
    ensure!(first_line(&status(&agent, &["--admin", &url]).await?).contains("ready"));
    agent.stop().await?;
    for output in [status(&agent, &[]).await?, status(&agent, &["--output", "json"]).await?] {
        ensure!(output.status.code() == Some(2), "{}", output.status);
        ensure!(output.stdout.is_empty(), "{}", output.stdout);
        let named = format!("no agent answers at {url} (admin.listen): start `darter agent`");
        ensure!(output.stderr.contains(&named), "{}", output.stderr);
    }
    let output = status(&agent, &["--admin", "https://node"]).await?;
    ensure!(output.status.code() == Some(2) && output.stderr.contains("http://<host>:<port>"), "{}", output.stderr);
    Ok(())
}

#[tokio::test]
async fn watching_in_a_pipe_prints_blocks_and_goes_on_while_the_agent_is_away() -> Result<()> {
    if !can_run("watching_in_a_pipe_prints_blocks_and_goes_on_while_the_agent_is_away", &[Need::Darter]) {
        return Ok(());
    }
    let mut agent = Agent::start_unready(Options::new(&Place::Host).set("gpu.mode", "off")).await?;
    // `timeout` interrupts it as Ctrl-C does; with --preserve-status its own exit status comes through.
    let mut command = Place::Host.command("timeout");
    command.args(["--preserve-status", "--signal=INT", "7"]).arg(tools::darter()?).args(["status", "--watch"]);
    command.arg("--config").arg(agent.dir().join("darter.toml"));
    let stop = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        agent.signal(Signal::KILL)
    };
    let (output, stopped) = tokio::join!(run(command), stop);
    stopped?;
    let output = output?;
    let blocks: Vec<_> = output.stdout.split("\n\n").filter(|block| !block.starts_with("agent ")).collect();
    ensure!(blocks.len() >= 3 && blocks[0].contains("ready"), "{}", output.stdout);
    let last = blocks.last().copied().unwrap_or_default();
    ensure!(last.starts_with("no answer: no agent answers at http://127.0.0.1:"), "{}", output.stdout);
    ensure!(!output.stdout.contains('\x1b'), "{:?}", output.stdout);
    ensure!(output.status.code() == Some(2), "that of the last look: {}", output.status);
    agent.process().exit(Duration::from_secs(10)).await?;
    Ok(())
}

#[tokio::test]
async fn watching_on_a_terminal_draws_one_screen_and_gives_the_terminal_back() -> Result<()> {
    if !can_run("watching_on_a_terminal_draws_one_screen_and_gives_the_terminal_back", &[Need::Darter]) {
        return Ok(());
    }
    let agent = Agent::start_unready(Options::new(&Place::Host).set("gpu.mode", "off")).await?;
    // `script` gives it a terminal, and shows what it does with that.
    let (darter, config) = (tools::darter()?, agent.dir().join("darter.toml"));
    let watch = format!(
        "timeout --foreground --preserve-status --signal=INT 5 '{}' status --watch --config '{}'",
        darter.display(),
        config.display()
    );
    let mut command = Place::Host.command("script");
    command.args(["--quiet", "--return", "--command", &watch, "/dev/null"]).env("TERM", "xterm");
    let output = run(command).await?;
    let said = &output.stdout;
    ensure!(said.starts_with("\x1b[?1049h"), "{said:?}");
    ensure!(said.trim_end().ends_with("\x1b[?1049l"), "{said:?}");
    ensure!(said.matches("\x1b[H").count() >= 2, "it is drawn anew: {said:?}");
    ensure!(said.contains("\x1b[1;33mready, but degraded\x1b[0m"), "with colours: {said:?}");
    ensure!(output.status.code() == Some(0), "{}", output.status);
    Ok(())
}

#[tokio::test]
async fn watching_ends_when_nobody_reads_it_any_more() -> Result<()> {
    if !can_run("watching_ends_when_nobody_reads_it_any_more", &[Need::Darter]) {
        return Ok(());
    }
    let watch = format!("'{}' status --watch --admin http://127.0.0.1:9 | head -n 1", tools::darter()?.display());
    let mut command = Place::Host.command("timeout");
    command.args(["15", "sh", "-c", &watch]);
    let output = run(command).await?;
    ensure!(
        output.stdout.starts_with("no answer: no agent answers at http://127.0.0.1:9 (--admin)"),
        "{}",
        output.stdout
    );
    ensure!(output.status.code() == Some(0), "{}: {}", output.status, output.stderr);
    Ok(())
}

#[tokio::test]
async fn what_answers_in_an_agents_place_is_told_apart() -> Result<()> {
    if !can_run("what_answers_in_an_agents_place_is_told_apart", &[Need::Darter]) {
        return Ok(());
    }
    let cases = [
        ("", "gives no answer in 5 s: see whether the node is up"),
        ("HTTP/1.1 404 Not Found\r\n\r\nthere are others\n", "has no /v1/status: an agent that is older"),
        ("HTTP/1.1 200 OK\r\n\r\n{\"hello\": 1}\n", "is no status of a darter agent of this version"),
        ("HTTP/1.1 500 Oops\r\n\r\nthe reason\nmore\n", "answers 500: the reason"),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n", "is no HTTP"),
    ];
    for (answer, wanted) in cases {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let mut command = Place::Host.command(tools::darter()?);
        command.args(["status", "--admin", &url]);
        let answering = async {
            let (mut stream, _) = listener.accept().await?;
            let mut head = [0; 1024];
            ensure!(stream.read(&mut head).await? > 0, "nothing was asked");
            stream.write_all(answer.as_bytes()).await?;
            // One that says nothing stays.
            anyhow::Ok(Some(stream).filter(|_| answer.is_empty()))
        };
        let (output, answered) = tokio::join!(run(command), answering);
        let (output, _held) = (output?, answered?);
        ensure!(output.status.code() == Some(2) && output.stdout.is_empty(), "{}: {}", output.status, output.stdout);
        ensure!(output.stderr.contains(&url) && output.stderr.contains(wanted), "{wanted}: {}", output.stderr);
    }
    Ok(())
}
