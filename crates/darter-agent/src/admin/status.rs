//! `GET /v1/status`: how this node is, in one object. Read only, and asks nobody: what is known is told.

use darter_core::gpu::idle;
use darter_core::gpu::readiness::{Finding, Reason, State};
use darter_core::ready::Readiness;
use darter_core::status;

use super::{Watched, advice};
use crate::certs_d::HostsState;
use crate::gpu::{Driver, Fast, Gpu, Judgement, Now, Slow, View};
use crate::store;

impl Watched {
    /// All that is known, with the checks that were just made.
    pub(super) fn status(&self, readiness: &Readiness) -> status::Status {
        let store::Usage { bytes, limit_bytes, pinned_bytes, blobs, ingests } = self.store.usage();
        let hosts = self.hosts.borrow();
        status::Status {
            node: self.about.node.clone(),
            version: self.about.version.clone(),
            ready: readiness.ready,
            checks: readiness.checks.iter().map(status::Check::from).collect(),
            mirror: status::Mirror {
                address: self.about.mirror.to_string(),
                containerd_seen_seconds: self.seen.age().map(|age| age.as_secs()),
            },
            store: status::Store { bytes, limit_bytes, pinned_bytes, blobs: count(blobs), ingests: count(ingests) },
            swarm: self.swarm.as_ref().map(|standing| {
                let standing = standing.borrow();
                status::Swarm {
                    members: count(standing.peers),
                    connections: count(standing.connections),
                    addresses: count(standing.addresses),
                }
            }),
            registries: hosts.iter().map(|(registry, state)| of_registry(registry.as_str(), state)).collect(),
            gpus: of_gpus(&self.gpus),
            kubernetes: self.node.status(),
            report: self.report.as_ref().map(|report| report.borrow().status()),
        }
    }
}

fn count(things: usize) -> u64 {
    u64::try_from(things).unwrap_or(u64::MAX)
}

fn of_registry(registry: &str, state: &HostsState) -> status::Registry {
    status::Registry {
        registry: registry.to_owned(),
        hosts_toml: state.label().to_owned(),
        state: state.check(),
        reason: state.to_string(),
        advice: advice::hosts(state).map(ToOwned::to_owned),
    }
}

fn of_gpus(view: &View) -> status::Gpus {
    let (now, judgement) = (view.now(), view.judgement());
    let judgement = judgement.as_deref();
    let findings = judgement.map(|judgement| &*judgement.verdict.reasons).unwrap_or_default();
    let versions = match &now.snapshot.driver {
        Driver::Running(versions) => Some(versions),
        _ => None,
    };
    status::Gpus {
        state: judgement.map(|judgement| judgement.verdict.state),
        reasons: findings.iter().map(of_finding).collect(),
        xids: findings.iter().filter_map(of_xid).collect(),
        driver_version: versions.and_then(|versions| versions.driver.clone()),
        cuda_version: versions.and_then(|versions| versions.cuda).map(|(major, minor)| format!("{major}.{minor}")),
        hung: now.hung.map(|(call, since)| status::Hung { call: call.to_owned(), seconds: since.as_secs() }),
        gpus: now.snapshot.gpus.iter().map(|gpu| of_gpu(gpu, &now, view, judgement)).collect(),
    }
}

fn of_finding(finding: &Finding) -> status::Reason {
    status::Reason {
        reason: finding.reason.to_string(),
        state: finding.state,
        gpus: finding.gpus.clone(),
        detail: finding.detail.clone(),
        advice: finding.reason.advice(),
    }
}

fn of_xid(finding: &Finding) -> Option<status::Xid> {
    let (xid, is_fatal) = match finding.reason {
        Reason::FatalXid(xid) => (xid, true),
        Reason::DegradedXid(xid) => (xid, false),
        _ => return None,
    };
    Some(status::Xid { xid, is_fatal, gpus: finding.gpus.clone() })
}

/// What is older than three rounds is not told: a number that stands still looks like one that is right.
fn of_gpu(gpu: &Gpu, now: &Now, view: &View, judgement: Option<&Judgement>) -> status::Gpu {
    let (fast, slow) = view.patience();
    let (fast, slow): (Option<&Fast>, Option<&Slow>) = (now.young(&gpu.fast, fast), now.young(&gpu.slow, slow));
    let idleness = judgement.and_then(|judgement| judgement.idleness.get(&gpu.identity.uuid));
    let idles = idleness.filter(|idleness| idleness.idle_since.is_some());
    let seconds = judgement.zip(idles).map(|(judgement, idleness)| judgement.idle_seconds(idleness));
    status::Gpu {
        index: gpu.identity.index,
        uuid: gpu.identity.uuid.clone(),
        name: gpu.identity.name.clone(),
        pci_bus_id: gpu.identity.pci_bus_id.clone(),
        is_mig: gpu.is_mig(),
        is_lost: gpu.is_lost,
        // One that does not answer does nothing that anybody knows of.
        state: if gpu.is_lost { Some(idle::State::Unknown) } else { idleness.map(|idleness| idleness.state) },
        idle_seconds: seconds.filter(|_| !gpu.is_lost).map(whole),
        memory_used_bytes: fast.and_then(|fast| fast.memory).map(|memory| memory.used),
        memory_total_bytes: fast.and_then(|fast| fast.memory).map(|memory| memory.total),
        utilization_percent: fast.and_then(|fast| fast.utilization).map(|(percent, _)| percent),
        power_milliwatts: fast.and_then(|fast| fast.power),
        power_limit_milliwatts: slow.and_then(|slow| slow.power_limit),
        temperature_celsius: fast.and_then(|fast| fast.temperature),
    }
}

/// Whole seconds.
fn whole(seconds: f64) -> u64 {
    std::time::Duration::try_from_secs_f64(seconds).map_or(0, |time| time.as_secs())
}

/// What to do about what the GPUs are, for the check of `/readyz`, which names the first reason.
pub(super) fn of_first(judgement: &Judgement) -> Option<String> {
    let is_well = matches!(judgement.verdict.state, State::NotApplicable | State::Ready);
    judgement.verdict.first().filter(|_| !is_well).map(|finding| finding.reason.advice())
}
