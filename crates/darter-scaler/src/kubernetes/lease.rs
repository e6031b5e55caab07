//! The Lease at the API server: read, taken, renewed and given back as the [`Elector`] says.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::leader::{Elector, Lead, Record, Step, Times};
use super::metrics::Metrics;
use super::moment::Moment;
use darter_base::kubernetes::{Teller, refusal};

/// What the service account has to be allowed.
const RIGHTS: &str =
    "a Role in its namespace that lets it create leases (coordination.k8s.io), and get and update its own";

/// Keeps asking for one Lease.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    /// The Lease's name.
    name: String,
    elector: Elector,
    times: Times,
    /// As it was read or written last. It is written over this, and over nothing else.
    known: Option<Lease>,
    leads: watch::Sender<bool>,
    /// Whom the log named last.
    named: Option<String>,
}

/// What came of one request.
enum Came {
    Read(Option<Lease>),
    Written { lease: Lease, sent: Moment, transitions: u32 },
    Conflict,
    Failed(&'static str, String),
}

impl Election {
    /// For the Lease `name` in the client's namespace. Nobody was asked yet.
    ///
    /// `identity` is what others see; a name of this life is made of it, so that a scaler that starts again does
    /// not take its earlier life's lease for its own while that may still act.
    pub fn new(client: Client, name: &str, identity: &str, times: Times) -> Self {
        let namespace = client.default_namespace().to_owned();
        let elector = Elector::new(&format!("{identity}_{}", life()), times);
        Self {
            api: Api::namespaced(client, &namespace),
            name: name.to_owned(),
            elector,
            times,
            known: None,
            leads: watch::Sender::new(false),
            named: None,
        }
    }

    /// What acts are asked by.
    pub fn lead(&self) -> Lead {
        self.elector.lead()
    }

    /// Hears when this one begins or ceases to lead: for readiness and for the log. Acts ask [`Lead`].
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Wants to lead until `stop`, and then gives back what it holds, so that another begins at once. Stop it
    /// last: whoever acts has to have ended before.
    pub async fn run(mut self, metrics: &Metrics, stop: CancellationToken) {
        let trouble = format!("cannot ask for the Lease {}: this scaler does not lead, and acts on nothing", self.name);
        let mut teller = Teller::new(trouble, &metrics.lease_errors);
        stop.run_until_cancelled(self.want(&mut teller)).await;
        self.give_back().await;
        self.show();
    }

    /// Never ends.
    async fn want(&mut self, teller: &mut Teller<'_>) {
        loop {
            let step = self.elector.step();
            let came = self.ask(step).await;
            let step = self.learn(came, teller);
            self.show();
            self.name_the_leader();
            if let Step::Wait(time) = step {
                self.until_it_ends(tokio::time::sleep(time)).await;
            }
        }
    }

    /// Asks the API server, and meanwhile sees whether the lease runs out.
    async fn ask(&mut self, step: Step) -> Came {
        let (api, name, sent) = (self.api.clone(), self.name.clone(), Moment::now());
        let lease = self.lease(&step);
        let ask = async move {
            match step {
                Step::Read | Step::Wait(_) => api.get_opt(&name).await.map(Came::Read),
                Step::Create => {
                    let made = api.create(&PostParams::default(), &lease).await;
                    made.map(|lease| Came::Written { lease, sent, transitions: 0 })
                }
                Step::Take { transitions, .. } => {
                    let written = api.replace(&name, &PostParams::default(), &lease).await;
                    written.map(|lease| Came::Written { lease, sent, transitions })
                }
            }
        };
        let within = self.times.write_within();
        let came = self.until_it_ends(tokio::time::timeout(within, ask)).await;
        match came {
            Ok(Ok(came)) => came,
            // 404: somebody removed it between.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Came::Conflict,
            Ok(Err(error)) => {
                let (reason, text) = refusal(&error, RIGHTS).unwrap_or_else(|| ("answer", error.to_string()));
                Came::Failed(reason, text)
            }
            Err(_) => Came::Failed("unreachable", format!("no answer within {within:?}")),
        }
    }

    /// What is waited for, while it is seen whether the lease runs out.
    async fn until_it_ends<T>(&self, wait: impl Future<Output = T>) -> T {
        let ends = async {
            match self.elector.lead().until() {
                // The sleep may be woken a moment too early, or long after: the clock decides.
                Some(until) => loop {
                    let left = until.since(Moment::now());
                    if left.is_zero() {
                        break;
                    }
                    tokio::time::sleep(left).await;
                },
                None => std::future::pending().await,
            }
        };
        tokio::pin!(wait);
        tokio::select! {
            biased;
            came = &mut wait => return came,
            () = ends => self.show(),
        }
        wait.await
    }

    fn learn(&mut self, came: Came, teller: &mut Teller<'_>) -> Step {
        if !matches!(came, Came::Failed(..)) {
            teller.works();
        }
        match came {
            Came::Read(lease) => {
                let record = lease.as_ref().map(record);
                self.known = lease;
                self.elector.read(Moment::now(), record)
            }
            Came::Written { lease, sent, transitions } => {
                self.known = Some(lease);
                self.elector.written(sent, transitions)
            }
            // Read again at once, but not without a pause if that goes on.
            Came::Conflict => match self.elector.conflicted() {
                Step::Read => Step::Wait(CONFLICT_PAUSE),
                step => step,
            },
            Came::Failed(reason, text) => {
                teller.fails(reason, &text);
                self.elector.failed()
            }
        }
    }

    /// The Lease as ours.
    fn lease(&self, step: &Step) -> Lease {
        let now = MicroTime(Timestamp::now());
        let mut lease = self.known.clone().unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
            ..Lease::default()
        });
        let (is_new, transitions) = match step {
            Step::Take { transitions, is_new } => (*is_new, *transitions),
            _ => (true, 0),
        };
        let before = lease.spec.take().unwrap_or_default();
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.elector.identity().to_owned()),
            lease_duration_seconds: Some(i32::try_from(self.times.lease.as_secs()).unwrap_or(i32::MAX)),
            lease_transitions: Some(i32::try_from(transitions).unwrap_or(i32::MAX)),
            acquire_time: if is_new { Some(now.clone()) } else { before.acquire_time.clone() },
            renew_time: Some(now),
            ..before
        });
        lease
    }

    async fn give_back(&mut self) {
        if !self.elector.leave() {
            return;
        }
        let Some(mut lease) = self.known.take() else { return };
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(String::new());
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        let params = PostParams::default();
        let replace = self.api.replace(&self.name, &params, &lease);
        match tokio::time::timeout(self.times.write_within(), replace).await {
            Ok(Ok(_)) => info!(lease = self.name, "gave the lease back"),
            // The next one waits for its end instead.
            Ok(Err(error)) => warn!(lease = self.name, error = %error, "cannot give the lease back; it runs out"),
            Err(_) => warn!(lease = self.name, "cannot give the lease back; it runs out"),
        }
    }

    fn show(&self) {
        let leads = self.elector.lead().holds_now();
        let changed = self.leads.send_if_modified(|told| std::mem::replace(told, leads) != leads);
        match changed {
            true if leads => info!(lease = self.name, identity = self.elector.identity(), "leading"),
            true => warn!(lease = self.name, identity = self.elector.identity(), "not leading any more"),
            false => {}
        }
    }

    fn name_the_leader(&mut self) {
        let leader = self.elector.leader();
        if leader.is_some() && leader != self.named.as_deref() {
            let is_other = leader != Some(self.elector.identity());
            if let (true, Some(leader)) = (is_other, leader) {
                info!(lease = self.name, leader, "another scaler leads");
            }
            self.named = leader.map(ToOwned::to_owned);
        }
    }
}

/// Between a write that somebody else was quicker with, and the next look.
const CONFLICT_PAUSE: Duration = Duration::from_millis(100);

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let count = |number: Option<i32>| number.and_then(|number| u32::try_from(number).ok()).unwrap_or(0);
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        lease: Duration::from_secs(count(spec.lease_duration_seconds).into()),
        renewed: spec.renew_time.map(|time| time.0.to_string()).unwrap_or_default(),
        transitions: count(spec.lease_transitions),
    }
}

/// A word that no other life of this scaler has.
fn life() -> String {
    let mut bytes = [0; 8];
    // Without random bytes, the moment: two lives of one name do not start in the same microsecond.
    if rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).is_err() {
        bytes = u64::try_from(Moment::now().0.as_micros()).unwrap_or(u64::MAX).to_be_bytes();
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
