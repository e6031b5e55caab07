//! One reader of a pull: trails the ingest file and keeps the pull alive.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout_at;

use super::{Interest, Joined, PullError, State, TURN};
use crate::activity::Pulse;
use crate::metrics::Source;
use crate::store::{self, IngestReader};

/// How many times its patience a reader waits for one byte while others of the blob come. kubelet gives
/// up a pull of which it sees nothing for minutes.
const GAP: u32 = 8;

/// Reads a blob while it is fetched.
#[derive(Debug)]
pub struct Reader {
    ingest: IngestReader,
    readable: watch::Receiver<store::Progress>,
    /// Dropping it tells the pull that one reader less waits.
    interest: Interest,
}

/// What a wait for more bytes ended in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Bytes below this offset can be read.
    Readable(u64),
    /// No more will come.
    Failed(String),
    /// Nothing came for as long as the reader would wait.
    Stalled,
}

impl Reader {
    /// A reader whose first bytes are there; or the blob, if none had to come.
    pub(super) async fn wait_for_first_byte(
        ingest: IngestReader,
        interest: Interest,
        mut state: watch::Receiver<State>,
    ) -> Result<Joined, PullError> {
        let mut readable = ingest.readable();
        loop {
            let reached = readable.borrow_and_update().clone();
            match reached {
                store::Progress::Readable(0) => {}
                store::Progress::Readable(_) | store::Progress::Complete => break,
                // The pull itself knows the reason with its chain.
                store::Progress::Failed(_) => return Self::end_of(&mut state).await,
            }
            tokio::select! {
                // The ingest is complete before its pull has ended: who came before that gets what came, not
                // what is kept, or the same bytes would be called cached in one run and fetched in the next.
                biased;
                changed = readable.changed() => if changed.is_err() {
                    return Self::end_of(&mut state).await;
                },
                ended = Self::end_of(&mut state) => return ended,
            }
        }
        Ok(Joined::Running(Self { ingest, readable, interest }))
    }

    /// Waits for the end of the pull and says how it ended.
    async fn end_of(state: &mut watch::Receiver<State>) -> Result<Joined, PullError> {
        let ended = state.wait_for(State::is_last).await;
        match ended.as_deref() {
            Ok(State::Done(blob, _)) => Ok(Joined::Complete(blob.clone())),
            Ok(State::Failed(error)) => Err(error.clone()),
            _ => Err(PullError::Abandoned),
        }
    }

    /// Size of the whole blob in bytes.
    pub fn size(&self) -> u64 {
        self.ingest.size()
    }

    /// Where the first byte came from.
    pub fn source(&self) -> Source {
        self.interest.0.provenance.source_of(0)
    }

    /// Where the first `sent` bytes came from.
    pub fn shares(&self, sent: u64) -> Vec<(Source, u64)> {
        self.interest.0.provenance.shares(sent)
    }

    /// The file that bytes below the readable prefix are read from.
    pub fn file(&self) -> &Arc<File> {
        self.ingest.file()
    }

    /// Waits until all of the blob is here. Bytes that come slowly are waited for as long as others come.
    pub async fn to_end(mut self, patience: Duration) -> Result<(), PullError> {
        let mut reached = 0;
        while reached < self.size() {
            match self.progress_past(reached, patience).await {
                Progress::Readable(end) => reached = end,
                // The pull has its own deadlines; whoever reads has theirs.
                Progress::Stalled => {}
                Progress::Failed(_) => return Err(PullError::Abandoned),
            }
        }
        Ok(())
    }

    /// Waits until bytes past `offset` can be read, or no more will come, or nothing came for
    /// `patience`: neither these bytes nor others of the blob, which comes out of order, nor of other blobs
    /// of this node, whose turn it may be.
    pub async fn progress_past(&mut self, offset: u64, patience: Duration) -> Progress {
        let (mut began, mut pulse) = (Instant::now(), Pulse::start());
        let size = self.ingest.size();
        let past = |progress: &store::Progress| match progress {
            store::Progress::Readable(end) => *end > offset,
            store::Progress::Complete | store::Progress::Failed(_) => true,
        };
        loop {
            let came = || self.interest.0.activity.last_in_turn(patience * TURN);
            let quiet_since = came().max(began);
            let until = (quiet_since + patience).min(began + patience * GAP);
            return match timeout_at(pulse.next(until).into(), self.readable.wait_for(past)).await {
                Ok(Ok(progress)) => match &*progress {
                    store::Progress::Readable(end) => Progress::Readable(*end),
                    store::Progress::Complete => Progress::Readable(size),
                    store::Progress::Failed(reason) => Progress::Failed(reason.to_string()),
                },
                Ok(Err(_)) => Progress::Failed("the pull ended".to_owned()),
                Err(_) if pulse.stood_still() => {
                    began = Instant::now();
                    continue;
                }
                Err(_) if until > Instant::now() => continue,
                Err(_) if came() > quiet_since && Instant::now() < began + patience * GAP => {
                    continue;
                }
                Err(_) => Progress::Stalled,
            };
        }
    }
}
