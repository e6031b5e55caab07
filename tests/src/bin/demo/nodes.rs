//! The second part: four nodes that pull one image at the same moment, first each for itself, then
//! with each other, while a fifth comes late and one of the four loses its power.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::cluster::measure::{Machine, bound, goodput};
use darter_tests::cluster::swarm::Swarm;
use darter_tests::cluster::{Copies, Plan, Pushed};
use darter_tests::fake_ecr::Seen;
use darter_tests::scratch;
use darter_tests::stage::MIB;
use darter_tests::tools::Release;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::progress::Progress;

const NODES: usize = 4;
/// Of every link and of the registry's: for four nodes on two cores by the fact sheet on distribution.
const MBIT: u64 = 200;
const LAYERS: usize = 4;
/// The image where nobody asks for another: a minute and a half without darter.
const WANTED_MIB: u64 = 512;
/// Smaller ones are here before anything can happen to them.
const LEAST_MIB: u64 = 64;
/// On each node: what the agent keeps, what containerd got, and what it unpacked.
const COPIES_ON_DISK: u64 = 3;
/// How far the four are when the fifth comes, and when the first of them dies.
const LATE_AT: f64 = 0.2;
const KILLED_AT: f64 = 0.5;
const KILLED: usize = 0;
/// The registry may give agents again what the dead node had read and passed on to nobody.
const COPIES_MAX: f64 = 1.5;
/// Past this nobody gets a processor when he needs one, and everything is late.
const BUSY_MAX: f64 = 0.95;

/// How large the image is, and why.
pub(crate) struct Size {
    mib: u64,
    note: String,
}

impl Size {
    /// The size asked for, or 512 MiB, or what the disk has room for.
    pub(crate) fn choose(asked: Option<u64>) -> Result<Self> {
        let room = scratch::room()? / MIB;
        let needs = |mib: u64| (NODES as u64 + 1) * COPIES_ON_DISK * mib;
        if let Some(mib) = asked {
            ensure!(mib >= LEAST_MIB, "SIZE={mib}: at least {LEAST_MIB} MiB, or it is here before anything can happen");
            ensure!(needs(mib) < room, "SIZE={mib} needs {} MiB of disk, and here are {room}", needs(mib));
            return Ok(Self { mib, note: String::new() });
        }
        // A third stays free: others use the disk too.
        let fits = room * 2 / 3 / needs(1) / LEAST_MIB * LEAST_MIB;
        ensure!(fits > 0, "the demo needs {} MiB of disk, and here are {room}", needs(LEAST_MIB) * 3 / 2);
        let note = if fits < WANTED_MIB { ", as large as this disk has room for" } else { "" };
        Ok(Self { mib: fits.min(WANTED_MIB), note: note.to_owned() })
    }
}

pub(crate) async fn show(release: Release, size: &Size) -> Result<()> {
    println!("5. {NODES} nodes, each with {} and an agent, all of one swarm key", crate::name(release));
    let plan = Plan { release, ..Plan::new(NODES, MBIT, 1) };
    let mut swarm = Swarm::start(plan, |_, options| options).await?;
    let pushed = swarm.push(2026, &[size.mib * MIB / LAYERS as u64; LAYERS]).await?;
    println!("   an image of {} MiB in {LAYERS} layers{}", size.mib, size.note);
    println!("   every link, the registry's too, has {MBIT} Mbit/s");
    let places = swarm.places();
    let carried = goodput(&places[0], &places[1], Duration::from_secs(2)).await?;
    let least = bound(NODES, pushed.image.layer_bytes(), carried, carried)?.seconds();

    println!("6. all pull it at the same moment, the agents stopped: each from the registry");
    let alone = without_darter(&mut swarm, &pushed).await?;
    println!("7. the same with the agents; a fifth node comes late, and one of the four loses its power");
    let together = with_darter(&mut swarm, &pushed).await?;
    tell(least, &alone, &together);
    check(&alone, &together)
}

/// One pull of all nodes.
struct Outcome {
    /// Until the last of the nodes that were there from the start.
    last: f64,
    /// The fifth node, from the moment at which it began.
    late: Option<f64>,
    copies: Copies,
    /// The part of these copies that containerd read by itself.
    by_containerd: f64,
    /// The share of the machine's processors that worked meanwhile.
    busy: f64,
}

impl Outcome {
    fn new(log: &[Seen], pushed: &Pushed, last: f64, late: Option<f64>, busy: f64) -> Self {
        let by_agents: Vec<_> = log.iter().filter(|seen| !seen.agent.starts_with("containerd/")).cloned().collect();
        let copies = Copies::of_log(log, &pushed.image);
        let by_containerd = copies.average() - Copies::of_log(&by_agents, &pushed.image).average();
        Self { last, late, copies, by_containerd, busy }
    }

    /// Whether it says more about the machine than about darter.
    fn is_void(&self) -> bool {
        self.busy > BUSY_MAX
    }
}

async fn without_darter(swarm: &mut Swarm, pushed: &Pushed) -> Result<Outcome> {
    swarm.stop_agents().await?;
    let machine = Machine::now()?;
    let mut progress = Progress::new(&swarm.places(), pushed.image.layer_bytes())?;
    let mut pulls = Pulls::default();
    (0..NODES).for_each(|node| pulls.start(swarm, node, pushed));
    let mut last = 0.0_f64;
    while let Some(done) = progress.during(pulls.next()).await? {
        last = last.max(finish(&mut progress, done)?);
    }
    let busy = Machine::now()?.busy_since(machine);
    let outcome = Outcome::new(&swarm.ecr().log(), pushed, last, None, busy);
    // containerd collects its garbage when it wants to; the agents start meanwhile.
    swarm.forget().await?;
    swarm.start_agents_again().await?;
    swarm.complete().await?;
    Ok(outcome)
}

async fn with_darter(swarm: &mut Swarm, pushed: &Pushed) -> Result<Outcome> {
    let (before, machine) = (swarm.ecr().log().len(), Machine::now()?);
    let mut progress = Progress::new(&swarm.places(), pushed.image.layer_bytes())?;
    let mut pulls = Pulls::default();
    (0..NODES).for_each(|node| pulls.start(swarm, node, pushed));
    let (mut newcomer, mut is_killed) = (None, false);
    let (mut last, mut late) = (0.0_f64, None);
    while !pulls.0.is_empty() {
        tokio::select! {
            Some(done) = pulls.next() => {
                let done = done?;
                match done.node {
                    // Its containerd is dead as well, and says so.
                    KILLED if is_killed => (),
                    node if Some(node) == newcomer => late = Some(finish(&mut progress, Ok(done))?),
                    _ => last = last.max(finish(&mut progress, Ok(done))?),
                }
            }
            looked = progress.look() => looked?,
        }
        if newcomer.is_none() && progress.share(NODES) >= LATE_AT {
            let node = progress.during(swarm.add_node()).await??;
            progress.add(&swarm.places()[node])?;
            progress.say("the fifth node is here and pulls, too");
            pulls.start(swarm, node, pushed);
            newcomer = Some(node);
        }
        if !is_killed && progress.share(NODES) >= KILLED_AT {
            progress.during(swarm.kill_node(KILLED)).await??;
            progress.end(KILLED, "no power any more");
            is_killed = true;
        }
    }
    let busy = Machine::now()?.busy_since(machine);
    let newcomer = newcomer.context("the image was here before the fifth node; try a larger SIZE")?;
    ensure!(is_killed, "the image was here before a node could die; try a larger SIZE");
    for node in (0..NODES).filter(|node| *node != KILLED).chain([newcomer]) {
        swarm.verify(node, pushed).await.with_context(|| format!("node {}", node + 1))?;
    }
    Ok(Outcome::new(&swarm.ecr().log()[before..], pushed, last, late, busy))
}

/// Pulls on their way, which go on while nodes come and go.
#[derive(Default)]
struct Pulls(JoinSet<Pull>);

/// One that is over.
struct Pull {
    node: usize,
    seconds: f64,
    outcome: Result<()>,
}

impl Pulls {
    fn start(&mut self, swarm: &Swarm, node: usize, pushed: &Pushed) {
        let (pull, started) = (swarm.pull_alone(node, pushed), Instant::now());
        self.0.spawn(async move {
            let outcome = pull.await;
            Pull { node, seconds: started.elapsed().as_secs_f64(), outcome }
        });
    }

    async fn next(&mut self) -> Option<Result<Pull>> {
        Some(self.0.join_next().await?.context("a pull ended without a word"))
    }
}

fn finish(progress: &mut Progress, pull: Result<Pull>) -> Result<f64> {
    let Pull { node, seconds, outcome } = pull?;
    outcome.with_context(|| format!("node {}, after {seconds:.1} s", node + 1))?;
    progress.end(node, &format!("has the image, unpacked, after {seconds:.1} s"));
    Ok(seconds)
}

fn tell(least: f64, alone: &Outcome, together: &Outcome) {
    println!("\n  {:<44} {:>8} {:>8} {:>22}", "", "seconds", "/ bound", "copies from registry");
    let line = |what: &str, seconds: f64, copies: f64| {
        println!("  {what:<44} {seconds:>8.1} {:>8.2} {copies:>22.3}", seconds / least);
    };
    line("the bound: every link full, nothing unpacked", least, 1.0);
    line("without darter, the last of four nodes", alone.last, alone.copies.average());
    line("with darter, the last of three that lived", together.last, together.copies.average());
    if let Some(late) = together.late {
        println!("  {:<44} {late:>8.1}", "  the fifth node, from when it came");
    }
    if together.by_containerd > 0.005 {
        println!(
            "  {:<44} {:>8} {:>8} {:>22.3}",
            "  what containerd read by itself of that", "", "", together.by_containerd
        );
        println!("\n  An agent that has no answer within 2.5 s (mirror.answer_within) lets containerd read by itself:");
        println!("  here all nodes, their containerds and the registry share the processors of one machine.");
    }
    println!("\n  {:.1} times faster, and no pull failed. Seconds include unpacking.", alone.last / together.last);
    if together.is_void() {
        println!(
            "  This machine was {:.0} % busy: its processors set these times, not the links. A larger one shows more.",
            together.busy * 100.0
        );
    }
}

/// What the demo is to show, where the machine was not too small to show it.
fn check(alone: &Outcome, together: &Outcome) -> Result<()> {
    let by_agents = together.copies.average() - together.by_containerd;
    ensure!(together.copies.least >= 1, "the registry gave {}", together.copies);
    if together.is_void() {
        return Ok(());
    }
    ensure!(by_agents < COPIES_MAX, "agents read {by_agents:.3} copies of {}", together.copies);
    ensure!(alone.copies.average() > 3.9, "without darter the registry gave {}", alone.copies);
    ensure!(together.last < alone.last, "{:.1} s with darter, {:.1} s without", together.last, alone.last);
    Ok(())
}
