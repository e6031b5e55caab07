//! How many bytes of manifests and lists are in memory at once, whoever asks for them.
//!
//! Each may be 4 MiB, and a client that reads none of it keeps its answer for as long as it is waited for. Who
//! finds no room waits for it, at most as long as an answer may take.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Eight of the largest. A thousand ordinary manifests fit.
const ROOM_KIB: u32 = 32 * 1024;

/// The room of this node. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Room(Arc<Semaphore>);

/// Room that was taken, until the last of its owners is gone.
#[derive(Debug, Clone)]
pub struct Taken {
    _permit: Option<Arc<OwnedSemaphorePermit>>,
}

impl Room {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(ROOM_KIB as usize)))
    }

    /// Waits until there is room for so many bytes. What is larger than all of it takes all.
    pub(super) async fn take(&self, bytes: u64) -> Taken {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(ROOM_KIB).min(ROOM_KIB);
        // Nobody closes it.
        Taken { _permit: self.0.clone().acquire_many_owned(kib).await.ok().map(Arc::new) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn who_finds_no_room_waits_until_somebody_is_done() {
        let room = Room::new();
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(room.take(4 << 20).await);
        }
        let late = |room: Room| async move { tokio::time::timeout(SOON, room.take(1)).await };
        assert!(late(room.clone()).await.is_err());
        let copy = held[0].clone();
        held.clear();
        // However slow this machine is: there is room.
        drop(room.take(1).await);
        assert!(tokio::time::timeout(SOON, room.take(u64::MAX)).await.is_err(), "one is not");
        drop(copy);
        room.take(u64::MAX).await;
    }
}
