//! What nodes do with each other: pieces from one to another against nginx on this machine's
//! loopback, and whole swarms in network namespaces against the time that no protocol beats.
//!
//! Arguments choose parts and rows by name, else all run; `size=64` cuts what a row pulls to so many
//! MiB, for a quick look.

use anyhow::{Context as _, Result, bail, ensure};
use darter_benches::rows::{self, ROWS, Row, SIZE_MAX_MIB, SIZE_MIB};
use darter_benches::{Report, pieces};

#[tokio::main]
async fn main() -> Result<()> {
    let chosen = Chosen::parse(std::env::args().skip(1))?;
    tokio::select! {
        outcome = bench(chosen) => outcome,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
    }
}

struct Chosen {
    parts: Vec<&'static str>,
    rows: Vec<&'static Row>,
    size_mib: u64,
    is_all: bool,
}

impl Chosen {
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut chosen = Self { parts: Vec::new(), rows: Vec::new(), size_mib: SIZE_MIB, is_all: false };
        for argument in arguments {
            if let Some(size) = argument.strip_prefix("size=") {
                chosen.size_mib = size.parse().with_context(|| argument.clone())?;
            } else if let Some(part) = pieces::PARTS.iter().find(|part| **part == argument) {
                chosen.parts.push(part);
            } else if let Some(row) = ROWS.iter().find(|row| row.name == argument) {
                chosen.rows.push(row);
            } else {
                let rows: Vec<_> = ROWS.iter().map(|row| row.name).collect();
                bail!("no row {argument}; there are {} {} and size=MIB", pieces::PARTS.join(" "), rows.join(" "));
            }
        }
        // In four layers of whole pieces.
        ensure!(
            (8..=SIZE_MAX_MIB).contains(&chosen.size_mib) && chosen.size_mib.is_multiple_of(4),
            "size={}: 8 to {SIZE_MAX_MIB} MiB, a multiple of 4",
            chosen.size_mib
        );
        if chosen.parts.is_empty() && chosen.rows.is_empty() {
            chosen.parts = pieces::PARTS.to_vec();
            chosen.rows = ROWS.iter().collect();
            chosen.is_all = chosen.size_mib == SIZE_MIB;
        }
        Ok(chosen)
    }
}

async fn bench(chosen: Chosen) -> Result<()> {
    let mut report = Report::default();
    for part in chosen.parts {
        pieces::run(part, &mut report).await?;
    }
    for row in chosen.rows {
        rows::run(row, chosen.size_mib, &mut report).await?;
    }
    report.finish(if chosen.is_all { "swarm" } else { "swarm-part" })
}
