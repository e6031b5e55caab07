//! Tags while the registry is away (`serve_stale = "cluster"`): what all members say that know the tag, and
//! nothing where one of them says otherwise, lies, or is the only one.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use darter_core::Digest;
use darter_core::access::Place;
use darter_core::stale::{Question, Seen};
use darter_tests::agent::Options;
use darter_tests::cluster::hostile::Deed;
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, Pushed, Seat, last};
use darter_tests::fake_ecr::{Fault, Kind, Rule};
use darter_tests::http::Answer;
use darter_tests::stage::{MIB, REPOSITORY, bytes, eventually};
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

/// An answer within this is a fast one: the registry was away, members were asked, all of them answered.
/// What is slow here is a machine with other things to do.
const FAST: Duration = Duration::from_secs(10);

/// A swarm whose nodes say this of stale tags.
async fn start(says: &'static [&'static str]) -> Result<Swarm> {
    let configure = |seat: &Seat, options: Options| {
        options
            .set("mirror.tag_ttl", "100ms")
            .set("log.level", "info,darter_agent::images=debug")
            .in_registries("serve_stale", says[seat.number])
    };
    Swarm::start(Plan::new(says.len(), 400, 1), configure).await
}

/// What a node's mirror says of a tag, as containerd asks it.
async fn head(swarm: &Swarm, node: usize, repository: &str, tag: &str) -> Result<Answer> {
    let agent = swarm.agent(node)?;
    let url = format!("{}/v2/{repository}/manifests/{tag}?ns={}", agent.mirror_url(), swarm.ecr().name());
    agent.client().head(&url).await
}

async fn status(swarm: &Swarm, node: usize, tag: &str) -> Result<u16> {
    let began = Instant::now();
    let answer = head(swarm, node, REPOSITORY, tag).await?;
    ensure!(began.elapsed() < FAST, "{} took {:?}\n{}", answer.status, began.elapsed(), swarm.story(node));
    Ok(answer.status.as_u16())
}

async fn means(swarm: &Swarm, node: usize, tag: &str, digest: Digest) -> Result<()> {
    let answer = head(swarm, node, REPOSITORY, tag).await?;
    let said = (answer.status.as_u16(), answer.header("docker-content-digest").to_owned());
    ensure!(said == (200, digest.to_string()), "node {node} says {said:?}\n{}", swarm.story(node));
    Ok(())
}

/// Nodes prove that they may read the repository, and see nothing of it that a test is about.
async fn prove(swarm: &Swarm, nodes: &[usize]) -> Result<Pushed> {
    let other = swarm.push(50, &[4096]).await?;
    for node in nodes {
        means(swarm, *node, &other.tag, other.image.root.digest()).await?;
    }
    Ok(other)
}

fn away(swarm: &Swarm) {
    swarm.ecr().inject(Rule::any().always(), Fault::Status(503, None));
}

async fn refused(swarm: &Swarm, node: usize, reason: &str) -> Result<f64> {
    Ok(swarm.agent(node)?.metrics().await?.sum("darter_stale_tag_refusals_total", &[("reason", reason)]))
}

async fn answered(swarm: &Swarm, node: usize) -> Result<f64> {
    Ok(swarm.agent(node)?.metrics().await?.sum("darter_stale_tags_total", &[]))
}

#[tokio::test]
async fn with_the_registry_away_a_node_that_never_saw_a_tag_has_all_of_it_from_the_others() -> Result<()> {
    let name = "with_the_registry_away_a_node_that_never_saw_a_tag_has_all_of_it_from_the_others";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let swarm = start(&["cluster"; 3]).await?;
    prove(&swarm, &[2]).await?;
    let pushed = swarm.push(51, &[8 * MIB, 4 * MIB]).await?;
    last(swarm.pull_on(&[0, 1], &pushed).await)?;
    let (secret, hidden) = ("team/secret", pushed.tag.as_str());
    swarm.ecr().push(&pushed.image, secret, hidden);
    for node in [0, 1] {
        ensure!(head(&swarm, node, secret, hidden).await?.status == 200);
    }
    away(&swarm);
    let log = swarm.ecr().log().len();
    last(swarm.pull_on(&[2], &pushed).await)?;
    let given: Vec<_> = swarm.ecr().log().split_off(log).into_iter().filter(|seen| seen.status < 300).collect();
    ensure!(given.is_empty(), "the registry gave {given:?}");
    let received = swarm.agent(2)?.metrics().await?.sum("darter_peer_bytes_total", &[("direction", "received")]);
    ensure!(received > bytes(pushed.image.layer_bytes()), "{received} bytes came from the others");
    ensure!(answered(&swarm, 2).await? >= 1.0, "not counted");
    let said = swarm.agent(2)?.log();
    ensure!(said.contains("on which all members agree") && said.contains("asked=2 answered=2 knowing=2"), "{said}");
    // Both know it of another repository too, for which the third has no proof.
    ensure!(head(&swarm, 2, secret, hidden).await?.status == 404, "opened without a proof");
    ensure!(!swarm.agent(2)?.log().contains("repository=team/secret"), "members were asked without a proof");
    // A tag that nobody saw stays unknown.
    ensure!(status(&swarm, 2, "never-seen").await? == 404);
    ensure!(refused(&swarm, 2, "unknown").await? >= 1.0, "not counted");
    // And all of it is over with the registry's return: what members said opens nothing that it denies.
    swarm.ecr().clear_faults();
    let index = pushed.image.root.digest();
    swarm.ecr().inject(Rule::any().digest(index).always(), Fault::Status(404, None));
    let by_digest = async || anyhow::Ok(head(&swarm, 2, REPOSITORY, &index.to_string()).await?.status.as_u16());
    eventually("the registry denies it", async || Ok(by_digest().await? == 404)).await?;
    swarm.ecr().clear_faults();
    away(&swarm);
    ensure!(by_digest().await? == 404, "it opens again\n{}", swarm.story(2));
    swarm.ecr().clear_faults();
    let moved = swarm.push(52, &[4096]).await?;
    swarm.ecr().push(&moved.image, REPOSITORY, &pushed.tag);
    eventually("the moved tag is seen", async || {
        let answer = head(&swarm, 2, REPOSITORY, &pushed.tag).await?;
        Ok(answer.header("docker-content-digest") == moved.image.root.digest().to_string())
    })
    .await
}

#[tokio::test]
async fn a_tag_that_moved_between_two_nodes_is_no_answer_to_anybody() -> Result<()> {
    if !can_run("a_tag_that_moved_between_two_nodes_is_no_answer_to_anybody", &NEEDS) {
        return Ok(());
    }
    let swarm = start(&["cluster"; 3]).await?;
    prove(&swarm, &[2]).await?;
    let (pushed, moved) = (swarm.push(53, &[4096]).await?, swarm.push(54, &[4096]).await?);
    let tag = &pushed.tag;
    means(&swarm, 0, tag, pushed.image.root.digest()).await?;
    swarm.ecr().push(&moved.image, REPOSITORY, tag);
    means(&swarm, 1, tag, moved.image.root.digest()).await?;
    away(&swarm);
    // Not even to those who saw it.
    for node in [2, 0, 1] {
        ensure!(status(&swarm, node, tag).await? == 404, "node {node} has an answer\n{}", swarm.story(node));
        ensure!(refused(&swarm, node, "differ").await? >= 1.0, "node {node} did not count it");
        let differ = [("reason", "differ")];
        swarm.agent(node)?.counted("darter_mirror_refusals_total", &differ, |sum| sum >= 1.0).await?;
        ensure!(answered(&swarm, node).await? == 0.0);
    }
    let pull = swarm.pull_on(&[2], &pushed).await;
    ensure!(last(pull).is_err(), "containerd has an image that nobody vouches for");
    // When the first has seen the tag again, they agree again.
    swarm.ecr().clear_faults();
    eventually("it sees the tag again", async || {
        let answer = head(&swarm, 0, REPOSITORY, tag).await?;
        Ok(answer.header("docker-content-digest") == moved.image.root.digest().to_string())
    })
    .await?;
    away(&swarm);
    means(&swarm, 2, tag, moved.image.root.digest()).await
}

#[tokio::test]
async fn nodes_that_do_not_say_cluster_neither_ask_nor_answer() -> Result<()> {
    if !can_run("nodes_that_do_not_say_cluster_neither_ask_nor_answer", &NEEDS) {
        return Ok(());
    }
    let swarm = start(&["cluster", "cluster", "off", "node", "cluster"]).await?;
    prove(&swarm, &[2, 3, 4]).await?;
    let (pushed, theirs) = (swarm.push(55, &[4096]).await?, swarm.push(56, &[4096]).await?);
    for node in [0, 1] {
        means(&swarm, node, &pushed.tag, pushed.image.root.digest()).await?;
    }
    for node in [1, 2, 3] {
        means(&swarm, node, &theirs.tag, theirs.image.root.digest()).await?;
    }
    away(&swarm);
    for node in [2, 3] {
        ensure!(status(&swarm, node, &pushed.tag).await? == 404, "node {node} asked others\n{}", swarm.story(node));
        let all = swarm.agent(node)?.metrics().await?.sum("darter_stale_tag_refusals_total", &[]);
        ensure!(all == 0.0 && answered(&swarm, node).await? == 0.0, "node {node} asked others");
    }
    means(&swarm, 4, &pushed.tag, pushed.image.root.digest()).await?;
    // Three saw the other tag, and one of them tells.
    ensure!(status(&swarm, 4, &theirs.tag).await? == 404, "{}", swarm.story(4));
    ensure!(refused(&swarm, 4, "few").await? >= 1.0, "not counted\n{}", swarm.story(4));
    // To itself this node's own word is enough, as with "node".
    means(&swarm, 1, &theirs.tag, theirs.image.root.digest()).await?;
    means(&swarm, 3, &theirs.tag, theirs.image.root.digest()).await
}

#[tokio::test]
async fn a_liar_redirects_no_tag_and_a_flood_of_questions_is_harmless() -> Result<()> {
    if !can_run("a_liar_redirects_no_tag_and_a_flood_of_questions_is_harmless", &NEEDS) {
        return Ok(());
    }
    let mut swarm = start(&["cluster"; 3]).await?;
    let liar = swarm.add_hostile(Deed::Nothing).await?;
    prove(&swarm, &[0, 1, 2]).await?;
    let (pushed, bait) = (swarm.push(57, &[4096]).await?, swarm.push(58, &[4096]).await?);
    for node in [0, 1] {
        means(&swarm, node, &pushed.tag, pushed.image.root.digest()).await?;
    }
    away(&swarm);
    liar.swear(Some(Seen { digest: bait.image.root.digest(), size: Some(bait.image.root.size()) }));
    for (node, tag, reason) in [
        // Two honest members know it, this node itself does, and nobody does.
        (2, pushed.tag.as_str(), "differ"),
        (0, pushed.tag.as_str(), "differ"),
        (2, bait.tag.as_str(), "few"),
    ] {
        ensure!(status(&swarm, node, tag).await? == 404, "{reason}: it was believed\n{}", swarm.story(node));
        ensure!(refused(&swarm, node, reason).await? >= 1.0, "{reason} was not counted\n{}", swarm.story(node));
    }
    // Silence keeps nothing from anybody, but for a moment.
    liar.swear(None);
    means(&swarm, 2, &pushed.tag, pushed.image.root.digest()).await?;
    // Whoever floods a node with questions gets no more answers, and nobody else less.
    let registry = swarm.ecr().name().parse()?;
    let place = Place { registry, repository: REPOSITORY.parse()? };
    let mut number = 0;
    eventually("it asked too much", async || {
        for to in liar.others() {
            for _ in 0..100 {
                number += 1;
                let reference = pushed.tag.parse()?;
                liar.ask(to, Question { number, place: place.clone(), reference });
            }
        }
        Ok(swarm.sum("darter_peer_rejected_total", &[("reason", "questions")]).await? > 1000.0)
    })
    .await?;
    // Once what was answered before is no answer any more.
    eventually("the others are asked again", async || {
        means(&swarm, 2, &pushed.tag, pushed.image.root.digest()).await?;
        Ok(swarm.agent(2)?.log().matches("on which all members agree").count() >= 2)
    })
    .await?;
    swarm.agents_know(3).await?;
    let asked = swarm.ecr().log().iter().filter(|seen| seen.kind == Kind::ManifestHead && seen.status == 200).count();
    ensure!(asked == 5, "{asked} tags were resolved: this tests something else");
    Ok(())
}
