//! The series of one GPU against those of a fixture.

use std::collections::BTreeMap;

/// Values that every GPU of one name has, whatever it does. Others are compared by whether they are there.
const FIXED: [&str; 2] = ["darter_gpu_memory_total_bytes", "darter_gpu_power_limit_watts"];
/// Labels that differ from one GPU of a name to the next.
const OWN: [&str; 9] =
    ["uuid", "gpu", "pci_bus_id", "minor", "serial", "vbios", "driver_version", "cuda_version", "mig_uuid"];

/// Values by series, without what names the very GPU.
pub(crate) type Series = BTreeMap<String, String>;

/// One line of the table.
#[derive(Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) key: String,
    pub(crate) real: Option<String>,
    pub(crate) expected: Option<String>,
    pub(crate) verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Same,
    /// Another value, as it may have.
    Other,
    /// Another value that it should not have.
    Wrong,
    /// The fixture says it, the GPU does not.
    Missing,
    /// The GPU says it, the fixture does not.
    Besides,
}

impl Verdict {
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Other => "there",
            Self::Wrong => "WRONG",
            Self::Missing => "MISSING",
            Self::Besides => "BESIDES",
        }
    }
}

/// The series of a scrape that are about one GPU.
pub(crate) fn split(page: &str, uuid: Option<&str>) -> Series {
    let is_own = |line: &&str| uuid.is_none_or(|uuid| line.contains(&format!("{{uuid=\"{uuid}\"")));
    let lines = page.lines().filter(|line| line.starts_with("darter_gpu_")).filter(is_own);
    let series = lines.filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = series.split_once('{')?;
        let labels = labels.trim_end_matches('}').split("\",").map(|label| label.trim_end_matches('"'));
        let kept: Vec<_> = labels
            .filter(|label| !OWN.contains(&label.split('=').next().unwrap_or_default()))
            .map(|label| label.replacen("=\"", "=", 1))
            .collect();
        Some((format!("{name}{{{}}}", kept.join(",")), value.to_owned()))
    });
    series.collect()
}

/// All of both, by name. For how long a GPU does nothing is nobody's to expect.
pub(crate) fn compare(real: &Series, expected: &Series) -> Vec<Row> {
    let keys = real.keys().chain(expected.keys().filter(|key| !real.contains_key(*key)));
    let mut keys: Vec<_> = keys.filter(|key| !key.starts_with("darter_gpu_idle_seconds")).collect();
    keys.sort();
    let row = |key: &String| {
        let (real, expected) = (real.get(key), expected.get(key));
        let verdict = match (real, expected) {
            (Some(real), Some(expected)) if real == expected => Verdict::Same,
            (Some(_), Some(_)) if FIXED.iter().any(|fixed| key.starts_with(fixed)) => Verdict::Wrong,
            (Some(_), Some(_)) => Verdict::Other,
            (None, _) => Verdict::Missing,
            (_, None) => Verdict::Besides,
        };
        Row { key: key.clone(), real: real.cloned(), expected: expected.cloned(), verdict }
    };
    keys.into_iter().map(row).collect()
}
