//! How soon what is new is read, and told to those that can give it on.

use super::*;

#[test]
fn few_read_a_blob_at_first_and_one_more_with_every_piece_that_comes() {
    let blob = blob_ranked(&[1]);
    let mut swarm = node(1..=40);
    let size = 512 * MIB;
    let mut running = Vec::new();
    for other in 2..=40 {
        let have = Bitfield::new(512);
        let join = Join::of(size, have);
        running.extend(leases(&heard(&mut swarm, at(5000), other, blob, Message::Join(join))));
    }
    let limits = Limits::default();
    assert_eq!(running.len(), limits.imports_first as usize);
    for came in 1..=limits.imports_start {
        let (owner, segment) = running[(came % limits.imports_first) as usize];
        let piece = segment * 8 + came / limits.imports_first;
        let message = Message::Released { piece, is_whole: true };
        let now = at(5000 + u64::from(came));
        running.extend(leases(&swarm.handle(now, Event::Message { from: owner, blob, message })));
        let most = (limits.imports_first + came).min(limits.imports_start);
        assert_eq!(running.len(), most as usize, "after {came} pieces");
    }
}

#[test]
fn a_peer_gets_one_piece_at_a_time_where_many_want_them_and_two_where_a_few_do() {
    for (interested, at_a_time) in [(8, 2), (9, 1)] {
        let members = members_of(1..=9);
        let mut blobs = (0..1000_u32).map(|n| Digest::of(&n.to_le_bytes()));
        let blob = blobs.find(|it| members.ranked(it)[0] == peer(2)).unwrap();
        let mut swarm = Swarm::new(peer(1), Zone::default(), Limits::default(), 7);
        swarm.handle(at(0), Event::Members(members));
        let (layout, mut have) = (Layout::new(4 * MIB), Bitfield::new(4));
        (0..3).for_each(|piece| have.set(piece));
        swarm.handle(at(1), Event::Want { blob, layout, have, can_import: true, turn: 0 });
        heard(
            &mut swarm,
            at(2),
            2,
            blob,
            Message::Welcome { neighbours: vec![peer(3)], holders: Vec::new(), interested },
        );
        let mut ask = |piece| {
            let request = RequestId(u64::from(piece));
            let asked = Event::Asked { from: peer(3), blob, piece, request };
            swarm.handle(at(3), asked).contains(&Action::Serve(request))
        };
        assert_eq!((0..3).filter(|piece| ask(*piece)).count(), at_a_time, "{interested} want it");
    }
}

/// A node with two neighbours that gets piece 0, and a moment later piece 1, which so many of them have. What
/// it tells them at once of piece 1.
fn told_of_the_second(holders: u8) -> usize {
    let blob = blob_ranked(&[2]);
    let mut swarm = node(1..=4);
    want(&mut swarm, blob, 4 * MIB);
    heard(
        &mut swarm,
        at(2),
        2,
        blob,
        Message::Welcome { neighbours: (2..=4).map(peer).collect(), holders: Vec::new(), interested: 4 },
    );
    for other in 2..=4 {
        let mut have = Bitfield::new(4);
        have.set(0);
        if other - 2 < holders {
            have.set(1);
        }
        heard(&mut swarm, at(3), other, blob, Message::Hello { have, wants_answer: false });
    }
    swarm.handle(at(10), Event::Imported { blob, piece: 0 });
    let actions = swarm.handle(at(10) + Duration::from_micros(100), Event::Imported { blob, piece: 1 });
    let is_word = |action: &&Action| match action {
        Action::Send { message: Message::Have { pieces, .. }, .. } => pieces.contains(&1),
        _ => false,
    };
    actions.iter().filter(is_word).count()
}

#[test]
fn a_piece_that_hardly_a_neighbour_has_is_told_at_once() {
    assert_eq!(told_of_the_second(0), 3);
    assert_eq!(told_of_the_second(1), 2, "those that do not have it");
    assert_eq!(told_of_the_second(2), 0, "it waits for company");
}
