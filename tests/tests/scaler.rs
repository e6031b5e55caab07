//! `darter simulate scaler` and `darter replay` as scripts use them: what they print in a pipe, what they
//! write, and with what they exit.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_tests::net::Place;
use darter_tests::process::{self, Output};
use darter_tests::tools;

async fn darter(arguments: &str) -> Result<Output> {
    let mut command = Place::Host.command(tools::darter()?);
    command.args(arguments.split_whitespace());
    process::run("darter", command, Duration::from_secs(120)).await
}

const QPS: &str = "timestamp_anon,value,container_ip,request_type\n\
                   1662859404.0,0.09,a,Generative Requests\n\
                   1662859461.0,0.09,a,Generative Requests\n\
                   1662869461.0,0.09,b,Generative Requests\n";

/// A trace as it is published: beside the file, what macOS adds to archives.
async fn archive(dir: &Path) -> Result<String> {
    std::fs::write(dir.join("._qps.csv"), [0, 5, 22, 7, 0xff])?;
    std::fs::write(dir.join("qps.csv"), QPS)?;
    let path = dir.join("qps.tar.gz");
    let mut command = Place::Host.command("tar");
    command.arg("czf").arg(&path).arg("-C").arg(dir).args(["._qps.csv", "qps.csv"]);
    process::run_ok("tar", command, Duration::from_secs(20)).await?;
    Ok(path.display().to_string())
}

#[tokio::test]
async fn a_trace_is_played_from_its_archive_and_every_way_to_keep_replicas_has_a_line() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let trace = archive(dir.path()).await?;
    let (csv, svg) = (dir.path().join("costs.csv"), dir.path().join("costs.svg"));
    let written = format!("--csv {} --svg {}", csv.display(), svg.display());
    let output = darter(&format!("simulate scaler --trace {trace} --cold-start 84,900 {written}")).await?;
    ensure!(output.status.success(), "{}", output.stderr);
    let lines: Vec<Vec<&str>> = output.stdout.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(lines[0][..5], ["trace", "model", "cold_start_gpu_seconds", "kept", "requests"]);
    let kept: Vec<_> = lines.iter().filter(|line| line[2] == "84").map(|line| (line[1], line[3])).collect();
    assert_eq!(
        kept[..4],
        [("replay", "darter"), ("replay", "fixed 60 s"), ("replay", "fixed 300 s"), ("replay", "fixed 900 s")]
    );
    assert!(kept[4].1.starts_with("best fixed: "), "{kept:?}");
    assert_eq!(kept[5..], [("cluster", "darter"), ("cluster", "KEDA+Karpenter")]);
    // 0.09 a second for three times 57 s, of two pods.
    assert!(lines[1..].iter().all(|line| line[4] == "15"), "{}", output.stdout);
    let file = std::fs::read_to_string(csv)?;
    assert_eq!(file.replace(',', "\t"), output.stdout);
    assert!(std::fs::read_to_string(svg)?.starts_with("<svg"));
    Ok(())
}

#[tokio::test]
async fn decisions_that_were_recorded_come_out_the_same_and_one_that_was_changed_is_found() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let record = dir.path().join("decisions.jsonl");
    let played = format!(
        "simulate scaler --made-up on-off --workloads 3 --days 1 --cold-start 300 --model cluster --record {}",
        record.display()
    );
    let output = darter(&played).await?;
    ensure!(output.status.success(), "{}", output.stderr);
    let output = darter(&format!("replay {}", record.display())).await?;
    ensure!(output.status.success(), "{}{}", output.stdout, output.stderr);
    assert!(output.stdout.ends_with("1000 decisions, every one the same to the bit\n"), "{}", output.stdout);
    let text = std::fs::read_to_string(&record)?;
    let lines: Vec<_> = text.lines().collect();
    let raised = lines.iter().position(|line| line.contains(r#""replicas":1}}"#)).expect("something was asked for");
    let changed = lines[raised].replacen(r#""replicas":1}}"#, r#""replicas":2}}"#, 1);
    std::fs::write(&record, format!("{}\n{changed}\n", lines[0]))?;
    let output = darter(&format!("replay {}", record.display())).await?;
    assert_eq!(output.status.code(), Some(1));
    let said: Vec<_> = output.stdout.lines().collect();
    assert!(said[1].contains("DIFFERS at decision.actions[0].answer.replicas"), "{}", output.stdout);
    assert_eq!(said[2..], ["  recorded 2", "  decided  1", "2 decisions, 1 of them differ"]);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_played_or_decided_again_says_why() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = dir.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let qps = file("qps.csv", QPS)?;
    let (other, torn) =
        (file("other.csv", "a,b\n1,2\n")?, file("torn.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n")?);
    let (policy, empty) = (file("policy.toml", "[keep]\nusual = 5\n")?, file("empty.jsonl", "")?);
    let gzip = file("qps.tar.gz", "not compressed")?;
    for (arguments, code, said) in [
        ("simulate scaler".to_owned(), 2, "--trace"),
        ("simulate scaler --made-up storms".to_owned(), 2, "flash-crowd"),
        ("simulate scaler --trace /nonexistent.csv".to_owned(), 1, "cannot open /nonexistent.csv"),
        (format!("simulate scaler --trace {gzip}"), 1, "cannot read"),
        (format!("simulate scaler --trace {other}"), 1, "Known are Azure's LLM traces"),
        (format!("simulate scaler --trace {torn}"), 1, "line 2: not a time: `x`"),
        (format!("simulate scaler --trace {qps} --policy {policy}"), 1, "unknown field `usual`"),
        (format!("simulate scaler --trace {qps} --lead 10s"), 1, "--lead must be longer"),
        ("replay".to_owned(), 2, "<FILE>"),
        (format!("replay {empty}"), 1, ""),
        (format!("replay {qps}"), 1, "record 1: not a record of a decision"),
    ] {
        let output = darter(&arguments).await?;
        assert_eq!(output.status.code(), Some(code), "{arguments}: {}", output.stderr);
        assert!(output.stderr.contains(said), "{arguments}: {}", output.stderr);
    }
    Ok(())
}
