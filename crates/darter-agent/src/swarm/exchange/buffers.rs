//! Buffers that are used again, and never more of them than the bound says.
//!
//! A piece has up to 8 MiB: memory that is asked from the system and given back for each would cost
//! more than the copy into it, and pieces in flight are what bounds the memory of a swarm.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The bound is counted in these, so that it fits a semaphore.
const UNIT: usize = 64 * 1024;

/// A pool. Cheap to clone.
#[derive(Clone)]
pub struct Buffers(Arc<Pool>);

struct Pool {
    units: usize,
    free: Arc<Semaphore>,
    /// Buffers that nobody uses: together with those in use they stay within the bound.
    idle: Mutex<Vec<Vec<u8>>>,
}

/// Bytes in a pooled buffer, which goes back when this is dropped.
pub struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Arc<Pool>,
    place: OwnedSemaphorePermit,
}

impl Buffers {
    /// A pool of `bytes` at most, rounded down to 64 KiB, but at least one of these.
    pub fn new(bytes: usize) -> Self {
        let units = (bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS);
        Self(Arc::new(Pool { units, free: Arc::new(Semaphore::new(units)), idle: Mutex::default() }))
    }

    /// A buffer of `len` bytes of whatever was in it before; waits until others are given back.
    ///
    /// One that is larger than the whole pool takes all of it: a wait without an end helps nobody.
    pub async fn take(&self, len: usize) -> Buffer {
        let units = len.div_ceil(UNIT).clamp(1, self.0.units);
        let permits = u32::try_from(units).unwrap_or(u32::MAX);
        let place = match self.0.free.clone().acquire_many_owned(permits).await {
            Ok(place) => place,
            // Nobody closes it.
            Err(_) => std::future::pending().await,
        };
        // Whole units, so that what a buffer takes is what it was given for, and not a byte more.
        let size = len.max(units * UNIT);
        let mut bytes = self.0.reuse(size);
        bytes.resize(size, 0);
        Buffer { bytes, len, pool: self.0.clone(), place }
    }

    /// Bytes that buffers in use may still take.
    pub fn available(&self) -> usize {
        self.0.free.available_permits() * UNIT
    }

    #[cfg(test)]
    fn idle_bytes(&self) -> usize {
        self.0.lock().iter().map(Vec::len).sum()
    }
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle buffer of exactly this size, or an empty one: a larger one would take more than its place
    /// says. Lets go of others as far as the caller's place needs it.
    fn reuse(&self, size: usize) -> Vec<u8> {
        let mut idle = self.lock();
        let fits = idle.iter().position(|bytes| bytes.len() == size);
        let found = fits.map(|at| idle.swap_remove(at)).unwrap_or_default();
        trim(&mut idle, self.free.available_permits() * UNIT);
        found
    }

    /// Keeps a buffer that held `units` of the bound for later, at the cost of older ones.
    fn put(&self, bytes: Vec<u8>, units: usize) {
        let mut idle = self.lock();
        idle.push(bytes);
        trim(&mut idle, (self.free.available_permits() + units) * UNIT);
    }
}

fn trim(idle: &mut Vec<Vec<u8>>, bound: usize) {
    let mut total: usize = idle.iter().map(Vec::len).sum();
    while total > bound && !idle.is_empty() {
        total -= idle.remove(0).len();
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.put(std::mem::take(&mut self.bytes), self.place.num_permits());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_full_pool_makes_wait_and_an_old_buffer_is_used_again() {
        let pool = Buffers::new(4 * UNIT);
        let first = pool.take(3 * UNIT).await;
        assert_eq!((first.len(), pool.available()), (3 * UNIT, UNIT));
        let mut second = Box::pin(pool.take(2 * UNIT + 1));
        assert!(second.as_mut().now_or_never().is_none(), "over the bound");
        let at = first.as_ptr();
        drop(first);
        let second = second.await;
        assert_eq!((second.as_ptr(), second.len()), (at, 2 * UNIT + 1));
        assert!(pool.take(100 * UNIT).now_or_never().is_none(), "more than all there is: waits for all");
        drop(second);
        assert_eq!(pool.take(100 * UNIT).await.len(), 100 * UNIT);
    }

    #[tokio::test]
    async fn used_and_idle_buffers_stay_within_the_bound_together() {
        let pool = Buffers::new(4 * UNIT);
        let small = [pool.take(UNIT).await, pool.take(UNIT).await, pool.take(UNIT).await, pool.take(UNIT).await];
        drop(small);
        assert_eq!(pool.idle_bytes(), 4 * UNIT);
        let large = pool.take(3 * UNIT).await;
        assert!(pool.idle_bytes() <= UNIT, "{} idle beside {}", pool.idle_bytes(), large.len());
        drop(large);
        let small = pool.take(1).await;
        assert!(small.bytes.len() <= UNIT, "a byte holds {} bytes", small.bytes.len());
        drop(small);
        assert!(pool.idle_bytes() <= 4 * UNIT, "{}", pool.idle_bytes());
    }
}
