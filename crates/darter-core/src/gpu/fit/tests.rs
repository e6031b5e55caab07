//! Every number of the table and every verdict of the sentences below it, and selectors that choose what fits.

use proptest::prelude::*;

use super::*;

fn gpu(name: &str) -> Gpu {
    let found = named(name);
    assert_eq!(found.len(), 1, "{name}");
    found[0]
}

fn model(params: f64, dtype: Dtype) -> Model {
    Model { params, dtype, kv: None, kv_bytes: 2.0 }
}

fn preset(name: &str, dtype: Dtype) -> Model {
    let found = PRESETS.iter().find(|preset| preset.name == name).expect("a preset");
    Model { params: found.params, dtype, kv: Some(found.kv), kv_bytes: 2.0 }
}

fn verdict(model: Model, name: &str, count: u32) -> Verdict {
    judge(&Demand::of(model), &gpu(name), count).verdict
}

fn gib(mib: f64) -> f64 {
    mib / 1024.0
}

/// Equal as far as the number is written out.
fn assert_near(value: f64, written: &str) {
    let digits = written.split_once('.').map_or(0, |(_, digits)| digits.len());
    assert_eq!(format!("{value:.digits$}"), written);
}

#[test]
fn the_table_of_what_fits() {
    // Usable MiB; billions of parameters: fp16 with a tenth left for KV, fp16 with none, 8 bit, 4 bit.
    for (name, count, row) in [
        ("T4", 1, ["11885", "5.6", "6.2", "11.2", "20"]),
        ("A10G", 1, ["18724", "8.8", "9.8", "17.7", "31.6"]),
        ("L40S", 1, ["39377", "18.6", "20.6", "37.2", "66"]),
        ("A100-40", 1, ["34862", "16.4", "18.3", "32.9", "58.7"]),
        ("H100", 1, ["71436", "33.7", "37.5", "67.4", "120"]),
        // 214.54 with 4 bit: the sheet cuts it off to 214.
        ("H200", 1, ["127305", "60.1", "66.7", "120", "215"]),
        ("A10G", 4, ["74896", "35.3", "39.3", "70.7", "126"]),
        ("A100-40", 8, ["278894", "132", "146", "263", "470"]),
        ("H100", 8, ["571488", "270", "300", "539", "963"]),
        ("H200", 8, ["1018442", "481", "534", "961", "1716"]),
    ] {
        let each = Demand::of(model(1.0, Dtype::Fp16)).usable_mib(&gpu(name));
        let all = each * f64::from(count);
        assert_near(all, row[0]);
        let most = |dtype: Dtype, share: f64| all * 1_048_576.0 * share / dtype.bytes() / 1e9;
        assert_near(most(Dtype::Fp16, 0.9), row[1]);
        assert_near(most(Dtype::Fp16, 1.0), row[2]);
        assert_near(most(Dtype::Int8, 0.9), row[3]);
        assert_near(most(Dtype::Int4, 0.9), row[4]);
        // And that is what `judge` says, on either side of each.
        for (dtype, share, better, worse) in [
            (Dtype::Fp16, 0.9, Verdict::Fits, Verdict::WithoutKv),
            (Dtype::Fp16, 1.0, Verdict::WithoutKv, Verdict::Impossible),
            (Dtype::Int8, 0.9, Verdict::Fits, Verdict::WithoutKv),
            (Dtype::Int4, 0.9, Verdict::Fits, Verdict::WithoutKv),
        ] {
            let params = most(dtype, share) * 1e9;
            assert_eq!(verdict(model(params * 0.999, dtype), name, count), better, "{count} x {name}");
            assert_eq!(verdict(model(params * 1.001, dtype), name, count), worse, "{count} x {name}");
        }
    }
    let usable = |name| Demand::of(model(1.0, Dtype::Fp16)).usable_mib(&gpu(name));
    assert_near((usable("A100-80") / usable("H100") - 1.0) * 100.0, "0.3");
    assert!((usable("L4") / usable("A10G") - 1.0).abs() < 0.002, "much the same");
}

#[test]
fn what_is_kept_of_a_token() {
    for (name, kib) in [
        ("llama-2-7b", 512.0),
        ("llama-2-13b", 800.0),
        ("llama-3-8b", 128.0),
        ("mistral-7b", 128.0),
        ("qwen2.5-7b", 56.0),
        ("llama-3-70b", 320.0),
    ] {
        assert_eq!(preset(name, Dtype::Fp16).kv_bytes_per_token(), Some(kib * 1024.0), "{name}");
    }
    let full = |name| preset(name, Dtype::Fp16).kv_bytes_per_token().unwrap_or(0.0) * 131_072.0 / 1_073_741_824.0;
    assert_eq!((full("llama-3-8b"), full("llama-3-70b")), (16.0, 40.0));
    assert_eq!(Kv::Latent { layers: 61, dim: 512 + 64 }.bytes_per_token(2.0), 70_272.0);
}

#[test]
fn heads_are_dealt_out_and_what_cannot_be_is_on_every_gpu() {
    let heads = |kv_heads| Kv::Heads { layers: 1, kv_heads, head_dim: 1 };
    assert_eq!([1, 2, 4, 8].map(|gpus| heads(8).share(gpus)), [1.0, 0.5, 0.25, 0.125]);
    assert_eq!([4, 8].map(|gpus| heads(4).share(gpus)), [0.25, 0.25], "two GPUs a head");
    assert_eq!([2, 4].map(|gpus| heads(10).share(gpus)), [0.5, 1.0]);
    assert_eq!(Kv::Latent { layers: 61, dim: 576 }.share(8), 1.0);
}

#[test]
fn a_t4_and_a_7b() {
    let (t4, llama) = (gpu("T4"), preset("llama-2-7b", Dtype::Fp16));
    assert_near(gib(llama.weights_mib()), "12.55");
    assert_near(gib(free_mib(&t4)), "14.56");
    let row = judge(&Demand::of(llama), &t4, 1);
    assert_eq!(row.verdict, Verdict::Impossible, "not at 0.9");
    let loads_at = row.loads_at_utilization.unwrap_or(9.0);
    assert!(loads_at > 0.96 && loads_at <= 0.97, "{loads_at}");
    let tokens = |utilization| judge(&Demand { utilization, ..Demand::of(llama) }, &t4, 1).kv_tokens;
    assert_eq!(tokens(0.96), Some(0));
    assert_eq!(tokens(0.97), Some(152));
    assert_eq!(tokens(0.99), Some(748));
    // The sheet: at most 0.5 GiB, 1000 tokens. All of the board gives a little more.
    let all = judge(&Demand { utilization: 1.0, ..Demand::of(llama) }, &t4, 1);
    assert_near(gib(all.kv_room_mib), "0.51");
    assert_eq!(all.kv_tokens, Some(1046));
    let llama = preset("llama-3-8b", Dtype::Fp16);
    assert_near(gib(llama.weights_mib()), "14.96");
    let row = judge(&Demand::of(llama), &t4, 1);
    assert_eq!((row.verdict, row.loads_at_utilization), (Verdict::Impossible, None), "does not load");
}

#[test]
fn the_claims_of_write_ups() {
    let (b13, b70, b180) =
        (preset("llama-2-13b", Dtype::Fp16), preset("llama-3-70b", Dtype::Fp16), model(180e9, Dtype::Fp16));
    for (model, name, count, weights, free) in
        [(b13, "A10G", 1, "24.24", "22.0"), (b70, "A10G", 4, "131.4", "87.9"), (b180, "A100-40", 8, "335", "316")]
    {
        assert_near(gib(model.weights_mib()), weights);
        assert_near(gib(free_mib(&gpu(name)) * f64::from(count)), free);
        let row = judge(&Demand::of(model), &gpu(name), count);
        assert_eq!((row.verdict, row.loads_at_utilization), (Verdict::Impossible, None), "{name}");
        let in_bits = |dtype| verdict(Model { dtype, ..model }, name, count);
        assert_eq!(in_bits(Dtype::Int4), Verdict::Fits, "{name}");
        let is_just = model.params == b70.params;
        let in_8_bits = in_bits(Dtype::Int8);
        assert_eq!(in_8_bits, Verdict::Fits, "{name}");
        if is_just {
            let row = judge(&Demand::of(Model { dtype: Dtype::Int8, ..model }), &gpu(name), count);
            assert_near(gib(row.weights_mib * 4.0), "65.7");
            assert_near(gib(row.usable_mib * 4.0), "73.1");
            assert!(row.kv_room_mib - row.kv_needed_mib < 50.0, "only just: {row:?}");
        }
    }
}

#[test]
fn one_h200_and_a_70b() {
    let llama = preset("llama-3-70b", Dtype::Fp16);
    let row = judge(&Demand::of(llama), &gpu("H200"), 1);
    assert_near(gib(row.weights_mib), "131.4");
    assert_near(gib(row.usable_mib), "124.3");
    assert_eq!(row.verdict, Verdict::Impossible);
    let row = judge(&Demand { utilization: 0.98, ..Demand::of(llama) }, &gpu("H200"), 1);
    assert_near(row.kv_tokens.unwrap_or(0) as f64 / 1000.0, "13");
}

#[test]
fn a_context_that_is_asked_for_has_to_fit() {
    let demand =
        |context, batch| Demand { context: Some(context), batch, ..Demand::of(preset("llama-3-8b", Dtype::Fp16)) };
    // 18724 MiB less 15317: 3407 MiB, 27256 tokens of 128 KiB.
    assert_eq!(judge(&demand(8192, 3), &gpu("A10G"), 1).verdict, Verdict::Fits);
    let row = judge(&demand(8192, 4), &gpu("A10G"), 1);
    assert_eq!((row.verdict, row.kv_needed_mib), (Verdict::WithoutKv, 4096.0));
    assert_eq!(judge(&demand(8192, 4), &gpu("A10G"), 4).kv_needed_mib, 1024.0);
    assert_eq!(judge(&demand(u64::MAX, 4), &gpu("H200"), 8).verdict, Verdict::WithoutKv);
}

#[test]
fn fp8_is_computed_from_ada_on() {
    let fp8: Vec<_> = fit(&Demand::of(model(7e9, Dtype::Fp8)), &GPUS)
        .iter()
        .filter(|row| row.is_weight_only)
        .map(|row| row.gpu)
        .collect();
    for (name, is_weight_only) in [
        ("T4", true),
        ("A10G", true),
        ("A100-40", true),
        ("A100-80", true),
        ("L4", false),
        ("L40S", false),
        ("H100", false),
        ("H200", false),
    ] {
        assert_eq!(fp8.contains(&name), is_weight_only, "{name}");
    }
    assert!(!fit(&Demand::of(model(7e9, Dtype::Int8)), &GPUS).iter().any(|row| row.is_weight_only));
}

#[test]
fn the_two_tables_of_memory() {
    let rows = GPUS.map(|gpu| (gpu.name, gpu.provider_mib, gpu.total_mib));
    for row in [
        ("T4", 16_384, 15_360),
        ("A10G", 22_888, 23_028),
        ("L40S", 45_776, 46_068),
        ("A100-40", 40_960, 40_960),
        ("A100-80", 81_920, 81_920),
        ("H100", 81_920, 81_559),
        ("H200", 144_384, 143_771),
    ] {
        assert!(rows.contains(&row), "{row:?}");
    }
    let all = |count| instances().filter(|instance| instance.count == count).count();
    assert_eq!(instances().count(), all(1) + all(4) + all(8));
    assert!(instances().all(|instance| GPUS.iter().any(|gpu| gpu.name == instance.gpu)));
    assert_eq!(gpus_of("p4d.24xlarge"), Some(8));
    assert_eq!(gpus_of("m5.large"), None);
    let names: Vec<_> = instances_with("T4", 2).iter().map(|instance| instance.name).collect();
    assert_eq!(names, ["g4dn.12xlarge"], "two of its four");
    assert_eq!(named("a100").len(), 2);
    assert_eq!((named("h100").len(), named("h10").len(), named("").len()), (1, 0, 0));
}

#[test]
fn a_kind_of_the_same_memory_is_ruled_out_by_name_and_one_of_the_same_name_by_memory() {
    // Between what an L4 and an A10G have room for.
    let rows = fit(&Demand::of(model(8.828e9, Dtype::Fp16)), &GPUS);
    let selector = select(&rows, 1).expect("it fits on an A10G");
    assert!(selector.kinds.contains(&"A10G") && !selector.kinds.contains(&"L4"), "{selector:?}");
    let not = |key, value: &str| Term { key, operator: "NotIn", values: vec![value.to_owned()] };
    assert_eq!(selector.karpenter[1..], [not("karpenter.k8s.aws/instance-gpu-name", "l4")]);
    assert_eq!(selector.gfd[1..], [not("nvidia.com/gpu.product", "NVIDIA-L4")]);
    for gpu in GPUS {
        let rows = fit(&Demand::of(model(1e9, Dtype::Int4)), &[gpu]);
        for count in COUNTS {
            let selector = select(&rows, count).expect("it fits on anything");
            assert_eq!(chosen(&selector, count), [[gpu.name], [gpu.name]], "{selector:?}");
        }
    }
}

/// What Kubernetes makes of a term.
fn matches(term: &Term, labels: &[(&str, String)]) -> bool {
    let label = labels.iter().find(|(key, _)| *key == term.key).map(|(_, value)| value);
    let number = |text: Option<&String>| text.and_then(|text| text.parse::<i64>().ok());
    let (label_number, value) = (number(label), number(term.values.first()));
    match term.operator {
        "In" => label.is_some_and(|label| term.values.contains(label)),
        "NotIn" => label.is_none_or(|label| !term.values.contains(label)),
        "Gt" => term.values.len() == 1 && label_number.zip(value).is_some_and(|(label, value)| label > value),
        "Lt" => term.values.len() == 1 && label_number.zip(value).is_some_and(|(label, value)| label < value),
        other => panic!("{other}"),
    }
}

/// The kinds that either call's terms choose, of nodes with so many GPUs.
fn chosen(selector: &Selector, count: u32) -> [Vec<&'static str>; 2] {
    let kinds = |terms: &[Term], labels: fn(&Gpu, u32) -> Vec<(&'static str, String)>| {
        let is_chosen = |gpu: &&Gpu| terms.iter().all(|term| matches(term, &labels(gpu, count)));
        GPUS.iter().filter(is_chosen).map(|gpu| gpu.name).collect()
    };
    let karpenter = kinds(&selector.karpenter, |gpu, count| {
        vec![
            ("karpenter.k8s.aws/instance-gpu-memory", gpu.provider_mib.to_string()),
            ("karpenter.k8s.aws/instance-gpu-name", gpu.provider_name.to_owned()),
            ("karpenter.k8s.aws/instance-gpu-count", count.to_string()),
        ]
    });
    let gfd = kinds(&selector.gfd, |gpu, count| {
        vec![
            ("nvidia.com/gpu.memory", gpu.total_mib.to_string()),
            ("nvidia.com/gpu.product", gpu.product.to_owned()),
            ("nvidia.com/gpu.count", count.to_string()),
        ]
    });
    [karpenter, gfd]
}

#[test]
fn selectors_are_rendered_from_either_table() {
    let rows = fit(&Demand::of(preset("llama-3-8b", Dtype::Fp16)), &GPUS);
    let selector = select(&rows, 1).expect("it fits on one");
    assert_eq!(selector.kinds, ["A10G", "L4", "A100-40", "L40S", "H100", "A100-80", "H200"]);
    let gt = |key, value: &str| Term { key, operator: "Gt", values: vec![value.to_owned()] };
    assert_eq!(selector.karpenter, [gt("karpenter.k8s.aws/instance-gpu-memory", "22887")]);
    assert_eq!(selector.gfd, [gt("nvidia.com/gpu.memory", "23027")]);
    let selector = select(&rows, 2).expect("and on two");
    assert_eq!(
        selector.karpenter,
        [gt("karpenter.k8s.aws/instance-gpu-memory", "16383"), gt("karpenter.k8s.aws/instance-gpu-count", "1")]
    );
    assert_eq!(select(&fit(&Demand::of(model(1e12, Dtype::Fp16)), &GPUS), 8), None);
}

proptest! {
    #[test]
    fn selectors_choose_what_fits_and_nothing_else(
        billions in 0.5f64..900.0, utilization in 0.5f64..1.0, only in prop::option::of(0usize..8), count in 0usize..4,
    ) {
        let demand = Demand { utilization, ..Demand::of(model(billions * 1e9, Dtype::Fp16)) };
        let gpus = only.map_or_else(|| GPUS.to_vec(), |only| vec![GPUS[only]]);
        let count = COUNTS[count];
        let rows = fit(&demand, &gpus);
        if let Some(selector) = select(&rows, count) {
            for chosen in chosen(&selector, count) {
                prop_assert_eq!(&chosen, &selector.kinds, "{:?}", &selector);
            }
            prop_assert!(count == 1 || chosen(&selector, count - 1).iter().all(Vec::is_empty), "too few");
        } else {
            prop_assert!(!rows.iter().any(|row| row.count == count && row.verdict == Verdict::Fits));
        }
    }

    #[test]
    fn more_of_anything_never_fits_worse(billions in 0.5f64..900.0, more in 1.0f64..4.0, kind in 0usize..8, count in 0usize..3) {
        let rank = |verdict| match verdict { Verdict::Fits => 0, Verdict::WithoutKv => 1, Verdict::Impossible => 2 };
        let judged = |billions: f64, count: usize| {
            rank(judge(&Demand::of(model(billions * 1e9, Dtype::Fp16)), &GPUS[kind], COUNTS[count]).verdict)
        };
        prop_assert!(judged(billions, count) <= judged(billions * more, count));
        prop_assert!(judged(billions, count + 1) <= judged(billions, count));
    }
}
