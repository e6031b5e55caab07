//! `darter prewarm`: sends the order to the agent's unix socket and shows how it goes.
//!
//! On a terminal a bar for each blob, elsewhere a line for each blob that is there. Ctrl-C closes
//! the connection: the agent stops, and keeps what has arrived.

use std::collections::HashMap;
use std::io::{IsTerminal, Read};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use darter_agent::prewarm::{BlobSize, Event, Login, Order as Wire, Pin, Release};
use darter_core::ImageName;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::args::Order;
use crate::show::print;
use crate::socket;

/// Exit status where every image is here, and one is not pinned though it should be. 2 is clap's.
const NOT_PINNED: u8 = 3;

/// How an order ended, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Done,
    /// The image is here all the same.
    NotPinned,
    Failed,
}

/// Brings or releases all images of an order, one after the other.
pub(crate) async fn run(order: Order) -> Result<ExitCode> {
    let socket = order.source.load()?.config()?.admin_socket();
    let login = login(&order)?;
    let mut worst = Outcome::Done;
    // One listener for all images: a signal between two of them would be lost.
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    for image in &order.images {
        let mut view = View::new(image, order.json);
        let (path, body) = if order.unpin {
            ("/v1/unpin", serde_json::to_string(&Release { image: image.clone() })?)
        } else {
            let (image, login) = (image.clone(), login.clone());
            let wire = Wire { image, store_only: order.store_only, pin: order.pin, login };
            ("/v1/prewarm", serde_json::to_string(&wire)?)
        };
        let outcome = tokio::select! {
            outcome = follow(&socket, path, &body, &mut view) => outcome,
            _ = &mut interrupted => bail!("interrupted; what has arrived is kept"),
        };
        let what = if order.unpin { "release" } else { "prewarm" };
        worst = worst.max(outcome.with_context(|| format!("cannot {what} {image}"))?);
    }
    Ok(match worst {
        Outcome::Done => ExitCode::SUCCESS,
        Outcome::NotPinned => NOT_PINNED.into(),
        Outcome::Failed => ExitCode::FAILURE,
    })
}

/// A password or a token that is longer is a file of another kind.
const PASSWORD_MAX: usize = 8 * 1024;

/// The credential of this call, its password from stdin.
fn login(order: &Order) -> Result<Option<Login>> {
    let Some(username) = order.username.clone() else { return Ok(None) };
    ensure!(!username.is_empty() && !username.contains(':'), "--username is empty or has a colon in it");
    let names = order.images.iter().map(|image| image.parse::<ImageName>().with_context(|| format!("`{image}`")));
    let mut registries = names.map(|name| Ok(name?.registry)).collect::<Result<Vec<_>>>()?;
    registries.dedup();
    // What opens one registry is not another's to see.
    ensure!(registries.len() == 1, "--username is for one registry: prewarm the images of each by a call of their own");
    let mut password = String::new();
    let limit = PASSWORD_MAX as u64 + 1;
    std::io::stdin().take(limit).read_to_string(&mut password).context("cannot read the password from stdin")?;
    let password = password.strip_suffix('\n').map_or(&*password, |line| line.strip_suffix('\r').unwrap_or(line));
    ensure!(!password.is_empty(), "standard input has no password");
    ensure!(password.len() < PASSWORD_MAX, "standard input is too long for a password");
    Ok(Some(Login { username, password: password.to_owned() }))
}

/// Sends one order and shows its events.
async fn follow(socket: &Path, path: &str, body: &str, view: &mut View) -> Result<Outcome> {
    let stream = socket::connect(socket).await?.with_context(|| {
        format!("no agent answers at {} (admin.socket): start `darter agent` first", socket.display())
    })?;
    let mut lines = socket::post(stream, path, body).await?;
    while let Some(line) = lines.next_line().await.context("the agent went away")? {
        let event = serde_json::from_str(&line).with_context(|| format!("the agent said `{line}`"))?;
        match view.show(&line, event)? {
            Some(outcome) => return Ok(outcome),
            None => continue,
        }
    }
    bail!("the agent went away before it was done")
}

/// How events look.
struct View {
    image: String,
    json: bool,
    bars: Option<MultiProgress>,
    blobs: HashMap<String, (u64, ProgressBar)>,
}

impl View {
    fn new(image: &str, json: bool) -> Self {
        // What goes into a file is said there, though somebody watches.
        let is_watched = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        let bars = (!json && is_watched).then(MultiProgress::new);
        Self { image: image.to_owned(), json, bars, blobs: HashMap::new() }
    }

    /// Shows one event. `Some` at the last.
    fn show(&mut self, line: &str, event: Event) -> Result<Option<Outcome>> {
        if self.json {
            print(&format!("{line}\n"))?;
        }
        match event {
            Event::Image { digest, blobs } => self.begin(&digest, blobs)?,
            Event::Blob { digest, bytes } => self.advance(&digest, bytes)?,
            Event::Unpacking => self.say("containerd unpacks".to_owned())?,
            Event::Done { seconds, bytes, image_ref, pin } => {
                let here =
                    image_ref.map_or_else(|| "in the store".to_owned(), |name| format!("in containerd as {name}"));
                let pinned = match &pin {
                    Pin::Set { lifetime, .. } => format!(", pinned for {lifetime}"),
                    Pin::Refused { .. } | Pin::NotOrdered => ", not pinned".to_owned(),
                };
                self.say(format!("{bytes} bytes in {seconds:.1} s, {here}{pinned}"))?;
                let Pin::Refused { reason } = pin else { return Ok(Some(Outcome::Done)) };
                eprintln!("{}: it is here, but not pinned, and goes when others need its room: {reason}", self.image);
                return Ok(Some(Outcome::NotPinned));
            }
            Event::Unpinned { was_pinned } => {
                self.say(if was_pinned { "no longer pinned" } else { "was not pinned" }.to_owned())?;
                return Ok(Some(Outcome::Done));
            }
            Event::Failed { reason } => {
                eprintln!("{}: failed: {reason}", self.image);
                return Ok(Some(Outcome::Failed));
            }
        }
        Ok(None)
    }

    fn begin(&mut self, digest: &str, blobs: Vec<BlobSize>) -> Result<()> {
        self.say(format!("{} blobs of {digest}", blobs.len()))?;
        let template = "{prefix:19} [{wide_bar}] {bytes:>11} of {total_bytes:>11} {bytes_per_sec:>13}";
        let style = ProgressStyle::with_template(template).context("the progress bar's template is wrong")?;
        for blob in blobs {
            let bar = match &self.bars {
                Some(bars) => bars.add(ProgressBar::new(blob.size)),
                None => ProgressBar::hidden(),
            };
            bar.set_style(style.clone().progress_chars("=> "));
            bar.set_prefix(blob.digest.chars().take(19).collect::<String>());
            self.blobs.insert(blob.digest, (blob.size, bar));
        }
        Ok(())
    }

    fn advance(&mut self, digest: &str, bytes: u64) -> Result<()> {
        let Some((size, bar)) = self.blobs.get(digest) else { return Ok(()) };
        bar.set_position(bytes);
        if bytes < *size {
            return Ok(());
        }
        bar.finish();
        // Bars speak for themselves.
        if self.bars.is_some() { Ok(()) } else { self.say(format!("{digest} {size} bytes")) }
    }

    fn say(&self, text: String) -> Result<()> {
        let line = format!("{}: {text}", self.image);
        match &self.bars {
            _ if self.json => Ok(()),
            Some(bars) => bars.println(line).context("cannot print"),
            None => print(&(line + "\n")).map(|_| ()),
        }
    }
}
