//! The Helm chart, rendered and installed by the real helm.
//!
//! helm's own directories are the test's: plugins and repositories of whoever runs it are not seen.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::process::{self, Output};
use crate::scratch::Scratch;
use crate::tools;

/// Seconds on any machine, but for an install against an API server that is busy.
const PATIENCE: Duration = Duration::from_secs(120);
/// The release that tests install, and where.
pub const RELEASE: &str = "darter";
/// Its namespace.
pub const NAMESPACE: &str = "gpu-system";

/// The root of the repository.
pub fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// Where the chart is.
pub fn path() -> PathBuf {
    root().join("deploy/helm/darter")
}

/// helm with directories of its own.
pub struct Helm {
    dir: Scratch,
    program: PathBuf,
    kubeconfig: Option<PathBuf>,
}

impl Helm {
    /// Without a cluster.
    pub fn new() -> Result<Self> {
        let program = tools::helm().context("no helm: scripts/install-tools kubernetes")?;
        Ok(Self { dir: Scratch::new()?, program, kubeconfig: None })
    }

    /// With the cluster of a kubeconfig.
    pub fn with(mut self, kubeconfig: PathBuf) -> Self {
        self.kubeconfig = Some(kubeconfig);
        self
    }

    /// Runs a command on the chart with these values, and gives what it says whether it worked or not.
    pub async fn run(&self, arguments: &[&str], values: &Value) -> Result<Output> {
        let file = self.dir.join(crate::scratch::unique());
        // JSON is YAML.
        std::fs::write(&file, values.to_string())?;
        let mut command = self.command(arguments);
        command.arg("--values").arg(&file);
        process::run("helm", command, PATIENCE).await
    }

    /// Runs a command that takes no values, and has to work.
    pub async fn call(&self, arguments: &[&str]) -> Result<String> {
        process::run_ok("helm", self.command(arguments), PATIENCE).await
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = process::command(&self.program);
        command.args(arguments).env_remove("KUBECONFIG");
        for kind in ["CACHE", "CONFIG", "DATA"] {
            command.env(format!("HELM_{kind}_HOME"), self.dir.join(kind));
        }
        if let Some(kubeconfig) = &self.kubeconfig {
            command.arg("--kubeconfig").arg(kubeconfig);
        }
        command
    }

    /// What `helm template` makes of these values, as text.
    pub async fn template(&self, values: &Value) -> Result<Output> {
        let chart = path().display().to_string();
        // The kinds of the Prometheus Operator, which helm cannot ask a cluster for here.
        let known = ["--namespace", NAMESPACE, "--api-versions", "monitoring.coreos.com/v1"];
        self.run(&[&["template", RELEASE, &chart][..], &known].concat(), values).await
    }

    /// The objects that it makes of them.
    pub async fn render(&self, values: &Value) -> Result<Vec<Value>> {
        let output = self.template(values).await?;
        ensure!(output.status.success(), "helm template with {values}: {}", output.stderr);
        objects(&output.stdout).with_context(|| format!("what helm template made of {values}"))
    }

    /// Where `render` can leave files of a test.
    pub fn dir(&self) -> &Scratch {
        &self.dir
    }
}

/// The objects in a stream of YAML documents.
pub fn objects(yaml: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).context("helm made no YAML")?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// The one object of a kind whose name ends so.
pub fn find<'a>(objects: &'a [Value], kind: &str, end: &str) -> Result<&'a Value> {
    let is_it = |object: &&Value| {
        object["kind"] == kind && object["metadata"]["name"].as_str().is_some_and(|name| name.ends_with(end))
    };
    let found: Vec<_> = objects.iter().filter(is_it).collect();
    ensure!(found.len() == 1, "{} objects of kind {kind} with a name that ends in `{end}`", found.len());
    Ok(found[0])
}

/// The text of darter.toml.
pub fn configuration(objects: &[Value]) -> Result<&str> {
    let map = find(objects, "ConfigMap", "darter")?;
    map["data"]["darter.toml"].as_str().context("the ConfigMap has no darter.toml")
}
