//! What every benchmark needs: figures with their goals, a table for people, JSON for machines.
//!
//! A figure is a ratio against a peer or a bound that was measured in the same run. Absolute times
//! on a shared machine are noise.

pub mod agent_down;
pub mod client;
pub mod hyper_file;
pub mod libp2p_stream;
pub mod pieces;
pub mod rows;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Which direction is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Less is better, and the goal is a ceiling.
    Lower,
    /// More is better, and the goal is a floor.
    Higher,
}

/// One measured figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// The value, of this run.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it should be; none where the figure is printed for information.
    pub goal: Option<f64>,
    /// Which direction is good.
    pub better: Better,
    /// Whether the goal is met.
    pub ok: bool,
    /// How it was measured.
    pub conditions: String,
}

/// The figures of one benchmark.
#[derive(Debug, Default)]
pub struct Report(Vec<Figure>);

impl Report {
    /// Adds a figure and prints its line.
    pub fn add(
        &mut self,
        name: &str,
        value: f64,
        unit: &'static str,
        better: Better,
        goal: Option<f64>,
        conditions: impl Into<String>,
    ) {
        let ok = goal.is_none_or(|goal| match better {
            Better::Lower => value <= goal,
            Better::Higher => value >= goal,
        });
        self.push(Figure { name: name.to_owned(), value, unit, goal, better, ok, conditions: conditions.into() });
    }

    /// Adds a figure that is already judged: where the run behind it is void, it is not ok, whatever
    /// its value.
    pub fn push(&mut self, figure: Figure) {
        println!("{}", line(&figure));
        self.0.push(figure);
    }

    /// Writes `<name>.json` into `$DARTER_BENCH_DIR` (default target/bench) and says where, and
    /// whether every goal was met.
    pub fn finish(self, name: &str) -> Result<()> {
        let dir = std::env::var_os("DARTER_BENCH_DIR").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(format!("{name}.json"));
        std::fs::write(&path, serde_json::to_string_pretty(&self.0)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
        let missed: Vec<_> = self.0.iter().filter(|figure| !figure.ok).map(|figure| figure.name.as_str()).collect();
        let verdict = if missed.is_empty() {
            "every goal is met".to_owned()
        } else {
            format!("missed or void: {}", missed.join(", "))
        };
        println!("\n{verdict}; figures in {}", path.display());
        Ok(())
    }
}

fn line(figure: &Figure) -> String {
    let sign = if figure.better == Better::Lower { "<=" } else { ">=" };
    let goal = figure.goal.map_or_else(
        || "no goal".to_owned(),
        |goal| {
            let goal = format!("{goal:.3}");
            format!("goal {sign} {}", goal.trim_end_matches('0').trim_end_matches('.'))
        },
    );
    let mark = match (figure.goal, figure.ok) {
        (_, false) => "!",
        (None, true) => " ",
        (Some(_), true) => "+",
    };
    format!("{mark} {:<46} {:>9.3} {:<8} {:<16} {}", figure.name, figure.value, figure.unit, goal, figure.conditions)
}

/// The middle one; of an even number the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { f64::midpoint(at(middle.wrapping_sub(1)), at(middle)) } else { at(middle) }
}

/// The value below which this share of all lies.
pub fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index"
    )]
    let index = ((values.len() as f64 * share).ceil() as usize).saturating_sub(1);
    values.get(index).copied().unwrap_or(f64::NAN)
}

/// Bytes per second, in MB/s.
pub fn megabytes_per_second(bytes: u64, took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = bytes as f64;
    bytes / took.as_secs_f64() / 1e6
}

/// A number of bytes in GiB.
pub fn gib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 30)
}
