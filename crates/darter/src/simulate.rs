//! `darter simulate swarm`: plays the swarm's own code over made-up links, and prints how near it
//! comes to the time that no protocol can beat.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use darter_core::simulate::{Bound, Fault, Outcome, Scenario, run};
use darter_core::units::{Seconds, Size};

use crate::{plot, show};

/// What is played.
#[derive(clap::Args)]
pub(crate) struct Play {
    /// Numbers of nodes that want the blob at once; one run each.
    #[arg(long, value_delimiter = ',', default_value = "4,8,16,64", value_name = "N,N,…")]
    nodes: Vec<u32>,
    /// Size of the blob.
    #[arg(long, default_value = "4GiB", value_name = "SIZE")]
    size: Size,
    /// Rate of the origin, in links of one node.
    #[arg(long, default_value_t = 1, value_name = "LINKS")]
    origin_share: u32,
    /// Further nodes that have the blob already. The origin is not asked then.
    #[arg(long, default_value_t = 0, value_name = "N")]
    holders: u32,
    /// Zones that the nodes are in, in turn.
    #[arg(long, default_value_t = 1, value_name = "N")]
    zones: u32,
    /// Nodes come within this time of each other, in an order by lot.
    #[arg(long, default_value = "0s", value_name = "TIME")]
    spread: Seconds,
    /// Nodes have just started, know nobody, and find each other within this time; 0s: they have for long.
    #[arg(long, default_value = "0s", value_name = "TIME")]
    boot: Seconds,
    /// The first seed; the same seed gives the same run, bit for bit.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds to play; the worst run of them is printed.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seeds: u64,
    /// Something that goes wrong: KIND@PERCENT of the bound, KIND one of importer, coordinator,
    /// churn10, churn30, pause, pause-coordinator, partition, sever, unreachable, lose5, slow10, stall,
    /// corrupt, lie, boast, disk, leap, freeze, throttle, forbid, old10. Can be repeated.
    #[arg(long = "fault", value_name = "KIND@PERCENT")]
    faults: Vec<String>,
    /// Blocks that links serve in turn, for each piece: fewer are faster to play and less exact.
    #[arg(long, default_value_t = 8, value_name = "N")]
    blocks: u32,
    /// Write every run as a line of this file.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draw the last node's time over the number of nodes.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// One run and what it is compared with.
pub(crate) struct Row {
    pub(crate) nodes: u32,
    seed: u64,
    pub(crate) bound: Bound,
    outcome: Outcome,
    origin_ratio: f64,
    cross_zone_ratio: f64,
    took: Duration,
}

impl Row {
    /// The last node's time over the bound, in percent.
    pub(crate) fn overhead(&self) -> f64 {
        (self.outcome.last / self.bound.seconds() - 1.0) * 100.0
    }

    /// What the goal allows over the bound, in percent.
    pub(crate) fn goal(&self) -> f64 {
        (self.bound.goal_seconds() / self.bound.seconds() - 1.0) * 100.0
    }
}

pub(crate) fn swarm(play: &Play) -> Result<ExitCode> {
    check(play)?;
    let mut all = Vec::new();
    let mut worst = Vec::new();
    let is_terminal = std::io::stdout().is_terminal();
    show::print(&if is_terminal { heading(play) } else { tabs(&csv(&[])) })?;
    for nodes in &play.nodes {
        let mut rows = Vec::new();
        for seed in (0..play.seeds).map(|n| play.seed.wrapping_add(n)) {
            let row = one(play, *nodes, seed)?;
            ensure!(row.outcome.is_complete(), "{nodes} nodes, seed {seed}: a node that lived never got the blob");
            rows.push(row);
        }
        rows.sort_by(|a, b| a.outcome.last.total_cmp(&b.outcome.last));
        if let Some(row) = rows.pop() {
            show::print(&if is_terminal { line(&row) } else { tabs(&values(&row)) })?;
            all.extend(rows);
            worst.push(row);
        }
    }
    worst.sort_by_key(|row| row.nodes);
    if let Some(path) = &play.svg {
        plot::completion(path, &worst).with_context(|| format!("cannot draw {}", path.display()))?;
    }
    if let Some(path) = &play.csv {
        all.extend(worst);
        all.sort_by_key(|row| (row.nodes, row.seed));
        std::fs::write(path, csv(&all)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What cannot be played, before anything is printed.
fn check(play: &Play) -> Result<()> {
    let within = |name: &str, value: u64, from: u64, to: u64| {
        ensure!((from..=to).contains(&value), "{name} must be from {from} to {to}, not {value}");
        Ok(())
    };
    play.nodes.iter().try_for_each(|nodes| within("--nodes", (*nodes).into(), 1, 100_000))?;
    within("--holders", play.holders.into(), 0, 100_000)?;
    within("--origin-share", play.origin_share.into(), 1, 100_000)?;
    within("--zones", play.zones.into(), 1, 1000)?;
    within("--blocks", play.blocks.into(), 1, 1024)?;
    within("--seeds", play.seeds, 1, 1_000_000)?;
    ensure!((1..=1 << 40).contains(&play.size.0), "--size must be from 1B to 1TiB, not {}", play.size);
    play.faults.iter().try_for_each(|fault| faults(fault, 1, 1.0).map(drop))
}

fn one(play: &Play, nodes: u32, seed: u64) -> Result<Row> {
    let size = play.size.0;
    let mut scenario = match play.holders {
        0 => Scenario::cold(nodes, size, play.origin_share),
        holders => Scenario::warm(nodes, holders, size),
    };
    scenario.seed = seed;
    scenario.zones = play.zones;
    scenario.blocks = play.blocks;
    scenario.spread = play.spread.0;
    scenario.introductions = play.boot.0;
    let bound = Bound::of(&scenario);
    for fault in &play.faults {
        scenario.faults.extend(faults(fault, nodes, bound.seconds())?);
    }
    let started = Instant::now();
    let outcome = run(&scenario);
    let ratio = |bytes: u64| bytes as f64 / size as f64;
    Ok(Row {
        nodes,
        seed,
        bound,
        origin_ratio: ratio(outcome.origin_bytes),
        cross_zone_ratio: ratio(outcome.cross_zone_bytes),
        outcome,
        took: started.elapsed(),
    })
}

/// How long what passes takes.
const PERIOD: Duration = Duration::from_secs(1);

fn faults(text: &str, nodes: u32, bound: f64) -> Result<Vec<(Duration, Fault)>> {
    let (kind, percent) = text.split_once('@').with_context(|| format!("--fault {text}: expected KIND@PERCENT"))?;
    let percent: u32 =
        percent.trim_end_matches('%').parse().with_context(|| format!("--fault {text}: no percentage"))?;
    let at = Duration::from_secs_f64(bound * f64::from(percent) / 100.0);
    // Spread over the nodes, and over the time that is left.
    let some = |share: u32, fault: fn(u32) -> Fault| {
        let count = (nodes * share / 100).max(1);
        (0..count).map(move |n| {
            (at + Duration::from_secs_f64(bound / 2.0) * n / count, fault(n * (100 / share).max(1) % nodes))
        })
    };
    Ok(match kind {
        "importer" => vec![(at, Fault::KillImporter)],
        "coordinator" => vec![(at, Fault::KillCoordinator)],
        "churn10" => some(10, Fault::Kill).collect(),
        "churn30" => some(30, Fault::Kill).collect(),
        "pause" => vec![(at, Fault::Pause(nodes / 2, PERIOD))],
        "pause-coordinator" => vec![(at, Fault::PauseCoordinator(PERIOD))],
        "partition" => vec![(at, Fault::Partition(PERIOD))],
        "sever" => vec![(at, Fault::Sever(0, nodes / 2))],
        "unreachable" => vec![(at, Fault::Unreachable(0, nodes / 2))],
        "lose5" => vec![(at, Fault::Lose(50))],
        "stall" => vec![(at, Fault::Stall(nodes / 2))],
        "boast" => vec![(at, Fault::Boast(nodes / 2))],
        "disk" => vec![(at, Fault::DiskFull(nodes / 2))],
        "leap" => vec![(at, Fault::Leap(nodes / 2, Duration::from_secs(300)))],
        "freeze" => vec![(at, Fault::Freeze(nodes / 2, PERIOD))],
        "slow10" => some(10, Fault::Slow).map(|(_, fault)| (at, fault)).collect(),
        "old10" => some(10, Fault::Old).map(|(_, fault)| (at, fault)).collect(),
        "corrupt" => vec![(at, Fault::Corrupt(nodes / 2))],
        "lie" => vec![(at, Fault::Lie(nodes / 2))],
        "throttle" => vec![(at, Fault::Throttle(Duration::from_millis(500)))],
        "forbid" => some(50, Fault::Forbid).map(|(_, fault)| (at, fault)).collect(),
        _ => bail!("--fault {text}: unknown kind; see `darter simulate swarm --help`"),
    })
}

fn heading(play: &Play) -> String {
    let source = match play.holders {
        0 => format!("an origin of {} link(s)", play.origin_share),
        holders => format!("{holders} holder(s)"),
    };
    format!(
        "{} from {source}, links of 10 Gbit/s; bound = the time that no protocol beats\n\n\
         {:>7} {:>9} {:>9} {:>7} {:>7} {:>9} {:>9} {:>9} {:>8} {:>8}\n",
        play.size, "nodes", "bound s", "last s", "over", "goal", "p50 s", "p99 s", "origin/F", "zones/F", "played s"
    )
}

fn line(row: &Row) -> String {
    let Row { nodes, bound, outcome, origin_ratio, cross_zone_ratio, took, .. } = row;
    let goal = row.goal();
    format!(
        "{nodes:>7} {:>9.3} {:>9.3} {:>6.1}% {:>6.1}% {:>9.3} {:>9.3} {:>9.4} {:>8.3} {:>8.1}\n",
        bound.seconds(),
        outcome.last,
        row.overhead(),
        goal,
        outcome.quantile(0.5),
        outcome.quantile(0.99),
        origin_ratio,
        cross_zone_ratio,
        took.as_secs_f64(),
    )
}

/// The same for a pipe.
fn tabs(csv: &str) -> String {
    csv.replace(',', "\t")
}

fn csv(rows: &[Row]) -> String {
    let heading = "nodes,seed,bound_seconds,goal_seconds,last_seconds,p50_seconds,p99_seconds,origin_ratio,\
                   cross_zone_ratio,duplicate_bytes,refused_requests,most_neighbours,events\n";
    rows.iter().map(values).fold(heading.to_owned(), |text, values| text + &values)
}

fn values(row: &Row) -> String {
    let Row { nodes, seed, bound, outcome, origin_ratio, cross_zone_ratio, .. } = row;
    let (bound, goal) = (bound.seconds(), bound.goal_seconds());
    let (last, p50, p99) = (outcome.last, outcome.quantile(0.5), outcome.quantile(0.99));
    let Outcome { duplicate_bytes, refused, neighbours, events, .. } = outcome;
    format!(
        "{nodes},{seed},{bound},{goal},{last},{p50},{p99},{origin_ratio},{cross_zone_ratio},{duplicate_bytes},{refused},\
         {neighbours},{events}\n"
    )
}
