//! What is slow is not dead: an origin, a coordinator.

use super::*;

#[test]
fn an_owner_to_whom_bytes_come_slowly_keeps_its_lease_and_not_for_ever() {
    let blob = blob_ranked(&[1]);
    // When the lease is given to the other, if its owner says until `says_until` that bytes come.
    let given_again_at = |says_until: u64| {
        let mut swarm = node(1..=4);
        let mut given = Vec::new();
        for other in [2, 3] {
            let (size, have) = (5 * MIB, Bitfield::new(5));
            let join = Join::of(size, have);
            given.extend(leases(&heard(&mut swarm, at(5000), other, blob, Message::Join(join))));
        }
        let [(owner, 0)] = given[..] else { panic!("{given:?}") };
        let second = |time: &u64| {
            let mut said = leases(&swarm.handle(at(*time), Event::Tick));
            if *time < says_until {
                let message = Message::Released { piece: 1, is_whole: false };
                said.extend(leases(&swarm.handle(at(*time), Event::Message { from: owner, blob, message })));
            }
            said.iter().any(|(other, segment)| (*other != owner, *segment) == (true, 0))
        };
        (5000..200_000).step_by(1000).find(second)
    };
    assert_eq!(given_again_at(0), Some(9000));
    assert_eq!(given_again_at(15_000), Some(18_000));
    assert_eq!(given_again_at(u64::MAX), Some(65_000));
}

#[test]
fn who_sent_nothing_when_it_was_asked_is_not_waited_for_a_second_time() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, MIB);
    let welcome = Message::Welcome { neighbours: vec![peer(3)], holders: vec![], interested: 2 };
    heard(&mut swarm, at(2), 2, blob, welcome);
    let hello = Message::Hello { have: Bitfield::full(1), wants_answer: false };
    let fetch = Action::Fetch { blob, piece: 0, peer: peer(3) };
    assert!(heard(&mut swarm, at(3), 3, blob, hello).contains(&fetch));
    // The coordinator answers whenever it is asked; a complaint is what is counted.
    let mut complaints = |from, to| {
        let mut actions = Vec::new();
        for time in (from..to).step_by(10) {
            let said = swarm.handle(at(time), Event::Tick);
            if said.iter().any(|action| matches!(action, Action::Send { message: Message::Join(_), .. })) {
                let welcome = Message::Welcome { neighbours: vec![], holders: vec![], interested: 2 };
                actions.extend(heard(&mut swarm, at(time), 2, blob, welcome));
            }
            actions.extend(said);
            if time == 3000 {
                let failed = Event::FetchFailed { blob, piece: 0, peer: peer(3), reason: FetchFailure::Stalled };
                actions.extend(swarm.handle(at(time), failed));
            }
        }
        let missing = Message::Missing { segments: vec![0], without: vec![] };
        let complaint = Action::Send { to: peer(2), blob, message: missing };
        let said = actions.iter().filter(|action| **action == complaint).count();
        (said, actions.contains(&fetch))
    };
    assert_eq!(complaints(10, 3000), (0, false), "what is late may come yet");
    let (said, is_asked_again) = complaints(3000, 6400);
    assert!(said > 1 && is_asked_again, "{said} complaints until it stalls again");
}

#[test]
fn who_is_about_to_go_reads_from_the_origin_what_nobody_else_can() {
    let blob = blob_ranked(&[1]);
    let (size, have) = (64 * MIB, || Bitfield::new(64));
    let join = |is_going| {
        let join = Join { size, have: have(), leased: vec![], can_import: true, is_going, neighbours: vec![] };
        Message::Join(join)
    };
    let mut swarm = node(1..=4);
    // Both know of the other before the first may read.
    let mut given = leases(&heard(&mut swarm, at(5000), 2, blob, join(true)));
    given.extend(leases(&heard(&mut swarm, at(5000), 3, blob, join(false))));
    assert!(given.iter().any(|(owner, _)| *owner == peer(2)), "nobody else was there: {given:?}");
    let mut swarm = node(1..=4);
    let mut given = leases(&heard(&mut swarm, at(5000), 3, blob, join(false)));
    given.extend(leases(&heard(&mut swarm, at(5000), 2, blob, join(true))));
    for time in (6000..20_000).step_by(500) {
        given.extend(leases(&swarm.handle(at(time), Event::Tick)));
    }
    assert!(given.iter().all(|(owner, _)| *owner == peer(3)), "{given:?}");
    // It stays after all.
    given = leases(&heard(&mut swarm, at(20_000), 2, blob, join(false)));
    assert!(given.iter().any(|(owner, _)| *owner == peer(2)), "{given:?}");
    // A seed reads no registry while others are there: who goes is not to wait for it.
    let member = |n| Member { id: peer(n), zone: Zone::default(), is_seed: n == 3 };
    let mut swarm = node(1..=4);
    swarm.handle(at(0), Event::Members(Members::new((1..=4).map(member).collect())));
    let mut given = leases(&heard(&mut swarm, at(5000), 3, blob, join(false)));
    given.extend(leases(&heard(&mut swarm, at(5000), 2, blob, join(true))));
    for time in (6000..20_000).step_by(500) {
        given.extend(leases(&swarm.handle(at(time), Event::Tick)));
    }
    assert!(given.iter().any(|(owner, _)| *owner == peer(2)), "{given:?}");
    // And who is told it says so at once, of what comes and of what it asks for next.
    let blobs = [blob_ranked(&[2, 1, 3]), blob_ranked(&[3, 1, 2])];
    let mut swarm = node([1, 2, 3]);
    want(&mut swarm, blobs[0], 5 * MIB);
    let says = |actions: &[Action], blob: Digest, wanted: bool| {
        let is = |action: &Action| matches!(action, Action::Send { blob: of, message: Message::Join(join), .. } if *of == blob && join.is_going == wanted);
        actions.iter().any(is)
    };
    assert!(says(&swarm.handle(at(10), Event::Leave(vec![])), blobs[0], true));
    assert_eq!(
        swarm
            .handle(at(11), Event::Leave(vec![]))
            .iter()
            .filter(|action| says(&[(*action).clone()], blobs[0], true))
            .count(),
        0
    );
    let layout = Layout::new(5 * MIB);
    let wanted = Event::Want { blob: blobs[1], layout, have: Bitfield::new(5), can_import: true, turn: 0 };
    assert!(says(&swarm.handle(at(12), wanted), blobs[1], true));
    assert!(says(&swarm.handle(at(13), Event::Stay), blobs[0], false));
}

#[test]
fn who_waits_for_a_slow_piece_hears_of_it_from_the_coordinator_alone() {
    let blob = blob_ranked(&[1]);
    let comes = || Message::Have { pieces: Vec::new(), free_slots: Limits::default().slots, interested: 2 };
    let mut swarm = node(1..=4);
    let (size, have) = (5 * MIB, Bitfield::new(5));
    let join = Join::of(size, have);
    let mut given = Vec::new();
    for other in [2, 3] {
        given.extend(leases(&heard(&mut swarm, at(5000), other, blob, Message::Join(join.clone()))));
    }
    let owner = given[0].0;
    let other = if owner == peer(2) { peer(3) } else { peer(2) };
    let mut says = |time, from, is_whole| {
        let message = Message::Released { piece: 0, is_whole };
        let actions = swarm.handle(at(time), Event::Message { from, blob, message });
        actions.contains(&Action::Send { to: other, blob, message: comes() })
    };
    assert!(!says(6000, other, false), "who has no lease");
    assert!(says(6001, owner, false));
    assert!(!says(7000, owner, false), "it was just said");
    assert!(says(8001, owner, false));
    assert!(!says(9000, owner, true) && !says(10_500, owner, false), "a piece came");
    // And who hears it.
    let mut swarm = node([1, 2, 3]);
    let blob = blob_ranked(&[2, 1, 3]);
    want(&mut swarm, blob, 5 * MIB);
    assert_eq!(heard(&mut swarm, at(10), 3, blob, comes()), []);
    assert_eq!(heard(&mut swarm, at(10), 2, blob, comes()), [Action::Wait(blob)]);
}

/// Tells this node, which wants the blob, of every deadline until the end. Whom it asked to join meanwhile,
/// and when.
fn joins(swarm: &mut Swarm, (mut now, end): (Time, Time)) -> Vec<(PeerId, u64)> {
    let mut asked = Vec::new();
    while now < end {
        for action in swarm.handle(now, Event::Tick) {
            if let Action::Send { to, message: Message::Join(_), .. } = action {
                asked.push((to, now.as_micros() / 1000));
            }
        }
        now = swarm.deadline().max(now + Duration::from_millis(1));
    }
    asked
}

#[test]
fn a_coordinator_has_its_time_for_an_answer_though_pieces_are_missed() {
    let blob = blob_ranked(&[2, 3]);
    let mut swarm = node([1, 3, 4]);
    want(&mut swarm, blob, MIB);
    heard(
        &mut swarm,
        at(2),
        3,
        blob,
        Message::Welcome { neighbours: vec![peer(4)], holders: Vec::new(), interested: 2 },
    );
    // Another comes who ranks higher, while this node is about to complain that nothing comes.
    swarm.handle(at(290), Event::Members(members_of(1..=4)));
    let asked = joins(&mut swarm, (at(291), at(1000)));
    assert_eq!(asked, [(peer(2), 590), (peer(3), 890)]);
}

#[test]
fn a_coordinator_that_was_passed_over_and_answers_late_is_the_coordinator_again() {
    let blob = blob_ranked(&[2, 3]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, MIB);
    assert_eq!(joins(&mut swarm, (at(2), at(602))), [(peer(2), 301), (peer(3), 601)]);
    let late = heard(
        &mut swarm,
        at(602),
        2,
        blob,
        Message::Welcome { neighbours: Vec::new(), holders: Vec::new(), interested: 2 },
    );
    let is_asked = |to| {
        late.iter()
            .any(|action| matches!(action, Action::Send { to: asked, message: Message::Join(_), .. } if *asked == to))
    };
    assert!(is_asked(peer(2)), "{late:?}");
    let lease = || Message::Lease(Lease { segment: 0, from: None, is_whole: false, interested: 2 });
    assert!(!heard(&mut swarm, at(603), 3, blob, lease()).iter().any(is_import), "who took its place meanwhile");
    assert!(heard(&mut swarm, at(604), 2, blob, lease()).iter().any(is_import));
}

#[test]
fn an_owner_waits_a_moment_for_a_neighbour_that_has_the_piece_and_gives_it_nobody() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, MIB);
    heard(
        &mut swarm,
        at(2),
        2,
        blob,
        Message::Welcome { neighbours: vec![peer(3)], holders: Vec::new(), interested: 4 },
    );
    let asked = heard(&mut swarm, at(3), 3, blob, Message::Hello { have: Bitfield::full(1), wants_answer: false });
    assert!(asked.contains(&Action::Fetch { blob, piece: 0, peer: peer(3) }), "{asked:?}");
    let reason = FetchFailure::Refused(Refusal::Busy(Duration::from_secs(10)));
    swarm.handle(at(4), Event::FetchFailed { blob, piece: 0, peer: peer(3), reason });
    let lease = Lease { segment: 0, from: None, is_whole: false, interested: 4 };
    let mut reads = heard(&mut swarm, at(5), 2, blob, Message::Lease(lease)).iter().any(is_import);
    let mut now = at(5);
    while !reads {
        now = swarm.deadline().max(now + Duration::from_millis(1));
        reads = swarm.handle(now, Event::Tick).iter().any(is_import);
        assert!(now < at(1000), "it waits for ever");
    }
    assert!(now > at(100), "at once, at {now:?}");
}

/// A coordinator, node 1, of a blob that 2 and 3 want; and the one that has its only segment to read.
fn two_want_one_segment() -> (Swarm, Digest, PeerId) {
    let (mut swarm, blob) = (node(1..=4), blob_ranked(&[1]));
    let mut given = Vec::new();
    for other in [2, 3] {
        let join = Join::of(5 * MIB, Bitfield::new(5));
        given.extend(leases(&heard(&mut swarm, at(5000), other, blob, Message::Join(join))));
    }
    let [(owner, 0)] = given[..] else { panic!("{given:?}") };
    (swarm, blob, owner)
}

fn throttled(from: Option<PeerId>, seconds: u64) -> Message {
    let end = LeaseEnd::Throttled(Duration::from_secs(seconds));
    Message::LeaseEnd { segment: 0, from, end, upload_time: Duration::ZERO }
}

#[test]
fn all_who_wait_hear_as_long_as_the_origin_is_left_alone_that_it_will_be_read() {
    let (mut swarm, blob, owner) = two_want_one_segment();
    let comes = |action: &&Action| matches!(action, Action::Send { message: Message::Have { pieces, .. }, .. } if pieces.is_empty());
    let first = swarm.handle(at(5100), Event::Message { from: owner, blob, message: throttled(None, 7) });
    assert_eq!(first.iter().filter(comes).count(), 2, "{first:?}");
    let (mut told, mut given) = (Vec::new(), Vec::new());
    while given.is_empty() {
        let now = swarm.deadline();
        let actions = swarm.handle(now, Event::Tick);
        assert!(!told.contains(&now), "it is called for nothing");
        if actions.iter().filter(comes).count() == 2 {
            told.push(now);
        }
        given = leases(&actions).into_iter().map(|(to, _)| (now, to)).collect();
    }
    assert_eq!(told, [at(7100), at(9100), at(11_100)]);
    assert!(given[0].0 == at(12_100) && given[0].1 != owner, "another asks then: {given:?}");
    let then = swarm.handle(at(14_000), Event::Tick);
    assert_eq!(then.iter().filter(comes).count(), 0, "that is over");
}

#[test]
fn one_who_says_that_the_origin_throttles_is_asked_last_and_does_not_stop_the_others_for_long() {
    let (mut swarm, blob, owner) = two_want_one_segment();
    swarm.handle(at(5100), Event::Message { from: owner, blob, message: throttled(None, 3600) });
    assert_eq!(leases(&swarm.handle(at(15_099), Event::Tick)), []);
    let given = leases(&swarm.handle(at(15_100), Event::Tick));
    assert!(matches!(given[..], [(to, 0)] if to != owner), "{given:?}");
}

#[test]
fn a_word_about_throttling_by_whoever_reads_from_another_node_stops_nobody() {
    let (mut swarm, blob) = (node(1..=4), blob_ranked(&[1]));
    heard(&mut swarm, at(5000), 4, blob, Message::Holds { size: 5 * MIB });
    let join = Join::of(5 * MIB, Bitfield::new(5));
    let given = leases(&heard(&mut swarm, at(5000), 2, blob, Message::Join(join)));
    assert_eq!(given, [(peer(2), 0)]);
    let again = heard(&mut swarm, at(5100), 2, blob, throttled(Some(peer(4)), 60));
    assert_eq!(leases(&again), [(peer(2), 0)], "from the holder, at once");
}

#[test]
fn a_complaint_before_anybody_had_a_segment_does_not_count_once_somebody_has_it() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=5);
    let join = || Join::of(MIB, Bitfield::new(1));
    let mut given = Vec::new();
    for other in 2..=5 {
        given.extend(leases(&heard(&mut swarm, at(5000), other, blob, Message::Join(join()))));
    }
    let [(owner, 0)] = given[..] else { panic!("{given:?}") };
    let others: Vec<PeerId> = (2..=5).map(peer).filter(|other| *other != owner).collect();
    let missing = || Message::Missing { segments: vec![0], without: vec![] };
    let complain = |swarm: &mut Swarm, time: u64| -> Vec<Action> {
        let say = |from: &PeerId| Event::Message { from: *from, blob, message: missing() };
        others.iter().flat_map(|from| swarm.handle(at(time), say(from))).collect()
    };
    let mut said = Vec::new();
    // Its piece takes long, so that all of them complain more than once.
    for time in [5400, 5800, 6200, 6600] {
        said.extend(complain(&mut swarm, time));
    }
    let done = Message::LeaseEnd { segment: 0, from: None, end: LeaseEnd::Done, upload_time: Duration::ZERO };
    said.extend(swarm.handle(at(6900), Event::Message { from: owner, blob, message: done }));
    // These were on their way.
    let on_their_way = complain(&mut swarm, 6910);
    let meets = Message::Welcome { neighbours: vec![owner], holders: vec![], interested: 4 };
    let meet = others.iter().map(|to| Action::Send { to: *to, blob, message: meets.clone() });
    assert_eq!(on_their_way, meet.collect::<Vec<_>>());
    assert_eq!(leases(&said), []);
    // Nor do others, however many, as long as the word that it is there may be on its way to them.
    let soon = [6960, 7010, 7060, 7300].map(|time| leases(&complain(&mut swarm, time)));
    assert_eq!(soon.concat(), []);
    // Whom it gives nothing complains again, and again.
    let again = [7320, 7700].map(|time| leases(&complain(&mut swarm, time)));
    assert!(again.concat().iter().any(|(other, segment)| *other != owner && *segment == 0), "{again:?}");
}
