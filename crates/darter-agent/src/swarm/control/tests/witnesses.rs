//! Members that are asked what they saw at a registry: those that know, those that do not, and those that
//! say nothing, or are of a version that would not understand.

use darter_core::access::{CredentialKey, Limits, Place, Proofs};
use darter_core::stale::{Question, Seen, SeenTags};
use darter_core::{Reference, Tag};

use super::odd::{Odd, hello_with};
use super::*;
use crate::images::Memory;
use crate::swarm::wire::{FEATURES, SEES};
use crate::swarm::witnesses::{Heard, Witnesses};

pub(super) fn place() -> Place {
    Place { registry: "reg.example".parse().unwrap(), repository: "team/app".parse().unwrap() }
}

fn tag(name: &str) -> Reference {
    Reference::Tag(name.parse().unwrap())
}

fn seen() -> Seen {
    Seen { digest: blob(7), size: Some(700) }
}

fn elsewhere() -> Place {
    Place { registry: "other.example".parse().unwrap(), ..place() }
}

/// A node that saw the tag v1, and whose word on one of the two registries others may have.
fn memory() -> Memory {
    let hour = Duration::from_secs(3600);
    let (loan, many) = (hour, 9);
    let (loans, words, places, digests) = (many, many, many, many);
    let limits = Limits { fresh: hour, stale: hour, loan, proofs: many, loans, words, places, digests };
    let mut tags = SeenTags::new(hour, many);
    let mut proofs = Proofs::new(limits);
    for place in [place(), elsewhere()] {
        tags.saw(Instant::now(), (place.clone(), "v1".parse::<Tag>().unwrap(), CredentialKey([0; 32])), seen());
        proofs.saw(Instant::now(), &place, seen().digest, seen().size);
    }
    Memory::of(place().registry, tags, proofs)
}

/// Does with questions and answers what the agent's loop does.
fn take_part(mut node: Node) -> (Arc<Witnesses>, ControlHandle, Arc<Metrics>) {
    let witnesses = Arc::new(Witnesses::new(node.control.clone(), node.metrics.clone()));
    let (heard, control, metrics) = (witnesses.clone(), node.control.clone(), node.metrics.clone());
    tokio::spawn(async move {
        while let Some(event) = node.events.recv().await {
            match event {
                ControlEvent::SeenWanted { from, question, .. } => heard.wanted(from, &question),
                ControlEvent::Seen { from, number, seen, .. } => heard.came(from, number, seen),
                ControlEvent::Lost(peer) => heard.lost(peer),
                _ => {}
            }
        }
    });
    (witnesses, control, metrics)
}

async fn two() -> [(Arc<Witnesses>, ControlHandle, Arc<Metrics>); 2] {
    let mut one = start(setup(), &[]).await;
    let mut other = start(setup(), &[one.control.address()]).await;
    let both = [one.control.me(), other.control.me()];
    one.sees(both).await;
    other.sees(both).await;
    [take_part(one), take_part(other)]
}

#[tokio::test]
async fn a_member_tells_what_it_saw_and_that_it_saw_nothing() {
    let [(one, ..), (other, ..)] = two().await;
    let nothing = Heard { asked: 1, answered: 1, said: Vec::new() };
    assert_eq!(one.ask(&place(), &tag("v1")).await, nothing, "it does not know yet what it saw");
    other.answer_from(memory());
    let known = Heard { said: vec![([127, 0, 0, 1].into(), seen())], ..Heard { asked: 1, answered: 1, said: vec![] } };
    assert_eq!(one.ask(&place(), &tag("v1")).await, known);
    assert_eq!(one.ask(&place(), &tag("v2")).await, nothing);
    assert_eq!(one.ask(&place(), &Reference::Digest(seen().digest)).await, known);
    assert_eq!(one.ask(&place(), &Reference::Digest(blob(8))).await, nothing);
    for reference in [tag("v1"), Reference::Digest(seen().digest)] {
        assert_eq!(one.ask(&elsewhere(), &reference).await, nothing, "of a registry that does not say cluster");
    }
}

#[tokio::test]
async fn who_would_not_understand_is_not_asked_and_who_is_silent_is_waited_for_only_for_a_moment() {
    let node = start(setup(), &[]).await;
    let (mut old, mut silent) = (Odd::new(&node), Odd::new(&node));
    old.says(&hello_with(FEATURES & !SEES)).await;
    node.stands(|standing| standing.peers == 1).await;
    let standing = node.control.standing();
    let (witnesses, ..) = take_part(node);
    assert_eq!(witnesses.ask(&place(), &tag("v1")).await, Heard::default());
    silent.says(&hello_with(SEES)).await;
    let mut standing = standing;
    tokio::time::timeout(PATIENCE, standing.wait_for(|standing| standing.peers == 2)).await.unwrap().unwrap();
    let began = Instant::now();
    let heard = witnesses.ask(&place(), &tag("v1")).await;
    assert_eq!(heard, Heard { asked: 1, answered: 0, said: Vec::new() });
    assert!(began.elapsed() >= Duration::from_millis(900) && began.elapsed() < PATIENCE / 2, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_member_that_goes_is_not_waited_for() {
    let node = start(setup(), &[]).await;
    let mut silent = Odd::new(&node);
    silent.says(&hello_with(SEES)).await;
    node.stands(|standing| standing.peers == 1).await;
    let (witnesses, control, _) = take_part(node);
    let (place, tag) = (place(), tag("v1"));
    let asking = witnesses.ask(&place, &tag);
    tokio::pin!(asking);
    assert!(futures_util::poll!(&mut asking).is_pending(), "it is asked");
    control.all_that_can(SEES).iter().for_each(|(peer, _)| witnesses.lost(*peer));
    let heard = Heard { asked: 1, answered: 0, said: Vec::new() };
    assert_eq!(futures_util::poll!(&mut asking), std::task::Poll::Ready(heard), "at once");
}

#[tokio::test]
async fn a_flood_of_questions_is_not_answered_and_keeps_nobody_else_from_an_answer() {
    let [(_, flood, _), (victim, control, metrics)] = two().await;
    victim.answer_from(memory());
    for number in 0..200 {
        flood.want_seen(control.me(), Question { number, place: place(), reference: tag("v1") });
    }
    let rejected = || metrics.peer_rejected.get_or_create(&ReasonLabels { reason: "questions" }).get();
    let counted = async {
        while rejected() < 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.unwrap_or_else(|_| panic!("{} rejected", rejected()));
    let third = start(setup(), &[control.address()]).await;
    third.stands(|standing| standing.peers >= 1).await;
    let (third, ..) = take_part(third);
    let heard = third.ask(&place(), &tag("v1")).await;
    assert!(heard.said.contains(&([127, 0, 0, 1].into(), seen())), "{heard:?}");
    assert_eq!(metrics.swarm_peers.get(), 2, "a flood is no reason for a ban");
}

#[tokio::test]
async fn an_answer_counts_once_and_only_of_who_was_asked() {
    let [(one, ..), (other, control, _)] = two().await;
    other.answer_from(memory());
    // Nobody was asked yet, and this number is the next.
    let lie = Some(Seen { digest: blob(8), size: None });
    one.came(control.me(), 1, lie);
    let (place, tag) = (place(), tag("v1"));
    let asking = one.ask(&place, &tag);
    tokio::pin!(asking);
    assert!(futures_util::poll!(&mut asking).is_pending(), "it is asked");
    one.came(PeerId::from_bytes([9; 32]), 1, lie);
    one.came(control.me(), 2, lie);
    assert_eq!(asking.await.said, [([127, 0, 0, 1].into(), seen())]);
}
