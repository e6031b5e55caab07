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
        Self::start_on(root, "", extra).await
    }

    /// The same over TLS 1.3 with this certificate and key, the cipher suite of the client's choice.
    pub async fn start_tls(root: &Path, certificate: &Path, key: &Path) -> Result<Self> {
        let (certificate, key) = (certificate.display(), key.display());
        let extra = format!(
            "ssl_protocols TLSv1.3; ssl_prefer_server_ciphers off; ssl_certificate {certificate}; \
             ssl_certificate_key {key};"
        );
        Self::start_on(root, " ssl", &extra).await
    }

    async fn start_on(root: &Path, listen: &str, extra: &str) -> Result<Self> {
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
             keepalive_requests 1000000;\n\
             server {{ listen {address}{listen}; root {}; {extra} }} }}\n",
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
