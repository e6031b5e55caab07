//! A row as the simulator plays it: the very same decisions on links of the rate that was measured here, without
//! TCP, TLS, hashes and disks. What the figures of 10,000 nodes are worth is how near the two come.

use anyhow::{Result, ensure};
use darter_core::simulate::{Scenario, run};

use super::{Case, Row};
use crate::median;

/// Runs with lots of their own: one of them alone may be a lucky one.
const SEEDS: u64 = 5;

impl Row {
    /// What is played for it, on links that carry so many bytes a second. None where containerd, a slow connection,
    /// a kill at a moment of its own or the order of several layers is in it: that is the agent's.
    pub(super) fn scenario(&self, size_mib: u64, carried: f64) -> Option<Scenario> {
        let nodes = u32::try_from(self.nodes).ok()?;
        let size = self.bytes(size_mib);
        let scenario = match self.case {
            _ if self.layers > 1 => return None,
            Case::Cold | Case::Plain => Scenario::cold(nodes, size, u32::try_from(self.share).ok()?),
            Case::Warm => {
                let holders = u32::try_from(self.holders).ok()?;
                Scenario::warm(nodes - holders, holders, size)
            }
            Case::SlowOrigin
            | Case::SmallLayers
            | Case::WarmLayers
            | Case::HolderKilled
            | Case::ImporterKilled
            | Case::CoordinatorKilled => return None,
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of a link")]
        let rate = carried as u64;
        let mut scenario = Scenario { uplink: rate, downlink: rate, ..scenario };
        scenario.origin.rate = rate * self.share;
        scenario.origin.connection_rate = scenario.origin.rate;
        Some(scenario)
    }
}

/// When the last node had all of it, in seconds: the middle one of several runs.
pub(super) fn last(scenario: &Scenario) -> Result<f64> {
    let times = (1..=SEEDS).map(|seed| {
        let outcome = run(&Scenario { seed, ..scenario.clone() });
        ensure!(outcome.is_complete(), "a node never got it in the simulator, seed {seed}");
        Ok(outcome.last)
    });
    Ok(median(times.collect::<Result<_>>()?))
}

#[cfg(test)]
mod tests {
    use darter_core::simulate::Bound;

    use super::super::ROWS;
    use super::*;

    #[test]
    fn what_is_played_has_the_nodes_links_and_bytes_of_the_row() {
        for row in ROWS {
            let Some(scenario) = row.scenario(256, 25_000_000.0) else { continue };
            assert_eq!(scenario.nodes + scenario.holders, u32::try_from(row.nodes).unwrap(), "{row:?}");
            assert_eq!(scenario.layout.size(), row.bytes(256), "{row:?}");
            let (last, bound) = (last(&scenario).unwrap(), Bound::of(&scenario).seconds());
            assert!(last >= bound && last < 1.1 * bound, "{row:?}: {last} against {bound}");
        }
    }
}
