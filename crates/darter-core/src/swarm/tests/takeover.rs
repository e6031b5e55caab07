//! A coordinator is gone, and another takes its place.

use super::*;

/// Node 1 of three that reads segment 0 for node 3, the coordinator of a blob of 32 MiB, and ranks next.
fn reads_for_another() -> (Swarm, Digest) {
    let blob = blob_ranked(&[3, 1]);
    let mut swarm = node(1..=3);
    want(&mut swarm, blob, 32 * MIB);
    let lease = Lease { segment: 0, from: None, is_whole: false, interested: 2 };
    let actions = heard(&mut swarm, at(1000), 3, blob, Message::Lease(lease));
    assert!(actions.iter().any(is_import), "{actions:?}");
    (swarm, blob)
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
        let (mut swarm, blob) = reads_for_another();
        let mut actions = swarm.handle(at(1100), Event::PeerLost(peer(3)));
        actions.extend(swarm.handle(at(1100), Event::Members(members_of(1..=2))));
        // Its own segment comes, and there is room for another.
        for piece in 0..8 {
            actions.extend(swarm.handle(at(1200), Event::Imported { blob, piece }));
        }
        // The one after that which it had itself is the other's, who loses the coordinator later.
        assert_eq!(imported(&actions), [3, 2], "{actions:?}");
        let reading = Reading { segment: 1, from: None };
        let leased = if others_read_it { vec![reading] } else { Vec::new() };
        let (have, neighbours) = (Bitfield::new(32), Vec::new());
        let join = Join { size: 32 * MIB, have, leased, can_import: true, neighbours };
        let mut given = leases(&heard(&mut swarm, at(1500), 2, blob, Message::Join(join)));
        assert_eq!(given, [], "it may come from somebody else still");
        given.extend(leases(&tick_until(&mut swarm, at(1600))));
        let wanted = if others_read_it { Vec::new() } else { vec![(peer(2), 1)] };
        assert_eq!(given, wanted);
        assert_eq!(swarm.check_invariants(), Ok(()));
    }
}

#[test]
fn who_is_next_and_was_joined_before_it_knew_hears_the_others_too() {
    let (mut swarm, blob) = reads_for_another();
    let join =
        Join { size: 32 * MIB, have: Bitfield::new(32), leased: Vec::new(), can_import: true, neighbours: Vec::new() };
    let early = heard(&mut swarm, at(1000), 2, blob, Message::Join(join));
    assert_eq!(leases(&early), [], "somebody ranks higher");
    let mut actions = swarm.handle(at(2000), Event::PeerLost(peer(3)));
    actions.extend(swarm.handle(at(2000), Event::Members(members_of(1..=2))));
    assert!(leases(&actions).iter().all(|(_, segment)| *segment > 1), "{actions:?}");
    let mut then = tick_until(&mut swarm, at(2500));
    for piece in 0..8 {
        then.extend(swarm.handle(at(2600), Event::Imported { blob, piece }));
    }
    let later = imported(&then).into_iter().chain(leases(&then).into_iter().map(|(_, segment)| segment));
    assert_eq!(later.collect::<Vec<_>>(), [1]);
}
