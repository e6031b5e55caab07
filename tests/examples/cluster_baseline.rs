//! Prints what a swarm of 4 nodes is held against, for a registry as fast as one link and as four.
//!
//! `cargo run -p darter-tests --example cluster_baseline [nodes [MiB [Mbit/s]]]`, as root, on a machine
//! that does nothing else: the last line of each row says whether it counts.

use anyhow::{Context as _, Result, anyhow, ensure};
use darter_tests::cluster::Plan;
use darter_tests::cluster::baseline::Row;
use darter_tests::tools::{Need, Release, can_run};

#[tokio::main]
async fn main() -> Result<()> {
    let needs = [Need::Containerd(Release::V2), Need::Darter];
    ensure!(can_run("cluster_baseline", &needs), "this cannot run here; the line above says why");
    let numbers = std::env::args().skip(1).map(|text| text.parse::<u64>().with_context(|| text.clone()));
    let numbers = numbers.collect::<Result<Vec<_>>>()?;
    let number = |index: usize, default| numbers.get(index).copied().unwrap_or(default);
    let (nodes, mib, mbit) = (usize::try_from(number(0, 4))?, number(1, 64), number(2, 200));
    let layers = [mib << 20];
    println!("  {:<42} {:>7} {:>7}", "", "seconds", "/ bound");
    for share in [1, nodes as u64] {
        let row = tokio::select! {
            row = Row::measure(Plan::new(nodes, mbit, share), &layers) => row?,
            _ = tokio::signal::ctrl_c() => return Err(anyhow!("interrupted; everything that was started is gone")),
        };
        println!("{row}\n");
    }
    Ok(())
}
