//! A private containerd: its own root, state, socket and certs.d, in a network namespace.
//!
//! It pulls images and never runs one, so it needs no runc, CNI or cgroups. Source of the recipe:
//! containerd's own documentation of its configuration, versions 2 and 3.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::Instant;

use crate::cri::Cri;
use crate::net::Place;
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::tools::Release;

/// Past this containerd does not start, or does not collect its garbage, at all. Long, because both
/// wait for many fsyncs, and others may keep the disk busy; one that ends is told of at once.
const PATIENCE: Duration = Duration::from_secs(180);

/// How long one look at a containerd that starts may take: it may have been accepted by a socket that
/// nobody serves yet.
const LOOK: Duration = Duration::from_secs(5);

/// How long a `ctr` command may take.
const CTR: Duration = Duration::from_secs(300);

/// How a containerd is configured. The default is what an EKS node runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// `config_path`: one directory, or two joined by a colon.
    pub config_path: ConfigPath,
    /// Drop packed layers after unpacking. On 2.x it also chooses the local pull path, so
    /// [`Release::V2Transfer`] takes no note of it.
    pub discard_unpacked_layers: bool,
    /// 2.x only: not the transfer service.
    pub use_local_image_pull: bool,
    /// 2.1 and later: parallel ranges of one layer, in chunks of so many bytes. 0 is off.
    pub concurrent_layer_fetch_buffer: u64,
    /// Layers at once.
    pub max_concurrent_downloads: u32,
}

/// Where hosts.toml files are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigPath {
    /// `certs.d`
    One,
    /// `certs.d:docker-certs.d`
    Two,
    /// No `config_path` at all.
    Unset,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config_path: ConfigPath::Two,
            discard_unpacked_layers: true,
            use_local_image_pull: false,
            concurrent_layer_fetch_buffer: 0,
            max_concurrent_downloads: 3,
        }
    }
}

/// A running containerd.
pub struct Containerd {
    process: Process,
    cri: Cri,
    place: Place,
    ctr: PathBuf,
    // Last: the directory goes when the process is gone.
    dir: Scratch,
}

impl Containerd {
    /// Starts one and waits until its CRI answers.
    pub async fn start(release: Release, place: &Place, options: &Options) -> Result<Self> {
        let (program, ctr) = release.programs().context("this containerd is not installed")?;
        let dir = Scratch::new()?;
        for name in ["certs.d", "docker-certs.d", "cni"] {
            dir.dir(name)?;
        }
        let text = match release {
            Release::V1 => config_v2(&dir, options)?,
            Release::V2 => config_v3(&dir, options)?,
            Release::V2Transfer => config_v3(&dir, &by_transfer(options))?,
        };
        fs::write(dir.join("config.toml"), text)?;
        let command = contained(place, &dir, &program)?;
        let process = Process::start("containerd", command, &dir.join("log"))?;
        let cri = Cri::new(&dir.join("sock"));
        let mut containerd = Self { process, cri, place: place.clone(), ctr, dir };
        containerd.ready().await?;
        Ok(containerd)
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = tokio::time::timeout(LOOK, self.cri.version()).await;
            let answer = answer.unwrap_or_else(|_| bail!("no answer within {LOOK:?}"));
            let Err(error) = answer else { return Ok(()) };
            if let Some(status) = self.process.exited()? {
                bail!("containerd: {status}\n{}", process::tail(&self.log()));
            }
            if Instant::now() > deadline {
                return Err(error.context(process::tail(&self.log())));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its CRI.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("sock")
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// Its root directory, which holds the content store.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The first, or only, directory of hosts.toml files.
    pub fn certs_d(&self) -> PathBuf {
        self.dir.join("certs.d")
    }

    /// The second directory of hosts.toml files.
    pub fn docker_certs_d(&self) -> PathBuf {
        self.dir.join("docker-certs.d")
    }

    /// Everything it logged, at debug level: each request to a registry is in it.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Writes `<certs.d>/<registry>/hosts.toml` in one step, as darter does.
    pub fn write_hosts(&self, registry: &str, text: &str) -> Result<PathBuf> {
        let dir = self.certs_d().join(registry);
        fs::create_dir_all(&dir)?;
        let (temporary, path) = (dir.join(".hosts.toml"), dir.join("hosts.toml"));
        fs::write(&temporary, text)?;
        fs::rename(&temporary, &path)?;
        Ok(path)
    }

    /// Runs `ctr` of the same release in the same place, in the CRI's namespace, and gives back what
    /// it printed.
    pub async fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.place.command(&self.ctr);
        command.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]).args(arguments);
        process::run_ok(&format!("ctr {}", arguments.join(" ")), command, CTR).await
    }

    /// Pulls with `ctr`, through this certs.d.
    pub async fn ctr_pull(&self, image: &str, credential: Option<(&str, &str)>) -> Result<String> {
        let hosts = self.certs_d().display().to_string();
        let user = credential.map(|(user, password)| format!("{user}:{password}"));
        let mut arguments = vec!["images", "pull", "--hosts-dir", &hosts];
        if let Some(user) = &user {
            arguments.extend(["--user", user]);
        }
        arguments.push(image);
        self.ctr(&arguments).await
    }

    /// Removes every image and waits until content and snapshots are gone: the next pull is cold.
    pub async fn forget(&self) -> Result<()> {
        for image in self.cri.list().await? {
            self.cri.remove(&image.id).await?;
        }
        // What ctr pulled has records that the CRI may not know yet.
        let records = self.ctr(&["images", "ls", "--quiet"]).await?;
        for record in records.lines().filter(|line| !line.is_empty()) {
            self.ctr(&["images", "rm", "--sync", record]).await?;
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.is_empty().await? {
            if Instant::now() > deadline {
                bail!("content is left: {:?}", self.blobs()?);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// The digests (hex) in its content store.
    pub fn blobs(&self) -> Result<Vec<String>> {
        let dir = self.root().join("io.containerd.content.v1.content/blobs/sha256");
        let names = match fs::read_dir(&dir) {
            Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
            // Made with the first blob.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        names.with_context(|| format!("cannot list {}", dir.display()))
    }

    /// Bytes of what it has begun to write and not committed yet.
    pub fn ingested(&self) -> u64 {
        let dir = self.root().join("io.containerd.content.v1.content/ingest");
        // One that is committed goes between any two looks.
        let ingests = fs::read_dir(dir).into_iter().flatten().flatten();
        ingests.filter_map(|ingest| Some(fs::metadata(ingest.path().join("data")).ok()?.len())).sum()
    }

    async fn is_empty(&self) -> Result<bool> {
        if !self.blobs()?.is_empty() {
            return Ok(false);
        }
        // The first line is the heading.
        Ok(self.ctr(&["snapshots", "ls"]).await?.lines().count() <= 1)
    }
}

/// A file of a layer that was unpacked below a root directory, if it is there.
pub fn unpacked(root: &Path, name: &str) -> Result<Option<PathBuf>> {
    // The directory of a snapshot itself (native), or the one below it that is a layer (overlayfs).
    for snapshotter in ["io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.native"] {
        let Ok(snapshots) = fs::read_dir(root.join(snapshotter).join("snapshots")) else { continue };
        for snapshot in snapshots {
            let snapshot = snapshot?.path();
            if let Some(file) = [snapshot.join("fs").join(name), snapshot.join(name)].into_iter().find(|f| f.is_file())
            {
                return Ok(Some(file));
            }
        }
    }
    Ok(None)
}

/// The command that starts containerd in a mount namespace of its own: its mounts end with it,
/// however it ends. And it finds no name server, so a name that a test does not mean is refused at
/// once and asked of nobody.
fn contained(place: &Place, dir: &Scratch, program: &Path) -> Result<Command> {
    fs::write(dir.join("resolv.conf"), "nameserver 127.0.0.1\noptions attempts:1\n")?;
    let script = r#"if [ -e /etc/resolv.conf ]; then mount --bind "$1" /etc/resolv.conf; fi && shift && exec "$@""#;
    let mut command = place.command("unshare");
    command.args(["--mount", "--", "sh", "-c", script, "sh"]).arg(dir.join("resolv.conf"));
    command.arg(program).arg("--config").arg(dir.join("config.toml"));
    Ok(command)
}

fn common(dir: &Scratch, version: u32) -> String {
    let at = |name: &str| dir.join(name).display().to_string();
    format!(
        "version = {version}\n\
         root = {root:?}\n\
         state = {state:?}\n\
         [grpc]\n  address = {sock:?}\n\
         [ttrpc]\n  address = {ttrpc:?}\n\
         [debug]\n  address = {debug:?}\n  level = \"debug\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = {opt:?}\n",
        root = at("root"),
        state = at("state"),
        sock = at("sock"),
        ttrpc = at("ttrpc"),
        debug = at("debug"),
        opt = at("opt"),
    )
}

fn config_v2(dir: &Scratch, options: &Options) -> Result<String> {
    let cri = "io.containerd.grpc.v1.cri";
    let mut text = common(dir, 2);
    write!(
        text,
        "[plugins.\"{cri}\"]\n  max_concurrent_downloads = {}\n\
         [plugins.\"{cri}\".containerd]\n  snapshotter = {:?}\n  discard_unpacked_layers = {}\n\
         [plugins.\"{cri}\".cni]\n  conf_dir = {:?}\n",
        options.max_concurrent_downloads,
        snapshotter(dir)?,
        options.discard_unpacked_layers,
        dir.join("cni"),
    )?;
    write_config_path(&mut text, cri, dir, options)?;
    Ok(text)
}

/// The transfer service pulls where nothing asks for the local path, and looks into one directory only.
fn by_transfer(options: &Options) -> Options {
    let config_path = if options.config_path == ConfigPath::Unset { ConfigPath::Unset } else { ConfigPath::One };
    Options { config_path, discard_unpacked_layers: false, use_local_image_pull: false, ..options.clone() }
}

fn config_v3(dir: &Scratch, options: &Options) -> Result<String> {
    let images = "io.containerd.cri.v1.images";
    let mut text = common(dir, 3);
    write!(
        text,
        "[plugins.\"{images}\"]\n  snapshotter = {:?}\n  discard_unpacked_layers = {}\n  \
         use_local_image_pull = {}\n  concurrent_layer_fetch_buffer = {}\n  max_concurrent_downloads = {}\n\
         [plugins.\"io.containerd.cri.v1.runtime\".cni]\n  conf_dir = {:?}\n\
         [plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n",
        snapshotter(dir)?,
        options.discard_unpacked_layers,
        options.use_local_image_pull,
        options.concurrent_layer_fetch_buffer,
        options.max_concurrent_downloads,
        dir.join("cni"),
    )?;
    write_config_path(&mut text, images, dir, options)?;
    Ok(text)
}

fn write_config_path(text: &mut String, plugin: &str, dir: &Scratch, options: &Options) -> Result<()> {
    let (first, second) = (dir.join("certs.d"), dir.join("docker-certs.d"));
    let path = match options.config_path {
        ConfigPath::One => first.display().to_string(),
        ConfigPath::Two => format!("{}:{}", first.display(), second.display()),
        ConfigPath::Unset => return Ok(()),
    };
    write!(text, "[plugins.\"{plugin}\".registry]\n  config_path = {path:?}\n")?;
    Ok(())
}

/// overlayfs, or copies where it cannot be mounted (inside some containers).
fn snapshotter(dir: &Scratch) -> Result<&'static str> {
    let probe = dir.dir("overlay")?;
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir_all(probe.join(name))?;
    }
    let layers = format!("lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work", probe.display());
    let mut mount = Command::new("unshare");
    mount.args(["--mount", "--", "mount", "-t", "overlay", "overlay", "-o", &layers]).arg(probe.join("merged"));
    Ok(if mount.output()?.status.success() { "overlayfs" } else { "native" })
}

/// The text of a hosts.toml with this mirror before this server.
///
/// Without a mirror the server is named as a host, too: 1.6 ignores a file that has no host at all.
pub fn hosts_toml(server: &str, mirror: Option<&str>, capabilities: &[&str]) -> String {
    let (host, capabilities) = match mirror {
        Some(mirror) => (mirror, capabilities),
        None => (server, ["pull", "resolve"].as_slice()),
    };
    format!("server = {server:?}\n\n[host.{host:?}]\n  capabilities = {capabilities:?}\n")
}
