//! What the door shows, and which certificates it takes: files, read again when they change.
//!
//! The kubelet exchanges a Secret's files under a running scaler. Files that cannot be used are no reason to answer
//! nobody: what was read before holds, and the log says so.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use darter_base::log::chain;
use rustls::ServerConfig;
use rustls::server::NoServerSessionStorage;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{info, warn};

use super::GrpcError;
use super::guests::Guests;
use crate::config::{Grpc, given};

/// The files of `[grpc]`, and what was in them when they last could be used.
#[derive(Debug)]
pub(super) struct Certificate {
    cert: PathBuf,
    key: PathBuf,
    /// Of the authority by which KEDA is known, where it is held to a certificate.
    authority: Option<PathBuf>,
    names: Vec<String>,
    state: Mutex<(Vec<Stamp>, Shown)>,
}

/// By what a file that was exchanged is told from the one before it.
type Stamp = Option<(SystemTime, u64)>;

/// What new connections meet.
#[derive(Debug, Clone)]
pub(super) struct Shown {
    /// For a handshake.
    pub(super) config: Arc<ServerConfig>,
    /// Whose certificates are taken; none: nobody is asked for one.
    pub(super) guests: Option<Arc<Guests>>,
}

impl Certificate {
    /// None where the door is plaintext.
    pub(super) fn read(settings: &Grpc) -> Result<Option<Self>, GrpcError> {
        let (Some(cert), Some(key)) = (given(&settings.cert), given(&settings.key)) else { return Ok(None) };
        let (authority, names) = (given(&settings.keda_ca), settings.keda_names.clone());
        let stamps = stamps(cert, key, authority);
        let shown = load(cert, key, authority, &names)?;
        let (cert, key, authority) = (cert.to_owned(), key.to_owned(), authority.map(Path::to_owned));
        Ok(Some(Self { cert, key, authority, names, state: Mutex::new((stamps, shown)) }))
    }

    /// As the files are now; as they were, while they cannot be used.
    pub(super) fn shown(&self) -> Shown {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let authority = self.authority.as_deref();
        let stamps = stamps(&self.cert, &self.key, authority);
        if stamps != state.0 {
            state.0 = stamps;
            match load(&self.cert, &self.key, authority, &self.names) {
                Ok(shown) => {
                    info!(cert = %self.cert.display(), "read the certificates again");
                    state.1 = shown;
                }
                Err(error) => warn!(error = %chain(&error), "the certificates that were read before hold"),
            }
        }
        state.1.clone()
    }
}

fn stamps(cert: &Path, key: &Path, authority: Option<&Path>) -> Vec<Stamp> {
    let of = |path: &Path| std::fs::metadata(path).and_then(|data| Ok((data.modified()?, data.len()))).ok();
    [Some(cert), Some(key), authority].into_iter().flatten().map(of).collect()
}

/// Why a file cannot be used.
type Cause = Box<dyn std::error::Error + Send + Sync>;

fn load(cert: &Path, key: &Path, authority: Option<&Path>, names: &[String]) -> Result<Shown, GrpcError> {
    let read = |path: &Path| {
        Guests::new(certificates(path)?, names)
            .map(Arc::new)
            .map_err(|source| GrpcError::Authority { path: path.to_owned(), source })
    };
    let guests = authority.map(read).transpose()?;
    let wrong = |source| GrpcError::Certificate { cert: cert.to_owned(), key: key.to_owned(), source };
    let config = config(cert, key, guests.clone()).map_err(wrong)?;
    Ok(Shown { config: Arc::new(config), guests })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, GrpcError> {
    let read = || -> Result<_, Cause> {
        let found = CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>()?;
        if found.is_empty() { Err("there is no certificate in it".into()) } else { Ok(found) }
    };
    read().map_err(|source| GrpcError::Authority { path: path.to_owned(), source })
}

fn config(cert: &Path, key: &Path, guests: Option<Arc<Guests>>) -> Result<ServerConfig, Cause> {
    let chain = CertificateDer::pem_file_iter(cert)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let is_held = guests.is_some();
    let config = match guests {
        Some(guests) => config.with_client_cert_verifier(guests),
        None => config.with_no_client_auth(),
    };
    let mut config = config.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    if is_held {
        // Who takes a session up again shows no certificate again, though it may have expired since.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(config)
}
