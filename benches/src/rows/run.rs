//! What happens in each row, and which figures come of it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use darter_tests::cluster::last;
use darter_tests::stage::{MIB, bytes};

use super::stand::{Cost, Stand, Times, after};
use super::{Case, Row};
use crate::{Better, Figure, Report, gib};

/// Goals of the fact sheet: G4, G2 with a crash, G3, and the one of the issue for small layers.
const SPREAD: f64 = 1.05;
const COPIES_AFTER_A_CRASH: f64 = 0.02;
const SPEED_UP: f64 = 5.0;
const OVER_CONTAINERD: f64 = 1.25;
/// A simulator is evidence as far as it gives what namespaces give, to either side.
const SIMULATOR: f64 = 0.05;

/// G7: processor seconds for each GB that is received, verified and served in the clear, here for each GiB.
const PLAIN_CPU: f64 = 1.2 * 1.073_741_824;

/// What the death of a coordinator may cost.
const COORDINATOR: f64 = 0.6;

/// What the death of an agent may cost: one lease, which is at least so long.
const LEASE: f64 = 2.0;

/// How much of the bound is over when somebody is killed: the 5 s of 11.3 of the peers' table.
const KILL_AT: f64 = 0.44;

pub(super) async fn run(row: &Row, size_mib: u64, report: &mut Report) -> Result<()> {
    let stand = Stand::new(row, size_mib).await?;
    let mut table = Table { row, stand, report };
    match row.case {
        Case::Cold | Case::Plain => table.cold().await,
        Case::Warm => table.warm().await,
        Case::SlowOrigin => table.slow_origin().await,
        Case::SmallLayers => table.small_layers().await,
        Case::HolderKilled => table.holder_killed().await,
        Case::WarmLayers => table.warm_layers().await,
        Case::ImporterKilled => table.killed(LEASE).await,
        Case::CoordinatorKilled => table.killed(COORDINATOR).await,
    }
}

/// A row while it is measured.
struct Table<'a> {
    row: &'a Row,
    stand: Stand,
    report: &'a mut Report,
}

impl Table<'_> {
    async fn cold(&mut self) -> Result<()> {
        let (times, cost) = self.stand.watch(async { self.stand.times(self.stand.read_all().await) }).await?;
        self.against_the_bound(&times, self.stand.goal, &cost);
        self.read_once(&cost);
        self.spread_and_cost(&times, &cost);
        Ok(())
    }

    async fn warm(&mut self) -> Result<()> {
        self.warm_up().await?;
        let (times, cost) = self.stand.watch(async { self.stand.times(self.stand.read_by_newcomers().await) }).await?;
        self.against_the_bound(&times, self.stand.goal, &cost);
        self.read_once(&cost);
        self.spread_and_cost(&times, &cost);
        Ok(())
    }

    async fn slow_origin(&mut self) -> Result<()> {
        let (times, cost) = self.stand.watch(async { self.stand.times(self.stand.read_all().await) }).await?;
        self.read_once(&cost);
        let direct = last(self.stand.swarm.read_direct(&[0], &self.stand.pushed).await)?.as_secs_f64();
        let conditions = format!(
            "last node {:.1} s, one node on one connection to the origin {direct:.1} s; the links' bound {:.1} s",
            times.last(),
            self.stand.bound
        );
        let speed_up = direct / times.last();
        self.add(&cost, "direct / last node", (speed_up, "ratio"), Goal::AtLeast(SPEED_UP), conditions);
        self.spread_and_cost(&times, &cost);
        Ok(())
    }

    async fn small_layers(&mut self) -> Result<()> {
        let pulls = async { self.stand.times(self.stand.swarm.pull_all(&self.stand.pushed).await) };
        let (times, cost) = self.stand.watch(pulls).await?;
        self.against_containerds(&times, &cost).await
    }

    async fn warm_layers(&mut self) -> Result<()> {
        self.warm_up().await?;
        let pull = async { self.stand.swarm.pull_on(&self.stand.newcomers(), &self.stand.pushed).await };
        let (times, cost) = self.stand.watch(async { self.stand.times(pull.await) }).await?;
        self.against_containerds(&times, &cost).await
    }

    /// The same nodes pull once more, from an origin on a link without a rate and without agents.
    async fn against_containerds(&mut self, times: &Times, cost: &Cost) -> Result<()> {
        self.read_once(cost);
        let newcomers = self.stand.newcomers();
        let swarm = &mut self.stand.swarm;
        swarm.stop_agents().await?;
        swarm.forget().await?;
        swarm.network().unlimit_origin()?;
        let alone = last(swarm.pull_on(&newcomers, &self.stand.pushed).await)?.as_secs_f64();
        let (took, least) = (times.last(), self.stand.bound);
        let conditions = format!(
            "last node {took:.2} s; bound {least:.2} s, the same containerds from an unshaped origin {alone:.2} s"
        );
        let over = took / least.max(alone);
        let name = "last node / larger of bound and containerd";
        self.add(cost, name, (over, "ratio"), Goal::AtMost(OVER_CONTAINERD), conditions);
        self.spread_and_cost(times, cost);
        Ok(())
    }

    async fn holder_killed(&mut self) -> Result<()> {
        self.warm_up().await?;
        let stand = &self.stand;
        let before = stand.copies().sent;
        let started = Instant::now();
        let kill = async {
            after(started, KILL_AT * stand.bound).await;
            let holder = stand.swarm.node(0).running_agent().context("the holder is gone")?;
            let sent = holder.metrics().await?.sum("darter_peer_bytes_total", &[("direction", "sent")]);
            stand.swarm.kill_agent(0)?;
            anyhow::Ok(sent)
        };
        let round = async {
            let (pulls, sent) = tokio::join!(stand.read_by_newcomers(), kill);
            Ok((stand.times(pulls)?, sent?))
        };
        let ((times, sent), cost) = stand.watch(round).await?;
        ensure!(stand.swarm.node(0).running_agent().is_none(), "the holder was not killed");
        let size = bytes(stand.pushed.image.pulled_blobs().map(|blob| blob.size()).sum());
        // What the holder had not sent to anybody, somebody must read from the origin.
        let needed = (1.0 - sent / size).max(0.0);
        let copies = bytes(stand.copies().sent - before) / size;
        let conditions = format!("it had sent {:.3} of the bytes when it was killed", sent / size);
        self.against_the_bound(&times, self.stand.goal + LEASE, &cost);
        let goal = Goal::AtMost(needed + COPIES_AFTER_A_CRASH);
        self.add(&cost, "origin bytes / F, after the first", (copies, "copies"), goal, conditions);
        self.spread_and_cost(&times, &cost);
        Ok(())
    }

    async fn killed(&mut self, costs: f64) -> Result<()> {
        let stand = &self.stand;
        let started = Instant::now();
        let kill = async {
            after(started, KILL_AT * stand.bound).await;
            let victim = match self.row.case {
                Case::CoordinatorKilled => stand.swarm.coordinator(stand.pushed.image.layers[0].digest())?,
                _ => stand.reads_most().await?,
            };
            let agent = stand.swarm.agent(victim)?;
            let read = agent.metrics().await?.sum("darter_origin_bytes_total", &[]);
            stand.swarm.kill_agent(victim)?;
            anyhow::Ok((victim, read))
        };
        let round = async {
            let (mut pulls, killed) = tokio::join!(stand.read_all(), kill);
            let (victim, read) = killed?;
            // Its reader has nobody else to ask; a containerd goes to the registry.
            pulls.retain(|pull| pull.node != victim);
            Ok((stand.times(pulls)?, read))
        };
        let ((times, read), cost) = stand.watch(round).await?;
        ensure!(times.count() + 1 == stand.swarm.len() as u64, "nobody was killed");
        let copies = stand.copies();
        let conditions =
            format!("{copies}; it had read {:.3} of the bytes when it was killed", read / bytes(stand.size));
        self.against_the_bound(&times, self.stand.goal + costs, &cost);
        let goal = Goal::AtMost(1.0 + COPIES_AFTER_A_CRASH);
        self.add(&cost, "origin bytes / F", (copies.average(), "copies"), goal, conditions);
        self.spread_and_cost(&times, &cost);
        Ok(())
    }

    /// The holders read everything, one after the other, and the others know that they have it.
    async fn warm_up(&self) -> Result<()> {
        for holder in 0..self.stand.holders {
            let read = self.stand.swarm.read_on(&[holder], &self.stand.pushed).await;
            last(read).context("a holder does not get it")?;
        }
        // The announcement of the last blob goes out with the next flush.
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(())
    }

    fn against_the_bound(&mut self, times: &Times, goal: f64, cost: &Cost) {
        let Stand { bound, .. } = self.stand;
        let conditions = format!("{:.2} s; bound {bound:.2} s, goal {goal:.2} s", times.last());
        let ratio = (times.last() / bound, "ratio");
        self.add(cost, "last node / bound", ratio, Goal::AtMost(goal / bound), conditions);
        if let Some(played) = self.stand.played {
            let conditions = format!("{:.2} s, in the simulator {played:.2} s", times.last());
            self.add(
                cost,
                "last node / simulator",
                (times.last() / played, "ratio"),
                Goal::Near(SIMULATOR),
                conditions,
            );
        }
    }

    fn read_once(&mut self, cost: &Cost) {
        let copies = self.stand.copies();
        let goal = Goal::Once(copies.ensure_exactly(1).is_ok());
        self.add(cost, "origin bytes / F", (copies.average(), "copies"), goal, copies.to_string());
    }

    fn spread_and_cost(&mut self, times: &Times, cost: &Cost) {
        let spread = (times.spread(), "ratio");
        self.add(cost, "p99 / p50 of the nodes", spread, Goal::AtMost(SPREAD), format!("{} nodes", times.count()));
        let per_gib = (cost.cpu.as_secs_f64() / gib(self.stand.size * times.count()), "CPU-s");
        let control = self.stand.control_cpu_per_gib();
        let control = format!("the control program, which neither hashes nor encrypts: {control:.2}");
        let goal = if self.row.case == Case::Plain { Goal::AtMost(PLAIN_CPU) } else { Goal::None };
        self.add(cost, "agents' CPU per GiB delivered", per_gib, goal, control);
        let peak = (bytes(cost.peak_bytes) / bytes(MIB), "MiB");
        self.add(cost, "peak resident, largest agent", peak, Goal::None, "since its start");
    }

    /// Of a run that is void nothing is ok.
    fn add(
        &mut self,
        cost: &Cost,
        what: &str,
        (value, unit): (f64, &'static str),
        goal: Goal,
        conditions: impl Into<String>,
    ) {
        let (goal, better, met) = match goal {
            Goal::None => (None, Better::Lower, true),
            Goal::AtMost(most) => (Some(most), Better::Lower, value <= most),
            Goal::Near(off) => (Some(1.0 + off), Better::Lower, (value - 1.0).abs() <= off),
            Goal::AtLeast(least) => (Some(least), Better::Higher, value >= least),
            Goal::Once(is_once) => (Some(1.0), Better::Lower, is_once),
        };
        let (is_valid, objections) = (cost.verdict.is_valid(), cost.verdict.objections());
        let void = if is_valid { String::new() } else { format!("void: {objections}; ") };
        self.report.push(Figure {
            name: format!("{}: {what}", self.row.name),
            value,
            unit,
            goal,
            better,
            ok: met && is_valid,
            conditions: void + &conditions.into(),
        });
    }
}

/// What a figure should be.
#[derive(Clone, Copy)]
enum Goal {
    /// It is told beside the others.
    None,
    AtMost(f64),
    AtLeast(f64),
    /// One, give or take so much.
    Near(f64),
    /// One copy, and whether it is one of each byte: those that make up for each other are told apart.
    Once(bool),
}
