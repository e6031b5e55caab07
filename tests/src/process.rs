//! Child processes that end with the test, however the test ends.
//!
//! Dropping a `Process` kills it and waits for it. If the test runner itself is killed, the kernel
//! does: children start through `setpriv --pdeathsig KILL`, which needs no unsafe `pre_exec` here,
//! and look whether they still have their parent once that is set. The signal comes when the
//! *thread* that forked ends, so one thread, which lives as long as the program, starts all children.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::scratch::Scratch;

/// A running child, its log in a file.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// What a command that ran to its end said.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// The start of every command: `program` dies when this program does. Arguments follow as usual.
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    let still_ours = r#"[ "$PPID" = "$0" ] && exec "$@""#;
    command.args(["--pdeathsig", "KILL", "--", "sh", "-c", still_ours]);
    command.arg(std::process::id().to_string()).arg(program);
    command
}

impl Process {
    /// Starts a command made by [`command`] or by a `Place`; both its outputs go to the file `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out = File::options().create(true).append(true).open(log).context("cannot open a log")?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = spawn(command).with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far, to both outputs.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = pid_of(&self.child)?;
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end, without looking again and again: the kernel tells.
    pub async fn exit(&mut self, within: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        let pidfd = pidfd_open(pid_of(&self.child)?, PidfdFlags::empty())?;
        let (ended, end) = tokio::sync::oneshot::channel();
        // A thread of its own: one of the runtime's would hold up the end of a test that gives up.
        std::thread::spawn(move || ended.send(wait_readable(&pidfd, within)));
        if !end.await?? {
            bail!("{} still runs after {within:?}; its log ends:\n{}", self.name, tail(&self.log()));
        }
        Ok(self.child.wait()?)
    }

    /// Resident memory now, and processor time used so far.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process costs.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Resident memory.
    pub resident_bytes: u64,
    /// The most resident memory it ever had.
    pub peak_bytes: u64,
    /// Processor time, user and system.
    pub cpu: Duration,
}

impl Usage {
    /// Of this very program.
    pub fn own() -> Result<Self> {
        Self::of(std::process::id())
    }

    fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
                .with_context(|| format!("/proc/{pid}/status has no {key}"))
        };
        // proc(5): utime and stime are fields 14 and 15; the name before them may hold spaces.
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let ticks: u64 = after_name.split(' ').skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        let per_second = rustix::param::clock_ticks_per_second();
        let cpu = Duration::from_millis(ticks * 1000 / per_second);
        Ok(Self { resident_bytes: kib("VmRSS:")? * 1024, peak_bytes: kib("VmHWM:")? * 1024, cpu })
    }
}

/// Runs a command to its end and gives back what it said; kills it when the time is over.
pub async fn run(name: &str, command: Command, within: Duration) -> Result<Output> {
    run_with_input(name, command, "", within).await
}

/// As [`run`], with this on its standard input.
pub async fn run_with_input(name: &str, mut command: Command, input: &str, within: Duration) -> Result<Output> {
    let dir = Scratch::new()?;
    let (out, err) = (dir.join("out"), dir.join("err"));
    fs::write(dir.join("in"), input)?;
    command.stdin(File::open(dir.join("in"))?).stdout(File::create(&out)?).stderr(File::create(&err)?);
    let child = spawn(command).with_context(|| format!("cannot start {name}"))?;
    let mut process = Process { name: name.to_owned(), child, log: err.clone() };
    let status = process.exit(within).await?;
    let text = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Output { status, stdout: text(&out)?, stderr: text(&err)? })
}

/// As [`run`], and an exit status other than 0 is an error that says what the command said.
pub async fn run_ok(name: &str, command: Command, within: Duration) -> Result<String> {
    let output = run(name, command, within).await?;
    if !output.status.success() {
        bail!("{name} failed: {}\n{}", output.status, tail(&output.stderr));
    }
    Ok(output.stdout)
}

/// The last lines of a log, for an error message.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// Whether a descriptor became readable in time; a pidfd does when its process has ended.
fn wait_readable(fd: &OwnedFd, within: Duration) -> std::io::Result<bool> {
    let timeout = rustix::event::Timespec::try_from(within).map_err(std::io::Error::other)?;
    let ready = rustix::event::poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout))?;
    Ok(ready > 0)
}

fn pid_of(child: &Child) -> Result<Pid> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.context("a process has no pid")
}

type Start = (Command, SyncSender<std::io::Result<Child>>);

/// Starts a command on the one thread whose end is the end of the program.
fn spawn(command: Command) -> Result<Child> {
    static STARTER: OnceLock<SyncSender<Start>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        // Each caller waits for its answer, so nothing is ever queued for long.
        let (send, receive) = sync_channel::<Start>(16);
        std::thread::spawn(move || {
            for (mut command, answer) in receive {
                let _ = answer.send(command.spawn());
            }
        });
        send
    });
    let (answer, child) = sync_channel(1);
    starter.send((command, answer)).context("the thread that starts processes is gone")?;
    Ok(child.recv().context("the thread that starts processes is gone")??)
}
