//! Debian's docker-registry 2.8: a real registry, with a password and TLS if wanted.
//!
//! And the client side of a push, which works with any registry.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, StatusCode, header};
use http_body_util::StreamBody;
use hyper::body::Frame;
use rustls::ClientConfig;

use crate::http::{Answer, Client};
use crate::image::{Content, Image, Item};
use crate::net::{Place, Port};
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::tls::Authority;
use crate::tools;

/// How a registry is run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// User and password; without, everybody may read and write.
    pub password: Option<(String, String)>,
    /// Whether it speaks https, with a certificate of an authority of its own.
    pub tls: bool,
    /// The port, else a free one.
    pub port: Option<u16>,
}

impl Options {
    /// http with this user and password.
    pub fn with_password(user: &str, password: &str) -> Self {
        Self { password: Some((user.to_owned(), password.to_owned())), ..Self::default() }
    }
}

/// A running docker-registry.
pub struct Registry {
    process: Process,
    address: SocketAddr,
    _port: Option<Port>,
    client: Client,
    authority: Option<Authority>,
    options: Options,
    dir: Scratch,
}

impl Registry {
    /// Starts one and waits until it answers.
    pub async fn start(place: &Place, options: Options) -> Result<Self> {
        let dir = Scratch::new()?;
        let kept = if options.port.is_none() { Some(place.port()?) } else { None };
        let port = kept.as_ref().map(Port::number).or(options.port).context("no port")?;
        let address = SocketAddr::new(place.address(), port);
        let authority = if options.tls { Some(Authority::new()?) } else { None };
        std::fs::write(dir.join("config.yml"), config(&dir, address, &options, authority.as_ref())?)?;
        let program = tools::find("docker-registry").context("docker-registry is not installed")?;
        let mut command = place.command(program);
        command.arg("serve").arg(dir.join("config.yml"));
        let process = Process::start("docker-registry", command, &dir.join("log"))?;
        let client = client(place, &options, authority.as_ref())?;
        let mut registry = Self { process, address, _port: kept, client, authority, options, dir };
        registry.ready(place).await?;
        Ok(registry)
    }

    async fn ready(&mut self, place: &Place) -> Result<()> {
        // An exit before it listens is told at once, by its log.
        let listening = tokio::select! {
            listening = place.wait_for(self.address, Duration::from_secs(20)) => listening,
            status = self.process.exit(Duration::from_secs(30)) => bail!("docker-registry: {}\n{}", status?, self.process.log()),
        };
        listening.with_context(|| process::tail(&self.process.log()))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://address` or `https://address`.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.options.tls { "https" } else { "http" }, self.address)
    }

    /// User and password, if it wants them.
    pub fn password(&self) -> Option<(&str, &str)> {
        self.options.password.as_ref().map(|(user, password)| (user.as_str(), password.as_str()))
    }

    /// The file of its certificate authority, if it speaks https.
    pub fn ca(&self) -> Option<PathBuf> {
        self.authority.as_ref().map(|_| self.dir.join("ca.pem"))
    }

    /// A client that may push.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What a client needs to trust it over https.
    pub fn trust(&self) -> Result<Option<Arc<ClientConfig>>> {
        self.authority.as_ref().map(Authority::client_config).transpose()
    }

    /// Uploads an image as `repository:tag`.
    pub async fn push(&self, image: &Image, repository: &str, tag: &str) -> Result<()> {
        push(&self.client, &self.url(), image, repository, tag).await
    }

    /// Its log: one line a request, with status and bytes written.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The process, to stop or signal it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn client(place: &Place, options: &Options, authority: Option<&Authority>) -> Result<Client> {
    let mut client = Client::new(place.clone());
    if let Some((user, password)) = &options.password {
        client = client.basic(user, password);
    }
    if let Some(authority) = authority {
        client = client.trusting(authority.client_config()?);
    }
    Ok(client)
}

fn config(dir: &Scratch, address: SocketAddr, options: &Options, authority: Option<&Authority>) -> Result<String> {
    let mut text = format!(
        "version: 0.1\n\
         log: {{level: info, formatter: json}}\n\
         storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
         http:\n  addr: {address}\n",
        dir.dir("data")?.display()
    );
    if let Some(authority) = authority {
        std::fs::write(dir.join("ca.pem"), authority.pem())?;
        let (certificate, key) = authority.issue(&[&address.ip().to_string()])?.write(dir.path())?;
        writeln!(text, "  tls: {{certificate: {}, key: {}}}", certificate.display(), key.display())?;
    }
    if let Some((user, password)) = &options.password {
        let file = dir.join("htpasswd");
        std::fs::write(&file, htpasswd(user, password)?)?;
        writeln!(text, "auth: {{htpasswd: {{realm: test, path: {}}}}}", file.display())?;
    }
    Ok(text)
}

/// docker-registry takes bcrypt only.
fn htpasswd(user: &str, password: &str) -> Result<Vec<u8>> {
    let program = tools::find("htpasswd").context("htpasswd is not installed")?;
    // The cheapest bcrypt: it is paid for at every request.
    let output = std::process::Command::new(program).args(["-C", "4", "-Bbn", user, password]).output()?;
    ensure!(output.status.success(), "htpasswd failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Uploads an image to the registry at `url`: blobs, then manifests, then the tag.
pub async fn push(client: &Client, url: &str, image: &Image, repository: &str, tag: &str) -> Result<()> {
    for blob in image.blobs() {
        push_blob(client, url, repository, blob).await.with_context(|| format!("cannot push {}", blob.digest()))?;
    }
    for manifest in &image.manifests {
        push_manifest(client, url, repository, manifest, &manifest.digest().to_string()).await?;
    }
    push_manifest(client, url, repository, &image.root, tag).await
}

async fn push_manifest(client: &Client, url: &str, repository: &str, item: &Item, reference: &str) -> Result<()> {
    let url = format!("{url}/v2/{repository}/manifests/{reference}");
    let answer = client.send_bytes(Method::PUT, &url, &item.descriptor.media_type, item.content.to_bytes()).await?;
    created(&answer)
}

/// POST for a place to upload to, then one PUT of the whole blob, computed while it is sent.
async fn push_blob(client: &Client, url: &str, repository: &str, item: &Item) -> Result<()> {
    let known = client.head(&format!("{url}/v2/{repository}/blobs/{}", item.digest())).await?;
    if known.status == StatusCode::OK {
        return Ok(());
    }
    let begin = client.call(Method::POST, &format!("{url}/v2/{repository}/blobs/uploads/"), &[]).await?;
    ensure!(begin.status == StatusCode::ACCEPTED, "upload refused: {} {}", begin.status, begin.text());
    let location = begin.header("location");
    let location = if location.starts_with('/') { format!("{url}{location}") } else { location.to_owned() };
    let separator = if location.contains('?') { '&' } else { '?' };
    let request = Request::put(format!("{location}{separator}digest={}", item.digest()))
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, item.size())
        .body(StreamBody::new(stream::iter(chunks(item.content.clone()))))?;
    // However long it takes: the blob may have any size.
    let answer = client.send(request).await?;
    ensure!(answer.status() == StatusCode::CREATED, "upload failed: {}", answer.status());
    Ok(())
}

fn created(answer: &Answer) -> Result<()> {
    ensure!(answer.status == StatusCode::CREATED, "{} {}", answer.status, answer.text());
    Ok(())
}

fn chunks(content: Content) -> impl Iterator<Item = Result<Frame<Bytes>, std::convert::Infallible>> + Send {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let mut buffer = vec![0; 256 * 1024];
        let count = content.read_at(offset, &mut buffer);
        buffer.truncate(count);
        offset += count as u64;
        (count > 0).then(|| Ok(Frame::data(buffer.into())))
    })
}
