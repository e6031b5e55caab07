//! Hosts before the registry, as a user's hosts.toml names them: a lax cache that gives everything to
//! everybody, and a strict registry. What the cache may bring, what its yes never opens, and when it is
//! asked at all.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::{Agent, Options};
use darter_tests::fake_ecr::{Auth, FakeEcr, Fault, Kind, Rule};
use darter_tests::http::Client;
use darter_tests::image::{Content, Format, Image, Item, Layer};
use darter_tests::net::Place;
use darter_tests::scratch::Scratch;
use darter_tests::stage::{MIB, REPOSITORY, TAG, ecr, eventually, pair_options};
use darter_tests::tools::{Need, can_run};
use http::Method;
use toml_edit::Value;

/// A registry, a cache before it, and an agent whose hosts.toml names the cache.
struct Site {
    agent: Agent,
    cache: FakeEcr,
    registry: FakeEcr,
    image: Image,
    /// The user's certs.d, and the password of the node.
    dir: Scratch,
}

impl Site {
    /// The image is in both. Everybody may read the cache.
    async fn new(auth: Auth, access: &str, change: impl FnOnce(Options) -> Options) -> Result<Self> {
        Self::with(auth, &[("access", access.into())], "[\"pull\", \"resolve\"]", change).await
    }

    async fn with(
        auth: Auth,
        keys: &[(&str, Value)],
        capabilities: &str,
        change: impl FnOnce(Options) -> Options,
    ) -> Result<Self> {
        let (cache, registry) = (ecr(Auth::Public)?, ecr(auth)?);
        let image = Image::index(Format::Oci, 7, &[MIB, 4096])?;
        cache.push(&image, REPOSITORY, TAG);
        registry.push(&image, REPOSITORY, TAG);
        let dir = Scratch::new()?;
        let certs_d = dir.dir("containerd/certs.d")?;
        fs::create_dir_all(certs_d.join(registry.name()))?;
        let text = format!("[host.{:?}]\n  capabilities = {capabilities}\n", cache.url());
        fs::write(certs_d.join(registry.name()).join("hosts.toml"), text)?;
        fs::write(dir.join("password"), registry.password())?;
        let password = dir.join("password").display().to_string();
        let mut keys = keys.to_vec();
        if keys.iter().any(|(key, value)| *key == "access" && value.as_str() == Some("node")) {
            keys.extend([("username", "AWS".into()), ("password_file", password.into())]);
        }
        let options = pair_options(&registry, &keys)
            .set("certs_d.path", certs_d.display().to_string())
            .set("mirror.prefetch", "off");
        let agent = Agent::start(change(options)).await?;
        Ok(Self { agent, cache, registry, image, dir })
    }

    fn url(&self, repository: &str, path: &str) -> String {
        format!("{}/v2/{repository}/{path}?ns={}", self.agent.mirror_url(), self.registry.name())
    }

    /// GET at the mirror: the status, and the digest of the body.
    async fn get(&self, repository: &str, path: &str) -> Result<(u16, Digest)> {
        let answer = Client::new(Place::Host).get(&self.url(repository, path)).await?;
        Ok((answer.status.as_u16(), Digest::of(&answer.body)))
    }

    /// Whether the mirror gives this to whoever asks, in any way.
    async fn opens(&self, repository: &str, path: &str) -> Result<bool> {
        let (client, url) = (Client::new(Place::Host), self.url(repository, path));
        let (get, head) = (client.get(&url).await?, client.head(&url).await?);
        let later = client.call(Method::GET, &url, &[("Range", "bytes=10-")]).await?;
        ensure!(get.status == head.status, "{path}: GET {}, HEAD {}", get.status, head.status);
        ensure!(get.status == 200 || later.status == get.status, "{path}: {}, and {}", get.status, later.status);
        Ok(get.status == 200)
    }

    async fn bring_all(&self, repository: &str, image: &Image) -> Result<()> {
        let manifests = image.all_manifests().map(|item| (format!("manifests/{}", item.digest()), item.digest()));
        let blobs = image.blobs().map(|item| (format!("blobs/{}", item.digest()), item.digest()));
        // The index first, as containerd reads it.
        for (path, digest) in manifests.collect::<Vec<_>>().into_iter().rev().chain(blobs) {
            assert_eq!(self.get(repository, &path).await?, (200, digest), "{path}\n{}", self.agent.log());
            eventually("it is kept", async || Ok(self.agent.dir().join("data/blobs").join(digest.hex()).exists()))
                .await?;
        }
        Ok(())
    }
}

fn can(test: &str) -> bool {
    can_run(test, &[Need::Darter])
}

fn kinds(registry: &FakeEcr) -> Vec<Kind> {
    registry.log().iter().map(|seen| seen.kind).collect()
}

#[tokio::test]
async fn what_a_cache_gives_to_everybody_is_no_proof() -> Result<()> {
    if !can("what_a_cache_gives_to_everybody_is_no_proof") {
        return Ok(());
    }
    // Nobody may read the registry without a credential, and the node's is not good.
    for access in ["public", "node"] {
        let site = Site::new(Auth::Ecr, access, |options| options).await?;
        site.registry.revoke_tokens();
        for path in [
            format!("manifests/{TAG}"),
            format!("manifests/{}", site.image.root.digest()),
            format!("manifests/{}", site.image.manifests[0].digest()),
            format!("blobs/{}", site.image.layers[0].digest()),
        ] {
            ensure!(!site.opens(REPOSITORY, &path).await?, "{access}: {path} opens\n{}", site.agent.log());
        }
        ensure!(!site.registry.log().is_empty(), "{access}: the registry was not asked");
        ensure!(site.cache.log().is_empty(), "{access}: {:?}", site.cache.log());
    }
    Ok(())
}

#[tokio::test]
async fn once_the_registry_said_yes_the_cache_brings_the_bytes() -> Result<()> {
    if !can("once_the_registry_said_yes_the_cache_brings_the_bytes") {
        return Ok(());
    }
    let site = Site::new(Auth::Ecr, "node", |options| options).await?;
    assert_eq!(site.get(REPOSITORY, &format!("manifests/{TAG}")).await?, (200, site.image.root.digest()));
    let image = site.image.manifests[0].digest();
    assert_eq!(site.get(REPOSITORY, &format!("manifests/{image}")).await?, (200, image));
    for blob in site.image.pulled_blobs() {
        assert_eq!(site.get(REPOSITORY, &format!("blobs/{}", blob.digest())).await?, (200, blob.digest()));
    }
    assert_eq!(kinds(&site.registry), [Kind::ManifestHead; 2], "the tag, and the image: proofs and no bytes");
    ensure!(site.cache.blob_bytes() >= site.image.layer_bytes(), "the bytes came from elsewhere");
    ensure!(site.cache.log().iter().all(|seen| seen.authorization.is_empty()), "the cache saw a credential");

    // A repository that the registry refuses: all of it is in the cache, and on this node by now.
    for at in [&site.cache, &site.registry] {
        at.push(&site.image, "team/secret", TAG);
    }
    site.registry.inject(Rule::any().path("team/secret").always(), Fault::Status(403, None));
    site.cache.reset_counts();
    for path in
        [format!("manifests/{TAG}"), format!("manifests/{image}"), format!("blobs/{}", site.image.layers[0].digest())]
    {
        ensure!(!site.opens("team/secret", &path).await?, "{path} opens\n{}", site.agent.log());
    }
    ensure!(site.cache.log().is_empty(), "{:?}", site.cache.log());

    // What the cache does not have, or not right, comes from the registry.
    let other = Image::new(Format::Oci, 20, &[4096, 8192])?;
    site.registry.push(&other, REPOSITORY, "v2");
    site.cache.inject(Rule::on(Kind::Manifest).digest(other.root.digest()), Fault::WrongByte(0));
    site.cache.push(&Image { layers: Vec::new(), ..other.clone() }, REPOSITORY, "v2");
    assert_eq!(site.get(REPOSITORY, "manifests/v2").await?, (200, other.root.digest()));
    for layer in &other.layers {
        assert_eq!(site.get(REPOSITORY, &format!("blobs/{}", layer.digest())).await?, (200, layer.digest()));
    }
    assert_eq!(site.cache.count_of(Kind::Manifest, other.root.digest()).requests, 1, "it was not asked");
    Ok(())
}

/// The node has a private image, and its proof is too old to count; the registry is away.
async fn away_with_a_private_image() -> Result<(Site, Image)> {
    let old = |options: Options| options.set("mirror.proof_ttl", "100ms").set("mirror.proof_stale", "1s");
    let mut site = Site::new(Auth::Ecr, "node", old).await?;
    let private = Image::new(Format::Oci, 30, &[MIB])?;
    site.registry.push(&private, "team/private", TAG);
    site.bring_all("team/private", &private).await?;
    site.registry.down().await;
    let path = format!("blobs/{}", private.layers[0].digest());
    eventually("the proof is too old", async || Ok(site.get("team/private", &path).await?.0 == 404)).await?;
    Ok((site, private))
}

#[tokio::test]
async fn while_the_registry_is_away_a_cache_opens_what_it_gives_and_nothing_else() -> Result<()> {
    if !can("while_the_registry_is_away_a_cache_opens_what_it_gives_and_nothing_else") {
        return Ok(());
    }
    let (mut site, private) = away_with_a_private_image().await?;
    let (manifest, layer) = (private.root.digest(), &private.layers[0]);
    let (manifest, blob) = (format!("manifests/{manifest}"), format!("blobs/{}", layer.digest()));
    // Somebody puts a manifest into the public cache that names the private layer.
    let named = [private.root.content.to_bytes().as_ref(), b"\n"].concat();
    let evil = Image { layers: Vec::new(), ..private.clone() }.with_root(named.into());
    let root = format!("manifests/{}", evil.root.digest());
    site.cache.push(&evil, "team/evil", TAG);
    for by in [&root, &root, &format!("manifests/{TAG}")] {
        assert_eq!(site.get("team/evil", by).await?, (200, evil.root.digest()), "it is the cache's to give");
    }
    ensure!(!site.opens("team/evil", &blob).await?, "a cache's manifest opened the layer\n{}", site.agent.log());
    // And one of the private image under its own name.
    ensure!(!site.opens("team/private", &manifest).await?, "nobody gave it");
    site.cache.push(&Image { layers: Vec::new(), ..private.clone() }, "team/private", TAG);
    ensure!(site.opens("team/private", &manifest).await?, "the cache gives it\n{}", site.agent.log());
    ensure!(!site.opens("team/private", &blob).await?, "a cache's manifest opened the layer\n{}", site.agent.log());
    // It says that it has the layer, and has not.
    let other = Content::Layer(Layer::new(31, MIB));
    let lie = Item { descriptor: layer.descriptor.clone(), content: other };
    site.cache.push(&Image { layers: vec![lie], ..private.clone() }, "team/evil", TAG);
    ensure!(!site.opens("team/evil", &blob).await?, "a yes opened the layer\n{}", site.agent.log());
    ensure!(site.agent.log().contains("shows other bytes"), "{}", site.agent.log());
    // It has it.
    site.cache.push(&private, "team/private", TAG);
    site.cache.reset_counts();
    assert_eq!(site.get("team/private", &blob).await?, (200, layer.digest()), "{}", site.agent.log());
    ensure!(site.cache.blob_bytes() < 1024, "what is here was fetched again");
    let asked = site.cache.log().len();
    ensure!(site.opens("team/private", &blob).await?);
    assert_eq!(site.cache.log().len(), asked, "a loan was asked for again at once");

    // The registry's word ends it, and none of it was a proof.
    site.registry.inject(Rule::any().always(), Fault::Status(403, None));
    site.registry.up()?;
    eventually("the loan is over", async || Ok(site.get("team/private", &blob).await?.0 == 404)).await?;
    ensure!(!site.opens("team/private", &manifest).await? && !site.opens("team/evil", &root).await?);
    site.registry.clear_faults();
    // What the cache's manifest names is not what the registry has in that repository.
    site.registry.push(&Image::new(Format::Oci, 40, &[512])?, "team/evil", TAG);
    assert_eq!(site.get("team/evil", &format!("manifests/{TAG}")).await?.0, 200);
    ensure!(!site.opens("team/evil", &blob).await?, "a loan was remembered as content\n{}", site.agent.log());
    Ok(())
}

#[tokio::test]
async fn a_site_that_reaches_only_its_cache_pulls_through_it() -> Result<()> {
    if !can("a_site_that_reaches_only_its_cache_pulls_through_it") {
        return Ok(());
    }
    for (is_silent, access) in [(false, "public"), (true, "node")] {
        let mut site = Site::new(Auth::Public, access, |options| options.set("mirror.prefetch", "layers")).await?;
        match is_silent {
            true => site.registry.inject(Rule::any().always(), Fault::Delay(std::time::Duration::MAX)),
            false => site.registry.down().await,
        }
        let tag = format!("manifests/{TAG}");
        assert_eq!(site.get(REPOSITORY, &tag).await?, (200, site.image.root.digest()), "{}", site.agent.log());
        site.bring_all(REPOSITORY, &site.image).await?;
        let read = site.cache.blob_bytes();
        site.bring_all(REPOSITORY, &site.image).await?;
        ensure!(site.cache.blob_bytes() - read < 10_000, "fetched twice: {read}, {}", site.cache.blob_bytes());
        // What it does not give, nobody gives.
        assert_eq!(site.get(REPOSITORY, "manifests/never-seen").await?.0, 404);
        assert_eq!(site.get("team/other", &format!("blobs/{}", site.image.layers[0].digest())).await?.0, 404);
        ensure!(site.agent.log().contains("the registry is away"), "{}", site.agent.log());
        ensure!(site.dir.path().exists());
    }
    Ok(())
}

#[tokio::test]
async fn a_pull_with_a_credential_of_its_own_gets_no_loan() -> Result<()> {
    if !can("a_pull_with_a_credential_of_its_own_gets_no_loan") {
        return Ok(());
    }
    let mut site = Site::new(Auth::Ecr, "caller", |options| options).await?;
    let client = Client::new(Place::Host).basic("AWS", &site.registry.password());
    let (tag, layer) = (format!("manifests/{TAG}"), site.image.layers[0].digest());
    site.registry.down().await;
    for path in [&tag, &format!("manifests/{}", site.image.root.digest()), &format!("blobs/{layer}")] {
        assert_eq!(client.get(&site.url(REPOSITORY, path)).await?.status, 404, "{path}");
    }
    ensure!(site.cache.log().is_empty(), "{:?}", site.cache.log());
    // Its bytes may come from the cache once it is proved.
    site.registry.up()?;
    for path in [&tag, &format!("manifests/{}", site.image.manifests[0].digest()), &format!("blobs/{layer}")] {
        let answer = client.get(&site.url(REPOSITORY, path)).await?;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    assert_eq!((site.registry.blob_bytes(), site.cache.count_of(Kind::Blob, layer).granted > 0), (0, true));
    ensure!(site.cache.log().iter().all(|seen| seen.authorization.is_empty()), "the cache saw a credential");
    Ok(())
}

#[tokio::test]
async fn what_a_tag_means_the_registry_says_and_a_cache_only_while_that_is_away() -> Result<()> {
    if !can("what_a_tag_means_the_registry_says_and_a_cache_only_while_that_is_away") {
        return Ok(());
    }
    let keys = [("access", "public".into()), ("serve_stale", "node".into())];
    let short = |options: Options| options.set("mirror.tag_ttl", "100ms");
    let mut site = Site::with(Auth::Public, &keys, "[\"pull\", \"resolve\"]", short).await?;
    let theirs = Image::index(Format::Oci, 50, &[512])?;
    site.cache.push(&theirs, REPOSITORY, TAG);
    site.cache.push(&theirs, REPOSITORY, "theirs");
    let tag = format!("manifests/{TAG}");
    assert_eq!(site.get(REPOSITORY, &tag).await?, (200, site.image.root.digest()));
    assert_eq!(site.get(REPOSITORY, "manifests/theirs").await?.0, 404, "the registry's no is final");
    assert_eq!(site.cache.count(Kind::ManifestHead).requests, 0);

    site.registry.down().await;
    let stale = async || anyhow::Ok(site.agent.metrics().await?.sum("darter_stale_tags_total", &[]));
    eventually("the tag's time is over", async || {
        // What the registry said itself comes first.
        assert_eq!(site.get(REPOSITORY, &tag).await?, (200, site.image.root.digest()));
        Ok(stale().await? > 0.0)
    })
    .await?;
    assert_eq!(site.get(REPOSITORY, "manifests/theirs").await?, (200, theirs.root.digest()), "{}", site.agent.log());
    // And what the cache said is over with the cache.
    let told = stale().await?;
    site.cache.down().await;
    eventually("it is forgotten", async || Ok(site.get(REPOSITORY, "manifests/theirs").await?.0 == 404)).await?;
    assert_eq!(stale().await?, told, "a cache's answer was taken for the registry's");

    // A cache that may not resolve is not asked what a tag means.
    let mut site = Site::with(Auth::Public, &keys[..1], "[\"pull\"]", |options| options).await?;
    site.registry.down().await;
    assert_eq!(site.get(REPOSITORY, &tag).await?.0, 404);
    let root = site.image.root.digest();
    assert_eq!(site.get(REPOSITORY, &format!("manifests/{root}")).await?, (200, root));
    Ok(())
}

#[tokio::test]
async fn a_host_that_comes_to_hosts_toml_or_goes_is_followed_while_the_agent_runs() -> Result<()> {
    if !can("a_host_that_comes_to_hosts_toml_or_goes_is_followed_while_the_agent_runs") {
        return Ok(());
    }
    // Read one range after the other, so that a pull asks many times; and looked at when it is changed,
    // not by the timer.
    let slow = |options: Options| options.set("certs_d.check_every", "1h").set("origin.ranges", 1);
    let site = Site::with(Auth::Public, &[("access", "public".into())], "[\"pull\"]", slow).await?;
    let file = site.dir.join("containerd/certs.d").join(site.registry.name()).join("hosts.toml");
    let said = |word: &str| site.agent.log().lines().filter(|line| line.contains(word)).count();
    let swapped = "asked before the registry now";
    let brings = async |seed: u64| -> Result<(u64, u64)> {
        let image = Image::new(Format::Oci, seed, &[MIB])?;
        for at in [&site.cache, &site.registry] {
            at.push(&image, REPOSITORY, &format!("v{seed}"));
        }
        let before = [&site.cache, &site.registry].map(FakeEcr::blob_bytes);
        assert_eq!(site.get(REPOSITORY, &format!("manifests/v{seed}")).await?, (200, image.root.digest()));
        let layer = image.layers[0].digest();
        assert_eq!(site.get(REPOSITORY, &format!("blobs/{layer}")).await?, (200, layer));
        Ok((site.cache.blob_bytes() - before[0], site.registry.blob_bytes() - before[1]))
    };
    let (from_cache, from_registry) = brings(60).await?;
    ensure!(from_cache >= MIB && from_registry == 0, "{from_cache} and {from_registry}");

    // The user takes it out of the file that darter wrote.
    let with = fs::read_to_string(&file)?;
    let (without, _) = with.split_once(&format!("[host.{:?}]", site.cache.url())).context("it is in the file")?;
    fs::write(&file, without)?;
    eventually("it is seen", async || Ok(said(swapped) == 1)).await?;
    let (from_cache, from_registry) = brings(61).await?;
    ensure!(from_cache == 0 && from_registry >= MIB, "{from_cache} and {from_registry}\n{}", site.agent.log());

    // A pull runs from the registry while the user puts it back: that one ends where it began.
    let running = Image::new(Format::Oci, 62, &[40 * MIB])?;
    for at in [&site.cache, &site.registry] {
        at.push(&running, REPOSITORY, "v62");
    }
    assert_eq!(site.get(REPOSITORY, "manifests/v62").await?.0, 200);
    site.registry.set_rate(Some(20 * MIB), None);
    let layer = running.layers[0].digest();
    let (url, client) = (site.url(REPOSITORY, &format!("blobs/{layer}")), Client::new(Place::Host));
    let pull = tokio::spawn(async move { client.get(&url).await });
    eventually("it runs", async || Ok(site.registry.count_of(Kind::Blob, layer).bytes > 0)).await?;
    fs::write(&file, &with)?;
    eventually("it is seen", async || Ok(said(swapped) == 2)).await?;
    ensure!(!pull.is_finished(), "the pull was over before");
    site.registry.inject(Rule::on(Kind::Blob).digest(layer), Fault::Truncate(MIB));
    assert_eq!(Digest::of(&pull.await??.body), layer);
    assert_eq!(site.cache.count_of(Kind::Blob, layer).requests, 0, "a running pull went over to the cache");
    let (from_cache, from_registry) = brings(63).await?;
    ensure!(from_cache >= MIB && from_registry == 0, "{from_cache} and {from_registry}\n{}", site.agent.log());
    let line = site.agent.log().lines().find(|line| line.contains(swapped)).unwrap_or_default().to_owned();
    ensure!(line.contains("registry=") && line.contains("hosts=[]"), "{line}");
    Ok(())
}
