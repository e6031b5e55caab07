//! The right to read one blob from one node for half a minute, where TLS does not say who asks.
//!
//! The node that will serve makes it for a member on the authenticated control channel and checks it
//! on the data plane. It needs no memory: what it allows is in it, under a keyed hash of a secret
//! that never leaves the node. It can be read on the wire, so it lives shortly and works from the
//! member's own address only.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use super::PeerId;
use crate::{Digest, hex};

/// Name of the header that carries it.
pub const HEADER: &str = "darter-token";

/// How long one works. Renewed on the control channel well before.
pub const LIFETIME: Duration = Duration::from_secs(30);

/// What the hash is for: nothing else may be made to look like a token.
const DOMAIN: &[u8] = b"darter exchange token v1\0";

/// The secret of the node that serves. It has no Debug, so that no log shows it.
#[derive(Clone)]
pub struct Secret(pub [u8; 32]);

/// A right as it goes over the wire: `<peer> <expiry> <hash>`. A bearer secret: Debug hides the hash.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token {
    peer: PeerId,
    /// Milliseconds since 1970 by the clock of the node that made it.
    expires: u64,
    hash: [u8; 32],
}

/// A text that is not a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a token: expected <peer> <expiry> <hash>")]
pub struct Malformed;

/// Why a token opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Its time is over, or further away than any that is made.
    #[error("the token is expired")]
    Expired,
    /// It was made for another blob or address, by another node, or by nobody.
    #[error("the token is not for this")]
    Wrong,
}

impl Token {
    /// A token for `peer` at `address` to read `blob`. `now` is the time since 1970.
    pub fn new(secret: &Secret, peer: PeerId, blob: &Digest, address: IpAddr, now: Duration) -> Self {
        let expires = millis(now + LIFETIME);
        Self { peer, expires, hash: *hash(secret, peer, blob, address, expires).as_bytes() }
    }

    /// Who may read `blob` from `address` with it.
    pub fn check(&self, secret: &Secret, blob: &Digest, address: IpAddr, now: Duration) -> Result<PeerId, Denied> {
        // blake3::Hash compares in constant time.
        if hash(secret, self.peer, blob, address, self.expires) != self.hash {
            return Err(Denied::Wrong);
        }
        // A clock that was set back must not make a token live for hours.
        let left = self.expires.checked_sub(millis(now)).filter(|left| *left > 0 && *left <= millis(LIFETIME));
        left.map(|_| self.peer).ok_or(Denied::Expired)
    }
}

fn hash(secret: &Secret, peer: PeerId, blob: &Digest, address: IpAddr, expires: u64) -> blake3::Hash {
    // An IPv4 client of a socket that listens on IPv6 shows up as ::ffff:a.b.c.d.
    let address = match address.to_canonical() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    let parts = [DOMAIN, &peer.to_bytes(), blob.as_bytes(), &address.octets(), &expires.to_be_bytes()];
    blake3::keyed_hash(&secret.0, &parts.concat())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", hex::encode(&self.peer.to_bytes()), self.expires, hex::encode(&self.hash))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({} until {})", self.peer, self.expires)
    }
}

impl FromStr for Token {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let mut words = text.split(' ');
        let (Some(peer), Some(expires), Some(hash), None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(Malformed);
        };
        // `+5` and `05` are numbers to Rust, and no token has them.
        let number: u64 = expires.parse().map_err(|_| Malformed)?;
        if number.to_string() != expires {
            return Err(Malformed);
        }
        Ok(Self {
            peer: hex::decode(peer).map(PeerId::from_bytes).ok_or(Malformed)?,
            expires: number,
            hash: hex::decode(hash).ok_or(Malformed)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn address(last: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
    }

    #[test]
    fn a_token_opens_one_blob_from_one_address_for_its_time() {
        let (secret, peer) = (Secret([1; 32]), PeerId::from_bytes([2; 32]));
        let (blob, other) = (Digest::of(b"a"), Digest::of(b"b"));
        let token = Token::new(&secret, peer, &blob, address(1), NOW);
        let last = NOW + LIFETIME - Duration::from_millis(1);
        assert_eq!(token.check(&secret, &blob, address(1), NOW), Ok(peer));
        assert_eq!(token.check(&secret, &blob, address(1), last), Ok(peer));
        let mapped = IpAddr::V6(Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped());
        assert_eq!(token.check(&secret, &blob, mapped, NOW), Ok(peer), "the same address");
        assert_eq!(token.check(&secret, &other, address(1), NOW), Err(Denied::Wrong));
        assert_eq!(token.check(&secret, &blob, address(2), NOW), Err(Denied::Wrong));
        assert_eq!(token.check(&Secret([9; 32]), &blob, address(1), NOW), Err(Denied::Wrong), "another node's");
        assert_eq!(token.check(&secret, &blob, address(1), NOW + LIFETIME), Err(Denied::Expired));
        assert_eq!(token.check(&secret, &blob, address(1), NOW - Duration::from_secs(1)), Err(Denied::Expired));
        let longer = Token { expires: token.expires + 1, ..token };
        assert_eq!(longer.check(&secret, &blob, address(1), NOW), Err(Denied::Wrong), "made to live longer");
        let (shown, hidden) = (format!("{token:?}"), hex::encode(&token.hash));
        assert_eq!(shown, format!("Token({peer} until {})", token.expires), "{hidden} is not for logs");
        let stolen = Token { peer: PeerId::from_bytes([3; 32]), ..token };
        assert_eq!(stolen.check(&secret, &blob, address(1), NOW), Err(Denied::Wrong), "made to name another");
    }

    proptest! {
        #[test]
        fn text_and_token_say_the_same(peer: [u8; 32], expires: u64, hash: [u8; 32]) {
            let token = Token { peer: PeerId::from_bytes(peer), expires, hash };
            prop_assert_eq!(token.to_string().parse(), Ok(token));
            prop_assert_eq!(token.to_string().replacen(' ', " 0", 1).parse::<Token>(), Err(Malformed));
            prop_assert_eq!(token.to_string().replacen(' ', " +", 1).parse::<Token>(), Err(Malformed));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Token>();
        }
    }
}
