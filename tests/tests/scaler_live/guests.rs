//! KEDA that is held to a certificate: who has the right one is answered, nobody else is, also after an exchange of
//! files under a running scaler.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_tests::keda::{Keda, Polled};
use darter_tests::scaler::{Mouth, Scaler, channel, report};
use darter_tests::tls::{Authority, Identity};
use tokio::time::Instant;
use tonic::Code;

use crate::{LLM, ONE, is_here};

const NAME: &str = "keda-operator.keda.svc";
const TOKEN: &str = "0123456789abcdef0";
const HELD: &str = "[grpc]\ncert = 'DIR/cert.pem'\nkey = 'DIR/key.pem'\nkeda_ca = 'DIR/keda.pem'\n";
const TURNED: &str = "darter_scaler_tls_refusals_total";
const TWO: Polled = Polled { replicas: 2, is_active: true };

/// A scaler that shows a certificate of one authority, and takes KEDA's of the other.
struct Stage {
    scaler: Scaler,
    ours: Authority,
    kedas: Authority,
}

impl Stage {
    async fn new(also: &str) -> Result<Self> {
        let (ours, kedas) = (Authority::new()?, Authority::new()?);
        let tokens = "[access]\nmode = 'tokens'\ntoken_file = 'DIR/tokens'\n";
        let scaler = Scaler::start_with(&format!("{ONE}\n{HELD}{also}{tokens}"), |dir| {
            ours.issue(&["127.0.0.1"])?.write(dir)?;
            std::fs::write(dir.join("keda.pem"), kedas.pem())?;
            Ok(std::fs::write(dir.join("tokens"), format!("{TOKEN} report:* demand:*\n"))?)
        })
        .await?;
        let path = format!("/v1/demand/{LLM}");
        let said = scaler.order(http::Method::PUT, &path, Some(TOKEN), r#"{"backlog": 2}"#).await?;
        ensure!(said.status == 200, "{}", said.text());
        scaler.until("/v1/explain/models/llm", "raised", |page| page["keda"] == "KEDA is told 2").await?;
        Ok(Self { scaler, ours, kedas })
    }

    fn keda(&self, shows: Option<&Identity>) -> Result<Keda> {
        Keda::over_tls(&self.scaler.grpc(), &self.ours.pem(), shows, ("models", "llm"))
    }

    async fn turned(&self, reason: &str) -> Result<f64> {
        Ok(self.scaler.metrics().await?.sum(TURNED, &[("reason", reason)]))
    }
}

/// As the kubelet exchanges a Secret: each file at once, never half of one.
fn exchange(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    Ok(std::fs::rename(&new, path)?)
}

/// Until it is answered so; in the end, what it was answered.
async fn polls(keda: &mut Keda, is_so: impl Fn(&Result<Polled, tonic::Status>) -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = keda.poll().await;
        if is_so(&answer) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "still {answer:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn keda_is_answered_with_the_right_certificate_alone_and_agents_need_none() -> Result<()> {
    if !is_here("keda_is_answered_with_the_right_certificate_alone_and_agents_need_none") {
        return Ok(());
    }
    let stage = Stage::new(&format!("keda_names = ['other.example', '{NAME}']\n")).await?;
    let right = stage.kedas.issue(&[NAME])?;
    let mut keda = stage.keda(Some(&right))?;
    assert_eq!(keda.poll().await?, TWO);
    keda.listen().active().await?;
    let none = stage.keda(None)?.poll().await.unwrap_err();
    assert_eq!(none.code(), Code::Unauthenticated);
    assert!(none.message().contains("tlsClientCert and tlsClientKey"), "it says what is missing: {none}");
    stage.scaler.until_counted(TURNED, &[("reason", "no_certificate")]).await?;
    // It is a connection that is turned away, not a call: the next one is another connection.
    let mut again = stage.keda(None)?;
    for turn in [2.0, 3.0] {
        polls(&mut again, |answer| answer.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated)).await?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while stage.turned("no_certificate").await? < turn {
            ensure!(Instant::now() < deadline, "connection {turn} was not turned away");
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(again.poll().await);
        }
    }
    let others = Authority::new()?;
    for (shows, reason) in [
        (others.issue(&[NAME])?, "authority"),
        (stage.kedas.issue_within(&[NAME], -7200, -3600)?, "expired"),
        (stage.kedas.issue(&["keda-operator.other.svc"])?, "name"),
    ] {
        assert_eq!(stage.turned(reason).await?, 0.0, "{reason}");
        let refused = stage.keda(Some(&shows))?.poll().await;
        ensure!(refused.is_err(), "{reason}: {refused:?}");
        assert_eq!(stage.turned(reason).await?, 1.0, "{reason}");
    }
    let early = stage.kedas.issue_within(&[NAME], 3600, 7200)?;
    ensure!(stage.keda(Some(&early))?.poll().await.is_err(), "one that does not hold yet is taken");
    assert_eq!(stage.turned("expired").await?, 2.0);
    // Who trusts another authority than the scaler's.
    let distrusts = Keda::over_tls(&stage.scaler.grpc(), &others.pem(), Some(&right), ("models", "llm"))?.poll().await;
    ensure!(distrusts.is_err(), "{distrusts:?}");
    stage.scaler.until_counted(TURNED, &[("reason", "untrusted")]).await?;
    let plain = stage.scaler.grpc().replace("https", "http");
    ensure!(Keda::new(&plain, "models", "llm", &[])?.poll().await.is_err(), "plaintext is answered");
    stage.scaler.until_counted(TURNED, &[("reason", "handshake")]).await?;
    // Agents come through the same door, with a token and no certificate.
    let mut agent = Mouth::open(channel(&stage.scaler.grpc(), Some(&stage.ours.pem())).await?, Some(TOKEN)).await?;
    agent.say(report("gpu-1", 1)).await?;
    assert_eq!(keda.poll().await?, TWO, "who was there stays");
    let log = stage.scaler.log();
    for said in ["of another authority than grpc.keda_ca", "has none of grpc.keda_names", "showed no certificate"] {
        assert_eq!(log.matches(said).count().min(1), 1, "{said}: {log}");
    }
    let warned = log.lines().filter(|line| line.contains("WARN") && line.contains("showed no certificate")).count();
    assert_eq!(warned, 1, "who comes again and again does not fill the log");
    ensure!(!log.contains(TOKEN) && !log.contains("BEGIN"), "a secret is in the log");
    Ok(())
}

#[tokio::test]
async fn files_that_are_exchanged_hold_for_who_comes_and_for_who_is_there() -> Result<()> {
    if !is_here("files_that_are_exchanged_hold_for_who_comes_and_for_who_is_there") {
        return Ok(());
    }
    let mut stage = Stage::new("").await?;
    let mut old = stage.keda(Some(&stage.kedas.issue(&[NAME])?))?;
    assert_eq!(old.poll().await?, TWO, "any name of that authority, where none is named");
    let short = stage.kedas.issue_within(&[NAME], -3600, 8)?;
    let mut short = stage.keda(Some(&short))?;
    assert_eq!(short.poll().await?, TWO);
    // It expires while it is connected, and is not answered for ever because it was in time.
    polls(&mut short, Result::is_err).await?;
    stage.scaler.until_counted(TURNED, &[("reason", "expired")]).await?;
    assert_eq!(old.poll().await?, TWO);

    let dir = stage.scaler.dir().to_owned();
    exchange(&dir.join("keda.pem"), "of no use\n")?;
    assert_eq!(stage.keda(Some(&stage.kedas.issue(&[NAME])?))?.poll().await?, TWO, "what was read before holds");
    let log = stage.scaler.log();
    assert!(
        log.contains("the certificates that were read before hold") && log.contains("no certificate in it"),
        "{log}"
    );

    let after = Authority::new()?;
    exchange(&dir.join("keda.pem"), &after.pem())?;
    assert_eq!(stage.keda(Some(&after.issue(&[NAME])?))?.poll().await?, TWO);
    ensure!(stage.keda(Some(&stage.kedas.issue(&[NAME])?))?.poll().await.is_err(), "the old authority is still taken");
    // Who is there with one of the old authority has to go too.
    polls(&mut old, Result::is_err).await?;
    ensure!(stage.turned("authority").await? >= 2.0, "it was not turned away for its authority");

    // The scaler's own: certificate and key are two files, and between the two exchanges the pair is none.
    let before = std::mem::replace(&mut stage.ours, Authority::new()?);
    let (certificate, key) = stage.ours.issue(&["127.0.0.1"])?.pem();
    exchange(&dir.join("cert.pem"), &certificate)?;
    let mut between =
        Keda::over_tls(&stage.scaler.grpc(), &before.pem(), Some(&after.issue(&[NAME])?), ("models", "llm"))?;
    assert_eq!(between.poll().await?, TWO, "half of a pair is shown to nobody");
    exchange(&dir.join("key.pem"), &key)?;
    assert_eq!(stage.keda(Some(&after.issue(&[NAME])?))?.poll().await?, TWO);
    Ok(())
}

#[tokio::test]
async fn a_scaler_whose_certificates_cannot_be_used_does_not_start_and_says_which() -> Result<()> {
    if !is_here("a_scaler_whose_certificates_cannot_be_used_does_not_start_and_says_which") {
        return Ok(());
    }
    let ours = Authority::new()?;
    for (text, said) in [(None, "No such file"), (Some("no certificate at all\n"), "there is no certificate in it")] {
        let configured = format!("{ONE}\n{HELD}");
        let scaler = Scaler::start_with(&configured, |dir| {
            ours.issue(&["127.0.0.1"])?.write(dir)?;
            text.map_or(Ok(()), |text| Ok(std::fs::write(dir.join("keda.pem"), text)?))
        });
        let error = format!("{:#}", scaler.await.err().context("it starts")?);
        for said in ["keda.pem", "(grpc.keda_ca)", "leave the key out where KEDA shows none", said] {
            assert!(error.contains(said), "{said}: {error}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn over_tls_keda_needs_no_certificate_where_none_is_asked_for() -> Result<()> {
    if !is_here("over_tls_keda_needs_no_certificate_where_none_is_asked_for") {
        return Ok(());
    }
    let ours = Authority::new()?;
    let configured = format!("{ONE}\n{}", HELD.replace("keda_ca = 'DIR/keda.pem'\n", ""));
    let scaler = Scaler::start_with(&configured, |dir| ours.issue(&["127.0.0.1"])?.write(dir).map(|_| ()));
    let scaler = scaler.await?;
    scaler.demand(LLM, 2).await?;
    scaler.until("/v1/explain/models/llm", "raised", |page| page["keda"] == "KEDA is told 2").await?;
    assert_eq!(Keda::over_tls(&scaler.grpc(), &ours.pem(), None, ("models", "llm"))?.poll().await?, TWO);
    Ok(())
}
