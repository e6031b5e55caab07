//! Who may say what.

use anyhow::{Result, ensure};
use darter_tests::scaler::{Mouth, Scaler, channel, report};
use http::Method;
use tonic::Code;

use crate::{LLM, ONE, is_here};

const TOKENS: &str =
    "reporter-of-gpu-1 report:gpu-1\ngateway-of-models demand:models/*\noperator-of-all-here freeze report:*\n";

async fn start() -> Result<Scaler> {
    let text = format!("{ONE}\n[access]\nmode = 'tokens'\ntoken_file = 'DIR/tokens'\n");
    Scaler::start_with(&text, |dir| Ok(std::fs::write(dir.join("tokens"), TOKENS)?)).await
}

#[tokio::test]
async fn a_token_may_report_as_its_node_alone_and_who_has_none_is_not_heard() -> Result<()> {
    if !is_here("a_token_may_report_as_its_node_alone_and_who_has_none_is_not_heard") {
        return Ok(());
    }
    let scaler = start().await?;
    let channel = channel(&scaler.grpc(), None).await?;
    for (token, code) in [
        (None, Code::Unauthenticated),
        (Some("nobody-at-all-here"), Code::Unauthenticated),
        (Some("gateway-of-models"), Code::PermissionDenied),
    ] {
        let refused = Mouth::open(channel.clone(), token).await.err().map(|status| status.code());
        assert_eq!(refused, Some(code), "{token:?}");
    }
    let mut agent = Mouth::open(channel.clone(), Some("reporter-of-gpu-1")).await?;
    agent.say(report("gpu-1", 1)).await?;
    let mut liar = Mouth::open(channel.clone(), Some("reporter-of-gpu-1")).await?;
    let status = liar.say(report("gpu-2", 1)).await.unwrap_err();
    assert!(
        status.code() == Code::PermissionDenied && status.message().contains("this token is of node gpu-1"),
        "{status}"
    );
    let mut any = Mouth::open(channel, Some("operator-of-all-here")).await?;
    any.say(report("gpu-2", 1)).await?;
    let page = scaler.until("/v1/status", "both", |page| page["nodes"]["known"] == 2).await?;
    assert_eq!(page["nodes"]["fresh"], 2);
    assert_eq!(scaler.metrics().await?.sum("darter_scaler_access_refusals_total", &[]), 3.0);
    ensure!(!scaler.log().contains("reporter-of-gpu-1"), "a token is in the log");
    Ok(())
}

#[tokio::test]
async fn demand_is_taken_of_who_may_say_it_as_a_number_of_now_and_of_nobody_else() -> Result<()> {
    if !is_here("demand_is_taken_of_who_may_say_it_as_a_number_of_now_and_of_nobody_else") {
        return Ok(());
    }
    let scaler = start().await?;
    let gateway = Some("gateway-of-models");
    let path = format!("/v1/demand/{LLM}");
    for (path, token, body, status, said) in [
        (&*path, None, r#"{"backlog": 1}"#, 401, "a token is needed"),
        (&*path, Some("operator-of-all-here"), r#"{"backlog": 1}"#, 403, "may not say demand"),
        ("/v1/demand/other/llm", gateway, r#"{"backlog": 1}"#, 403, "may not say demand of other/llm"),
        ("/v1/demand/models/none", gateway, r#"{"backlog": 1}"#, 404, "no such workload"),
        ("/v1/demand/models", gateway, r#"{"backlog": 1}"#, 404, "PUT /v1/demand/"),
        (&*path, gateway, r#"{"backlog": -1}"#, 400, "backlog -1 is not a number"),
        (&*path, gateway, r#"{"backlog": 1e300}"#, 400, "is not a number"),
        (&*path, gateway, r#"{"backlog": NaN}"#, 400, "expected value"),
        (&*path, gateway, r#"{"backlog": 1, "bocklog": 2}"#, 400, "bocklog"),
        (&*path, gateway, r#"{"backlog": 1, "ttl_ms": 900000}"#, 400, "ttl_ms 900000 is not from 1 to 90000"),
        (&*path, gateway, r#"{"backlog": 1, "age_ms": 90000}"#, 409, "90000 ms old"),
        (&*path, gateway, r#"{"backlog": 2.5, "age_ms": 1000}"#, 200, "taken"),
        (&*path, gateway, r#"{"backlog": 9, "age_ms": 60000}"#, 409, "a newer sample"),
    ] {
        let answer = scaler.order(Method::PUT, path, token, body).await?;
        assert_eq!((answer.status.as_u16(), answer.text().contains(said)), (status, true), "{body}: {}", answer.text());
    }
    scaler.until("/v1/explain/models/llm", "2.5 of 1 each", |page| page["keda"] == "KEDA is told 3").await?;
    let metrics = scaler.metrics().await?;
    assert_eq!(metrics.sum("darter_scaler_queue_depth", &[("workload", LLM)]), 2.5);
    assert_eq!(metrics.sum("darter_scaler_demand_refusals_total", &[("reason", "nonsense")]), 5.0);
    let answer = scaler.order(Method::POST, "/v1/freeze", gateway, r#"{"why": "x"}"#).await?;
    assert_eq!(answer.status, 403);
    let answer = scaler.order(Method::POST, "/v1/freeze", Some("operator-of-all-here"), r#"{"why": "x"}"#).await?;
    assert_eq!(answer.status, 200);
    Ok(())
}
