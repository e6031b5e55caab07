//! What an agent that is down costs a pull: hosts.toml still names it, as after a kill, and nobody
//! listens. By a real containerd and the interface the kubelet uses, against the same pulls without
//! the mirror in hosts.toml.

use std::time::Instant;

use anyhow::{Context as _, Result};
use darter_tests::containerd::{Containerd, Options, hosts_toml};
use darter_tests::fake_ecr::{self, Auth, FakeEcr};
use darter_tests::image::{Format, Image};
use darter_tests::net::Network;
use darter_tests::tools::Release;

use crate::{Better, Report, median, percentile};

/// Pulls of each kind. Each is of an image of its own, so that it is cold without waiting for
/// containerd's garbage collection.
const REPEATS: usize = 100;
/// Nobody listens there in the node's own network.
const MIRROR: &str = "http://127.0.0.1:4001";
/// What the contract allows.
const GOAL_MS: f64 = 10.0;

/// One node with a containerd, and a registry that is fast.
struct Node {
    containerd: Containerd,
    ecr: FakeEcr,
    // Last: networks go when nobody is in them.
    _network: Network,
}

impl Node {
    async fn new(release: Release) -> Result<Self> {
        let network = Network::new(1)?;
        let options = fake_ecr::Options { auth: Auth::Public, ..fake_ecr::Options::default() };
        let ecr = FakeEcr::start(&network.hub(), options)?;
        let containerd = Containerd::start(release, &network.node(0), &Options::default()).await?;
        Ok(Self { containerd, ecr, _network: network })
    }

    /// The milliseconds of a cold pull of image `number`, with or without the mirror in hosts.toml.
    async fn pull(&self, number: usize, mirror: bool) -> Result<f64> {
        let repository = format!("bench/{number}");
        self.ecr.push(&Image::new(Format::Oci, 5000 + number as u64, &[4096])?, &repository, "v1");
        let mut text = hosts_toml(&self.ecr.url(), mirror.then_some(MIRROR), &["pull", "resolve"]);
        if mirror {
            text += "  dial_timeout = \"200ms\"\n";
        }
        self.containerd.write_hosts(&self.ecr.name(), &text)?;
        let image = format!("{}/{repository}:v1", self.ecr.name());
        let started = Instant::now();
        self.containerd.cri().pull(&image, None).await.with_context(|| self.containerd.log())?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    }
}

/// What nodes run.
pub const RELEASES: [(Release, &str); 2] = [(Release::V1, "containerd 1.6"), (Release::V2, "containerd 2.2.4")];

/// Measures it, with each containerd that nodes run.
pub async fn run(report: &mut Report) -> Result<()> {
    for (release, name) in RELEASES {
        println!("\nagent down: cold pulls of an image of one layer of 4 KiB by CRI, {name}");
        one(report, release, name).await?;
    }
    Ok(())
}

async fn one(report: &mut Report, release: Release, name: &str) -> Result<()> {
    let node = Node::new(release).await?;
    // The first pull makes directories and connections.
    node.pull(0, false).await?;
    let (mut with, mut without, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for repeat in 0..REPEATS {
        let number = 1 + 2 * repeat;
        // In turns first, so that neither has the warmer machine.
        let (down, absent) = if repeat % 2 == 0 {
            let down = node.pull(number, true).await?;
            (down, node.pull(number + 1, false).await?)
        } else {
            let absent = node.pull(number, false).await?;
            (node.pull(number + 1, true).await?, absent)
        };
        with.push(down);
        without.push(absent);
        added.push(down - absent);
    }
    let requests = node.ecr.log().len() / (2 * REPEATS + 1);
    let conditions = format!(
        "median of {REPEATS} pairs; medians {:.1} and {:.1} ms, middle half of the pairs {:.1} to {:.1}; about \
         {requests} requests a pull, each refused at the mirror's port first",
        median(with),
        median(without),
        percentile(added.clone(), 0.25),
        percentile(added.clone(), 0.75),
    );
    let row = format!("agent down, added to a pull, {name}");
    report.add(&row, median(added), "ms", Better::Lower, Some(GOAL_MS), conditions);
    Ok(())
}
