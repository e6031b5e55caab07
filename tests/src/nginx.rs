//! A real nginx serving a directory: the peer of the benchmarks, and an origin with habits of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::net::{Place, Port};
use crate::process::Process;
use crate::scratch::Scratch;
use crate::tools;

/// One process, sendfile on.
pub struct Nginx {
    address: SocketAddr,
    process: Process,
    _port: Port,
    // Last: the directory goes when the process is gone.
    _dir: Scratch,
}

impl Nginx {
    /// Starts one on the host, serving `root`. `extra` are more directives of its server, such as
    /// `max_ranges 0;`.
    pub async fn start(root: &Path, extra: &str) -> Result<Self> {
        let dir = Scratch::new()?;
        let port = Place::Host.port()?;
        let address = SocketAddr::new(Place::Host.address(), port.number());
        let at = dir.path().display();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let temporary: String = temporary.iter().map(|name| format!("{name}_temp_path {at}/{name};\n")).collect();
        let text = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error;\n\
             events {{ worker_connections 512; }}\n\
             http {{ access_log off; sendfile on; tcp_nopush on; sendfile_max_chunk 2m;\n{temporary}\
             default_type application/octet-stream;\n\
             server {{ listen {address}; root {}; {extra} }} }}\n",
            root.display()
        );
        std::fs::write(dir.join("nginx.conf"), text)?;
        let mut command = Place::Host.command(tools::find("nginx").context("no nginx")?);
        command.arg("-c").arg(dir.join("nginx.conf"));
        let process = Process::start("nginx", command, &dir.join("log"))?;
        Place::Host.wait_for(address, Duration::from_secs(10)).await.with_context(|| process.log())?;
        Ok(Self { address, process, _port: port, _dir: dir })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Processor time used so far.
    pub fn cpu(&self) -> Result<Duration> {
        Ok(self.process.usage()?.cpu)
    }
}
