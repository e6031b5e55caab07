//! What an agent that is started again knows of who may read what.

use std::fs;

use anyhow::{Result, ensure};
use darter_core::Digest;
use darter_tests::fake_ecr::Auth;
use darter_tests::stage::{MIB, Pair, TAG, eventually};
use darter_tests::tools::{Need, can_run};

/// An agent that has all of an image, in the registry's memory and in its own; with these keys of the registry.
async fn pair(keys: &[(&str, toml_edit::Value)]) -> Result<Pair> {
    let keys = [[("access", "public".into())].as_slice(), keys].concat();
    let pair = Pair::with(&[MIB, 4096], Auth::Public, &keys, |options| {
        // Whatever is not proved anew is old.
        options.set("mirror.prefetch", "off").set("mirror.proof_ttl", "100ms").set("mirror.tag_ttl", "100ms")
    })
    .await?;
    pair.read_manifests().await?;
    for blob in pair.image.pulled_blobs() {
        pair.bring(blob).await?;
    }
    Ok(pair)
}

fn digests(pair: &Pair) -> [String; 4] {
    [
        format!("manifests/{}", pair.image.root.digest()),
        format!("manifests/{}", pair.image.manifests[0].digest()),
        format!("blobs/{}", pair.image.config.digest()),
        format!("blobs/{}", pair.layer().digest()),
    ]
}

async fn are_all(pair: &Pair, status: u16) -> Result<()> {
    for path in digests(pair) {
        assert_eq!(pair.get(&path).await?.status, status, "{path}\n{}", pair.agent.log());
    }
    Ok(())
}

#[tokio::test]
async fn while_the_registry_is_away_the_next_agent_gives_what_the_one_before_it_gave() -> Result<()> {
    let name = "while_the_registry_is_away_the_next_agent_gives_what_the_one_before_it_gave";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let mut pair = pair(&[("serve_stale", "node".into())]).await?;
    pair.agent.stop().await?;
    pair.ecr.down().await;
    pair.agent.start_again().await?;
    are_all(&pair, 200).await?;
    let tag = pair.get(&format!("manifests/{TAG}")).await?;
    assert_eq!((tag.status.as_u16(), Digest::of(&tag.body)), (200, pair.image.root.digest()), "{}", pair.agent.log());
    // No more than that: not for another repository, and no tag that nobody saw.
    for path in digests(&pair) {
        assert_eq!(pair.client().get(&pair.url_in("team/other", &path)).await?.status, 404, "{path}");
    }
    assert_eq!(pair.get("manifests/never-seen").await?.status, 404);
    // Nor for longer: once more started, nothing has become younger, and what was not used is not lost.
    pair.agent.stop().await?;
    pair.agent.start_again().await?;
    are_all(&pair, 200).await
}

#[tokio::test]
async fn nothing_is_known_after_a_reboot_or_with_another_credential_or_for_too_long() -> Result<()> {
    let name = "nothing_is_known_after_a_reboot_or_with_another_credential_or_for_too_long";
    if !can_run(name, &[Need::Darter]) {
        return Ok(());
    }
    let mut pair = pair(&[]).await?;
    pair.agent.stop().await?;
    pair.ecr.down().await;
    let file = pair.agent.dir().join("data/proofs.json");
    let kept = fs::read_to_string(&file)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(kept.contains(boot.trim()), "{kept}");
    let config = pair.agent.dir().join("darter.toml");
    let configured = fs::read_to_string(&config)?;
    let another = configured.replace("access = \"public\"", "access = \"public\"\nresolve = false");
    ensure!(another != configured, "{configured}");
    let older = configured.replace("[mirror]", "[mirror]\nproof_stale = \"200ms\"");
    ensure!(older != configured, "{configured}");
    for (kept, config_text, why) in [
        (kept.replace(boot.trim(), "another-boot"), &configured, "a reboot"),
        (kept.clone(), &another, "another configuration of the registry"),
        (kept.clone(), &older, "too long ago"),
        ("{\"boot_id\"".to_owned(), &configured, "half a file"),
        (String::new(), &configured, "an empty file"),
    ] {
        fs::write(&file, kept)?;
        fs::write(&config, config_text)?;
        pair.agent.start_again().await?;
        for path in digests(&pair) {
            assert_eq!(pair.get(&path).await?.status, 404, "after {why}: {path}");
        }
        pair.agent.kill().await?;
    }
    // The very file of before is good still, so it was not something else.
    fs::write(&file, kept)?;
    fs::write(&config, configured)?;
    pair.agent.start_again().await?;
    are_all(&pair, 200).await
}

#[tokio::test]
async fn what_a_pull_proved_with_its_own_credential_is_not_kept() -> Result<()> {
    if !can_run("what_a_pull_proved_with_its_own_credential_is_not_kept", &[Need::Darter]) {
        return Ok(());
    }
    let keys = [("access", "caller".into()), ("serve_stale", "node".into())];
    let mut pair = Pair::with(&[MIB], Auth::Ecr, &keys, |options| options).await?;
    let password = pair.ecr.password();
    let client = pair.client().basic("AWS", &password);
    let path = format!("manifests/{TAG}");
    assert_eq!(client.get(&pair.url(&path)).await?.status, 200);
    let kept = pair.agent.dir().join("data/proofs.json");
    pair.agent.stop().await?;
    eventually("something is kept", async || Ok(kept.exists())).await?;
    let kept = fs::read_to_string(kept)?;
    ensure!(kept.contains("\"proofs\":[]") && kept.contains("\"tags\":[]"), "{kept}");
    ensure!(!kept.contains(&password), "{kept}");
    pair.ecr.down().await;
    pair.agent.start_again().await?;
    for path in [path, format!("manifests/{}", pair.image.root.digest())] {
        assert_eq!(client.get(&pair.url(&path)).await?.status, 404, "{path}");
    }
    Ok(())
}
