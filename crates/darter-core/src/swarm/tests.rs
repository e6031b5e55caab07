//! One machine, hand-fed: what it must not believe, and what it must not forget.

use super::*;

const MIB: u64 = 1024 * 1024;

fn peer(n: u8) -> PeerId {
    PeerId::from_bytes([n; 32])
}

fn at(millis: u64) -> Time {
    Time::from_micros(millis * 1000)
}

/// Node 1 among `members`.
fn node(members: impl IntoIterator<Item = u8>) -> Swarm {
    let mut swarm = Swarm::new(peer(1), Zone::default(), Limits::default(), 7);
    swarm.handle(at(0), Event::Members(members_of(members)));
    swarm
}

fn members_of(ids: impl IntoIterator<Item = u8>) -> Members {
    Members::new(ids.into_iter().map(|n| Member { id: peer(n), zone: Zone::default() }).collect())
}

/// A blob whose ranking among nodes 1 to 4 begins with these.
fn blob_ranked(first: &[u8]) -> Digest {
    let wanted: Vec<PeerId> = first.iter().map(|n| peer(*n)).collect();
    let members = members_of(1..=4);
    (0..10_000_u32)
        .map(|n| Digest::of(&n.to_le_bytes()))
        .find(|blob| members.ranked(blob).starts_with(&wanted))
        .unwrap()
}

fn want(swarm: &mut Swarm, blob: Digest, size: u64) -> Vec<Action> {
    want_in_turn(swarm, blob, size, 0)
}

fn want_in_turn(swarm: &mut Swarm, blob: Digest, size: u64, turn: u64) -> Vec<Action> {
    let layout = Layout::new(size);
    let have = Bitfield::new(layout.pieces());
    swarm.handle(at(1), Event::Want { blob, layout, have, can_import: true, turn })
}

fn heard(swarm: &mut Swarm, time: Time, from: u8, blob: Digest, message: Message) -> Vec<Action> {
    swarm.handle(time, Event::Message { from: peer(from), blob, message })
}

fn is_import(action: &Action) -> bool {
    matches!(action, Action::Import { .. })
}

#[test]
fn only_the_coordinator_can_make_a_node_read_the_origin() {
    let blob = blob_ranked(&[2, 3]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 8 * MIB);
    let lease = |from| Message::Lease(Lease { segment: 0, from, is_whole: false, interested: 2 });
    assert_eq!(heard(&mut swarm, at(2), 3, blob, lease(None)), []);
    assert_eq!(heard(&mut swarm, at(2), 2, blob, lease(Some(peer(1)))), [], "from itself");
    let actions = heard(&mut swarm, at(3), 2, blob, lease(None));
    assert_eq!(actions, [Action::Import { blob, segment: 0, first: 0, end: 8 }]);
}

#[test]
fn a_lease_that_is_given_again_is_read_from_the_new_source() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, MIB);
    let lease = |from| Message::Lease(Lease { segment: 0, from, is_whole: true, interested: 2 });
    let actions = heard(&mut swarm, at(2), 2, blob, lease(Some(peer(3))));
    assert_eq!(actions, [Action::Fetch { blob, piece: 0, peer: peer(3) }]);
    let failed = Event::FetchFailed { blob, piece: 0, peer: peer(3), reason: FetchFailure::Broken };
    swarm.handle(at(3), failed);
    assert!(heard(&mut swarm, at(4), 2, blob, lease(None)).iter().any(is_import));
}

#[test]
fn who_comes_to_coordinate_a_blob_hears_that_it_is_here() {
    let blob = blob_ranked(&[2, 3, 4]);
    let mut swarm = node(1..=4);
    let holds = |to| Action::Send { to: peer(to), blob, message: Message::Holds { size: MIB } };
    let proven = swarm.handle(at(1), Event::Proven { blob, layout: Layout::new(MIB) });
    assert_eq!(proven, [holds(2), holds(3)]);
    assert_eq!(swarm.handle(at(2), Event::Members(members_of([1, 3, 4]))), [holds(4)]);
    assert_eq!(swarm.handle(at(3), Event::Members(members_of(1..=4))), [holds(2)]);
}

#[test]
fn a_full_table_of_neighbours_is_not_taken_for_the_end_of_interest() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, MIB);
    let hello = || Message::Hello { have: Bitfield::new(1), wants_answer: true };
    let most = u8::try_from(swarm.node.limits.neighbours_max).unwrap();
    (0..most).for_each(|n| drop(heard(&mut swarm, at(2), 100 + n, blob, hello())));
    let refusal = Action::Send { to: peer(3), blob, message: Message::Leave };
    assert_eq!(heard(&mut swarm, at(3), 3, blob, hello()), [refusal]);
    assert_eq!(heard(&mut swarm, at(3), 2, blob, hello()), [], "the coordinator would forget this node");
}

#[test]
fn who_wants_a_blob_is_believed_over_a_wrong_size_that_somebody_told_before() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    heard(&mut swarm, at(1), 3, blob, Message::Holds { size: 7 * MIB });
    let join = |size| {
        let have = Bitfield::new(Layout::new(size).pieces());
        Message::Join(Join { size, have, leased: Vec::new(), can_import: true, neighbours: Vec::new() })
    };
    let welcomed = |actions: &[Action], who| {
        let to = |action: &Action| matches!(action, Action::Send { to, message: Message::Welcome { .. }, .. } if *to == peer(who));
        actions.iter().any(to)
    };
    assert!(welcomed(&heard(&mut swarm, at(2), 2, blob, join(8 * MIB)), 2));
    assert!(!welcomed(&heard(&mut swarm, at(3), 4, blob, join(9 * MIB)), 4), "while others want it");
}

#[test]
fn layers_are_asked_for_in_their_turn_whatever_the_order_of_the_wishes() {
    let mut swarm = node(1..=4);
    swarm.node.limits.in_flight = 0;
    let blobs: Vec<Digest> = (0..100_u32).map(|n| Digest::of(&n.to_le_bytes())).collect();
    let others = members_of(2..=4);
    let mut layers: Vec<Digest> =
        blobs.into_iter().filter(|blob| members_of(1..=4).ranked(blob)[0] == others.ranked(blob)[0]).collect();
    layers.truncate(4);
    for (turn, blob) in [3, 1, 2, 0].map(|turn: u8| (turn, layers[usize::from(turn)])) {
        want_in_turn(&mut swarm, blob, 8 * MIB, turn.into());
    }
    for blob in layers.iter().rev() {
        let hello = Message::Hello { have: Bitfield::full(8), wants_answer: false };
        assert_eq!(heard(&mut swarm, at(2), 3, *blob, hello), []);
    }
    swarm.node.limits.in_flight = 6;
    let actions = swarm.handle(at(3), Event::Tick);
    let asked: Vec<Digest> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Fetch { blob, .. } => Some(*blob),
            _ => None,
        })
        .collect();
    // Two at a time of one neighbour, for each layer; the last one waits.
    let [first, second, third, _] = layers[..] else { panic!("{layers:?}") };
    assert_eq!(asked, [first, first, second, second, third, third]);
}

#[test]
fn an_origin_that_breaks_is_not_asked_again_at_once() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    assert!(want(&mut swarm, blob, MIB).iter().any(is_import));
    let broken = Event::ImportFailed { blob, segment: 0, reason: ImportFailure::Broken };
    let actions = swarm.handle(at(10), broken);
    assert!(!actions.iter().any(is_import), "{actions:?}");
    let again = swarm.deadline(at(10));
    assert!(again > at(10));
    let later = (0..20).map(|n| at(100 + 50 * n)).find(|time| swarm.handle(*time, Event::Tick).iter().any(is_import));
    assert!(later.is_some(), "and is asked again later");
}
