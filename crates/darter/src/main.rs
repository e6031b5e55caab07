//! The darter binary: subcommands, nothing else.

// The futures of a mirror request are nested deeper than the compiler looks by default.
#![recursion_limit = "256"]

mod archive;
mod args;
mod fit;
mod gpu;
mod play;
mod plot;
mod prewarm;
mod replay;
mod scaler;
mod show;
mod simulate;
mod socket;
mod status;
mod uninstall;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use darter_agent::agent::Agent;
use darter_agent::{certs_d, config, log, swarm};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use args::{
    Args, Command, ConfigCommand, GpuCommand, ScalerCommand, ScalerConfigCommand, SimulateCommand, SwarmCommand,
};

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
        Command::Agent { source, dcgm_names } => {
            let mut layers = source.load()?;
            if let Some(names) = dcgm_names {
                layers = layers.set(names.assignment())?;
            }
            agent(layers.config()?)
        }
        Command::Config(ConfigCommand::Default) => show::print(config::DEFAULT),
        Command::Config(ConfigCommand::Print(source)) => show::print(&source.load()?.print()?),
        Command::Config(ConfigCommand::Check(source)) => {
            let layers = source.load()?;
            let registries = layers.config()?.registries.len();
            for warning in config::warnings(&layers)? {
                eprintln!("darter: warning: {warning}");
            }
            show::print(&format!("ok: {registries} registries configured\n"))
        }
        Command::Preflight { source, json } => {
            let config = source.load()?.config()?;
            show::preflight(&runtime()?.block_on(certs_d::preflight(&config)), json)
        }
        Command::Status(args::Look { scaler: Some(url), output, .. }) => {
            runtime()?.block_on(scaler::status(&url, output))
        }
        Command::Status(look) => runtime()?.block_on(status::run(look)),
        Command::Uninstall(source) => runtime()?.block_on(uninstall::run(&source.load()?.config()?)),
        Command::Swarm(SwarmCommand::Key) => show::print(&swarm::key::make().context("cannot get random bytes")?),
        Command::Simulate(SimulateCommand::Swarm(play)) => simulate::swarm(&play),
        Command::Simulate(SimulateCommand::Scaler(play)) => play::scaler(&play),
        Command::Scaler { command: None, source } => scaler::run(source.load()?.config()?),
        Command::Scaler { command: Some(ScalerCommand::Disable(source)), .. } => {
            runtime()?.block_on(scaler::disable(&source.load()?.config()?))
        }
        Command::Scaler { command: Some(ScalerCommand::Config(command)), .. } => match command {
            ScalerConfigCommand::Default => show::print(darter_scaler::config::DEFAULT),
            ScalerConfigCommand::Print(source) => show::print(&source.load()?.print()?),
            ScalerConfigCommand::Check(source) => {
                let config = source.load()?.config()?;
                let (workloads, pools) = (config.workloads.len(), config.pools.len());
                show::print(&format!("ok: {workloads} workloads and {pools} pools configured\n"))
            }
        },
        Command::Explain(question) => runtime()?.block_on(scaler::explain(question)),
        Command::Replay(recorded) => replay::run(&recorded),
        Command::Fit(question) => fit::run(&question),
        Command::Gpu(GpuCommand::Clear(order)) => runtime()?.block_on(gpu::clear(order)),
        Command::Prewarm(order) => runtime()?.block_on(prewarm::run(order)),
    }
}

/// sendfile and one hash per pull saturate the fastest network card with these; more, as on a node
/// of 192 cores, only cost memory and wake-ups.
const WORKERS_MAX: usize = 8;

fn runtime() -> Result<tokio::runtime::Runtime> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(workers).enable_all().build().context("cannot start the runtime")
}

fn agent(config: config::Config) -> Result<ExitCode> {
    log::init(&config.log)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(serve(config));
    // A file operation that hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn serve(config: config::Config) -> Result<ExitCode> {
    // One listener from the start: a signal between two of them would be lost.
    let mut signals = Signals::listen()?;
    let agent = tokio::select! {
        agent = Agent::bind(config, VERSION, REVISION.unwrap_or("unknown")) => agent.context("cannot start the agent")?,
        // Nothing is written before the agent runs.
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let stop = CancellationToken::new();
    let mut running = Box::pin(agent.run(stop.clone()));
    tokio::select! {
        ended = &mut running => ended?,
        () = signals.next() => {
            stop.cancel();
            tokio::select! {
                ended = &mut running => ended?,
                () = signals.next() => bail!("stopped at once by a second signal; `darter uninstall` puts hosts.toml back"),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
