//! What works at a control plane: kube-controller-manager, with the controllers that a test names, and kube-scheduler,
//! the real ones.
//!
//! With controllers pods come out of DaemonSets, and admission policies are type-checked; with the scheduler pods get
//! nodes. There is still no kubelet: nothing runs, unless `kubelets` says that it does.

use anyhow::{Context as _, Result};

use crate::kubernetes::ControlPlane;
use crate::net::Place;
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::tools;

/// Running controllers.
pub struct Controllers {
    process: Process,
    // Last: the directory goes when the process is gone.
    _dir: Scratch,
}

impl Controllers {
    /// Starts those of these names, such as `daemonset-controller`. They begin by themselves.
    pub fn start(place: &Place, plane: &ControlPlane, names: &[&str]) -> Result<Self> {
        let program = tools::controller_manager().context("no controllers: scripts/install-tools kubernetes")?;
        let dir = Scratch::new()?;
        let mut command = place.command(program);
        command.arg(format!("--kubeconfig={}", plane.admin_kubeconfig("default")?.display()));
        command.arg(format!("--controllers={}", names.join(",")));
        // Nobody asks it for anything, and there is one.
        command.args(["--secure-port=0", "--leader-elect=false"]);
        let process = Process::start("kube-controller-manager", command, &dir.join("log"))?;
        Ok(Self { process, _dir: dir })
    }

    /// The end of what they logged.
    pub fn log(&self) -> String {
        process::tail(&self.process.log())
    }
}

/// A running scheduler, with its own defaults.
pub struct Scheduler {
    process: Process,
    // Last: the directory goes when the process is gone.
    _dir: Scratch,
}

impl Scheduler {
    /// Starts one. It begins by itself.
    pub fn start(place: &Place, plane: &ControlPlane) -> Result<Self> {
        let program = tools::scheduler().context("no kube-scheduler: scripts/install-tools kube")?;
        let dir = Scratch::new()?;
        let mut command = place.command(program);
        command.arg(format!("--kubeconfig={}", plane.admin_kubeconfig("default")?.display()));
        command.args(["--secure-port=0", "--leader-elect=false"]);
        let process = Process::start("kube-scheduler", command, &dir.join("log"))?;
        Ok(Self { process, _dir: dir })
    }

    /// The end of what it logged.
    pub fn log(&self) -> String {
        process::tail(&self.process.log())
    }
}
