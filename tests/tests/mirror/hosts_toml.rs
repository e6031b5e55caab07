//! hosts.toml and containerd's configuration, with the real agent, the real commands and a real
//! containerd: whether the mirror is asked, what preflight says about it, what is left afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Agent;
use darter_tests::containerd::{self, ConfigPath, Containerd, hosts_toml};
use darter_tests::fake_ecr::Auth;
use darter_tests::net::Place;
use darter_tests::on_each_release;
use darter_tests::process::{self, Output};
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, Stage, ecr, eventually, pair_options};
use darter_tests::tools::{self, Release};
use serde_json::Value;

/// Runs a command of darter with the configuration of an agent.
async fn darter(place: &Place, agent_dir: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = darter_tests::agent::darter(place)?;
    command.args(arguments).arg("--config").arg(agent_dir.join("darter.toml"));
    process::run(arguments[0], command, Duration::from_secs(30)).await
}

/// What the version of this release begins with.
fn release_of(release: Release) -> &'static str {
    match release {
        Release::V1 => "1.6.",
        Release::V2 | Release::V2Transfer => "2.2.4",
    }
}

/// A check of `/readyz`, as state and reason.
async fn check(agent: &Agent, name: &str) -> Result<(String, String)> {
    let json: Value = serde_json::from_slice(&agent.admin("/readyz").await?.body)?;
    let checks = json["checks"].as_array().context("no checks")?;
    let check = checks.iter().find(|check| check["check"] == name).context("no such check")?;
    let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
    Ok((text("state"), text("reason")))
}

/// Every file and directory below one, with its bytes.
fn tree(dir: &Path) -> Result<BTreeMap<PathBuf, Option<Vec<u8>>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(tree(&path)?);
            found.insert(path, None);
        } else {
            found.insert(path.clone(), Some(fs::read(path)?));
        }
    }
    Ok(found)
}

fn file_of(stage: &Stage) -> PathBuf {
    stage.containerd.certs_d().join(stage.ecr.name()).join("hosts.toml")
}

on_each_release! {
    preflight_says_what_containerd_does(release) {
        use ConfigPath::{One, Two, Unset};
        // The discard setting chooses the pull path on 2.x, and that how config_path is read.
        let cases: &[(bool, ConfigPath, Option<&str>)] = match release {
            Release::V1 => &[(true, Two, None), (true, Unset, Some("no_config_path"))],
            Release::V2 | Release::V2Transfer => &[
                (true, Two, None),
                (false, One, None),
                (false, Two, Some("transfer_two_directories")),
                // It has a default, which is not where this darter writes.
                (true, Unset, Some("not_in_config_path")),
            ],
        };
        for (discard_unpacked_layers, config_path, problem) in cases.iter().copied() {
            let expected = problem.is_none();
            let options = containerd::Options { discard_unpacked_layers, config_path, ..Default::default() };
            let case = format!("{release:?}, discard {discard_unpacked_layers}, {config_path:?}");
            let mut stage = Stage::with(release, &[4096], Auth::Public, &options).await?;
            stage.start_default().await?;
            let place = stage.network.node(0);
            let output = darter(&place, stage.agent().dir(), &["preflight", "--json"]).await?;
            let said: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
            // Where it is not asked the image's own host is, which does not exist here.
            let pulled = stage.containerd.cri().pull(&stage.reference(), None).await;
            let metrics = stage.agent().metrics().await?;
            let asked = metrics.series().iter().any(|(name, _)| name.starts_with("darter_containerd_seen_seconds"));
            assert_eq!(asked, expected, "{case}: containerd itself\n{}", stage.story());
            assert_eq!(pulled.is_ok(), expected, "{case}");
            let reasons = &said["verdicts"];
            // The address in containerd's own configuration told it.
            let version = said["containerd"]["version"].as_str().unwrap_or_default();
            ensure!(version.trim_start_matches('v').starts_with(release_of(release)), "{case}: {said}");
            assert_eq!(said["honoured"], expected, "{case}: {said}");
            if let Some(problem) = problem {
                ensure!(reasons[0]["reason"] == problem && reasons[0]["severity"] == "blocks", "{case}: {reasons}");
                // The agent found out the same way: this containerd never asks it.
                let (state, reason) = check(stage.agent(), "containerd").await?;
                assert_eq!(state, "degraded", "{case}: {reason}");
                ensure!(!reason.contains("version unknown"), "{case}: {reason}");
            }
            assert_eq!(output.status.code(), Some(i32::from(!expected)), "{case}: {reasons}");
        }
        Ok(())
    }

    where_nobody_tells_the_version_preflight_says_that_it_cannot_tell(release) {
        // Only the version tells these two apart.
        let (discard_unpacked_layers, config_path) = (false, ConfigPath::Two);
        let options = containerd::Options { discard_unpacked_layers, config_path, ..Default::default() };
        let mut containerd = Containerd::start(release, &Place::Host, &options).await?;
        let dir = Scratch::new()?;
        let at = |path: &Path| path.display().to_string();
        let (certs_d, config) = (at(&containerd.certs_d()), at(&containerd.config()));
        let config = |socket: &Path| {
            let socket = at(socket);
            format!("[certs_d]\npath = {certs_d:?}\n[containerd]\nconfig = {config:?}\nsocket = {socket:?}\n")
        };
        let honoured = match release {
            Release::V1 => Value::Bool(true),
            Release::V2 | Release::V2Transfer => Value::Bool(false),
        };
        // The socket that the operator named counts, whatever containerd's own configuration says.
        for (socket, honoured, code) in [
            (containerd.socket(), honoured.clone(), i32::from(honoured == false)),
            (dir.join("nothing-there"), Value::Null, 3),
        ] {
            fs::write(dir.join("darter.toml"), config(&socket))?;
            let output = darter(&Place::Host, dir.path(), &["preflight", "--json"]).await?;
            let said: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
            assert_eq!((&said["honoured"], output.status.code()), (&honoured, Some(code)), "{said}");
            assert_eq!(said["containerd"]["socket"], at(&socket), "{said}");
            let text = darter(&Place::Host, dir.path(), &["preflight"]).await?;
            assert_eq!(text.status.code(), Some(code), "{text:?}");
            let is_told = !text.stdout.contains("version unknown");
            assert_eq!(is_told, !honoured.is_null(), "{}", text.stdout);
            ensure!(said.to_string().contains("version unknown") != is_told, "{said}");
        }
        // A containerd that hangs is waited for no longer than a moment.
        containerd.process().signal(rustix::process::Signal::STOP)?;
        fs::write(dir.join("darter.toml"), config(&containerd.socket()))?;
        let output = darter(&Place::Host, dir.path(), &["preflight"]).await?;
        containerd.process().signal(rustix::process::Signal::CONT)?;
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        ensure!(output.stdout.contains("no answer within"), "{}", output.stdout);
        Ok(())
    }

    what_dragonfly_and_spegel_left_is_taken_out_and_put_back(release) {
        let stage = Stage::new(release, &[MIB]).await?;
        let file = file_of(&stage);
        let real = hosts_toml(&stage.ecr.url(), None, &[]);
        let dragonfly = "\n[host.\"http://127.0.0.1:4001\"]\n  capabilities = [\"pull\", \"resolve\"]\n\n\
            [host.\"http://127.0.0.1:4001\".header]\n  X-Dragonfly-Registry = [\"https://registry.example\"]\n";
        let spegel = "\n[host.\"http://10.77.1.1:30020\"]\n  capabilities = [\"pull\", \"resolve\"]\n  \
            dial_timeout = \"200ms\"\n\n[host.\"http://10.77.1.1:30021\"]\n  capabilities = [\"pull\", \"resolve\"]\n  \
            dial_timeout = \"200ms\"\n";
        for (who, entry) in [("dragonfly", dragonfly), ("spegel", spegel)] {
            let text = format!("{real}{entry}");
            stage.containerd.write_hosts(&stage.ecr.name(), &text)?;
            stage.ecr.reset_counts();
            let mut agent = Agent::start(stage.options("public").set("certs_d.adopt", true)).await?;
            let adopted = fs::read_to_string(&file)?;
            ensure!(!adopted.contains("30020") && !adopted.to_lowercase().contains("dragonfly"), "{who}:\n{adopted}");
            let ours = adopted.lines().filter(|line| *line == "[host.\"http://127.0.0.1:4001\"]").count();
            assert_eq!(ours, 1, "{who}:\n{adopted}");
            stage.pull().await.with_context(|| agent.log())?;
            assert_eq!(stage.read_by_containerd(), 0, "{who}: past the mirror");
            ensure!(stage.ecr.blob_bytes() > MIB, "{who}: nothing came");
            agent.stop().await?;
            assert_eq!(fs::read_to_string(&file)?, text, "{who}: not put back");
            stage.containerd.forget().await?;
        }
        // Without being told so, darter does not take Dragonfly's place at an address that is both's.
        stage.containerd.write_hosts(&stage.ecr.name(), &format!("{real}{dragonfly}"))?;
        let agent = Agent::start_unready(stage.options("public")).await?;
        eventually("it is said", async || {
            let (state, reason) = check(&agent, "hosts_toml").await?;
            Ok(state == "degraded" && reason.contains("Dragonfly") && reason.contains("certs_d.adopt"))
        })
        .await?;
        assert_eq!(fs::read_to_string(&file)?, format!("{real}{dragonfly}"));
        let said = agent.log().lines().filter(|line| line.contains("another program left a host")).count();
        assert_eq!(said, 1, "{}", agent.log());
        Ok(())
    }

    where_darter_may_not_write_readyz_says_what_the_file_should_be(release) {
        let mut stage = Stage::new(release, &[MIB]).await?;
        let certs_d = stage.containerd.certs_d();
        stage.containerd.write_hosts("docker.io", "server = \"https://registry-1.docker.io\"\n")?;
        let before = tree(&certs_d)?;
        let agent = Agent::start(stage.options("public").set("certs_d.write", false)).await?;
        let (state, reason) = check(&agent, "hosts_toml").await?;
        assert_eq!(state, "degraded");
        let (_, should_be) = reason.split_once("it should be:\n").context(reason.clone())?;
        ensure!(tree(&certs_d)? == before, "something was written");
        // Whoever owns the host puts it there, and it works.
        stage.containerd.write_hosts(&stage.ecr.name(), should_be)?;
        stage.agent = Some(agent);
        stage.pull().await?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        eventually("it is seen", async || Ok(check(stage.agent(), "hosts_toml").await?.0 == "ok")).await?;
        let in_force = tree(&certs_d)?;
        stage.agent.as_mut().context("started")?.stop().await?;
        ensure!(tree(&certs_d)? == in_force, "the file was not darter's to take away");
        Ok(())
    }
}

#[tokio::test]
async fn config_check_warns_of_what_the_agent_starts_without_and_refuses_what_it_does_not() -> Result<()> {
    let name = "config_check_warns_of_what_the_agent_starts_without_and_refuses_what_it_does_not";
    if !tools::can_run(name, &[tools::Need::Darter]) {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let registry = "[[registry]]\nname = \"a.example\"\n";
    for (line, code, said) in [
        ("", 0, "ok: 1 registries configured"),
        ("ca = \"/nonexistent\"", 0, "darter.toml:3: registry[0].ca: cannot read /nonexistent"),
        ("endpoint = \"https://x y\"", 1, "darter.toml:3: registry[0].endpoint: `https://x y` is not a URL"),
    ] {
        fs::write(dir.join("darter.toml"), format!("{registry}{line}\n"))?;
        let output = darter(&Place::Host, dir.path(), &["config", "check"]).await?;
        let all = format!("{}{}", output.stdout, output.stderr);
        ensure!(output.status.code() == Some(code) && all.contains(said), "{line}: {output:?}");
        ensure!(all.contains("warning") == (code == 0 && !line.is_empty()), "{line}: {output:?}");
    }
    Ok(())
}

#[tokio::test]
async fn uninstall_after_a_kill_leaves_certs_d_byte_for_byte_as_it_was() -> Result<()> {
    let test = "uninstall_after_a_kill_leaves_certs_d_byte_for_byte_as_it_was";
    if !tools::can_run(test, &[tools::Need::Darter]) {
        return Ok(());
    }
    let ecr = ecr(Auth::Public)?;
    let dir = Scratch::new()?;
    let certs_d = dir.dir("containerd/certs.d")?;
    let put = |path: &str, text: &str| -> Result<()> {
        let path = certs_d.join(path);
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        Ok(fs::write(path, text)?)
    };
    let harbor = "# ours; ask Mia\nserver = \"https://x.example\" # yes\n\n[host.\"https://harbor.example\"]\n\
        \tcapabilities = [ 'pull' ]\n[host.\"https://harbor.example\".header]\nX-Team = \"ml\"\n# end";
    put(&format!("{}/hosts.toml", ecr.name()), harbor)?;
    put("_default/hosts.toml", "# everybody's\n[host.\"https://cache.example\"]\n")?;
    put("ghcr.io/ca.crt", "CA")?;
    let others = [("second.example", "https://second.example"), ("third.example:5000", "https://third.example:5000")];
    let mut options = pair_options(&ecr, &[]).set("certs_d.path", certs_d.display().to_string());
    for (name, url) in others {
        options = options.registry(name, &[("endpoint", url.into())]);
    }
    let before = tree(&certs_d)?;
    let mut agent = Agent::start(options).await?;
    for name in [ecr.name().as_str(), others[0].0, others[1].0] {
        let text = fs::read_to_string(certs_d.join(name).join("hosts.toml"))?;
        ensure!(text.contains(&agent.mirror_url()), "{name}:\n{text}");
    }
    agent.kill().await?;
    ensure!(tree(&certs_d)? != before);
    let output = darter(&Place::Host, agent.dir(), &["uninstall"]).await?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(output.stdout.contains(&ecr.name()) && output.stdout.contains("is back"), "{output:?}");
    ensure!(tree(&certs_d)? == before, "{:#?}", tree(&certs_d)?.keys());
    let output = darter(&Place::Host, agent.dir(), &["uninstall"]).await?;
    ensure!(output.status.success() && output.stdout.contains("nothing to do"), "{output:?}");
    Ok(())
}

#[tokio::test]
async fn a_mirror_that_answers_nobody_is_withdrawn_and_comes_back() -> Result<()> {
    if !tools::can_run("a_mirror_that_answers_nobody_is_withdrawn_and_comes_back", &[tools::Need::Darter]) {
        return Ok(());
    }
    let ecr = ecr(Auth::Public)?;
    let options = pair_options(&ecr, &[]).set("mirror.max_connections", 2).set("mirror.client_timeout", "60s");
    let agent = Agent::start(options).await?;
    let file = agent.dir().join("certs.d").join(ecr.name()).join("hosts.toml");
    ensure!(file.exists());
    // All places are taken by clients that say nothing: the self-test is not even accepted.
    let mut idle = Vec::new();
    for _ in 0..2 {
        idle.push(Place::Host.connect(agent.mirror()).await?);
    }
    eventually("the file is withdrawn", async || Ok(!file.exists())).await?;
    let answer = agent.admin("/readyz").await?;
    assert_eq!(answer.status, 503);
    let (state, reason) = check(&agent, "mirror").await?;
    assert_eq!(state, "failed");
    ensure!(reason.contains("gives no answer"), "{reason}");
    drop(idle);
    eventually("the file is back", async || Ok(file.exists())).await?;
    eventually("it is ready again", async || Ok(agent.admin("/readyz").await?.status == 200)).await
}

#[tokio::test]
async fn uninstall_beside_a_running_agent_lasts_until_the_agent_is_started_again() -> Result<()> {
    let test = "uninstall_beside_a_running_agent_lasts_until_the_agent_is_started_again";
    if !tools::can_run(test, &[tools::Need::Darter]) {
        return Ok(());
    }
    let ecr = ecr(Auth::Public)?;
    let dir = Scratch::new()?;
    let certs_d = dir.dir("containerd/certs.d")?;
    let file = certs_d.join(ecr.name()).join("hosts.toml");
    fs::create_dir_all(file.parent().context("a file is in a directory")?)?;
    fs::write(
        &file,
        "server = \"https://x.example\" # ours\n[host.\"https://harbor.example\"]\ncapabilities = ['pull']",
    )?;
    let before = tree(&certs_d)?;
    let mut agent = Agent::start(pair_options(&ecr, &[]).set("certs_d.path", certs_d.display().to_string())).await?;
    ensure!(fs::read_to_string(&file)?.contains(&agent.mirror_url()));
    let state = [("state", "uninstalled")];
    for said in ["is back", "nothing to do"] {
        let output = darter(&Place::Host, agent.dir(), &["uninstall"]).await?;
        ensure!(output.status.success() && output.stdout.contains(said), "{output:?}");
        ensure!(output.stdout.contains("the running agent did this, and writes no hosts.toml until"), "{output:?}");
        ensure!(tree(&certs_d)? == before, "{:#?}", tree(&certs_d)?);
        // Neither the timer, which is 1 s, nor a change makes the agent write.
        fs::write(certs_d.join("stir"), "")?;
        tokio::time::sleep(Duration::from_millis(2500)).await;
        fs::remove_file(certs_d.join("stir"))?;
        ensure!(tree(&certs_d)? == before, "written again: {:#?}", tree(&certs_d)?);
        assert_eq!(agent.admin("/readyz").await?.status, 503);
        let (told, reason) = check(&agent, "hosts_toml").await?;
        ensure!(told == "failed" && reason.contains("given up by `darter uninstall`"), "{told}: {reason}");
        let metrics = agent.metrics().await?;
        assert_eq!(metrics.sum("darter_hosts_toml", &state), 1.0);
        assert_eq!(metrics.sum("darter_hosts_toml", &[]), 1.0, "one state at a time");
    }
    assert_eq!(agent.log().matches("no hosts.toml is written until this agent is started again").count(), 1);
    agent.stop().await?;
    ensure!(tree(&certs_d)? == before, "a stop has nothing to take out");
    let output = darter(&Place::Host, agent.dir(), &["uninstall"]).await?;
    ensure!(output.status.success() && output.stdout.contains("no agent answers at"), "{output:?}");
    agent.start_again().await?;
    ensure!(fs::read_to_string(&file)?.contains(&agent.mirror_url()));
    Ok(())
}

#[tokio::test]
async fn an_agent_that_does_not_answer_is_not_uninstalled_behind_its_back() -> Result<()> {
    let test = "an_agent_that_does_not_answer_is_not_uninstalled_behind_its_back";
    if !tools::can_run(test, &[tools::Need::Darter]) {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let certs_d = dir.dir("certs.d/reg.example")?;
    fs::write(
        certs_d.join("hosts.toml"),
        "# darter owns only the [host.\"http://127.0.0.1:4001\"] table; other edits stay\n\n[host.\"http://127.0.0.1:4001\"]\n",
    )?;
    let before = tree(&certs_d)?;
    let socket = dir.join("admin.sock");
    let (path, at) = (dir.join("certs.d").display().to_string(), socket.display().to_string());
    fs::write(dir.join("darter.toml"), format!("[certs_d]\npath = {path:?}\n[admin]\nsocket = {at:?}\n"))?;
    // As an agent of a version that knows no such order does.
    let listener = tokio::net::UnixListener::bind(&socket)?;
    let refusing = async {
        let (mut stream, _) = listener.accept().await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.0 405 Method Not Allowed\r\n\r\nGET only\n").await
    };
    let (refused, output) = tokio::join!(refusing, darter(&Place::Host, dir.path(), &["uninstall"]));
    refused?;
    let output = output?;
    ensure!(!output.status.success() && output.stderr.contains("stop it, then do this again"), "{output:?}");
    ensure!(tree(&certs_d)? == before, "the agent would write it again");
    Ok(())
}
