//! The image of `make image`, here of the debug build: what is in it, and that agents in it answer `/readyz`, and find
//! each other, in the containers that the chart asks for.

mod pod;
mod together;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use darter_tests::nvml::Mock;
use darter_tests::process;
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{Need, can_run};
use serde_json::{Value, json};

use self::pod::{Cluster, NEEDS, PATIENCE, make};

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

#[tokio::test]
async fn an_agent_in_the_charts_container_is_ready_and_takes_hosts_toml_away_when_it_is_stopped() -> Result<()> {
    let name = "an_agent_in_the_charts_container_is_ready_and_takes_hosts_toml_away_when_it_is_stopped";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(1).await?;
    let mut pod = cluster.pod(0, &Cluster::chart(json!({})).await?, "a").await?;
    // As NVIDIA's runtime does, where Debian's loader looks.
    let mock = Mock::fixture("h200-idle")?;
    pod.mount(&mock.library(), "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", false);
    pod.mount(&mock.config(), "/etc/mock.toml", false);
    pod.set("MOCK_NVML_CONFIG=/etc/mock.toml");
    let mut agent = pod.start().await?;
    let hosts = pod.at("/etc/containerd/certs.d/registry.example/hosts.toml");
    let text = fs::read_to_string(&hosts).context("no hosts.toml")?;
    ensure!(text.contains("http://127.0.0.1:4001"), "{text}");
    ensure!(pod.at("/var/lib/darter/identity.key").is_file() && pod.at("/run/darter/admin.sock").exists());
    // It has loaded a library that it is not linked to.
    let shown =
        eventually("the agent shows its GPU", async || Ok(agent.get("/metrics").await?.contains("\ndarter_gpu_info{")));
    shown.await.with_context(|| agent.log())?;
    agent.stop().await?;
    ensure!(!hosts.exists(), "hosts.toml is still there");
    Ok(())
}

#[tokio::test]
async fn the_kernels_log_takes_a_privileged_container_and_gpu_kmsg_makes_it_one() -> Result<()> {
    let name = "the_kernels_log_takes_a_privileged_container_and_gpu_kmsg_makes_it_one";
    if !can_run(name, &NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::start(1).await?;
    let complaint = "the kernel's log cannot be read";
    let mut pod = cluster.pod(0, &Cluster::chart(json!({ "kmsg": true })).await?, "a").await?;
    let mut agent = pod.start().await?;
    agent.stop().await?;
    ensure!(!agent.log().contains(complaint), "{}", agent.log());
    // The capability alone is not enough: the device is closed to whoever no runtime gave it.
    pod.close_devices();
    let mut agent = pod.start().await?;
    agent.stop().await?;
    ensure!(agent.log().contains(complaint), "{}", agent.log());
    Ok(())
}
