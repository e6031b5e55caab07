//! What the rest of the agent has of the swarm: pulls wish for blobs, the exchange asks what to serve.
//!
//! Everything here is a word to the driver or a look-up. What must not be lost though nobody waits for
//! it (an upload ended, a pull gave up) goes over `Endings`, which has room by construction.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_core::pieces::{Bitfield, Layout};
use darter_core::swarm::attest::Attest;
use darter_core::swarm::token::Token;
use darter_core::swarm::{Event, FetchFailure, ImportFailure, PeerId, Refusal, RequestId};
use darter_core::{Digest, Reference, access};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use super::coming::Coming;
use super::control::{ControlHandle, Standing};
use super::exchange::{Client, FetchError, Identity, Piece, PieceRequest, ValuesRequest};
use super::tokens::Tokens;
use super::witnesses::{Heard, Witnesses};
use crate::activity::Activity;

/// Orders that a pull did not take yet. The core asks for some dozens of pieces at a time, of all blobs
/// together, and a pull takes its orders at once.
const ORDERS: usize = 1024;
/// How long a connection to a neighbour may bring nothing, in the head and in each block of a piece.
/// Long before, somebody else is asked for the same piece too.
const PATIENCE: Duration = Duration::from_secs(3);

/// A wish among others: its turn, the lowest first, and whether this node may read the origin for it.
pub type Place = (u64, bool);

/// What a pull is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Ask a peer for a piece.
    Fetch {
        /// Index of the piece.
        piece: u32,
        /// Whom.
        peer: PeerId,
    },
    /// Never mind.
    Cancel {
        /// Index of the piece.
        piece: u32,
        /// Who was asked.
        peer: PeerId,
    },
    /// Read pieces from the origin.
    Import {
        /// Index of the segment that they are in.
        segment: u32,
        /// Index of the first piece.
        first: u32,
        /// Index after the last.
        end: u32,
    },
    /// Ask both of these what each piece is.
    Compare([PeerId; 2]),
    /// Nothing comes, and it is worth waiting.
    Wait,
}

/// What the driver hears from the rest of the agent.
pub(super) enum Input {
    /// A pull wishes for a blob.
    Want { id: u64, blob: Digest, have: Bitfield, place: Place, coming: Arc<Coming>, orders: mpsc::Sender<Order> },
    /// What became of an order.
    Report { id: u64, blob: Digest, event: Event },
    /// Something about no wish in particular.
    Event(Event),
    /// This node is to go; and who waits until what only it has is with others.
    Leave { blobs: Vec<Digest>, left: oneshot::Sender<()> },
    /// A peer asks for a piece.
    Asked { from: PeerId, blob: Digest, piece: u32, reply: oneshot::Sender<Reply> },
}

/// May a peer have its piece?
pub(super) enum Reply {
    /// Yes: from a blob on its way, or from the store.
    Serve(Slot, Option<Arc<Coming>>),
    Refuse(Refusal),
}

/// What ended, and is to be told whether or not the driver has time: one entry for each upload and
/// each wish that there is.
#[derive(Debug, Default)]
pub(super) struct Endings {
    list: Mutex<Vec<Ending>>,
    pub(super) more: Notify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Upload(RequestId),
    /// With the blob here whole, or without it.
    Wish {
        id: u64,
        blob: Digest,
        proven: Option<Layout>,
    },
}

impl Endings {
    fn push(&self, ending: Ending) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(ending);
        self.more.notify_one();
    }

    pub(super) fn take(&self) -> Vec<Ending> {
        std::mem::take(&mut *self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An upload slot, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    request: RequestId,
    endings: Arc<Endings>,
}

impl Slot {
    pub(super) const fn new(request: RequestId, endings: Arc<Endings>) -> Self {
        Self { request, endings }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.endings.push(Ending::Upload(self.request));
    }
}

/// The swarm of this node. Cheap to clone.
#[derive(Clone)]
pub struct SwarmHandle(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) control: ControlHandle,
    pub(super) client: Arc<Client>,
    /// Where pieces go in plaintext.
    pub(super) tokens: Option<Arc<Tokens>>,
    pub(super) witnesses: Arc<Witnesses>,
    pub(super) identity: Identity,
    pub(super) inbox: mpsc::Sender<Input>,
    pub(super) endings: Arc<Endings>,
    pub(super) wishes: AtomicU64,
    /// Until then, whoever wants a blob waits for the others to be found.
    pub(super) settled_by: Instant,
    /// Whether there may be others at all.
    pub(super) expects_others: bool,
}

impl SwarmHandle {
    /// Waits, shortly after the start, until every address that is known has answered: nodes that boot
    /// together and do not know each other yet would each read the origin.
    pub async fn settled(&self) {
        let mut standing = self.0.control.standing();
        if !self.0.expects_others {
            return;
        }
        let is_settled = |standing: &Standing| {
            standing.peers > 0 && standing.peers.saturating_add(standing.apart) >= standing.addresses
        };
        // An error is the time being over, or the control plane: in both cases the pull goes on.
        let _ = tokio::time::timeout_at(self.0.settled_by, standing.wait_for(is_settled)).await;
    }

    /// Whether there is no other member now.
    pub fn is_alone(&self) -> bool {
        self.0.control.standing().borrow().peers == 0
    }

    /// Wishes for a blob. `have` are the pieces that are here already.
    pub async fn want(&self, blob: Digest, layout: Layout, have: Bitfield, place: Place) -> Wish {
        let id = self.0.wishes.fetch_add(1, Ordering::Relaxed);
        let coming = Arc::new(Coming::new(layout));
        let (sender, orders) = mpsc::channel(ORDERS);
        // Made before the word is given: a wish that is dropped on the way is taken back all the same.
        let wish = Wish { id, blob, proven: None, coming: coming.clone(), orders, swarm: self.clone() };
        self.tell(Input::Want { id, blob, have, place, coming, orders: sender }).await;
        wish
    }

    /// A blob is here whole, and its sha256 is right.
    pub async fn proven(&self, blob: Digest, layout: Layout) {
        self.tell(Input::Event(Event::Proven { blob, layout })).await;
    }

    /// A blob is gone.
    pub async fn gone(&self, blob: Digest) {
        self.tell(Input::Event(Event::Gone(blob))).await;
    }

    /// This node is to go: what is here goes to others in this order, as far as nobody else has it. Resolves
    /// when they have what they will take; once more said, this begins anew.
    pub(super) async fn leave(&self, blobs: Vec<Digest>) {
        let (left, waits) = oneshot::channel();
        self.tell(Input::Leave { blobs, left }).await;
        // An error is that it is said once more, or the driver's end.
        let _ = waits.await;
    }

    /// It stays after all.
    pub(super) async fn stay(&self) {
        self.tell(Input::Event(Event::Stay)).await;
    }

    /// It goes now: no upload begins any more.
    pub(super) async fn withdraw(&self) {
        self.tell(Input::Event(Event::Withdraw)).await;
    }

    /// What `Takes` asked for does not come.
    pub(super) async fn not_taken(&self, blob: Digest) {
        self.tell(Input::Event(Event::NotTaken(blob))).await;
    }

    /// Asks all members what they saw of this at its registry, which is away.
    pub async fn ask_members(&self, place: &access::Place, reference: &Reference) -> Heard {
        self.0.witnesses.ask(place, reference).await
    }

    /// A peer vouched for bytes that the origin does not have.
    pub async fn lied(&self, peer: PeerId) {
        self.tell(Input::Event(Event::Lied(peer))).await;
    }

    /// This node's name.
    pub fn me(&self) -> PeerId {
        self.0.control.me()
    }

    /// This node's word for a piece that it read from the origin.
    pub fn attest(&self, blob: &Digest, layout: &Layout, piece: u32, value: [u8; 32]) -> Attest {
        self.0.identity.attest(blob, layout, piece, value)
    }

    async fn tell(&self, input: Input) {
        // An error is the driver's end, and with it that of the agent.
        let _ = self.0.inbox.send(input).await;
    }
}

/// A pull's wish for a blob. Dropping it takes the wish back.
pub struct Wish {
    id: u64,
    blob: Digest,
    proven: Option<Layout>,
    coming: Arc<Coming>,
    orders: mpsc::Receiver<Order>,
    swarm: SwarmHandle,
}

impl Wish {
    /// The next thing to do. `None`: the swarm is gone, or this wish with it.
    pub async fn order(&mut self) -> Option<Order> {
        self.orders.recv().await
    }

    /// What others may read.
    pub const fn coming(&self) -> &Arc<Coming> {
        &self.coming
    }

    /// A way to fetch pieces that does not borrow the wish.
    pub fn fetcher(&self) -> Fetcher {
        Fetcher { blob: self.blob, layout: self.coming.layout(), swarm: self.swarm.clone() }
    }

    /// A piece is here, for which `Coming` has an attest: from a peer, or from the origin.
    pub async fn arrived(&self, piece: u32, peer: Option<PeerId>) {
        let blob = self.blob;
        self.report(match peer {
            Some(peer) => Event::Fetched { blob, piece, peer },
            None => Event::Imported { blob, piece },
        })
        .await;
    }

    /// Bytes of a piece come from the origin, slowly.
    pub async fn importing(&self, piece: u32) {
        self.report(Event::Importing { blob: self.blob, piece }).await;
    }

    /// A peer does not say what its pieces are.
    pub async fn not_compared(&self, peer: PeerId) {
        self.report(Event::NotCompared { blob: self.blob, peer }).await;
    }

    /// A piece did not come.
    pub async fn fetch_failed(&self, piece: u32, peer: PeerId, reason: FetchFailure) {
        self.report(Event::FetchFailed { blob: self.blob, piece, peer, reason }).await;
    }

    /// The origin did not give the rest of a segment.
    pub async fn import_failed(&self, segment: u32, reason: ImportFailure) {
        self.report(Event::ImportFailed { blob: self.blob, segment, reason }).await;
    }

    /// The blob is here whole, and its sha256 is right: the wish is fulfilled.
    pub fn proven(mut self) {
        self.proven = Some(self.coming.layout());
    }

    async fn report(&self, event: Event) {
        self.swarm.tell(Input::Report { id: self.id, blob: self.blob, event }).await;
    }
}

impl Drop for Wish {
    fn drop(&mut self) {
        self.swarm.0.endings.push(Ending::Wish { id: self.id, blob: self.blob, proven: self.proven });
    }
}

/// Fetches pieces of one blob.
#[derive(Clone)]
pub struct Fetcher {
    blob: Digest,
    layout: Layout,
    swarm: SwarmHandle,
}

impl Fetcher {
    /// One piece from one peer, checked. Drop the future to cancel.
    pub async fn fetch(&self, piece: u32, peer: PeerId, activity: Activity) -> Result<Piece, FetchError> {
        let (address, token) = self.reach(peer).await?;
        let request = PieceRequest {
            peer,
            address,
            blob: self.blob,
            layout: self.layout,
            piece,
            known: None,
            token,
            patience: PATIENCE,
            activity,
        };
        self.granted(peer, self.swarm.0.client.fetch(&request).await)
    }

    /// What one peer that has all of it says that its pieces are. Drop the future to cancel.
    pub async fn values(&self, peer: PeerId) -> Result<Vec<[u8; 32]>, FetchError> {
        let (address, token) = self.reach(peer).await?;
        let (blob, layout) = (self.blob, self.layout);
        let request = ValuesRequest { peer, address, blob, layout, token, patience: PATIENCE };
        self.granted(peer, self.swarm.0.client.values(&request).await)
    }

    /// Where a peer's exchange is, and in plaintext the right to ask it about this blob.
    async fn reach(&self, peer: PeerId) -> Result<(SocketAddr, Option<Token>), FetchError> {
        let Shared { control, tokens, .. } = &*self.swarm.0;
        let (address, _) = control.member(peer).ok_or_else(FetchError::gone)?;
        let token = match tokens {
            Some(tokens) => Some(tokens.get(peer, self.blob).await.ok_or_else(FetchError::no_token)?),
            None => None,
        };
        Ok((address, token))
    }

    /// What came of a request. A right that was refused is not used again: it waited for its connection for too
    /// long, or a clock was set.
    fn granted<T>(&self, peer: PeerId, result: Result<T, FetchError>) -> Result<T, FetchError> {
        if let Some(tokens) = &self.swarm.0.tokens
            && result.as_ref().is_err_and(FetchError::is_denied)
        {
            tokens.refused(peer, self.blob);
        }
        result
    }
}
