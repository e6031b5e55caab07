//! The lease on the agent's own pod, at a real kube-apiserver.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use darter_api::report::{CarriedOut, Directive, Protect, Protection, Refusal, Release, Report};
use darter_tests::agent::{Agent, Options};
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::Place;
use darter_tests::reports::Ear;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::Method;
use serde_json::{Value, json};

use crate::plain_options;

const NEEDS: [Need; 2] = [Need::Darter, Need::Kubernetes];
const KEY: &str = "karpenter.sh/do-not-disrupt";
/// So old are the pods of these tests.
const AGE: u64 = 3600;

/// A control plane with the agent's pod, another one, and a node.
struct Stage {
    plane: ControlPlane,
    ear: Ear,
    kubeconfig: PathBuf,
}

impl Stage {
    async fn start() -> Result<Self> {
        let plane = ControlPlane::start(&Place::Host).await?;
        plane.namespace("gpu").await?;
        let token = plane.service_account("gpu", "darter").await?;
        for name in ["darter-abcde", "other"] {
            plane.apply(&pod(name)).await?;
            let started = json!({ "status": { "phase": "Running", "startTime": an_hour_ago()? } });
            let path = format!("/api/v1/namespaces/gpu/pods/{name}/status");
            plane.call(Method::PATCH, &path, Some(("application/strategic-merge-patch+json", &started))).await?;
        }
        let spec = json!({ "providerID": "aws:///us-east-1a/i-0123456789abcdef0" });
        plane
            .apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1" }, "spec": spec }))
            .await?;
        let kubeconfig = plane.kubeconfig("gpu", &token)?;
        Ok(Self { plane, ear: Ear::start(&Place::Host, None).await?, kubeconfig })
    }

    /// What an agent needs for all this, and no more.
    async fn allow(&self) -> Result<()> {
        let pods = json!([{ "apiGroups": [""], "resources": ["pods"], "verbs": ["get", "patch"] }]);
        self.plane.allow("gpu", "darter", &pods).await?;
        let nodes = json!([{ "apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"] }]);
        self.plane.allow_everywhere("gpu", "darter", &nodes).await
    }

    fn options(&self) -> Options {
        plain_options(&self.ear)
            .set("kubernetes.node", "gpu-1")
            .set("kubernetes.pod", "darter-abcde")
            .set("kubernetes.kubeconfig", self.kubeconfig.display().to_string())
    }

    async fn pod(&self, name: &str) -> Result<Value> {
        self.plane.call(Method::GET, &format!("/api/v1/namespaces/gpu/pods/{name}"), None).await
    }

    /// The annotation of the agent's own pod.
    async fn annotation(&self) -> Result<Option<String>> {
        Ok(self.pod("darter-abcde").await?["metadata"]["annotations"][KEY].as_str().map(ToOwned::to_owned))
    }

    /// Says it, and waits for the report in which this is so.
    async fn order(
        &self,
        directive: Directive,
        what: &str,
        is_so: impl Fn(&CarriedOut, u64) -> bool,
    ) -> Result<CarriedOut> {
        let after = self.ear.heard().len();
        let sequence = self.ear.say(directive)?;
        let out = |report: &Report| report.carried_out.clone().unwrap_or_default();
        let heard = self.ear.hears(after, what, |heard| is_so(&out(&heard.report), sequence)).await?;
        Ok(out(&heard.report))
    }

    async fn protected(&self, seconds: u64) -> Result<Protection> {
        let is_so = |out: &CarriedOut, sequence| out.protection.as_ref().is_some_and(|held| held.sequence == sequence);
        let out = self.order(protect(seconds), "it is protected", is_so).await?;
        out.protection.context("no protection")
    }

    async fn refused(&self, directive: Directive) -> Result<Refusal> {
        let is_so =
            |out: &CarriedOut, sequence| out.protection_refused.as_ref().is_some_and(|it| it.sequence == sequence);
        let out = self.order(directive, "it is refused", is_so).await?;
        out.protection_refused.context("no refusal")
    }
}

fn pod(name: &str) -> Value {
    let spec = json!({
        "serviceAccountName": "darter", "automountServiceAccountToken": false, "nodeName": "gpu-1",
        "containers": [{ "name": "agent", "image": "darter" }],
    });
    let metadata = json!({ "namespace": "gpu", "name": name, "annotations": { "example.com/kept": "yes" } });
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec })
}

fn an_hour_ago() -> Result<String> {
    let output = std::process::Command::new("date").args(["-u", "-d", "-1 hour", "+%FT%TZ"]).output()?;
    ensure!(output.status.success(), "date: {}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn protect(seconds: u64) -> Directive {
    let protect = Protect { for_ms: seconds * 1000, reason: "a job runs".to_owned() };
    Directive { protect: Some(protect), ..Directive::default() }
}

fn release() -> Directive {
    Directive { release: Some(Release {}), ..Directive::default() }
}

/// Seconds of a duration as Go writes it.
fn seconds(text: &str) -> Result<u64> {
    let (mut total, mut number) = (0, String::new());
    for letter in text.chars() {
        let factor = match letter {
            '0'..='9' => {
                number.push(letter);
                continue;
            }
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => anyhow::bail!("{text}"),
        };
        total += number.parse::<u64>().with_context(|| text.to_owned())? * factor;
        number.clear();
    }
    ensure!(number.is_empty(), "{text}");
    Ok(total)
}

#[tokio::test]
async fn a_lease_is_written_on_the_own_pod_and_nothing_else_and_taken_back() -> Result<()> {
    if !can_run("a_lease_is_written_on_the_own_pod_and_nothing_else_and_taken_back", &NEEDS) {
        return Ok(());
    }
    let stage = Stage::start().await?;
    let agent = Agent::start(stage.options()).await?;
    stage.ear.next(0).await?;
    let (own, other) = (stage.pod("darter-abcde").await?, stage.pod("other").await?);
    // Who may not says what it needs, and goes on trying.
    let refusal = stage.refused(protect(600)).await?;
    ensure!(
        refusal.reason == "forbidden" && refusal.detail.contains("get and patch of the pod darter-abcde"),
        "{refusal:?}"
    );
    stage.allow().await?;
    eventually("it is written", async || Ok(stage.annotation().await?.is_some())).await?;
    let held = stage.protected(600).await?;
    ensure!((600_000..=750_000).contains(&held.remaining_ms) && held.reason == "a job runs", "{held:?}");
    ensure!(held.most_ms <= 6 * 3600 * 1000, "{held:?}");
    let written = stage.pod("darter-abcde").await?;
    let value = written["metadata"]["annotations"][KEY].as_str().context("no annotation")?.to_owned();
    // From the pod's start on: an hour, ten minutes, and a quarter of that. The test takes no minute.
    ensure!((AGE + 600..=AGE + 750 + 60).contains(&seconds(&value)?), "{value}");
    let managers = written["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    ensure!(managers.iter().any(|manager| manager["manager"] == "darter-agent"), "{managers:?}");
    // Nothing else of it, and nothing of any other.
    let mut rest = written.clone();
    rest["metadata"]["annotations"].as_object_mut().context("annotations")?.remove(KEY);
    for key in ["managedFields", "resourceVersion", "generation"] {
        rest["metadata"][key] = own["metadata"][key].clone();
    }
    assert_eq!(rest, own);
    assert_eq!(stage.pod("other").await?, other);
    // Heartbeats write nothing.
    for _ in 0..3 {
        stage.protected(600).await?;
    }
    assert_eq!(stage.pod("darter-abcde").await?["metadata"]["resourceVersion"], written["metadata"]["resourceVersion"]);
    assert_eq!(agent.metrics().await?.sum("darter_report_protected", &[]), 1.0);
    // What the API server knows of the node.
    let known = stage
        .ear
        .hears(0, "its node is known", |heard| heard.report.node.as_ref().is_some_and(|node| node.uid.is_some()));
    let node = known.await?.report.node.context("no node")?;
    assert_eq!(node.provider_id.as_deref(), Some("aws:///us-east-1a/i-0123456789abcdef0"));
    assert_eq!((node.pod.as_deref(), node.namespace.as_deref()), (Some("darter-abcde"), Some("gpu")));
    stage.order(release(), "it is over", |out, sequence| out.sequence == sequence && out.protection.is_none()).await?;
    eventually("it is taken off", async || Ok(stage.annotation().await?.is_none())).await?;
    let after = stage.pod("darter-abcde").await?;
    assert_eq!(after["metadata"]["annotations"], own["metadata"]["annotations"]);
    assert_eq!(agent.metrics().await?.sum("darter_report_protected", &[]), 0.0);
    Ok(())
}

#[tokio::test]
async fn what_a_user_wrote_stays_and_no_lease_outlasts_its_bound() -> Result<()> {
    if !can_run("what_a_user_wrote_stays_and_no_lease_outlasts_its_bound", &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start().await?;
    stage.allow().await?;
    let agent = Agent::start(stage.options().set("report.protect_max", "1m")).await?;
    stage.ear.next(0).await?;
    // Too long, and as long as may be.
    assert_eq!(stage.refused(protect(61)).await?.reason, "too_long");
    ensure!(stage.annotation().await?.is_none());
    let held = stage.protected(60).await?;
    ensure!(held.remaining_ms <= 60_000 && held.most_ms <= 60_000, "{held:?}");
    let value = stage.annotation().await?.context("no annotation")?;
    ensure!(seconds(&value)? <= AGE + 60 + 30, "{value}: the test took no half minute");
    // One that is shorter is over by itself, though nobody says a word, and then it goes.
    stage.ear.stop().await;
    drop(agent);
    stage.ear.start_again()?;
    let before = stage.ear.heard().len();
    let agent = Agent::start(stage.options()).await?;
    stage.ear.next(before).await?;
    stage.protected(2).await?;
    stage.ear.stop().await;
    eventually("it lapses", async || Ok(stage.annotation().await?.is_none())).await?;
    stage.ear.start_again()?;
    let before = stage.ear.heard().len();
    let first = stage.ear.next(before).await?.report.carried_out.context("nothing carried out")?;
    ensure!(first.protection.is_none(), "{first:?}");
    // A user's own.
    let path = "/api/v1/namespaces/gpu/pods/darter-abcde";
    let users = json!({ "metadata": { "annotations": { KEY: "true" } } });
    stage.plane.call(Method::PATCH, path, Some(("application/merge-patch+json", &users))).await?;
    let refusal = stage.refused(protect(600)).await?;
    ensure!(refusal.reason == "not_ours" && refusal.detail.contains("somebody else's"), "{refusal:?}");
    let after = stage.ear.say(release())?;
    stage
        .ear
        .hears(before, "it is released", |heard| {
            heard
                .report
                .carried_out
                .as_ref()
                .is_some_and(|out| out.sequence == after && out.protection_refused.is_none())
        })
        .await?;
    assert_eq!(stage.annotation().await?.as_deref(), Some("true"));
    // And one that he took over.
    let none = json!({ "metadata": { "annotations": { KEY: null } } });
    stage.plane.call(Method::PATCH, path, Some(("application/merge-patch+json", &none))).await?;
    stage.protected(600).await?;
    stage.plane.call(Method::PATCH, path, Some(("application/merge-patch+json", &users))).await?;
    assert_eq!(stage.refused(protect(3600)).await?.reason, "not_ours");
    stage.order(release(), "it is over", |out, sequence| out.sequence == sequence && out.protection.is_none()).await?;
    assert_eq!(stage.annotation().await?.as_deref(), Some("true"));
    ensure!(agent.metrics().await?.sum("darter_report_refusals_total", &[("reason", "not_ours")]) >= 2.0);
    Ok(())
}
