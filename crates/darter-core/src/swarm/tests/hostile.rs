//! Members that break what they promise, as one machine sees them.

use super::*;

/// What is asked of peer 3 in these actions.
fn asked(actions: &[Action]) -> Vec<u32> {
    let piece = |action: &Action| match action {
        Action::Fetch { piece, peer: asked, .. } if *asked == peer(3) => Some(*piece),
        _ => None,
    };
    actions.iter().filter_map(piece).collect()
}

const NOT_HERE: FetchFailure = FetchFailure::Refused(Refusal::NotHere);

fn not_here(blob: Digest, piece: u32) -> Event {
    Event::FetchFailed { blob, piece, peer: peer(3), reason: NOT_HERE }
}

fn lease(segment: u32) -> Message {
    Message::Lease(Lease { segment, from: Some(peer(3)), is_whole: true, interested: 2 })
}

/// The coordinator, peer 2, hears that nothing can be read from there.
fn is_given_back(actions: &[Action]) -> bool {
    actions.iter().any(|action| {
        let is_end = matches!(action, Action::Send { message: Message::LeaseEnd { end: LeaseEnd::Broken, .. }, .. });
        is_end && matches!(action, Action::Send { to, .. } if *to == peer(2))
    })
}

#[test]
fn a_lease_to_read_from_one_who_has_nothing_goes_back_at_once() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 8 * MIB);
    let pieces = asked(&heard(&mut swarm, at(2), 2, blob, lease(0)));
    assert!(!pieces.is_empty());
    assert!(is_given_back(&swarm.handle(at(3), not_here(blob, pieces[0]))));
}

#[test]
fn nothing_is_read_from_one_who_lied() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 8 * MIB);
    let banned = swarm.handle(at(2), Event::Lied(peer(3)));
    assert!(matches!(banned[..], [Action::Ban { .. }]), "{banned:?}");
    let actions = heard(&mut swarm, at(3), 2, blob, lease(0));
    assert!(is_given_back(&actions) && asked(&actions).is_empty(), "{actions:?}");
}

/// Node 1 of so many, which coordinates a blob that 3 and 4 have.
fn node_with_two_holders(members: u8, size: u64) -> (Swarm, Digest) {
    let (mut swarm, blob) = (node(1..=members), blob_ranked(&[1]));
    for holder in [3, 4] {
        heard(&mut swarm, at(0), holder, blob, Message::Holds { size });
    }
    (swarm, blob)
}

#[test]
fn whoever_has_it_too_is_read_from_once_one_holder_turns_out_to_lie() {
    let (mut swarm, blob) = node_with_two_holders(4, 32 * MIB);
    let fetches = |actions: &[Action]| -> Vec<(u32, PeerId)> {
        let fetch = |action: &Action| match action {
            Action::Fetch { piece, peer, .. } => Some((*piece, *peer)),
            _ => None,
        };
        actions.iter().filter_map(fetch).collect()
    };
    let first = fetches(&want(&mut swarm, blob, 32 * MIB));
    let liar = first[0].1;
    // What is on its way from it turns out wrong, piece for piece.
    let mut actions = Vec::new();
    for (piece, _) in first {
        let reason = FetchFailure::Corrupt;
        actions.extend(swarm.handle(at(2), Event::FetchFailed { blob, piece, peer: liar, reason }));
    }
    let then = fetches(&actions);
    assert!(!then.is_empty() && then.iter().all(|(_, from)| *from != liar), "{actions:?}");
    assert!(!actions.iter().any(is_import), "{actions:?}");
}

fn join(size: u64) -> Message {
    let have = Bitfield::new(Layout::new(size).pieces());
    Message::Join(Join::of(size, have))
}

#[test]
fn what_a_node_read_and_has_lost_is_given_out_again_when_it_joins() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    assert_eq!(leases(&heard(&mut swarm, at(1), 2, blob, join(8 * MIB))), [(peer(2), 0)]);
    let done = Message::LeaseEnd { segment: 0, from: None, end: LeaseEnd::Done, upload_time: Duration::ZERO };
    heard(&mut swarm, at(2), 2, blob, done);
    assert_eq!(leases(&heard(&mut swarm, at(3), 3, blob, join(8 * MIB))), [], "2 has all of it");
    assert_eq!(leases(&heard(&mut swarm, at(4), 2, blob, join(8 * MIB))).len(), 1, "nobody has it");
}

#[test]
fn an_owner_that_ends_both_its_leases_does_not_lose_what_it_is_given_instead() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    heard(&mut swarm, at(1), 3, blob, Message::Holds { size: 16 * MIB });
    let from_holder = leases(&heard(&mut swarm, at(2), 2, blob, join(16 * MIB)));
    assert_eq!(from_holder.len(), 2);
    let end = |segment| {
        let (from, end, upload_time) = (Some(peer(3)), LeaseEnd::Broken, Duration::ZERO);
        Message::LeaseEnd { segment, from, end, upload_time }
    };
    let mut given: Vec<(PeerId, u32)> = Vec::new();
    for (_, segment) in from_holder {
        given.extend(leases(&heard(&mut swarm, at(3), 2, blob, end(segment))));
        // It has the blob after all, and what is read from it still counts.
        given.extend(leases(&heard(&mut swarm, at(3), 3, blob, Message::Holds { size: 16 * MIB })));
        assert_eq!(swarm.check_invariants(), Ok(()));
    }
    given.sort_unstable();
    assert_eq!(given, [(peer(2), 0), (peer(2), 1)], "each once, from the origin");
    let running: Vec<_> =
        swarm.coordinated.get(&blob).unwrap().tables.values().flat_map(|table| table.running()).collect();
    assert_eq!(running, [(peer(2), None); 2], "and both are its own still");
}

#[test]
fn what_a_joiner_reads_from_a_holder_it_reads_from_there_under_the_next_coordinator_too() {
    let (mut swarm, blob) = node_with_two_holders(5, 32 * MIB);
    // It has this from a coordinator that is gone.
    let Message::Join(join) = join(32 * MIB) else { unreachable!() };
    let leased = vec![Reading { segment: 0, from: Some(peer(3)) }, Reading { segment: 1, from: None }];
    heard(&mut swarm, at(1), 2, blob, Message::Join(Join { leased, ..join }));
    assert_eq!(swarm.check_invariants(), Ok(()));
    let missing = Message::Missing { segments: vec![0, 1], without: Vec::new() };
    let told = |action| match action {
        Action::Send { message: Message::Lease(lease), .. } => Some((lease.segment, lease.from)),
        _ => None,
    };
    let told: Vec<_> = heard(&mut swarm, at(2), 2, blob, missing).into_iter().filter_map(told).collect();
    assert_eq!(told, [(0, Some(peer(3))), (1, None)]);
    // The word that it broke is about this lease.
    let broken =
        Message::LeaseEnd { segment: 0, from: Some(peer(3)), end: LeaseEnd::Broken, upload_time: Duration::ZERO };
    let again = heard(&mut swarm, at(600), 2, blob, broken);
    assert!(leases(&again).iter().any(|(_, segment)| *segment == 0), "{again:?}");
    assert_eq!(swarm.check_invariants(), Ok(()));
}

#[test]
fn no_more_want_a_blob_than_there_are_whatever_a_neighbour_says() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 4 * MIB);
    heard(&mut swarm, at(1), 3, blob, Message::Hello { have: Bitfield::new(4), wants_answer: false });
    heard(&mut swarm, at(1), 3, blob, Message::Have { pieces: vec![0], free_slots: 1, interested: u32::MAX });
    assert_eq!(swarm.downloads[&blob].interested, 4);
}

#[test]
fn who_sent_wrong_bytes_to_two_is_no_source_any_more() {
    let (mut swarm, blob) = node_with_two_holders(5, 64 * MIB);
    let sources = |actions: Vec<Action>| -> Vec<PeerId> {
        let source = |action| match action {
            Action::Send { message: Message::Lease(Lease { from, .. }), .. } => from,
            _ => None,
        };
        actions.into_iter().filter_map(source).collect()
    };
    let mut given = sources(heard(&mut swarm, at(1), 2, blob, join(64 * MIB)));
    given.extend(sources(heard(&mut swarm, at(1), 5, blob, join(64 * MIB))));
    assert!(given.contains(&peer(3)), "{given:?}");
    let complaint = Message::Missing { segments: Vec::new(), without: vec![peer(3)] };
    heard(&mut swarm, at(2), 2, blob, complaint.clone());
    let mut then = sources(heard(&mut swarm, at(2), 5, blob, complaint));
    then.extend(sources(heard(&mut swarm, at(3), 3, blob, Message::Holds { size: 64 * MIB })));
    assert!(!then.is_empty() && then.iter().all(|source| *source == peer(4)), "{then:?}");
}

/// Peer 3 says that it has all of a blob of 64 pieces, and gives those for which `fails` says nothing, a tenth
/// of a second after it was asked. How many it was asked for until nothing more was,
/// and whether it was let go.
fn boast(swarm: &mut Swarm, blob: Digest, fails: impl Fn(usize) -> Option<FetchFailure>) -> (usize, bool) {
    let hello = Message::Hello { have: Bitfield::full(64), wants_answer: false };
    let mut actions = heard(swarm, at(2), 3, blob, hello);
    let (mut count, mut is_let_go, mut now) = (0, false, 2);
    loop {
        is_let_go |= actions.contains(&Action::Reject { peer: peer(3), reason: Rejection::Boast });
        let pieces = asked(&actions);
        actions.clear();
        for piece in pieces {
            let failed = |reason| Event::FetchFailed { blob, piece, peer: peer(3), reason };
            let event = fails(count).map_or_else(|| Event::Fetched { blob, piece, peer: peer(3) }, failed);
            count += 1;
            now += 100;
            actions.extend(swarm.handle(at(now), event));
        }
        if actions.is_empty() {
            return (count, is_let_go);
        }
    }
}

#[test]
fn who_gives_nothing_of_what_it_announced_is_no_neighbour_any_more() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 64 * MIB);
    let (count, is_let_go) = boast(&mut swarm, blob, |_| Some(NOT_HERE));
    // Two seconds of it, and what was on its way.
    assert!(is_let_go && (21..=23).contains(&count), "{count} pieces asked");
    assert_eq!(boast(&mut swarm, blob, |_| Some(NOT_HERE)), (0, false), "whatever it says again");
    assert_eq!(swarm.check_invariants(), Ok(()));
}

#[test]
fn who_gave_something_may_have_lost_the_rest() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 64 * MIB);
    assert_eq!(boast(&mut swarm, blob, |n| (n > 0).then_some(NOT_HERE)), (64, false));
}

#[test]
fn who_has_pieces_of_an_importer_that_nobody_knows_any_more_did_not_boast() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 64 * MIB);
    assert_eq!(boast(&mut swarm, blob, |_| Some(FetchFailure::Unvouched)), (64, false));
    assert_eq!(swarm.check_invariants(), Ok(()));
}
