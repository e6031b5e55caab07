//! What the agent logs, read as machines read it.

use anyhow::{Context as _, Result, ensure};
use darter_tests::fake_ecr::Auth;
use darter_tests::stage::{MIB, Pair, eventually};
use darter_tests::tools::{Need, can_run};
use serde_json::Value;

#[tokio::test]
async fn every_line_of_a_pull_is_an_object_where_json_is_wanted() -> Result<()> {
    if !can_run("every_line_of_a_pull_is_an_object_where_json_is_wanted", &[Need::Darter]) {
        return Ok(());
    }
    let change = |options: darter_tests::agent::Options| options.set("log.format", "json").set("log.level", "trace");
    let mut pair = Pair::with(&[MIB], Auth::Public, &[("access", "public".into())], change).await?;
    pair.read_manifests().await?;
    let layer = pair.layer();
    pair.bring(&layer).await?;
    // Something that goes wrong, with a cause, and quotes of somebody else in a name.
    assert_eq!(pair.get("manifests/not-there").await?.status, 404);
    assert_eq!(pair.get("manifests/%22quoted%22%0aline").await?.status, 404);
    eventually("the pull is logged", async || Ok(pair.agent.log().contains("pulled a blob"))).await?;
    pair.agent.stop().await?;
    let log = pair.agent.log();
    let mut lines = Vec::new();
    for line in log.lines() {
        let object: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        for key in ["timestamp", "level", "target", "message"] {
            ensure!(object[key].is_string(), "no {key}: {line}");
        }
        lines.push(object);
    }
    let digest = layer.digest().to_string();
    let pulled: Vec<_> =
        lines.iter().filter(|line| line["message"] == "pulled a blob" && line["digest"] == digest).collect();
    ensure!(pulled.len() == 1, "{pulled:?}");
    // Numbers are numbers: whoever reads this adds them up.
    ensure!(pulled[0]["bytes"] == layer.size() && pulled[0]["origin_bytes"] == layer.size(), "{}", pulled[0]);
    ensure!(pulled[0]["seconds"].is_f64() && pulled[0]["level"] == "INFO", "{}", pulled[0]);
    ensure!(lines.last().is_some_and(|line| line["message"] == "stopped"), "{log}");
    Ok(())
}
