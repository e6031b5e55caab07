//! The swarm in network namespaces, one row for each case that the fact sheet on peers measured: real
//! agents on links with a rate, against the time that no protocol beats on those links.
//!
//! - [`stand`]: a cluster, what its links carry, and what a round on it costs
//! - `run`: what happens in a row
//! - `played`: the same row in the simulator, which is to give the same time
//!
//! A run counts only if the machine was not too busy and bare TCP filled the links; else its figures
//! say "void" and why, and none of them is ok.

mod played;
mod run;
mod stand;

use anyhow::Result;
use darter_tests::cluster::Plan;
use darter_tests::scratch;
use darter_tests::stage::MIB;
use darter_tests::tools::{Need, Release, can_run};

use crate::{Better, Figure, Report, gib};

/// What is pulled where the caller does not say.
pub const SIZE_MIB: u64 = 256;

/// The formula of the bound holds for pieces of 1 MiB, which larger blobs do not have.
pub const SIZE_MAX_MIB: u64 = 512;

/// An agent and a containerd of a node, both at work.
const MEMORY_PER_NODE: u64 = 200 * MIB;

/// The header and the end of the tar that a layer is: a layer of so much less fills its pieces.
const TAR: u64 = 512 + 1024;

/// What happens in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    /// Nobody has it, all want it at the same moment.
    Cold,
    /// The same where pieces go from node to node in the clear.
    Plain,
    /// Some have it, the others want it.
    Warm,
    /// Cold, from an origin that is slow on each connection: against a direct pull on one.
    SlowOrigin,
    /// Many small layers, by containerd.
    SmallLayers,
    /// The same where some have them.
    WarmLayers,
    /// The one that has it is killed while the others read.
    HolderKilled,
    /// One of those that read the origin is killed.
    ImporterKilled,
    /// The one that says who reads what is killed.
    CoordinatorKilled,
}

/// One row of the benchmark.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// By which it is chosen.
    pub name: &'static str,
    case: Case,
    nodes: usize,
    /// Those of them that have it before.
    holders: usize,
    /// Of every link, in Mbit/s.
    mbit: u64,
    /// The origin's link, in links of a node.
    share: u64,
    layers: u64,
}

/// Nodes, and those of them that have it before; the rate of a link, and the origin's in links.
const fn row(
    name: &'static str,
    case: Case,
    (nodes, holders): (usize, usize),
    (mbit, share): (u64, u64),
    layers: u64,
) -> Row {
    Row { name, case, nodes, holders, mbit, share, layers }
}

/// Every row, in the order in which they run.
pub const ROWS: [Row; 14] = [
    row("cold4", Case::Cold, (4, 0), (200, 1), 1),
    row("cold4-plain", Case::Plain, (4, 0), (200, 1), 1),
    row("cold4-layers4", Case::Cold, (4, 0), (200, 1), 4),
    row("cold8", Case::Cold, (8, 0), (100, 1), 1),
    row("cold16", Case::Cold, (16, 0), (50, 1), 1),
    row("warm3", Case::Warm, (4, 1), (200, 1), 1),
    row("warm15", Case::Warm, (16, 1), (50, 1), 1),
    row("holders2-fresh3", Case::Warm, (5, 2), (150, 1), 1),
    row("slow-origin10", Case::SlowOrigin, (10, 0), (100, 10), 1),
    row("layers100", Case::SmallLayers, (4, 0), (200, 1), 100),
    row("warm-layers100", Case::WarmLayers, (4, 1), (200, 1), 100),
    row("holder-killed", Case::HolderKilled, (4, 1), (200, 1), 1),
    row("importer-killed", Case::ImporterKilled, (4, 0), (200, 1), 1),
    row("coordinator-killed", Case::CoordinatorKilled, (4, 0), (200, 1), 1),
];

/// Bytes a second of one connection to the origin that is slow.
const SLOW: u64 = 2_000_000;

impl Row {
    fn plan(&self) -> Plan {
        let origin_connection = (self.case == Case::SlowOrigin).then_some(SLOW);
        Plan { origin_connection, ..Plan::new(self.nodes, self.mbit, self.share) }
    }

    /// The sizes of the files in the layers, for a payload of so many MiB. Small layers stay as small
    /// as they are: fewer of them are another case.
    fn files(&self, size_mib: u64) -> Vec<u64> {
        let layer = if self.is_small() { MIB } else { size_mib * MIB / self.layers };
        vec![layer - TAR; usize::try_from(self.layers).unwrap_or_default()]
    }

    /// Whether containerds pull, and the time that they need is a part of it.
    const fn is_small(&self) -> bool {
        matches!(self.case, Case::SmallLayers | Case::WarmLayers)
    }

    fn bytes(&self, size_mib: u64) -> u64 {
        self.files(size_mib).iter().map(|file| file + TAR).sum()
    }

    /// Why this machine is too small, if it is.
    fn does_not_fit(&self, size_mib: u64) -> Result<Option<String>> {
        let nodes = self.nodes as u64;
        // What agents keep; containerd has packed and unpacked layers beside it.
        let copies = if self.is_small() { 3 } else { 1 };
        // Half as much again: a disk that is nearly full is slow, and an agent keeps away from its end.
        let disk = nodes * self.bytes(size_mib) * copies * 3 / 2;
        let memory = nodes * MEMORY_PER_NODE + self.bytes(size_mib);
        let too_small = |what: &str, has: u64, needs: u64| {
            (has < needs).then(|| format!("needs {:.1} GiB of {what}, here are {:.1}", gib(needs), gib(has)))
        };
        Ok(too_small("disk", scratch::room()?, disk).or_else(|| too_small("memory", memory_free(), memory)))
    }

    /// What the row is, for people.
    fn title(&self, size_mib: u64) -> String {
        let Self { nodes, mbit, share, layers, holders, .. } = self;
        let what = match self.case {
            Case::Cold => "read cold by all at once",
            Case::Plain => "read cold by all at once, without TLS",
            Case::Warm => "read by those that do not have it",
            Case::SlowOrigin => "read cold by all at once, origin 2 MB/s a connection",
            Case::SmallLayers => "pulled cold by all at once by CRI, containerd 2.2.4, 3 layers at a time",
            Case::WarmLayers => "pulled by those that do not have them by CRI, containerd 2.2.4, 3 layers at a time",
            Case::HolderKilled => "read by all but one, which has it and is killed in the middle",
            Case::ImporterKilled => "read cold by all at once, one agent killed in the middle",
            Case::CoordinatorKilled => "read cold by all at once, the agent that coordinates killed in the middle",
        };
        let have = if *holders == 0 { String::new() } else { format!(", {holders} of them have it") };
        let full = self.bytes(SIZE_MIB);
        let cut = if self.bytes(size_mib) == full { "" } else { ", CUT for a quick run: constants weigh more" };
        let mib = self.bytes(size_mib) / MIB;
        let layers = if *layers == 1 { "1 layer".to_owned() } else { format!("{layers} layers") };
        format!("{nodes} nodes{have}, {mbit} Mbit/s, origin {}, {layers}, {mib} MiB{cut}: {what}", mbit * share)
    }
}

/// Runs one row. What goes wrong in it is a figure of its own, and the next row runs all the same.
pub async fn run(row: &Row, size_mib: u64, report: &mut Report) -> Result<()> {
    println!("\n{}: {}", row.name, row.title(size_mib));
    if !can_run(&format!("bench-swarm, {}", row.name), &[Need::Containerd(Release::V2), Need::Darter]) {
        missing(row, "not run: see above", report);
    } else if let Some(why) = row.does_not_fit(size_mib)? {
        missing(row, &format!("not run: {why}"), report);
    } else if let Err(error) = run::run(row, size_mib, report).await {
        missing(row, &format!("failed: {error:#}"), report);
    }
    Ok(())
}

/// A row without a figure must not look like one whose goals are met.
fn missing(row: &Row, why: &str, report: &mut Report) {
    report.push(Figure {
        name: row.name.to_owned(),
        value: f64::NAN,
        unit: "",
        goal: None,
        better: Better::Lower,
        ok: false,
        conditions: why.to_owned(),
    });
}

fn memory_free() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    // A kernel that does not say so is not taken for a small machine.
    kib.map_or(u64::MAX, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use darter_core::pieces::Layout;
    use darter_tests::image::Layer;

    use super::*;

    #[test]
    fn layers_fill_their_pieces_and_add_up_to_the_payload() {
        for row in ROWS {
            for size_mib in [8, SIZE_MIB, SIZE_MAX_MIB] {
                let sizes: Vec<_> = row.files(size_mib).into_iter().map(|file| Layer::new(1, file).len()).collect();
                assert!(sizes.iter().all(|size| Layout::new(*size).piece_size() == MIB), "{row:?}");
                assert!(sizes.iter().all(|size| size.is_multiple_of(MIB)), "{row:?} {size_mib}");
                assert_eq!(sizes.iter().sum::<u64>(), row.bytes(size_mib), "{row:?}");
                let expected = if row.is_small() { 100 } else { size_mib };
                assert_eq!(row.bytes(size_mib), expected * MIB, "{row:?}");
            }
        }
    }

    #[test]
    fn a_row_that_was_cut_says_so() {
        assert!(ROWS[0].title(32).contains("CUT"));
        assert!(!ROWS[0].title(SIZE_MIB).contains("CUT"));
    }
}
