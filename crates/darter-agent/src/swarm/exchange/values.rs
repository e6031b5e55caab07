//! Asks one node what all pieces of a blob are: the BLAKE3 value of each, as that node verified them.
//!
//! Nobody's signature is on them: what two nodes say is compared, and that is all that they are for. Not
//! here: whom to ask, and what follows (`pulls::compare`).

use std::net::SocketAddr;
use std::time::Duration;

use darter_core::Digest;
use darter_core::pieces::Layout;
use darter_core::swarm::PeerId;
use darter_core::swarm::target::Path;
use darter_core::swarm::token::Token;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::BLOCK;
use super::client::{Broken, Client, Failed, FetchError, has_length};

/// Bytes of one value.
const VALUE: usize = 32;
/// Those of a blob of 512 GiB: 2 MiB.
const VALUES_MAX: u64 = 65_536;

/// The values of one blob's pieces.
#[derive(Debug, Clone)]
pub struct ValuesRequest {
    /// Whom to ask.
    pub peer: PeerId,
    /// Where its exchange listens.
    pub address: SocketAddr,
    /// Which blob.
    pub blob: Digest,
    /// How it is cut.
    pub layout: Layout,
    /// The right to ask, in the plaintext option.
    pub token: Option<Token>,
    /// How long the head, and then the body, may take.
    pub patience: Duration,
}

impl Client {
    /// What the peer says, one value for each piece. Drop the future to cancel.
    pub async fn values(&self, request: &ValuesRequest) -> Result<Vec<[u8; VALUE]>, FetchError> {
        let said = match self.try_values(request, false).await {
            // An idle connection was closed under us: no sign of anything.
            Err(Failed::Stale) => self.try_values(request, true).await,
            other => other,
        };
        self.counted(said.map_err(FetchError::from))
    }

    async fn try_values(&self, request: &ValuesRequest, fresh: bool) -> Result<Vec<[u8; VALUE]>, Failed> {
        let ValuesRequest { peer, address, blob, patience, .. } = *request;
        let pieces = Some(request.layout.pieces()).filter(|pieces| *pieces <= VALUES_MAX);
        let len = pieces.and_then(|pieces| usize::try_from(pieces).ok()).map(|pieces| pieces * VALUE);
        let len = len.ok_or(Failed::broken(Broken::NoSuchPiece))?;
        let path = Path::Values(blob);
        let asked = self.ask((peer, address), &path, request.token.as_ref(), patience, fresh).await;
        let (mut connection, answer, mut bytes) = asked?;
        has_length(&answer, len as u64)?;
        let early = bytes.len();
        if early > len {
            return Err(Failed::broken(Broken::Answer("more bytes than it says")));
        }
        bytes.resize(len, 0);
        let mut received = self.received(peer, early);
        let read = async {
            for part in bytes[early..].chunks_mut(BLOCK) {
                connection.stream.read_exact(part).await?;
                received.count += part.len() as u64;
            }
            Ok(())
        };
        let read = timeout(patience, read).await;
        read.map_err(|_| Failed::broken(Broken::Stalled(patience)))?.map_err(Failed::io)?;
        if !answer.close {
            self.pool.keep(connection);
        }
        Ok(bytes.as_chunks().0.to_vec())
    }
}
