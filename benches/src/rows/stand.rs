//! What a row stands on: a swarm that has pulled nothing yet, what its links carry, what bare TCP
//! needs on them, and what a round costs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_core::simulate::Bound;
use darter_tests::cluster::measure::{Machine, Verdict, bound, goal_seconds, goodput, warm_bound};
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Copies, Pull, Pushed, control};
use darter_tests::process::Usage;
use darter_tests::stage::bytes;

use super::{Case, Row};
use crate::{gib, percentile};

/// How long a flow is counted to learn what a link carries.
const FLOW: Duration = Duration::from_secs(3);

/// A cluster and what was measured on it before anything was pulled.
pub(super) struct Stand {
    pub(super) swarm: Swarm,
    /// So many of its nodes have it before the others want it.
    pub(super) holders: usize,
    pub(super) pushed: Pushed,
    /// Bytes of the layers.
    pub(super) size: u64,
    /// The time that no protocol beats, in seconds.
    pub(super) bound: f64,
    /// What goal G1 allows, in seconds.
    pub(super) goal: f64,
    /// The time of the last node in the simulator, in seconds, where it plays what happens in this row.
    pub(super) played: Option<f64>,
    /// Of the control program, for half of the bytes and all of them.
    control: (Duration, Duration),
    control_cpu: Duration,
    /// The least of one that moves the bytes by bare TCP.
    control_bound: Duration,
}

/// What a round cost.
pub(super) struct Cost {
    /// Processor time of all agents that still ran at its end.
    pub(super) cpu: Duration,
    /// The most memory that one of them ever had.
    pub(super) peak_bytes: u64,
    /// Whether it counts.
    pub(super) verdict: Verdict,
}

impl Stand {
    pub(super) async fn new(row: &Row, size_mib: u64) -> Result<Self> {
        let plan = row.plan();
        let (nodes, share) = (plan.nodes, bytes(plan.origin) / bytes(plan.link));
        let is_plain = row.case == Case::Plain;
        let swarm = Swarm::start(plan, move |_, options| options.set("swarm.tls", !is_plain)).await?;
        let size = row.bytes(size_mib);
        let pushed = swarm.push(1, &row.files(size_mib)).await?;
        ensure!(pushed.image.layer_bytes() == size, "the layers have {} bytes", pushed.image.layer_bytes());
        let places = swarm.places();
        let carried = goodput(&places[0], &places[1], FLOW).await?;
        let cold = bound(nodes, size, carried, carried * share)?;
        let bound = match row.holders {
            0 => cold,
            holders => warm_bound(nodes - holders, holders, size, carried)?,
        };
        let played = row.scenario(size_mib, carried).map(|scenario| super::played::last(&scenario)).transpose()?;
        let half = control::scatter_allgather(swarm.origin(), &places, size / 2, |_, to| Ok(to)).await?;
        let before = Usage::own()?.cpu;
        let whole = control::scatter_allgather(swarm.origin(), &places, size, |_, to| Ok(to)).await?;
        let control_cpu = Usage::own()?.cpu - before;
        let stand = Self {
            swarm,
            holders: row.holders,
            pushed,
            size,
            bound: bound.seconds(),
            goal: goal_seconds(&bound),
            played,
            control: (half, whole),
            control_cpu,
            control_bound: Duration::from_secs_f64(cold.seconds()),
        };
        stand.say(carried, &bound);
        Ok(stand)
    }

    fn say(&self, carried: f64, bound: &Bound) {
        println!(
            "  a flow carries {:.1} Mbit/s; bound {:.2} s ({} piece-times), goal {:.2} s; control program {:.2} s{}",
            carried / 125_000.0,
            self.bound,
            bound.rounds,
            self.goal,
            self.control.1.as_secs_f64(),
            self.played.map_or_else(String::new, |played| format!("; simulator {played:.2} s")),
        );
    }

    /// How long each node needed; where one failed, its log ends with why.
    pub(super) fn times(&self, pulls: Vec<Pull>) -> Result<Times> {
        for pull in pulls.iter().filter(|pull| pull.outcome.is_err()).take(1) {
            eprintln!("node {}:\n{}", pull.node, self.swarm.story(pull.node));
        }
        Times::of(pulls)
    }

    /// Nodes that are there.
    pub(super) fn nodes(&self) -> Vec<usize> {
        (0..self.swarm.len()).collect()
    }

    /// All nodes read the image at the same moment.
    pub(super) async fn read_all(&self) -> Vec<Pull> {
        self.swarm.read_all(&self.pushed).await
    }

    /// Those that do not have it.
    pub(super) fn newcomers(&self) -> Vec<usize> {
        self.nodes().split_off(self.holders)
    }

    /// They read it.
    pub(super) async fn read_by_newcomers(&self) -> Vec<Pull> {
        self.swarm.read_on(&self.newcomers(), &self.pushed).await
    }

    /// The node that has read most of the origin.
    pub(super) async fn reads_most(&self) -> Result<usize> {
        let mut most = (-1.0, 0);
        for node in self.nodes() {
            let read = self.swarm.agent(node)?.metrics().await?.sum("darter_origin_bytes_total", &[]);
            most = if read > most.0 { (read, node) } else { most };
        }
        Ok(most.1)
    }

    /// How often the origin gave each byte so far.
    pub(super) fn copies(&self) -> Copies {
        self.swarm.copies(&self.pushed)
    }

    /// Lets something happen and says what that cost.
    pub(super) async fn watch<T>(&self, work: impl Future<Output = Result<T>>) -> Result<(T, Cost)> {
        let before = self.swarm.usage();
        let machine = Machine::now()?;
        let done = work.await?;
        let busy = Machine::now()?.busy_since(machine);
        let after = self.swarm.usage();
        let spent =
            before.iter().zip(&after).filter_map(|(before, after)| Some(after.as_ref()?.cpu - before.as_ref()?.cpu));
        let peak_bytes = after.iter().flatten().map(|usage| usage.peak_bytes).max().context("no agent runs")?;
        let verdict = Verdict::of(busy, self.control.1, self.control_bound, Some(self.control));
        println!("  {verdict}");
        Ok((done, Cost { cpu: spent.sum(), peak_bytes, verdict }))
    }

    /// What the control program cost for each GiB that it delivered.
    pub(super) fn control_cpu_per_gib(&self) -> f64 {
        self.control_cpu.as_secs_f64() / gib(self.size * self.swarm.len() as u64)
    }
}

/// How long the nodes of a round needed.
pub(super) struct Times(Vec<f64>);

impl Times {
    /// From pulls that all went well.
    fn of(pulls: Vec<Pull>) -> Result<Self> {
        ensure!(!pulls.is_empty(), "nobody pulled");
        let took = |Pull { node, took, outcome }: Pull| {
            outcome.with_context(|| format!("node {node}, after {took:.1?}"))?;
            Ok(took.as_secs_f64())
        };
        Ok(Self(pulls.into_iter().map(took).collect::<Result<_>>()?))
    }

    /// Of the last.
    pub(super) fn last(&self) -> f64 {
        percentile(self.0.clone(), 1.0)
    }

    /// Of the slowest hundredth over that of the middle one, the lower one where there are two.
    pub(super) fn spread(&self) -> f64 {
        percentile(self.0.clone(), 0.99) / percentile(self.0.clone(), 0.5)
    }

    /// How many nodes.
    pub(super) fn count(&self) -> u64 {
        self.0.len() as u64
    }
}

/// Waits for a share of what a round needs at least, to do something in its middle.
pub(super) async fn after(started: Instant, wait: f64) {
    tokio::time::sleep_until((started + Duration::from_secs_f64(wait)).into()).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_counts_and_the_middle_is_the_lower_one() {
        let times = Times(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((times.last(), times.spread(), times.count()), (4.0, 2.0, 4));
    }
}
