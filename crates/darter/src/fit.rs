//! `darter fit`: which GPUs a model fits, and how a pod asks for them.
//!
//! On a terminal a table with as many rows as are of use, in a pipe all rows, one a line, tabs between fields.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use darter_core::gpu::fit::{
    COUNTS, Demand, Dtype, GPUS, Gpu, Kv, Model, PRESETS, Preset, Row, Selector, Term, Verdict, fit, named, select,
};
use serde_json::json;

use crate::show;

/// The model, and what is asked of it.
#[derive(clap::Args)]
pub(crate) struct Question {
    /// Parameters, such as 7e9 or 7B; of a mixture of experts those of all experts.
    #[arg(long, value_name = "N", value_parser = params, required_unless_present = "model", conflicts_with = "model")]
    params: Option<f64>,
    /// A model that is known by name, with its geometry.
    #[arg(long, value_name = "NAME", value_parser = PRESETS.map(|preset| preset.name))]
    model: Option<String>,
    /// In what the weights are kept.
    #[arg(long, value_enum, default_value = "fp16")]
    dtype: Weights,
    /// Tokens of one sequence. Without it a tenth of the memory has to be left for the KV cache.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..))]
    context: Option<u64>,
    /// Sequences at a time.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "context", value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    /// Layers, as `num_hidden_layers` of the model's config.json.
    #[arg(long, value_name = "N", conflicts_with = "model", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    layers: Option<u32>,
    /// Heads that have keys and values of their own: `num_key_value_heads`.
    #[arg(long, value_name = "N", requires_all = ["layers", "head_dim"], value_parser = clap::value_parser!(u32).range(1..=100_000))]
    kv_heads: Option<u32>,
    /// Size of a head: `head_dim`, or `hidden_size` over `num_attention_heads`.
    #[arg(long, value_name = "N", requires_all = ["layers", "kv_heads"], value_parser = clap::value_parser!(u32).range(1..=100_000))]
    head_dim: Option<u32>,
    /// In place of heads, with MLA: `kv_lora_rank` and `qk_rope_head_dim` together.
    #[arg(long, value_name = "N", requires = "layers", conflicts_with = "kv_heads", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    latent_dim: Option<u32>,
    /// In what the KV cache is kept.
    #[arg(long, value_enum, default_value = "fp16")]
    kv_dtype: Cache,
    /// Only this kind of GPU, such as H100; A100 is A100-40 and A100-80.
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// Share of a GPU's memory that the server takes: vLLM's --gpu-memory-utilization.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = share)]
    utilization: f64,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum Weights {
    Fp32,
    #[value(alias = "bf16")]
    Fp16,
    Fp8,
    Int8,
    #[value(alias = "awq", alias = "gptq")]
    Int4,
    Mxfp4,
}

#[derive(Clone, Copy, ValueEnum)]
enum Cache {
    #[value(alias = "bf16")]
    Fp16,
    Fp8,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// A table on a terminal; in a pipe lines of fields with tabs between them.
    Text,
    /// Every row, and selectors for every number of GPUs.
    Json,
    /// What a pod needs to get the fewest GPUs on which it fits.
    Yaml,
}

/// A wrong command line, as clap has it.
const USAGE: u8 = 2;

fn params(text: &str) -> Result<f64, String> {
    let factors = [("T", 1e12), ("B", 1e9), ("M", 1e6)];
    let upper = text.to_ascii_uppercase();
    let found = factors.iter().find_map(|(unit, factor)| Some((upper.strip_suffix(unit)?.to_owned(), *factor)));
    let (number, factor) = found.unwrap_or((upper, 1.0));
    let params =
        number.parse::<f64>().ok().map(|number| number * factor).filter(|params| (1e6..=1e14).contains(params));
    params.ok_or_else(|| "expected a number from 1e6 to 1e14, such as 7e9 or 7B".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "expected a share above 0 and up to 1, such as 0.9".to_owned())
}

/// What was asked, checked.
struct Asked {
    name: Option<&'static str>,
    demand: Demand,
    gpus: Vec<Gpu>,
}

impl Question {
    fn asked(&self) -> Result<Asked, String> {
        let preset = self.model.as_ref().and_then(|name| PRESETS.iter().find(|preset| preset.name == name));
        let (name, params, kv) = match preset {
            Some(Preset { name, params, kv }) => (Some(*name), *params, Some(*kv)),
            None => (None, self.params.unwrap_or_default(), self.geometry()),
        };
        if self.context.is_some() && kv.is_none() {
            return Err("--context needs the model's geometry: --model, or --layers with --kv-heads and --head-dim \
                        or with --latent-dim"
                .to_owned());
        }
        let gpus = self.gpu.as_ref().map_or_else(|| GPUS.to_vec(), |name| named(name));
        if gpus.is_empty() {
            let known: Vec<_> = GPUS.iter().map(|gpu| gpu.name).collect();
            let name = self.gpu.as_deref().unwrap_or_default();
            return Err(format!("--gpu {name}: not known; known are {}", known.join(", ")));
        }
        let dtype = match self.dtype {
            Weights::Fp32 => Dtype::Fp32,
            Weights::Fp16 => Dtype::Fp16,
            Weights::Fp8 => Dtype::Fp8,
            Weights::Int8 => Dtype::Int8,
            Weights::Int4 => Dtype::Int4,
            Weights::Mxfp4 => Dtype::Mxfp4,
        };
        let kv_bytes = match self.kv_dtype {
            Cache::Fp16 => 2.0,
            Cache::Fp8 => 1.0,
        };
        let demand = Demand {
            context: self.context,
            batch: self.batch,
            utilization: self.utilization,
            ..Demand::of(Model { params, dtype, kv, kv_bytes })
        };
        Ok(Asked { name, demand, gpus })
    }

    fn geometry(&self) -> Option<Kv> {
        let layers = self.layers?;
        let heads = self.kv_heads.zip(self.head_dim);
        let heads = heads.map(|(kv_heads, head_dim)| Kv::Heads { layers, kv_heads, head_dim });
        heads.or_else(|| self.latent_dim.map(|dim| Kv::Latent { layers, dim }))
    }
}

/// Prints which GPUs the model fits. 0 if there are any, 1 if not, 2 if the question is wrong.
pub(crate) fn run(question: &Question) -> Result<ExitCode> {
    let asked = match question.asked() {
        Ok(asked) => asked,
        Err(error) => {
            eprintln!("darter: {error}");
            return Ok(USAGE.into());
        }
    };
    let rows = fit(&asked.demand, &asked.gpus);
    let selectors: Vec<_> = COUNTS.into_iter().filter_map(|count| select(&rows, count)).collect();
    show::print(&match question.output {
        Output::Json => {
            let all = json!({ "name": asked.name, "demand": asked.demand, "rows": rows, "selectors": selectors });
            serde_json::to_string_pretty(&all)? + "\n"
        }
        Output::Yaml => yaml(&asked, selectors.first()),
        Output::Text if std::io::stdout().is_terminal() => table(&asked, &rows, selectors.first()),
        Output::Text => lines(&rows),
    })?;
    Ok(if selectors.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn heading(asked: &Asked) -> String {
    let model = &asked.demand.model;
    let weights = model.weights_mib() / 1024.0;
    let name =
        asked.name.map_or_else(|| format!("{} billion parameters", (model.params / 1e6).round() / 1e3), str::to_owned);
    let mut text = format!("{name} in {}: {weights:.2} GiB of weights", model.dtype.as_str());
    if let Some(bytes) = model.kv_bytes_per_token() {
        let _ = write!(text, ", {:.0} KiB of KV cache a token", bytes / 1024.0);
    }
    text
}

/// Of each kind only up to the number of GPUs on which it fits: on more of them it does too.
fn table(asked: &Asked, rows: &[Row], selector: Option<&Selector>) -> String {
    let Demand { utilization, overhead_mib, .. } = asked.demand;
    let mut text = format!(
        "{}\nMiB of each GPU; usable = (total - reserved) x {utilization} - {overhead_mib}\n\n\
         {:<13} {:>7} {:>8} {:>8} {:>8}  verdict\n",
        heading(asked),
        "  GPUs",
        "usable",
        "weights",
        "for KV",
        "tokens"
    );
    let mut done = None;
    for row in rows {
        if done == Some(row.gpu) {
            continue;
        }
        done = (row.verdict == Verdict::Fits).then_some(row.gpu);
        let tokens = row.kv_tokens.filter(|_| row.verdict != Verdict::Impossible);
        let tokens = tokens.map_or_else(String::new, |tokens| tokens.to_string());
        let _ = writeln!(
            text,
            "{:<13} {:>7.0} {:>8.0} {:>8.0} {tokens:>8}  {}",
            format!("  {} x {}", row.count, row.gpu),
            row.usable_mib,
            row.weights_mib,
            row.kv_room_mib.max(0.0),
            why(row)
        );
    }
    let Some(selector) = selector else { return text + "\nIt fits on none of them.\n" };
    let _ = write!(text, "\nThe fewest: {} of {}. A node", selector.gpus, selector.kinds.join(", "));
    for (what, terms) in [("that Karpenter makes", &selector.karpenter), ("that is there (GFD)", &selector.gfd)] {
        let _ = write!(text, "\n  {what:<21}");
        let terms: Vec<_> =
            terms.iter().map(|term| format!("{} {} {}", term.key, term.operator, term.values.join(","))).collect();
        text += &terms.join(&format!("\n  {:<21}", ""));
    }
    text + "\n"
}

/// The verdict in words, with the numbers that make it.
fn why(row: &Row) -> String {
    match (row.verdict, row.loads_at_utilization) {
        (Verdict::Impossible, Some(share)) => {
            let up = (share * 100.0).ceil() / 100.0;
            format!("impossible: {:.0} MiB short; loads at a utilization of {up:.2}", -row.kv_room_mib)
        }
        (Verdict::Impossible, None) => format!("impossible: {:.0} MiB short", -row.kv_room_mib),
        (Verdict::WithoutKv, _) => format!("without KV: {:.0} MiB of it short", row.kv_needed_mib - row.kv_room_mib),
        (Verdict::Fits, _) => {
            let first = row.instances.first().map_or("", |instance| instance.name);
            let more = row.instances.len().saturating_sub(1);
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            let weight_only = if row.is_weight_only { "; computes in 16 bits" } else { "" };
            format!("fits {first}{more}{weight_only}")
        }
    }
}

/// For programs: `cut -f`, `awk`.
fn lines(rows: &[Row]) -> String {
    let mut text =
        "gpu\tcount\tverdict\tusable_mib\tweights_mib\tkv_needed_mib\tkv_room_mib\tkv_tokens\tinstances\n".to_owned();
    for row in rows {
        let verdict = match row.verdict {
            Verdict::Fits => "fits",
            Verdict::WithoutKv => "without_kv",
            Verdict::Impossible => "impossible",
        };
        let tokens = row.kv_tokens.map_or_else(String::new, |tokens| tokens.to_string());
        let instances: Vec<_> = row.instances.iter().map(|instance| instance.name).collect();
        let Row { gpu, count, usable_mib, weights_mib, kv_needed_mib, kv_room_mib, .. } = row;
        let _ = writeln!(
            text,
            "{gpu}\t{count}\t{verdict}\t{usable_mib:.0}\t{weights_mib:.0}\t{kv_needed_mib:.0}\t{kv_room_mib:.0}\t{tokens}\t{}",
            instances.join(",")
        );
    }
    text
}

/// Part of a pod: either term is enough. Karpenter takes the first that it knows the labels of.
fn yaml(asked: &Asked, selector: Option<&Selector>) -> String {
    let heading = heading(asked);
    let Some(selector) = selector else { return format!("# {heading}: fits on none of these GPUs\n") };
    let expressions = |terms: &[Term]| -> String {
        let lines = terms.iter().map(|term| {
            let values: Vec<_> = term.values.iter().map(|value| format!("\"{value}\"")).collect();
            format!("        - {{key: {}, operator: {}, values: [{}]}}\n", term.key, term.operator, values.join(", "))
        });
        lines.collect()
    };
    format!(
        "# {heading}; fits {} of {}\n\
         affinity:\n  nodeAffinity:\n    requiredDuringSchedulingIgnoredDuringExecution:\n      nodeSelectorTerms:\n      \
         # nodes that Karpenter makes\n      - matchExpressions:\n{}      \
         # nodes with labels of GPU feature discovery\n      - matchExpressions:\n{}\
         # of the container\nresources:\n  limits:\n    nvidia.com/gpu: \"{}\"\n",
        selector.gpus,
        selector.kinds.join(", "),
        expressions(&selector.karpenter),
        expressions(&selector.gfd),
        selector.gpus,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(gpu: &str, context: Option<u64>) -> Asked {
        let preset = PRESETS.iter().find(|preset| preset.name == "llama-2-7b").expect("a preset");
        let model = Model { params: preset.params, dtype: Dtype::Fp16, kv: Some(preset.kv), kv_bytes: 2.0 };
        let demand = Demand { context, ..Demand::of(model) };
        Asked { name: Some(preset.name), demand, gpus: named(gpu) }
    }

    fn shown(asked: &Asked) -> Vec<String> {
        let rows = fit(&asked.demand, &asked.gpus);
        let selector = COUNTS.into_iter().find_map(|count| select(&rows, count));
        let table = table(asked, &rows, selector.as_ref());
        table.lines().map(|line| line.trim_end().to_owned()).collect()
    }

    #[test]
    fn a_table_ends_with_the_fewest_gpus_of_each_kind_and_says_why_not_fewer() {
        assert_eq!(
            shown(&asked("t4", None)),
            [
                "llama-2-7b in fp16: 12.55 GiB of weights, 512 KiB of KV cache a token",
                "MiB of each GPU; usable = (total - reserved) x 0.9 - 1536",
                "",
                "  GPUs         usable  weights   for KV   tokens  verdict",
                "  1 x T4        11885    12853        0           impossible: 968 MiB short; loads at a utilization of 0.97",
                "  2 x T4        11885     6426     5459    21834  fits g4dn.12xlarge",
                "",
                "The fewest: 2 of T4. A node",
                "  that Karpenter makes karpenter.k8s.aws/instance-gpu-memory Gt 16383",
                "                       karpenter.k8s.aws/instance-gpu-name In t4",
                "                       karpenter.k8s.aws/instance-gpu-count Gt 1",
                "  that is there (GFD)  nvidia.com/gpu.memory Gt 15359",
                "                       nvidia.com/gpu.product In Tesla-T4",
                "                       nvidia.com/gpu.count Gt 1",
            ]
        );
        let none = shown(&asked("t4", Some(1_000_000)));
        assert_eq!(none[5], "  2 x T4        11885     6426     5459    21834  without KV: 244541 MiB of it short");
        assert_eq!(none.last().map(String::as_str), Some("It fits on none of them."));
    }

    #[test]
    fn numbers_are_read_as_people_write_them() {
        for (text, number) in
            [("7e9", 7e9), ("7B", 7e9), ("1.5b", 1.5e9), ("500M", 5e8), ("1T", 1e12), ("7000000000", 7e9)]
        {
            assert_eq!(params(text), Ok(number), "{text}");
        }
        for text in ["", "B", "7", "-7e9", "NaN", "inf", "1e15", "7G"] {
            assert!(params(text).is_err(), "{text}");
        }
        assert_eq!((share("1"), share("0.9")), (Ok(1.0), Ok(0.9)));
        assert!(["0", "1.1", "-1", "NaN", ""].iter().all(|text| share(text).is_err()));
    }
}
