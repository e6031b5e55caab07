//! A real Prometheus, Debian's: scrapes an agent, answers queries.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use serde_json::{Value, json};

use crate::http::Client;
use crate::net::{Place, Port};
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::stage::eventually;
use crate::tools;

/// What promtool says to a page of metrics: nothing, if it is clean.
pub async fn lint(page: &str) -> Result<String> {
    let mut promtool = process::command("promtool");
    promtool.args(["check", "metrics"]);
    let output = process::run_with_input("promtool", promtool, page, Duration::from_secs(30)).await?;
    let said = output.stdout + &output.stderr;
    ensure!(output.status.success() == said.is_empty(), "promtool: {}: {said}", output.status);
    Ok(said)
}

/// Plays a story (`promtool test rules`, without its `rule_files`) on a file of alerts. Texts for people are not
/// compared.
pub async fn play(file: &Path, story: &str) -> Result<()> {
    let bare: Vec<_> =
        std::fs::read_to_string(file)?.lines().filter(|line| !is_text(line)).map(str::to_owned).collect();
    let dir = Scratch::new()?;
    std::fs::write(dir.join("rules.yml"), bare.join("\n"))?;
    std::fs::write(dir.join("story.yml"), format!("rule_files: [rules.yml]\n{story}"))?;
    let mut promtool = process::command("promtool");
    promtool.args(["test", "rules"]).arg(dir.join("story.yml"));
    process::run_ok("promtool", promtool, Duration::from_secs(30)).await?;
    Ok(())
}

fn is_text(line: &str) -> bool {
    ["annotations:", "summary:", "description:"].iter().any(|key| line.trim_start().starts_with(key))
}

/// A Prometheus that scrapes every second.
pub struct Prometheus {
    process: Process,
    address: SocketAddr,
    client: Client,
    _port: Port,
    _dir: Scratch,
}

impl Prometheus {
    /// Starts one and waits until it answers.
    pub async fn start(target: SocketAddr) -> Result<Self> {
        Self::start_with(json!({ "static_configs": [{ "targets": [target.to_string()] }] })).await
    }

    /// The same with a scrape configuration of the test's own, but for its name.
    pub async fn start_with(mut scrape: Value) -> Result<Self> {
        let (dir, place) = (Scratch::new()?, Place::Host);
        let port = place.port()?;
        let address = SocketAddr::new(place.address(), port.number());
        scrape["job_name"] = json!("darter");
        let config = json!({ "global": { "scrape_interval": "1s" }, "scrape_configs": [scrape] });
        // JSON is YAML.
        std::fs::write(dir.join("prometheus.yml"), config.to_string())?;
        let program = tools::find("prometheus").context("prometheus is not installed")?;
        let mut command = place.command(program);
        command
            .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address={address}"));
        let mut process = Process::start("prometheus", command, &dir.join("log"))?;
        tokio::select! {
            listening = place.wait_for(address, Duration::from_secs(30)) => listening?,
            status = process.exit(Duration::from_secs(30)) => bail!("prometheus: {}\n{}", status?, process.log()),
        }
        let client = Client::new(place);
        // It listens before it has opened its storage.
        let ready = format!("http://{address}/-/ready");
        eventually("prometheus is ready", async || Ok(client.get(&ready).await?.status == 200)).await?;
        Ok(Self { process, address, client, _port: port, _dir: dir })
    }

    /// Where it is asked.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What an expression gives now: labels and value of each series.
    pub async fn query(&self, expression: &str) -> Result<Vec<(Value, f64)>> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let url = format!("http://{}/api/v1/query?query={encoded}", self.address);
        let answer = self.client.get(&url).await?;
        let said: Value = serde_json::from_slice(&answer.body)?;
        ensure!(said["status"] == "success", "{expression}: {said}\n{}", process::tail(&self.process.log()));
        let series = said["data"]["result"].as_array().cloned().unwrap_or_default();
        let value = |series: &Value| series["value"][1].as_str().and_then(|value| value.parse().ok());
        series
            .into_iter()
            .map(|series| Ok((series["metric"].clone(), value(&series).context("a series without a value")?)))
            .collect()
    }
}
