//! Whose certificates the door takes, where KEDA is held to one.
//!
//! Agents come through the same door with a token and without a certificate: at the handshake one may be missing, and
//! what is asked as KEDA asks is refused then. One that is shown has to be right.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::crypto::ring;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName};
use rustls::{Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

/// Who is at the other end of a connection, as far as certificates say.
#[derive(Debug)]
pub(super) enum Guest {
    /// None is asked for here.
    Anybody,
    /// One was asked for, and none came.
    Unnamed,
    /// This one, and what it is signed by.
    Named(Vec<CertificateDer<'static>>),
}

/// Checks certificates: who signed them, until when they hold, and whose name is in them.
#[derive(Debug)]
pub(super) struct Guests {
    signed: Arc<dyn ClientCertVerifier>,
    /// One of these; any, where there is none.
    names: Vec<ServerName<'static>>,
}

impl Guests {
    /// Those with a certificate of this authority. Names are DNS names and addresses.
    pub(super) fn new(
        authority: Vec<CertificateDer<'static>>,
        names: &[String],
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let mut roots = RootCertStore::empty();
        for certificate in authority {
            roots.add(certificate)?;
        }
        let provider = Arc::new(ring::default_provider());
        let signed =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).allow_unauthenticated().build()?;
        let names = names.iter().map(|name| ServerName::try_from(name.clone())).collect::<Result<_, _>>()?;
        Ok(Self { signed, names })
    }

    /// Whether a certificate that was taken would be taken now.
    pub(super) fn still(&self, shown: &[CertificateDer<'static>]) -> Result<(), Error> {
        let (first, others) = shown.split_first().ok_or(Error::NoCertificatesPresented)?;
        self.verify_client_cert(first, others, UnixTime::now()).map(|_| ())
    }
}

impl ClientCertVerifier for Guests {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        first: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let taken = self.signed.verify_client_cert(first, others, now)?;
        let parsed = ParsedCertificate::try_from(first)?;
        if self.names.is_empty() || self.names.iter().any(|name| verify_server_name(&parsed, name).is_ok()) {
            Ok(taken)
        } else {
            Err(CertificateError::NotValidForName.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}

/// Why a connection is turned away, as in `darter_scaler_tls_refusals_total{reason}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Turned {
    /// Who asks as KEDA does showed no certificate.
    NoCertificate,
    /// Another authority signed it.
    Authority,
    /// It held until a time that is over, or holds from one that has not come.
    Expired,
    /// None of `grpc.keda_names` is in it.
    Name,
    /// It is none, or none for clients, or its signature is wrong.
    Certificate,
    /// The other end does not know our certificate.
    Untrusted,
    /// No handshake: plaintext, a probe that only connects, an unknown version.
    Handshake,
    /// None that came to an end.
    Late,
}

impl Turned {
    /// All of them.
    pub(crate) const ALL: [Self; 8] = [
        Self::NoCertificate,
        Self::Authority,
        Self::Expired,
        Self::Name,
        Self::Certificate,
        Self::Untrusted,
        Self::Handshake,
        Self::Late,
    ];

    /// The label.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Authority => "authority",
            Self::Expired => "expired",
            Self::Name => "name",
            Self::Certificate => "certificate",
            Self::Untrusted => "untrusted",
            Self::Handshake => "handshake",
            Self::Late => "late",
        }
    }

    /// What the log says of it.
    pub(super) const fn why(self) -> &'static str {
        match self {
            Self::NoCertificate => "it asks as KEDA does and showed no certificate of grpc.keda_ca",
            Self::Authority => "its certificate is of another authority than grpc.keda_ca",
            Self::Expired => "its certificate does not hold now",
            Self::Name => "its certificate has none of grpc.keda_names",
            Self::Certificate => "its certificate is none for a client",
            Self::Untrusted => "it does not trust grpc.cert",
            Self::Handshake => "no TLS came about",
            Self::Late => "no TLS came about in time",
        }
    }

    /// Whether that is somebody's misconfiguration rather than a probe or a network.
    pub(super) const fn is_told(self) -> bool {
        !matches!(self, Self::Handshake | Self::Late)
    }

    /// Of what TLS says.
    pub(super) const fn of(error: &Error) -> Self {
        match error {
            Error::InvalidCertificate(why) => match why {
                // The latter of one that has the same name and another key, as after an exchange.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::Authority,
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Self::Expired,
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Self::Name,
                _ => Self::Certificate,
            },
            Error::AlertReceived(
                AlertDescription::UnknownCA
                | AlertDescription::DecryptError
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateExpired,
            ) => Self::Untrusted,
            _ => Self::Handshake,
        }
    }
}
