//! A certificate authority of one test, for registries that speak https.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// A certificate authority that nobody trusts unless told.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key.
pub struct Identity {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    /// A new one.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    /// A certificate for these names and addresses.
    pub fn issue(&self, names: &[&str]) -> Result<Identity> {
        self.sign(CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?)
    }

    /// The same, holding from and until so many seconds from now.
    pub fn issue_within(&self, names: &[&str], from: i64, until: i64) -> Result<Identity> {
        let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
        let at = |seconds: i64| -> Result<_> {
            Ok(rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(now + seconds)?))
        };
        (params.not_before, params.not_after) = (at(from)?, at(until)?);
        self.sign(params)
    }

    fn sign(&self, params: CertificateParams) -> Result<Identity> {
        let key = KeyPair::generate()?;
        Ok(Identity { certificate: params.signed_by(&key, &self.issuer)?, key })
    }

    /// Its own certificate, for `ca` settings.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// What a client that trusts only this authority is configured with.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>> {
        self.client_config_with(provider())
    }

    /// The same with other cipher suites.
    pub fn client_config_with(&self, provider: Arc<rustls::crypto::CryptoProvider>) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone())?;
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
    }
}

impl Identity {
    /// What a server that shows this certificate is configured with.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
        Ok(Arc::new(config.with_no_client_auth().with_single_cert(vec![self.certificate.der().clone()], key)?))
    }

    /// The certificate and its key, as text.
    pub fn pem(&self) -> (String, String) {
        (self.certificate.pem(), self.key.serialize_pem())
    }

    /// Writes `cert.pem` and `key.pem` for a program that reads files.
    pub fn write(&self, dir: &Path) -> Result<(PathBuf, PathBuf)> {
        let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        std::fs::write(&certificate, self.certificate.pem())?;
        std::fs::write(&key, self.key.serialize_pem())?;
        Ok((certificate, key))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
