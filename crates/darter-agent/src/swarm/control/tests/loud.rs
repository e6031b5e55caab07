//! Peers that say much: each waits for itself, and does not make the others wait.

use darter_api::v1::frame::Kind;
use darter_core::Reference;
use darter_core::stale::Question;
use darter_core::swarm::token::{Secret, Token};
use futures_util::future::join;

use super::odd::{Odd, frame, hello};
use super::witnesses::place;
use super::*;
use crate::swarm::control::driver::REPORTS;
use crate::swarm::control::session::{Report, Reports, read};
use crate::swarm::wire;

#[tokio::test]
async fn who_says_much_does_not_make_the_others_wait() {
    let mut a = start(setup(), &[]).await;
    let seed = [a.control.address()];
    let (mut loud, mut other) = (start(setup(), &seed).await, start(setup(), &seed).await);
    let all = [a.control.me(), loud.control.me(), other.control.me()];
    for node in [&mut a, &mut loud, &mut other] {
        node.sees(all).await;
    }
    for n in 0..200 {
        loud.control.send(all[0], blob(1), Message::Holds { size: n });
    }
    // None of them is handled: each keeps its turn.
    let mut waiting = Vec::new();
    while waiting.len() < session::TURNS {
        waiting.push(a.next().await);
    }
    other.control.send(all[0], blob(2), Message::Slot);
    let next = a.next().await;
    assert!(matches!(&next, ControlEvent::Message { from, .. } if *from == all[2]), "{next:?}");
    waiting.clear();
    let next = a.next().await;
    let wanted = session::TURNS as u64;
    assert!(
        matches!(&next, ControlEvent::Message { message: Message::Holds { size }, .. } if *size == wanted),
        "{next:?}"
    );
}

/// Words of every kind that reaches the rest of the agent.
fn words() -> Vec<Kind> {
    let now = Duration::from_secs(1);
    let token = Token::new(&Secret([1; 32]), PeerId::from_bytes([9; 32]), &blob(1), [10, 0, 0, 1].into(), now);
    let question = Question { number: 7, place: place(), reference: Reference::Tag("v1".parse().unwrap()) };
    vec![
        Kind::Message(wire::encode(&blob(1), &Message::Slot).unwrap()),
        wire::encode_wanted(&blob(1)).kind.unwrap(),
        wire::encode_token(&blob(1), &token).kind.unwrap(),
        wire::encode_question(&question).kind.unwrap(),
        wire::encode_seen(7, None).unwrap().kind.unwrap(),
    ]
}

fn says_who(event: &ControlEvent) -> Option<PeerId> {
    match event {
        ControlEvent::Message { from, .. }
        | ControlEvent::TokenWanted { from, .. }
        | ControlEvent::Token { from, .. }
        | ControlEvent::SeenWanted { from, .. }
        | ControlEvent::Seen { from, .. } => Some(*from),
        ControlEvent::Members(_) | ControlEvent::Lost(_) => None,
    }
}

#[tokio::test]
async fn whatever_is_said_takes_its_turn() {
    for word in words() {
        let mut a = start(setup(), &[]).await;
        let mut other = start(setup(), &[a.control.address()]).await;
        let mut loud = Odd::new(&a);
        // More than all queues of the node hold.
        let flood: Vec<u8> = std::iter::repeat_n(frame(word.clone()), 2 * EVENTS).flatten().collect();
        loud.says(&hello()).await;
        let all = [a.control.me(), other.control.me(), loud.id()];
        a.sees(all).await;
        other.sees(all[..2].iter().copied()).await;
        let heard = async {
            // None of them is handled: each keeps its turn.
            let mut waiting = Vec::new();
            while waiting.len() < session::TURNS {
                waiting.push(a.next().await);
            }
            assert!(waiting.iter().all(|event| says_who(event) == Some(all[2])), "{waiting:?}");
            // Long enough for more of it to be read, if it were.
            tokio::time::sleep(Duration::from_millis(50)).await;
            other.control.send(all[0], blob(2), Message::Slot);
            let next = a.next().await;
            assert_eq!(says_who(&next), Some(all[1]), "{word:?}: {next:?}");
            waiting.clear();
            let next = a.next().await;
            assert_eq!(says_who(&next), Some(all[2]), "{word:?}: {next:?}");
        };
        tokio::select! {
            () = heard => {}
            () = loud.floods(&flood) => {}
        }
    }
}

/// A connection on loopback: the end that speaks, and the end that a reader of this node has.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (speaks, hears) = join(TcpStream::connect(listener.local_addr().unwrap()), listener.accept()).await;
    (speaks.unwrap(), hears.unwrap().0)
}

#[tokio::test]
async fn lists_of_addresses_do_not_keep_hellos_waiting() {
    let (to, mut reports) = mpsc::channel(REPORTS);
    let (events, _heard) = mpsc::channel(EVENTS);
    let mut speakers = Vec::new();
    let list = wire::encode_peers(vec!["10.0.0.1:4002".parse().unwrap()]).kind.unwrap();
    let lists: Vec<u8> = std::iter::repeat_n(frame(list), 2 * REPORTS).flatten().collect();
    let mut next = async || tokio::time::timeout(PATIENCE, reports.recv()).await.expect("a report").unwrap();
    let mut turns = Vec::new();
    for (n, words) in [(0, [hello(), lists].concat()), (1, hello())] {
        let (mut speaks, hears) = pair().await;
        let reports = Reports { connection: libp2p::swarm::ConnectionId::new_unchecked(n), to: to.clone() };
        let peer = PeerId::from_bytes([7; 32]);
        tokio::spawn(read(libp2p::tcp::tokio::TcpStream(hears), peer, false, events.clone(), reports));
        speaks.write_all(&words).await.unwrap();
        speakers.push(speaks);
        let (from, report) = next().await;
        assert!(from.to_string() == n.to_string() && matches!(report, Report::Hello(_)), "{n}: {from}: {report:?}");
        if n == 0 {
            turns.push(next().await);
            assert!(matches!(turns[0].1, Report::Peers(..)), "{turns:?}");
            // Long enough for the rest to be read, if it were.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    turns.clear();
    assert!(matches!(next().await.1, Report::Peers(..)), "it goes on where it stopped");
}
