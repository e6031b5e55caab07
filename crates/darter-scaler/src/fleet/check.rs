//! Whether a report can be one: bounds of its lists, ages and sizes that a machine can have, numbers that are
//! numbers.
//!
//! One that cannot be is no report at all. Its node then grows old, and what is not known is kept as it is.

use darter_api::report::{Evidence, Gpu, Image, Pull, Report};
use darter_core::Digest;

use super::Refusal;

/// As proto/darter/v1/report.proto says.
const IMAGES_MAX: usize = 200;
const PULLS_MAX: usize = 64;
const GPUS_MAX: usize = 64;
const REASONS_MAX: usize = 32;
const CHECKS_MAX: usize = 32;
const OWNERS_MAX: usize = 64;
const REFERENCES_MAX: usize = 4;
const PREWARM_MAX: usize = 16;
const EVIDENCE_MAX: usize = 16;
/// Of a name or a sentence. Agents cut theirs at a quarter of it.
const TEXT_MAX: usize = 1024;
/// Nothing that runs has run longer.
const AGE_MAX_MS: u64 = 10 * 365 * 24 * 3_600_000;
/// More than any image, disk or memory has.
const BYTES_MAX: u64 = 1 << 50;

pub(super) fn check(report: &Report) -> Result<(), Refusal> {
    let node = report.node.as_ref().ok_or(Refusal::Nonsense { what: "a node without a name" })?;
    if !is_name(&node.name) {
        return Err(Refusal::Nonsense { what: "the name of the node" });
    }
    let ids = [&node.uid, &node.boot_id, &node.provider_id, &node.zone, &node.pod, &node.namespace];
    text("a name of the node", ids.into_iter().flatten())?;
    if report.instance.is_empty() || report.instance.len() > 64 {
        return Err(Refusal::Nonsense { what: "the name of the agent's life" });
    }
    if report.sequence == 0 {
        return Err(Refusal::Nonsense { what: "the sequence" });
    }
    age("for how long the agent runs", [Some(report.running_ms)])?;
    for image in within("images", &report.images, IMAGES_MAX)? {
        check_image(image)?;
    }
    for pull in within("blobs on their way", &report.pulls, PULLS_MAX)? {
        check_pull(pull)?;
    }
    if let Some(readiness) = &report.readiness {
        let checks = within("checks", &readiness.checks, CHECKS_MAX)?;
        text("a check", checks.iter().flat_map(|check| [&check.check, &check.reason]))?;
    }
    if let Some(gpus) = &report.gpus {
        let reasons = within("reasons of GPUs", &gpus.reasons, REASONS_MAX)?;
        text("a reason of GPUs", reasons.iter().flat_map(|reason| [&reason.reason, &reason.detail]))?;
        age("of the verdict on GPUs", [gpus.hung_ms, gpus.judged_ms])?;
        for gpu in within("GPUs", &gpus.gpus, GPUS_MAX)? {
            check_gpu(gpu)?;
        }
    }
    if let Some(store) = &report.store {
        size("of the store", [store.used_bytes, store.limit_bytes, store.pinned_bytes])?;
    }
    age("of going", [report.going.as_ref().map(|going| going.since_ms)])?;
    if let Some(out) = &report.carried_out {
        within("images that were ordered", &out.prewarm, PREWARM_MAX)?;
        age("of the protection", out.protection.iter().flat_map(|held| [Some(held.remaining_ms), Some(held.most_ms)]))?;
    }
    Ok(())
}

/// As Kubernetes allows one.
fn is_name(name: &str) -> bool {
    (1..=253).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

fn check_image(image: &Image) -> Result<(), Refusal> {
    if image.digest.parse::<Digest>().is_err() {
        return Err(Refusal::Nonsense { what: "the digest of an image" });
    }
    text("a name of an image", within("names of an image", &image.references, REFERENCES_MAX)?)?;
    size("of an image", [image.size_bytes, image.held_bytes])?;
    if image.held_bytes > image.size_bytes {
        return Err(Refusal::Nonsense { what: "an image of which more is there than it has" });
    }
    age("of an image", [image.used_ms])
}

fn check_pull(pull: &Pull) -> Result<(), Refusal> {
    if pull.digest.parse::<Digest>().is_err() {
        return Err(Refusal::Nonsense { what: "the digest of a blob" });
    }
    size("of a blob", [pull.done_bytes, pull.total_bytes.unwrap_or(0)])?;
    match pull.total_bytes.is_some_and(|total| total < pull.done_bytes) {
        true => Err(Refusal::Nonsense { what: "a blob of which more came than it has" }),
        false => Ok(()),
    }
}

fn check_gpu(gpu: &Gpu) -> Result<(), Refusal> {
    text("a name of a GPU", [Some(&gpu.uuid), gpu.name.as_ref()].into_iter().flatten())?;
    size("of a GPU's memory", [gpu.memory_total_bytes.unwrap_or(0), gpu.memory_used_bytes.unwrap_or(0)])?;
    age("of a reading of a GPU", [gpu.sample_ms])?;
    if let Some(allocation) = &gpu.allocation {
        let owners = within("owners of a GPU", &allocation.owners, OWNERS_MAX)?;
        text("an owner of a GPU", owners.iter().flat_map(|owner| [&owner.namespace, &owner.pod, &owner.container]))?;
    }
    let Some(idleness) = &gpu.idleness else { return Ok(()) };
    age("of what a GPU does", [Some(idleness.since_ms), idleness.idle_ms])?;
    if idleness.busy_ratio.is_some_and(|ratio| !(0.0..=1.0).contains(&ratio)) {
        return Err(Refusal::Nonsense { what: "the share of time in which a GPU worked" });
    }
    for Evidence { witness, value, limit, age_ms, .. } in within("witnesses", &idleness.evidence, EVIDENCE_MAX)? {
        text("a witness", [witness])?;
        age("of a witness", [*age_ms])?;
        if [value, limit].into_iter().flatten().any(|number| !number.is_finite()) {
            return Err(Refusal::Nonsense { what: "a number of a witness" });
        }
    }
    Ok(())
}

fn within<'a, T>(what: &'static str, list: &'a [T], most: usize) -> Result<&'a [T], Refusal> {
    if list.len() <= most { Ok(list) } else { Err(Refusal::TooMany { what, found: list.len(), most }) }
}

fn text<'a>(what: &'static str, texts: impl IntoIterator<Item = &'a String>) -> Result<(), Refusal> {
    let longest = texts.into_iter().map(String::len).max().unwrap_or(0);
    if longest <= TEXT_MAX { Ok(()) } else { Err(Refusal::TooMany { what, found: longest, most: TEXT_MAX }) }
}

fn age(what: &'static str, ages: impl IntoIterator<Item = Option<u64>>) -> Result<(), Refusal> {
    match ages.into_iter().flatten().any(|age| age > AGE_MAX_MS) {
        true => Err(Refusal::Nonsense { what }),
        false => Ok(()),
    }
}

fn size(what: &'static str, sizes: impl IntoIterator<Item = u64>) -> Result<(), Refusal> {
    match sizes.into_iter().any(|bytes| bytes > BYTES_MAX) {
        true => Err(Refusal::Nonsense { what }),
        false => Ok(()),
    }
}
