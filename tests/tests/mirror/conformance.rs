//! The OCI distribution conformance suite against the mirror, which a client without `ns=` reaches
//! by `mirror.default_registry`. Only what reads: the mirror takes no push.

use anyhow::{Result, ensure};
use darter_tests::agent::{Agent, Options};
use darter_tests::image::{Format, Image};
use darter_tests::net::Place;
use darter_tests::registry::{self, Registry};
use darter_tests::stage::{MIB, REPOSITORY, TAG};
use darter_tests::tools::{Need, can_run};
use darter_tests::{conformance, fake_ecr, stage};

/// What the suite asks of a registry that it may only read.
const PULL: [&str; 9] = [
    "ping",
    "read-only/tag-list",
    "read-only/head/manifest-head-by-tag",
    "read-only/head/manifest-head-by-digest",
    "read-only/head/blob-head",
    "read-only/pull/manifest-by-tag",
    "read-only/pull/manifest-by-digest",
    "read-only/pull/blob-get",
    "invalid-digest-format/manifest-get",
];

/// Runs the suite, which must fail only in what the registry behind the mirror lacks.
async fn passes(agent: &Agent, image: &Image, lacks: &[&str]) -> Result<()> {
    // Twice: from the origin, then from the store.
    for round in ["cold", "warm"] {
        let report = conformance::read_only(&Place::Host, agent.mirror(), image, REPOSITORY, TAG).await?;
        let failed: Vec<_> = ["FAIL", "Error"].iter().flat_map(|verdict| report.with(verdict)).collect();
        ensure!(failed == lacks, "{round}: {failed:?}\n{}", report.text);
        let passed = report.with("Pass");
        for test in PULL {
            ensure!(passed.contains(&test), "{round}: {test} did not pass: {passed:#?}\n{}", report.text);
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_pull_group_passes_in_front_of_an_ecr() -> Result<()> {
    if !can_run("the_pull_group_passes_in_front_of_an_ecr", &[Need::Conformance, Need::Darter]) {
        return Ok(());
    }
    let ecr = stage::ecr(fake_ecr::Auth::Public)?;
    let image = Image::index(Format::Oci, 4, &[2048, MIB])?;
    ecr.push(&image, REPOSITORY, TAG);
    let options = stage::pair_options(&ecr, &[("access", "public".into())]);
    let agent = Agent::start(options.set("mirror.default_registry", ecr.name())).await?;
    passes(&agent, &image, &[]).await
}

#[tokio::test]
async fn the_pull_group_passes_in_front_of_a_docker_registry() -> Result<()> {
    let needs = [Need::Conformance, Need::DockerRegistry, Need::Darter];
    if !can_run("the_pull_group_passes_in_front_of_a_docker_registry", &needs) {
        return Ok(());
    }
    let registry = Registry::start(&Place::Host, registry::Options::default()).await?;
    let image = Image::index(Format::Docker, 4, &[2048, MIB])?;
    registry.push(&image, REPOSITORY, TAG).await?;
    let name = "registry.test.example";
    let options = Options::new(&Place::Host).plain_registry(name, &registry.url());
    let agent = Agent::start(options.set("mirror.default_registry", name)).await?;
    // It is older than the referrers API, and its 404, which says so, is passed on: an empty list of
    // the mirror's own making would hide what the registry has by the older scheme of tags.
    passes(&agent, &image, &["empty", "empty/referrers", "read-only", "read-only/referrers"]).await
}
