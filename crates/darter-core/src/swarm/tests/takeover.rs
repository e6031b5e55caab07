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
fn who_comes_next_hears_first_what_the_others_read() {
    let (mut swarm, blob) = reads_for_another();
    swarm.handle(at(1100), Event::PeerLost(peer(3)));
    let mut actions = swarm.handle(at(1100), Event::Members(members_of(1..=2)));
    // Its own segment comes, and there is room for another.
    for piece in 0..8 {
        actions.extend(swarm.handle(at(1200), Event::Imported { blob, piece }));
    }
    assert!(imported(&actions).is_empty(), "{actions:?}");
    // The other lost the coordinator later.
    let join = Join {
        size: 32 * MIB,
        have: Bitfield::new(32),
        leased: vec![Reading { segment: 1, from: None }],
        can_import: true,
        neighbours: Vec::new(),
    };
    heard(&mut swarm, at(1500), 2, blob, Message::Join(join));
    let then = tick_until(&mut swarm, at(1600));
    assert_eq!(imported(&then), [2], "{then:?}");
    assert_eq!(swarm.check_invariants(), Ok(()));
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
    assert_eq!(leases(&actions), [], "{actions:?}");
    let given = leases(&tick_until(&mut swarm, at(2500)));
    assert!(!given.is_empty() && given.iter().all(|(_, segment)| *segment != 0), "{given:?}");
}
