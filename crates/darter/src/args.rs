//! The command line. `Args` become a `Config` once, here.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use darter_agent::config::Layers;
use darter_base::layers::Settings;
use darter_core::units::Seconds;

/// Node software for GPU clusters: images at the speed of the network card, registries read once.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  \
    darter agent                                    start with the embedded defaults\n  \
    darter agent --config /etc/darter/darter.toml   start as configured\n  \
    darter config default > darter.toml             every key, with what it means\n  \
    darter status                                   how this node is: images, registries, swarm, GPUs\n  \
    darter prewarm registry.example/team/app:v1     bring an image here before it is asked for\n  \
    darter gpu clear 3                              that GPU was reset: its errors stand no more\n  \
    darter scaler --config /etc/darter/scaler.toml  the scaler, once in a cluster\n  \
    darter explain models/llm                       why it has so many replicas\n  \
    darter uninstall                                put hosts.toml files back as they were"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Mirror registries for this node's containerd, share blobs with other nodes, watch the GPUs.
    ///
    /// Stops on SIGTERM or Ctrl-C: withdraws hosts.toml, lets bodies finish for 10 s, then cuts them
    /// short, and containerd goes on at the origin.
    #[command(after_help = "Examples:\n  darter agent --set mirror.listen=127.0.0.1:5001\n  \
        DARTER_LOG_FORMAT=json darter agent --config /etc/darter/darter.toml\n  \
        darter agent --dcgm-names legacy")]
    Agent {
        #[command(flatten)]
        source: Source,
        /// Names of dcgm-exporter that the GPUs' metrics have besides their own (gpu.dcgm_names).
        #[arg(long, value_name = "NAMES")]
        dcgm_names: Option<Names>,
    },
    /// Show or check the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Tell whether this node's containerd will use the mirror, and if not, why.
    ///
    /// Reads containerd's configuration, and asks containerd for its version: at containerd.socket, at the
    /// address that its configuration names, or at its usual socket.
    #[command(after_help = "Exit codes:\n  \
        0  it will\n  \
        1  it will not, or not for all pulls; or the command failed\n  \
        2  the command line is wrong\n  \
        3  that cannot be told: its version is not known and matters, or its configuration cannot be read")]
    Preflight {
        #[command(flatten)]
        source: Source,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show how this node is: mirror, store, swarm, registries, GPUs; what is wrong, and what to do.
    ///
    /// The first line says whether the node is well, and if not, why. Asks the running agent at
    /// admin.listen, or at --admin; changes nothing and needs no rights.
    #[command(after_help = "Examples:\n  \
        darter status\n  \
        darter status --watch                          one screen, every 2 s, until Ctrl-C\n  \
        darter status --admin http://10.0.0.7:4004     another node\n  \
        darter status --scaler http://127.0.0.1:4011   the scaler\n  \
        darter status --output json | jq '.gpus.gpus[] | {index, state, power_milliwatts}'\n\n\
        Exit codes (with --watch those of the last look):\n  \
        0  the node is ready; it may be degraded\n  \
        1  it is not ready\n  \
        2  no agent answers, or the command line or the configuration is wrong")]
    Status(Look),
    /// Put back every hosts.toml as it was before darter.
    ///
    /// A running agent is asked to do it, at admin.socket; it then writes none until it is started
    /// again. Where no agent runs this command does it. It says which of the two it was.
    Uninstall(Source),
    /// Bring images to this node before they are asked for, through its running agent.
    ///
    /// They are pinned: eviction spares them for a while. Exits with 1 if one could not be brought, and
    /// with 3 if all are here and one is not pinned, though it should be.
    #[command(after_help = "Examples:\n  darter prewarm 123456789012.dkr.ecr.us-east-1.amazonaws.com/llm:v3\n  \
        darter prewarm --store-only registry.example/a:1 registry.example/b:2 --json\n  \
        darter prewarm --pin 48h registry.example/a:1\n  \
        darter prewarm --username me --password-stdin registry.example/a:1 < token\n  \
        darter prewarm --unpin registry.example/a:1")]
    Prewarm(Order),
    /// What nodes need to be in one swarm.
    #[command(subcommand)]
    Swarm(SwarmCommand),
    /// What only an operator knows of this node's GPUs.
    #[command(subcommand)]
    Gpu(GpuCommand),
    /// Tell which GPUs a model fits, before a node is paid for, and how a pod asks for them.
    ///
    /// Weights and KV cache against what NVML says of each GPU of EC2, for 1, 2, 4 and 8 of them. What the
    /// server needs besides is taken to be 1.5 GiB a GPU.
    #[command(after_help = "Examples:\n  \
        darter fit --model llama-3-8b --context 8192 --batch 16\n  \
        darter fit --params 70e9 --dtype int4 --gpu A10G\n  \
        darter fit --params 671B --dtype fp8 --layers 61 --latent-dim 576 --context 32768 --output json\n  \
        darter fit --model llama-3-70b --dtype fp8 --output yaml       what a pod needs\n\n\
        Exit codes:\n  \
        0  it fits on some of them\n  \
        1  it fits on none\n  \
        2  the command line is wrong")]
    Fit(crate::fit::Question),
    /// Play darter's own decisions over made-up nodes, links and faults.
    #[command(subcommand)]
    Simulate(SimulateCommand),
    /// Hear agents' reports and demand, decide how many replicas and nodes there are to be, tell KEDA and agents.
    ///
    /// Agents report to grpc.listen, where KEDA asks too (a trigger of type external-push); people, Prometheus and
    /// whoever says demand come to http.listen. As configured by default it changes nothing: it decides, records and
    /// counts what it would do ([actuators]). Stops on SIGTERM or Ctrl-C.
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "Examples:\n  \
        darter scaler config default > scaler.toml     every key, with what it means\n  \
        darter scaler --config scaler.toml             start as configured\n  \
        darter scaler --set actuators.keda=on          answer KEDA\n  \
        darter scaler disable --config scaler.toml     take back what was written in Kubernetes\n  \
        curl -X PUT -d '{\"backlog\": 12}' http://127.0.0.1:4011/v1/demand/models/llm\n  \
        curl -X POST -d '{\"why\": \"maintenance\"}' http://127.0.0.1:4011/v1/freeze\n  \
        curl -X DELETE http://127.0.0.1:4011/v1/freeze"
    )]
    Scaler {
        #[command(subcommand)]
        command: Option<ScalerCommand>,
        #[command(flatten)]
        source: ScalerSource,
    },
    /// Tell why a node stays or may go, or why a workload has as many replicas as it has.
    #[command(after_help = "Examples:\n  \
        darter explain gpu-7\n  \
        darter explain models/llm\n  \
        darter explain models/llm --output json | jq '.reasons[0].compared'\n\n\
        Exit codes:\n  \
        0  it is known\n  \
        1  nothing is known of it\n  \
        2  no scaler answers, or the command line is wrong")]
    Explain(crate::scaler::Question),
    /// Decide recorded decisions of the scaler again, and say whether they come out the same, to the bit.
    ///
    /// Each line of the file holds one, with all that it was made from. Where one differs, the first
    /// difference is shown: it was made by another version, or something is wrong.
    #[command(after_help = "Examples:\n  darter replay decisions.jsonl\n  \
        zcat decisions.jsonl.gz | darter replay -\n\n\
        Exit codes:\n  \
        0  every decision is the same\n  \
        1  one differs, there is none, or the file cannot be read\n  \
        2  the command line is wrong")]
    Replay(crate::replay::Recorded),
}

#[derive(Subcommand)]
pub(crate) enum SwarmCommand {
    /// Print a new swarm key.
    ///
    /// Every node of a swarm has the same key; a node without it learns nothing from the others. Keep
    /// it as you keep passwords: whoever has it can take part.
    #[command(after_help = "Examples:\n  \
        (umask 077; darter swarm key > /etc/darter/swarm.key)\n  \
        darter agent --set swarm.key_file=/etc/darter/swarm.key --set swarm.dns=darter.kube-system.svc\n  \
        darter swarm key | kubectl create secret generic darter-swarm --from-file=swarm.key=/dev/stdin")]
    Key,
}

#[derive(Subcommand)]
pub(crate) enum GpuCommand {
    /// Tell the agent that GPUs were reset or mended: errors (XIDs) that stood against them stand no more.
    ///
    /// Without this such an error makes the node not ready until the next boot. Counters go on, and the next
    /// error stands again. Without a GPU named, NVML is asked again too where it was not for its crashes. Only
    /// over the agent's unix socket.
    #[command(after_help = "Examples:\n  \
        nvidia-smi --gpu-reset -i 3 && darter gpu clear 3\n  \
        darter gpu clear GPU-4a2b6f10-0000-4000-8000-000000000200\n  \
        darter gpu clear                               all GPUs of this node")]
    Clear(Wiping),
}

/// Which errors of GPUs stand no more.
#[derive(clap::Args)]
pub(crate) struct Wiping {
    /// One GPU, by index, UUID or PCI address; without it all of them.
    #[arg(value_name = "GPU")]
    pub(crate) gpu: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) source: Source,
}

#[derive(Subcommand)]
pub(crate) enum SimulateCommand {
    /// How fast a blob reaches N nodes, against the time that no protocol can beat.
    ///
    /// The decisions are those of the agent's own code; links are modelled, so that disks, processors
    /// and TCP are not in it. The goal is three times the ramp over the bound, and 3 %. A table on a terminal,
    /// lines with tabs in a pipe.
    #[command(after_help = "Examples:\n  \
        darter simulate swarm --nodes 4,64,1000 --origin-share 4 --csv runs.csv --svg runs.svg\n  \
        darter simulate swarm --nodes 64 --holders 1                 one node has it already\n  \
        darter simulate swarm --nodes 100 --spread 1s --boot 1s      they start within a second and know nobody\n  \
        darter simulate swarm --nodes 32 --fault importer@50 --seeds 20")]
    Swarm(crate::simulate::Play),
    /// What the scaler's own decisions would have cost on a trace, against fixed times and KEDA's own.
    ///
    /// First one replica of each workload serves its requests in turn, then KEDA, the HPA and Karpenter are
    /// modelled with their timers. Idle time and cold starts are what it costs. A table on a terminal, lines
    /// with tabs in a pipe. Read are Azure's LLM traces, GenTD26
    /// (requests, qps, queue size, GPU duty) and Mooncake's JSON lines.
    #[command(after_help = "Examples:\n  \
        darter simulate scaler --trace lora_request_trace.csv --csv costs.csv --svg costs.svg\n  \
        darter simulate scaler --trace qps.tar.gz --service 20s --cold-start 600\n  \
        darter simulate scaler --made-up bursts --made-up diurnal --seed 7")]
    Scaler(crate::play::Play),
}

#[derive(Subcommand)]
pub(crate) enum ScalerCommand {
    /// Show or check the scaler's configuration.
    #[command(subcommand)]
    Config(ScalerConfigCommand),
    /// Take back what scalers wrote in Kubernetes: deletion costs, spare replicas, sizes of pools.
    ///
    /// Found by what they left there, so it does not matter which scaler wrote it, or when. One that still acts writes
    /// it again: stop it first, or set its actuators to observe. Claims that were deleted do not come back, and leases
    /// of agents lapse by themselves. Exits with 1 if something could not be taken back; run it again then.
    Disable(ScalerSource),
}

#[derive(Subcommand)]
pub(crate) enum ScalerConfigCommand {
    /// Print every key with its default and what it means.
    Default,
    /// Print the configuration as the scaler would see it.
    Print(ScalerSource),
    /// Check the configuration; exits with 1 and the key and line of what is wrong.
    Check(ScalerSource),
}

/// Where the scaler's configuration comes from.
#[derive(clap::Args)]
pub(crate) struct ScalerSource {
    /// Configuration file. Default: /etc/darter/scaler.toml if it exists, else the embedded default.
    #[arg(long, short, env = "DARTER_SCALER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one key over file and environment; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl ScalerSource {
    /// All layers, merged.
    pub(crate) fn load(&self) -> Result<darter_scaler::config::Layers> {
        load(self.config.as_deref(), "/etc/darter/scaler.toml", &self.set)
    }
}

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every key with its default and what it means.
    Default,
    /// Print the configuration as the agent would see it.
    Print(Source),
    /// Check the configuration; exits with 1 and the key and line of what is wrong.
    ///
    /// Warns of files of a registry that are not there: the agent starts without them, and waits for them.
    Check(Source),
}

/// Where the configuration comes from.
#[derive(clap::Args)]
pub(crate) struct Source {
    /// Configuration file. Default: /etc/darter/darter.toml if it exists, else the embedded default.
    #[arg(long, short, env = "DARTER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one key over file and environment; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl Source {
    /// All layers, merged.
    pub(crate) fn load(&self) -> Result<Layers> {
        load(self.config.as_deref(), "/etc/darter/darter.toml", &self.set)
    }
}

/// A file, else the usual one if it is there; the environment over it, and the command line over that.
fn load<C: Settings>(config: Option<&Path>, usual: &str, set: &[String]) -> Result<darter_base::layers::Layers<C>> {
    let usual = Path::new(usual);
    let layers = match config {
        Some(path) => darter_base::layers::Layers::file(path)?,
        None if usual.exists() => darter_base::layers::Layers::file(usual)?,
        None => darter_base::layers::Layers::embedded(),
    };
    let mut layers = layers.environment(std::env::vars())?;
    for assignment in set {
        layers = layers.set(assignment)?;
    }
    Ok(layers)
}

/// Whose names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Names {
    /// None but their own.
    Off,
    /// Those up to dcgm-exporter 4.8.
    Legacy,
    /// Those since 4.9.
    V49,
}

impl Names {
    /// As a layer over the configuration.
    pub(crate) const fn assignment(self) -> &'static str {
        match self {
            Self::Off => "gpu.dcgm_names=off",
            Self::Legacy => "gpu.dcgm_names=legacy",
            Self::V49 => "gpu.dcgm_names=v49",
        }
    }
}

/// What `darter status` is to show.
#[derive(clap::Args)]
pub(crate) struct Look {
    /// The agent's admin endpoint [default: http:// and admin.listen of the configuration].
    #[arg(long, value_name = "URL")]
    pub(crate) admin: Option<String>,
    /// Look again every 2 s: one screen on a terminal, one block after the other in a pipe.
    #[arg(long, short)]
    pub(crate) watch: bool,
    /// Ask the scaler how it is, in place of an agent: its HTTP endpoint, such as http://127.0.0.1:4011.
    #[arg(long, value_name = "URL", conflicts_with_all = ["admin", "watch"])]
    pub(crate) scaler: Option<String>,
    /// For people, or one JSON object a line for each look.
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) source: Source,
}

/// How something is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What `darter prewarm` is to bring.
#[derive(clap::Args)]
pub(crate) struct Order {
    /// Images as registry/repository:tag or @digest.
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
    /// Only into darter's store: containerd does not pull and unpack.
    #[arg(long)]
    pub(crate) store_only: bool,
    /// For how long eviction spares them, such as 48h; 0 is not at all [default: store.pin_for].
    #[arg(long, value_name = "LIFETIME", conflicts_with = "unpin")]
    pub(crate) pin: Option<Seconds>,
    /// Bring nothing: end the pins of these images. Their registries are not asked.
    #[arg(long, conflicts_with = "store_only")]
    pub(crate) unpin: bool,
    /// User of this one call, for a registry that asks each pull for its own credential (access = "caller").
    ///
    /// It goes over the agent's unix socket and to the registry of the images, which is one for all of
    /// them. It is forgotten with this call.
    #[arg(long, value_name = "NAME", requires = "password_stdin", conflicts_with = "unpin")]
    pub(crate) username: Option<String>,
    /// Read the password, or a token in its place, from standard input.
    #[arg(long, requires = "username")]
    pub(crate) password_stdin: bool,
    /// Print the agent's events as JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) source: Source,
}
