//! The real `darter scaler`, and who speaks to it as an agent would: the real protocol, whatever is said.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use darter_api::report::reports_client::ReportsClient;
use darter_api::report::{Directive, Gpu, GpuReadiness, GpuState, Gpus, Idleness, Image, Node, Readiness, Report};
use futures_util::stream;
use http::{Method, Request, header};
use http_body_util::Full;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use toml_edit::DocumentMut;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Status, Streaming};

use crate::agent::{Metrics, darter};
use crate::http::{Answer, Client};
use crate::net::{Place, Port};
use crate::process::{self, Output, Process, Usage};
use crate::scratch::Scratch;

/// Past this it does not come at all, whatever else this machine does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running scaler.
pub struct Scaler {
    process: Process,
    grpc: SocketAddr,
    http: SocketAddr,
    scheme: &'static str,
    _ports: [Port; 2],
    // Last: the directory goes when the process is gone.
    dir: Scratch,
}

impl Scaler {
    /// Starts one with this configuration, in a directory of its own, and waits until it is ready. `DIR` in the text is
    /// that directory, which `prepare` may put files in.
    pub async fn start_with(text: &str, prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let dir = Scratch::new()?;
        prepare(dir.path())?;
        let ports = [Place::Host.port()?, Place::Host.port()?];
        let [grpc, http] = [&ports[0], &ports[1]].map(|port| SocketAddr::new(Place::Host.address(), port.number()));
        let mut document: DocumentMut = text.replace("DIR", &dir.path().display().to_string()).parse()?;
        for (section, key, value) in [
            ("grpc", "listen", grpc.to_string()),
            ("http", "listen", http.to_string()),
            ("record", "dir", dir.join("record").display().to_string()),
            ("log", "level", "info,darter_scaler=debug".to_owned()),
        ] {
            let table = document.entry(section).or_insert_with(|| toml_edit::Item::Table(toml_edit::Table::new()));
            if table.get(key).is_none() {
                table[key] = toml_edit::value(value);
            }
        }
        let has_cert = document["grpc"].get("cert").is_some();
        let scheme = if has_cert { "https" } else { "http" };
        std::fs::write(dir.join("scaler.toml"), document.to_string())?;
        let process = launch(&dir)?;
        let mut scaler = Self { process, grpc, http, scheme, _ports: ports, dir };
        scaler.ready().await?;
        Ok(scaler)
    }

    /// The same, where nothing has to be there before.
    pub async fn start(text: &str) -> Result<Self> {
        Self::start_with(text, |_| Ok(())).await
    }

    /// Starts it again, with the same files and at the same addresses.
    pub async fn start_again(&mut self) -> Result<()> {
        self.process = launch(&self.dir)?;
        self.ready().await
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = match self.get("/readyz").await {
                Ok(answer) if answer.status == 200 => return Ok(()),
                Ok(answer) => answer.text(),
                Err(error) => format!("{error:#}"),
            };
            if let Some(status) = self.process.exited()? {
                bail!("darter scaler: {status}\n{}", process::tail(&self.log()));
            }
            ensure!(Instant::now() < deadline, "darter scaler is not ready: {state}\n{}", process::tail(&self.log()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks it to end and waits until it has, with status 0.
    pub async fn stop(&mut self) -> Result<()> {
        self.process.signal(rustix::process::Signal::TERM)?;
        let status = self.process.exit(PATIENCE).await?;
        ensure!(status.success(), "darter scaler: {status}\n{}", process::tail(&self.log()));
        Ok(())
    }

    /// Where agents and KEDA find it.
    pub fn grpc(&self) -> String {
        format!("{}://{}", self.scheme, self.grpc)
    }

    /// Where everybody else does.
    pub fn http(&self) -> String {
        format!("http://{}", self.http)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Everything it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// What it costs.
    pub fn usage(&self) -> Result<Usage> {
        self.process.usage()
    }

    /// GET of a path.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        Client::new(Place::Host).get(&format!("{}{path}", self.http())).await
    }

    /// GET of JSON.
    pub async fn json(&self, path: &str) -> Result<Value> {
        let answer = self.get(path).await?;
        ensure!(answer.status == 200, "{path}: {}: {}", answer.status, answer.text());
        Ok(serde_json::from_slice(&answer.body)?)
    }

    /// An order, with a token or without.
    pub async fn order(&self, method: Method, path: &str, token: Option<&str>, body: &str) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.http()));
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        Client::new(Place::Host).whole(request.body(Full::new(Bytes::from(body.to_owned())))?).await
    }

    /// So much waits.
    pub async fn demand(&self, workload: &str, backlog: u64) -> Result<()> {
        let body = format!("{{\"backlog\": {backlog}}}");
        let answer = self.order(Method::PUT, &format!("/v1/demand/{workload}"), None, &body).await?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
        Ok(())
    }

    /// Its metrics now.
    pub async fn metrics(&self) -> Result<Metrics> {
        let answer = self.get("/metrics").await?;
        ensure!(answer.status == 200, "/metrics: {}", answer.status);
        Ok(Metrics::parse(&answer.text()))
    }

    /// `darter` with these words, as a user calls it.
    pub async fn darter(&self, words: &[&str]) -> Result<Output> {
        let mut command = darter(&Place::Host)?;
        command.args(words).env("DARTER_SCALER_URL", self.http());
        process::run("darter", command, PATIENCE).await
    }

    /// Looks at a page until it is as it should be: what is decided is not told by a push over HTTP.
    pub async fn until(&self, path: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.json(path).await;
            match &found {
                Ok(value) if is_so(value) => return found,
                _ => {
                    ensure!(Instant::now() < deadline, "{path}: not {what}: {found:#?}\n{}", process::tail(&self.log()))
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a counter is above nothing.
    pub async fn until_counted(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.metrics().await?.sum(name, labels) == 0.0 {
            ensure!(Instant::now() < deadline, "{name} {labels:?} is still 0\n{}", process::tail(&self.log()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The same of a sentence about something.
    pub async fn says(&self, about: &str, words: &str) -> Result<String> {
        let path = format!("/v1/explain/{about}");
        let is_so = |page: &Value| page["text"].as_str().is_some_and(|text| text.contains(words));
        let page = self.until(&path, words, is_so).await?;
        Ok(page["text"].as_str().unwrap_or_default().to_owned())
    }
}

fn launch(dir: &Scratch) -> Result<Process> {
    let mut command = darter(&Place::Host)?;
    command.arg("scaler").arg("--config").arg(dir.join("scaler.toml"));
    Process::start("darter scaler", command, &dir.join("log"))
}

/// A channel to a server, which shows a certificate of this authority where it is https.
pub async fn channel(url: &str, authority: Option<&str>) -> Result<Channel> {
    let mut endpoint: Endpoint = url.parse()?;
    if let Some(pem) = authority {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).domain_name("127.0.0.1");
        endpoint = endpoint.tls_config(tls)?;
    }
    Ok(endpoint.connect().await?)
}

/// One stream of reports, in the hands of a test.
pub struct Mouth {
    reports: mpsc::Sender<Report>,
    directives: Streaming<Directive>,
}

impl Mouth {
    /// Opens one.
    pub async fn open(channel: Channel, token: Option<&str>) -> Result<Self, Status> {
        let (reports, mut said) = mpsc::channel(16);
        let stream = stream::poll_fn(move |context| said.poll_recv(context));
        let mut request = tonic::Request::new(stream);
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().map_err(|_| Status::internal("no token"))?;
            request.metadata_mut().insert("authorization", value);
        }
        let directives = ReportsClient::new(channel).max_encoding_message_size(usize::MAX).stream(request).await?;
        Ok(Self { reports, directives: directives.into_inner() })
    }

    /// Opens one to this scaler, in plaintext and without a token.
    pub async fn to(scaler: &Scaler) -> Result<Self> {
        Ok(Self::open(channel(&scaler.grpc(), None).await?, None).await?)
    }

    /// Says a report, and waits until it is taken; the directives that came meanwhile, or why it was not.
    pub async fn say(&mut self, report: Report) -> Result<Vec<Directive>, Status> {
        let sequence = report.sequence;
        if self.reports.send(report).await.is_err() {
            return Err(self.end().await);
        }
        let mut came = Vec::new();
        loop {
            let directive = self.next().await?;
            let is_it = directive.accepted == sequence;
            came.push(directive);
            if is_it {
                return Ok(came);
            }
        }
    }

    /// The next directive.
    pub async fn next(&mut self) -> Result<Directive, Status> {
        let late = |_| Status::deadline_exceeded("no directive came in the test's patience");
        let next = tokio::time::timeout(PATIENCE, self.directives.message()).await.map_err(late)??;
        next.ok_or_else(|| Status::ok("the stream ended"))
    }

    /// How the stream ended.
    pub async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

/// A report of a node with one idle GPU and one image, of the agent's first life.
pub fn report(node: &str, sequence: u64) -> Report {
    let idleness = Idleness { state: GpuState::LoadedIdle.into(), idle_ms: Some(120_000), ..Idleness::default() };
    let gpu = Gpu {
        uuid: format!("GPU-{node}"),
        idleness: Some(idleness),
        readiness: Some(GpuReadiness::Ready.into()),
        ..Gpu::default()
    };
    Report {
        node: Some(Node { name: node.to_owned(), ..Node::default() }),
        instance: "first".to_owned(),
        sequence,
        running_ms: 3_600_000,
        readiness: Some(Readiness { ready: true, ..Readiness::default() }),
        gpus: Some(Gpus { gpus: vec![gpu], readiness: Some(GpuReadiness::Ready.into()), ..Gpus::default() }),
        images: vec![image(1)],
        ..Report::default()
    }
}

/// A whole image that was used a minute ago.
pub fn image(n: u64) -> Image {
    let digest = darter_core::Digest::of(&n.to_le_bytes()).to_string();
    Image {
        digest,
        references: vec![format!("registry.example/team/app:v{n}")],
        size_bytes: 11_200_000_000,
        held_bytes: 11_200_000_000,
        is_complete: true,
        used_ms: Some(60_000),
        ..Image::default()
    }
}

/// The value of a JSON page at a path of keys.
pub fn at<'a>(page: &'a Value, path: &str) -> Result<&'a Value> {
    path.split('.').try_fold(page, |value, key| value.get(key)).with_context(|| format!("no {path} in {page:#}"))
}
