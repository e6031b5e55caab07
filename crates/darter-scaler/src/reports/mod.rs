//! Hears agents' reports: one stream each, thousands of them; answers each, and asks for what was decided.
//!
//! Who may report as which node is `access`'s word; whether a report is one, the fleet's. What is refused ends the
//! stream with the reason: an agent comes back by itself, and one that lies gets nowhere.

mod lines;

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use darter_api::report::reports_server::{Reports, ReportsServer};
use darter_api::report::{Directive, Report};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

pub use self::lines::{Lines, NotAsked};
use self::lines::{Said, WAITING_MAX};
use crate::access::{Access, Denied, Wish, bearer};
use crate::bell::{LATER, SOON};
use crate::fleet::Refusal;
use crate::hub::Hub;
use crate::metrics::ReasonLabels;

/// A report of an agent has 200 images with four names each: half a MiB. What is longer is none, and is not read.
const REPORT_MAX: usize = 1 << 20;
/// An agent reports at least once a minute. One that is silent for so long is gone, whatever its connection says.
const SILENCE_MAX: Duration = Duration::from_secs(150);
/// Between two reports that are read: an agent's news goes together within 100 ms, and who floods waits.
const READ_REST: Duration = Duration::from_millis(20);
/// An agent that reads no directive for so long is not there.
const WRITE_PATIENCE: Duration = Duration::from_secs(15);

/// The server of the service `darter.v1.Reports`.
pub fn server(hub: Arc<Hub>, access: Access, stop: CancellationToken) -> ReportsServer<Hearer> {
    ReportsServer::new(Hearer { hub, access, stop }).max_decoding_message_size(REPORT_MAX)
}

/// Hears.
#[derive(Debug, Clone)]
pub struct Hearer {
    hub: Arc<Hub>,
    access: Access,
    stop: CancellationToken,
}

/// Directives for one agent.
type Directives = Pin<Box<dyn Stream<Item = Said> + Send>>;

#[tonic::async_trait]
impl Reports for Hearer {
    type StreamStream = Directives;

    async fn stream(&self, request: Request<Streaming<Report>>) -> Result<Response<Directives>, Status> {
        let Some(from) = request.extensions().get::<SocketAddr>().copied() else {
            return Err(Status::internal("no address"));
        };
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let granted = self.access.may(from, bearer(header), Wish::Report).await.map_err(|denied| {
            let reason = denied.word();
            self.hub.metrics.access_refusals.get_or_create(&ReasonLabels { reason }).inc();
            debug!(%from, reason, "somebody who may not report");
            status(&denied)
        })?;
        if !self.hub.lead.holds() {
            return Err(Status::unavailable("another scaler leads"));
        }
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let stream = OneStream { hub: self.hub.clone(), number: self.hub.lines.number(), node: None, sender };
        let (reports, stop) = (request.into_inner(), self.stop.clone());
        tokio::spawn(stream.run(reports, granted.node, stop));
        let said = stream::unfold(receiver, |mut said| async { said.recv().await.map(|next| (next, said)) });
        Ok(Response::new(said.boxed()))
    }
}

/// As gRPC says it.
pub(crate) fn status(denied: &Denied) -> Status {
    match denied {
        Denied::NoToken | Denied::BadToken => Status::unauthenticated(denied.to_string()),
        Denied::Forbidden(_) => Status::permission_denied(denied.to_string()),
        Denied::Unavailable(_) => Status::unavailable(denied.to_string()),
    }
}

/// One agent.
struct OneStream {
    hub: Arc<Hub>,
    number: u64,
    /// Once it said who it is.
    node: Option<String>,
    sender: mpsc::Sender<Said>,
}

impl OneStream {
    async fn run(mut self, mut reports: Streaming<Report>, speaks_for: Option<String>, stop: CancellationToken) {
        self.hub.metrics.streams.inc();
        let end = stop.run_until_cancelled(self.hear(&mut reports, speaks_for.as_deref())).await;
        // A scaler that stops ends its streams cleanly: agents come back without a pause.
        if let Some(Some(status)) = end {
            let _ = self.sender.try_send(Err(status));
        }
        if let Some(node) = &self.node {
            self.hub.lines.close(node, self.number);
            debug!(%node, "an agent's stream ended");
        }
        self.hub.metrics.streams.dec();
    }

    /// Until the stream ends; why we end it, where it is us.
    async fn hear(&mut self, reports: &mut Streaming<Report>, speaks_for: Option<&str>) -> Option<Status> {
        loop {
            let report = match timeout(SILENCE_MAX, reports.message()).await {
                Err(_) => return Some(Status::deadline_exceeded("no report came for a long time")),
                Ok(Ok(None)) => return None,
                Ok(Ok(Some(report))) => report,
                Ok(Err(error)) => {
                    // Longer than a report is: tonic does not read it.
                    if matches!(error.code(), Code::OutOfRange | Code::ResourceExhausted) {
                        self.refused("too_long", &error.to_string());
                    }
                    return Some(error);
                }
            };
            if !self.hub.lead.holds() {
                return Some(Status::unavailable("another scaler leads"));
            }
            let accepted = report.sequence;
            if let Err(refusal) = self.take(report, speaks_for) {
                self.refused(refusal.word(), &refusal.to_string());
                return Some(match refusal {
                    Refusal::Identity { .. } | Refusal::Uid { .. } => Status::permission_denied(refusal.to_string()),
                    Refusal::Full { .. } => Status::resource_exhausted(refusal.to_string()),
                    _ => Status::invalid_argument(refusal.to_string()),
                });
            }
            let answer = self.sender.send(Ok(Directive { accepted, ..Directive::default() }));
            match timeout(WRITE_PATIENCE, answer).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return None,
                Err(_) => return Some(Status::deadline_exceeded("directives are not read")),
            }
            tokio::time::sleep(READ_REST).await;
        }
    }

    fn take(&mut self, report: Report, speaks_for: Option<&str>) -> Result<(), Refusal> {
        let name = report.node.as_ref().map(|node| node.name.clone()).unwrap_or_default();
        if let Some(node) = self.node.as_ref().filter(|node| **node != name) {
            return Err(Refusal::Identity { of: node.clone(), says: name });
        }
        let taken = self.hub.fleet().report(report, speaks_for, self.hub.clock.now())?;
        self.hub.metrics.reports.inc();
        if self.node.is_none() {
            self.hub.lines.open(&taken.node, self.number, &self.sender);
            info!(node = %taken.node, "an agent reports");
            self.node = Some(taken.node);
        }
        self.hub.bell.ring(if taken.is_news { SOON } else { LATER });
        Ok(())
    }

    fn refused(&self, reason: &'static str, detail: &str) {
        self.hub.metrics.report_refusals.get_or_create(&ReasonLabels { reason }).inc();
        warn!(node = self.node.as_deref().unwrap_or("(not known)"), reason, detail, "a report is not believed");
    }
}
