//! How far each node is: bars on a terminal, a line every few seconds elsewhere.
//!
//! What a node has is what its network card received, says the kernel: the same witness with darter
//! and without.

use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_tests::net::Place;
use darter_tests::stage::bytes;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

/// How often bars move.
const LOOK: Duration = Duration::from_millis(200);

/// How often a pipe gets a line.
const LINE: Duration = Duration::from_secs(5);

/// All nodes of one pull.
pub(crate) struct Progress {
    /// Absent where nobody watches a terminal.
    bars: Option<MultiProgress>,
    rows: Vec<Row>,
    size: u64,
    started: Instant,
    told: Instant,
}

struct Row {
    name: String,
    place: Place,
    /// What the card had received when the pull began.
    before: u64,
    received: u64,
    bar: ProgressBar,
    /// Said once and for all: it is done, or dead.
    end: Option<String>,
}

impl Progress {
    /// Of nodes that each get so many bytes from now on.
    pub(crate) fn new(nodes: &[Place], size: u64) -> Result<Self> {
        let bars =
            std::io::stdout().is_terminal().then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stdout()));
        let now = Instant::now();
        let mut progress = Self { bars, rows: Vec::new(), size, started: now, told: now };
        for place in nodes {
            progress.add(place)?;
        }
        Ok(progress)
    }

    /// One more.
    pub(crate) fn add(&mut self, place: &Place) -> Result<()> {
        let style = ProgressStyle::with_template("  {prefix:<8} {bar:40} {percent:>3} %  {msg}");
        let style = style.context("the progress bar's template is wrong")?;
        let bar = match &self.bars {
            Some(bars) => bars.add(ProgressBar::new(self.size)),
            None => ProgressBar::hidden(),
        };
        let name = format!("node {}", self.rows.len() + 1);
        let bar = bar.with_style(style).with_prefix(name.clone());
        let before = place.traffic()?.received;
        self.rows.push(Row { name, place: place.clone(), before, received: 0, bar, end: None });
        Ok(())
    }

    /// What the first `count` nodes have on the average, from 0 to 1.
    pub(crate) fn share(&self, count: usize) -> f64 {
        let received: u64 = self.rows.iter().take(count).map(|row| row.received).sum();
        bytes(received) / bytes(self.size * count as u64)
    }

    /// Nothing more is to be expected of a node.
    pub(crate) fn end(&mut self, node: usize, why: &str) {
        let row = &mut self.rows[node];
        row.bar.abandon_with_message(why.to_owned());
        row.end = Some(why.to_owned());
        // On a terminal it stands beside the bar.
        if self.bars.is_none() {
            self.say(&format!("{}: {why}", self.rows[node].name));
        }
    }

    /// A line that stays above the bars.
    pub(crate) fn say(&self, line: &str) {
        let line = format!("  {:>5.1} s  {line}", self.started.elapsed().as_secs_f64());
        // A terminal that is gone hears nothing, and nothing depends on it.
        let told = self.bars.as_ref().map(|bars| bars.println(&line));
        if told.is_none() {
            println!("{line}");
        }
    }

    /// Shows how far everybody is while something happens.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                looked = self.look() => looked?,
            }
        }
    }

    /// Waits a moment and looks again.
    pub(crate) async fn look(&mut self) -> Result<()> {
        tokio::time::sleep(LOOK).await;
        for row in self.rows.iter_mut().filter(|row| row.end.is_none()) {
            // The card counts headers too.
            row.received = (row.place.traffic()?.received - row.before).min(self.size);
            row.bar.set_position(row.received);
            row.bar.set_message(if row.received == self.size { "unpacking" } else { "" });
        }
        if self.bars.is_none() && self.told.elapsed() >= LINE {
            self.told = Instant::now();
            let rows = self.rows.iter().map(|row| match &row.end {
                Some(_) => format!("{} -", row.name),
                None => format!("{} {:.0} %", row.name, 100.0 * bytes(row.received) / bytes(self.size)),
            });
            self.say(&rows.collect::<Vec<_>>().join("   "));
        }
        Ok(())
    }
}
