//! A coordinator is gone, and another takes its place.

use super::*;

/// Node 1 of three that reads segment 0 for node 3, the coordinator of a blob of so many segments, and ranks
/// next.
fn reads_for_another(segments: u64) -> (Swarm, Digest) {
    let blob = blob_ranked(&[3, 1]);
    let mut swarm = node(1..=3);
    want(&mut swarm, blob, segments * 8 * MIB);
    let lease = Lease { segment: 0, from: None, is_whole: false, interested: 2 };
    let actions = heard(&mut swarm, at(1000), 3, blob, Message::Lease(lease));
    assert!(actions.iter().any(is_import), "{actions:?}");
    (swarm, blob)
}

fn join(segments: u64, leased: Vec<Reading>) -> Message {
    let size = segments * 8 * MIB;
    let (have, neighbours) = (Bitfield::new(Layout::new(size).pieces()), Vec::new());
    Message::Join(Join { size, have, leased, can_import: true, is_going: false, neighbours })
}

/// The coordinator is gone, for node 1.
fn loses_it(swarm: &mut Swarm, now: Time) -> Vec<Action> {
    let mut actions = swarm.handle(now, Event::PeerLost(peer(3)));
    actions.extend(swarm.handle(now, Event::Members(members_of(1..=2))));
    actions
}

/// All that node 1 has read of segment 0 comes.
fn comes(swarm: &mut Swarm, now: Time, blob: Digest) -> Vec<Action> {
    (0..8).flat_map(|piece| swarm.handle(now, Event::Imported { blob, piece })).collect()
}

fn imported(actions: &[Action]) -> Vec<u32> {
    let segment = |action: &Action| match action {
        Action::Import { segment, .. } => Some(*segment),
        _ => None,
    };
    actions.iter().filter_map(segment).collect()
}

/// Until nothing more is due before `end`.
fn tick_until(swarm: &mut Swarm, end: Time) -> Vec<Action> {
    let mut actions = Vec::new();
    while swarm.deadline() <= end {
        let now = swarm.deadline();
        actions.extend(swarm.handle(now, Event::Tick));
    }
    actions
}

#[test]
fn who_comes_next_leaves_to_the_others_what_they_most_likely_read() {
    for others_read_it in [true, false] {
        let (mut swarm, blob) = reads_for_another(8);
        let mut actions = loses_it(&mut swarm, at(1100));
        actions.extend(comes(&mut swarm, at(1200), blob));
        // The one after that which it had itself is the other's, who loses the coordinator later.
        assert_eq!(imported(&actions), [7, 6, 5, 4], "{actions:?}");
        let reading = Reading { segment: 1, from: None };
        let leased = if others_read_it { vec![reading] } else { Vec::new() };
        let mut given = leases(&heard(&mut swarm, at(1500), 2, blob, join(8, leased)));
        given.extend(leases(&tick_until(&mut swarm, at(1600))));
        assert_eq!(given.contains(&(peer(2), 1)), !others_read_it, "{given:?}");
        assert_eq!(swarm.check_invariants(), Ok(()));
    }
}

#[test]
fn of_a_small_blob_it_reads_nothing_more_before_the_others_had_time_to_say_what_they_read() {
    let (mut swarm, blob) = reads_for_another(4);
    let mut actions = loses_it(&mut swarm, at(1100));
    actions.extend(comes(&mut swarm, at(1200), blob));
    assert!(imported(&actions).is_empty(), "{actions:?}");
    let reads = [1, 2, 3].map(|segment| Reading { segment, from: None });
    heard(&mut swarm, at(1500), 2, blob, join(4, reads.to_vec()));
    let then = tick_until(&mut swarm, at(1600));
    assert!(imported(&then).is_empty(), "{then:?}");
}

#[test]
fn who_is_next_and_was_joined_before_it_knew_hears_the_others_too() {
    let (mut swarm, blob) = reads_for_another(4);
    let early = heard(&mut swarm, at(1000), 2, blob, join(4, Vec::new()));
    assert_eq!(leases(&early), [], "somebody ranks higher");
    let mut actions = loses_it(&mut swarm, at(2000));
    actions.extend(tick_until(&mut swarm, at(2499)));
    assert!(leases(&actions).is_empty() && imported(&actions).is_empty(), "{actions:?}");
    let then = tick_until(&mut swarm, at(2500));
    assert!(!leases(&then).is_empty(), "{then:?}");
    assert!(leases(&then).iter().all(|(_, segment)| *segment != 0), "it is read already");
}

#[test]
fn what_came_whole_by_another_way_is_not_read_any_more() {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    let layout = Layout::new(8 * MIB);
    want(&mut swarm, blob, layout.size());
    let hello = |have| Message::Hello { have, wants_answer: false };
    heard(&mut swarm, at(2), 3, blob, hello(Bitfield::full(8)));
    let lease = Message::Lease(Lease { segment: 0, from: None, is_whole: false, interested: 3 });
    let leased = heard(&mut swarm, at(2), 2, blob, lease);
    assert!(!leased.iter().any(is_import), "a neighbour has it: {leased:?}");
    // It has nothing of it any more, and nobody has looked at the lease since.
    heard(&mut swarm, at(3), 3, blob, hello(Bitfield::new(8)));
    let proven = swarm.handle(at(4), Event::Proven { blob, layout });
    assert!(!proven.iter().any(is_import), "{proven:?}");
}
