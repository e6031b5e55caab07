//! Every message comes back as it was; what is out of bounds does not come at all.

use darter_core::pieces::Bitfield;
use darter_core::swarm::{PeerId, Reading};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::swarm::frame::FRAME_MAX;

fn peer_id() -> impl Strategy<Value = PeerId> {
    any::<[u8; 32]>().prop_map(PeerId::from_bytes)
}

fn field(len: impl Strategy<Value = u64>) -> impl Strategy<Value = Bitfield> {
    (len, vec(any::<u64>(), 0..40)).prop_map(|(len, marks)| {
        let mut field = Bitfield::new(len);
        marks.into_iter().for_each(|mark| field.set(mark % len.max(1)));
        field
    })
}

fn wait() -> impl Strategy<Value = Duration> {
    (0..=unduration(DURATION_MAX)).prop_map(Duration::from_micros)
}

fn join() -> impl Strategy<Value = Join> {
    let layout = (0..1_u64 << 36).prop_map(Layout::new);
    let have = layout.prop_flat_map(|layout| (Just(layout.size()), field(Just(layout.pieces()))));
    let reading = (any::<u32>(), prop::option::of(peer_id())).prop_map(|(segment, from)| Reading { segment, from });
    let lists = (vec(reading, 0..20), vec(peer_id(), 0..20));
    let flags = any::<(bool, bool)>();
    (have, flags, lists).prop_map(|((size, have), (can_import, is_going), (leased, neighbours))| Join {
        size,
        have,
        leased,
        can_import,
        is_going,
        neighbours,
    })
}

fn message() -> impl Strategy<Value = Message> {
    let end = prop_oneof![
        Just(LeaseEnd::Done),
        wait().prop_map(LeaseEnd::Throttled),
        Just(LeaseEnd::Forbidden),
        Just(LeaseEnd::Broken)
    ];
    let lease = (any::<u32>(), prop::option::of(peer_id()), any::<bool>(), any::<u32>());
    prop_oneof![
        join().prop_map(Message::Join),
        (vec(peer_id(), 0..60), vec(peer_id(), 0..9), any::<u32>())
            .prop_map(|(neighbours, holders, interested)| Message::Welcome { neighbours, holders, interested }),
        lease.prop_map(|(segment, from, is_whole, interested)| {
            Message::Lease(Lease { segment, from, is_whole, interested })
        }),
        any::<(u32, bool)>().prop_map(|(piece, is_whole)| Message::Released { piece, is_whole }),
        (any::<u32>(), prop::option::of(peer_id()), end, wait())
            .prop_map(|(segment, from, end, upload_time)| { Message::LeaseEnd { segment, from, end, upload_time } }),
        (vec(any::<u32>(), 0..64), vec(peer_id(), 0..9))
            .prop_map(|(segments, without)| Message::Missing { segments, without }),
        (field(0..=PIECES_MAX), any::<bool>()).prop_map(|(have, wants_answer)| Message::Hello { have, wants_answer }),
        (vec(any::<u32>(), 0..64), any::<u8>(), any::<u32>())
            .prop_map(|(pieces, free_slots, interested)| Message::Have { pieces, free_slots, interested }),
        Just(Message::Slot),
        Just(Message::NoNeed),
        (0..=PIECES_MAX * (8 << 20)).prop_map(|size| Message::Holds { size }),
        Just(Message::Leave),
        (0..=PIECES_MAX * (8 << 20), any::<bool>())
            .prop_map(|(size, is_for_elsewhere)| Message::Take { size, is_for_elsewhere }),
        any::<bool>().prop_map(|is_kept| Message::TakeEnd { is_kept }),
        Just(Message::RoomWanted),
        any::<u64>().prop_map(|bytes| Message::Room { bytes }),
    ]
}

proptest! {
    #[test]
    fn every_message_comes_back_as_it_was(blob: [u8; 32], message in message()) {
        let blob = Digest::from_bytes(blob);
        let bytes = encode(&blob, &message).unwrap().encode_to_vec();
        let back = decode(v1::BlobMessage::decode(bytes.as_slice()).unwrap()).unwrap();
        prop_assert_eq!(back, (blob, message));
    }

    #[test]
    fn garbage_is_an_error_or_a_message_that_would_be_sent_again(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(sent) = v1::BlobMessage::decode(bytes.as_slice())
            && let Ok((blob, message)) = decode(sent)
        {
            prop_assert!(encode(&blob, &message).is_ok());
        }
    }
}

fn about(body: v1::blob_message::Body) -> Result<Message, WireError> {
    decode(v1::BlobMessage { blob: vec![7; 32], body: Some(body) }).map(|(_, message)| message)
}

fn greeting(pieces: u64, bits: Vec<u8>) -> v1::blob_message::Body {
    v1::blob_message::Body::Greeting(v1::Greeting { have: Some(v1::Bitfield { pieces, bits }), wants_answer: true })
}

#[test]
fn what_is_out_of_bounds_is_refused() {
    use v1::blob_message::Body;
    // A few bytes that ask for an allocation of 2^61 bytes.
    assert!(matches!(about(greeting(u64::MAX, Vec::new())), Err(WireError::TooMuch { .. })));
    assert!(matches!(about(greeting(9, vec![0])), Err(WireError::Bitfield(_))));
    assert!(matches!(about(greeting(9, vec![0, 2])), Err(WireError::Bitfield(_))));
    assert!(about(greeting(9, vec![0, 1])).is_ok());
    let have = |pieces, free_slots| Body::Have(v1::Have { pieces, free_slots, interested: 0 });
    assert!(matches!(about(have(vec![0; INDICES_MAX + 1], 0)), Err(WireError::TooMuch { .. })));
    assert!(matches!(about(have(Vec::new(), 256)), Err(WireError::TooMuch { .. })));
    let welcome = |neighbours| Body::Welcome(v1::Welcome { neighbours, holders: Vec::new(), interested: 0 });
    assert!(matches!(about(welcome(vec![vec![0; 32]; PEERS_MAX + 1])), Err(WireError::TooMuch { .. })));
    assert!(matches!(about(welcome(vec![vec![0; 31]])), Err(WireError::Length { found: 31, .. })));
    let holders = |holders| Body::Welcome(v1::Welcome { neighbours: Vec::new(), holders, interested: 0 });
    assert!(matches!(about(holders(vec![vec![0; 32]; PEERS_MAX + 1])), Err(WireError::TooMuch { .. })));
    let end = |outcome, wait| {
        let (segment, upload_microseconds, from) = (0, 0, Vec::new());
        Body::LeaseEnd(v1::LeaseEnd { segment, outcome, wait_microseconds: wait, upload_microseconds, from })
    };
    assert!(matches!(about(end(0, 0)), Err(WireError::Unknown(_))), "an outcome that was not given");
    assert!(matches!(about(end(5, 0)), Err(WireError::Unknown(_))), "an outcome of a later version");
    assert!(matches!(about(end(2, u64::MAX)), Err(WireError::TooMuch { .. })));
    assert_eq!(decode(v1::BlobMessage { blob: vec![7; 32], body: None }), Err(WireError::Unknown("a message")));
    assert!(matches!(decode(v1::BlobMessage::default()), Err(WireError::Length { found: 0, .. })));
    let have = Some(v1::Bitfield { pieces: 2, bits: vec![3] });
    let join = v1::Join { size_bytes: 1 << 30, have: have.clone(), ..v1::Join::default() };
    assert!(matches!(about(Body::Join(join)), Err(WireError::Bitfield(_))), "two pieces of a blob of 512");
    let reads = |leased, leased_from| {
        Body::Join(v1::Join { size_bytes: 2 << 20, have: have.clone(), leased, leased_from, ..v1::Join::default() })
    };
    let sources = |last: usize| vec![Vec::new(), vec![0; last]];
    assert!(about(reads(vec![4, 7], sources(32))).is_ok() && about(reads(vec![4, 7], Vec::new())).is_ok());
    assert!(matches!(about(reads(vec![4], sources(32))), Err(WireError::Absent(_))), "of one segment two sources");
    assert!(matches!(about(reads(vec![4, 7], sources(31))), Err(WireError::Length { found: 31, .. })));
    assert!(matches!(about(reads(vec![0; PEERS_MAX + 1], Vec::new())), Err(WireError::TooMuch { .. })));
    let holds = v1::Holds { size_bytes: u64::MAX };
    assert!(matches!(about(Body::Holds(holds)), Err(WireError::TooMuch { field: "holds.size_bytes", .. })));
    let take = v1::Take { size_bytes: u64::MAX, is_for_elsewhere: false };
    assert!(matches!(about(Body::Take(take)), Err(WireError::TooMuch { field: "take.size_bytes", .. })));
}

#[test]
fn the_largest_message_within_the_bounds_fits_a_frame() {
    let size = PIECES_MAX * (8 << 20);
    let id = PeerId::from_bytes([255; 32]);
    let (leased, neighbours) = (vec![Reading { segment: u32::MAX, from: Some(id) }; PEERS_MAX], vec![id; PEERS_MAX]);
    let join = Join { size, have: Bitfield::full(PIECES_MAX), leased, can_import: true, is_going: false, neighbours };
    let message = encode(&Digest::from_bytes([255; 32]), &Message::Join(join.clone())).unwrap();
    let frame = v1::Frame { kind: Some(v1::frame::Kind::Message(message.clone())) };
    assert!(frame.encoded_len() <= FRAME_MAX, "{}", frame.encoded_len());
    assert_eq!(decode(message).unwrap().1, Message::Join(join));
}
