//! A node's libp2p identity on the data plane: TLS 1.3 with it on both ends, and signed attests.
//!
//! Each end shows its ed25519 identity key itself as a raw public key (RFC 7250) and proves by the
//! handshake's own signature that it holds it: what a libp2p certificate says with an X.509 around a
//! second key, without a parser for X.509 in front of strangers' bytes. (The libp2p-tls crate brings
//! a second TLS provider besides.) The peers are known by their keys, so nothing else is needed.

use std::fmt;
use std::sync::Arc;

use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::swarm::PeerId;
use darter_core::swarm::attest::{self, Attest};
use libp2p_identity::{Keypair, ed25519};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};

/// What both ends speak inside TLS. A version that breaks the old one gets another name.
pub(super) const ALPN: &[u8] = b"darter-exchange/1";

/// An ed25519 public key as TLS shows it (RFC 8410): this, then its 32 bytes.
const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// A private one (PKCS #8, RFC 8410): this, then its 32 bytes.
const PRIVATE_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// Why a key cannot name a node on the data plane.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A libp2p key of another type.
    #[error("the node's identity is not an ed25519 key")]
    Type(#[source] libp2p_identity::OtherVariantError),
    /// rustls refuses it.
    #[error("the node's identity cannot be used for TLS")]
    Tls(#[source] Error),
}

/// The key of this node. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    peer: PeerId,
    keypair: ed25519::Keypair,
    certified: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.peer)
    }
}

impl Identity {
    /// The identity that libp2p uses on the control plane.
    pub fn new(keypair: Keypair) -> Result<Self, IdentityError> {
        let keypair = keypair.try_into_ed25519().map_err(IdentityError::Type)?;
        let public = keypair.public().to_bytes();
        let private = PrivatePkcs8KeyDer::from([&PRIVATE_PREFIX, keypair.secret().as_ref()].concat());
        let key = ring::sign::any_eddsa_type(&private).map_err(IdentityError::Tls)?;
        let shown = CertificateDer::from([&PUBLIC_PREFIX[..], &public].concat());
        let provider = CryptoProvider {
            // Half the price of ChaCha20 on every machine with AES instructions, which all nodes are.
            cipher_suites: vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384],
            ..ring::default_provider()
        };
        Ok(Self {
            peer: PeerId::from_bytes(public),
            keypair,
            certified: Arc::new(CertifiedKey::new(vec![shown], key)),
            provider: Arc::new(provider),
        })
    }

    /// Its name in the swarm.
    pub const fn peer(&self) -> PeerId {
        self.peer
    }

    /// This node's word that it read piece `piece` of `blob` from the origin, and that its chaining
    /// value is `cv`.
    pub fn attest(&self, blob: &Digest, layout: &Layout, piece: u32, cv: [u8; 32]) -> Attest {
        let made = self.keypair.sign(&attest::message(blob, layout, piece, &cv));
        let mut signature = [0; 64];
        // ed25519 signatures have 64 bytes; one that had not would be refused by its first reader.
        signature.iter_mut().zip(made).for_each(|(to, from)| *to = from);
        Attest { importer: self.peer, cv, signature }
    }

    /// What this node serves with: TLS 1.3, AES-GCM, a key demanded of every client.
    pub fn server_config(&self) -> Result<ServerConfig, Error> {
        let verifier = Arc::new(Verifier { expected: None, provider: self.provider.clone() });
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(self.certified.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Connections are kept for long: a resumed session would save little, and skip the proof.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// What this node dials `peer` with: nobody else is talked to.
    pub fn client_config(&self, peer: PeerId) -> Result<ClientConfig, Error> {
        let verifier = Arc::new(Verifier { expected: Some(peer), provider: self.provider.clone() });
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(self.certified.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        // A peer is found by its key; its name would be a word in the clear.
        config.enable_sni = false;
        Ok(config)
    }
}

/// Whether the importer that an attest names signed it for this piece.
pub fn is_signed(attest: &Attest, blob: &Digest, layout: &Layout, piece: u32) -> bool {
    let message = attest::message(blob, layout, piece, &attest.cv);
    ed25519::PublicKey::try_from_bytes(&attest.importer.to_bytes())
        .is_ok_and(|key| key.verify(&message, &attest.signature))
}

/// Whose key the other end showed. `None`: no ed25519 key.
pub(super) fn shown(certificates: Option<&[CertificateDer<'_>]>) -> Option<PeerId> {
    let [key] = certificates? else { return None };
    let bytes = key.as_ref().strip_prefix(&PUBLIC_PREFIX)?;
    bytes.try_into().ok().map(PeerId::from_bytes)
}

/// Takes a raw ed25519 key, the expected one where one is expected.
#[derive(Debug)]
struct Verifier {
    expected: Option<PeerId>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check(&self, key: &CertificateDer<'_>) -> Result<(), Error> {
        let peer = shown(Some(std::slice::from_ref(key)));
        let peer = peer.ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.expected.is_some_and(|expected| expected != peer) {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        Ok(())
    }

    fn signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.provider.signature_verification_algorithms)
    }
}

/// Never reached: both ends speak TLS 1.3 only.
fn no_tls12() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered)
}

/// What both ends verify alike: rustls has a trait for each.
macro_rules! raw_keys {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(no_tls12())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            key: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.signature(message, key, signed)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(key).map(|()| ServerCertVerified::assertion())
    }

    raw_keys!();
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(key).map(|()| ClientCertVerified::assertion())
    }

    raw_keys!();
}

#[cfg(test)]
impl Identity {
    /// A thief: shows the key of `other`, and has only its own to sign with.
    pub(super) fn showing(&self, other: &Self) -> Self {
        let stolen = CertifiedKey::new(other.certified.cert.clone(), self.certified.key.clone());
        Self { certified: Arc::new(stolen), ..self.clone() }
    }
}
