//! Credentials from a docker `config.json`: `auths`, and the helpers it names.
//!
//! The file is read at each use, as it may be replaced. Helpers are other programs: they get the
//! registry's name on stdin, a bounded time, and their answer is kept for a minute.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use darter_core::Registry;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::Instant;

use super::OriginError;
use super::credential::{Account, Basic, Secret};
use super::node::read;
use super::slots::Slots;

/// A helper may ask a cloud's API; past this it hangs.
const HELPER_PATIENCE: Duration = Duration::from_secs(10);
/// A helper's answer is a user and a token.
const HELPER_MAX_BYTES: u64 = 64 * 1024;
/// How long a helper's answer is used: a pull of thirty layers starts it once.
const HELPER_FRESH: Duration = Duration::from_secs(60);
/// The name of Docker Hub in these files.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

pub(super) struct DockerConfig {
    path: PathBuf,
    /// The names under which the registry may stand in the file, the usual one first.
    names: Vec<String>,
    helped: Slots<String, (Option<Account>, Instant)>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct File {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

impl DockerConfig {
    pub(super) fn new(path: PathBuf, registry: &Registry) -> Self {
        let name = registry.as_str();
        let mut names = if matches!(name, "docker.io" | "registry-1.docker.io" | "index.docker.io") {
            vec![DOCKER_HUB.to_owned(), "index.docker.io".to_owned(), "docker.io".to_owned()]
        } else {
            vec![name.to_owned()]
        };
        names.extend(["", "/", "/v1/", "/v2/"].map(|path| format!("https://{name}{path}")));
        Self { path, names, helped: Slots::new(4, HELPER_PATIENCE) }
    }

    /// The credential for the registry, if the file has one.
    pub(super) async fn get(&self, refused: Option<&Account>) -> Result<Option<Account>, OriginError> {
        let content = read(&self.path).await?;
        // serde's message would show a piece of the file.
        let file: File = serde_json::from_slice(&content).map_err(|_| OriginError::File {
            path: self.path.clone(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, "it is not a docker config.json"),
        })?;
        let helper = self.names.iter().find_map(|name| file.cred_helpers.get(name)).or(file.creds_store.as_ref());
        if let Some(helper) = helper
            && let Some(account) = self.help(helper, refused).await?
        {
            return Ok(Some(account));
        }
        Ok(self.names.iter().find_map(|name| file.auths.get(name)).and_then(Entry::account))
    }

    async fn help(&self, helper: &str, refused: Option<&Account>) -> Result<Option<Account>, OriginError> {
        let mut slot = self.helped.lock(&helper.to_owned()).await?;
        if let Some((account, until)) = &*slot
            && *until > Instant::now()
            && (refused.is_none() || account.as_ref() != refused)
        {
            return Ok(account.clone());
        }
        *slot = None;
        let account = ask(helper, &self.names[0]).await?;
        *slot = Some((account.clone(), Instant::now() + HELPER_FRESH));
        Ok(account)
    }
}

impl Entry {
    /// As docker reads it: where there is an identity token, `auth` has the user only.
    fn account(&self) -> Option<Account> {
        if let Some(token) = self.identitytoken.as_deref().filter(|token| !token.is_empty()) {
            return Some(Account::Identity(Secret::new(token)));
        }
        let encoded = self.auth.as_deref().filter(|auth| !auth.is_empty());
        let basic = encoded.and_then(Basic::of_encoded).or_else(|| {
            let user = self.username.as_deref().filter(|user| !user.is_empty())?;
            Some(Basic::of(user, self.password.as_deref()?))
        });
        basic.map(Account::Password)
    }
}

/// Runs `docker-credential-<helper> get`.
async fn ask(helper: &str, server: &str) -> Result<Option<Account>, OriginError> {
    let program = format!("docker-credential-{helper}");
    // A name with a slash would be a path to any program.
    if !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err(OriginError::Helper { program, reason: "its name is not that of a helper", source: None });
    }
    helped(&program, server).await
}

pub(super) async fn helped(program: &str, server: &str) -> Result<Option<Account>, OriginError> {
    let failed = |reason, source| OriginError::Helper { program: program.to_owned(), reason, source };
    let run = tokio::time::timeout(HELPER_PATIENCE, run(program, server)).await;
    let (success, output) = match run {
        Err(_) => return Err(failed("it does not end", None)),
        Ok(Err(error)) => return Err(failed("it cannot be run", Some(error))),
        Ok(Ok(ended)) => ended,
    };
    if !success {
        // The protocol has no other way to say that there is none.
        let is_none = output.windows(9).any(|words| words == b"not found");
        return if is_none { Ok(None) } else { Err(failed("it failed", None)) };
    }
    let Ok(Helped { username, secret }) = serde_json::from_slice(&output) else {
        return Err(failed("its answer cannot be read", None));
    };
    // The word that docker-credential-helpers has for an identity token.
    let is_identity = username == "<token>";
    Ok(Some(if is_identity {
        Account::Identity(Secret::new(secret))
    } else {
        Account::Password(Basic::of(&username, &secret))
    }))
}

async fn run(program: &str, server: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that ends without reading still has an exit code, which says more.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(HELPER_MAX_BYTES).read_to_end(&mut output).await?;
    }
    Ok((child.wait().await?.success(), output))
}
