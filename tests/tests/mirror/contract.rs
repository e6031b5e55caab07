//! The contract with containerd, on each release that is installed: whatever happens to the agent or
//! to the registry, the pull succeeds, and the origin sends no more than it must.
//!
//! Numbers in brackets are rows of the contract list.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::agent::Options;
use darter_tests::containerd::{self, hosts_toml};
use darter_tests::fake_ecr::{self, Auth, FakeEcr, Fault, Kind, Rule};
use darter_tests::on_each_way;
use darter_tests::stage::{MIB, Stage, bytes, eventually};

on_each_way! {
    a_pull_reads_each_byte_from_the_origin_once_and_the_next_none(release) {
        let mut stage = Stage::new(release, &[9 * MIB, 3 * MIB, MIB / 2]).await?;
        stage.start_default().await?;
        stage.pull().await?;
        let wanted: u64 = stage.image.pulled_blobs().map(|item| item.size()).sum();
        assert_eq!(stage.ecr.blob_bytes(), wanted, "{}", stage.story());
        ensure!(asked_by_containerd(&stage).is_empty(), "{:?}\n{}", asked_by_containerd(&stage), stage.story());
        stage.agent().counted("darter_mirror_bytes_total", &[], |sum| sum >= bytes(wanted)).await?;
        // With discard_unpacked_layers containerd keeps no layer: the second pull needs them all. [11]
        stage.containerd.forget().await?;
        stage.ecr.reset_counts();
        stage.pull().await?;
        assert_eq!(stage.ecr.blob_bytes(), 0, "{}", stage.story());
        let cached = [("source", "cache")];
        stage.agent().counted("darter_mirror_bytes_total", &cached, |sum| sum >= bytes(wanted)).await?;
        Ok(())
    }

    a_private_registry_is_read_with_the_nodes_credential_and_nobody_else_is_asked(release) {
        // [10] [13] The pod brings no secret, and tags are asked for at the mirror as everything is.
        let options = containerd::Options::default();
        let mut stage = Stage::with(release, &[4 * MIB], Auth::Ecr, &options).await?;
        let role = stage.options("node").set("aws.ecr_endpoint", stage.ecr.api_url());
        let role = role.env("AWS_ACCESS_KEY_ID", "AKIANODE").env("AWS_SECRET_ACCESS_KEY", "secret-of-the-node");
        stage.start(role).await?;
        stage.pull().await?;
        ensure!(asked_by_containerd(&stage).is_empty(), "{:?}\n{}", asked_by_containerd(&stage), stage.story());
        let tag = |seen: &fake_ecr::Seen| seen.line.starts_with("HEAD ") && seen.line.contains("/manifests/v1");
        ensure!(stage.ecr.log().iter().any(tag), "nobody asked what the tag means\n{}", stage.story());
        for secret in [stage.ecr.password().as_str(), "secret-of-the-node"] {
            ensure!(!stage.agent().log().contains(secret), "a credential is in the log");
        }
        Ok(())
    }

    an_agent_that_is_down_is_passed_over(release) {
        // [1] hosts.toml still names the mirror, as after a kill.
        let stage = Stage::new(release, &[MIB]).await?;
        let text = hosts_toml(&stage.ecr.url(), Some("http://127.0.0.1:4001"), &["pull", "resolve"]);
        stage.containerd.write_hosts(&stage.ecr.name(), &text)?;
        stage.pull().await?;
        // What it costs is a refused connection for each request, and not one more: no pause, no second try.
        let log = stage.containerd.log();
        let refused = log.lines().filter(|line| line.contains("127.0.0.1:4001: connect: connection refused")).count();
        let asked = asked_by_containerd(&stage).into_iter().filter(|line| line.contains(" /v2/")).count();
        // 1.6 does not log each of them.
        ensure!((1..=asked).contains(&refused), "{refused} refused of {asked}\n{}", stage.story());
        ensure!(release == Release::V1 || refused == asked, "{refused} refused of {asked}\n{}", stage.story());
        let wanted: u64 = stage.image.pulled_blobs().map(|item| item.size()).sum();
        assert_eq!(stage.ecr.blob_bytes(), wanted, "{}", stage.story());
        ensure!(stage.ecr.log().iter().all(|seen| seen.agent.starts_with("containerd/")));
        Ok(())
    }

    an_origin_that_hangs_before_headers_is_answered_404_in_time(release) {
        // [2] The agent's first request for the layer never gets headers; containerd's own does.
        let mut stage = Stage::new(release, &[4 * MIB]).await?;
        stage.start(stage.options("public").set("mirror.answer_within", "500ms")).await?;
        let (layer, _) = stage.layer();
        stage.ecr.inject(Rule::on(Kind::Blob).digest(layer), Fault::Delay(Duration::MAX));
        stage.pull().await?;
        assert!(stage.read_by_containerd() > 0, "{}", stage.story());
        Ok(())
    }

    a_tag_and_a_manifest_that_hang_before_headers_are_answered_404_in_time(release) {
        // [2] The same for what is no blob: the question for the tag, then that for the manifest itself.
        for kind in [Kind::ManifestHead, Kind::Manifest] {
            let mut stage = Stage::new(release, &[MIB]).await?;
            stage.start(stage.options("public").set("mirror.answer_within", "500ms")).await?;
            stage.ecr.inject(Rule::on(kind), Fault::Delay(Duration::MAX));
            stage.pull().await?;
            let late = stage.agent().counted("darter_mirror_refusals_total", &[("reason", "late")], |sum| sum >= 1.0);
            late.await.with_context(|| format!("{kind:?}: {}", stage.story()))?;
            let asked = stage.ecr.log().iter().filter(|seen| seen.agent.starts_with("containerd/")).count();
            assert!(asked > 0, "{kind:?}: containerd did not go on at the registry\n{}", stage.story());
        }
        Ok(())
    }

    a_body_that_stalls_is_cut_and_containerd_reads_only_the_rest(release) {
        // [3] [6] Half of the layer comes, then silence: longer than the mirror's patience.
        let mut stage = Stage::new(release, &[12 * MIB]).await?;
        stage.start(stage.options("public").set("origin.ranges", 1).set("origin.stall", "20s")).await?;
        let (layer, size) = stage.layer();
        let half = 4 * MIB;
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Stall(half, Duration::from_secs(60)));
        stage.pull().await?;
        assert_eq!(stage.metric("darter_mirror_handovers_total", &[("reason", "stalled")]).await?, 1.0, "{}", stage.story());
        let by_containerd = stage.read_by_containerd();
        assert!((1..=size - half + 2 * MIB).contains(&by_containerd), "{by_containerd} of {size}\n{}", stage.story());
        Ok(())
    }

    an_origin_that_breaks_off_is_resumed_unseen(release) {
        let mut stage = Stage::new(release, &[12 * MIB]).await?;
        stage.start_default().await?;
        let (layer, _) = stage.layer();
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Truncate(MIB));
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Reset(2 * MIB));
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Status(503, Some(0)));
        stage.pull().await?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        assert_eq!(stage.metric("darter_mirror_handovers_total", &[]).await?, 0.0);
        Ok(())
    }

    a_signed_url_that_expires_in_mid_pull_is_asked_for_again(release) {
        let mut stage = Stage::new(release, &[20 * MIB]).await?;
        stage.start(stage.options("public").set("origin.ranges", 1)).await?;
        let (layer, _) = stage.layer();
        // The second range finds its signature gone.
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer).after(1), Fault::Status(403, None));
        stage.pull().await?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        assert_eq!(stage.ecr.count_of(Kind::Blob, layer).requests, 2, "one 307 more, {}", stage.story());
        Ok(())
    }

    a_registry_that_lies_fails_the_pull_and_keeps_nothing(release) {
        let mut stage = Stage::new(release, &[4 * MIB]).await?;
        stage.start_default().await?;
        let (layer, _) = stage.layer();
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer).always(), Fault::WrongByte(MIB));
        let error = stage.containerd.cri().pull(&stage.reference(), None).await.err();
        // By containerd's own look at what it got.
        let error = error.map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(error.contains("unexpected commit digest"), "{error:?}");
        let kept = |stage: &Stage| {
            let file = |dir: &str| stage.agent().dir().join(dir).join(layer.hex());
            [file("data/blobs"), file("data/ingest")].into_iter().filter(|file| file.exists()).collect::<Vec<_>>()
        };
        eventually("nothing of it is kept", async || Ok(kept(&stage).is_empty())).await.with_context(|| stage.story())?;
        let rotten = stage.agent().counted("darter_pulls_total", &[("outcome", "store_failed")], |sum| sum >= 1.0);
        rotten.await.with_context(|| stage.story())?;
        stage.ecr.clear_faults();
        stage.agent.as_mut().expect("started").stop().await?;
        stage.agent.as_mut().expect("started").start_again().await?;
        ensure!(kept(&stage).is_empty(), "it came back: {:?}", kept(&stage));
        Ok(())
    }

    sigterm_in_mid_pull_is_not_seen_by_the_pull(release) {
        // [7]
        let mut stage = Stage::new(release, &[24 * MIB]).await?;
        stage.start_default().await?;
        stage.ecr.set_rate(None, Some(4 * MIB));
        let mut agent = stage.agent.take().expect("started");
        let pull = stage.pull();
        let stop = async {
            wait_for_origin_bytes(&stage.ecr, 2 * MIB).await?;
            agent.stop().await
        };
        let (pulled, stopped) = tokio::join!(pull, stop);
        stopped?;
        pulled.with_context(|| agent.log())?;
        let ((_, size), read) = (stage.layer(), stage.read_by_containerd());
        ensure!((1..size).contains(&read), "containerd reads the rest of {size}, and no more: {read}\n{}", stage.story());
        let hosts = std::fs::read_to_string(stage.containerd.certs_d().join(stage.ecr.name()).join("hosts.toml"))?;
        ensure!(!hosts.contains("127.0.0.1:4001"), "hosts.toml still names the mirror:\n{hosts}");
        Ok(())
    }

    kill_in_mid_pull_is_not_seen_by_the_pull_and_the_ingest_is_resumed(release) {
        let mut stage = Stage::new(release, &[24 * MIB]).await?;
        stage.start_default().await?;
        stage.ecr.set_rate(None, Some(4 * MIB));
        let mut agent = stage.agent.take().expect("started");
        let kill = async {
            wait_for_origin_bytes(&stage.ecr, 8 * MIB).await?;
            agent.kill().await
        };
        let (pulled, killed) = tokio::join!(stage.pull(), kill);
        killed?;
        pulled.with_context(|| agent.log())?;
        let ((_, size), read) = (stage.layer(), stage.read_by_containerd());
        ensure!((1..size).contains(&read), "containerd reads the rest of {size}, and no more: {read}\n{}", stage.story());
        // What had arrived is not read again.
        stage.ecr.set_rate(None, None);
        stage.ecr.reset_counts();
        agent.start_again().await?;
        stage.agent = Some(agent);
        stage.containerd.forget().await?;
        stage.pull().await?;
        let again = stage.ecr.blob_bytes();
        ensure!(again <= size - 4 * MIB, "{again} of {size} bytes were read again\n{}", stage.story());
        Ok(())
    }

    with_the_callers_policy_the_pull_secret_opens_the_mirror(release) {
        // [12] Without a credential the pull goes to the origin by itself, and is refused there.
        let options = containerd::Options::default();
        let mut stage = Stage::with(release, &[4 * MIB], Auth::Ecr, &options).await?;
        stage.start(stage.options("caller")).await?;
        ensure!(stage.containerd.cri().pull(&stage.reference(), None).await.is_err(), "an anonymous pull was let in");
        assert_eq!(stage.metric("darter_mirror_bytes_total", &[]).await?, 0.0);
        let password = stage.ecr.password();
        stage.containerd.cri().pull(&stage.reference(), Some(("AWS", &password))).await.with_context(|| stage.story())?;
        assert_eq!(stage.read_by_containerd(), 0, "{}", stage.story());
        ensure!(!stage.agent().log().contains(&password), "the credential is in the log");
        // Somebody else, after the blobs are here, still needs a credential of their own.
        stage.containerd.forget().await?;
        let wrong = stage.containerd.cri().pull(&stage.reference(), Some(("AWS", "wrong"))).await;
        ensure!(wrong.is_err(), "a wrong credential opened what is cached");
        Ok(())
    }

    a_digest_reference_is_pulled_too_and_without_resolve_tags_go_to_the_origin(release) {
        // [13]
        let mut stage = Stage::new(release, &[2 * MIB]).await?;
        let name = stage.ecr.name();
        let options = Options::new(&stage.network.node(0))
            .set("certs_d.path", stage.containerd.certs_d().display().to_string())
            .registry(&name, &[
                ("endpoint", stage.ecr.url().into()),
                ("plain_http", true.into()),
                ("access", "public".into()),
                ("resolve", false.into()),
            ]);
        stage.start(options).await?;
        stage.pull().await?;
        let tags = stage.ecr.log().iter().filter(|seen| seen.line.contains("/manifests/v1")).map(|seen| seen.agent.clone()).collect::<Vec<_>>();
        assert!(tags.iter().all(|agent| agent.starts_with("containerd/")) && !tags.is_empty(), "{tags:?}");
        assert!(stage.ecr.count(Kind::Object).requests > 0);
        stage.containerd.forget().await?;
        stage.ecr.reset_counts();
        let reference = format!("{name}/team/app@{}", stage.image.root.digest());
        stage.containerd.cri().pull(&reference, None).await.with_context(|| stage.story())?;
        assert_eq!(stage.ecr.blob_bytes(), 0, "{}", stage.story());
        Ok(())
    }

    hosts_toml_comes_back_when_somebody_breaks_it(release) {
        // [14]
        let mut stage = Stage::new(release, &[MIB]).await?;
        stage.start_default().await?;
        let file = stage.containerd.certs_d().join(stage.ecr.name()).join("hosts.toml");
        for broken in BROKEN {
            break_and_wait(&file, broken).await.with_context(|| stage.story())?;
        }
        // Counted right after the file is there.
        let repairs = async || stage.metric("darter_hosts_toml_repairs_total", &[]).await;
        eventually("each repair is counted", async || Ok(repairs().await? >= 3.0)).await?;
        assert_eq!(repairs().await?, 3.0, "{}", stage.story());
        Ok(())
    }

    hosts_toml_may_break_and_come_back_while_a_layer_comes(release) {
        // [14] containerd has read it, once for the tag and once for all blobs; no pull may be lost.
        let mut stage = Stage::new(release, &[8 * MIB, MIB]).await?;
        stage.start(stage.options("public").set("origin.ranges", 1)).await?;
        let file = stage.containerd.certs_d().join(stage.ecr.name()).join("hosts.toml");
        let (layer, size) = stage.layer();
        stage.ecr.inject(Rule::on(Kind::Object).digest(layer), Fault::Slow(2 * MIB));
        let breaks = async {
            wait_for_origin_bytes(&stage.ecr, MIB).await?;
            for broken in BROKEN {
                break_and_wait(&file, broken).await?;
            }
            std::fs::remove_file(&file)?;
            break_and_wait(&file, "").await?;
            ensure!(stage.ecr.blob_bytes() < size, "the pull was over before the file was broken");
            Ok(())
        };
        let (pulled, broken) = tokio::join!(stage.pull(), breaks);
        broken.with_context(|| stage.story())?;
        pulled?;
        let wanted: u64 = stage.image.pulled_blobs().map(|item| item.size()).sum();
        assert_eq!(stage.ecr.blob_bytes(), wanted, "{}", stage.story());
        Ok(())
    }

    an_origin_that_is_away_serves_what_is_here_by_digest(release) {
        let mut stage = Stage::new(release, &[2 * MIB]).await?;
        stage.start_default().await?;
        stage.pull().await?;
        stage.containerd.forget().await?;
        stage.ecr.down().await;
        let reference = format!("{}/team/app@{}", stage.ecr.name(), stage.image.root.digest());
        stage.containerd.cri().pull(&reference, None).await.with_context(|| stage.story())?;
        Ok(())
    }
}

/// What people and programs leave in a hosts.toml.
const BROKEN: [&str; 3] = ["", "server = [", "server = \"http://10.77.0.1:1\"\n"];

/// Writes `broken` over a hosts.toml and waits until the mirror stands in it again.
async fn break_and_wait(file: &Path, broken: &str) -> Result<()> {
    std::fs::write(file, broken)?;
    let healed = async {
        while !std::fs::read_to_string(file).is_ok_and(|text| text.contains("127.0.0.1:4001")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), healed).await.context("hosts.toml is not healed")
}

/// What containerd itself asked the registry for.
fn asked_by_containerd(stage: &Stage) -> Vec<String> {
    let log = stage.ecr.log().into_iter();
    log.filter(|seen| seen.agent.starts_with("containerd/")).map(|seen| seen.line).collect()
}

async fn wait_for_origin_bytes(ecr: &FakeEcr, bytes: u64) -> Result<()> {
    let reached = async {
        while ecr.blob_bytes() < bytes {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reached).await.context("the pull does not start")
}
