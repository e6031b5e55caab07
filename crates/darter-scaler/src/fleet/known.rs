//! What the user says of pools and workloads, in the configuration or in a trigger's metadata.

use std::collections::BTreeMap;

use crate::state::Floor;

/// A pool of nodes of one kind. What is left out is what Kubernetes says, else nothing is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolConfig {
    /// What the names of its nodes begin with, where Kubernetes does not say whose they are.
    pub nodes: Vec<String>,
    /// Price of one node, in micro-dollars an hour.
    pub micros_per_hour: Option<u64>,
    /// GPUs of one node.
    pub gpus: Option<u32>,
    /// Never fewer nodes, as far as it is us who removes them.
    pub nodes_least: u32,
    /// Never more nodes, as far as it is us who asks.
    pub nodes_most: Option<u32>,
    /// Spare GPUs in any case.
    pub buffer_least: u32,
}

/// How a workload is scaled. What is left out is what the next one says: configuration, the trigger's
/// metadata, Kubernetes, the usual.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// Where its replicas run.
    pub pool: Option<String>,
    /// GPUs of one replica.
    pub gpus: Option<u32>,
    /// Never fewer replicas.
    pub least: Option<u32>,
    /// Never more.
    pub most: Option<u32>,
    /// Backlog that one replica is to have, in thousandths.
    pub target_milli: Option<u64>,
    /// What a cold start costs, in milliseconds of an idle replica.
    pub cold_start_ms: Option<u64>,
    /// How long one takes, at the 95th percentile.
    pub lead_ms: Option<u64>,
    /// Times of the day at which replicas are to be there.
    pub floors: Vec<Floor>,
}

impl WorkloadConfig {
    /// This, and where it says nothing the other.
    pub(super) fn or(&self, other: &Self) -> Self {
        Self {
            pool: self.pool.clone().or_else(|| other.pool.clone()),
            gpus: self.gpus.or(other.gpus),
            least: self.least.or(other.least),
            most: self.most.or(other.most),
            target_milli: self.target_milli.or(other.target_milli),
            cold_start_ms: self.cold_start_ms.or(other.cold_start_ms),
            lead_ms: self.lead_ms.or(other.lead_ms),
            floors: if self.floors.is_empty() { other.floors.clone() } else { self.floors.clone() },
        }
    }

    /// What a trigger's metadata says; a sentence where one of its values is none.
    pub fn of_metadata(metadata: &BTreeMap<String, String>) -> Result<Self, String> {
        let text = |key: &str| metadata.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let count = |key: &str| -> Result<Option<u32>, String> {
            let read = |value: &str| value.parse().map_err(|_| format!("metadata {key}: `{value}` is not a count"));
            text(key).map(read).transpose()
        };
        let ms = |key: &str| -> Result<Option<u64>, String> {
            let read = |value: &str| -> Result<u64, String> {
                let length: darter_core::units::Seconds =
                    value.parse().map_err(|error| format!("metadata {key}: {error}"))?;
                u64::try_from(length.0.as_millis()).map_err(|_| format!("metadata {key}: `{value}` is too long"))
            };
            text(key).map(read).transpose()
        };
        let target = text("target").map(|value| {
            milli(value)
                .ok_or_else(|| format!("metadata target: `{value}` is not a number above nothing, such as 4 or 0.5"))
        });
        Ok(Self {
            pool: text("pool").map(ToOwned::to_owned),
            gpus: count("gpus")?,
            least: count("minReplicas")?,
            most: count("maxReplicas")?,
            target_milli: target.transpose()?,
            cold_start_ms: ms("coldStart")?,
            lead_ms: ms("lead")?,
            floors: Vec::new(),
        })
    }
}

/// Thousandths of a decimal number above nothing, such as `4` or `0.5`.
pub fn milli(text: &str) -> Option<u64> {
    thousandths(text).filter(|milli| *milli > 0)
}

/// Thousandths of a decimal number; further digits are cut.
pub fn thousandths(text: &str) -> Option<u64> {
    let (whole, rest) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(rest) || text.ends_with('.') {
        return None;
    }
    let part: String = rest.chars().chain("000".chars()).take(3).collect();
    whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(part.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_numbers_are_read_without_fractions_and_what_is_none_is_refused() {
        let read = |text| thousandths(text);
        assert_eq!([read("4"), read("0.5"), read("1.2345"), read("0")], [Some(4000), Some(500), Some(1234), Some(0)]);
        for text in ["", "-1", "1e3", "NaN", "inf", ".5", "5.", "1,5", "99999999999999999999"] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(milli("0.0"), None);
    }

    #[test]
    fn metadata_is_read_and_what_makes_no_sense_is_named() {
        let of = |pairs: &[(&str, &str)]| {
            let map = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            WorkloadConfig::of_metadata(&map)
        };
        let read = of(&[("scalerAddress", "x:4010"), ("pool", "l4"), ("target", "2.5"), ("coldStart", "84s")]).unwrap();
        let wanted = WorkloadConfig {
            pool: Some("l4".to_owned()),
            target_milli: Some(2500),
            cold_start_ms: Some(84_000),
            ..WorkloadConfig::default()
        };
        assert_eq!(read, wanted);
        for (key, value) in [("target", "0"), ("target", "NaN"), ("maxReplicas", "-1"), ("lead", "60"), ("gpus", "one")]
        {
            let said = of(&[(key, value)]).unwrap_err();
            assert!(said.contains(key) && said.contains(value), "{said}");
        }
    }
}
