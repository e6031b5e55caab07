//! What an agent says of GPUs, with the mock of NVIDIA's library in the driver's place.
//!
//! One program, because most of these tests wait: for rounds of questions, for windows of idleness.

mod activity;
mod alerts;
mod dashboards;
mod driver;
mod errors;
mod hangs;
mod pods;
mod processes;
mod real;
mod scrapes;
mod verdicts;

use anyhow::{Context as _, Result};
use darter_tests::agent::Agent;
use darter_tests::stage::eventually;
use darter_tests::tools::Need;

/// What each of these needs.
const NEEDS: [Need; 2] = [Need::Darter, Need::MockNvml];

/// Waits until the node's GPUs are in this state, and this is the first reason for it, without its number.
async fn becomes(agent: &Agent, state: &str, reason: &str) -> Result<()> {
    let mut said = String::new();
    let is_so = async || {
        let answer = agent.admin("/readyz").await?;
        // A node whose GPUs are broken still mirrors.
        anyhow::ensure!(answer.status == 200, "{}", answer.status);
        said = answer.text();
        let page: serde_json::Value = serde_json::from_str(&said)?;
        let reasons = page["gpu"]["reasons"].as_array().cloned().unwrap_or_default();
        let first = reasons.iter().find(|finding| finding["state"] == page["gpu"]["state"]);
        let first = first.map_or("", |finding| finding["reason"].as_str().unwrap_or("another"));
        Ok(page["gpu"]["state"] == state && (first == reason || first.split('(').next() == Some(reason)))
    };
    eventually(&format!("{state} {reason}"), is_so).await.with_context(|| said.clone())
}
