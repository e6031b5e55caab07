//! What one node says of itself when it is asked how it is: `GET /v1/status`, and `darter status` that reads it.
//!
//! The words of `/readyz` with the numbers behind them. Nothing here names an image, a peer or a credential.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use crate::gpu::{idle, readiness};
use crate::ready;
use crate::startup::Part;

/// All that is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The node, by Kubernetes' name where the agent was told it, else the host's.
    pub node: String,
    /// The agent's version.
    pub version: String,
    /// As `/readyz`: false if a check failed.
    pub ready: bool,
    /// In the order in which they were made.
    pub checks: Vec<Check>,
    /// What containerd asks.
    pub mirror: Mirror,
    /// Blobs on this node's disk.
    pub store: Store,
    /// The other agents; none without a swarm key.
    pub swarm: Option<Swarm>,
    /// In the order of the configuration; empty before they were first looked at.
    pub registries: Vec<Registry>,
    /// The GPUs.
    pub gpus: Gpus,
    /// What the API server has of the node; none where it is not asked (`kubernetes.node`).
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// Whether the scaler hears this node; none without a scaler.
    #[serde(default)]
    pub report: Option<Report>,
}

/// The node as Kubernetes has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kubernetes {
    /// The API server was heard, and has such a node.
    pub is_known: bool,
    /// The node's condition `darter.dev/GpuReady`, if it has one.
    pub gpu_ready: Option<Condition>,
    /// How its startup taint stands.
    pub startup_taint: StartupTaint,
}

/// A condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word.
    pub reason: String,
}

/// A startup taint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum StartupTaint {
    /// Nobody looks, or nobody knows yet.
    Unknown,
    /// There is none.
    Absent,
    /// It is there.
    Stays {
        /// What is missing.
        waits_for: Vec<Part>,
        /// The deadline is over.
        is_late: bool,
        /// The node's age.
        age_seconds: u64,
        /// When all but GPUs is not waited for any longer.
        deadline_seconds: u64,
    },
    /// This agent removed it.
    Removed {
        /// The node's age then.
        after_seconds: u64,
        /// What was missing all the same.
        failed_open: Vec<Part>,
    },
}

/// What is told the scaler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Where it listens.
    pub scaler: String,
    /// For how long it has been connected; none while it is not.
    pub connected_seconds: Option<u64>,
    /// Age of the last report that it took.
    pub accepted_seconds: Option<u64>,
    /// Why the last connection did not come about or ended; none once a report was taken since.
    pub error: Option<String>,
}

/// One check of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// A short fixed word.
    pub check: String,
    /// How it stands.
    pub state: ready::State,
    /// Why, for people.
    pub reason: String,
    /// What to do about it, where the reason does not say it.
    pub advice: Option<String>,
}

/// The mirror.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Where it listens.
    pub address: String,
    /// Age of containerd's last request; none since the start.
    pub containerd_seen_seconds: Option<u64>,
}

/// The store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Store {
    /// Disk used by blobs and ingests.
    pub bytes: u64,
    /// Disk that they may use now.
    pub limit_bytes: u64,
    /// Disk used by blobs that eviction spares.
    pub pinned_bytes: u64,
    /// Complete blobs.
    pub blobs: u64,
    /// Blobs that are not whole yet.
    pub ingests: u64,
}

/// The swarm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swarm {
    /// Other members.
    pub members: u64,
    /// Connections, those included that have not said hello.
    pub connections: u64,
    /// Addresses of others that are known.
    pub addresses: u64,
}

/// One registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// Its name.
    pub registry: String,
    /// The word of `darter_hosts_toml{state}`.
    pub hosts_toml: String,
    /// How its hosts.toml stands.
    pub state: ready::State,
    /// Why, for people; may have several lines.
    pub reason: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// The GPUs of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpus {
    /// Whether they can be given work; nothing before the first look, and where nobody looks.
    pub state: Option<readiness::State>,
    /// In the order of the checks, with those that are worth a word only.
    pub reasons: Vec<Reason>,
    /// Errors that the driver reported and that stand.
    pub xids: Vec<Xid>,
    /// Such as `590.48.01`.
    pub driver_version: Option<String>,
    /// The newest that the driver knows, such as `13.1`.
    pub cuda_version: Option<String>,
    /// The call into the driver that does not come back.
    pub hung: Option<Hung>,
    /// In the order of their indices.
    pub gpus: Vec<Gpu>,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Such as `GpuLost` or `FatalXid(79)`.
    pub reason: String,
    /// What the node's GPUs are because of it, were it alone.
    pub state: readiness::State,
    /// By uuid, or by PCI address where no uuid is known. Empty: it is the node's.
    pub gpus: Vec<String>,
    /// Numbers, for people; may be empty.
    pub detail: String,
    /// What to do about it.
    pub advice: String,
}

/// One error code that stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xid {
    /// The code.
    pub xid: u32,
    /// Whether the GPUs must not get work because of it.
    pub is_fatal: bool,
    /// As in [`Reason`].
    pub gpus: Vec<String>,
}

/// A call that hangs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hung {
    /// Which.
    pub call: String,
    /// For how long.
    pub seconds: u64,
}

/// One GPU. `None` is what it does not say, or has not said lately: never a zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// NVML's index.
    pub index: u32,
    /// `GPU-…`; empty if it was lost before it was known.
    pub uuid: String,
    /// Such as `NVIDIA H200`.
    pub name: Option<String>,
    /// Such as `00000000:53:00.0`.
    pub pci_bus_id: Option<String>,
    /// It is cut into MIG instances.
    pub is_mig: bool,
    /// It does not answer any more.
    pub is_lost: bool,
    /// What it does; nothing before the first look.
    pub state: Option<idle::State>,
    /// For how long it has done nothing.
    pub idle_seconds: Option<u64>,
    /// Allocated by processes.
    pub memory_used_bytes: Option<u64>,
    /// All of it.
    pub memory_total_bytes: Option<u64>,
    /// Of the last sample period, in which a kernel was resident.
    pub utilization_percent: Option<u32>,
    /// What it takes.
    pub power_milliwatts: Option<u32>,
    /// What it may take.
    pub power_limit_milliwatts: Option<u32>,
    /// Of the chip.
    pub temperature_celsius: Option<u32>,
}

/// One thing that is not well, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is not: the word of a check, a file or a GPU.
    pub what: String,
    /// Degraded or failed, as its check.
    pub state: ready::State,
    /// Why.
    pub reason: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl From<&ready::Check> for Check {
    fn from(check: &ready::Check) -> Self {
        let ready::Check { check, state, reason, advice } = check;
        Self { check: (*check).to_owned(), state: *state, reason: reason.clone(), advice: advice.clone() }
    }
}

impl Status {
    /// All that is not well, the worst first. Where a check is about several files or GPUs, each by itself.
    pub fn problems(&self) -> Vec<Problem> {
        let mut unwell: Vec<_> = self.checks.iter().filter(|check| check.state != ready::State::Ok).collect();
        // GPUs that must not get work are why people come; containerd gets around what else is degraded.
        let is_idled = self.gpus.state > Some(readiness::State::Degraded);
        unwell.sort_by_key(|check| !(is_idled && check.check == "gpu"));
        let mut problems: Vec<_> = unwell.into_iter().flat_map(|check| self.of(check)).collect();
        problems.sort_by_key(|problem| Reverse(problem.state));
        problems
    }

    fn of(&self, check: &Check) -> Vec<Problem> {
        let parts = match check.check.as_str() {
            "hosts_toml" => self.registries.iter().filter_map(Registry::problem).collect(),
            "gpu" => self.gpus.problems(check.state),
            _ => Vec::new(),
        };
        if !parts.is_empty() {
            return parts;
        }
        let Check { check, state, reason, advice } = check.clone();
        vec![Problem { what: check, state, reason, advice }]
    }
}

impl Registry {
    fn problem(&self) -> Option<Problem> {
        let Self { registry, state, reason, advice, .. } = self.clone();
        let what = format!("hosts.toml of {registry}");
        (state != ready::State::Ok).then_some(Problem { what, state, reason, advice })
    }
}

impl Gpus {
    /// Those that make the GPUs what they are come first. How the check stands is not the GPUs' to say.
    fn problems(&self, check: ready::State) -> Vec<Problem> {
        let mut reasons: Vec<_> = self.reasons.iter().filter(|found| found.state > readiness::State::Ready).collect();
        reasons.sort_by_key(|found| Reverse(found.state));
        let problem = |found: &&Reason| {
            let detail = if found.detail.is_empty() { String::new() } else { format!(": {}", found.detail) };
            let reason = format!("{}: {}{detail}", found.state.as_str(), found.reason);
            Problem { what: self.called(&found.gpus), state: check, reason, advice: Some(found.advice.clone()) }
        };
        reasons.iter().map(problem).collect()
    }

    /// GPUs as people call them: by index, where it is known.
    pub fn called(&self, names: &[String]) -> String {
        let called = |name: &String| {
            let known = self.gpus.iter().find(|gpu| gpu.uuid == *name && !name.is_empty());
            known.map_or_else(|| name.clone(), |gpu| gpu.index.to_string())
        };
        match names {
            [] => "GPUs".to_owned(),
            [name] => format!("GPU {}", called(name)),
            names => format!("GPUs {}", names.iter().map(called).collect::<Vec<_>>().join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(check: &str, state: ready::State) -> Check {
        Check { check: check.to_owned(), state, reason: "as it is".to_owned(), advice: None }
    }

    fn gpu(index: u32, uuid: &str) -> Gpu {
        Gpu {
            index,
            uuid: uuid.to_owned(),
            name: None,
            pci_bus_id: None,
            is_mig: false,
            is_lost: false,
            state: None,
            idle_seconds: None,
            memory_used_bytes: None,
            memory_total_bytes: None,
            utilization_percent: None,
            power_milliwatts: None,
            power_limit_milliwatts: None,
            temperature_celsius: None,
        }
    }

    fn reason(reason: &str, state: readiness::State, gpus: &[&str]) -> Reason {
        let gpus = gpus.iter().map(|gpu| (*gpu).to_owned()).collect();
        Reason { reason: reason.to_owned(), state, gpus, detail: String::new(), advice: "do".to_owned() }
    }

    fn registry(name: &str, state: ready::State) -> Registry {
        let (hosts_toml, reason) = ("a word".to_owned(), "so it is".to_owned());
        Registry { registry: name.to_owned(), hosts_toml, state, reason, advice: Some("write".to_owned()) }
    }

    #[test]
    fn problems_are_told_one_by_one_and_the_worst_first() {
        let status = Status {
            node: "n".to_owned(),
            version: "1".to_owned(),
            ready: false,
            checks: vec![
                check("mirror", ready::State::Ok),
                check("store", ready::State::Degraded),
                check("hosts_toml", ready::State::Failed),
                check("gpu", ready::State::Degraded),
            ],
            mirror: Mirror { address: String::new(), containerd_seen_seconds: None },
            store: Store { bytes: 0, limit_bytes: 0, pinned_bytes: 0, blobs: 0, ingests: 0 },
            swarm: None,
            registries: vec![registry("a.example", ready::State::Ok), registry("b.example", ready::State::Failed)],
            gpus: Gpus {
                state: Some(readiness::State::NotReady),
                reasons: vec![
                    reason("GfdLabelsMissing", readiness::State::Ready, &[]),
                    reason("RowRemapPending", readiness::State::Degraded, &["GPU-b"]),
                    reason("GpuLost", readiness::State::NotReady, &["GPU-a", "0000:53:00.0"]),
                ],
                xids: Vec::new(),
                driver_version: None,
                cuda_version: None,
                hung: None,
                gpus: vec![gpu(0, "GPU-b"), gpu(3, "GPU-a")],
            },
            kubernetes: None,
            report: None,
        };
        let told = |problem: &Problem| {
            let Problem { what, state, reason, advice } = problem;
            format!("{state:?} {what}: {reason} ({})", advice.as_deref().unwrap_or_default())
        };
        let told: Vec<_> = status.problems().iter().map(told).collect();
        assert_eq!(
            told,
            [
                "Failed hosts.toml of b.example: so it is (write)",
                "Degraded GPUs 3, 0000:53:00.0: NotReady: GpuLost (do)",
                "Degraded GPU 0: Degraded: RowRemapPending (do)",
                "Degraded store: as it is ()",
            ]
        );
        let mut mild = status.clone();
        mild.gpus.state = Some(readiness::State::Degraded);
        mild.gpus.reasons.pop();
        let what: Vec<_> = mild.problems().into_iter().map(|problem| problem.what).collect();
        assert_eq!(what, ["hosts.toml of b.example", "store", "GPU 0"]);
        let read: Status = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
        assert_eq!(read, status);
    }
}
