//! The swarm's own decisions, played over made-up links, against the time that no protocol beats: how near the last
//! node comes to it, for swarms that no machine here could run.
//!
//! Times are those of the model and the same in every run; only processor time and memory are this machine's. TCP,
//! TLS, disks and hashing are not in it: `swarm` has those. Arguments choose rows by name, else all run.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use darter_agent::swarm::{frame, wire};
use darter_api::v1;
use darter_benches::{Better, Figure, Report};
use darter_core::Digest;
use darter_core::simulate::{Bound, Outcome, Scenario, run};
use darter_core::swarm::Message;
use darter_tests::process::Usage;
use darter_tests::stage::MIB;

const GIB: u64 = 1024 * MIB;
/// 512 pieces of 8 MiB.
const SIZE: u64 = 4 * GIB;

/// What the fact sheet on peers allows: the 99th of a hundred nodes against the one in the middle, and the last.
const SPREAD: f64 = 1.05;
const SPREAD_LAST: f64 = 1.10;
/// Messages against all bytes, in percent.
const CONTROL: f64 = 0.5;
/// Members that a node exchanges pieces of a blob with.
const NEIGHBOURS: f64 = 24.0;
/// From the moment in which nodes know each other, and one in which none is new.
const BOOT: Duration = Duration::from_secs(1);
const SETTLE: Duration = Duration::from_millis(300);
/// What a reader waits for its first byte, on top of one piece.
const FIRST: Duration = Duration::from_millis(50);

/// One row.
struct Row {
    name: &'static str,
    case: Case,
}

/// What is played; goals are percent over the bound.
#[derive(Clone, Copy)]
enum Case {
    /// Nobody has it: an origin of so many links, and so many runs with lots of their own.
    Cold { nodes: u32, share: u32, size: u64, seeds: u64, goal: Option<f64> },
    /// Some have it, and the origin is not asked.
    Warm { nodes: u32, holders: u32, goal: f64 },
    /// All start within a second, and know nobody.
    Boot { nodes: u32 },
    /// As many nodes as anybody has, on one core.
    Huge { nodes: u32, seconds: f64 },
    /// The same lots, the same run.
    Again,
    /// What a node's part takes, where many want several blobs.
    Memory { nodes: u32, blobs: usize },
}

const fn cold(nodes: u32, share: u32, seeds: u64, goal: f64) -> Case {
    Case::Cold { nodes, share, size: SIZE, seeds, goal: Some(goal) }
}

/// In the order in which they run: what is measured of memory comes before what leaves some.
const ROWS: [Row; 19] = [
    Row { name: "memory1000", case: Case::Memory { nodes: 1000, blobs: 4 } },
    Row { name: "again", case: Case::Again },
    Row { name: "cold4", case: cold(4, 1, 3, 4.0) },
    Row { name: "cold8", case: cold(8, 1, 3, 5.0) },
    Row { name: "cold16", case: cold(16, 1, 3, 6.0) },
    Row { name: "cold64", case: cold(64, 1, 3, 7.0) },
    Row { name: "cold256", case: cold(256, 1, 1, 8.0) },
    Row { name: "cold1000", case: cold(1000, 1, 1, 9.0) },
    Row { name: "fast4", case: cold(4, 4, 3, 3.0) },
    Row { name: "fast16", case: cold(16, 4, 3, 4.0) },
    Row { name: "fast64", case: cold(64, 4, 3, 5.0) },
    Row { name: "fast1000", case: cold(1000, 4, 1, 6.0) },
    Row { name: "small64", case: Case::Cold { nodes: 64, share: 1, size: 256 * MIB, seeds: 3, goal: None } },
    Row { name: "warm15", case: Case::Warm { nodes: 15, holders: 1, goal: 13.0 } },
    Row { name: "warm64", case: Case::Warm { nodes: 64, holders: 1, goal: 8.0 } },
    Row { name: "holder1-fresh3", case: Case::Warm { nodes: 3, holders: 1, goal: 13.0 } },
    Row { name: "holders2-fresh3", case: Case::Warm { nodes: 3, holders: 2, goal: 9.0 } },
    Row { name: "boot100", case: Case::Boot { nodes: 100 } },
    Row { name: "cold10000", case: Case::Huge { nodes: 10_000, seconds: 60.0 } },
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(wrong) = arguments.iter().find(|name| ROWS.iter().all(|row| row.name != name.as_str())) {
        bail!("no row {wrong}; there are {}", ROWS.map(|row| row.name).join(" "));
    }
    let mut report = Report::default();
    for row in ROWS.iter().filter(|row| arguments.is_empty() || arguments.iter().any(|name| name == row.name)) {
        row.run(&mut report).with_context(|| row.name)?;
    }
    report.finish(if arguments.is_empty() { "sim" } else { "sim-part" })
}

impl Row {
    fn run(&self, report: &mut Report) -> Result<()> {
        let name = self.name;
        match self.case {
            Case::Cold { nodes, share, size, seeds, goal } => {
                let scenario = Scenario::cold(nodes, size, share);
                let what = format!("{nodes} nodes read it cold at once from an origin of {share} link(s)");
                let played = Played::worst(scenario, seeds, &what);
                let goal = goal.unwrap_or_else(|| played.goal_percent());
                played.times(name, goal, report);
                played.origin(name, 1.0, report);
                played.control(name, report);
            }
            Case::Warm { nodes, holders, goal } => {
                let scenario = Scenario::warm(nodes, holders, SIZE);
                let played = Played::worst(scenario, 3, &format!("{nodes} nodes read at once what {holders} have"));
                played.times(name, goal, report);
                played.origin(name, 0.0, report);
                played.control(name, report);
                played.first_piece(name, report);
            }
            Case::Boot { nodes } => {
                println!();
                let scenario = Scenario { spread: BOOT, introductions: BOOT, ..Scenario::cold(nodes, GIB, 1) };
                let what = format!("{nodes} nodes start within a second, and find each other within it");
                let played = Played::worst(scenario, 3, &what);
                let goal = (BOOT + SETTLE).as_secs_f64() + played.bound.goal_seconds();
                let value = played.outcome.last;
                played.add(report, format!("{name}, last node"), value, "s", goal);
                played.origin(name, 1.0, report);
            }
            Case::Huge { nodes, seconds } => {
                let what = format!("{nodes} nodes read it cold at once from an origin of 1 link(s)");
                let before = Usage::own()?.cpu;
                let played = Played::worst(Scenario::cold(nodes, 256 * MIB, 1), 1, &what);
                let took = Usage::own()?.cpu - before;
                let goal = played.goal_percent();
                played.times(name, goal, report);
                played.origin(name, 1.0, report);
                played.neighbours(name, report);
                played.add(report, format!("{name}, processor time of the run"), took.as_secs_f64(), "s", seconds);
            }
            Case::Again => again(name, report),
            Case::Memory { nodes, blobs } => memory(name, nodes, blobs, report)?,
        }
        Ok(())
    }
}

/// A run, what it is compared with, and what it was, for people.
struct Played {
    scenario: Scenario,
    bound: Bound,
    outcome: Outcome,
    conditions: String,
}

impl Played {
    /// The run whose last node came last.
    fn worst(scenario: Scenario, seeds: u64, what: &str) -> Self {
        let weigh = scenario.nodes <= 1000;
        let scenario = Scenario { weigh: weigh.then_some(length as _), ..scenario };
        let runs = (1..=seeds).map(|seed| {
            let scenario = Scenario { seed, ..scenario.clone() };
            (run(&scenario), scenario)
        });
        // One that did not end is the worst of all.
        let worth = |outcome: &Outcome| (!outcome.is_complete(), outcome.last);
        let worst = runs.max_by(|(a, _), (b, _)| worth(a).partial_cmp(&worth(b)).unwrap_or(std::cmp::Ordering::Equal));
        let (outcome, scenario) = worst.unwrap_or_else(|| (run(&scenario), scenario));
        let (pieces, piece) = (scenario.layout.pieces(), scenario.layout.piece_size() / MIB);
        let of = if seeds > 1 { format!(", the worst of {seeds} seeds") } else { String::new() };
        let mut conditions = format!("{what}; {pieces} pieces of {piece} MiB, links of 10 Gbit/s{of}");
        if !outcome.is_complete() {
            conditions = format!("VOID, a node never got it: {conditions}");
        }
        Self { bound: Bound::of(&scenario), scenario, outcome, conditions }
    }

    /// What the fact sheet's formula allows, in percent over the bound.
    fn goal_percent(&self) -> f64 {
        (self.bound.goal_seconds() / self.bound.seconds() - 1.0) * 100.0
    }

    /// Of a run that did not end no figure is ok, whatever its value.
    fn figure(&self, name: String, value: f64, unit: &'static str, goal: f64, is_met: bool) -> Figure {
        let (ok, conditions) = (self.outcome.is_complete() && is_met, self.conditions.clone());
        Figure { name, value, unit, goal: Some(goal), better: Better::Lower, ok, conditions }
    }

    /// A figure with a ceiling.
    fn add(&self, report: &mut Report, name: String, value: f64, unit: &'static str, goal: f64) {
        report.push(self.figure(name, value, unit, goal, value <= goal));
    }

    fn times(&self, name: &str, goal: f64, report: &mut Report) {
        println!();
        let over = (self.outcome.last / self.bound.seconds() - 1.0) * 100.0;
        self.add(report, format!("{name}, last node over the bound"), over, "%", goal);
        let middle = self.outcome.quantile(0.5);
        self.add(report, format!("{name}, p99 / p50"), self.outcome.quantile(0.99) / middle, "", SPREAD);
        self.add(report, format!("{name}, last / p50"), self.outcome.quantile(1.0) / middle, "", SPREAD_LAST);
    }

    /// Exactly so many copies of it: a byte less is as wrong as one more.
    fn origin(&self, name: &str, copies: f64, report: &mut Report) {
        let value = ratio(self.outcome.origin_bytes, self.scenario.layout.size());
        let name = format!("{name}, origin bytes / F, exactly");
        report.push(self.figure(name, value, "", copies, value == copies));
    }

    /// Frames as they go over the wire, less what noise, yamux and TCP put around them.
    fn control(&self, name: &str, report: &mut Report) {
        let Outcome { message_bytes, peer_bytes, origin_bytes, .. } = self.outcome;
        let percent = ratio(message_bytes, message_bytes + peer_bytes + origin_bytes) * 100.0;
        self.add(report, format!("{name}, messages of all bytes"), percent, "%", CONTROL);
        self.neighbours(name, report);
    }

    fn neighbours(&self, name: &str, report: &mut Report) {
        let most = self.outcome.neighbours as f64;
        self.add(report, format!("{name}, most neighbours of a node"), most, "", NEIGHBOURS);
    }

    /// When each node has the piece that its reader waits for: it is asked for as every other is.
    fn first_piece(&self, name: &str, report: &mut Report) {
        let millis: Vec<f64> = self.outcome.first_pieces.iter().flatten().map(|seconds| seconds * 1000.0).collect();
        let goal = (FIRST.as_secs_f64() + self.bound.piece_seconds) * 1000.0;
        let value = darter_benches::percentile(millis, 0.99);
        self.add(report, format!("{name}, piece 0 at a node, p99"), value, "ms", goal);
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

/// Bytes of a message as its frame goes over the wire.
fn length(blob: &Digest, message: &Message) -> u64 {
    let Ok(message) = wire::encode(blob, message) else { return 0 };
    let mut bytes = Vec::new();
    frame::append(&mut bytes, &v1::Frame { kind: Some(v1::frame::Kind::Message(message)) });
    bytes.len() as u64
}

fn again(name: &str, report: &mut Report) {
    println!();
    let scenario = Scenario::cold(64, GIB, 2);
    let (first, second) = (run(&scenario), run(&scenario));
    let other = run(&Scenario { seed: 2, ..scenario });
    // Where another seed gives the same run too, nothing is compared.
    let same = u8::from(first == second && first != other);
    let conditions = "64 nodes, twice with one seed, and once with another; all that a run comes to is compared";
    report.add(&format!("{name}, the same to the bit"), same.into(), "", Better::Higher, Some(1.0), conditions);
}

fn memory(name: &str, nodes: u32, blobs: usize, report: &mut Report) -> Result<()> {
    println!();
    let mut scenario = Scenario::cold(nodes, GIB, 1);
    scenario.further = vec![scenario.layout; blobs - 1];
    let before = Usage::own()?.resident_bytes;
    // From now on the peak is that of the run.
    std::fs::write("/proc/self/clear_refs", "5").context("cannot reset the peak of the resident memory")?;
    let outcome = run(&scenario);
    let grown = Usage::own()?.peak_bytes.saturating_sub(before);
    let is_whole = if outcome.is_complete() { "" } else { "VOID, a node never got them: " };
    let conditions = format!(
        "{is_whole}{nodes} nodes pull {blobs} blobs of {} pieces at once: the peak over all nodes, by their number; what \
         the decisions need and the model with them, and none of a real agent's sockets, buffers and tables",
        scenario.layout.pieces()
    );
    let value = ratio(grown, u64::from(nodes)) / MIB as f64;
    report.push(Figure {
        name: format!("{name}, of a node on average"),
        value,
        unit: "MiB",
        goal: None,
        better: Better::Lower,
        ok: outcome.is_complete(),
        conditions,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_figure_of_a_run_that_did_not_end_is_ok() {
        let whole = Scenario::cold(4, 64 * MIB, 1);
        let cut = Scenario { end: Duration::from_millis(20), ..whole.clone() };
        for (scenario, is_whole) in [(whole, true), (cut, false)] {
            let played = Played::worst(scenario, 2, "4 nodes");
            let figure = played.figure("last node".to_owned(), played.outcome.last, "s", 1.0, true);
            assert_eq!((figure.ok, figure.conditions.starts_with("VOID")), (is_whole, !is_whole), "{figure:?}");
        }
    }

    #[test]
    fn messages_weigh_what_they_take_on_the_wire() {
        // A length of 4 bytes, and in the frame a blob's name and hardly more.
        assert!((38..60).contains(&length(&Digest::of(b"a"), &Message::Slot)));
    }
}
