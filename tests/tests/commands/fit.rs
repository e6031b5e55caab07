//! `darter fit` as scripts use it: what it prints in a pipe, and with what it exits.

use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_tests::net::Place;
use darter_tests::process::{self, Output};
use darter_tests::tools;
use serde_json::Value;

async fn fit(arguments: &str) -> Result<Output> {
    let mut command = Place::Host.command(tools::darter()?);
    command.arg("fit").args(arguments.split_whitespace());
    process::run("fit", command, Duration::from_secs(20)).await
}

#[tokio::test]
async fn a_pipe_gets_every_row_on_a_line_of_its_own() -> Result<()> {
    let output = fit("--params 7e9 --gpu T4").await?;
    assert_eq!(output.status.code(), Some(0), "{}", output.stderr);
    assert_eq!(
        output.stdout,
        "gpu\tcount\tverdict\tusable_mib\tweights_mib\tkv_needed_mib\tkv_room_mib\tkv_tokens\tinstances\n\
         T4\t1\timpossible\t11885\t13351\t1188\t-1467\t\tg4dn.xlarge,g4dn.2xlarge,g4dn.4xlarge,g4dn.8xlarge,g4dn.16xlarge\n\
         T4\t2\tfits\t11885\t6676\t1188\t5209\t\tg4dn.12xlarge\n\
         T4\t4\tfits\t11885\t3338\t1188\t8547\t\tg4dn.12xlarge\n\
         T4\t8\tfits\t11885\t1669\t1188\t10216\t\tg4dn.metal\n"
    );
    let all = fit("--params 7B --dtype bf16").await?.stdout;
    let kinds = ["T4", "A10G", "L4", "A100-40", "L40S", "H100", "A100-80", "H200"];
    assert_eq!(all.lines().count(), 1 + 4 * kinds.len(), "{all}");
    assert!(kinds.iter().all(|kind| all.lines().filter(|line| line.split('\t').next() == Some(kind)).count() == 4));
    Ok(())
}

#[tokio::test]
async fn json_has_rows_and_selectors_with_the_same_numbers() -> Result<()> {
    let output = fit("--model llama-3-8b --context 8192 --batch 3 --output json").await?;
    let json: Value = serde_json::from_str(&output.stdout)?;
    let rows = json["rows"].as_array().context("no rows")?;
    let row = |gpu: &str, count| rows.iter().find(|row| row["gpu"] == gpu && row["count"] == count);
    let one = row("A10G", 1).context("no row of one A10G")?;
    assert_eq!(one["verdict"], "fits");
    assert_eq!(one["kv_needed_mib"], 3072.0);
    assert_eq!(row("T4", 1).context("no T4")?["verdict"], "impossible");
    let selector = &json["selectors"][0];
    assert_eq!(selector["gpus"], 1);
    assert_eq!(selector["karpenter"][0]["key"], "karpenter.k8s.aws/instance-gpu-memory");
    assert_eq!(selector["karpenter"][0]["values"][0], "22887");
    assert_eq!(selector["gfd"][0]["values"][0], "23027");
    Ok(())
}

#[tokio::test]
async fn yaml_is_what_a_pod_needs() -> Result<()> {
    let output = fit("--model llama-3-70b --dtype int4 --gpu a10g --output yaml").await?;
    assert_eq!(
        output.stdout,
        r#"# llama-3-70b in int4: 36.80 GiB of weights, 320 KiB of KV cache a token; fits 4 of A10G
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
      # nodes that Karpenter makes
      - matchExpressions:
        - {key: karpenter.k8s.aws/instance-gpu-memory, operator: Gt, values: ["22887"]}
        - {key: karpenter.k8s.aws/instance-gpu-name, operator: In, values: ["a10g"]}
        - {key: karpenter.k8s.aws/instance-gpu-count, operator: Gt, values: ["3"]}
      # nodes with labels of GPU feature discovery
      - matchExpressions:
        - {key: nvidia.com/gpu.memory, operator: Gt, values: ["23027"]}
        - {key: nvidia.com/gpu.product, operator: In, values: ["NVIDIA-A10G"]}
        - {key: nvidia.com/gpu.count, operator: Gt, values: ["3"]}
# of the container
resources:
  limits:
    nvidia.com/gpu: "4"
"#
    );
    Ok(())
}

#[tokio::test]
async fn the_exit_code_says_whether_it_fits_anywhere_and_whether_the_question_was_right() -> Result<()> {
    for (arguments, code, said) in [
        ("--params 7e9", 0, ""),
        ("--model llama-3-70b --gpu T4", 1, ""),
        ("--params 1e12", 1, ""),
        ("--params 1e12 --output json", 1, ""),
        ("--params 1e12 --output yaml", 1, ""),
        ("", 2, "--params"),
        ("--params seven", 2, "7e9"),
        ("--model gpt-5", 2, "llama-3-8b"),
        ("--params 7e9 --model llama-3-8b", 2, "--model"),
        ("--params 7e9 --context 4096", 2, "--layers"),
        ("--params 7e9 --layers 32 --context 4096", 2, "--kv-heads"),
        ("--params 7e9 --layers 32 --kv-heads 8", 2, "--head-dim"),
        ("--params 7e9 --gpu K80", 2, "known are T4, A10G, L4"),
        ("--params 7e9 --utilization 1.5", 2, "0.9"),
        ("--params 7e9 --dtype fp5", 2, "mxfp4"),
    ] {
        let output = fit(arguments).await?;
        assert_eq!(output.status.code(), Some(code), "{arguments}: {}", output.stderr);
        assert!(output.stderr.contains(said), "{arguments}: {}", output.stderr);
        assert_eq!(output.stdout.is_empty(), code == 2, "{arguments}");
    }
    let help = fit("--help").await?.stdout;
    assert!(help.contains("darter fit --model llama-3-8b --context 8192 --batch 16"), "{help}");
    Ok(())
}
