//! `darter status`: asks the agent how its node is, once or again and again, and shows it.
//!
//! On a terminal `--watch` draws one screen anew; in a pipe each look is a block of its own.

mod screen;
#[cfg(test)]
mod tests;
mod text;

use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use darter_core::status::Status;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::Signals;
use crate::args::{Look, Output};
use crate::show::print;
use crate::socket;

use self::screen::Screen;
use self::text::Style;

/// Exit status where the agent could not be asked. clap ends with the same for a wrong command line.
const CANNOT_TELL: u8 = 2;
/// The agent tells what it knows, and waits for nobody.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks.
const PAUSE: Duration = Duration::from_secs(2);
/// Where the address names none.
const PORT: u16 = 4004;

/// Looks, and says how the node is by the exit status too: of the last look.
pub(crate) async fn run(look: Look) -> Result<ExitCode> {
    let told = match look.place() {
        Ok(place) if look.watch => return watch(&place, look.output).await,
        Ok(place) => ask(&place).await,
        Err(error) => Err(error),
    };
    let code = code(&told);
    match told {
        Ok(status) => print(&rendered(&status, look.output)?).map(|_| ())?,
        Err(error) => eprintln!("darter: {error:#}"),
    }
    Ok(code)
}

fn code(told: &Result<Status>) -> ExitCode {
    match told {
        Ok(status) if status.ready => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(_) => CANNOT_TELL.into(),
    }
}

fn rendered(status: &Status, output: Output) -> Result<String> {
    Ok(match output {
        // One line: in a pipe each look is one.
        Output::Json => serde_json::to_string(status)? + "\n",
        Output::Text => text::status(status, style()),
    })
}

/// Colours and a width for people at a terminal; programs get neither.
fn style() -> Style {
    let terminal = console::Term::stdout();
    if !std::io::stdout().is_terminal() {
        return Style::default();
    }
    let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    Style { is_coloured: !is_plain, width: terminal.size_checked().map(|(_, columns)| columns.into()) }
}

/// Until Ctrl-C or SIGTERM. An agent that does not answer is one of the things to watch.
async fn watch(place: &Place, output: Output) -> Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let mut screen = (std::io::stdout().is_terminal() && output == Output::Text).then(Screen::open).transpose()?;
    let mut is_first = true;
    let mut last = CANNOT_TELL.into();
    loop {
        let told = tokio::select! {
            told = ask(place) => told,
            () = signals.next() => return Ok(last),
        };
        last = code(&told);
        let said = match (&told, output) {
            (Ok(status), _) => rendered(status, output)?,
            (Err(error), Output::Text) => text::unanswered(error),
            // Objects alone go where objects are read.
            (Err(error), Output::Json) => {
                eprintln!("darter: {error:#}");
                String::new()
            }
        };
        let gap = if is_first || output == Output::Json { "" } else { "\n" };
        is_first = false;
        match &mut screen {
            Some(screen) => screen.draw(&said)?,
            None if !is_read(&format!("{gap}{said}"))? => return Ok(last),
            None => {}
        }
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = signals.next() => return Ok(last),
        }
    }
}

/// Writes to stdout; false where nobody reads it any more (`| head`): who watches ends then.
fn is_read(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("cannot print"),
    }
}

/// Where the agent is asked.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// Host and port.
    authority: String,
    /// Who says so, for the error.
    said_by: &'static str,
}

impl Look {
    /// As told, else as configured.
    fn place(&self) -> Result<Place> {
        if let Some(url) = &self.admin {
            return Ok(Place { authority: authority(url)?, said_by: "--admin" });
        }
        let mut listen = self.source.load()?.config()?.admin.listen;
        if listen.ip().is_unspecified() {
            listen.set_ip(if listen.is_ipv4() { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() });
        }
        Ok(Place { authority: listen.to_string(), said_by: "admin.listen" })
    }
}

/// `http://node:4004`, `node:4004` or `node`.
fn authority(url: &str) -> Result<String> {
    let rest = url.strip_prefix("http://").unwrap_or(url);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let is_address = !rest.is_empty() && !rest.contains(['/', '?', '#', '@']);
    ensure!(is_address, "--admin `{url}` is not http://<host>:<port>");
    let is_whole = rest.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) && !rest.ends_with(']');
    Ok(if is_whole { rest.to_owned() } else { format!("{rest}:{PORT}") })
}

/// One question.
async fn ask(place: &Place) -> Result<Status> {
    let Place { authority, said_by } = place;
    let asked = async {
        let stream = TcpStream::connect(authority).await.with_context(|| {
            format!(
                "no agent answers at http://{authority} ({said_by}): start `darter agent`, or read its log for why it \
                 ended (`journalctl -u darter`, `kubectl logs`); --admin asks another address"
            )
        })?;
        socket::get(stream, authority, "/v1/status").await.with_context(|| format!("http://{authority} broke off"))
    };
    let asked = timeout(PATIENCE, asked).await;
    let (code, body) = asked.with_context(|| {
        format!(
            "http://{authority} ({said_by}) gives no answer in {} s: see whether the node is up and whether a \
             firewall stands between; --admin asks another address",
            PATIENCE.as_secs()
        )
    })??;
    match code {
        200 => serde_json::from_str(&body).with_context(|| {
            format!("what http://{authority} ({said_by}) answers is no status of a darter agent of this version")
        }),
        404 => bail!(
            "http://{authority} ({said_by}) has no /v1/status: an agent that is older than this command, or no \
            darter agent; `curl http://{authority}/readyz` may tell"
        ),
        0 => bail!("what answers at http://{authority} ({said_by}) is no HTTP, so no darter agent"),
        code => bail!("http://{authority} ({said_by}) answers {code}: {}", body.lines().next().unwrap_or_default()),
    }
}
