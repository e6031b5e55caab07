//! The darter agent itself, the real binary, in a node's namespace or on the host.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use tokio::time::Instant;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, Value};

use crate::http::{Answer, Client};
use crate::net::{Place, Port};
use crate::process::{self, Process, Usage};
use crate::scratch::Scratch;
use crate::stage::eventually;
use crate::tools;

/// Past this an agent does not start, or does not stop, at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// The configuration an agent is started with: only what differs from darter's default.
#[derive(Debug, Clone)]
pub struct Options {
    place: Place,
    document: DocumentMut,
    pod: Option<(PathBuf, SocketAddr)>,
    environment: Vec<(String, String)>,
    is_nobody: bool,
    own_pids: bool,
}

/// Nobody's user and group.
pub const NOBODY: u32 = 65_534;

impl Options {
    /// An agent with no registry, whose every file is in a directory of the test.
    pub fn new(place: &Place) -> Self {
        Self {
            place: place.clone(),
            document: DocumentMut::new(),
            pod: None,
            environment: Vec::new(),
            is_nobody: false,
            own_pids: false,
        }
    }

    /// As in a pod: the directory of a service account is where the kubelet mounts it, and the
    /// environment says where the API server is. Needs root.
    pub fn pod(mut self, account: &Path, api: SocketAddr) -> Self {
        self.pod = Some((account.to_owned(), api));
        self
    }

    /// Runs it as nobody: what the rights of a file forbid is forbidden to it. Needs root.
    pub fn nobody(mut self) -> Self {
        self.is_nobody = true;
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// In a PID namespace of its own, as a container without hostPID is. It can be killed and not stopped: who made
    /// the namespace gets the signal in its place. Needs root.
    pub fn own_pids(mut self) -> Self {
        self.own_pids = true;
        self
    }

    /// Sets a key such as `mirror.stall`.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.put(key, value);
        self
    }

    /// Adds a `[[registry]]` with these keys.
    pub fn registry(mut self, name: &str, keys: &[(&str, Value)]) -> Self {
        let mut table = Table::new();
        table.insert("name", toml_edit::value(name));
        for (key, value) in keys {
            table.insert(key, Item::Value(value.clone()));
        }
        let registries = self.document.entry("registry").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
        if let Some(registries) = registries.as_array_of_tables_mut() {
            registries.push(table);
        }
        self
    }

    /// Sets a key of every `[[registry]]` that was added.
    pub fn in_registries(mut self, key: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        let registries = self.document.get_mut("registry").and_then(Item::as_array_of_tables_mut);
        for table in registries.into_iter().flat_map(ArrayOfTables::iter_mut) {
            table[key] = Item::Value(value.clone());
        }
        self
    }

    /// A registry that is really at a plain http address of this test.
    pub fn plain_registry(self, name: &str, endpoint: &str) -> Self {
        self.registry(name, &[("endpoint", endpoint.into()), ("plain_http", true.into())])
    }

    fn put(&mut self, key: &str, value: impl Into<Value>) {
        let (section, key) = key.split_once('.').unwrap_or(("agent", key));
        let table = self.document.entry(section).or_insert_with(|| Item::Table(Table::new()));
        table[key] = toml_edit::value(value);
    }

    fn put_default(&mut self, key: &str, value: impl Into<Value>) {
        let (section, name) = key.split_once('.').unwrap_or(("agent", key));
        if self.document.get(section).and_then(|table| table.get(name)).is_none() {
            self.put(key, value);
        }
    }

    /// What every agent of a test needs: its own directory, and ports that are kept for it.
    fn complete(&mut self, dir: &Path) -> Result<Vec<Port>> {
        let at = |name: &str| dir.join(name).display().to_string();
        self.put_default("agent.data_dir", at("data"));
        self.put_default("admin.socket", at("admin.sock"));
        self.put_default("certs_d.path", at("certs.d"));
        self.put_default("containerd.config", at("containerd.toml"));
        self.put_default("aws.discover", "off");
        // The default leaves 18 % of the disk alone: that is for nodes, not for where tests run.
        self.put_default("store.min_free", "64MiB");
        self.put_default("log.level", "debug");
        let kept = match &self.place {
            // The addresses of the default configuration: each namespace has its own loopback.
            Place::Namespace(_) => Vec::new(),
            Place::Host => vec![self.place.port()?, self.place.port()?],
        };
        for (index, (key, default)) in [("mirror.listen", 4001), ("admin.listen", 4004)].into_iter().enumerate() {
            let port = kept.get(index).map_or(default, Port::number);
            self.put_default(key, format!("127.0.0.1:{port}"));
        }
        Ok(kept)
    }

    fn address(&self, key: &str) -> Result<SocketAddr> {
        let text = self.document.get(key).and_then(|table| table.get("listen")?.as_str());
        text.context("no address to listen on")?.parse().with_context(|| format!("{key}.listen"))
    }
}

/// A running agent.
pub struct Agent {
    process: Process,
    options: Options,
    mirror: SocketAddr,
    admin: SocketAddr,
    _ports: Vec<Port>,
    // Last: the directory goes when the process is gone.
    dir: Scratch,
}

impl Agent {
    /// Starts one and waits until it says that it is ready.
    pub async fn start(options: Options) -> Result<Self> {
        let mut agent = Self::start_unready(options).await?;
        agent.ready().await?;
        Ok(agent)
    }

    /// Starts one and waits until it answers at all: for agents that are not meant to get ready.
    pub async fn start_unready(mut options: Options) -> Result<Self> {
        let dir = Scratch::new()?;
        let ports = options.complete(dir.path())?;
        let file = dir.join("darter.toml");
        fs::write(&file, options.document.to_string())?;
        let process = launch(&options, &file, &dir.join("log"))?;
        let (mirror, admin) = (options.address("mirror")?, options.address("admin")?);
        let mut agent = Self { process, options, mirror, admin, _ports: ports, dir };
        agent.answering().await?;
        Ok(agent)
    }

    /// Starts it again, after [`kill`](Self::kill) or [`stop`](Self::stop), with the same files.
    pub async fn start_again(&mut self) -> Result<()> {
        self.start_again_unready().await?;
        self.ready().await
    }

    /// The same where it is not meant to get ready.
    pub async fn start_again_unready(&mut self) -> Result<()> {
        self.process = launch(&self.options, &self.dir.join("darter.toml"), &self.dir.join("log"))?;
        self.answering().await
    }

    async fn answering(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.options.place.connect(self.admin).await {
            self.still_starting(deadline, &format!("{error:#}"))?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Waits until `/readyz` is 200.
    pub async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.admin("/readyz").await;
            let state = match answer {
                Ok(answer) if answer.status == 200 => return Ok(()),
                Ok(answer) => answer.text(),
                Err(error) => format!("{error:#}"),
            };
            self.still_starting(deadline, &state)?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn still_starting(&mut self, deadline: Instant, state: &str) -> Result<()> {
        if let Some(status) = self.process.exited()? {
            bail!("darter agent: {status}\n{}", process::tail(&self.log()));
        }
        ensure!(Instant::now() < deadline, "darter agent is not ready: {state}\n{}", process::tail(&self.log()));
        Ok(())
    }

    /// Where its mirror listens.
    pub fn mirror(&self) -> SocketAddr {
        self.mirror
    }

    /// `http://` and where its mirror listens.
    pub fn mirror_url(&self) -> String {
        format!("http://{}", self.mirror)
    }

    /// Where its admin endpoint listens.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// The directory of its data, configuration and log.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The socket of requests that change state.
    pub fn admin_socket(&self) -> PathBuf {
        self.dir.join("admin.sock")
    }

    /// A client where the agent lives.
    pub fn client(&self) -> Client {
        Client::new(self.options.place.clone())
    }

    /// GET of a path such as `/readyz` at its admin address.
    pub async fn admin(&self, path: &str) -> Result<Answer> {
        self.client().get(&format!("http://{}{path}", self.admin)).await
    }

    /// Its metrics now.
    pub async fn metrics(&self) -> Result<Metrics> {
        let answer = self.admin("/metrics").await?;
        ensure!(answer.status == 200, "/metrics: {}", answer.status);
        Ok(Metrics::parse(&answer.text()))
    }

    /// Waits until the sum of a metric is what it is to be, and gives it back. What an answer brings is counted
    /// after its last byte, and a pull after its last reader has it: whoever just read may look too early.
    pub async fn counted(&self, name: &str, labels: &[(&str, &str)], is_so: impl Fn(f64) -> bool) -> Result<f64> {
        let mut sum = 0.0;
        let looked = eventually(name, async || {
            sum = self.metrics().await?.sum(name, labels);
            Ok(is_so(sum))
        })
        .await;
        looked.with_context(|| format!("{name} {labels:?} is {sum}")).map(|()| sum)
    }

    /// Everything it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// What it costs.
    pub fn usage(&self) -> Result<Usage> {
        self.process.usage()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Sends it a signal and does not wait for what comes of it.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Asks it to end, as kubelet does, and does not wait.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Asks it to end and waits until it has, with status 0.
    pub async fn stop(&mut self) -> Result<()> {
        self.terminate()?;
        let status = self.process.exit(PATIENCE).await?;
        ensure!(status.success(), "darter agent: {status}\n{}", process::tail(&self.log()));
        Ok(())
    }

    /// Kills it without a word, as the kernel does when memory is short.
    pub async fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.exit(PATIENCE).await?;
        Ok(())
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The binary under test, to be run in a place.
pub fn darter(place: &Place) -> Result<Command> {
    let mut command = place.command(tools::darter()?);
    without_own_environment(&mut command);
    Ok(command)
}

/// darter reads every DARTER_ variable as configuration, and finds credentials in those of AWS; those of whoever
/// runs the tests are not meant for it.
pub fn without_own_environment(command: &mut Command) {
    let is_meant = |name: &str| name.starts_with("DARTER_") || name.starts_with("AWS_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_meant(&name.to_string_lossy())) {
        command.env_remove(name);
    }
}

/// Others may not look into the directory that it was built in, so it runs from its own.
fn as_nobody(options: &Options, darter: &Path, config: &Path) -> Result<Command> {
    let dir = config.parent().context("a file has a directory")?;
    let program = dir.join("darter");
    if !program.exists() {
        fs::copy(darter, &program)?;
        fs::set_permissions(dir, Permissions::from_mode(0o755))?;
        chown(dir, Some(NOBODY), Some(NOBODY))?;
    }
    let mut command = options.place.command("setpriv");
    let id = NOBODY.to_string();
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--pdeathsig", "KILL"]).arg(program);
    Ok(command)
}

fn launch(options: &Options, config: &Path, log: &Path) -> Result<Process> {
    let darter = tools::darter()?;
    let mut command = match &options.pod {
        None if options.is_nobody => as_nobody(options, &darter, config)?,
        None if options.own_pids => {
            let mut command = options.place.command("unshare");
            command.args(["--pid", "--fork", "--kill-child"]).arg(darter);
            command
        }
        None => options.place.command(darter),
        Some((account, api)) => {
            // In a mount namespace of its own, which ends with it.
            let script = r#"mount -t tmpfs tmpfs /run && mkdir -p "$1" && cp "$0"/* "$1" && shift && exec "$@""#;
            let mut command = options.place.command("unshare");
            command.args(["--mount", "sh", "-c", script]).arg(account);
            command.arg("/run/secrets/kubernetes.io/serviceaccount").arg(darter);
            command.env("KUBERNETES_SERVICE_HOST", api.ip().to_string());
            command.env("KUBERNETES_SERVICE_PORT", api.port().to_string());
            command
        }
    };
    command.arg("agent").arg("--config").arg(config);
    without_own_environment(&mut command);
    command.envs(options.environment.iter().cloned());
    Process::start("darter agent", command, log)
}

/// Metrics in Prometheus' text format, read.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    series: Vec<(String, f64)>,
}

impl Metrics {
    /// Reads a page.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.filter_map(|line| line.rsplit_once(' '));
        Self { series: series.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect() }
    }

    /// The sum of all series of this name that have all of these labels; 0 if there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let wanted: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let matches = |series: &str| {
            let (series_name, labels) = series.split_once('{').unwrap_or((series, ""));
            let labels = labels.trim_end_matches('}');
            series_name == name && wanted.iter().all(|label| labels.split(',').any(|have| have == label))
        };
        self.series.iter().filter(|(series, _)| matches(series)).map(|(_, value)| value).sum()
    }

    /// All series, as name with labels and value.
    pub fn series(&self) -> &[(String, f64)] {
        &self.series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_over_the_labels_that_are_not_asked_for() {
        let metrics = Metrics::parse(
            "# TYPE bytes counter\nbytes_total{registry=\"a\",source=\"origin\"} 3\n\
             bytes_total{registry=\"b\",source=\"origin\"} 4\nbytes_total{registry=\"b\",source=\"cache\"} 5\nup 1\n",
        );
        assert_eq!(metrics.sum("bytes_total", &[("source", "origin")]), 7.0);
        assert_eq!(metrics.sum("bytes_total", &[("registry", "b"), ("source", "cache")]), 5.0);
        assert_eq!(metrics.sum("bytes_total", &[]), 12.0);
        assert_eq!(metrics.sum("up", &[]), 1.0);
        assert_eq!(metrics.sum("absent", &[]), 0.0);
    }
}
