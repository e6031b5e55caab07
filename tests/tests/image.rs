//! The image of `make image`, here of the debug build: what is in it, and that an agent in it answers `/readyz` in
//! the container that the chart asks for.
//!
//! containerd 2.2.4 imports it and makes the container's specification, with its own seccomp profile; what the chart
//! says of the pod is put into that, and runc runs it. There is no kubelet: this test does what it would do.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use darter_tests::chart::{self, Helm, configuration, find};
use darter_tests::containerd::{self, Containerd};
use darter_tests::http::Client;
use darter_tests::net::{Network, Place};
use darter_tests::nvml::Mock;
use darter_tests::process::{self, Process};
use darter_tests::scratch::{self, Scratch};
use darter_tests::tools::{self, Need, Release, can_run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::time::Instant;

/// Making an image of a debug build takes seconds; others may keep the disk busy.
const PATIENCE: Duration = Duration::from_secs(300);
/// The pod's terminationGracePeriodSeconds.
const GRACE: Duration = Duration::from_secs(30);

/// Makes the image with storage of its own.
async fn make(dir: &Scratch, arguments: &[&str]) -> Result<process::Output> {
    let mut command = process::command(chart::root().join("scripts/make-image"));
    command.env("XDG_CACHE_HOME", dir.join("cache")).env("DARTER_REVISION", "0123abc");
    command.arg("--binary").arg(tools::darter()?).args(arguments);
    process::run("make-image", command, PATIENCE).await
}

/// A blob of an OCI layout, by its digest.
fn blob(layout: &Path, digest: &Value) -> Result<Value> {
    let digest = digest.as_str().and_then(|digest| digest.strip_prefix("sha256:")).context("no digest")?;
    Ok(serde_json::from_slice(&fs::read(layout.join("blobs/sha256").join(digest))?)?)
}

#[tokio::test]
async fn the_image_has_darter_and_what_it_needs_of_debian_and_no_shell() -> Result<()> {
    let name = "the_image_has_darter_and_what_it_needs_of_debian_and_no_shell";
    if !can_run(name, &[Need::Buildah, Need::Darter]) {
        return Ok(());
    }
    let dir = Scratch::new()?;
    let output = dir.join("darter.tar").display().to_string();
    // A debug build is larger than what nodes should have to store, and is told so.
    let refused = make(&dir, &["--output", &output]).await?;
    ensure!(!refused.status.success() && refused.stderr.contains("--any-size"), "{}", refused.stderr);
    ensure!(!Path::new(&output).exists(), "made all the same");
    let made = make(&dir, &["--output", &output, "--any-size"]).await?;
    ensure!(made.status.success() && made.stdout.contains("MB unpacked"), "{}{}", made.stdout, made.stderr);
    let layout = dir.dir("layout")?;
    let mut tar = process::command("tar");
    tar.arg("--extract").arg("--file").arg(&output).arg("--directory").arg(&layout);
    process::run_ok("tar", tar, PATIENCE).await?;
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let manifest = blob(&layout, &index["manifests"][0]["digest"])?;
    let config = blob(&layout, &manifest["config"]["digest"])?;
    let run = &config["config"];
    assert_eq!(run["Entrypoint"], json!(["/usr/bin/darter"]));
    assert_eq!(run["Cmd"], json!(["agent"]));
    assert_eq!(run["Labels"]["org.opencontainers.image.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(run["Labels"]["org.opencontainers.image.revision"], "0123abc");
    let layer = manifest["layers"][0]["digest"].as_str().context("no layer")?.replace(':', "/");
    let mut list = process::command("tar");
    list.arg("--list").arg("--gzip").arg("--file").arg(layout.join("blobs").join(layer));
    let files = process::run_ok("tar", list, PATIENCE).await?;
    let programs: Vec<_> = files.lines().filter(|file| file.starts_with("usr/bin/") && !file.ends_with('/')).collect();
    assert_eq!(programs, ["usr/bin/darter"]);
    for file in [
        "etc/ssl/certs/ca-certificates.crt",
        "etc/ld.so.cache",
        "etc/nsswitch.conf",
        "etc/debian_version",
        "var/lib/dpkg/status.d/libc6",
        "usr/share/doc/libc6/copyright",
    ] {
        ensure!(files.lines().any(|line| line == file), "no {file} in the image");
    }
    // Nothing is left behind in the storage that all runs share.
    let left: Vec<_> = fs::read_dir(dir.join("cache/darter/image"))?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("root."))
        .collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// A container of the chart's pod, in a node's network, with directories of the test in place of the host's.
struct Pod {
    host: Scratch,
    spec: Value,
    id: String,
}

impl Drop for Pod {
    fn drop(&mut self) {
        Self::sweep(&self.id);
    }
}

impl Pod {
    /// From what containerd made of the image, and the chart of its values.
    fn new(mut spec: Value, objects: &[Value], root: &Path) -> Result<Self> {
        let host = Scratch::new()?;
        let pod = &find(objects, "DaemonSet", "darter")?["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let security = &container["securityContext"];
        if security["privileged"] == true {
            // What this needs of it; a real one has every right.
            set_capabilities(&mut spec, &["CAP_SYSLOG"]);
            spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        } else {
            ensure!(security["capabilities"]["drop"] == json!(["ALL"]), "{security}");
            set_capabilities(&mut spec, &[]);
        }
        spec["process"]["noNewPrivileges"] = json!(security["allowPrivilegeEscalation"] == false);
        spec["process"]["user"] = json!({ "uid": security["runAsUser"], "gid": security["runAsGroup"] });
        spec["root"] = json!({ "path": root, "readonly": security["readOnlyRootFilesystem"] });
        let mut args = vec![spec["process"]["args"][0].clone()];
        args.extend(container["args"].as_array().context("no arguments")?.iter().cloned());
        spec["process"]["args"] = json!(args);
        let mut pod_of_test = Self { host, spec, id: scratch::unique() };
        for variable in container["env"].as_array().context("no environment")? {
            let value = variable["value"].as_str().unwrap_or("from-the-kubelet");
            pod_of_test.set(&format!("{}={value}", variable["name"].as_str().context("no name")?));
        }
        pod_of_test.mount_all(pod, objects)?;
        Ok(pod_of_test)
    }

    fn set(&mut self, variable: &str) {
        if let Some(env) = self.spec["process"]["env"].as_array_mut() {
            env.push(json!(variable));
        }
    }

    fn mount(&mut self, source: &Path, at: &str, writable: bool) {
        let options = json!(["rbind", "rprivate", if writable { "rw" } else { "ro" }]);
        if let Some(mounts) = self.spec["mounts"].as_array_mut() {
            mounts.push(json!({ "destination": at, "type": "bind", "source": source, "options": options }));
        }
    }

    /// What the kubelet mounts, in the order in which containerd does: what is above comes first.
    fn mount_all(&mut self, pod: &Value, objects: &[Value]) -> Result<()> {
        let mut mounts = pod["containers"][0]["volumeMounts"].as_array().context("no mounts")?.clone();
        mounts.sort_by_key(|mount| mount["mountPath"].as_str().unwrap_or_default().matches('/').count());
        for mount in mounts {
            let at = mount["mountPath"].as_str().context("no path")?.to_owned();
            let source = match mount["name"].as_str() {
                Some("config") => self.configuration(objects)?,
                Some("kmsg") => PathBuf::from("/dev/kmsg"),
                _ => self.host.dir(at.trim_start_matches('/'))?,
            };
            self.mount(&source, &at, mount["readOnly"] != true);
        }
        Ok(())
    }

    /// darter.toml and the swarm key, as a projected volume has them.
    fn configuration(&self, objects: &[Value]) -> Result<PathBuf> {
        let dir = self.host.dir("projected")?;
        fs::write(dir.join("darter.toml"), configuration(objects)?)?;
        let key = find(objects, "Secret", "darter-swarm")?["data"]["swarm.key"].as_str().context("no key")?.to_owned();
        let key = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, key)?;
        fs::write(dir.join("swarm.key"), key)?;
        // defaultMode of the volume.
        fs::set_permissions(dir.join("swarm.key"), fs::Permissions::from_mode(0o400))?;
        Ok(dir)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.host.join(path.trim_start_matches('/'))
    }

    /// Removes control groups that a container left that was killed, this test's or an earlier one's.
    fn sweep(own: &str) {
        let mut dirs = vec![PathBuf::from("/sys/fs/cgroup")];
        dirs.extend(fs::read_dir(&dirs[0]).into_iter().flatten().flatten().map(|entry| entry.path()));
        for entry in dirs.iter().flat_map(fs::read_dir).flatten().flatten() {
            let name = entry.file_name();
            if name == own || scratch::is_left_over(&name.to_string_lossy()) {
                // One that is in use cannot be removed.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// Starts it. `mount` is the command line that mounts its root.
    fn start(&self, place: &Place, mount: &str) -> Result<Process> {
        Self::sweep("");
        let id = &self.id;
        let bundle = self.host.dir("bundle")?;
        let mut spec = self.spec.clone();
        spec["linux"]["cgroupsPath"] = json!(format!("/{id}"));
        // The network is that of the node, which this test is in already.
        let namespaces = spec["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
        namespaces.retain(|namespace| namespace["type"] != "network");
        fs::write(bundle.join("config.json"), spec.to_string())?;
        // In process ids and mounts of its own, which end with it, however it ends.
        let script = r#"eval "$1" && exec runc --root "$2" run --bundle "$3" "$4""#;
        let mut command = place.command("unshare");
        command.args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
            "--",
            "sh",
            "-c",
            script,
            "sh",
            mount,
        ]);
        command.arg(self.host.dir("runc")?).arg(&bundle).arg(id);
        Process::start("runc", command, &self.host.join("log"))
    }
}

fn set_capabilities(spec: &mut Value, names: &[&str]) {
    for set in ["bounding", "effective", "inheritable", "permitted", "ambient"] {
        spec["process"]["capabilities"][set] = json!(names);
    }
}

/// runc hands a signal on to the container. It is the child of the process that made its namespaces.
fn terminate(unshare: &Process) -> Result<()> {
    let path = format!("/proc/{0}/task/{0}/children", unshare.pid());
    let child = fs::read_to_string(&path)?;
    let child = child.split_whitespace().next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
    Ok(kill_process(child.with_context(|| format!("nothing in {path}"))?, Signal::TERM)?)
}

/// A node with containerd, and the image in it.
struct Node {
    place: Place,
    spec: Value,
    /// The command line that mounts the container's root at `root`.
    mount: String,
    root: PathBuf,
    _containerd: Containerd,
    _network: Network,
    _dir: Scratch,
}

impl Node {
    async fn start() -> Result<Self> {
        let dir = Scratch::new()?;
        let archive = dir.join("darter.tar").display().to_string();
        let made = make(&dir, &["--output", &archive, "--any-size"]).await?;
        ensure!(made.status.success(), "{}", made.stderr);
        let network = Network::new(1)?;
        let place = network.node(0);
        let containerd = Containerd::start(Release::V2, &place, &containerd::Options::default()).await?;
        containerd.ctr(&["images", "import", "--local", &archive]).await?;
        let image = format!("localhost/darter:{}", env!("CARGO_PKG_VERSION"));
        let images = containerd.ctr(&["images", "ls", "--quiet"]).await?;
        ensure!(images.lines().any(|line| line == image), "imported under another name: {images}");
        containerd.ctr(&["containers", "create", "--seccomp", "--net-host", &image, "agent"]).await?;
        let info: Value = serde_json::from_str(&containerd.ctr(&["containers", "info", "agent"]).await?)?;
        let (spec, key) = (info["Spec"].clone(), info["SnapshotKey"].as_str().context("no snapshot")?);
        ensure!(spec["process"]["args"] == json!(["/usr/bin/darter", "agent"]), "{}", spec["process"]["args"]);
        ensure!(spec["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO", "no seccomp profile");
        let root = dir.dir("root")?;
        let mount = containerd.ctr(&["snapshots", "mounts", &root.display().to_string(), key]).await?;
        Ok(Self { place, spec, mount, root, _containerd: containerd, _network: network, _dir: dir })
    }

    /// The pod of the chart as it is, but for a registry, a metadata service that is not here, and the room on this
    /// disk.
    async fn pod(&self, gpu: Value) -> Result<Pod> {
        let registry = json!([{ "name": "registry.example", "access": "public" }]);
        let values = json!({ "gpu": gpu, "config": { "aws": { "discover": "off" }, "going": { "spot_notice": "off" },
            "store": { "min_free": "64MiB" }, "registry": registry, "gpu": { "interval": "1s", "slow_interval": "1s" } } });
        let objects = Helm::new()?.render(&values).await?;
        let mut pod = Pod::new(self.spec.clone(), &objects, &self.root)?;
        // containerd's own, where the node has it.
        let text =
            "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d'\n";
        fs::write(pod.at("/etc/containerd/config.toml"), text)?;
        pod.set("RUST_BACKTRACE=0");
        Ok(pod)
    }

    /// What the agent in a pod logs until it is ready, and is then stopped.
    async fn log(&self, pod: &Pod) -> Result<String> {
        let mut process = pod.start(&self.place, self.mount.trim())?;
        ready(&Client::new(self.place.clone()), &mut process).await?;
        terminate(&process)?;
        let status = process.exit(GRACE).await?;
        ensure!(status.success(), "{status}\n{}", process::tail(&process.log()));
        Ok(process.log())
    }
}

const NEEDS: [Need; 6] =
    [Need::Root, Need::Buildah, Need::Darter, Need::MockNvml, Need::Helm, Need::Containerd(Release::V2)];

#[tokio::test]
async fn an_agent_in_the_charts_container_is_ready_and_takes_hosts_toml_away_when_it_is_stopped() -> Result<()> {
    let name = "an_agent_in_the_charts_container_is_ready_and_takes_hosts_toml_away_when_it_is_stopped";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let node = Node::start().await?;
    let mut pod = node.pod(json!({})).await?;
    // As NVIDIA's runtime does, where Debian's loader looks.
    let mock = Mock::fixture("h200-idle")?;
    pod.mount(&mock.library(), "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", false);
    pod.mount(&mock.config(), "/etc/mock.toml", false);
    pod.set("MOCK_NVML_CONFIG=/etc/mock.toml");
    let mut process = pod.start(&node.place, node.mount.trim())?;
    let client = Client::new(node.place.clone());
    ready(&client, &mut process).await?;
    let hosts = pod.at("/etc/containerd/certs.d/registry.example/hosts.toml");
    let text = fs::read_to_string(&hosts).context("no hosts.toml")?;
    ensure!(text.contains("http://127.0.0.1:4001"), "{text}");
    ensure!(pod.at("/var/lib/darter/identity.key").is_file() && pod.at("/run/darter/admin.sock").exists());
    gpus(&client, &process).await?;
    terminate(&process)?;
    let status = process.exit(GRACE).await?;
    ensure!(status.success(), "{status}\n{}", process::tail(&process.log()));
    ensure!(!hosts.exists(), "hosts.toml is still there");
    Ok(())
}

#[tokio::test]
async fn the_kernels_log_takes_a_privileged_container_and_gpu_kmsg_makes_it_one() -> Result<()> {
    let name = "the_kernels_log_takes_a_privileged_container_and_gpu_kmsg_makes_it_one";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let node = Node::start().await?;
    let complaint = "the kernel's log cannot be read";
    let mut pod = node.pod(json!({ "kmsg": true })).await?;
    let log = node.log(&pod).await?;
    ensure!(!log.contains(complaint), "{log}");
    // The capability alone is not enough: the device is closed to whoever no runtime gave it.
    pod.spec["linux"]["resources"]["devices"] = node.spec["linux"]["resources"]["devices"].clone();
    let log = node.log(&pod).await?;
    ensure!(log.contains(complaint), "{log}");
    Ok(())
}

/// Waits until the kubelet would find the pod ready.
async fn ready(client: &Client, process: &mut Process) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let state = match client.get("http://127.0.0.1:4004/readyz").await {
            Ok(answer) if answer.status == 200 => return Ok(()),
            Ok(answer) => answer.text(),
            Err(error) => format!("{error:#}"),
        };
        if let Some(status) = process.exited()? {
            bail!("runc: {status}\n{}", process::tail(&process.log()));
        }
        ensure!(Instant::now() < deadline, "not ready: {state}\n{}", process::tail(&process.log()));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until the agent shows the GPU: it has loaded a library that was not linked to it.
async fn gpus(client: &Client, process: &Process) -> Result<()> {
    let shown = darter_tests::stage::eventually("the agent shows its GPU", async || {
        Ok(client.get("http://127.0.0.1:4004/metrics").await?.text().contains("\ndarter_gpu_info{"))
    });
    shown.await.with_context(|| process::tail(&process.log()))
}
