//! The OCI distribution conformance suite, on content that is there: nothing is pushed or deleted.
//!
//! Its verdicts are read from what it prints. Its exit status says nothing, because in read-only
//! mode the pinned version ends in a panic while it writes its report files (`ReportResultsYAML`).
//! Its Range tests push first and so do not run; ours are elsewhere.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::image::Image;
use crate::net::Place;
use crate::scratch::Scratch;
use crate::{process, tools};

/// Seconds on any machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What every name in the report begins with.
const ROOT: &str = "OCI Conformance Test/";

/// What the suite found.
#[derive(Debug, Clone)]
pub struct Report {
    /// Name and verdict, in order: `Pass`, `FAIL`, `Skip`, `Disabled`, `Error`. A name comes once for
    /// each manifest or blob.
    pub verdicts: Vec<(String, String)>,
    /// All that was printed.
    pub text: String,
}

impl Report {
    /// The tests of which the suite says this, of at least one manifest or blob.
    pub fn with(&self, verdict: &str) -> Vec<&str> {
        self.verdicts.iter().filter(|(_, have)| *have == verdict).map(|(name, _)| name.as_str()).collect()
    }

    fn parse(text: String) -> Self {
        let lines = text.lines().filter_map(|line| line.trim().strip_prefix(ROOT)?.rsplit_once(": "));
        let verdicts = lines.map(|(name, verdict)| (name.to_owned(), verdict.to_owned())).collect();
        Self { verdicts, text }
    }
}

/// Runs the suite from a place against a plain http registry that holds `image` as `repository:tag`.
pub async fn read_only(
    place: &Place,
    address: SocketAddr,
    image: &Image,
    repository: &str,
    tag: &str,
) -> Result<Report> {
    let dir = Scratch::new()?;
    let digests = |items: &mut dyn Iterator<Item = &crate::image::Item>| {
        items.map(|item| item.digest().to_string()).collect::<Vec<_>>().join(" ")
    };
    let mut command = place.command(tools::conformance().context("the conformance suite is not installed")?);
    command.current_dir(dir.path());
    let off = ["OCI_API_PUSH", "OCI_API_BLOBS_DELETE", "OCI_API_MANIFESTS_DELETE", "OCI_API_TAGS_DELETE"];
    command.envs(off.map(|name| (name, "false")));
    // Not OCI_API_MANIFESTS_DIGEST_HEADER: the pinned version keeps a manifest's answer only if it
    // pushed that manifest, so read-only it finds the header on none (`ManifestHeadExists`).
    command.envs(["OCI_API_BLOBS_DIGEST_HEADER", "OCI_API_REFERRER"].map(|name| (name, "true")));
    command
        .env("OCI_REGISTRY", address.to_string())
        .env("OCI_TLS", "disabled")
        .env("OCI_VERSION", "1.1")
        .env("OCI_REPO1", repository)
        .env("OCI_RO_DATA_TAGS", tag)
        .env("OCI_RO_DATA_MANIFESTS", digests(&mut image.all_manifests()))
        .env("OCI_RO_DATA_BLOBS", digests(&mut image.blobs()))
        .env("OCI_RO_DATA_REFERRERS", digests(&mut std::iter::once(&image.root)))
        .env("OCI_RESULTS_DIR", dir.join("results"));
    let output = process::run("the conformance suite", command, PATIENCE).await?;
    let report = Report::parse(output.stdout);
    ensure!(!report.verdicts.is_empty(), "the conformance suite said nothing\n{}", process::tail(&output.stderr));
    Ok(report)
}
