//! What the loop does with what it hears, with nobody at the other ends but the test.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::clock::Clock;
use crate::config::Layers;
use crate::fleet::{Claim, Demand, Fleet, NodeFact, Outcome, PodFact, Target};
use crate::hub::Lead;
use crate::metrics::{ActionLabels, Metrics};

const CONFIG: &str = "[kubernetes]\nenabled = true\n[actuators]\nkeda = 'on'\ndeletion_cost = 'on'\nbuffer = 'on'\n\
                      [[pools]]\nname = 'l4'\ngpus = 1\nnodes_most = 9\nbuffer_least = 1\n\
                      [[workloads]]\nname = 'a/b'\nmost = 5\n";

struct Loop {
    hub: Arc<Hub>,
    facts: mpsc::Sender<Fact>,
    acts: mpsc::Receiver<Act>,
    done: mpsc::Sender<Done>,
    stop: CancellationToken,
}

/// One that runs, and leads while this is so.
fn start(config: &str, leads: Arc<AtomicBool>) -> Loop {
    let config = Layers::text("f".as_ref(), config.to_owned()).unwrap().config().unwrap();
    let clock = Clock::start();
    let lead = Lead::by(move || leads.load(Ordering::Relaxed));
    let fleet = Fleet::new(config.fleet(), clock.now());
    let metrics = Metrics::new("test", "test", |_| ());
    let hub = Arc::new(Hub::new(fleet, clock, config.policy.clone(), config.actuators.clone(), lead, metrics));
    let ((facts, from_facts), (to_acts, acts), (done, from_done)) =
        (mpsc::channel(8), mpsc::channel(8), mpsc::channel(8));
    let controller = Controller::new(hub.clone(), from_facts, (Some(to_acts), from_done), None);
    let stop = CancellationToken::new();
    tokio::spawn(controller.run(stop.clone()));
    Loop { hub, facts, acts, done, stop }
}

impl Loop {
    fn counted(&self, actuator: &'static str, outcome: Outcome) -> u64 {
        let labels = ActionLabels { actuator, outcome: outcome.as_str() };
        self.hub.metrics.actions.get_or_create(&labels).get()
    }

    /// The next act; none within a minute never comes.
    async fn act(&mut self) -> Act {
        tokio::time::timeout(Duration::from_secs(60), self.acts.recv()).await.expect("nothing is done").expect("an act")
    }

    /// Says it, and waits for a decision on it.
    async fn says(&self, fact: Fact) {
        let mut newest = self.hub.newest.subscribe();
        newest.mark_unchanged();
        self.facts.send(fact).await.unwrap();
        newest.changed().await.unwrap();
    }
}

fn node() -> NodeFact {
    let claim = Some(Claim { name: "claim-1".to_owned(), uid: "c1".to_owned() });
    let (uid, name, pool) = ("n1".to_owned(), "gpu-1".to_owned(), Some("l4".to_owned()));
    NodeFact { uid, name, pool, claim, registered: true, gpus: 1, ..NodeFact::default() }
}

#[tokio::test]
async fn an_act_at_kubernetes_is_counted_when_it_is_done_and_decided_again_when_it_failed() {
    let mut run = start(CONFIG, Arc::new(AtomicBool::new(true)));
    run.says(Fact::Node(node())).await;
    let act = run.act().await;
    assert_eq!(act.action, Action::Buffer { pool: "l4".to_owned(), gpus: 1 });
    assert_eq!(act.target, Target::Pool { name: "l4".to_owned() });
    assert!(act.reason.starts_with("pool l4 raised from 0 to 1 spare GPU: "), "{}", act.reason);
    assert_eq!(run.counted("buffer", Outcome::Done), 0, "it is not done yet");
    run.done.send(Done { action: act.action.clone(), outcome: Outcome::Failed }).await.unwrap();
    let again = run.act().await;
    assert_eq!((again.action == act.action, run.counted("buffer", Outcome::Failed)), (true, 1));
    run.done.send(Done { action: again.action, outcome: Outcome::Done }).await.unwrap();
    // In order: this is heard after it.
    run.says(Fact::Pod(PodFact { uid: "p".to_owned(), gpus: 1, ..PodFact::default() })).await;
    run.says(Fact::NodeGone { uid: "n1".to_owned() }).await;
    assert_eq!(run.counted("buffer", Outcome::Done), 1);
    assert!(run.acts.try_recv().is_err(), "what is done is not asked for again");
    run.stop.cancel();
}

#[tokio::test]
async fn who_does_not_lead_decides_and_does_nothing() {
    let leads = Arc::new(AtomicBool::new(false));
    let mut run = start(CONFIG, leads.clone());
    run.says(Fact::Node(node())).await;
    let demand = Demand { backlog_milli: 3000, age_ms: 0, ttl_ms: 60_000 };
    run.hub.fleet().demand("a/b", demand, run.hub.clock.now()).unwrap();
    run.says(Fact::Only { kind: crate::fleet::Kind::Pod, uids: std::collections::BTreeSet::new() }).await;
    let moment = run.hub.newest.borrow().clone();
    assert!(!moment.decision.actions.is_empty(), "it knows what it would do");
    assert!(run.acts.try_recv().is_err());
    assert!(run.hub.fleet().answer("a/b", run.hub.clock.now()).is_err());
    assert!(run.hub.history(0).is_empty());
    leads.store(true, Ordering::Relaxed);
    run.hub.bell.ring(SOON);
    run.act().await;
    assert_eq!(run.hub.fleet().answer("a/b", run.hub.clock.now()), Ok(3));
    run.stop.cancel();
}

#[tokio::test]
async fn an_actuator_that_observes_counts_once_and_one_that_is_off_not_at_all() {
    let config = CONFIG.replace("keda = 'on'", "keda = 'off'").replace("buffer = 'on'", "buffer = 'observe'");
    let mut run = start(&config, Arc::new(AtomicBool::new(true)));
    let demand = Demand { backlog_milli: 3000, age_ms: 0, ttl_ms: 60_000 };
    run.hub.fleet().demand("a/b", demand, run.hub.clock.now()).unwrap();
    run.says(Fact::Node(node())).await;
    run.says(Fact::Node(NodeFact { gpus: 2, ..node() })).await;
    run.says(Fact::Node(NodeFact { gpus: 3, ..node() })).await;
    assert_eq!(run.counted("buffer", Outcome::Observed), 1);
    assert!(run.acts.try_recv().is_err());
    assert_eq!([Outcome::Done, Outcome::Observed].map(|outcome| run.counted("keda", outcome)), [0, 0]);
    run.stop.cancel();
}
