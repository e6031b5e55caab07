//! What a node's agent said last, with its ages turned into moments of our own clock.

use darter_api::report::{
    CarriedOut, GoingReason, Gpu as ToldGpu, GpuReadiness, GpuState, PrewarmState, Report as Told,
};
use darter_core::Digest;

use super::Refusal;
use super::images::Images;
use crate::Millis;
use crate::state::{Gpu, Held, IMAGES_MAX, Pull, Work};

/// EC2 takes a spot instance back so long after it said so.
const NOTICE_MS: u64 = 120_000;
/// Bytes of a name that an image can be asked for under. Registries allow less.
const NAME_MAX: usize = 512;

/// The newest word of one agent.
#[derive(Debug)]
pub(super) struct Tale {
    pub(super) uid: Option<String>,
    pub(super) zone: Option<String>,
    pub(super) heard: Millis,
    /// The node is at least this old.
    pub(super) since: Millis,
    pub(super) gpus: Vec<ToldOf>,
    pub(super) held: Vec<Held>,
    pub(super) pulls: Vec<Pull>,
    pub(super) notice: Option<Millis>,
    pub(super) leaving: bool,
    pub(super) warm: bool,
    /// Until when its lease holds, by its own word.
    pub(super) protected: Option<Millis>,
    /// Pods that have its GPUs: namespace and name.
    pub(super) owners: Vec<(String, String)>,
}

/// One GPU.
#[derive(Debug, Clone)]
pub(super) struct ToldOf {
    pub(super) name: String,
    pub(super) work: Work,
    pub(super) is_sick: bool,
}

impl Tale {
    /// Reads a report that was checked.
    pub(super) fn read(told: Told, images: &mut Images, now: Millis) -> Result<Self, Refusal> {
        let ago = |ms: u64| Millis(now.0.saturating_sub(ms));
        let since = ago(told.running_ms);
        let (mut held, mut pulls) = (Vec::new(), Vec::new());
        let name = |images: &mut Images, digest: &str, bytes| -> Result<u32, Refusal> {
            let digest: Digest = digest.parse().map_err(|_| Refusal::Nonsense { what: "a digest" })?;
            images.name(digest, bytes).ok_or(Refusal::Full { what: "images", most: IMAGES_MAX })
        };
        let mut named = || -> Result<(), Refusal> {
            for image in told.images.iter().filter(|image| image.is_complete) {
                // What was here before the agent started was not used since.
                let used = image.used_ms.map_or(since, ago);
                let number = name(images, &image.digest, image.size_bytes)?;
                held.push(Held { image: number, used });
                let reference = image.references.iter().find(|name| name.len() <= NAME_MAX);
                images.call(number, || reference.map(|name| by_digest(name, &image.digest)));
            }
            for pull in &told.pulls {
                let total = pull.total_bytes.unwrap_or(pull.done_bytes);
                let bytes_left = total - pull.done_bytes.min(total);
                pulls.push(Pull { image: name(images, &pull.digest, total)?, bytes_left });
            }
            Ok(())
        };
        let outcome = named();
        if let Err(refusal) = outcome {
            for number in held.iter().map(|held| held.image).chain(pulls.iter().map(|pull| pull.image)) {
                images.forget(number);
            }
            return Err(refusal);
        }
        let node = told.node.unwrap_or_default();
        let going = told.going.as_ref().map(|going| (going.reason(), going.since_ms));
        let notice = going.filter(|(reason, _)| *reason == GoingReason::SpotNotice);
        let out = told.carried_out.unwrap_or_default();
        let all = told.gpus.unwrap_or_default();
        let mut gpus: Vec<_> = all.gpus.iter().map(|gpu| gpu_of(gpu, now)).collect();
        let nothing_said = all.gpus_left_out > 0 || all.readiness() == GpuReadiness::Unknown;
        if nothing_said {
            gpus.push(ToldOf { name: String::new(), work: Work::Unread, is_sick: false });
        }
        if all.readiness() == GpuReadiness::NotReady && !gpus.iter().any(|gpu| gpu.is_sick) {
            gpus.push(ToldOf { name: "node".to_owned(), work: Work::Unread, is_sick: true });
        }
        let owners = all.gpus.iter().filter_map(|gpu| gpu.allocation.as_ref()).flat_map(|taken| &taken.owners);
        let mut owners: Vec<_> = owners.map(|owner| (owner.namespace.clone(), owner.pod.clone())).collect();
        owners.sort();
        owners.dedup();
        Ok(Self {
            uid: node.uid.filter(|uid| !uid.is_empty()),
            zone: node.zone,
            heard: now,
            since,
            gpus,
            held,
            pulls,
            notice: notice.map(|(_, since_ms)| ago(since_ms).plus(NOTICE_MS)),
            leaving: going.is_some_and(|(reason, _)| reason == GoingReason::Taint),
            warm: is_warm(&out),
            protected: out.protection.map(|held| now.plus(held.remaining_ms)),
            owners,
        })
    }

    /// Names no image any more.
    pub(super) fn release(&self, images: &mut Images) {
        for number in self.held.iter().map(|held| held.image).chain(self.pulls.iter().map(|pull| pull.image)) {
            images.forget(number);
        }
    }
}

/// Whether all that it was asked to bring is there, or will not come.
fn is_warm(out: &CarriedOut) -> bool {
    !out.prewarm.iter().any(|image| matches!(image.state(), PrewarmState::Waiting | PrewarmState::Coming))
}

fn gpu_of(gpu: &ToldGpu, now: Millis) -> ToldOf {
    let idleness = gpu.idleness.as_ref();
    let work = match idleness.map(|idleness| (idleness.state(), idleness.idle_ms)) {
        // What says that it is idle and not for how long says nothing.
        Some((GpuState::Empty | GpuState::LoadedIdle, Some(ms))) => Work::Until(Millis(now.0.saturating_sub(ms))),
        Some((GpuState::Busy, _)) => Work::Until(now),
        _ => Work::Unread,
    };
    let is_sick = gpu.is_lost || gpu.readiness.is_some() && gpu.readiness() == GpuReadiness::NotReady;
    let name = if gpu.uuid.is_empty() { format!("index {}", gpu.index) } else { gpu.uuid.clone() };
    ToldOf { name, work, is_sick }
}

/// `registry/repository:tag` as the very image that somebody has: a tag may name another one by now.
fn by_digest(reference: &str, digest: &str) -> String {
    let bare = reference.split_once('@').map_or(reference, |(bare, _)| bare);
    let end = bare.rfind(':').filter(|colon| !bare[*colon..].contains('/')).unwrap_or(bare.len());
    format!("{}@{digest}", &bare[..end])
}

impl ToldOf {
    /// As decisions see it.
    pub(super) const fn gpu(&self, sick: Option<Millis>) -> Gpu {
        Gpu { work: self.work, sick }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_asked_for_by_its_digest_whatever_it_was_pulled_under() {
        for name in [
            "r.example:5000/a/b:v1",
            "r.example:5000/a/b",
            "r.example:5000/a/b@sha256:11",
            "r.example:5000/a/b:v1@sha256:11",
        ] {
            assert_eq!(by_digest(name, "sha256:22"), "r.example:5000/a/b@sha256:22", "{name}");
        }
    }
}
