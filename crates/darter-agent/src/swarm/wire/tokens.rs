//! How the right to read a blob is asked for and given, where pieces go in plaintext.

use darter_api::v1;
use darter_core::Digest;
use darter_core::swarm::token::Token;

use super::WireError;
use super::checks::digest;

/// Asks for a token, for the wire.
pub fn encode_wanted(blob: &Digest) -> v1::Frame {
    let wanted = v1::TokenWanted { blob: blob.as_bytes().to_vec() };
    v1::Frame { kind: Some(v1::frame::Kind::TokenWanted(wanted)) }
}

/// For which blob a peer wants a token.
pub fn decode_wanted(wanted: &v1::TokenWanted) -> Result<Digest, WireError> {
    digest("token_wanted.blob", &wanted.blob)
}

/// Gives a token, for the wire.
pub fn encode_token(blob: &Digest, token: &Token) -> v1::Frame {
    let given = v1::Token { blob: blob.as_bytes().to_vec(), token: token.to_string() };
    v1::Frame { kind: Some(v1::frame::Kind::Token(given)) }
}

/// A token, as a peer sent it, and the blob that it is for.
pub fn decode_token(given: &v1::Token) -> Result<(Digest, Token), WireError> {
    // Its text has one length and one form: the parser is the bound.
    Ok((digest("token.blob", &given.blob)?, given.token.parse()?))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use darter_core::swarm::PeerId;
    use darter_core::swarm::token::Secret;
    use v1::frame::Kind;

    use super::*;

    fn token() -> Token {
        let (peer, address) = (PeerId::from_bytes([2; 32]), [10, 0, 0, 1].into());
        Token::new(&Secret([1; 32]), peer, &Digest::of(b"a"), address, Duration::from_secs(1_800_000_000))
    }

    #[test]
    fn what_is_asked_and_given_comes_back_as_it_was() {
        let blob = Digest::of(b"a");
        let Some(Kind::TokenWanted(wanted)) = encode_wanted(&blob).kind else { panic!("a question") };
        assert_eq!(decode_wanted(&wanted), Ok(blob));
        let Some(Kind::Token(given)) = encode_token(&blob, &token()).kind else { panic!("a token") };
        assert_eq!(decode_token(&given), Ok((blob, token())));
    }

    #[test]
    fn other_lengths_and_other_texts_are_refused_and_not_repeated() {
        for length in [0, 31, 33] {
            let blob = vec![7; length];
            let found = Err(WireError::Length { field: "token_wanted.blob", found: length });
            assert_eq!(decode_wanted(&v1::TokenWanted { blob: blob.clone() }), found);
            assert!(decode_token(&v1::Token { blob, token: token().to_string() }).is_err(), "{length}");
        }
        let right = token().to_string();
        for text in
            [String::new(), right[1..].to_owned(), format!("{right} "), format!("{right}0"), "0".repeat(1 << 20)]
        {
            let error = decode_token(&v1::Token { blob: vec![7; 32], token: text.clone() }).unwrap_err();
            assert_eq!(error, WireError::Token(darter_core::swarm::token::Malformed), "{} bytes", text.len());
            assert!(!format!("{error} {error:?}").contains(&right[100..]), "a secret in a message for the log");
        }
    }
}
