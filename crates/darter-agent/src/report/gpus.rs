//! The GPUs of a report. What is too old to be shown is not told either.

use darter_api::report::{Allocation, Evidence, Gpu, GpuReadiness, GpuReason, GpuState, Gpus, Idleness, Owner, Says};
use darter_core::gpu::idle::{self, Witness};
use darter_core::gpu::readiness::{Finding, State};

use super::{clip, ms};
use crate::gpu::{self, Driver, Judgement, Now, Pods, View};

/// A node has 16 at most, and of MIG instances none is told.
const GPUS_MAX: usize = 64;
/// There are some twenty, and one for each XID.
const REASONS_MAX: usize = 32;
/// Of one reason: as many as GPUs.
const NAMES_MAX: usize = GPUS_MAX;
/// Of one GPU that is shared by time.
const OWNERS_MAX: usize = 64;

/// What is known now.
pub(super) fn gpus(view: &View) -> Gpus {
    let (now, judgement, pods) = (view.now(), view.judgement(), view.pods());
    let judgement = judgement.as_deref();
    let findings = judgement.map(|judgement| &*judgement.verdict.reasons).unwrap_or_default();
    let known = &now.snapshot.gpus;
    let is_read = !matches!(now.snapshot.driver, Driver::Off | Driver::Starting);
    Gpus {
        readiness: judgement.map(|judgement| readiness(judgement.verdict.state)).filter(|_| is_read).map(Into::into),
        reasons: findings.iter().take(REASONS_MAX).map(reason).collect(),
        gpus: known.iter().take(GPUS_MAX).map(|gpu| of(gpu, &now, view, judgement, pods.as_deref())).collect(),
        gpus_left_out: u32::try_from(known.len().saturating_sub(GPUS_MAX)).unwrap_or(u32::MAX),
        hung_ms: now.hung.map(|(_, since)| ms(since)),
        judged_ms: judgement.map(|judgement| ms(judgement.made.elapsed())),
    }
}

fn of(gpu: &gpu::Gpu, now: &Now, view: &View, judgement: Option<&Judgement>, pods: Option<&Pods>) -> Gpu {
    let (patience, _) = view.patience();
    let fast = now.young(&gpu.fast, patience);
    let gpu::Identity { index, uuid, name, .. } = &gpu.identity;
    let memory = fast.and_then(|fast| fast.memory);
    let told = judgement.and_then(|judgement| Some((judgement, judgement.idleness.get(uuid)?)));
    Gpu {
        uuid: uuid.clone(),
        index: *index,
        name: name.as_deref().map(clip),
        is_mig: gpu.is_mig(),
        is_lost: gpu.is_lost,
        memory_total_bytes: memory.map(|memory| memory.total),
        memory_used_bytes: memory.map(|memory| memory.used),
        power_milliwatts: fast.and_then(|fast| fast.power),
        sample_ms: gpu.fast.as_ref().filter(|_| fast.is_some()).map(|(at, _)| ms(at.elapsed())),
        idleness: match (gpu.is_lost, told) {
            // One that does not answer does nothing that anybody knows of.
            (true, _) => Some(Idleness { state: GpuState::Unknown.into(), ..Idleness::default() }),
            (false, Some((judgement, idleness))) => Some(idleness_of(judgement, idleness)),
            (false, None) => None,
        },
        // A part that was given out, of which nobody says whose it is, may be one of this GPU's.
        allocation: pods
            .filter(|pods| pods.has(gpu, &now.snapshot.gpus).is_some())
            .map(|pods| Allocation { owners: pods.of(gpu).take(OWNERS_MAX).map(owner).collect() }),
        readiness: judgement.map(|judgement| readiness(judgement.verdict.of_gpu(uuid)).into()),
    }
}

fn owner(allocation: &gpu::Allocation) -> Owner {
    Owner {
        namespace: clip(&allocation.namespace),
        pod: clip(&allocation.pod),
        container: clip(&allocation.container),
        resource: clip(&allocation.resource),
    }
}

fn idleness_of(judgement: &Judgement, idleness: &idle::Idleness) -> Idleness {
    let state = match idleness.state {
        idle::State::Empty => GpuState::Empty,
        idle::State::LoadedIdle => GpuState::LoadedIdle,
        idle::State::Busy => GpuState::Busy,
        idle::State::Unknown => GpuState::Unknown,
    };
    Idleness {
        state: state.into(),
        since_ms: ms(judgement.ago(idleness.since)),
        idle_ms: idleness.idle_since.map(|since| ms(judgement.ago(since))),
        busy_ratio: idleness.busy_ratio,
        evidence: idleness.evidence.iter().map(|evidence| of_witness(judgement, evidence)).collect(),
    }
}

fn of_witness(judgement: &Judgement, evidence: &idle::Evidence) -> Evidence {
    let witness = match evidence.witness {
        Witness::Activity => "activity",
        Witness::IdleBit => "idle_bit",
        Witness::Power => "power",
        Witness::Pcie => "pcie",
        Witness::Memory => "memory",
        Witness::Processes => "processes",
        Witness::Allocation => "allocation",
    };
    let says = match evidence.says {
        idle::Says::Idle => Says::Idle,
        idle::Says::Busy => Says::Busy,
        idle::Says::Nothing => Says::Nothing,
    };
    Evidence {
        witness: witness.to_owned(),
        says: says.into(),
        value: evidence.value,
        limit: evidence.limit,
        // It was that old when it was judged.
        age_ms: evidence.age.map(|age| ms(age + judgement.made.elapsed())),
    }
}

fn reason(finding: &Finding) -> GpuReason {
    GpuReason {
        reason: finding.reason.to_string(),
        state: readiness(finding.state).into(),
        gpus: finding.gpus.iter().take(NAMES_MAX).map(|gpu| clip(gpu)).collect(),
        detail: clip(&finding.detail),
    }
}

const fn readiness(state: State) -> GpuReadiness {
    match state {
        State::NotApplicable => GpuReadiness::NotApplicable,
        State::Ready => GpuReadiness::Ready,
        State::Degraded => GpuReadiness::Degraded,
        State::Unknown => GpuReadiness::Unknown,
        State::NotReady => GpuReadiness::NotReady,
    }
}
