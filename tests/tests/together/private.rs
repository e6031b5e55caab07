//! A registry that opens to nodes with a role only: each asks for a password of its own, and together they read
//! every byte once.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Plan, last, node_key};
use darter_tests::fake_ecr::{Auth, Fault, Kind, Rule};
use darter_tests::stage::MIB;
use darter_tests::tools::{Need, Release, can_run};

const NEEDS: [Need; 2] = [Need::Containerd(Release::V2), Need::Darter];

fn private(nodes: usize, mbit: u64) -> Plan {
    Plan { auth: Auth::Ecr, ..Plan::new(nodes, mbit, 1) }
}

#[tokio::test]
async fn nodes_that_boot_and_pull_a_private_image_ask_for_a_password_each_and_read_it_once() -> Result<()> {
    let test = "nodes_that_boot_and_pull_a_private_image_ask_for_a_password_each_and_read_it_once";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    // None waits until it knows the others: they are as they start.
    let mut swarm = Swarm::start_apart(private(8, 100), |_, options| options).await?;
    let pushed = swarm.push(81, &[12 * MIB, 4 * MIB]).await?;
    swarm.stop_agents().await?;
    swarm.ecr().reset_counts();
    swarm.start_agents_again().await?;
    last(swarm.pull_all(&pushed).await)?;
    swarm.ensure_nobody_alone().await?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())?;
    let asked = swarm.ecr().count(Kind::Token).requests;
    let nodes = u64::try_from(swarm.len())?;
    ensure!((nodes..=nodes + 2).contains(&asked), "{nodes} nodes asked {asked} times for a password");
    // Nobody else was let in: what containerd has came through the agents.
    let log = swarm.ecr().log();
    let by_containerd = log.iter().filter(|seen| seen.agent.starts_with("containerd/") && seen.status == 200).count();
    ensure!(by_containerd == 0, "containerd itself got {by_containerd} answers");
    Ok(())
}

#[tokio::test]
async fn passwords_that_end_in_the_middle_are_asked_for_again_and_no_pull_fails() -> Result<()> {
    if !can_run("passwords_that_end_in_the_middle_are_asked_for_again_and_no_pull_fails", &NEEDS) {
        return Ok(());
    }
    const LIFETIME: Duration = Duration::from_secs(2);
    let swarm = Swarm::start(private(3, 50), |_, options| options).await?;
    let pushed = swarm.push(82, &[4 * MIB; 12]).await?;
    swarm.ecr().set_token_lifetime(LIFETIME);
    // Whatever agents have is void at once; later ones are for as long as that.
    swarm.ecr().revoke_tokens();
    swarm.ecr().reset_counts();
    let took = last(swarm.pull_all(&pushed).await)?;
    ensure!(took > 2 * LIFETIME, "{took:?}: none ended in the middle");
    swarm.ensure_nobody_alone().await?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())?;
    let (asked, nodes) = (swarm.ecr().count(Kind::Token).requests, swarm.len() as f64);
    let ends = took.as_secs_f64() / LIFETIME.as_secs_f64();
    // One for each node and end, with one more for that which was revoked.
    let most = nodes * (ends.ceil() + 2.0);
    ensure!((asked as f64) > nodes && asked as f64 <= most, "{asked} passwords in {took:?}, at most {most}");
    Ok(())
}

#[tokio::test]
async fn a_node_whose_role_may_not_read_gets_nothing_of_it_from_the_others_either() -> Result<()> {
    if !can_run("a_node_whose_role_may_not_read_gets_nothing_of_it_from_the_others_either", &NEEDS) {
        return Ok(());
    }
    let swarm = Swarm::start(private(3, 100), |_, options| options).await?;
    let pushed = swarm.push(83, &[12 * MIB, 4 * MIB]).await?;
    swarm.ecr().revoke_tokens();
    swarm.ecr().inject(Rule::on(Kind::Token).key(&node_key(2)).always(), Fault::Status(403, None));
    let (others, stranger) = tokio::join!(swarm.pull_on(&[0, 1], &pushed), swarm.pull_on(&[2], &pushed));
    last(others)?;
    // As it would be without an agent.
    let denied = last(stranger).err().context("who may not read has the image")?;
    ensure!(format!("{denied:#}").contains("401"), "{denied:#}");
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())?;
    for blob in pushed.image.pulled_blobs() {
        let kept = swarm.agent(2)?.dir().join("data/blobs").join(blob.digest().hex());
        ensure!(!kept.exists(), "{} is at the node that may not read it", blob.digest());
    }
    // It is let in, and is one of them.
    swarm.ecr().clear_faults();
    last(swarm.pull_on(&[2], &pushed).await).with_context(|| swarm.story(2))?;
    swarm.copies(&pushed).ensure_exactly(1).with_context(|| swarm.told())
}
