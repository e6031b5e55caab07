//! Who may read what is cached: every policy against a registry that asks for a credential, and what
//! holds while the registry is away.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::emulator::End;
use darter_tests::fake_ecr::{self, Auth, FakeEcr, Fault, Kind, Rule};
use darter_tests::http::{Client, basic};
use darter_tests::image::{Format, Image};
use darter_tests::net::Place;
use darter_tests::registry::{self, Registry};
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, Pair, REPOSITORY, TAG, eventually};
use darter_tests::tools::{Need, can_run};
use futures_util::future::try_join_all;

/// The name by which the images of a docker-registry are called.
const REGISTRY: &str = "registry.test.example";

/// With these keys of the registry besides its access policy, which is `public`.
async fn public(keys: &[(&str, toml_edit::Value)], change: impl FnOnce(Options) -> Options) -> Result<Pair> {
    let keys = [[("access", "public".into())].as_slice(), keys].concat();
    Pair::with(&[MIB, 4096], Auth::Public, &keys, |options| change(options.set("mirror.prefetch", "off"))).await
}

async fn bring_all(pair: &Pair) -> Result<()> {
    pair.read_manifests().await?;
    for blob in pair.image.pulled_blobs() {
        pair.bring(blob).await?;
    }
    Ok(())
}

#[tokio::test]
async fn with_the_nodes_credential_a_repository_opens_what_it_holds_and_nothing_else() -> Result<()> {
    let name = "with_the_nodes_credential_a_repository_opens_what_it_holds_and_nothing_else";
    if !can_run(name, &[Need::Darter, Need::DockerRegistry]) {
        return Ok(());
    }
    let registry = Registry::start(&Place::Host, registry::Options::with_password("reader", "node-secret")).await?;
    let (a, b) = (Image::new(Format::Oci, 1, &[MIB])?, Image::new(Format::Oci, 2, &[4096])?);
    registry.push(&a, "team/a", "v1").await?;
    registry.push(&b, "team/b", "v1").await?;
    let dir = Scratch::new()?;
    fs::write(dir.join("password"), "node-secret\n")?;
    let keys = [
        ("endpoint", registry.url().into()),
        ("plain_http", true.into()),
        ("access", "node".into()),
        ("username", "reader".into()),
        ("password_file", dir.join("password").display().to_string().into()),
    ];
    let agent = Agent::start(Options::new(&Place::Host).registry(REGISTRY, &keys)).await?;
    let client = Client::new(Place::Host);
    let url = |path: String| format!("{}/v2/{path}?ns={REGISTRY}", agent.mirror_url());
    for (repository, image) in [("team/a", &a), ("team/b", &b)] {
        let manifest = client.get(&url(format!("{repository}/manifests/v1"))).await?;
        assert_eq!(Digest::of(&manifest.body), image.root.digest(), "{}", manifest.text());
        let layer = client.get(&url(format!("{repository}/blobs/{}", image.layers[0].digest()))).await?;
        assert_eq!(Digest::of(&layer.body), image.layers[0].digest());
    }
    // Cached, and proved for the other repository: whoever may read one may not read both.
    for path in [
        format!("team/b/blobs/{}", a.layers[0].digest()),
        format!("team/b/manifests/{}", a.root.digest()),
        format!("team/nobodys/blobs/{}", a.layers[0].digest()),
        format!("team/nobodys/manifests/{}", a.root.digest()),
    ] {
        for answer in [client.get(&url(path.clone())).await?, client.head(&url(path.clone())).await?] {
            assert_eq!(answer.status, 404, "{path}");
        }
        let later = client.call(http::Method::GET, &url(path.clone()), &[("Range", "bytes=10-")]).await?;
        assert_eq!(later.status, 404, "{path}");
    }
    ensure!(!agent.log().contains("node-secret"), "the password is in the log");
    Ok(())
}

#[tokio::test]
async fn where_everybody_may_read_a_blob_of_another_repository_stays_closed_too() -> Result<()> {
    let name = "where_everybody_may_read_a_blob_of_another_repository_stays_closed_too";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let pair = public(&[], |options| options).await?;
    bring_all(&pair).await?;
    let other = Image::index(Format::Oci, 8, &[2048])?;
    pair.ecr.push(&other, "team/other", "v1");
    assert_eq!(pair.client().get(&pair.url_in("team/other", "manifests/v1")).await?.status, 200);
    let path = format!("blobs/{}", pair.layer().digest());
    pair.ecr.reset_counts();
    assert_eq!(pair.client().get(&pair.url_in("team/other", &path)).await?.status, 404);
    // The registry was asked, and it is the registry that said no.
    assert_eq!(pair.ecr.count(Kind::Blob).requests, 1);
    assert_eq!(pair.get(&path).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn a_registry_that_is_off_is_404_and_has_no_hosts_toml() -> Result<()> {
    if !can_run("a_registry_that_is_off_is_404_and_has_no_hosts_toml", &[Need::Darter]) {
        return Ok(());
    }
    let ecr = darter_tests::stage::ecr(Auth::Public)?;
    let image = Image::index(Format::Oci, 7, &[4096])?;
    ecr.push(&image, REPOSITORY, TAG);
    let options = darter_tests::stage::pair_options(&ecr, &[("access", "off".into())]);
    // Not ready: nothing that is configured is mirrored, and that is said.
    let agent = Agent::start_unready(options).await?;
    let client = Client::new(Place::Host);
    for path in [format!("manifests/{TAG}"), format!("blobs/{}", image.layers[0].digest())] {
        let url = format!("{}/v2/{REPOSITORY}/{path}?ns={}", agent.mirror_url(), ecr.name());
        let answer = client.get(&url).await?;
        assert_eq!(answer.status, 404);
        ensure!(answer.text().contains("off"), "{}", answer.text());
    }
    ensure!(ecr.log().is_empty(), "the registry was asked: {:?}", ecr.log());
    ensure!(!agent.dir().join("certs.d").join(ecr.name()).exists(), "hosts.toml was written");
    Ok(())
}

#[tokio::test]
async fn a_registry_whose_ca_is_missing_keeps_no_other_from_being_served_and_comes_up_with_it() -> Result<()> {
    let name = "a_registry_whose_ca_is_missing_keeps_no_other_from_being_served_and_comes_up_with_it";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let whole = darter_tests::stage::ecr(Auth::Public)?;
    let other = fake_ecr::Options { account: "210987654321".to_owned(), ..Default::default() };
    let options = fake_ecr::Options { auth: Auth::Public, tls: true, redirect: false, ..other };
    let late = FakeEcr::start(&Place::Host, options)?;
    let image = Image::index(Format::Oci, 7, &[4096])?;
    for ecr in [&whole, &late] {
        ecr.push(&image, REPOSITORY, TAG);
    }
    let secrets = Scratch::new()?;
    let ca = secrets.join("ca.pem");
    let keys = [("endpoint", late.url().into()), ("ca", ca.display().to_string().into()), ("access", "public".into())];
    let options = darter_tests::stage::pair_options(&whole, &[("access", "public".into())]);
    let agent = Agent::start_unready(options.registry(&late.name(), &keys)).await?;
    let client = Client::new(Place::Host);
    let url = |ecr: &FakeEcr| format!("{}/v2/{REPOSITORY}/manifests/{TAG}?ns={}", agent.mirror_url(), ecr.name());
    let hosts = |ecr: &FakeEcr| agent.dir().join("certs.d").join(ecr.name()).join("hosts.toml");
    eventually("the other is served", async || Ok(hosts(&whole).exists())).await?;
    assert_eq!(client.get(&url(&whole)).await?.status, 200);
    assert_eq!(client.get(&url(&late)).await?.status, 404);
    let answer = agent.admin("/readyz").await?;
    let says = answer.text();
    ensure!(answer.status == 503 && says.contains("ca.pem") && says.contains("No such file"), "{says}");
    ensure!(!hosts(&late).exists(), "hosts.toml sends containerd where only 404 is");

    fs::write(&ca, late.authority().expect("it speaks TLS").pem())?;
    eventually("it is served too", async || Ok(hosts(&late).exists())).await?;
    assert_eq!(client.get(&url(&late)).await?.status, 200);
    eventually("all is well", async || Ok(agent.admin("/readyz").await?.status == 200)).await
}

#[tokio::test]
async fn a_ca_that_is_changed_is_trusted_without_a_restart_and_one_that_is_broken_changes_nothing() -> Result<()> {
    let name = "a_ca_that_is_changed_is_trusted_without_a_restart_and_one_that_is_broken_changes_nothing";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let tls = || fake_ecr::Options { auth: Auth::Public, tls: true, redirect: false, ..Default::default() };
    let (ecr, before) = (FakeEcr::start(&Place::Host, tls())?, FakeEcr::start(&Place::Host, tls())?);
    ecr.push(&Image::index(Format::Oci, 7, &[4096])?, REPOSITORY, TAG);
    let pem = |ecr: &FakeEcr| ecr.authority().expect("it speaks TLS").pem();
    let secrets = Scratch::new()?;
    let ca = secrets.join("ca.pem");
    // As it was before the registry got a certificate of another authority.
    fs::write(&ca, pem(&before))?;
    let keys = [("endpoint", ecr.url().into()), ("ca", ca.display().to_string().into()), ("access", "public".into())];
    let options = Options::new(&Place::Host).set("certs_d.check_every", "1s").registry(&ecr.name(), &keys);
    let agent = Agent::start(options).await?;
    let client = Client::new(Place::Host);
    let url = |tag: &str| format!("{}/v2/{REPOSITORY}/manifests/{tag}?ns={}", agent.mirror_url(), ecr.name());
    assert_eq!(client.get(&url(TAG)).await?.status, 404);
    ensure!(ecr.log().is_empty(), "a registry that nobody vouches for was asked");
    fs::write(&ca, pem(&ecr))?;
    eventually("the new authority is trusted", async || Ok(client.get(&url(TAG)).await?.status == 200)).await?;
    fs::write(&ca, "half a certif")?;
    eventually("it is said", async || Ok(agent.log().contains("its ca cannot be used any more"))).await?;
    ecr.push(&Image::index(Format::Oci, 8, &[4096])?, REPOSITORY, "v2");
    assert_eq!(client.get(&url("v2")).await?.status, 200);
    Ok(())
}

/// Whether the mirror opens a path to this credential.
async fn opens(pair: &Pair, credential: Option<(&str, &str)>, path: &str) -> Result<bool> {
    let client = match credential {
        Some((user, password)) => pair.client().basic(user, password),
        None => pair.client(),
    };
    let (get, head) = (client.get(&pair.url(path)).await?, client.head(&pair.url(path)).await?);
    ensure!(get.status == head.status, "{path}: GET {}, HEAD {}", get.status, head.status);
    if credential.is_none() {
        ensure!(get.status == 401 && get.header("www-authenticate").starts_with("Basic "), "{path}: {}", get.status);
    }
    ensure!(get.status == 200 || get.body.len() < 1000, "{path}: {} with a body", get.status);
    Ok(get.status == 200)
}

#[tokio::test]
async fn with_the_callers_policy_every_asker_needs_a_credential_that_works() -> Result<()> {
    let name = "with_the_callers_policy_every_asker_needs_a_credential_that_works";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let keys = [("access", "caller".into())];
    // The most that can be logged: whatever it says, no credential may be in it.
    let pair = Pair::with(&[MIB], Auth::Ecr, &keys, |options| options.set("log.level", "trace")).await?;
    let (good, revoked) = (pair.ecr.password(), "a-password-that-was-never-good");
    let layer = pair.layer().digest();
    let paths = [
        format!("manifests/{TAG}"),
        format!("manifests/{}", pair.image.root.digest()),
        format!("manifests/{}", pair.image.manifests[0].digest()),
        format!("blobs/{layer}"),
    ];
    for path in &paths {
        ensure!(!opens(&pair, None, path).await?, "{path} is open to everybody");
        ensure!(opens(&pair, Some(("AWS", &good)), path).await?, "{path} is closed to its owner");
    }
    eventually("the layer is cached", async || Ok(pair.blob_file(layer).exists())).await?;
    for path in &paths {
        for wrong in [None, Some(("AWS", revoked)), Some(("", "")), Some(("root", good.as_str()))] {
            ensure!(!opens(&pair, wrong, path).await?, "{path} is cached, and opens to {wrong:?}");
        }
        ensure!(opens(&pair, Some(("AWS", &good)), path).await?, "{path} is closed to its owner");
    }
    // And where things go wrong, too.
    pair.ecr.inject(Rule::any().always(), Fault::Status(500, None));
    let client = pair.client().basic("AWS", &good);
    client.get(&pair.url("manifests/never-seen")).await?;
    client.get(&pair.url("tags/list")).await?;
    for secret in [good.as_str(), revoked] {
        for text in [secret.to_owned(), basic("AWS", secret).replace("Basic ", "")] {
            ensure!(!pair.agent.log().contains(&text), "the credential is in the log");
            let metrics = pair.agent.admin("/metrics").await?.text() + &pair.agent.admin("/readyz").await?.text();
            ensure!(!metrics.contains(&text), "the credential is in a metric");
            no_file_contains(pair.agent.dir(), text.as_bytes())?;
        }
    }
    Ok(())
}

fn no_file_contains(dir: &Path, secret: &[u8]) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let (path, kind) = (entry.as_ref().map(fs::DirEntry::path), entry.as_ref().map(fs::DirEntry::file_type));
        let (Ok(path), Ok(Ok(kind))) = (path, kind) else { continue };
        if kind.is_dir() {
            no_file_contains(&path, secret)?;
        } else if kind.is_file() {
            let found = fs::read(&path)?.windows(secret.len()).any(|part| part == secret);
            ensure!(!found, "the credential is in {}", path.display());
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_proof_that_is_over_is_asked_for_again_by_a_head() -> Result<()> {
    if !can_run("a_proof_that_is_over_is_asked_for_again_by_a_head", &[Need::Darter]) {
        return Ok(());
    }
    let pair = public(&[], |options| options.set("mirror.proof_ttl", "2s")).await?;
    bring_all(&pair).await?;
    let path = format!("blobs/{}", pair.layer().digest());
    // A tag that is asked for is a proof, and a new one.
    pair.ecr.push(&pair.image, REPOSITORY, "v2");
    assert_eq!(pair.head("manifests/v2").await?.status, 200);
    pair.ecr.reset_counts();
    assert_eq!(pair.get(&path).await?.status, 200);
    ensure!(pair.ecr.log().is_empty(), "a fresh proof was asked for again: {:?}", pair.ecr.log());
    eventually("the proof is asked for again", async || {
        ensure!(pair.get(&path).await?.status == 200);
        Ok(pair.ecr.count(Kind::ManifestHead).requests > 0)
    })
    .await?;
    let asked: Vec<_> = pair.ecr.log().iter().map(|seen| seen.kind).collect();
    assert_eq!(asked, [Kind::ManifestHead], "one HEAD, and no byte");
    // Nobody may read any more: what is cached is closed as soon as the next proof is due.
    pair.ecr.inject(Rule::any().always(), Fault::Status(403, None));
    eventually("it is closed", async || Ok(pair.get(&path).await?.status == 404)).await
}

#[tokio::test]
async fn while_the_registry_is_away_an_old_proof_opens_what_is_cached_by_digest() -> Result<()> {
    let name = "while_the_registry_is_away_an_old_proof_opens_what_is_cached_by_digest";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let ttl = |options: Options| options.set("mirror.proof_ttl", "100ms").set("mirror.proof_stale", "6s");
    let mut pair = public(&[], ttl).await?;
    bring_all(&pair).await?;
    pair.ecr.down().await;
    let digests = [
        format!("manifests/{}", pair.image.root.digest()),
        format!("manifests/{}", pair.image.manifests[0].digest()),
        format!("blobs/{}", pair.image.config.digest()),
        format!("blobs/{}", pair.layer().digest()),
    ];
    // Refused connections are a registry that is away, and so is one that answers 503.
    for path in &digests {
        assert_eq!(pair.get(path).await?.status, 200, "{path}\n{}", pair.agent.log());
        assert_eq!(pair.client().get(&pair.url_in("team/other", path)).await?.status, 404, "{path} has no proof there");
    }
    pair.ecr.up()?;
    pair.ecr.inject(Rule::any().always(), Fault::Status(503, None));
    for path in &digests {
        assert_eq!(pair.get(path).await?.status, 200, "{path}\n{}", pair.agent.log());
    }
    eventually("the old proof is too old", async || Ok(pair.get(&digests[3]).await?.status == 404)).await?;
    // It comes back with the registry.
    pair.ecr.clear_faults();
    assert_eq!(pair.get(&digests[3]).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn a_tag_is_answered_from_memory_only_where_the_operator_says_so() -> Result<()> {
    let name = "a_tag_is_answered_from_memory_only_where_the_operator_says_so";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    for (serve_stale, status) in [("node", 200), ("off", 404)] {
        let keys = [("serve_stale", serve_stale.into())];
        let mut pair = public(&keys, |options| options.set("mirror.tag_ttl", "200ms")).await?;
        bring_all(&pair).await?;
        pair.ecr.down().await;
        let path = format!("manifests/{TAG}");
        eventually("the tag's time is over", async || {
            let answer = pair.get(&path).await?;
            Ok(answer.status == 404 || pair.metric("darter_stale_tags_total", &[]).await? > 0.0)
        })
        .await?;
        let answer = pair.get(&path).await?;
        assert_eq!(answer.status, status, "serve_stale = {serve_stale}");
        if status == 200 {
            assert_eq!(Digest::of(&answer.body), pair.image.root.digest());
            ensure!(pair.agent.log().contains("answering the digest seen last"), "{}", pair.agent.log());
        } else {
            assert_eq!(pair.metric("darter_stale_tags_total", &[]).await?, 0.0);
        }
        // A tag that this node never saw is nobody's to make up.
        assert_eq!(pair.get("manifests/never-seen").await?.status, 404);
        // And it is over with the registry's return: a moved tag is seen.
        pair.ecr.up()?;
        let moved = Image::index(Format::Oci, 70, &[512])?;
        pair.ecr.push(&moved, REPOSITORY, TAG);
        eventually("the moved tag is seen", async || {
            Ok(pair.head(&path).await?.header("docker-content-digest") == moved.root.digest().to_string())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_tag_is_asked_once_for_all_and_again_when_its_time_is_over() -> Result<()> {
    if !can_run("a_tag_is_asked_once_for_all_and_again_when_its_time_is_over", &[Need::Darter]) {
        return Ok(());
    }
    let pair = public(&[], |options| options.set("mirror.tag_ttl", "2s")).await?;
    let path = format!("manifests/{TAG}");
    // They all come while the first is waiting.
    pair.ecr.inject(Rule::on(Kind::ManifestHead), Fault::Delay(Duration::from_millis(300)));
    for answer in try_join_all((0..16).map(|_| pair.head(&path))).await? {
        assert_eq!(answer.header("docker-content-digest"), pair.image.root.digest().to_string());
    }
    assert_eq!(pair.ecr.count(Kind::ManifestHead).requests, 1);
    let moved = Image::index(Format::Oci, 70, &[512])?;
    pair.ecr.push(&moved, REPOSITORY, TAG);
    let digest = async || anyhow::Ok(pair.head(&path).await?.header("docker-content-digest").to_owned());
    assert_eq!(digest().await?, pair.image.root.digest().to_string(), "believed for its time");
    assert_eq!(pair.ecr.count(Kind::ManifestHead).requests, 1);
    eventually("the moved tag is seen", async || Ok(digest().await? == moved.root.digest().to_string())).await?;
    assert_eq!(pair.ecr.count(Kind::ManifestHead).requests, 2);
    Ok(())
}

#[tokio::test]
async fn after_a_hand_over_the_404_waits_for_no_proof_and_tells_a_stranger_nothing() -> Result<()> {
    let name = "after_a_hand_over_the_404_waits_for_no_proof_and_tells_a_stranger_nothing";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let pair = public(&[], |options| options.set("mirror.proof_ttl", "1s")).await?;
    // Larger than what is on its way to a client that reads nothing.
    let image = Image::index(Format::Oci, 3, &[24 * MIB])?;
    pair.ecr.push(&image, REPOSITORY, "large");
    let layer = image.layers[0].clone();
    pair.bring(&layer).await?;
    let path = format!("blobs/{}", layer.digest());
    let mut reader = pair.open(&path, &[]).await?;
    fs::File::options().write(true).open(pair.blob_file(layer.digest()))?.set_len(MIB)?;
    assert_eq!(reader.read(None, |_| ()).await?, End::Fin);
    // From now on no proof comes, and the one there was is over.
    pair.ecr.inject(Rule::any().always(), Fault::Delay(Duration::MAX));
    tokio::time::sleep(Duration::from_millis(1200)).await;
    for headers in [[].as_slice(), &[("Range", "bytes=1048576-")]] {
        let answer = pair.open(&path, headers).await?;
        assert_eq!(answer.exchange.status, Some(404));
        ensure!(pair.get_with(&path, headers).await?.text().contains("cut short a moment ago"), "another reason");
    }
    // It is asked for under another name, which nobody proved: what happened here is not theirs to know.
    let started = std::time::Instant::now();
    let answer = pair.client().get(&pair.url_in("team/other", &path)).await?;
    ensure!(answer.status == 404 && !answer.text().contains("cut short"), "{}", answer.text());
    ensure!(started.elapsed() > Duration::from_secs(1), "answered without a proof: {:?}", started.elapsed());
    Ok(())
}
