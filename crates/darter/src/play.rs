//! `darter simulate scaler`: what the scaler's own decisions would have cost on a trace of demand.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Error, Result, ensure};
use clap::ValueEnum;
use darter_core::units::Seconds;
use darter_scaler::Policy;
use darter_scaler::simulate::cluster::{self, Control, Outcome, Timers};
use darter_scaler::simulate::replay::{self, Cost};
use darter_scaler::traces::{Assumed, Shape, Trace, generate};

use crate::{archive, plot, show};

/// What is played.
#[derive(clap::Args)]
pub(crate) struct Play {
    /// A trace of demand: a text, or a .tar.gz or .gz that holds one. Can be repeated.
    #[arg(long = "trace", value_name = "FILE", required_unless_present = "made_up")]
    traces: Vec<PathBuf>,
    /// Made-up demand: bursts, diurnal, on-off or flash-crowd. Can be repeated.
    #[arg(long, value_name = "SHAPE", value_parser = Shape::ALL.map(|(name, _)| name))]
    made_up: Vec<String>,
    /// Seed of made-up demand; the same seed is the same demand.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Workloads of made-up demand.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    workloads: u32,
    /// Days of made-up demand.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    days: u32,
    /// What a cold start is worth, in seconds of an idle GPU; one comparison each.
    #[arg(long, value_name = "SECONDS,…", value_delimiter = ',', default_value = "84,300,900",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    cold_start: Vec<u64>,
    /// How long one takes.
    #[arg(long, value_name = "DURATION", default_value = "84s")]
    lead: Seconds,
    /// How long a request takes, where a trace only has their number.
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    service: Seconds,
    /// How much of a cluster is modelled.
    #[arg(long, value_enum, default_value = "both")]
    model: Model,
    /// How long Karpenter leaves an empty node alone.
    #[arg(long, value_name = "DURATION", default_value = "180s")]
    consolidate_after: Seconds,
    /// The scaler's policy, as TOML; what it leaves out has its default.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Write every row as a line of this file.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write the first thousand decisions in the cluster of the first trace, for `darter replay`.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Draw what each fixed time costs, and what the scaler's does, of the first trace.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// How much of a cluster is modelled.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Model {
    /// One replica of each workload, that serves its requests in turn.
    Replay,
    /// KEDA, the HPA and Karpenter with their timers, replicas on nodes with one GPU.
    Cluster,
    /// One after the other.
    Both,
}

/// One way to keep replicas, on one trace, at one price of a cold start.
struct Row {
    trace: String,
    cold_ms: u64,
    name: String,
    cost: Cost,
    /// Over that of what it is compared with.
    ratio: f64,
    /// What only a cluster has.
    outcome: Option<Outcome>,
}

/// What others keep: fixed times, in seconds.
const FIXED: [u64; 3] = [60, 300, 900];
/// What the others are compared with.
const USUAL_MS: u64 = 300_000;

pub(crate) fn scaler(play: &Play) -> Result<ExitCode> {
    let policy = policy(play.policy.as_deref())?;
    let lead_ms = millis(play.lead);
    let traces = traces(play)?;
    let mut rows = Vec::new();
    let mut recorder = play.record.as_deref().map(Recorder::create).transpose()?;
    let tables = std::io::stdout().is_terminal();
    if !tables {
        show::print(&columns("\t"))?;
    }
    for (name, trace) in &traces {
        if play.model != Model::Cluster {
            let found = compare(name, trace, lead_ms, &play.cold_start, &policy);
            show::print(&if tables { table(name, trace, &found) } else { lines(&found, "\t") })?;
            rows.extend(found);
        }
        if play.model != Model::Replay {
            let found = in_cluster(name, trace, play, &policy, &mut recorder)?;
            show::print(&if tables { cluster_table(&found) } else { lines(&found, "\t") })?;
            rows.extend(found);
        }
    }
    if let Some(path) = &play.csv {
        let text = columns(",") + &lines(&rows, ",");
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let (Some(path), Some((name, trace))) = (&play.svg, traces.first()) {
        let curves = curves(trace, lead_ms, &play.cold_start, &rows, name);
        plot::keep_alive(path, &curves).with_context(|| format!("cannot draw {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Decisions of one run, as lines of a file.
struct Recorder {
    file: BufWriter<File>,
    left: usize,
}

/// Each holds all that it was made from.
const RECORDS_MAX: usize = 1000;

impl Recorder {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file: BufWriter::new(file), left: RECORDS_MAX })
    }

    fn play(mut self, trace: &Trace, timers: &Timers, control: &Control) -> Result<Outcome> {
        let mut failed = Ok(());
        let outcome = cluster::run_noting(trace, timers, control, &mut |record| {
            if self.left > 0 && failed.is_ok() {
                self.left -= 1;
                failed = record.line().map_err(Error::from).and_then(|line| Ok(writeln!(self.file, "{line}")?));
            }
        });
        failed.and_then(|()| Ok(self.file.flush()?)).context("cannot write the record")?;
        Ok(outcome)
    }
}

fn millis(seconds: Seconds) -> u64 {
    u64::try_from(seconds.0.as_millis()).unwrap_or(u64::MAX)
}

fn policy(path: Option<&Path>) -> Result<Policy> {
    let Some(path) = path else { return Ok(Policy::default()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is no policy", path.display()))
}

fn traces(play: &Play) -> Result<Vec<(String, Trace)>> {
    let assumed = Assumed { service_ms: millis(play.service), ..Assumed::default() };
    ensure!(assumed.service_ms > 0, "--service must be longer than nothing");
    let mut traces = Vec::new();
    for path in &play.traces {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let trace = Trace::parse(&archive::text(path)?, assumed);
        traces.push((name, trace.with_context(|| path.display().to_string())?));
    }
    for (name, shape) in Shape::ALL.iter().filter(|(name, _)| play.made_up.iter().any(|wanted| wanted == name)) {
        traces.push((format!("made-up:{name}"), generate(*shape, play.workloads, play.days, play.seed)));
    }
    Ok(traces)
}

fn compare(name: &str, trace: &Trace, lead_ms: u64, worth: &[u64], policy: &Policy) -> Vec<Row> {
    let fixed = FIXED.map(|seconds| (seconds, replay::fixed(trace, lead_ms, seconds * 1000)));
    let usual = replay::fixed(trace, lead_ms, USUAL_MS);
    let mut rows = Vec::new();
    for cold_ms in worth.iter().map(|seconds| seconds * 1000) {
        let mut add = |policy: String, cost: Cost| {
            let ratio = over(cost.total_ms(cold_ms), usual.total_ms(cold_ms));
            rows.push(Row { trace: name.to_owned(), cold_ms, name: policy, cost, ratio, outcome: None });
        };
        add("darter".to_owned(), replay::decided(trace, lead_ms, cold_ms, policy));
        for (seconds, cost) in fixed {
            add(format!("fixed {seconds} s"), cost);
        }
        let (keep_ms, cost) = replay::best_fixed(trace, lead_ms, cold_ms);
        add(format!("best fixed: {} s", keep_ms / 1000), cost);
    }
    rows
}

/// The reference platform's settings, and the scaler through the same controllers.
fn in_cluster(
    name: &str,
    trace: &Trace,
    play: &Play,
    policy: &Policy,
    recorder: &mut Option<Recorder>,
) -> Result<Vec<Row>> {
    let mut timers = Timers { consolidate_after_ms: millis(play.consolidate_after), ..Timers::default() };
    let before = timers.batch_idle_ms + timers.launch_ms;
    let lead_ms = millis(play.lead);
    ensure!(lead_ms > before, "--lead must be longer than a node takes to join, {} s", before / 1000);
    timers.pull_ms = lead_ms - timers.launch_ms;
    let usual = cluster::run(trace, &timers, &Control::Reference);
    let mut rows = Vec::new();
    for cold_ms in play.cold_start.iter().map(|seconds| seconds * 1000) {
        let control = Control::Darter(Box::new(policy.clone()), cold_ms);
        let ours = match recorder.take() {
            Some(recorder) => recorder.play(trace, &timers, &control)?,
            None => cluster::run(trace, &timers, &control),
        };
        for (kept, outcome) in [("darter", ours), ("KEDA+Karpenter", usual.clone())] {
            let cost = Cost { requests: outcome.requests, colds: outcome.starts, idle_ms: outcome.idle_ms() };
            let ratio = over(cost.total_ms(cold_ms), usual.total_ms(cold_ms));
            let (trace, name) = (name.to_owned(), kept.to_owned());
            rows.push(Row { trace, cold_ms, name, cost, ratio, outcome: Some(outcome) });
        }
    }
    Ok(rows)
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn over(value: u64, by: u64) -> f64 {
    value as f64 / by.max(1) as f64
}

fn hours(ms: u64) -> f64 {
    over(ms, 3_600_000)
}

fn table(name: &str, trace: &Trace, rows: &[Row]) -> String {
    let mut text = format!(
        "\n{name}: {} requests of {} workloads in {:.1} h, {:.1} GPU-h of work; one replica each, served in turn\n\n\
         {:>8}  {:<18} {:>7} {:>11} {:>11} {:>8}\n",
        trace.requests.len(),
        trace.workloads.len(),
        hours(trace.length_ms()),
        hours(trace.busy_ms()),
        "P GPU-s",
        "kept",
        "cold",
        "idle GPU-h",
        "cost GPU-h",
        "/ 300 s",
    );
    for row in rows {
        let _ = writeln!(
            text,
            "{:>8}  {:<18} {:>6.1}% {:>11.1} {:>11.1} {:>8.3}",
            row.cold_ms / 1000,
            row.name,
            over(row.cost.colds, row.cost.requests) * 100.0,
            hours(row.cost.idle_ms),
            hours(row.cost.total_ms(row.cold_ms)),
            row.ratio,
        );
    }
    text
}

fn cluster_table(rows: &[Row]) -> String {
    let mut text = format!(
        "\n  the same with KEDA, the HPA and Karpenter, nodes of one GPU; starts are of replicas\n\n\
         {:>8}  {:<15} {:>8} {:>8} {:>7} {:>6} {:>11} {:>11} {:>7} {:>7} {:>7}\n",
        "P GPU-s",
        "by",
        "p50 wait",
        "p99 wait",
        "starts",
        "nodes",
        "idle GPU-h",
        "cost GPU-h",
        "/ KEDA",
        "killed",
        "lost",
    );
    for Row { cold_ms, name, cost, ratio, outcome, .. } in rows {
        let Some(outcome) = outcome else { continue };
        let _ = writeln!(
            text,
            "{:>8}  {name:<15} {:>6.1} s {:>6.1} s {:>7} {:>6} {:>11.1} {:>11.1} {ratio:>7.3} {:>7} {:>7}",
            cold_ms / 1000,
            over(outcome.wait_ms(500), 1000),
            over(outcome.wait_ms(990), 1000),
            outcome.starts,
            outcome.launches,
            hours(cost.idle_ms),
            hours(cost.total_ms(*cold_ms)),
            outcome.killed,
            outcome.last_copies_lost,
        );
    }
    text + "  killed: requests that lost their replica; lost: nodes that went with the only copy of a hot image\n"
}

fn columns(tab: &str) -> String {
    let names = ["trace", "model", "cold_start_gpu_seconds", "kept", "requests", "cold_starts", "idle_gpu_hours"];
    let more =
        ["cost_gpu_hours", "cost_ratio", "wait_p50_seconds", "wait_p99_seconds", "nodes", "killed", "last_copies_lost"];
    [&names[..], &more].concat().join(tab) + "\n"
}

fn lines(rows: &[Row], tab: &str) -> String {
    let mut text = String::new();
    for Row { trace, cold_ms, name, cost, ratio, outcome } in rows {
        let (idle, total) = (hours(cost.idle_ms), hours(cost.total_ms(*cold_ms)));
        let Cost { requests, colds, .. } = cost;
        let fields = [
            trace.replace([',', '\t', '\n'], "_"),
            if outcome.is_some() { "cluster" } else { "replay" }.to_owned(),
            (cold_ms / 1000).to_string(),
            name.clone(),
            requests.to_string(),
            colds.to_string(),
            format!("{idle:.3}"),
            format!("{total:.3}"),
            format!("{ratio:.4}"),
        ];
        let more = outcome.as_ref().map_or_else(Default::default, |outcome| {
            let wait = |permille| format!("{:.3}", over(outcome.wait_ms(permille), 1000));
            let counts = [outcome.launches, outcome.killed, outcome.last_copies_lost].map(|count| count.to_string());
            let [nodes, killed, lost] = counts;
            [wait(500), wait(990), nodes, killed, lost]
        });
        let _ = writeln!(text, "{}", [&fields[..], &more].concat().join(tab));
    }
    text
}

/// Of each price of a cold start: what each fixed time costs, over 300 s, and what the scaler does.
fn curves(trace: &Trace, lead_ms: u64, worth: &[u64], rows: &[Row], name: &str) -> Vec<plot::Curve> {
    let kept: Vec<u64> = std::iter::successors(Some(10_u64), |kept| Some(kept * 5 / 4)).take(30).collect();
    let costs: Vec<_> = kept.iter().map(|seconds| replay::fixed(trace, lead_ms, seconds * 1000)).collect();
    let usual = replay::fixed(trace, lead_ms, USUAL_MS);
    let curve = |seconds: &u64| {
        let cold_ms = seconds * 1000;
        let ours = rows
            .iter()
            .find(|row| row.trace == name && row.cold_ms == cold_ms && row.outcome.is_none() && row.name == "darter");
        let points = kept
            .iter()
            .zip(&costs)
            .map(|(kept, cost)| (over(*kept, 1), over(cost.total_ms(cold_ms), usual.total_ms(cold_ms))));
        plot::Curve {
            name: format!("P = {seconds} GPU-s"),
            points: points.collect(),
            ours: ours.map_or(1.0, |row| row.ratio),
        }
    };
    worth.iter().map(curve).collect()
}
