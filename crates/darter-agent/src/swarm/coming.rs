//! A blob on its way here, as others may read it: its file, and who vouches for each piece.
//!
//! Written by its pull, read by the exchange. A piece is in here before the state machine hears that
//! it is here, so that what is announced can be served.

use std::fs::File;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use darter_core::pieces::Layout;
use darter_core::swarm::attest::Attest;

/// What of a blob is here so far.
#[derive(Debug)]
pub struct Coming {
    layout: Layout,
    file: OnceLock<Arc<File>>,
    /// By piece. At 128 bytes each 64 KiB for most blobs.
    attests: Mutex<Vec<Option<Attest>>>,
}

impl Coming {
    /// Nothing of it is here.
    pub fn new(layout: Layout) -> Self {
        Self { layout, file: OnceLock::new(), attests: Mutex::default() }
    }

    /// How it is cut.
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// The file that its pieces are in. The first one counts: an ingest has one.
    pub fn is_in(&self, file: Arc<File>) {
        self.file.get_or_init(|| file);
    }

    /// Notes who vouches for a piece.
    pub fn vouch(&self, piece: u32, attest: Attest) {
        if u64::from(piece) >= self.layout.pieces() {
            return;
        }
        let mut attests = self.lock();
        if attests.is_empty() {
            attests.resize(usize::try_from(self.layout.pieces()).unwrap_or(0), None);
        }
        if let Some(slot) = attests.get_mut(piece as usize) {
            *slot = Some(attest);
        }
    }

    /// Who vouches for a piece. `None`: it is not here.
    pub fn attest(&self, piece: u32) -> Option<Attest> {
        self.lock().get(piece as usize).copied().flatten()
    }

    /// The file and the attest of a piece that is here.
    pub fn piece(&self, piece: u32) -> Option<(Arc<File>, Attest)> {
        Some((self.file.get()?.clone(), self.attest(piece)?))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Option<Attest>>> {
        self.attests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
