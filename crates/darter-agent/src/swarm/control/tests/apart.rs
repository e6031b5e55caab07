//! Nodes that exchange pieces over TLS and nodes that do in plaintext, on one control plane; and the
//! tokens of the latter.

use darter_api::v1;

use super::odd::{Odd, frame, hello};
use super::*;
use crate::swarm::tokens::Tokens;

fn plain() -> Setup {
    Setup { is_plain: true, ..setup() }
}

#[tokio::test]
async fn each_kind_finds_its_own_through_the_other_and_only_that() {
    let mut tls = start(setup(), &[]).await;
    let through = [tls.control.address()];
    let mut first = start(plain(), &through).await;
    let mut second = start(plain(), &through).await;
    let both = [first.control.me(), second.control.me()];
    first.sees(both).await;
    second.sees(both).await;
    for node in [&first, &second] {
        let standing = node.stands(|s| s.apart == 1).await;
        assert_eq!((standing.peers, node.rejected("tls")), (1, 1), "{standing:?}");
        assert!(node.control.member(tls.control.me()).is_none(), "a member it would be fetched from");
        assert!(!node.control.is_trusted(tls.control.me()), "nobody of this swarm has a word of it");
    }
    let standing = tls.stands(|s| s.apart == 2).await;
    assert_eq!((standing.peers, tls.rejected("tls")), (0, 2), "{standing:?}");
    assert!(matches!(tls.next().await, ControlEvent::Members(members) if members.len() == 1));
}

#[tokio::test]
async fn a_node_that_changes_over_is_a_member_at_once() {
    let mut one = start(plain(), &[]).await;
    let other = start(setup(), &[one.control.address()]).await;
    one.stands(|s| s.apart == 1).await;
    other.kill().await;
    let other = start(plain(), &[one.control.address()]).await;
    one.sees([one.control.me(), other.control.me()]).await;
    assert_eq!(one.stands(|s| s.connections == 1).await.apart, 0);
}

#[tokio::test]
async fn what_a_node_of_the_other_kind_says_is_not_heard() {
    let mut node = start(plain(), &[]).await;
    let mut odd = Odd::new(&node);
    odd.says(&hello()).await;
    node.stands(|standing| standing.apart == 1).await;
    // An older version does not know that there are two kinds, and takes this node for a member.
    let message = crate::swarm::wire::encode(&blob(1), &Message::Holds { size: 42 }).unwrap();
    let asks = crate::swarm::wire::encode_wanted(&blob(1)).kind.unwrap();
    let words = [frame(v1::frame::Kind::Message(message)), frame(asks)].concat();
    // The last word ends the connection: all before it was read then.
    odd.says_more(&[words, vec![255; 8]].concat()).await;
    odd.is_cut_off().await;
    assert_eq!((node.rejected("tls"), node.rejected("bad_frame")), (1, 1));
    node.stands(|standing| standing.connections == 0).await;
    assert!(matches!(node.next().await, ControlEvent::Members(members) if members.len() == 1));
    assert!(node.events.try_recv().is_err(), "it was heard");
}

/// Does with tokens what the agent's loop does, and counts the questions.
fn answer(mut node: Node, tokens: Arc<Tokens>) -> watch::Receiver<usize> {
    let (asked, count) = watch::channel(0);
    tokio::spawn(async move {
        while let Some(event) = node.events.recv().await {
            match event {
                ControlEvent::TokenWanted { from, blob, .. } => {
                    asked.send_modify(|count| *count += 1);
                    tokens.wanted(from, blob);
                }
                ControlEvent::Token { from, blob, token, .. } => tokens.came(from, blob, token),
                _ => {}
            }
        }
    });
    count
}

async fn two() -> (Node, Node) {
    let mut asks = start(plain(), &[]).await;
    let mut gives = start(plain(), &[asks.control.address()]).await;
    let both = [asks.control.me(), gives.control.me()];
    asks.sees(both).await;
    gives.sees(both).await;
    (asks, gives)
}

#[tokio::test]
async fn many_requests_cost_one_question_and_the_token_is_for_who_asked() {
    let (asks, gives) = two().await;
    let (me, it) = (asks.control.me(), gives.control.me());
    let theirs = Arc::new(Tokens::new(gives.control.clone()).unwrap());
    let ours = Arc::new(Tokens::new(asks.control.clone()).unwrap());
    let asked = answer(gives, theirs.clone());
    answer(asks, ours.clone());
    let got = futures_util::future::join_all((0..50).map(|_| ours.get(it, blob(1)))).await;
    let token = got[0].expect("a token");
    assert!(got.iter().all(|other| *other == Some(token)));
    assert_eq!(ours.get(it, blob(1)).await, Some(token));
    // A machine that stands still for a moment may have lost one, as far as this node can tell.
    assert!(*asked.borrow() < 5, "{} questions", *asked.borrow());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let local = [127, 0, 0, 1].into();
    assert_eq!(token.check(theirs.secret(), &blob(1), local, now), Ok(me));
    assert!(token.check(ours.secret(), &blob(1), local, now).is_err(), "two nodes with one secret");
    // A peer that does not take it, or that was gone, is asked again.
    for forget in [|ours: &Tokens, it| ours.refused(it, blob(1)), |ours: &Tokens, it| ours.lost(it)] {
        let before = *asked.borrow();
        forget(&ours, it);
        assert!(ours.get(it, blob(1)).await.is_some());
        assert!(*asked.borrow() > before);
    }
}

#[tokio::test]
async fn a_peer_that_gives_no_token_is_asked_again_and_then_given_up() {
    let (asks, mut gives) = two().await;
    let it = gives.control.me();
    let ours = Tokens::new(asks.control.clone()).unwrap();
    let began = Instant::now();
    assert_eq!(ours.get(it, blob(1)).await, None);
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    let mut questions = 0;
    while let Ok(event) = gives.events.try_recv() {
        questions += usize::from(matches!(event, ControlEvent::TokenWanted { .. }));
    }
    assert!((2..=10).contains(&questions), "{questions} questions");
}
