//! What is read: metrics, readiness, the state, decisions, and why.

use std::collections::BTreeMap;

use darter_base::exposition;
use http::{Request, StatusCode, header};
use hyper::body::Incoming;
use serde::Serialize;
use serde_json::value::RawValue;

use super::{Answer, Page, page, response, text};
use crate::config::Mode;
use crate::fleet::Actuator;
use crate::hub::Moment;
use crate::reason::{Reason, Subject};
use crate::render::render;
use crate::{Millis, State};

/// What `/readyz` says.
#[derive(Serialize)]
struct Ready {
    ready: bool,
    /// Whether this scaler is the one that acts: the others are not to be asked.
    leads: bool,
    /// Whether something was decided since it started.
    decided: bool,
}

/// What `/v1/explain/…` says.
#[derive(Serialize)]
struct Explained<'a> {
    about: &'a str,
    decision: u64,
    now: Millis,
    /// What KEDA is told of a workload, or why it is told nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    keda: Option<String>,
    /// The reasons, as sentences.
    text: String,
    reasons: Vec<&'a Reason>,
}

#[derive(Serialize)]
struct Known<'a> {
    decision: u64,
    now: Millis,
    state: &'a State,
}

/// What `/v1/status` says.
#[derive(Serialize)]
struct InShort {
    ready: bool,
    leads: bool,
    decision: u64,
    nodes: Nodes,
    /// Why everything is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    frozen: Option<String>,
    /// What KEDA is told of each.
    workloads: BTreeMap<String, String>,
}

/// By what their reports are worth.
#[derive(Default, Serialize)]
struct Nodes {
    known: usize,
    fresh: usize,
    stale: usize,
    unknown: usize,
}

#[derive(Serialize)]
struct Decisions {
    newest: u64,
    decisions: Vec<Box<RawValue>>,
}

impl Page {
    pub(super) fn metrics(&self, request: &Request<Incoming>) -> Answer {
        let page = self.hub.metrics.render(&self.hub);
        let accept = request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
        if exposition::wants_open(accept) {
            return response(StatusCode::OK, exposition::OPEN, page);
        }
        response(StatusCode::OK, exposition::PLAIN, exposition::plain(&page))
    }

    pub(super) fn readyz(&self) -> Answer {
        let (leads, decided) = (self.hub.lead.holds(), self.hub.newest.borrow().id > 0);
        let ready = Ready { ready: leads && decided, leads, decided };
        page(if ready.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &ready)
    }

    /// As it was at the newest decision.
    pub(super) fn state(&self) -> Answer {
        let Moment { id, now, state, .. } = &**self.hub.newest.borrow();
        page(StatusCode::OK, &Known { decision: *id, now: *now, state })
    }

    /// In short.
    pub(super) fn status(&self) -> Answer {
        let (leads, now) = (self.hub.lead.holds(), self.hub.clock.now());
        let newest = self.hub.newest.borrow().clone();
        let mut nodes = Nodes { known: newest.state.nodes.len(), ..Nodes::default() };
        for node in newest.state.nodes.values() {
            let age = node.report.as_ref().map(|report| now.since(report.heard));
            match age {
                Some(age) if age <= 3 * self.hub.policy.report_period_ms => nodes.fresh += 1,
                Some(age) if age <= self.hub.policy.report_lifetime_ms => nodes.stale += 1,
                _ => nodes.unknown += 1,
            }
        }
        let names = newest.state.workloads.keys();
        let workloads = names.map(|name| (name.clone(), self.keda(name).unwrap_or_default())).collect();
        let frozen = newest.state.freeze.as_ref().map(|freeze| freeze.why.clone());
        let ready = leads && newest.id > 0;
        page(StatusCode::OK, &InShort { ready, leads, decision: newest.id, nodes, frozen, workloads })
    }

    pub(super) fn decisions(&self, query: Option<&str>) -> Answer {
        let since = query.into_iter().flat_map(|query| query.split('&')).find_map(|part| part.strip_prefix("since="));
        let Ok(since) = since.unwrap_or("0").parse() else {
            return text(StatusCode::BAD_REQUEST, "since= is the id of a decision\n");
        };
        let raw = |line: String| RawValue::from_string(line).ok();
        let decisions = self.hub.history(since).into_iter().filter_map(raw).collect();
        page(StatusCode::OK, &Decisions { newest: self.hub.newest.borrow().id, decisions })
    }

    pub(super) fn explain(&self, about: &str) -> Answer {
        let newest = self.hub.newest.borrow().clone();
        let uid = newest.state.nodes.get(about).map(|node| node.name.as_str());
        let node = uid.unwrap_or(about);
        let pods: Vec<_> =
            newest.state.nodes.values().filter(|known| known.name == node).flat_map(|known| &known.pods).collect();
        let is_about = |reason: &&Reason| match &reason.subject {
            Subject::Node(name) => name == node,
            Subject::Workload(name) | Subject::Pool(name) => name == about,
            Subject::Image(digest) => digest == about,
            Subject::Pod(uid) => uid == about || pods.iter().any(|pod| pod.uid == *uid),
        };
        let reasons: Vec<_> = newest.decision.reasons.iter().filter(is_about).collect();
        let keda = about.contains('/').then(|| self.keda(about)).flatten();
        if reasons.is_empty() && keda.is_none() {
            return text(StatusCode::NOT_FOUND, &unknown(about, &newest));
        }
        let sentences = reasons.iter().map(|reason| render(reason)).collect();
        let (decision, now) = (newest.id, newest.now);
        page(StatusCode::OK, &Explained { about, decision, now, keda, text: sentences, reasons })
    }

    /// What KEDA is told of a workload; none of what is none.
    fn keda(&self, workload: &str) -> Option<String> {
        let answer = self.hub.fleet().answer(workload, self.hub.clock.now());
        let is_on = self.hub.mode(Actuator::Keda) == Mode::On;
        Some(match answer {
            Err(crate::fleet::NoAnswer::Unknown) => return None,
            Err(why) => format!("KEDA is told an error: {why}"),
            Ok(replicas) if is_on => format!("KEDA is told {replicas}"),
            Ok(replicas) => format!(
                "KEDA would be told {replicas}, and is told an error: this scaler only observes (actuators.keda)"
            ),
        })
    }
}

/// That it is not known, and some that are.
fn unknown(about: &str, newest: &Moment) -> String {
    let nodes = newest.state.nodes.values().map(|node| node.name.as_str());
    let names = newest.state.workloads.keys().map(String::as_str).chain(newest.state.pools.keys().map(String::as_str));
    let some: Vec<_> = names.chain(nodes).take(10).collect();
    match some.is_empty() {
        true => format!("nothing is known of {about}; nothing is known of anything yet\n"),
        false => format!("nothing is known of {about}; known are {}, …\n", some.join(", ")),
    }
}
