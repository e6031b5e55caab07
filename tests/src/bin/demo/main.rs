//! `make demo`: what darter does, shown with real containerds. First one node that pulls through an
//! agent; then four that pull the same image at once, a fifth that comes late, and one that dies; then
//! what a node says of its GPUs, and what a scaler makes of it.
//!
//! Everything runs in network namespaces of its own and is gone afterwards, also when it is stopped.
//! An argument is the size of the second part's image in MiB.

mod gpus;
mod nodes;
mod one_node;
mod progress;
mod scales;

use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow, ensure};
use darter_tests::tools::{Need, Release, can_run};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = tokio::select! {
        outcome = demo() => outcome,
        outcome = stopped() => outcome,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<()> {
    let size =
        std::env::args().nth(1).map(|text| text.parse().with_context(|| format!("SIZE={text}: not a number of MiB")));
    let release = if Release::V2.programs().is_some() { Release::V2 } else { Release::V1 };
    let needs = [Need::Root, Need::Containerd(release), Need::DockerRegistry, Need::Darter];
    ensure!(can_run("demo", &needs), "the demo cannot run here; the line above says why");
    let size = nodes::Size::choose(size.transpose()?)?;
    one_node::show(release).await?;
    println!();
    nodes::show(release, &size).await?;
    println!();
    gpus::show().await?;
    println!();
    scales::show().await
}

/// By Ctrl-C, or by whoever runs it: what was started goes with the caller's other branch.
async fn stopped() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupt = tokio::signal::ctrl_c() => interrupt?,
        _ = terminate.recv() => (),
    }
    Err(anyhow!("interrupted; everything the demo started is gone"))
}

fn name(release: Release) -> &'static str {
    match release {
        Release::V1 => "Debian's containerd",
        Release::V2 | Release::V2Transfer => "containerd 2.2.4",
    }
}

fn mib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}
