//! Nodes that run the chart's pod, without a kubelet: containerd 2.2.4 imports the image and makes a container's
//! specification, with its own seccomp profile; what the chart says of the pod is put into that, and runc runs it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_tests::chart::{self, Helm, configuration, find};
use darter_tests::containerd::{self, Containerd};
use darter_tests::http::Client;
use darter_tests::net::{Network, Place};
use darter_tests::process::{self, Output, Process};
use darter_tests::scratch::{self, Scratch};
use darter_tests::tools::{self, Need, Release};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::time::Instant;

/// Making an image of a debug build takes seconds; others may keep the disk busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// The pod's terminationGracePeriodSeconds.
const GRACE: Duration = Duration::from_secs(30);

/// What it takes to run a pod.
pub(crate) const NEEDS: [Need; 7] =
    [Need::Root, Need::Buildah, Need::Runc, Need::Darter, Need::MockNvml, Need::Helm, Need::Containerd(Release::V2)];

/// Makes the image with storage of its own.
pub(crate) async fn make(dir: &Scratch, arguments: &[&str]) -> Result<Output> {
    let mut command = process::command(chart::root().join("scripts/make-image"));
    command.env("XDG_CACHE_HOME", dir.join("cache")).env("DARTER_REVISION", "0123abc");
    command.arg("--binary").arg(tools::darter()?).args(arguments);
    process::run("make-image", command, PATIENCE).await
}

/// Nodes, and a containerd on the first of them that has the image.
pub(crate) struct Cluster {
    image: String,
    containerd: Containerd,
    pub(crate) network: Network,
    dir: Scratch,
}

impl Cluster {
    pub(crate) async fn start(nodes: u8) -> Result<Self> {
        let dir = Scratch::new()?;
        let archive = dir.join("darter.tar").display().to_string();
        let made = make(&dir, &["--output", &archive, "--any-size"]).await?;
        ensure!(made.status.success(), "{}", made.stderr);
        let network = Network::new(nodes)?;
        let containerd = Containerd::start(Release::V2, &network.node(0), &containerd::Options::default()).await?;
        containerd.ctr(&["images", "import", "--local", &archive]).await?;
        let image = format!("localhost/darter:{}", env!("CARGO_PKG_VERSION"));
        let images = containerd.ctr(&["images", "ls", "--quiet"]).await?;
        ensure!(images.lines().any(|line| line == image), "imported under another name: {images}");
        Ok(Self { image, containerd, network, dir })
    }

    /// The chart as it is, but for a registry, a metadata service that is not here, and the room on this disk.
    pub(crate) async fn chart(gpu: Value) -> Result<Vec<Value>> {
        let registry = json!([{ "name": "registry.example", "access": "public" }]);
        let quick = json!({ "interval": "1s", "slow_interval": "1s" });
        let values = json!({ "gpu": gpu, "config": { "aws": { "discover": "off" }, "going": { "spot_notice": "off" },
            "store": { "min_free": "64MiB" }, "registry": registry, "gpu": quick } });
        Helm::new()?.render(&values).await
    }

    /// The chart's pod on a node, which is called so in Kubernetes.
    pub(crate) async fn pod(&self, number: usize, objects: &[Value], node: &str) -> Result<Pod> {
        let name = format!("agent-{node}");
        self.containerd.ctr(&["containers", "create", "--seccomp", "--net-host", &self.image, &name]).await?;
        let info: Value = serde_json::from_str(&self.containerd.ctr(&["containers", "info", &name]).await?)?;
        let (spec, key) = (info["Spec"].clone(), info["SnapshotKey"].as_str().context("no snapshot")?);
        ensure!(spec["process"]["args"] == json!(["/usr/bin/darter", "agent"]), "{}", spec["process"]["args"]);
        ensure!(spec["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO", "no seccomp profile");
        let root = self.dir.dir(&name)?;
        let mount = self.containerd.ctr(&["snapshots", "mounts", &root.display().to_string(), key]).await?;
        let (host, id) = (Scratch::new()?, scratch::unique());
        let devices = spec["linux"]["resources"]["devices"].clone();
        let mount = mount.trim().to_owned();
        let mut pod = Pod { host, spec, id, devices, mount, place: self.network.node(number) };
        pod.secure(objects, &root)?;
        pod.fill(objects, node)?;
        Ok(pod)
    }
}

/// A container of the chart's pod, in a node's network, with directories of the test in place of the host's.
pub(crate) struct Pod {
    host: Scratch,
    spec: Value,
    id: String,
    /// Which devices containerd leaves open.
    devices: Value,
    /// The command line that mounts its root.
    mount: String,
    place: Place,
}

impl Drop for Pod {
    fn drop(&mut self) {
        sweep(&self.id);
    }
}

impl Pod {
    /// What the chart says of its rights.
    fn secure(&mut self, objects: &[Value], root: &Path) -> Result<()> {
        let security =
            &find(objects, "DaemonSet", "darter")?["spec"]["template"]["spec"]["containers"][0]["securityContext"];
        let privileged = security["privileged"] == true;
        ensure!(privileged || security["capabilities"]["drop"] == json!(["ALL"]), "{security}");
        // A privileged one has every right; what is read with it takes one.
        let capabilities = if privileged { json!(["CAP_SYSLOG"]) } else { json!([]) };
        let spec = &mut self.spec;
        for set in ["bounding", "effective", "inheritable", "permitted", "ambient"] {
            spec["process"]["capabilities"][set] = capabilities.clone();
        }
        if privileged {
            spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        }
        spec["process"]["noNewPrivileges"] = json!(security["allowPrivilegeEscalation"] == false);
        spec["process"]["user"] = json!({ "uid": security["runAsUser"], "gid": security["runAsGroup"] });
        spec["root"] = json!({ "path": root, "readonly": security["readOnlyRootFilesystem"] });
        // The network is that of the node, in which it is started.
        let namespaces = spec["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
        namespaces.retain(|namespace| namespace["type"] != "network");
        spec["linux"]["cgroupsPath"] = json!(format!("/{}", self.id));
        Ok(())
    }

    /// What the kubelet fills in: arguments, environment, mounts.
    fn fill(&mut self, objects: &[Value], node: &str) -> Result<()> {
        let container = &find(objects, "DaemonSet", "darter")?["spec"]["template"]["spec"]["containers"][0];
        let mut args = vec![self.spec["process"]["args"][0].clone()];
        args.extend(container["args"].as_array().context("no arguments")?.iter().cloned());
        self.spec["process"]["args"] = json!(args);
        for variable in container["env"].as_array().context("no environment")? {
            let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                None => variable["value"].as_str().context("a variable without a value")?.to_owned(),
                Some("spec.nodeName") => node.to_owned(),
                Some("metadata.name") => self.id.clone(),
                Some("metadata.labels['topology.kubernetes.io/zone']") => format!("zone-of-{node}"),
                Some(path) => bail!("the kubelet of this test does not know {path}"),
            };
            self.set(&format!("{}={value}", variable["name"].as_str().context("no name")?));
        }
        self.set("RUST_BACKTRACE=0");
        // In the order in which containerd does: what is above comes first.
        let mut mounts = container["volumeMounts"].as_array().context("no mounts")?.clone();
        mounts.sort_by_key(|mount| mount["mountPath"].as_str().unwrap_or_default().matches('/').count());
        for mount in mounts {
            let at = mount["mountPath"].as_str().context("no path")?.to_owned();
            let source = match mount["name"].as_str() {
                Some("config") => self.projected(objects)?,
                Some("kmsg") => PathBuf::from("/dev/kmsg"),
                _ => self.host.dir(at.trim_start_matches('/'))?,
            };
            self.mount(&source, &at, mount["readOnly"] != true);
        }
        // containerd's own configuration, where the node has it.
        let registry = "[plugins.'io.containerd.cri.v1.images'.registry]";
        let text = format!("version = 3\n{registry}\nconfig_path = '/etc/containerd/certs.d'\n");
        Ok(fs::write(self.at("/etc/containerd/config.toml"), text)?)
    }

    /// darter.toml and the swarm key, as a projected volume has them.
    fn projected(&self, objects: &[Value]) -> Result<PathBuf> {
        let dir = self.host.dir("projected")?;
        fs::write(dir.join("darter.toml"), configuration(objects)?)?;
        let key = &find(objects, "Secret", "darter-swarm")?["data"]["swarm.key"];
        fs::write(dir.join("swarm.key"), STANDARD.decode(key.as_str().context("no key")?)?)?;
        // defaultMode of the volume.
        fs::set_permissions(dir.join("swarm.key"), fs::Permissions::from_mode(0o400))?;
        Ok(dir)
    }

    /// One more variable of its environment.
    pub(crate) fn set(&mut self, variable: &str) {
        if let Some(env) = self.spec["process"]["env"].as_array_mut() {
            env.push(json!(variable));
        }
    }

    /// One more mount.
    pub(crate) fn mount(&mut self, source: &Path, at: &str, writable: bool) {
        let options = json!(["rbind", "rprivate", if writable { "rw" } else { "ro" }]);
        if let Some(mounts) = self.spec["mounts"].as_array_mut() {
            mounts.push(json!({ "destination": at, "type": "bind", "source": source, "options": options }));
        }
    }

    /// Leaves it the devices of a container that is not privileged, and everything else.
    pub(crate) fn close_devices(&mut self) {
        self.spec["linux"]["resources"]["devices"] = self.devices.clone();
    }

    /// A file of its host.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.host.join(path.trim_start_matches('/'))
    }

    /// Starts it, and waits until the kubelet would find it ready.
    pub(crate) async fn start(&self) -> Result<Running> {
        sweep("");
        let bundle = self.host.dir("bundle")?;
        fs::write(bundle.join("config.json"), self.spec.to_string())?;
        // In process ids and mounts of its own, which end with it, however it ends.
        let script = r#"eval "$1" && exec runc --root "$2" run --bundle "$3" "$4""#;
        let mut command = self.place.command("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--"]);
        command.args(["sh", "-c", script, "sh", &self.mount]);
        command.arg(self.host.dir("runc")?).arg(&bundle).arg(&self.id);
        let process = Process::start("runc", command, &self.host.join(format!("log-{}", scratch::unique())))?;
        let mut running = Running { process, client: Client::new(self.place.clone()) };
        running.ready().await?;
        Ok(running)
    }
}

/// Removes control groups that a container left that was killed, this test's or an earlier one's.
fn sweep(own: &str) {
    let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
    dirs.extend(fs::read_dir(&dirs[0]).into_iter().flatten().flatten().map(|entry| entry.path()));
    for entry in dirs.iter().flat_map(fs::read_dir).flatten().flatten() {
        let name = entry.file_name();
        let pid = format!("darter-{}-", std::process::id());
        let is_of_another = !name.to_string_lossy().starts_with(&pid);
        if name == own || (is_of_another && scratch::is_left_over(&name.to_string_lossy())) {
            // One that is in use cannot be removed.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// A container that runs.
pub(crate) struct Running {
    process: Process,
    client: Client,
}

impl Running {
    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let state = match self.client.get("http://127.0.0.1:4004/readyz").await {
                Ok(answer) if answer.status == 200 => return Ok(()),
                Ok(answer) => answer.text(),
                Err(error) => format!("{error:#}"),
            };
            if let Some(status) = self.process.exited()? {
                bail!("runc: {status}\n{}", process::tail(&self.log()));
            }
            ensure!(Instant::now() < deadline, "not ready: {state}\n{}", process::tail(&self.log()));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A page of its admin endpoint.
    pub(crate) async fn get(&self, path: &str) -> Result<String> {
        let answer = self.client.get(&format!("http://127.0.0.1:4004{path}")).await?;
        ensure!(answer.status == 200, "{path}: {}", answer.status);
        Ok(answer.text())
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// Stops it as the kubelet does, which would kill it after the grace period.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        // runc hands a signal on to the container. It is the child of the process that made its namespaces.
        let path = format!("/proc/{0}/task/{0}/children", self.process.pid());
        let children = fs::read_to_string(&path)?;
        let child = children.split_whitespace().next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
        kill_process(child.with_context(|| format!("nothing in {path}"))?, Signal::TERM)?;
        let status = self.process.exit(GRACE).await?;
        ensure!(status.success(), "{status}\n{}", process::tail(&self.log()));
        Ok(())
    }
}
