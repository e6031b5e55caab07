//! Several that want to lead, each a process: whatever happens to one of them, never two act in one term, and none
//! acts after a later one began.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use darter_tests::gate::Gate;
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::Place;
use darter_tests::process::{self, Process};
use darter_tests::proxy::Proxy;
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use http::Method;
use rustix::process::Signal;
use serde_json::json;

use crate::at_home;

const NEEDS: [Need; 1] = [Need::Kubernetes];

/// One act: when, in nanoseconds of a clock that all share, in which term, and by whom.
type Act = (u128, u32, String);

struct Stage {
    plane: ControlPlane,
    token: String,
    dir: Scratch,
    electors: BTreeMap<&'static str, Process>,
    /// Of the lease, and how soon it has to be renewed.
    times: [&'static str; 3],
}

impl Stage {
    async fn start(times: [&'static str; 3]) -> Result<Self> {
        let plane = ControlPlane::start(&Place::Host).await?;
        plane.namespace("gpu").await?;
        let token = plane.service_account("gpu", "darter-scaler").await?;
        plane.allow("gpu", "darter-scaler", &at_home()).await?;
        Ok(Self { plane, token, dir: Scratch::new()?, electors: BTreeMap::new(), times })
    }

    fn elect(&mut self, name: &'static str, kubeconfig: &Path) -> Result<()> {
        let mut command = process::command(env!("CARGO_BIN_EXE_elector"));
        command.arg(kubeconfig).arg(name).args(self.times);
        let elector = Process::start(name, command, &self.dir.join(name))?;
        self.electors.insert(name, elector);
        Ok(())
    }

    fn direct(&mut self, name: &'static str) -> Result<()> {
        let kubeconfig = self.plane.kubeconfig("gpu", &self.token)?;
        self.elect(name, &kubeconfig)
    }

    fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        self.electors.get(name).context("nobody")?.signal(signal)
    }

    /// All acts so far, in their order.
    fn acts(&self) -> Result<Vec<Act>> {
        let mut acts = Vec::new();
        for (name, elector) in &self.electors {
            let log = elector.log();
            // The last line may not be whole yet.
            let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
            for line in whole.lines() {
                let parse = || {
                    let [at, term, who] = line.split(' ').collect::<Vec<_>>()[..] else { return None };
                    Some((at.parse().ok()?, term.parse().ok()?, who.to_owned()))
                };
                acts.push(parse().with_context(|| format!("{name}: {line}"))?);
            }
        }
        acts.sort();
        Ok(acts)
    }

    /// Waits until somebody acts who was not one of `before`, and says who.
    async fn next(&self, what: &str, before: &[&str]) -> Result<&'static str> {
        let mut leader = None;
        let acts = async || {
            let acts = self.acts()?;
            let last = acts.last().filter(|(.., who)| !before.contains(&who.as_str()));
            leader = last.and_then(|(.., who)| self.electors.keys().find(|name| *name == who).copied());
            Ok(leader.is_some())
        };
        eventually(what, acts).await?;
        leader.context("nobody leads")
    }

    fn other(&self, name: &str) -> Result<&'static str> {
        self.electors.keys().find(|other| **other != name).copied().context("there is no other")
    }

    /// What has to hold whatever happened.
    fn never_two(&self) -> Result<Vec<Act>> {
        let acts = self.acts()?;
        let mut terms = BTreeMap::<u32, BTreeSet<&str>>::new();
        for (_, term, who) in &acts {
            terms.entry(*term).or_default().insert(who);
        }
        ensure!(terms.values().all(|who| who.len() == 1), "two acted in one term: {terms:?}");
        for pair in acts.windows(2) {
            ensure!(pair[0].1 <= pair[1].1, "after {:?} somebody of an earlier term acted: {:?}", pair[0], pair[1]);
        }
        Ok(acts)
    }
}

#[tokio::test]
async fn a_leader_that_was_stopped_does_not_act_when_it_wakes_up() -> Result<()> {
    if !can_run("a_leader_that_was_stopped_does_not_act_when_it_wakes_up", &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start(["4000", "2500", "400"]).await?;
    for name in ["a", "b"] {
        stage.direct(name)?;
    }
    for round in 0..3 {
        let first = stage.next("somebody leads", &[]).await?;
        let second = stage.other(first)?;
        stage.signal(first, Signal::STOP)?;
        stage.next(&format!("the other leads, {round}"), &[first]).await?;
        stage.signal(first, Signal::CONT)?;
        // It goes on when it hears that somebody else leads, or acts: either is seen once the other is stopped.
        stage.signal(second, Signal::STOP)?;
        stage.next(&format!("the first leads again, {round}"), &[second]).await?;
        stage.signal(second, Signal::CONT)?;
    }
    let acts = stage.never_two()?;
    ensure!(acts.iter().map(|act| act.1).max() >= Some(6), "{:?}", acts.last());
    Ok(())
}

#[tokio::test]
async fn a_leader_that_hears_nothing_any_more_has_stopped_before_another_begins() -> Result<()> {
    if !can_run("a_leader_that_hears_nothing_any_more_has_stopped_before_another_begins", &NEEDS) {
        return Ok(());
    }
    let mut stage = Stage::start(["4000", "2500", "400"]).await?;
    let proxy = Proxy::start(&Place::Host, &Place::Host, stage.plane.address())?;
    let kubeconfig = stage.plane.kubeconfig_by(&format!("https://{}", proxy.address()), "gpu", &stage.token)?;
    stage.elect("a", &kubeconfig)?;
    stage.next("the first leads", &[]).await?;
    stage.direct("b")?;
    for _ in 0..3 {
        if stage.next("somebody leads", &[]).await? == "b" {
            stage.signal("b", Signal::STOP)?;
            stage.next("the first leads", &["b"]).await?;
            stage.signal("b", Signal::CONT)?;
        }
        proxy.set_silent(true);
        stage.next("the other leads", &["a"]).await?;
        // What was held back comes now: a renewal that was sent long ago, among others.
        proxy.set_silent(false);
    }
    stage.never_two()?;
    Ok(())
}

#[tokio::test]
async fn a_leader_that_leaves_hands_over_at_once_and_one_that_is_killed_when_its_lease_is_over() -> Result<()> {
    let test = "a_leader_that_leaves_hands_over_at_once_and_one_that_is_killed_when_its_lease_is_over";
    if !can_run(test, &NEEDS) {
        return Ok(());
    }
    // Nobody waits for the end of this lease.
    let mut stage = Stage::start(["3600000", "1800000", "100"]).await?;
    for name in ["a", "b"] {
        stage.direct(name)?;
    }
    let first = stage.next("somebody leads", &[]).await?;
    stage.signal(first, Signal::TERM)?;
    let second = stage.next("the other leads", &[first]).await?;
    let mut gone = stage.electors.remove(first).context("nobody")?;
    ensure!(gone.exit(std::time::Duration::from_secs(60)).await?.success(), "{}", gone.log());
    stage.electors.insert(first, gone);
    stage.never_two()?;
    // A life of the same name is somebody else: it does not take for its own what its earlier life may still hold.
    stage.signal(second, Signal::KILL)?;
    let gate = Gate::start(&stage.plane)?;
    let mut command = process::command(env!("CARGO_BIN_EXE_elector"));
    let by_gate = stage.plane.kubeconfig_by(&format!("http://{}", gate.address()), "gpu", &stage.token)?;
    command.arg(by_gate).arg(second).args(stage.times);
    let again = Process::start("again", command, &stage.dir.join("again"))?;
    // Its third look: it has seen the lease, and waited.
    eventually("it has looked", async || Ok(gate.passed().len() >= 3)).await?;
    ensure!(again.log().is_empty(), "{}", again.log());
    ensure!(gate.passed().iter().all(|(method, _)| method == Method::GET), "{:?}", gate.passed());
    let body = json!({ "spec": { "holderIdentity": "" } });
    let path = "/apis/coordination.k8s.io/v1/namespaces/gpu/leases/darter-scaler";
    stage.plane.call(Method::PATCH, path, Some(("application/merge-patch+json", &body))).await?;
    eventually("it leads once the lease is nobody's", async || Ok(!again.log().is_empty())).await
}
