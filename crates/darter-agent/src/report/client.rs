//! The one stream to the scaler: opened, fed with the newest report, listened to, and opened again.
//!
//! Nothing queues. A report is gathered when the connection takes one, so what waits is never old; while nobody
//! takes any, none is made. Not here: what a report says, what becomes of a directive.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use darter_api::report::reports_client::ReportsClient;
use darter_api::report::{Directive, Report};
use darter_core::Digest;
use futures_util::{Stream, stream};
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tracing::{info, warn};

use super::Standing;
use super::bell::Bell;
use super::gather::{Sources, news};
use super::token::Token;
use crate::config::{self, ScalerUrl};
use crate::log::chain;
use crate::metrics::ReasonLabels;

/// A connection and its handshake take so long, or they are not to be had.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// The answer to the request comes by then: a scaler may ask an API server first who this is.
const ANSWER_PATIENCE: Duration = Duration::from_secs(15);
/// A scaler whose machine is gone is noticed after the two together.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_PATIENCE: Duration = Duration::from_secs(5);
/// One that answers pings and takes no report is noticed after three reports, and not before this.
const SILENCE_MIN: Duration = Duration::from_secs(15);
/// What changes within this goes together, so that no storm of changes is a storm of reports.
const TOGETHER: Duration = Duration::from_millis(100);
/// Reports that the scaler did not say that it took: with more of them nothing new is told until it does.
const UNTAKEN_MAX: u64 = 8;
/// Between two directives that are read: who floods this node waits.
const READ_REST: Duration = Duration::from_millis(20);
/// A directive has some lines.
const DIRECTIVE_MAX: usize = 64 * 1024;
/// Bytes of directives that may come before they are read.
const WINDOW: u32 = 128 * 1024;
/// Between two tries, doubled each time. Ten seconds after a scaler is back it is to know all nodes again.
const AGAIN_MIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(8);

/// Why there is no stream, or no more.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Lost {
    /// For the metric.
    reason: &'static str,
    /// For people.
    text: String,
}

impl Lost {
    const fn new(reason: &'static str, text: String) -> Self {
        Self { reason, text }
    }

    fn of_status(status: &Status) -> Self {
        let said = format!("{}: {}", status.code().description(), super::clip(status.message()));
        match status.code() {
            Code::Unauthenticated => Self::new(
                "unauthorized",
                format!(
                    "the scaler does not accept the token of report.token_file, or wants one where that is \"\"; is it \
                     one for its audience? {said}"
                ),
            ),
            Code::PermissionDenied => Self::new(
                "forbidden",
                format!(
                    "the scaler does not take reports of this node with this token; is kubernetes.node its name? {said}"
                ),
            ),
            Code::Unimplemented => {
                Self::new("answer", format!("what answers is no scaler of darter, or an older one: {said}"))
            }
            Code::Unavailable => Self::new("unreachable", format!("{said}{}", cause(status))),
            // Nobody said that: the connection broke under the stream.
            Code::Unknown | Code::Internal | Code::Cancelled if status.source().is_some() => {
                Self::new("ended", format!("the connection broke: {said}{}", cause(status)))
            }
            _ => Self::new("answer", format!("{said}{}", cause(status))),
        }
    }

    fn of_transport(error: &tonic::transport::Error) -> Self {
        let text = chain(error).to_string();
        if is_tls(error) {
            return Self::new(
                "tls",
                format!("the scaler does not show a certificate of report.ca for its name: {text}"),
            );
        }
        Self::new("unreachable", text)
    }
}

fn cause(status: &Status) -> String {
    status.source().map(|cause| format!(": {}", chain(cause))).unwrap_or_default()
}

/// Whether the handshake is what failed.
fn is_tls(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if error.is::<rustls::Error>() || inner.is_some_and(|inner| inner.is::<rustls::Error>()) {
            return true;
        }
        next = error.source();
    }
    false
}

/// How a stream ended.
enum End {
    Lost(Lost),
    /// There is another token: the scaler is to see it.
    Renewed,
}

/// Tells the scaler how this node is.
pub(super) struct Teller {
    pub(super) settings: config::Report,
    pub(super) scaler: ScalerUrl,
    pub(super) agent: String,
    pub(super) sources: Arc<Sources>,
    pub(super) standing: watch::Sender<Standing>,
}

impl Teller {
    /// Never ends.
    pub(super) async fn run(&self) {
        let mut failures = 0;
        let mut said = BTreeSet::new();
        loop {
            let began = self.sources.sequence.load(Ordering::Relaxed);
            let accepted = watch::Sender::new(began);
            let end = self.stream(&accepted).await;
            self.sources.metrics.report_connected.get_or_create(&[]).set(0);
            if *accepted.borrow() > began {
                failures = 0;
                said.clear();
            }
            let lost = match end {
                End::Renewed => {
                    // A file that changes all the time is no reason to connect all the time.
                    tokio::time::sleep(AGAIN_MIN).await;
                    continue;
                }
                End::Lost(lost) => lost,
            };
            let Lost { reason, text } = lost;
            self.sources.metrics.report_errors.get_or_create(&ReasonLabels { reason }).inc();
            if said.insert(reason) {
                warn!(scaler = %self.scaler, reason, detail = text, "the scaler does not hear this node; trying again");
            }
            self.standing.send_modify(|standing| (standing.connected, standing.error) = (None, Some(text)));
            tokio::time::sleep(wait(failures, &self.sources.node.name)).await;
            failures = failures.saturating_add(1);
        }
    }

    /// One connection.
    async fn stream(&self, accepted: &watch::Sender<u64>) -> End {
        let token = match &self.settings.token_file {
            Some(file) => match Token::read(file).await {
                Ok(token) => Some((file, token)),
                Err(text) => return End::Lost(Lost::new("token", text)),
            },
            None => None,
        };
        let talk = self.talk(token.as_ref().map(|(_, token)| token), accepted);
        let renewed = async {
            match &token {
                Some((file, token)) => token.changed(file).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            lost = talk => End::Lost(lost),
            () = renewed => {
                info!("the token of report.token_file is another one: connecting to the scaler anew");
                End::Renewed
            }
        }
    }

    async fn talk(&self, token: Option<&Token>, accepted: &watch::Sender<u64>) -> Lost {
        match self.open(token, accepted.subscribe()).await {
            Ok(directives) => self.listen(directives, accepted).await,
            Err(lost) => lost,
        }
    }

    async fn open(&self, token: Option<&Token>, accepted: watch::Receiver<u64>) -> Result<Streaming<Directive>, Lost> {
        let endpoint = self.endpoint().await?;
        let late = |_| Lost::new("unreachable", format!("no connection within {} s", CONNECT_PATIENCE.as_secs()));
        let channel: Channel = timeout(CONNECT_PATIENCE, endpoint.connect())
            .await
            .map_err(late)?
            .map_err(|error| Lost::of_transport(&error))?;
        let reports = Reports::new(self.sources.clone(), accepted, self.settings.interval.0);
        let mut request = Request::new(reports.stream());
        if let Some(bearer) = token.and_then(Token::bearer) {
            request.metadata_mut().insert("authorization", bearer);
        }
        self.sources.desk.begin_stream();
        let mut client = ReportsClient::new(channel).max_decoding_message_size(DIRECTIVE_MAX);
        let silent = |_| Lost::new("silent", format!("no answer within {} s", ANSWER_PATIENCE.as_secs()));
        let answer = timeout(ANSWER_PATIENCE, client.stream(request)).await.map_err(silent)?;
        Ok(answer.map_err(|status| Lost::of_status(&status))?.into_inner())
    }

    /// Certificates are read anew each time: they are replaced too.
    async fn endpoint(&self) -> Result<Endpoint, Lost> {
        let wrong = |error: tonic::transport::Error| Lost::new("tls", chain(&error).to_string());
        let endpoint = Endpoint::from(self.scaler.uri().clone())
            .user_agent(self.agent.clone())
            .map_err(wrong)?
            .connect_timeout(CONNECT_PATIENCE)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_PATIENCE)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .tcp_nodelay(true);
        let Some(ca) = self.settings.ca.as_ref().filter(|_| self.scaler.is_tls()) else { return Ok(endpoint) };
        let pem = tokio::fs::read(ca)
            .await
            .map_err(|error| Lost::new("tls", format!("cannot read {} (report.ca): {error}", ca.display())))?;
        let name = self.settings.server_name.clone().unwrap_or_else(|| self.scaler.host().to_owned());
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).domain_name(name);
        endpoint
            .tls_config(tls)
            .map_err(|error| Lost::new("tls", format!("cannot use {} (report.ca): {}", ca.display(), chain(&error))))
    }

    /// Until the stream ends.
    async fn listen(&self, mut directives: Streaming<Directive>, accepted: &watch::Sender<u64>) -> Lost {
        self.sources.metrics.report_connected.get_or_create(&[]).set(1);
        self.standing.send_modify(|standing| standing.connected = Some(Instant::now()));
        let began = *accepted.borrow();
        let patience = SILENCE_MIN.max(self.settings.interval.0 * 3);
        loop {
            let directive = match timeout(patience, directives.message()).await {
                Err(_) => {
                    return Lost::new("silent", format!("the scaler took no report for {} s", patience.as_secs()));
                }
                Ok(Ok(None)) => return Lost::new("ended", "the scaler ended the stream".to_owned()),
                Ok(Ok(Some(directive))) => directive,
                Ok(Err(status)) => {
                    let lost = Lost::of_status(&status);
                    if status.code() == Code::OutOfRange {
                        self.sources.desk.too_large(lost.text.clone());
                    }
                    return lost;
                }
            };
            let sent = self.sources.sequence.load(Ordering::Relaxed);
            // Of a report that was never sent nobody can say that he took it.
            if (began + 1..=sent).contains(&directive.accepted)
                && accepted.send_if_modified(|last| raise(last, directive.accepted))
            {
                self.taken();
            }
            self.sources.desk.take(directive);
            tokio::time::sleep(READ_REST).await;
        }
    }

    fn taken(&self) {
        self.sources.metrics.reports_accepted.inc();
        self.standing.send_modify(|standing| {
            if standing.accepted.is_none() || standing.error.is_some() {
                info!(scaler = %self.scaler, "the scaler hears this node");
            }
            (standing.accepted, standing.error) = (Some(Instant::now()), None);
        });
    }
}

fn raise(last: &mut u64, to: u64) -> bool {
    let is_news = to > *last;
    *last = to.max(*last);
    is_news
}

/// How long to wait after so many failures in a row: each node another time, and the same one the same, so that a
/// scaler that comes back is not asked by all at once.
fn wait(failures: u32, node: &str) -> Duration {
    let most = AGAIN_MIN.saturating_mul(1 << failures.min(16)).min(AGAIN_MAX);
    let hash = Digest::of(node.as_bytes());
    let place = hash.as_bytes().first().copied().unwrap_or_default();
    // From the half of it to all of it.
    most / 2 + most / 2 * u32::from(place) / u32::from(u8::MAX)
}

/// The reports of one connection.
struct Reports {
    sources: Arc<Sources>,
    bell: Bell,
    accepted: watch::Receiver<u64>,
    interval: Duration,
    /// What was told last, and when.
    last: Option<(Report, Instant)>,
    sent: u64,
}

impl Reports {
    fn new(sources: Arc<Sources>, accepted: watch::Receiver<u64>, interval: Duration) -> Self {
        let (bell, sent) = (Bell::new(&sources), *accepted.borrow());
        Self { sources, bell, accepted, interval, last: None, sent }
    }

    fn stream(self) -> impl Stream<Item = Report> + Send + 'static {
        stream::unfold(self, |mut reports| async move {
            let report = reports.next().await?;
            Some((report, reports))
        })
    }

    /// The next one: at once at first, then with the next news, at the latest after the interval.
    async fn next(&mut self) -> Option<Report> {
        // An error is the end of the connection.
        let sent = self.sent;
        self.accepted.wait_for(|accepted| sent.saturating_sub(*accepted) < UNTAKEN_MAX).await.ok()?;
        let mut report = loop {
            let Some((told, at)) = &self.last else { break self.sources.gather().await };
            let due = *at + self.interval;
            tokio::select! {
                () = self.bell.rings() => {}
                () = tokio::time::sleep_until(due.into()) => break self.sources.gather().await,
            }
            tokio::time::sleep(TOGETHER).await;
            self.bell.hush();
            let report = self.sources.gather().await;
            if news(&report) != *told {
                break report;
            }
        };
        self.last = Some((news(&report), Instant::now()));
        self.sent = self.sources.next_sequence();
        report.sequence = self.sent;
        self.sources.metrics.reports.inc();
        Some(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_come_back_at_different_times_and_each_within_its_bound() {
        let first = |node: &str| wait(0, node);
        assert_eq!(first("gpu-1"), first("gpu-1"));
        let mut waits: Vec<_> = (0..100).map(|n| first(&format!("gpu-{n}"))).collect();
        waits.sort_unstable();
        assert!(waits[0] >= AGAIN_MIN / 2 && waits[99] <= AGAIN_MIN);
        assert!(waits[80] - waits[20] > Duration::from_millis(50), "{waits:?}");
        for failures in [7, 16, 31, 32, u32::MAX] {
            assert!((AGAIN_MAX / 2..=AGAIN_MAX).contains(&wait(failures, "gpu-1")), "{failures}");
        }
    }

    #[test]
    fn a_refusal_names_the_way_out() {
        let told = |status: Status| Lost::of_status(&status);
        let lost = told(Status::unauthenticated("no"));
        assert!(lost.reason == "unauthorized" && lost.text.contains("report.token_file"), "{lost:?}");
        let lost = told(Status::permission_denied("no"));
        assert!(lost.reason == "forbidden" && lost.text.contains("kubernetes.node"), "{lost:?}");
        assert_eq!(told(Status::unimplemented("")).reason, "answer");
        assert_eq!(told(Status::unavailable("")).reason, "unreachable");
    }
}
