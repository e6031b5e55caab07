//! Disks that hang: a pipe that nobody opens at the other end makes a real `open` wait for ever.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;
use crate::store::{Checkup, Unwell};

const WITHIN: Duration = Duration::from_millis(200);

/// A file whose opening hangs until this is dropped.
struct Hangs(PathBuf);

impl Hangs {
    fn in_place_of(path: &Path) -> Self {
        let _ = std::fs::remove_file(path);
        mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Hangs {
    fn drop(&mut self) {
        // Both ends at once: whoever waits for the other goes on.
        let _ = File::options().read(true).write(true).open(&self.0);
    }
}

fn is_hung(looked: &Result<(), Unwell>) -> bool {
    matches!(looked, Err(Unwell::Hung(WITHIN)))
}

#[tokio::test]
async fn a_disk_that_answers_passes_with_and_without_blobs_and_no_use_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let mut checkup = Checkup::default();
    checkup.look(&store, WITHIN * 50).await.unwrap();
    let digests = [store_blob(&store, &seeded(1, 3 * 4096 + 1)).await, store_blob(&store, &seeded(2, 0)).await];
    let used = |digest| lock(&store.shared.index).blob(digest).unwrap().used;
    let before = digests.each_ref().map(used);
    for _ in 0..20 {
        checkup.look(&store, WITHIN * 50).await.unwrap();
    }
    assert_eq!(digests.each_ref().map(used), before);
    assert!(!["ingest", "blobs"].iter().any(|shelf| dir.path().join(shelf).join("probe").exists()));
}

#[tokio::test]
async fn a_disk_that_hangs_in_a_read_or_a_write_fails_in_time_and_passes_once_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let digest = store_blob(&store, &seeded(3, 10_000)).await;
    let mut checkup = Checkup::default();
    for path in [dir.path().join("ingest/probe"), store.shared.disk.data(Shelf::Blobs, &digest)] {
        let hangs = Hangs::in_place_of(&path);
        let started = Instant::now();
        for _ in 0..3 {
            let looked = checkup.look(&store, WITHIN).await;
            assert!(is_hung(&looked), "{path:?}: {looked:?}");
        }
        assert!(started.elapsed() < WITHIN * 10, "{:?}", started.elapsed());
        drop(hangs);
        // What the look that hung found is old: this one looks again.
        checkup.look(&store, WITHIN * 50).await.unwrap();
    }
    assert!(!store.holds(&digest), "a pipe is no blob");
}

#[tokio::test]
async fn a_disk_that_hangs_holds_one_thread_whatever_the_number_of_looks() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let mut checkup = Checkup::default();
    let hangs = Hangs::in_place_of(&dir.path().join("ingest/probe"));
    let mut looks = Vec::new();
    for _ in 0..5 {
        assert!(is_hung(&checkup.look(&store, WITHIN).await));
        looks.push(checkup.running.as_ref().unwrap().id());
    }
    looks.dedup();
    assert_eq!(looks.len(), 1, "it is the first look that is waited for");
    drop(hangs);
    checkup.look(&store, WITHIN * 50).await.unwrap();
}

#[tokio::test]
async fn a_blob_that_cannot_be_read_is_dropped_and_the_disk_is_well() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let digest = store_blob(&store, &seeded(4, 10_000)).await;
    let file = store.get(&digest).unwrap();
    // The open handle keeps its size in memory, the file ends before it.
    File::options().write(true).open(store.shared.disk.data(Shelf::Blobs, &digest)).unwrap().set_len(0).unwrap();
    Checkup::default().look(&store, WITHIN * 50).await.unwrap();
    assert!(!store.holds(&digest));
    drop(file);
}

#[tokio::test]
async fn what_was_never_opened_or_went_away_is_said_and_what_only_takes_nothing_is_well() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::write(&data, "not a directory").unwrap();
    let mut checkup = Checkup::default();
    let store = open(&data).await;
    let error = checkup.look(&store, WITHIN * 50).await.unwrap_err();
    assert!(error.to_string().starts_with("the store is unavailable: cannot create"), "{error}");
    std::fs::remove_file(&data).unwrap();
    let store = open(&data).await;
    checkup.look(&store, WITHIN * 50).await.unwrap();
    for state in [State::Full { free_bytes: 0, min_free_bytes: 1 }, State::ReadOnly { reason: String::new() }] {
        *lock(&store.shared.state) = state;
        checkup.look(&store, WITHIN * 50).await.unwrap();
    }
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::write(&data, "not a directory").unwrap();
    store.shared.set_state(State::Ok);
    assert!(matches!(checkup.look(&store, WITHIN * 50).await, Err(Unwell::Disk(_))));
    let state = lock(&store.shared.state).clone();
    assert!(matches!(state, State::Unavailable { .. }), "nothing that cannot be kept is begun with: {state}");
}
