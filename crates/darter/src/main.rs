//! The darter binary: subcommands, nothing else.

mod args;
mod prewarm;
mod show;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use darter_agent::agent::Agent;
use darter_agent::{certs_d, config, log};
use tokio_util::sync::CancellationToken;

use args::{Args, Command, ConfigCommand};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit, where the build knows it.
const REVISION: Option<&str> = option_env!("DARTER_REVISION");

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            // With the causes: the last of them is usually the one to act on.
            eprintln!("darter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Agent(source) => agent(source.load()?.config()?),
        Command::Config(ConfigCommand::Default) => show::print(config::DEFAULT),
        Command::Config(ConfigCommand::Print(source)) => show::print(&source.load()?.print()?),
        Command::Config(ConfigCommand::Check(source)) => {
            let registries = source.load()?.config()?.registries.len();
            show::print(&format!("ok: {registries} registries configured\n"))
        }
        Command::Preflight { source, json } => show::preflight(&certs_d::preflight(&source.load()?.config()?), json),
        Command::Uninstall(source) => show::uninstall(&certs_d::uninstall(&source.load()?.config()?)?),
        Command::Prewarm(order) => runtime()?.block_on(prewarm::run(order)),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}

fn agent(config: config::Config) -> Result<ExitCode> {
    log::init(&config.log)?;
    runtime()?.block_on(async {
        let stop = CancellationToken::new();
        let signals = signals()?;
        let agent = tokio::select! {
            agent = Agent::bind(config, VERSION, REVISION.unwrap_or("unknown")) => agent.context("cannot start the agent")?,
            // Nothing is written before the agent runs.
            () = signals.wait() => return Ok(ExitCode::SUCCESS),
        };
        let signals = signals_task(stop.clone())?;
        agent.run(stop).await;
        signals.abort();
        Ok(ExitCode::SUCCESS)
    })
}

/// SIGTERM and SIGINT.
struct Signals(tokio::signal::unix::Signal, tokio::signal::unix::Signal);

fn signals() -> Result<Signals> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| signal(kind).context("cannot listen for signals");
    Ok(Signals(listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?))
}

impl Signals {
    async fn wait(mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

fn signals_task(stop: CancellationToken) -> Result<tokio::task::JoinHandle<()>> {
    let signals = signals()?;
    Ok(tokio::spawn(async move {
        signals.wait().await;
        stop.cancel();
    }))
}
