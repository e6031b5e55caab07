//! A message of a peer: an error, or one that this node would send and that comes back as it was.

#![no_main]

use darter_agent::swarm::wire;
use darter_api::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Ok(frame) = v1::Frame::decode(bytes) else { return };
    match frame.kind {
        Some(v1::frame::Kind::Message(message)) => {
            let Ok((blob, message)) = wire::decode(message) else { return };
            let again = wire::encode(&blob, &message).expect("what was believed is within the bounds");
            assert_eq!(wire::decode(again), Ok((blob, message)));
        }
        Some(v1::frame::Kind::Hello(hello)) => {
            let _ = wire::Hello::decode(hello);
        }
        Some(v1::frame::Kind::Peers(peers)) => {
            let _ = wire::decode_peers(peers);
        }
        Some(v1::frame::Kind::TokenWanted(wanted)) => {
            let _ = wire::decode_wanted(&wanted);
        }
        Some(v1::frame::Kind::Token(given)) => {
            let Ok((blob, token)) = wire::decode_token(&given) else { return };
            let again = wire::encode_token(&blob, &token).kind;
            assert_eq!(again, Some(v1::frame::Kind::Token(given)), "one form");
        }
        Some(v1::frame::Kind::SeenWanted(wanted)) => {
            let Ok(question) = wire::decode_question(&wanted) else { return };
            let again = wire::encode_question(&question).kind;
            assert_eq!(again, Some(v1::frame::Kind::SeenWanted(wanted)), "one form");
        }
        Some(v1::frame::Kind::Seen(told)) => {
            let Ok((number, seen)) = wire::decode_seen(&told) else { return };
            let again = wire::encode_seen(number, seen).expect("what was believed is within the bounds");
            let Some(v1::frame::Kind::Seen(again)) = again.kind else { panic!("another kind") };
            assert_eq!(wire::decode_seen(&again), Ok((number, seen)));
        }
        None => {}
    }
});
