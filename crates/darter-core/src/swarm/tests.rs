//! One machine, hand-fed: what it must not believe, and what it must not forget.

mod hostile;
mod slow;
mod spread;
mod takeover;

use std::time::Duration;

use super::*;

const MIB: u64 = 1024 * 1024;

fn peer(n: u8) -> PeerId {
    PeerId::from_bytes([n; 32])
}

fn at(millis: u64) -> Time {
    Time::from_micros(millis * 1000)
}

/// Node 1 among `members`, of which there are never few.
fn node(members: impl IntoIterator<Item = u8>) -> Swarm {
    let limits = Limits { settle_quiet: Duration::ZERO, few: 0, ..Limits::default() };
    let mut swarm = Swarm::new(peer(1), Zone::default(), limits, 7);
    swarm.handle(at(0), Event::Members(members_of(members)));
    swarm
}

fn members_of(ids: impl IntoIterator<Item = u8>) -> Members {
    Members::new(ids.into_iter().map(|n| Member { id: peer(n), zone: Zone::default(), is_seed: false }).collect())
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
fn the_source_of_a_lease_takes_the_place_of_a_neighbour_that_is_asked_for_nothing() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, MIB);
    let hello = || Message::Hello { have: Bitfield::new(1), wants_answer: false };
    let most = u8::try_from(swarm.node.limits.neighbours_max).unwrap();
    heard(&mut swarm, at(2), 2, blob, hello());
    (1..most).for_each(|n| drop(heard(&mut swarm, at(2), 100 + n, blob, hello())));
    assert_eq!(swarm.neighbours(), usize::from(most));
    let lease = Lease { segment: 0, from: Some(peer(3)), is_whole: true, interested: 4 };
    let actions = heard(&mut swarm, at(3), 2, blob, Message::Lease(lease));
    let [Action::Send { to, message: Message::Leave, .. }, Action::Fetch { piece: 0, peer: from, .. }] = actions[..]
    else {
        panic!("{actions:?}")
    };
    assert!(to != peer(2) && from == peer(3), "{actions:?}");
    assert_eq!((swarm.neighbours(), swarm.check_invariants()), (usize::from(most), Ok(())));
}

#[test]
fn who_wants_a_blob_is_believed_over_a_wrong_size_that_somebody_told_before() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    heard(&mut swarm, at(1), 3, blob, Message::Holds { size: 7 * MIB });
    let join = |size| {
        let have = Bitfield::new(Layout::new(size).pieces());
        Message::Join(Join::of(size, have))
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
    let again = swarm.deadline();
    assert!(again > at(10));
    let later = (0..20).map(|n| at(100 + 50 * n)).find(|time| swarm.handle(*time, Event::Tick).iter().any(is_import));
    assert!(later.is_some(), "and is asked again later");
}

#[test]
fn a_node_that_has_just_started_waits_until_it_knows_the_others() {
    let blob = blob_ranked(&[1]);
    let mut swarm = Swarm::new(peer(1), Zone::default(), Limits::default(), 7);
    swarm.handle(at(0), Event::Members(members_of([1])));
    assert!(!want(&mut swarm, blob, MIB).iter().any(is_import));
    swarm.handle(at(200), Event::Members(members_of(1..=4)));
    let first = (1..50).map(|n| at(n * 20)).find(|time| swarm.handle(*time, Event::Tick).iter().any(is_import));
    assert_eq!(first, Some(at(460)), "a quarter of a second after it heard of the last");
}

#[test]
fn a_deputy_gives_no_leases_unless_somebody_misses_something() {
    let blob = blob_ranked(&[2, 1]);
    let mut swarm = node(1..=4);
    let join = Join::of(MIB, Bitfield::new(1));
    let is_lease = |action: &Action| matches!(action, Action::Send { message: Message::Lease(_), .. });
    let actions = heard(&mut swarm, at(2), 3, blob, Message::Join(join));
    assert!(!actions.iter().any(is_lease), "node 2 gives them: {actions:?}");
    let missing = Message::Missing { segments: vec![0], without: vec![] };
    assert!(heard(&mut swarm, at(3), 3, blob, missing).iter().any(is_lease));
}

#[test]
fn a_lease_that_lapsed_goes_to_another_node() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    let join = || Join::of(17 * MIB, Bitfield::new(17));
    let owner = |actions: &[Action]| {
        let mut leases = actions.iter().filter_map(|action| match action {
            Action::Send { to, message: Message::Lease(_), .. } => Some(*to),
            _ => None,
        });
        leases.next()
    };
    let end = |segment, end| Message::LeaseEnd { segment, from: None, end, upload_time: Duration::ZERO };
    // Node 4 has owned all three segments already: it would be the turn of node 3 again and again.
    assert_eq!(owner(&heard(&mut swarm, at(2), 4, blob, Message::Join(join()))), Some(peer(4)));
    heard(&mut swarm, at(3), 4, blob, end(0, LeaseEnd::Done));
    heard(&mut swarm, at(3), 4, blob, end(1, LeaseEnd::Done));
    heard(&mut swarm, at(3), 4, blob, end(2, LeaseEnd::Throttled(Duration::from_secs(1))));
    heard(&mut swarm, at(4), 3, blob, Message::Join(join()));
    assert_eq!(owner(&swarm.handle(at(1100), Event::Tick)), Some(peer(3)));
    assert_eq!(owner(&swarm.handle(at(5200), Event::Tick)), Some(peer(4)));
}

#[test]
fn a_node_that_waits_for_a_slow_origin_is_not_woken_all_the_time() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node([1]);
    assert!(want(&mut swarm, blob, MIB).iter().any(is_import));
    let mut now = at(1);
    for _ in 0..20 {
        now = swarm.deadline().max(now);
        swarm.handle(now, Event::Tick);
    }
    assert!(now > at(1000), "twenty ticks until {now:?}");
}

#[test]
fn a_last_segment_of_a_few_bytes_does_not_make_the_others_look_late() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    let size = 16 * MIB + 1;
    let join = || {
        let have = Bitfield::new(Layout::new(size).pieces());
        Message::Join(Join::of(size, have))
    };
    let mut leased = Vec::new();
    let mut note = |actions: Vec<Action>| {
        for action in actions {
            if let Action::Send { to, message: Message::Lease(lease), .. } = action {
                leased.push((to, lease.segment));
            }
        }
        leased.clone()
    };
    for other in [2, 3] {
        note(heard(&mut swarm, at(5000), other, blob, join()));
    }
    let owner = note(Vec::new()).into_iter().find(|(_, segment)| *segment == 2).map(|(owner, _)| owner).unwrap();
    swarm.handle(
        at(5010),
        Event::Message { from: owner, blob, message: Message::Released { piece: 16, is_whole: true } },
    );
    let done = Message::LeaseEnd { segment: 2, from: None, end: LeaseEnd::Done, upload_time: Duration::ZERO };
    swarm.handle(at(5010), Event::Message { from: owner, blob, message: done });
    let before = note(Vec::new()).len();
    assert_eq!(before, 3);
    // No first piece of 1 MiB came for 3 s: on a thin link no sign of anything.
    assert_eq!(note(swarm.handle(at(8000), Event::Tick)).len(), before);
    assert!(note(swarm.handle(at(9100), Event::Tick)).len() > before, "in the end it is");
}

/// A coordinator of a blob of 64 MiB that two nodes want, and the leases that it gave at once, two to each.
fn two_owners() -> (Swarm, Digest, Vec<(PeerId, u32)>) {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=4);
    swarm.node.limits.imports_first = 8;
    let leases = [2, 3].into_iter().flat_map(|other| {
        let have = Bitfield::new(Layout::new(64 * MIB).pieces());
        let join = Join::of(64 * MIB, have);
        leases(&heard(&mut swarm, at(5000), other, blob, Message::Join(join)))
    });
    let leases = leases.collect();
    (swarm, blob, leases)
}

#[test]
fn of_a_few_each_reads_one_segment_at_first_and_of_many_two() {
    for (few, each) in [(8, 1), (0, 2)] {
        let (blob, mut swarm) = (blob_ranked(&[1]), node(1..=4));
        (swarm.node.limits.few, swarm.node.limits.imports_first) = (few, 8);
        for other in [2, 3] {
            let have = Bitfield::new(Layout::new(64 * MIB).pieces());
            let join = Join::of(64 * MIB, have);
            let given = leases(&heard(&mut swarm, at(5000), other, blob, Message::Join(join)));
            assert_eq!(given.iter().filter(|(owner, _)| *owner == peer(other)).count(), each, "{given:?}");
        }
    }
}

fn leases(actions: &[Action]) -> Vec<(PeerId, u32)> {
    let lease = |action: &Action| match action {
        Action::Send { to, message: Message::Lease(lease), .. } => Some((*to, lease.segment)),
        _ => None,
    };
    actions.iter().filter_map(lease).collect()
}

/// The nodes of `living` get a piece of each of their segments in turn, one piece in all each `every`
/// milliseconds, until `end`. Which leases were given again meanwhile.
fn read(
    swarm: &mut Swarm,
    blob: Digest,
    given: &mut Vec<(PeerId, u32)>,
    living: &[u8],
    every: fn(u64) -> u64,
    end: u64,
) {
    // Pieces read of each segment, and when the last one was.
    let mut read = BTreeMap::<u32, (u64, u32)>::new();
    let mut time = 5000;
    while time < end {
        time += every(time);
        let is_open = |(owner, segment): &&(PeerId, u32)| {
            living.iter().any(|n| peer(*n) == *owner) && read.get(segment).is_none_or(|(_, pieces)| *pieces < 8)
        };
        let next = given.iter().filter(is_open).min_by_key(|(_, segment)| read.get(segment).map(|(last, _)| *last));
        let Some((owner, segment)) = next.copied() else { return };
        let (last, pieces) = read.entry(segment).or_insert((time, 0));
        let mut said = vec![Message::Released { piece: segment * 8 + *pieces, is_whole: true }];
        (*last, *pieces) = (time, *pieces + 1);
        if *pieces == 8 {
            said.push(Message::LeaseEnd { segment, from: None, end: LeaseEnd::Done, upload_time: Duration::ZERO });
        }
        for message in said {
            given.extend(leases(&swarm.handle(at(time), Event::Message { from: owner, blob, message })));
        }
        given.extend(leases(&swarm.handle(at(time), Event::Tick)));
    }
}

#[test]
fn a_dead_owner_holds_up_the_others_for_some_pieces_and_not_for_some_segments() {
    let (mut swarm, blob, mut given) = two_owners();
    let first: Vec<u32> = given.iter().filter(|(owner, _)| *owner == peer(3)).map(|(_, segment)| *segment).collect();
    assert_eq!(first.len(), 2);
    // A whole segment takes its owner 6 s at the least.
    read(&mut swarm, blob, &mut given, &[2], |_| 80, 9000);
    let again = first.iter().filter(|segment| given.contains(&(peer(2), **segment))).count();
    assert_eq!(again, 2, "{given:?}");
}

#[test]
fn an_owner_that_reads_its_leases_one_after_the_other_keeps_them() {
    let (mut swarm, blob, given) = two_owners();
    let of = |n| given.iter().filter(move |(owner, _)| *owner == peer(n));
    let later = of(3).next_back().copied().unwrap();
    // It shows nothing of the later one while 40 pieces come, its own first ones among them.
    let mut at_work: Vec<(PeerId, u32)> = given.iter().copied().filter(|lease| *lease != later).collect();
    read(&mut swarm, blob, &mut at_work, &[2, 3], |_| 80, 8200);
    assert!(at_work.iter().all(|(_, segment)| *segment != later.1), "{at_work:?}");
}

#[test]
fn owners_that_share_a_thin_link_are_late_with_nothing() {
    let (mut swarm, blob, mut given) = two_owners();
    // It becomes ten times slower while they read: with eight leases each shows a piece in 3.2 s.
    read(&mut swarm, blob, &mut given, &[2, 3], |time| if time < 5600 { 40 } else { 400 }, 25_000);
    let mut segments: Vec<u32> = given.iter().map(|(_, segment)| *segment).collect();
    segments.sort_unstable();
    assert_eq!(segments, (0..8).collect::<Vec<_>>(), "each is given once");
}

/// Lets time pass until an action is one that is looked for: when that is, and nothing by `until`.
fn wait_for(swarm: &mut Swarm, until: Time, wanted: impl Fn(&Action) -> bool) -> Option<Time> {
    let mut now = Time::ZERO;
    loop {
        now = swarm.deadline().max(now + Duration::from_millis(1));
        if now > until {
            return None;
        }
        if swarm.handle(now, Event::Tick).iter().any(&wanted) {
            return Some(now);
        }
    }
}

#[test]
fn a_coordinator_that_died_in_silence_is_noticed_though_it_owes_a_piece() {
    let blob = blob_ranked(&[2, 3, 4]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, MIB);
    heard(
        &mut swarm,
        Time::ZERO,
        2,
        blob,
        Message::Welcome { neighbours: vec![peer(2)], holders: Vec::new(), interested: 2 },
    );
    let hello = Message::Hello { have: Bitfield::full(1), wants_answer: false };
    let asked = heard(&mut swarm, Time::ZERO, 2, blob, hello);
    assert_eq!(asked, [Action::Fetch { blob, piece: 0, peer: peer(2) }]);
    let joins_backup =
        |action: &Action| matches!(action, Action::Send { to, message: Message::Join(_), .. } if *to == peer(3));
    let noticed = wait_for(&mut swarm, at(10_000), joins_backup).unwrap();
    let limits = Limits::default();
    let expected = limits.lease_patience + limits.join_patience * (limits.join_tries + 1);
    assert!(noticed.since(Time::ZERO) <= expected, "{noticed:?}");
}

#[test]
fn a_source_that_stalls_is_given_up_at_once_and_one_that_breaks_off_is_not() {
    for (reason, is_given_up) in [(FetchFailure::Stalled, true), (FetchFailure::Broken, false)] {
        let blob = blob_ranked(&[2]);
        let mut swarm = node(1..=4);
        want(&mut swarm, blob, MIB);
        let lease = Message::Lease(Lease { segment: 0, from: Some(peer(3)), is_whole: true, interested: 2 });
        assert_eq!(heard(&mut swarm, at(2), 2, blob, lease), [Action::Fetch { blob, piece: 0, peer: peer(3) }]);
        let actions = swarm.handle(at(3), Event::FetchFailed { blob, piece: 0, peer: peer(3), reason });
        let ends = |action: &Action| {
            let is_end = |message: &Message| matches!(message, Message::LeaseEnd { end: LeaseEnd::Broken, .. });
            matches!(action, Action::Send { message, .. } if is_end(message))
        };
        assert_eq!(actions.iter().any(ends), is_given_up, "{reason:?}: {actions:?}");
    }
}

#[test]
fn a_blob_that_waits_for_its_turn_blames_nobody_who_has_it() {
    let mut swarm = node(1..=4);
    let busy = swarm.node.limits.in_flight;
    // One blob has all requests, and its pieces come; the other is at a neighbour too.
    let blobs = [blob_ranked(&[2, 3]), blob_ranked(&[3, 2])];
    for (turn, (blob, size)) in (0..).zip(blobs.into_iter().zip([4096 * MIB, MIB])) {
        want_in_turn(&mut swarm, blob, size, turn);
        let coordinator = if turn == 0 { 2 } else { 3 };
        let neighbours = vec![peer(2), peer(3), peer(4)];
        heard(
            &mut swarm,
            at(1),
            coordinator,
            blob,
            Message::Welcome { neighbours, holders: Vec::new(), interested: 4 },
        );
        for from in 2..=4 {
            let have = Bitfield::full(Layout::new(size).pieces());
            heard(&mut swarm, at(1), from, blob, Message::Hello { have, wants_answer: false });
        }
    }
    let mut asked: Vec<(u32, PeerId)> = Vec::new();
    for second in 1..=10 {
        let [first, second_blob] = blobs;
        for (piece, peer) in std::mem::take(&mut asked) {
            swarm.handle(at(second * 1000), Event::Fetched { blob: first, piece, peer });
        }
        let actions = swarm.handle(at(second * 1000 + 900), Event::Tick);
        let complains = |action: &Action| matches!(action, Action::Send { blob, message: Message::Missing { .. }, .. } if *blob == second_blob);
        assert!(!actions.iter().any(complains), "after {second} s: {actions:?}");
        let download = &swarm.downloads[&first];
        asked.extend(download.requests.iter().map(|request| (request.piece, request.peer)));
        assert_eq!(asked.len(), busy, "the first has all of them");
    }
}
