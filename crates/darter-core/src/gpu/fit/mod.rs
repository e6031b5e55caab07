//! Which GPUs a model fits, with the numbers, before a node is paid for.
//!
//! Per GPU: usable = (total - reserved) x utilization - overhead. Weights and KV cache are divided by the
//! number of GPUs (tensor parallelism); the overhead is not.

mod gpus;
mod model;
mod selector;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use gpus::{GPUS, Gpu, Instance, gpus_of, instances, instances_with, named};
pub use model::{Dtype, Kv, Model, PRESETS, Preset};
pub use selector::{Selector, Term, select};

/// Numbers of GPUs that are tried. Heads are dealt out evenly, so that others than powers of two are rare.
pub const COUNTS: [u32; 4] = [1, 2, 4, 8];

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Demand {
    /// The model.
    pub model: Model,
    /// Tokens of one sequence. Without it a tenth of what is usable has to be left for the KV cache.
    pub context: Option<u64>,
    /// Sequences at a time.
    pub batch: u64,
    /// vLLM's `gpu_memory_utilization`; its default is 0.9.
    pub utilization: f64,
    /// What each GPU needs besides, in MiB: 0.3 to 0.6 GiB of CUDA context, and 1 GiB of activations and graphs.
    pub overhead_mib: f64,
}

impl Demand {
    /// vLLM's defaults, and no word on the KV cache.
    pub const fn of(model: Model) -> Self {
        Self { model, context: None, batch: 1, utilization: 0.9, overhead_mib: 1536.0 }
    }

    /// What a GPU has for weights and KV cache, in MiB.
    pub fn usable_mib(&self, gpu: &Gpu) -> f64 {
        free_mib(gpu) * self.utilization - self.overhead_mib
    }
}

/// What a program can get of a GPU at most, in MiB.
pub fn free_mib(gpu: &Gpu) -> f64 {
    f64::from(gpu.total_mib - gpu.reserved_mib)
}

/// The share of `usable` that is left for the KV cache where nobody says how much it takes.
pub const KV_SHARE: f64 = 0.1;

/// Whether it fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Weights and KV cache.
    Fits,
    /// The weights do, the KV cache does not.
    WithoutKv,
    /// Not even the weights do.
    Impossible,
}

/// A model on so many GPUs of one kind. MiB are those of each GPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Which kind.
    pub gpu: &'static str,
    /// How many.
    pub count: u32,
    /// Instance types that have so many, or as few more as there are.
    pub instances: Vec<Instance>,
    /// Whether it fits.
    pub verdict: Verdict,
    /// What there is for weights and KV cache.
    pub usable_mib: f64,
    /// What the weights take.
    pub weights_mib: f64,
    /// What the KV cache takes that was asked for.
    pub kv_needed_mib: f64,
    /// What is left for it; below zero where the weights do not fit.
    pub kv_room_mib: f64,
    /// Tokens that this room keeps, over all GPUs. `None` without the model's geometry.
    pub kv_tokens: Option<u64>,
    /// The utilization at which the weights just load, where that is no more than 1.
    pub loads_at_utilization: Option<f64>,
    /// It keeps fp8 weights, and computes in 16 bits.
    pub is_weight_only: bool,
}

/// The model on so many GPUs of one kind, whether or not an instance type has them.
pub fn judge(demand: &Demand, gpu: &Gpu, count: u32) -> Row {
    let Demand { model, .. } = demand;
    let each = f64::from(count);
    let usable_mib = demand.usable_mib(gpu);
    let weights_mib = model.weights_mib() / each;
    let kv_room_mib = usable_mib - weights_mib;
    // What each GPU keeps of one token.
    let kv = model.kv.zip(model.kv_bytes_per_token()).map(|(kv, bytes)| bytes * kv.share(count) / model::MIB);
    let tokens = demand.context.map(|context| context.saturating_mul(demand.batch) as f64);
    let kv_needed_mib = kv.zip(tokens).map_or_else(|| usable_mib.max(0.0) * KV_SHARE, |(kv, tokens)| kv * tokens);
    let verdict = match kv_room_mib {
        room if room < 0.0 => Verdict::Impossible,
        room if room < kv_needed_mib => Verdict::WithoutKv,
        _ => Verdict::Fits,
    };
    let loads_at = (weights_mib + demand.overhead_mib) / free_mib(gpu);
    Row {
        gpu: gpu.name,
        count,
        instances: instances_with(gpu.name, count),
        verdict,
        usable_mib,
        weights_mib,
        kv_needed_mib,
        kv_room_mib,
        kv_tokens: kv.map(|kv| whole(kv_room_mib.max(0.0) / kv)),
        loads_at_utilization: (loads_at <= 1.0).then_some(loads_at),
        is_weight_only: model.dtype == Dtype::Fp8 && !gpu.has_fp8,
    }
}

/// The model on all numbers of these GPUs that an instance type has: by kind, fewest first.
pub fn fit(demand: &Demand, gpus: &[Gpu]) -> Vec<Row> {
    let counts = |gpu: &Gpu| {
        let most = instances().filter(|instance| instance.gpu == gpu.name).map(|instance| instance.count).max();
        COUNTS.into_iter().filter(move |count| Some(*count) <= most)
    };
    gpus.iter().flat_map(|gpu| counts(gpu).map(|count| judge(demand, gpu, count))).collect()
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "of a number that is not negative; it saturates"
)]
fn whole(number: f64) -> u64 {
    number as u64
}
