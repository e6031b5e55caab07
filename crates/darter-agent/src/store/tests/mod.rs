//! The store as its callers see it, on real files.

mod checkup;
mod containerd;
mod crash;
mod disk;
mod doubt;
mod evict;
mod pins;

use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use darter_core::range::Span;
use darter_core::units::{Seconds, Share, Size};
use rand::seeded;

use super::index::Slot;
use super::*;
use crate::config::Space;
use crate::store::index::Phase;

const MIB: u64 = 1024 * 1024;

/// Bytes that look random and are the same each time.
mod rand {
    use bytes::Bytes;

    pub(super) fn seeded(seed: u64, size: u64) -> Bytes {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap() + 8);
        while bytes.len() < usize::try_from(size).unwrap() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(usize::try_from(size).unwrap());
        bytes.into()
    }
}

fn settings(limit: u64) -> config::Store {
    config::Store {
        limit: Space::Bytes(Size(limit)),
        min_free: Space::Bytes(Size(0)),
        pin_for: Seconds(std::time::Duration::from_secs(3600)),
        pin_share: Share(50),
        verify_one_in: 0,
    }
}

async fn open(dir: &Path) -> Store {
    open_with(dir, &settings(1 << 30)).await
}

async fn open_with(dir: &Path, settings: &config::Store) -> Store {
    Store::open(dir.to_owned(), settings, None, Arc::new(Metrics::new("", ""))).await
}

/// Upkeep, as `run` does it, until nothing is left to do.
async fn upkeep(store: &Store) {
    let shared = Arc::clone(&store.shared);
    tokio::task::spawn_blocking(move || {
        upkeep::pass(&shared);
        while upkeep::hash_one(&shared) {}
    })
    .await
    .unwrap();
    idle(store).await;
    let shared = Arc::clone(&store.shared);
    tokio::task::spawn_blocking(move || upkeep::pass(&shared)).await.unwrap();
}

/// Waits until nothing is written, hashed or removed.
async fn idle(store: &Store) {
    wait_for(store, Index::is_idle).await;
}

async fn wait_for(store: &Store, is_so: impl Fn(&Index) -> bool) {
    let waiting = async {
        loop {
            let changed = store.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if is_so(&lock(&store.shared.index)) {
                return;
            }
            changed.await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), waiting).await.expect("what is waited for does not come");
}

/// The number that a metric without a label, or with the given one, has.
fn metric(store: &Store, name: &str) -> u64 {
    let text = store.shared.metrics.render();
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0)
}

async fn fill(ingest: &Ingest, content: &Bytes) {
    while let Some(span) = ingest.next_missing(0) {
        ingest.write(span.start, slice(content, span)).await.unwrap();
    }
}

fn slice(content: &Bytes, span: Span) -> Bytes {
    content.slice(usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap())
}

fn span(start: u64, end: u64) -> Span {
    Span { start, end }
}

async fn store_blob(store: &Store, content: &Bytes) -> Digest {
    let digest = Digest::of(content);
    store.put(&digest, content.clone()).await.unwrap();
    digest
}

async fn parked(store: &Store, content: &Bytes, span: Span) -> Digest {
    let digest = Digest::of(content);
    let ingest = store.ingest(&digest, u64::try_from(content.len()).unwrap()).await.unwrap();
    ingest.write(span.start, slice(content, span)).await.unwrap();
    drop(ingest);
    let is_parked = |index: &Index| matches!(index.slot(&digest), Some(Slot::Ingest { phase: Phase::Parked(_), .. }));
    wait_for(store, is_parked).await;
    digest
}

/// Changes the byte at `offset` of a file.
fn flip(path: &Path, offset: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], offset).unwrap();
}

async fn content_of(blob: &Blob) -> Bytes {
    blob.read_all().await.unwrap()
}

#[tokio::test]
async fn what_was_put_is_got_and_nobody_else_may_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("deep/er");
    let store = open(&data).await;
    assert_eq!(store.state(), State::Ok);
    for content in [Bytes::new(), Bytes::from_static(b"manifest"), seeded(1, 3 * MIB + 5)] {
        let digest = Digest::of(&content);
        assert!(store.get(&digest).is_none());
        let put = store.put(&digest, content.clone()).await.unwrap();
        let got = store.get(&digest).unwrap();
        assert_eq!((got.size(), got.source(), *got.digest()), (put.size(), Source::Cache, digest));
        assert!(Arc::ptr_eq(put.file(), got.file()));
        assert_eq!(content_of(&got).await, content);
        assert!(store.put(&digest, content).await.is_ok());
        assert!(matches!(store.ingest(&digest, 5).await, Err(StoreError::Present(_))));
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&store.shared.disk.data(Shelf::Blobs, &digest)), 0o600);
        assert_eq!(mode(&store.shared.disk.record(Shelf::Blobs, &digest)), 0o600);
        assert_eq!(mode(&data.join("blobs")), 0o700);
    }
    assert_eq!(store.usage().blobs, 3);
    assert_eq!(metric(&store, "darter_store_bytes"), 3 * MIB + 5 + 8);
}

#[tokio::test]
async fn a_reader_trails_the_ingest_and_gets_its_last_bytes_once_they_are_verified() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(2, 2 * MIB + 100);
    let digest = Digest::of(&content);
    let ingest = store.ingest(&digest, 2 * MIB + 100).await.unwrap();
    let reader = ingest.reader();
    let mut readable = reader.readable();
    assert_eq!(*readable.borrow_and_update(), Progress::Readable(0));

    for end in [1000, MIB, MIB + 7, 2 * MIB + 99] {
        let from = ingest.next_missing(0).unwrap().start;
        ingest.write(from, slice(&content, span(from, end))).await.unwrap();
        // The last page is held back.
        let wanted = end.min(2 * MIB + 100 - 4096);
        readable.wait_for(|progress| *progress == Progress::Readable(wanted)).await.unwrap();
        let mut bytes = vec![0; usize::try_from(wanted).unwrap()];
        reader.file().read_exact_at(&mut bytes, 0).unwrap();
        assert!(content.starts_with(&bytes), "{end}");
    }
    ingest.write(2 * MIB + 99, content.slice(content.len() - 1..)).await.unwrap();
    readable.wait_for(|progress| *progress == Progress::Complete).await.unwrap();
    let mut bytes = Vec::new();
    reader.file().try_clone().unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, content);
    assert_eq!(content_of(&ingest.finish().await.unwrap()).await, content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn parallel_writers_in_any_order_make_the_right_blob_and_the_prefix_only_grows() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let size = 5 * MIB + 12_345;
    let content = seeded(3, size);
    let digest = Digest::of(&content);
    let ingest = Arc::new(store.ingest(&digest, size).await.unwrap());
    let mut readable = ingest.reader().readable();
    let (file, whole) = (Arc::clone(ingest.reader().file()), content.clone());
    let watching = tokio::spawn(async move {
        let mut last = 0;
        loop {
            let now = match &*readable.borrow_and_update() {
                Progress::Readable(now) => *now,
                Progress::Complete => return,
                Progress::Failed(reason) => panic!("{reason}"),
            };
            assert!(now >= last);
            let mut bytes = vec![0; usize::try_from(now - last).unwrap()];
            file.read_exact_at(&mut bytes, last).unwrap();
            assert_eq!(bytes, slice(&whole, span(last, now)));
            last = now;
            readable.changed().await.unwrap();
        }
    });
    let mut writers = tokio::task::JoinSet::new();
    for worker in 0..4_u64 {
        let (ingest, content) = (Arc::clone(&ingest), content.clone());
        writers.spawn(async move {
            // Each goes its own way over all of it, so that everything is written several times.
            let mut offsets: Vec<u64> = (0..size).step_by(70_001).collect();
            offsets.sort_by_key(|offset| (offset + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ (worker << 40)));
            for offset in offsets {
                let part = slice(&content, span(offset, size.min(offset + 90_000)));
                ingest.write(offset, part).await.unwrap();
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    assert_eq!(content_of(&ingest.finish().await.unwrap()).await, content);
    watching.await.unwrap();
}

#[tokio::test]
async fn a_blob_of_another_digest_never_completes_and_its_end_is_never_readable() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (right, size) = (seeded(4, MIB + 9000), MIB + 9000);
    let digest = Digest::of(&right);
    let mut wrong = right.to_vec();
    wrong[77] ^= 1;
    let ingest = store.ingest(&digest, size).await.unwrap();
    let mut readable = ingest.reader().readable();
    let watching = tokio::spawn(async move {
        loop {
            match &*readable.borrow_and_update() {
                Progress::Readable(bytes) => assert!(*bytes <= size - 4096),
                Progress::Complete => panic!("complete"),
                Progress::Failed(reason) => return reason.to_string(),
            }
            readable.changed().await.unwrap();
        }
    });
    ingest.write(0, wrong.into()).await.unwrap();
    assert!(matches!(ingest.finish().await, Err(StoreError::Mismatch { expected, .. }) if expected == digest));
    assert!(watching.await.unwrap().contains("what came as"));
    assert!(store.get(&digest).is_none());
    assert_eq!(std::fs::read_dir(dir.path().join("ingest")).unwrap().count(), 0);
    assert_eq!((store.usage().bytes, store.usage().ingests), (0, 0));
    // The next one starts from nothing, and may be right.
    let ingest = store.ingest(&digest, size).await.unwrap();
    assert_eq!(ingest.next_missing(0), Some(span(0, size)));
    fill(&ingest, &right).await;
    assert!(ingest.finish().await.is_ok());
}

#[tokio::test]
async fn bytes_that_are_held_stay_whatever_is_written_over_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(5, 10_000);
    let ingest = store.ingest(&Digest::of(&content), 10_000).await.unwrap();
    ingest.write(2000, content.slice(2000..4000)).await.unwrap();
    let garbage = Bytes::from(vec![0xEE; 1500]);
    ingest.write(2300, garbage.clone()).await.unwrap();
    ingest.write(0, content.slice(0..6000)).await.unwrap();
    ingest.write(0, garbage.clone()).await.unwrap();
    assert_eq!(ingest.next_missing(0), Some(span(6000, 10_000)));
    assert!(ingest.has(5999) && !ingest.has(6000) && !ingest.has(10_000));
    assert!(matches!(ingest.write(9000, garbage.clone()).await, Err(StoreError::OutOfRange { .. })));
    assert!(matches!(ingest.write(u64::MAX, garbage.clone()).await, Err(StoreError::OutOfRange { .. })));
    fill(&ingest, &content).await;
    assert!(ingest.finish().await.is_ok());
    // Too late, and all held: nothing to do.
    ingest.write(0, garbage).await.unwrap();
}

#[tokio::test]
async fn a_digest_has_one_ingest_and_a_dropped_one_goes_on_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(6, 3 * MIB);
    let digest = Digest::of(&content);
    let first = store.ingest(&digest, 3 * MIB).await.unwrap();
    assert!(matches!(store.ingest(&digest, 3 * MIB).await, Err(StoreError::Busy(_))));
    first.write(0, content.slice(0..1_500_000)).await.unwrap();
    first.write(2_000_000, content.slice(2_000_000..2_000_100)).await.unwrap();
    let missing = first.finish().await;
    assert!(matches!(missing, Err(StoreError::Incomplete { missing }) if missing == span(1_500_000, 2_000_000)));
    assert!(matches!(first.write(1_500_000, content.slice(0..1)).await, Err(StoreError::Ended(_))));
    assert!(matches!(first.finish().await, Err(StoreError::Ended(_))));

    let second = store.ingest(&digest, 3 * MIB).await.unwrap();
    assert_eq!(second.next_missing(0), Some(span(1_500_000, 2_000_000)));
    assert_eq!(*second.reader().readable().borrow(), Progress::Readable(1_500_000));
    second.write(1_500_000, content.slice(1_500_000..1_600_000)).await.unwrap();
    drop(second);
    idle(&store).await;

    // Another size is another blob, as far as anybody knows: what was there is void.
    let third = store.ingest(&digest, 2 * MIB).await.unwrap();
    assert_eq!(third.next_missing(0), Some(span(0, 2 * MIB)));
    drop(third);
    idle(&store).await;
    let fourth = store.ingest(&digest, 3 * MIB).await.unwrap();
    fill(&fourth, &content).await;
    assert_eq!(content_of(&fourth.finish().await.unwrap()).await, content);
    assert_eq!(store.usage().bytes, 3 * MIB);
}

#[tokio::test]
async fn a_dropped_ingest_that_still_writes_is_waited_for_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (size, step) = (16 * MIB, MIB);
    let content = seeded(15, size);
    let digest = Digest::of(&content);
    for start in (0..size).step_by(usize::try_from(step).unwrap()) {
        let ingest = store.ingest(&digest, size).await.unwrap();
        assert_eq!(ingest.next_missing(0), Some(span(start, size)), "all that was queued is kept");
        ingest.write(start, slice(&content, span(start, start + step))).await.unwrap();
        drop(ingest);
    }
    // The last one was dropped with everything written: it completes, and whoever waits learns it.
    assert!(matches!(store.ingest(&digest, size).await, Err(StoreError::Present(_))));
    assert_eq!(content_of(&store.get(&digest).unwrap()).await, content);
}

#[tokio::test]
async fn a_reader_learns_that_nobody_writes_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(7, MIB);
    let ingest = store.ingest(&Digest::of(&content), MIB).await.unwrap();
    let mut readable = ingest.reader().readable();
    ingest.write(0, content.slice(0..5)).await.unwrap();
    drop(ingest);
    let last = readable.wait_for(|progress| matches!(progress, Progress::Failed(_))).await.unwrap().clone();
    assert_eq!(last, Progress::Failed("bytes 5 to 1048576 are missing".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_writer_that_is_dropped_midway_leaves_no_hole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let size = 24 * MIB;
    let content = seeded(8, size);
    let ingest = Arc::new(store.ingest(&Digest::of(&content), size).await.unwrap());
    let mut writers = tokio::task::JoinSet::new();
    for part in 0..8 {
        let (ingest, content) = (Arc::clone(&ingest), content.clone());
        writers.spawn(async move {
            let part = span(part * 3 * MIB, (part + 1) * 3 * MIB);
            ingest.write(part.start, slice(&content, part)).await
        });
    }
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    writers.shutdown().await;
    fill(&ingest, &content).await;
    assert_eq!(content_of(&ingest.finish().await.unwrap()).await, content);
}

#[tokio::test]
async fn a_blob_found_corrupt_is_gone_at_once_and_can_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(9, MIB);
    let digest = store_blob(&store, &content).await;
    let handle = store.get(&digest).unwrap();
    store.forget(&digest);
    assert!(store.get(&digest).is_none());
    // Whoever has it open reads on.
    assert_eq!(content_of(&handle).await, content);
    let digest = store_blob(&store, &content).await;
    assert!(store.get(&digest).is_some());
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 1);
}

#[tokio::test]
async fn rot_is_found_by_a_sampled_rehash() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &config::Store { verify_one_in: 3, ..settings(1 << 30) }).await;
    let content = seeded(10, MIB - 1);
    let digest = store_blob(&store, &content).await;
    upkeep(&store).await;
    flip(&store.shared.disk.data(Shelf::Blobs, &digest), 500_000);
    for _ in 0..2 {
        assert!(store.get(&digest).is_some());
        upkeep(&store).await;
    }
    assert!(store.get(&digest).is_some());
    upkeep(&store).await;
    assert!(store.get(&digest).is_none());
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 1);
    assert_eq!(std::fs::read_dir(dir.path().join("blobs")).unwrap().count(), 0);
}

#[tokio::test]
async fn rot_in_the_record_costs_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &config::Store { verify_one_in: 1, ..settings(1 << 30) }).await;
    let content = seeded(11, MIB - 1);
    let digest = store_blob(&store, &content).await;
    let record = store.shared.disk.record(Shelf::Blobs, &digest);
    let before = std::fs::read(&record).unwrap();
    flip(&record, 40);
    assert!(store.get(&digest).is_some());
    upkeep(&store).await;
    assert_eq!(std::fs::read(&record).unwrap(), before);
    assert!(store.get(&digest).is_some());
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 0);
}

#[tokio::test]
async fn the_values_of_all_pieces_are_those_of_each() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let digest = store_blob(&store, &seeded(14, 2 * MIB + 5)).await;
    let mut each = Vec::new();
    for piece in 0..3 {
        each.push(store.piece(&digest, piece).await.unwrap().1);
    }
    assert!(store.piece(&digest, 3).await.is_none());
    assert_eq!(store.values(&digest).await, Some(each));
    assert_eq!(store.values(&Digest::of(b"not here")).await, None);
}

#[tokio::test]
async fn a_blob_that_changed_its_size_or_vanished_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (cut, gone) = (seeded(12, 5000), seeded(13, 5000));
    let (cut, gone) = (store_blob(&store, &cut).await, store_blob(&store, &gone).await);
    File::options().write(true).open(store.shared.disk.data(Shelf::Blobs, &cut)).unwrap().set_len(9).unwrap();
    std::fs::remove_file(store.shared.disk.data(Shelf::Blobs, &gone)).unwrap();
    assert!(store.get(&cut).is_none() && store.get(&gone).is_none());
    idle(&store).await;
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 1);
    assert_eq!(store.usage().bytes, 0);
}

#[tokio::test]
async fn run_syncs_what_is_complete_and_ends_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let stop = CancellationToken::new();
    let running = tokio::spawn(store.clone().run(stop.clone()));
    let digest = store_blob(&store, &seeded(14, 5000)).await;
    let journaled = async {
        while !std::fs::read_to_string(dir.path().join("journal")).unwrap().contains(&digest.hex()) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), journaled).await.unwrap();
    stop.cancel();
    tokio::time::timeout(std::time::Duration::from_secs(20), running).await.unwrap().unwrap();
}
