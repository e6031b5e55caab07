//! `darter simulate swarm` as scripts use it; what is played is the simulator's own matter (`sim`).

use std::time::Duration;

use anyhow::{Result, ensure};
use darter_tests::net::Place;
use darter_tests::process::{self, Output};
use darter_tests::tools;

async fn simulate(arguments: &str) -> Result<Output> {
    let mut command = Place::Host.command(tools::darter()?);
    command.args(["simulate", "swarm"]).args(arguments.split_whitespace());
    process::run("simulate swarm", command, Duration::from_secs(60)).await
}

/// The values of a column, below its heading.
fn column<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    let Some(at) = lines.first().and_then(|heading| heading.iter().position(|other| *other == name)) else {
        return Vec::new();
    };
    lines[1..].iter().map(|line| line[at]).collect()
}

#[tokio::test]
async fn a_pipe_gets_a_line_for_each_number_of_nodes_and_files_get_every_run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (csv, svg) = (dir.path().join("runs.csv"), dir.path().join("runs.svg"));
    let written = format!("--csv {} --svg {}", csv.display(), svg.display());
    let output = simulate(&format!("--nodes 16,4 --size 64MiB --seeds 3 {written}")).await?;
    ensure!(output.status.success(), "{}", output.stderr);
    assert_eq!(column(&output.stdout, "nodes"), ["16", "4"]);
    assert_eq!(column(&output.stdout, "origin_ratio"), ["1", "1"]);
    let runs = std::fs::read_to_string(csv)?.replace(',', "\t");
    assert_eq!(column(&runs, "nodes"), ["4", "4", "4", "16", "16", "16"]);
    assert_eq!(column(&runs, "seed"), ["1", "2", "3", "1", "2", "3"]);
    // Printed is the run whose last node came last.
    let last = |text: &str| -> Vec<f64> { column(text, "last_seconds").iter().flat_map(|time| time.parse()).collect() };
    let (printed, all) = (last(&output.stdout), last(&runs));
    let worst = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
    assert_eq!(printed, [worst(&all[3..]), worst(&all[..3])]);
    let drawn = std::fs::read_to_string(svg)?;
    assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"), "{drawn}");
    Ok(())
}

#[tokio::test]
async fn the_same_arguments_are_the_same_run_and_each_of_them_counts() -> Result<()> {
    let plain = "--nodes 12 --size 96MiB --zones 2";
    let played = async |more: &str| -> Result<String> {
        let output = simulate(&format!("{plain} {more}")).await?;
        ensure!(output.status.success(), "{more}: {}", output.stderr);
        Ok(output.stdout)
    };
    let calm = played("").await?;
    assert_eq!(calm, played("").await?);
    for more in [
        "--seed 2",
        "--holders 1",
        "--origin-share 4",
        "--spread 2s",
        "--boot 1s --spread 1s",
        "--fault importer@50",
        "--fault old10@0",
        "--fault churn30@20",
    ] {
        assert_ne!(calm, played(more).await?, "{more}");
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_played_says_why_before_anything_is_printed() -> Result<()> {
    for (arguments, code, said) in [
        ("--nodes 0", 1, "--nodes must be from 1 to 100000, not 0"),
        ("--size 0B", 1, "--size must be from 1B to 1TiB"),
        ("--size 4", 2, "--size"),
        ("--spread soon", 2, "--spread"),
        ("--fault importer", 1, "expected KIND@PERCENT"),
        ("--fault importer@soon", 1, "no percentage"),
        ("--fault flood@10", 1, "unknown kind"),
        ("--nodes 2 --size 1MiB --csv /nonexistent/runs.csv", 1, "cannot write /nonexistent/runs.csv"),
    ] {
        let output = simulate(arguments).await?;
        assert_eq!(output.status.code(), Some(code), "{arguments}: {}", output.stderr);
        assert!(output.stderr.contains(said), "{arguments}: {}", output.stderr);
        assert!(output.stdout.is_empty() || arguments.contains("--csv"), "{arguments}: {}", output.stdout);
    }
    Ok(())
}
