//! What a person sees of `darter prewarm` on a terminal.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use darter_tests::agent::without_own_environment;
use darter_tests::net::Place;
use darter_tests::process::{self, Output};
use darter_tests::stage::{MIB, Pair, REPOSITORY, TAG};
use darter_tests::tools::{self, Need, can_run};

/// Runs it with a terminal, which `script` gives it; `after` is what the shell does with its output.
async fn on_a_terminal(pair: &Pair, after: &str) -> Result<Output> {
    let (darter, config) = (tools::darter()?, pair.agent.dir().join("darter.toml"));
    let image = format!("{}/{REPOSITORY}:{TAG}", pair.ecr.name());
    let line = format!("stty cols 80; '{}' prewarm --config '{}' {image} {after}", darter.display(), config.display());
    let mut command = Place::Host.command("script");
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("TERM", "xterm");
    without_own_environment(&mut command);
    process::run("darter prewarm", command, Duration::from_secs(60)).await
}

#[tokio::test]
async fn each_layer_has_a_bar_that_fits_and_what_goes_into_a_file_is_said_there() -> Result<()> {
    if !can_run("each_layer_has_a_bar_that_fits_and_what_goes_into_a_file_is_said_there", &[Need::Darter]) {
        return Ok(());
    }
    let pair = Pair::new(&[3 * MIB, MIB]).await?;
    let output = on_a_terminal(&pair, "").await?;
    ensure!(output.status.success(), "{output:?}");
    let said = &output.stdout;
    for blob in pair.image.pulled_blobs() {
        let name: String = blob.digest().to_string().chars().take(19).collect();
        // Each fills its line, and the next follows without a break.
        let from = |line: &str| {
            let bar = strip(&line[line.rfind(&format!("{name} ["))?..]);
            let end = bar[1..].find("sha256:").map_or(bar.len(), |at| at + 1);
            Some(bar[..end].to_owned())
        };
        let bars: Vec<_> = said.split(['\r', '\n']).filter_map(from).collect();
        ensure!(!bars.is_empty(), "no bar for {name}: {said:?}");
        for bar in bars {
            let shown = bar.chars().count();
            ensure!(shown <= 80, "a bar of {shown} columns: {bar:?}");
        }
    }
    ensure!(said.contains("in the store"), "{said:?}");
    let file = pair.agent.dir().join("said");
    let output = on_a_terminal(&pair, &format!("> '{}'", file.display())).await?;
    ensure!(output.status.success(), "{output:?}");
    let said = fs::read_to_string(file)?;
    ensure!(said.contains("in the store") && !said.contains('\u{1b}'), "{said:?}");
    Ok(())
}

/// Without what moves the cursor.
fn strip(line: &str) -> String {
    let mut shown = String::new();
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        if letter != '\u{1b}' {
            shown.push(letter);
            continue;
        }
        letters.next();
        letters.by_ref().find(char::is_ascii_alphabetic);
    }
    shown
}
