//! Who is next at a registry: what somebody reads before what is fetched ahead.
//!
//! Of the blobs that are read each has one connection before any has its second, so that all of them go on;
//! where there are more of them than connections, they change places with every range. What is fetched ahead
//! gets what they leave, one blob after the other in the order of their turns: whoever begins to read one of
//! them finds it far on rather than all of them begun. Waiting has no end here, because every body has one
//! (`origin.stall`), and whoever asks has its own patience; what it waits behind is told to its [`Activity`].

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

use crate::activity::Activity;

/// The place of one blob in the order of all. Cheap to clone: its requests share it.
#[derive(Debug, Clone)]
pub struct Claim(Arc<Standing>);

#[derive(Debug)]
struct Standing {
    turn: u64,
    readers: AtomicUsize,
    /// Somebody began to read it.
    is_read: Notify,
    activity: Activity,
    /// Changed under the lock of the line, as the two below.
    held: AtomicUsize,
    waiting: AtomicUsize,
    /// The number of its last slot; 0 before its first.
    served: AtomicU64,
}

impl Claim {
    /// Of a blob that came as this one of all, and is waited for by this.
    pub fn new(turn: u64, activity: Activity) -> Self {
        let count = AtomicUsize::default;
        let (readers, held, waiting, served) = (count(), count(), count(), AtomicU64::new(0));
        Self(Arc::new(Standing { turn, readers, is_read: Notify::new(), activity, held, waiting, served }))
    }

    /// Of a single request that somebody waits for.
    pub(super) fn once() -> Self {
        let claim = Self::new(0, Activity::default());
        claim.begin_to_read();
        claim
    }

    /// One more reads it.
    pub fn begin_to_read(&self) {
        if self.0.readers.fetch_add(1, Ordering::Relaxed) == 0 {
            self.0.is_read.notify_waiters();
        }
    }

    /// One of those does no more.
    pub fn end_reading(&self) {
        self.0.readers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Where a request for the byte `at` stands: lowest first.
    fn rank(&self, at: u64) -> (bool, usize, u64, u64, u64) {
        let Standing { turn, readers, held, served, .. } = &*self.0;
        if readers.load(Ordering::Relaxed) == 0 {
            return (true, 0, 0, *turn, at);
        }
        let held = held.load(Ordering::Relaxed);
        // Whoever waits with nothing in hand comes before those that had a slot since.
        let served = if held == 0 { served.load(Ordering::Relaxed) } else { 0 };
        (false, held, served, *turn, at)
    }

    /// Whether somebody reads it now.
    pub fn is_read(&self) -> bool {
        self.0.readers.load(Ordering::Relaxed) > 0
    }
}

/// The connections to one registry, and who waits for one.
#[derive(Debug)]
pub(super) struct Line {
    queue: Mutex<Queue>,
    /// Slots that what is fetched ahead leaves free, for what somebody begins to read.
    kept: usize,
    /// When bytes of any body came last, and how often they did.
    activity: Activity,
    arrivals: AtomicU64,
}

#[derive(Debug)]
struct Queue {
    free: usize,
    /// As many as there are pulls times ranges, and requests of the mirror.
    waiting: Vec<Waiter>,
    /// Waiters there ever were, and slots that were ever given.
    count: u64,
}

#[derive(Debug)]
struct Waiter {
    claim: Claim,
    at: u64,
    number: u64,
    /// `arrivals` when it came.
    seen: u64,
    give: oneshot::Sender<Slot>,
}

impl Line {
    pub(super) fn new(connections: usize) -> Arc<Self> {
        Self::with(connections, Activity::default())
    }

    fn with(connections: usize, activity: Activity) -> Arc<Self> {
        let queue = Mutex::new(Queue { free: connections, waiting: Vec::new(), count: 0 });
        Arc::new(Self { queue, kept: connections / 4, activity, arrivals: AtomicU64::new(0) })
    }

    /// Waits for a slot, for a request of `claim` that begins at the byte `at`.
    pub(super) async fn take(self: &Arc<Self>, claim: &Claim, at: u64) -> Option<Slot> {
        let (give, mut slot) = oneshot::channel();
        let _place = self.enter(claim, at, give);
        loop {
            // Registered before the look: who begins to read it in between must not be missed.
            let is_read = claim.0.is_read.notified();
            self.serve();
            tokio::select! {
                // A waiter is only dropped with its place: there is always a slot in the end.
                slot = &mut slot => return slot.ok(),
                () = is_read => {}
            }
        }
    }

    fn enter(self: &Arc<Self>, claim: &Claim, at: u64, give: oneshot::Sender<Slot>) -> Place {
        let mut queue = self.queue();
        queue.count += 1;
        let (number, seen) = (queue.count, self.arrivals.load(Ordering::Relaxed));
        queue.waiting.push(Waiter { claim: claim.clone(), at, number, seen, give });
        claim.0.waiting.fetch_add(1, Ordering::Relaxed);
        self.tell(claim);
        Place { line: self.clone(), number }
    }

    /// Gives free slots to those who are next.
    fn serve(self: &Arc<Self>) {
        // Given outside of the lock: one that nobody takes any more comes back as it is dropped.
        while let Some((give, slot)) = self.next() {
            drop(give.send(slot));
        }
    }

    fn next(self: &Arc<Self>) -> Option<(oneshot::Sender<Slot>, Slot)> {
        let mut queue = self.queue();
        let ranks = queue.waiting.iter().enumerate();
        let (first, _) = ranks.min_by_key(|(_, waiter)| (waiter.claim.rank(waiter.at), waiter.number))?;
        let needs = if queue.waiting[first].claim.is_read() { 1 } else { self.kept + 1 };
        if queue.free < needs {
            return None;
        }
        let Waiter { claim, seen, give, .. } = queue.waiting.swap_remove(first);
        queue.free -= 1;
        queue.count += 1;
        claim.0.served.store(queue.count, Ordering::Relaxed);
        claim.0.waiting.fetch_sub(1, Ordering::Relaxed);
        claim.0.held.fetch_add(1, Ordering::Relaxed);
        self.tell(&claim);
        // Its patience begins now; not where nothing came for those before it either.
        if self.arrivals.load(Ordering::Relaxed) > seen {
            claim.0.activity.has_its_turn();
        }
        Some((give, Slot { line: self.clone(), claim }))
    }

    /// Tells a blob whether it waits behind others.
    fn tell(&self, claim: &Claim) {
        let Standing { held, waiting, activity, .. } = &*claim.0;
        let waits = held.load(Ordering::Relaxed) == 0 && waiting.load(Ordering::Relaxed) > 0;
        activity.waits_behind(waits.then_some(&self.activity));
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics under it; if something does, the numbers are still whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the line, until it has its slot or leaves.
struct Place {
    line: Arc<Line>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queue = self.line.queue();
        let place = queue.waiting.iter().position(|waiter| waiter.number == self.number);
        let Some(Waiter { claim, .. }) = place.map(|at| queue.waiting.swap_remove(at)) else { return };
        claim.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.line.tell(&claim);
    }
}

/// The right to one connection, for as long as it lives.
#[derive(Debug)]
pub(super) struct Slot {
    line: Arc<Line>,
    claim: Claim,
}

impl Slot {
    /// Bytes came over it.
    pub(super) fn came(&self) {
        self.line.arrivals.fetch_add(1, Ordering::Relaxed);
        self.line.activity.touch();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut queue = self.line.queue();
        queue.free += 1;
        self.claim.0.held.fetch_sub(1, Ordering::Relaxed);
        self.line.tell(&self.claim);
        drop(queue);
        self.line.serve();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn read(turn: u64) -> Claim {
        let claim = ahead(turn);
        claim.begin_to_read();
        claim
    }

    fn ahead(turn: u64) -> Claim {
        Claim::new(turn, Activity::default())
    }

    /// Somebody in the line. Dropped without a slot they leave it.
    struct Asker {
        slot: oneshot::Receiver<Slot>,
        _place: Place,
    }

    impl Asker {
        fn given(&mut self) -> Option<Slot> {
            self.slot.try_recv().ok()
        }
    }

    fn ask(line: &Arc<Line>, claim: &Claim, at: u64) -> Asker {
        let (give, slot) = oneshot::channel();
        let asker = Asker { slot, _place: line.enter(claim, at, give) };
        line.serve();
        asker
    }

    /// A line whose only connection is taken, and what gives it back.
    fn taken() -> (Arc<Line>, Slot) {
        let line = Line::new(1);
        let slot = ask(&line, &Claim::once(), 0).given().expect("it is free");
        (line, slot)
    }

    /// Gives `slot` back again and again, and says in which order these had it.
    fn order<const N: usize>(slot: Slot, mut askers: [Asker; N]) -> Vec<usize> {
        let (mut slot, mut order) = (Some(slot), Vec::new());
        while slot.take().is_some() {
            let next = askers.iter_mut().enumerate().find_map(|(who, asker)| Some((who, asker.given()?)));
            slot = next.map(|(who, given)| {
                order.push(who);
                given
            });
        }
        order
    }

    #[test]
    fn what_is_read_goes_before_what_is_fetched_ahead_and_both_in_the_order_of_their_turns() {
        let (line, slot) = taken();
        let askers = [ahead(2), read(4), ahead(1), read(3)].map(|claim| ask(&line, &claim, 0));
        assert_eq!(order(slot, askers), [3, 1, 2, 0]);
    }

    #[test]
    fn what_somebody_begins_to_read_while_it_waits_goes_before_the_rest() {
        let (line, slot) = taken();
        let claims = [ahead(1), ahead(2), ahead(3)];
        let askers = [0, 1, 2].map(|who: usize| ask(&line, &claims[who], 0));
        claims[2].begin_to_read();
        claims[1].begin_to_read();
        claims[1].end_reading();
        assert_eq!(order(slot, askers), [2, 0, 1]);
    }

    #[test]
    fn ranges_of_one_blob_go_in_its_order_whichever_asked_first() {
        for claim in [read(1), ahead(1)] {
            let (line, slot) = taken();
            let askers = [16, 0, 8].map(|at| ask(&line, &claim, at));
            assert_eq!(order(slot, askers), [1, 2, 0]);
        }
    }

    #[test]
    fn each_blob_that_is_read_has_one_connection_before_any_has_its_second() {
        let line = Line::new(3);
        let (first, second) = (read(1), read(2));
        let mut firsts = [0, 1, 2, 3, 4].map(|at| ask(&line, &first, at));
        let given = |askers: &mut [Asker]| askers.iter_mut().filter_map(Asker::given).collect::<Vec<_>>();
        let mut held = given(&mut firsts);
        assert_eq!(held.len(), 3, "there is nobody else");
        let mut seconds = [5, 6].map(|at| ask(&line, &second, at));
        held.truncate(1);
        // Each has one now, and the earlier one its second before the later one.
        let (more, others) = (given(&mut firsts), given(&mut seconds));
        assert_eq!((more.len(), others.len()), (1, 1));
    }

    #[test]
    fn more_blobs_than_connections_change_places_with_every_range() {
        let (line, slot) = taken();
        let claims = [read(1), read(2), read(3)];
        let mut askers = [0, 1, 2].map(|who: usize| ask(&line, &claims[who], 0));
        let (mut slot, mut had) = (Some(slot), Vec::new());
        for _ in 0..9 {
            drop(slot.take());
            let who = askers.iter_mut().position(|asker| {
                slot = asker.given();
                slot.is_some()
            });
            let who = who.expect("somebody is next");
            askers[who] = ask(&line, &claims[who], 0);
            had.push(who);
        }
        assert_eq!(had, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn what_is_fetched_ahead_leaves_a_quarter_free_for_what_somebody_begins_to_read() {
        let line = Line::new(4);
        let (early, late) = (ahead(1), ahead(2));
        let mut askers = [&early, &early, &early, &early, &late].map(|claim| ask(&line, claim, 0));
        let held: Vec<_> = askers.iter_mut().filter_map(Asker::given).collect();
        assert_eq!(held.len(), 3);
        assert!(askers[4].given().is_none());
        let mut reader = ask(&line, &read(3), 0);
        assert!(reader.given().is_some());
    }

    #[tokio::test]
    async fn what_is_fetched_ahead_has_a_free_connection_as_soon_as_somebody_reads_it() {
        let line = Line::new(4);
        let (other, claim) = (ahead(1), ahead(2));
        let _held = [line.take(&other, 0).await, line.take(&other, 0).await, line.take(&other, 0).await];
        let (begun, waits) = (claim.clone(), line.clone());
        let waiting = tokio::spawn(async move { waits.take(&begun, 0).await });
        while claim.0.waiting.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        claim.begin_to_read();
        let given = tokio::time::timeout(Duration::from_secs(30), waiting).await;
        assert!(given.expect("it has its slot").unwrap().is_some());
    }

    #[test]
    fn who_leaves_takes_no_connection_along() {
        let (line, slot) = taken();
        let (gone, claim) = (read(1), read(2));
        let left = ask(&line, &gone, 0);
        let mut given = ask(&line, &gone, 1);
        let mut last = ask(&line, &claim, 0);
        drop(left);
        drop(slot);
        assert!(last.given().is_none(), "the other request of that blob has it");
        // It was given, and is gone before it looks.
        given.slot.close();
        drop(given);
        assert!(last.given().is_some());
        assert_eq!(gone.0.waiting.load(Ordering::Relaxed) + gone.0.held.load(Ordering::Relaxed), 0);
    }

    fn ago(seconds: u64) -> Instant {
        Instant::now() - Duration::from_secs(seconds)
    }

    /// A line in which nothing came for long, whose only connection is taken; and a blob that began to wait later.
    fn quiet() -> (Arc<Line>, Slot, Claim) {
        let line = Line::with(1, Activity::begun(ago(20)));
        let slot = ask(&line, &Claim::once(), 0).given().expect("it is free");
        let claim = Claim::new(1, Activity::begun(ago(10)));
        claim.begin_to_read();
        (line, slot, claim)
    }

    /// How many seconds after its own last bytes a blob counts as waited for in vain from.
    fn moved(claim: &Claim) -> u64 {
        let activity = &claim.0.activity;
        activity.last_in_turn(Duration::from_secs(600)).duration_since(activity.last()).as_secs()
    }

    #[test]
    fn a_blob_that_waits_goes_by_those_before_it_and_from_its_turn_on_by_itself() {
        let (line, slot, claim) = quiet();
        let mut asker = ask(&line, &claim, 0);
        assert_eq!(moved(&claim), 0, "nothing comes");
        slot.came();
        assert!((9..60).contains(&moved(&claim)), "others come");
        line.activity.touch_at(Instant::now() + Duration::from_secs(100));
        assert!(moved(&claim) > 99);
        drop(slot);
        let given = asker.given().expect("it is next");
        assert!((9..60).contains(&moved(&claim)), "its patience begins with its turn, whatever comes for others");
        drop(given);
    }

    #[test]
    fn a_turn_that_comes_because_those_before_were_given_up_is_no_progress() {
        let (line, slot, claim) = quiet();
        slot.came();
        let mut asker = ask(&line, &claim, 0);
        drop(slot);
        assert!(asker.given().is_some());
        assert_eq!(moved(&claim), 0, "nothing came while it waited");
    }
}
