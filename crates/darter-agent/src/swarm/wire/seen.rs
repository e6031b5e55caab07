//! How members are asked what they saw at a registry that is away, and answer.

use std::str::FromStr;

use darter_api::v1;
use darter_core::Reference;
use darter_core::access::Place;
use darter_core::stale::{Question, Seen};

use super::WireError;
use super::checks::{bounded, digest, size};

/// Bytes of a name: what the parsers of all of them accept at most. Longer ones are not even read.
const NAME_MAX: usize = 255;

/// Asks what a member saw, for the wire.
pub fn encode_question(question: &Question) -> v1::Frame {
    let Question { number, place, reference } = question;
    let wanted = v1::SeenWanted {
        number: *number,
        registry: place.registry.to_string(),
        repository: place.repository.to_string(),
        reference: reference.to_string(),
    };
    v1::Frame { kind: Some(v1::frame::Kind::SeenWanted(wanted)) }
}

/// What a peer wants to know.
pub fn decode_question(wanted: &v1::SeenWanted) -> Result<Question, WireError> {
    let place = Place {
        registry: name("seen_wanted.registry", &wanted.registry)?,
        repository: name("seen_wanted.repository", &wanted.repository)?,
    };
    let reference: Reference = name("seen_wanted.reference", &wanted.reference)?;
    Ok(Question { number: wanted.number, place, reference })
}

/// What this node saw, for the wire. An error is a size past the bounds: it is not sent.
pub fn encode_seen(number: u64, seen: Option<Seen>) -> Result<v1::Frame, WireError> {
    let told = match seen {
        None => v1::Seen { number, ..v1::Seen::default() },
        Some(seen) => v1::Seen {
            number,
            digest: seen.digest.as_bytes().to_vec(),
            size_bytes: size("seen.size_bytes", seen.size.unwrap_or(0))?,
        },
    };
    Ok(v1::Frame { kind: Some(v1::frame::Kind::Seen(told)) })
}

/// What a peer saw, and which question that answers.
pub fn decode_seen(told: &v1::Seen) -> Result<(u64, Option<Seen>), WireError> {
    if told.digest.is_empty() {
        return Ok((told.number, None));
    }
    // No manifest is empty.
    let size = Some(size("seen.size_bytes", told.size_bytes)?).filter(|size| *size > 0);
    Ok((told.number, Some(Seen { digest: digest("seen.digest", &told.digest)?, size })))
}

fn name<T: FromStr>(field: &'static str, text: &str) -> Result<T, WireError> {
    bounded(field, text.len(), NAME_MAX)?;
    text.parse().map_err(|_| WireError::Name(field))
}

#[cfg(test)]
mod tests {
    use darter_core::Digest;
    use v1::frame::Kind;

    use super::*;

    fn question(reference: Reference) -> Question {
        let place = Place { registry: "reg.example:5000".parse().unwrap(), repository: "team/app".parse().unwrap() };
        Question { number: u64::MAX, place, reference }
    }

    #[test]
    fn what_is_asked_and_answered_comes_back_as_it_was() {
        let seen = Seen { digest: Digest::of(b"a"), size: Some(7) };
        for reference in [Reference::Tag("v1".parse().unwrap()), Reference::Digest(seen.digest)] {
            let asked = question(reference);
            let Some(Kind::SeenWanted(wanted)) = encode_question(&asked).kind else { panic!("a question") };
            assert_eq!(decode_question(&wanted), Ok(asked));
        }
        for answer in [None, Some(seen), Some(Seen { size: None, ..seen })] {
            let Some(Kind::Seen(told)) = encode_seen(9, answer).unwrap().kind else { panic!("an answer") };
            assert_eq!(decode_seen(&told), Ok((9, answer)));
        }
    }

    #[test]
    fn names_that_are_none_are_refused_and_not_repeated() {
        let Some(Kind::SeenWanted(right)) = encode_question(&question(Reference::Tag("v1".parse().unwrap()))).kind
        else {
            panic!("a question")
        };
        let long = "a".repeat(1 << 19);
        for text in ["", "../x", "a b", "\n", "sha512:00", "sha256:zz", &long] {
            let text = text.to_owned();
            for wanted in [
                v1::SeenWanted { registry: text.clone(), ..right.clone() },
                v1::SeenWanted { repository: text.clone(), ..right.clone() },
                v1::SeenWanted { reference: text.clone(), ..right.clone() },
            ] {
                let error = decode_question(&wanted).unwrap_err();
                let said = format!("{error} {error:?}");
                assert!(said.len() < 200 && !said.contains('\n'), "{said}");
                assert_eq!(matches!(error, WireError::TooMuch { .. }), text.len() > NAME_MAX, "{said}");
            }
        }
    }

    #[test]
    fn other_digests_and_sizes_past_all_bounds_are_refused() {
        let told = |digest, size_bytes| decode_seen(&v1::Seen { number: 1, digest, size_bytes });
        assert!(matches!(told(vec![7; 31], 0), Err(WireError::Length { found: 31, .. })));
        assert!(matches!(told(vec![7; 32], u64::MAX), Err(WireError::TooMuch { .. })));
        assert!(encode_seen(1, Some(Seen { digest: Digest::of(b"a"), size: Some(u64::MAX) })).is_err());
    }
}
