//! `darter gpu clear`: tells the running agent that GPUs are well again.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use darter_agent::gpu::{Clear, Cleared};
use tokio::time::timeout;

use crate::args::Wiping;
use crate::show::print;
use crate::socket;

/// The agent writes one small file.
const PATIENCE: Duration = Duration::from_secs(30);

/// Has the agent do it.
pub(crate) async fn clear(order: Wiping) -> Result<ExitCode> {
    let socket = order.source.load()?.config()?.admin_socket();
    let Some(stream) = socket::connect(&socket).await? else {
        anyhow::bail!("no agent answers at {} (admin.socket): start it, then do this again", socket.display());
    };
    let body = serde_json::to_string(&Clear { gpu: order.gpu })?;
    let ordered = async {
        let mut cleared = Vec::new();
        let mut lines = socket::post(stream, "/v1/gpus/clear", &body).await?;
        while let Some(line) = lines.next_line().await? {
            let one = serde_json::from_str::<Cleared>(&line).with_context(|| format!("the agent said `{line}`"))?;
            cleared.push(one);
        }
        anyhow::Ok(cleared)
    };
    let cleared = timeout(PATIENCE, ordered).await.context("the agent gives no answer").flatten()?;
    if order.json {
        return print(&(serde_json::to_string(&cleared)? + "\n"));
    }
    if cleared.is_empty() {
        return print("nothing to do: no error stands against it\n");
    }
    let line = |one: &Cleared| match one {
        Cleared::Error { pci, uuid, xid } => {
            let uuid = uuid.as_deref().unwrap_or("does not answer");
            format!("cleared XID {xid} of the GPU at {pci} ({uuid})\n")
        }
        Cleared::Crashes { nvml_crashes } => {
            format!("NVML is asked again, over which {nvml_crashes} agents had ended\n")
        }
    };
    print(&cleared.iter().map(line).collect::<String>())
}
