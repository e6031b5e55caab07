//! What was decided can be looked at, and decided again.

use anyhow::{Context as _, Result, ensure};
use darter_tests::scaler::{Mouth, Scaler, report};

use crate::{LLM, ONE, is_here};

#[tokio::test]
async fn what_was_decided_is_on_disk_and_comes_out_the_same_to_the_bit() -> Result<()> {
    if !is_here("what_was_decided_is_on_disk_and_comes_out_the_same_to_the_bit") {
        return Ok(());
    }
    let mut scaler = Scaler::start(ONE).await?;
    let mut agents = Vec::new();
    for n in 0..3 {
        let mut agent = Mouth::to(&scaler).await?;
        agent.say(report(&format!("gpu-{n}"), 1)).await?;
        agents.push(agent);
    }
    for (backlog, said) in [(2, "2 wait or run"), (5, "5 wait or run"), (0, "no work for")] {
        scaler.demand(LLM, backlog).await?;
        scaler.says(LLM, said).await?;
    }
    let page = scaler.json("/v1/decisions").await?;
    let decisions = page["decisions"].as_array().context("no decisions")?;
    let answers: Vec<_> = decisions
        .iter()
        .flat_map(|decision| decision["actions"].as_array().into_iter().flatten())
        .filter_map(|action| action["answer"]["replicas"].as_u64())
        .collect();
    assert_eq!(answers, [2, 5]);
    let newest = decisions.last().and_then(|decision| decision["id"].as_u64()).context("no id")?;
    let page = scaler.json(&format!("/v1/decisions?since={newest}")).await?;
    assert_eq!(page["decisions"], serde_json::json!([]));
    scaler.stop().await?;
    let file = scaler.dir().join("record/decisions.jsonl");
    let lines = std::fs::read_to_string(&file)?.lines().count();
    ensure!(lines >= decisions.len(), "{lines} of {}", decisions.len());
    let replayed = scaler.darter(&["replay", &file.display().to_string()]).await?;
    ensure!(replayed.status.success(), "{}{}", replayed.stdout, replayed.stderr);
    let end = format!("{lines} decisions, every one the same to the bit\n");
    assert!(replayed.stdout.ends_with(&end), "{}", replayed.stdout);
    Ok(())
}
