//! `darter scaler`: the process. `darter explain` and `darter status --scaler`: what it says of itself.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Error, Result, bail, ensure};
use darter_base::kubernetes::connect;
use darter_base::log;
use darter_scaler::config::{Config, Kubernetes};
use darter_scaler::kubernetes::{Settings, Side, Undone, undo};
use darter_scaler::scaler::Scaler;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::args::Output;
use crate::show::print;
use crate::{REVISION, Signals, VERSION, runtime, socket};

/// Exit status where the scaler could not be asked. clap ends with the same for a wrong command line.
const CANNOT_TELL: u8 = 2;
/// It tells what it knows, and waits for nobody.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where the address names none.
const PORT: u16 = 4011;

/// What is asked of the scaler.
#[derive(clap::Args)]
pub(crate) struct Question {
    /// A node, a workload (namespace/name), a pool, or the digest of an image.
    #[arg(value_name = "NAME")]
    pub(crate) about: String,
    /// The scaler's HTTP endpoint (http.listen).
    #[arg(long, env = "DARTER_SCALER_URL", value_name = "URL", default_value = "http://127.0.0.1:4011")]
    pub(crate) scaler: String,
    /// For people, or the reasons as trees, as JSON.
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Output,
}

/// Runs until a signal.
pub(crate) fn run(config: Config) -> Result<ExitCode> {
    log::init(&config.log)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(serve(config));
    // A file operation that hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn serve(config: Config) -> Result<ExitCode> {
    // From the start: a signal between two listeners would be lost.
    let mut signals = Signals::listen()?;
    let side = match config.kubernetes.enabled {
        true => Some(side(&config.kubernetes).await?),
        false => None,
    };
    let ask = side.as_ref().map(Side::ask).unwrap_or_default();
    let scaler = Scaler::bind(&config, VERSION, REVISION.unwrap_or("unknown"), ask);
    let mut scaler = scaler.await.context("cannot start the scaler")?;
    let (stop, leave) = (CancellationToken::new(), CancellationToken::new());
    let cluster = scaler.cluster();
    let mut running = Box::pin(async {
        let scaler = async {
            let ended = scaler.run(stop.clone()).await;
            // It decides nothing any more: what it led may be led by another.
            leave.cancel();
            ended
        };
        let side = async {
            if let (Some(side), Some(cluster)) = (side, cluster) {
                side.run(cluster, leave.clone()).await;
            }
        };
        tokio::join!(scaler, side).0
    });
    tokio::select! {
        ended = &mut running => ended?,
        () = signals.next() => {
            stop.cancel();
            tokio::select! {
                ended = &mut running => ended?,
                () = signals.next() => bail!("stopped at once by a second signal"),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn side(config: &Kubernetes) -> Result<Side> {
    let settings = Settings::from(config);
    let side = Side::connect(&settings, &config.audience, &config.agents, Arc::default()).await;
    side.context("cannot start the scaler")
}

/// Takes back what scalers wrote.
pub(crate) async fn disable(config: &Config) -> Result<ExitCode> {
    ensure!(
        config.kubernetes.enabled,
        "kubernetes.enabled is false: a scaler that is configured like this writes nothing there"
    );
    let settings = Settings::from(&config.kubernetes);
    let connected = connect(settings.kubeconfig.as_deref()).await;
    let client = connected.map_err(Error::msg).context("cannot speak to Kubernetes")?.client;
    let Undone { costs, buffers, placeholders, pools, failed } = undo(&client, &settings).await;
    for failed in &failed {
        eprintln!("darter: cannot take back: {failed}");
    }
    print(&format!(
        "taken back: {costs} deletion costs of pods, {buffers} CapacityBuffers, {placeholders} placeholder Deployments, \
         {pools} NodePools\n"
    ))?;
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Why something is as it is. Exits with 1 where nothing is known of it.
pub(crate) async fn explain(question: Question) -> Result<ExitCode> {
    let path = format!("/v1/explain/{}", question.about);
    match ask(&question.scaler, &path).await {
        Ok((200, body)) if question.output == Output::Json => print(&body),
        Ok((200, body)) => {
            let told: Value = serde_json::from_str(&body).context("what answers is no scaler of this version")?;
            let keda = told["keda"].as_str().map(|keda| format!("{keda}\n")).unwrap_or_default();
            print(&format!("{}{keda}", told["text"].as_str().unwrap_or_default()))
        }
        Ok((404, body)) => {
            eprint!("darter: {body}");
            Ok(ExitCode::FAILURE)
        }
        Ok((code, body)) => bail!("{} answers {code}: {}", question.scaler, body.lines().next().unwrap_or_default()),
        Err(error) => {
            eprintln!("darter: {error:#}");
            Ok(CANNOT_TELL.into())
        }
    }
}

/// How the scaler is: exits with 1 where it is not ready.
pub(crate) async fn status(url: &str, output: Output) -> Result<ExitCode> {
    let body = match ask(url, "/v1/status").await {
        Ok((200, body)) => body,
        Ok((code, body)) => bail!("{url} answers {code}: {}", body.lines().next().unwrap_or_default()),
        Err(error) => {
            eprintln!("darter: {error:#}");
            return Ok(CANNOT_TELL.into());
        }
    };
    let told: Value = serde_json::from_str(&body).context("what answers is no scaler of this version")?;
    print(&if output == Output::Json { body } else { text(&told) })?;
    Ok(if told["ready"] == true { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(told: &Value) -> String {
    let ready = match (&told["ready"], &told["leads"]) {
        (Value::Bool(true), _) => "ready",
        (_, Value::Bool(false)) => "not ready: another scaler leads",
        _ => "not ready: nothing was decided yet",
    };
    let mut text = format!(
        "scaler {ready}; decision {} made; nodes: {} known, {} fresh, {} stale, {} unknown\n",
        told["decision"],
        told["nodes"]["known"],
        told["nodes"]["fresh"],
        told["nodes"]["stale"],
        told["nodes"]["unknown"]
    );
    if let Some(why) = told["frozen"].as_str() {
        text.push_str(&format!("FROZEN: {why}\n"));
    }
    for (name, workload) in told["workloads"].as_object().into_iter().flatten() {
        text.push_str(&format!("workload {name}: {}\n", workload.as_str().unwrap_or_default()));
    }
    text
}

async fn ask(url: &str, path: &str) -> Result<(u16, String)> {
    let authority = authority(url)?;
    ensure!(path.bytes().all(|b| b.is_ascii_graphic()), "`{path}` cannot be asked for");
    let asked = async {
        let stream = TcpStream::connect(&authority).await.with_context(|| {
            format!(
                "no scaler answers at http://{authority}: start `darter scaler`, or name its http.listen with --scaler"
            )
        })?;
        socket::get(stream, &authority, path).await.with_context(|| format!("http://{authority} broke off"))
    };
    timeout(PATIENCE, asked)
        .await
        .with_context(|| format!("http://{authority} gives no answer in {} s", PATIENCE.as_secs()))?
}

/// `http://scaler:4011`, `scaler:4011` or `scaler`.
fn authority(url: &str) -> Result<String> {
    let rest = url.strip_prefix("http://").unwrap_or(url);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let is_address = !rest.is_empty() && !rest.contains(['/', '?', '#', '@']);
    ensure!(is_address, "--scaler `{url}` is not http://<host>:<port>");
    let is_whole = rest.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) && !rest.ends_with(']');
    Ok(if is_whole { rest.to_owned() } else { format!("{rest}:{PORT}") })
}
