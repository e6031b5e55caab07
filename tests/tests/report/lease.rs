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
        plane.apply(&node("i-0123456789abcdef0")).await?;
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

    /// Writes the annotation as an agent does, in its name.
    async fn write_as_agent(&self, value: &str) -> Result<()> {
        let metadata = json!({ "name": "darter-abcde", "annotations": { KEY: value } });
        let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata });
        let path = "/api/v1/namespaces/gpu/pods/darter-abcde?fieldManager=darter-agent";
        self.plane.call(Method::PATCH, path, Some(("application/apply-patch+yaml", &pod))).await?;
        Ok(())
    }

    /// Writes the annotation as a user does, or takes it off.
    async fn write_as_user(&self, value: Option<&str>) -> Result<()> {
        let users = json!({ "metadata": { "annotations": { KEY: value } } });
        let path = "/api/v1/namespaces/gpu/pods/darter-abcde";
        self.plane.call(Method::PATCH, path, Some(("application/merge-patch+json", &users))).await?;
        Ok(())
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

fn node(instance: &str) -> Value {
    let spec = json!({ "providerID": format!("aws:///us-east-1a/{instance}") });
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "gpu-1" }, "spec": spec })
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
    stage.write_as_user(Some("true")).await?;
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
    stage.write_as_user(None).await?;
    stage.protected(600).await?;
    stage.write_as_user(Some("true")).await?;
    assert_eq!(stage.refused(protect(3600)).await?.reason, "not_ours");
    stage.order(release(), "it is over", |out, sequence| out.sequence == sequence && out.protection.is_none()).await?;
    assert_eq!(stage.annotation().await?.as_deref(), Some("true"));
    ensure!(agent.metrics().await?.sum("darter_report_refusals_total", &[("reason", "not_ours")]) >= 2.0);
    Ok(())
}

#[tokio::test]
async fn a_lease_of_an_earlier_life_is_told_and_ends_and_its_row_goes_on() -> Result<()> {
    if !can_run("a_lease_of_an_earlier_life_is_told_and_ends_and_its_row_goes_on", &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start().await?;
    stage.allow().await?;
    let mut agent = Agent::start(stage.options().set("report.protect_max", "1h")).await?;
    stage.ear.next(0).await?;
    let first = stage.protected(600).await?;
    let written = stage.pod("darter-abcde").await?;
    // As an agent that is killed for its memory: it says nothing, and its pod stays.
    agent.kill().await?;
    let before = stage.ear.heard().len();
    agent.start_again().await?;
    let protection = |report: &Report| report.carried_out.clone().unwrap_or_default().protection;
    let told = stage.ear.hears(before, "the lease is told", |heard| protection(&heard.report).is_some());
    let told = protection(&told.await?.report).context("no protection")?;
    ensure!(told.sequence == 0 && told.reason.contains("earlier life"), "{told:?}");
    // Whole seconds are written: the end is up to one later, the beginning up to one earlier.
    ensure!((1..=first.remaining_ms + 1000).contains(&told.remaining_ms), "{first:?} {told:?}");
    ensure!(told.most_ms < first.most_ms && told.most_ms > 3_400_000, "{first:?} {told:?}");
    assert_eq!(agent.metrics().await?.sum("darter_report_protected", &[]), 1.0);
    // What is written will do.
    let again = stage.protected(600).await?;
    ensure!(again.reason == "a job runs" && again.most_ms < first.most_ms, "{first:?} {again:?}");
    assert_eq!(stage.pod("darter-abcde").await?["metadata"]["resourceVersion"], written["metadata"]["resourceVersion"]);
    // One that is over before anybody asks for anything goes.
    stage.protected(2).await?;
    agent.kill().await?;
    ensure!(stage.annotation().await?.is_some());
    stage.ear.stop().await;
    agent.start_again().await?;
    eventually("it is taken off", async || Ok(stage.annotation().await?.is_none())).await?;
    // A row that was as long as it may be is that after a restart too.
    agent.kill().await?;
    stage.write_as_agent(&format!("0s{AGE}s")).await?;
    stage.ear.start_again()?;
    let before = stage.ear.heard().len();
    agent.start_again().await?;
    stage.ear.next(before).await?;
    assert_eq!(stage.refused(protect(60)).await?.reason, "spent");
    eventually("it is taken off", async || Ok(stage.annotation().await?.is_none())).await?;
    // One that somebody else wrote is neither told nor touched.
    agent.kill().await?;
    let users = format!("{AGE}s600s");
    stage.write_as_user(Some(&users)).await?;
    let before = stage.ear.heard().len();
    agent.start_again().await?;
    stage.ear.next(before).await?;
    assert_eq!(stage.refused(protect(700)).await?.reason, "not_ours");
    ensure!(stage.ear.heard().iter().skip(before).all(|heard| protection(&heard.report).is_none()));
    assert_eq!(stage.annotation().await?.as_deref(), Some(users.as_str()));
    Ok(())
}

#[tokio::test]
async fn a_node_that_is_made_anew_is_told_by_its_new_uid() -> Result<()> {
    if !can_run("a_node_that_is_made_anew_is_told_by_its_new_uid", &NEEDS) {
        return Ok(());
    }
    let stage = Stage::start().await?;
    // It is watched once for all: nobody asks for it by itself.
    let nodes = json!([{ "apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"] }]);
    stage.plane.allow_everywhere("gpu", "darter", &nodes).await?;
    let agent = Agent::start(stage.options()).await?;
    let known = async |instance: &str| {
        let provider = Some(format!("aws:///us-east-1a/{instance}"));
        let is_so = |report: &Report| report.node.as_ref().is_some_and(|node| node.provider_id == provider);
        let heard = stage.ear.hears(0, "its node is known", |heard| is_so(&heard.report)).await?;
        heard.report.node.and_then(|node| node.uid).context("no uid")
    };
    let first = known("i-0123456789abcdef0").await?;
    stage.plane.delete(&node("i-0123456789abcdef0")).await?;
    let nobody = |report: &Report| report.node.as_ref().is_some_and(|node| node.uid.is_none());
    let after = stage.ear.heard().len() - 1;
    stage.ear.hears(after, "it is gone", |heard| nobody(&heard.report)).await?;
    let made = stage.plane.apply(&node("i-0fedcba9876543210")).await?;
    let second = known("i-0fedcba9876543210").await?;
    ensure!(first != second && made["metadata"]["uid"] == second.as_str(), "{first} {second} {made}");
    // That its pod may not be looked at for a lease is told too, though nobody asked for one.
    ensure!(agent.log().contains("get and patch of the pod darter-abcde"), "{}", agent.log());
    ensure!(agent.metrics().await?.sum("darter_report_refusals_total", &[("reason", "forbidden")]) >= 1.0);
    Ok(())
}
