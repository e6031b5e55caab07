//! Terms of a pod's nodeAffinity that choose the nodes on which a model fits, and no others.
//!
//! Nodes that are there have the labels of GPU feature discovery, with NVML's MiB. Nodes that Karpenter is to
//! make have none of them yet, and are chosen by what EC2 says of their type. `Gt` takes one whole number, as
//! text, and is exclusive.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{GPUS, Gpu, Row, Verdict};

/// One `matchExpressions` entry, or one requirement of a NodePool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Term {
    /// The label.
    pub key: &'static str,
    /// `In`, `NotIn`, `Gt` or `Lt`.
    pub operator: &'static str,
    /// Its values; of `Gt` and `Lt` just one.
    pub values: Vec<String>,
}

/// How to ask for GPUs on which it fits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Selector {
    /// `nvidia.com/gpu`: so many.
    pub gpus: u32,
    /// On which kinds it fits then.
    pub kinds: Vec<&'static str>,
    /// For nodes that are to be made.
    pub karpenter: Vec<Term>,
    /// For nodes that are there.
    pub gfd: Vec<Term>,
}

/// What one of the two calls things.
struct Labels {
    memory: &'static str,
    name: &'static str,
    count: &'static str,
    memory_of: fn(&Gpu) -> u32,
    name_of: fn(&Gpu) -> &'static str,
}

const KARPENTER: Labels = Labels {
    memory: "karpenter.k8s.aws/instance-gpu-memory",
    name: "karpenter.k8s.aws/instance-gpu-name",
    count: "karpenter.k8s.aws/instance-gpu-count",
    memory_of: |gpu| gpu.provider_mib,
    name_of: |gpu| gpu.provider_name,
};

const GFD: Labels = Labels {
    memory: "nvidia.com/gpu.memory",
    name: "nvidia.com/gpu.product",
    count: "nvidia.com/gpu.count",
    memory_of: |gpu| gpu.total_mib,
    name_of: |gpu| gpu.product,
};

/// How to ask for `gpus` GPUs on which it fits. `None` if it fits on none.
pub fn select(rows: &[Row], gpus: u32) -> Option<Selector> {
    let rows = rows.iter().filter(|row| row.count == gpus && row.verdict == Verdict::Fits);
    let kinds: Vec<_> = rows.map(|row| row.gpu).collect();
    if kinds.is_empty() {
        return None;
    }
    let terms = |labels: &Labels| labels.terms(&kinds, gpus);
    Some(Selector { gpus, karpenter: terms(&KARPENTER), gfd: terms(&GFD), kinds })
}

impl Labels {
    /// More memory than the smallest kind on which it fits has, less one. Kinds that have as much, and on which
    /// it does not fit or that were not asked for, are ruled out by name, and where a right one has the same
    /// name (`a100`) by memory.
    fn terms(&self, kinds: &[&str], gpus: u32) -> Vec<Term> {
        let (right, others): (Vec<&Gpu>, Vec<&Gpu>) = GPUS.iter().partition(|gpu| kinds.contains(&gpu.name));
        let memory = |gpus: &[&Gpu]| -> Vec<u32> { gpus.iter().map(|gpu| (self.memory_of)(gpu)).collect() };
        let names = |gpus: &[&Gpu]| -> Vec<String> {
            let names: BTreeSet<_> = gpus.iter().map(|gpu| (self.name_of)(gpu).to_owned()).collect();
            names.into_iter().collect()
        };
        let least = memory(&right).into_iter().min().unwrap_or(0);
        let most = memory(&right).into_iter().max().unwrap_or(0);
        let wrong: Vec<_> = others.into_iter().filter(|gpu| (self.memory_of)(gpu) >= least).collect();
        let (rights, wrongs) = (names(&right), names(&wrong));
        let is_shared = wrongs.iter().any(|name| rights.contains(name));
        let term = |key, operator, values| Term { key, operator, values };
        let number = |number: u32| vec![number.to_string()];
        let mut terms = vec![term(self.memory, "Gt", number(least.saturating_sub(1)))];
        if is_shared {
            terms.push(term(self.memory, "Lt", number(most.saturating_add(1))));
        }
        if is_shared || !wrongs.is_empty() && rights.len() < wrongs.len() {
            terms.push(term(self.name, "In", rights));
        } else if !wrongs.is_empty() {
            terms.push(term(self.name, "NotIn", wrongs));
        }
        if gpus > 1 {
            terms.push(term(self.count, "Gt", number(gpus - 1)));
        }
        terms
    }
}
