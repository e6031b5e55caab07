//! One row of what a swarm is held against, all of it taken in the same topology one after another.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::measure::{Machine, Verdict, bound, goodput};
use super::{Cluster, Copies, Plan, Pushed, control, last};
use crate::net::Traffic;

/// How long a flow is counted to learn what a link carries.
const FLOW: Duration = Duration::from_secs(3);

/// What was measured.
#[derive(Debug)]
pub struct Row {
    /// The nodes and their links.
    pub plan: Plan,
    /// Bytes of the image's layers.
    pub size: u64,
    /// Bytes a second that one flow carries from one node to another.
    pub goodput: f64,
    /// The least time that the last node can need.
    pub bound: Duration,
    /// Of the control program, for once and twice the bytes.
    pub control: (Duration, Duration),
    /// Of the last node, pulling by CRI through the agents.
    pub agents: Duration,
    /// What that cost the registry.
    pub agents_copies: Copies,
    /// What that brought through the cards of all nodes together.
    pub agents_traffic: Traffic,
    /// Processor time of all agents, and the most memory of one.
    pub agents_cost: (Duration, u64),
    /// Of the last node, reading an image from the agents without unpacking it.
    pub reading: Duration,
    /// Of the last node, pulling by CRI from the registry.
    pub direct: Duration,
    /// What the run is worth.
    pub verdict: Verdict,
}

impl Row {
    /// Measures everything, each cold.
    pub async fn measure(plan: Plan, layers: &[u64]) -> Result<Self> {
        let mut cluster = Cluster::start(plan.clone(), |_, options| options).await?;
        let pushed = cluster.push(1, layers).await?;
        let size = pushed.image.layer_bytes();
        let places = cluster.places();
        let carried = goodput(&places[0], &places[1], FLOW).await?;
        let share = crate::stage::bytes(plan.origin) / crate::stage::bytes(plan.link);
        let least = Duration::from_secs_f64(bound(plan.nodes, size, carried, carried * share)?.seconds());
        let once = control::scatter_allgather(cluster.origin(), &places, size, |_, to| Ok(to)).await?;
        let twice = control::scatter_allgather(cluster.origin(), &places, 2 * size, |_, to| Ok(to)).await?;

        let (machine, before) = (Machine::now()?, sum(&cluster.traffic()?));
        let agents = last(cluster.pull_all(&pushed).await)?;
        let busy = Machine::now()?.busy_since(machine);
        let agents_traffic = sum(&cluster.traffic()?).since(before);
        let agents_copies = cluster.copies(&pushed);
        let agents_cost = cost(&cluster)?;
        let reading = read(&cluster, layers).await?;
        cluster.stop_agents().await?;
        let direct = direct(&cluster, &pushed).await?;
        let verdict = Verdict::of(busy, once, least, Some((once, twice)));
        let control = (once, twice);
        let bound = least;
        let goodput = carried;
        Ok(Self {
            plan,
            size,
            goodput,
            bound,
            control,
            agents,
            agents_copies,
            agents_traffic,
            agents_cost,
            reading,
            direct,
            verdict,
        })
    }
}

async fn read(cluster: &Cluster, layers: &[u64]) -> Result<Duration> {
    let other = cluster.push(1001, layers).await?;
    last(cluster.read_all(&other).await)
}

async fn direct(cluster: &Cluster, pushed: &Pushed) -> Result<Duration> {
    cluster.forget().await?;
    last(cluster.pull_all(pushed).await)
}

fn cost(cluster: &Cluster) -> Result<(Duration, u64)> {
    let usage: Vec<_> = cluster.usage().into_iter().flatten().collect();
    let peak = usage.iter().map(|usage| usage.peak_bytes).max().context("no agent runs")?;
    Ok((usage.iter().map(|usage| usage.cpu).sum(), peak))
}

fn sum(cards: &[Traffic]) -> Traffic {
    let (received, sent) = (cards.iter().map(|card| card.received).sum(), cards.iter().map(|card| card.sent).sum());
    Traffic { received, sent }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| crate::stage::bytes(bytes) / f64::from(1 << 20);
        let mut line = |what: &str, took: Duration, note: String| {
            let ratio = took.as_secs_f64() / self.bound.as_secs_f64();
            writeln!(f, "  {what:<42} {:>7.2} {ratio:>7.2}  {note}", took.as_secs_f64())
        };
        let Plan { nodes, link, origin, .. } = &self.plan;
        let mbit = |rate: u64| rate / 125_000;
        let conditions =
            format!("{nodes} x {:.0} MiB, {} Mbit/s, origin {}", mib(self.size), mbit(*link), mbit(*origin));
        line(&conditions, self.bound, format!("bound; a flow carries {:.1} Mbit/s", self.goodput / 125_000.0))?;
        line("control program", self.control.0, format!("2F: {:.2} s", self.control.1.as_secs_f64()))?;
        let (received, sent) = (mib(self.agents_traffic.received), mib(self.agents_traffic.sent));
        let (cpu, peak) = (self.agents_cost.0.as_secs_f64(), mib(self.agents_cost.1));
        let note = format!("{}; cards {received:.0}/{sent:.0} MiB; {cpu:.2} CPU s; {peak:.0} MiB", self.agents_copies);
        line("pull by CRI through the agents", self.agents, note)?;
        line("read from the agents, not unpacked", self.reading, String::new())?;
        line("pull by CRI from the registry", self.direct, String::new())?;
        write!(f, "  {}", self.verdict)
    }
}
