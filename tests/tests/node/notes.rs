//! What the rest of the agent has to say of its node, as Events.

use anyhow::Result;
use darter_tests::agent::{Agent, Options};
use darter_tests::net::Place;
use darter_tests::stage::{MIB, eventually};
use darter_tests::tmpfs::Tmpfs;
use darter_tests::tools::{Need, can_run};

use crate::{Cluster, NEEDS};

#[tokio::test]
async fn a_store_that_takes_no_blobs_any_more_is_an_event_and_so_is_its_recovery() -> Result<()> {
    let name = "a_store_that_takes_no_blobs_any_more_is_an_event_and_so_is_its_recovery";
    if !can_run(name, &[NEEDS[0], Need::Darter]) {
        return Ok(());
    }
    let cluster = Cluster::start(&[], 0).await?;
    let disk = Tmpfs::new(64 * MIB)?;
    let options = cluster
        .options(Options::new(&Place::Host))?
        .set("agent.data_dir", disk.path().join("data").display().to_string())
        .set("store.min_free", "16MiB")
        .set("certs_d.check_every", "1s");
    let agent = Agent::start(options).await?;
    disk.fill()?;
    let stopped = async || cluster.events("ImageStoreStopped").await;
    eventually("the Event comes", async || Ok(!stopped().await?.is_empty())).await?;
    let (kind, note) = stopped().await?.swap_remove(0);
    assert_eq!(kind, "Warning");
    anyhow::ensure!(note.contains("pulls go past it: ") && note.contains("free"), "{note}");
    anyhow::ensure!(cluster.events("ImageStoreWorks").await?.is_empty(), "a store that is full works");
    disk.empty()?;
    eventually("its recovery is an Event too", async || Ok(!cluster.events("ImageStoreWorks").await?.is_empty()))
        .await?;
    assert_eq!(stopped().await?.len(), 1, "once for each change\n{}", agent.log());
    Ok(())
}
