//! Room: what may be used, who leaves for whom, and who never does.

use std::time::Duration;

use super::*;

fn evictions(store: &Store, reason: &str) -> u64 {
    metric(store, &format!("darter_store_evictions_total{{reason=\"{reason}\"}}"))
}

fn holds(store: &Store, digests: &[Digest]) -> Vec<bool> {
    digests.iter().map(|digest| store.get(digest).is_some()).collect()
}

#[tokio::test]
async fn the_longest_unused_blob_leaves_for_an_ingest() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    let mut digests = Vec::new();
    for seed in 50..54 {
        digests.push(store_blob(&store, &seeded(seed, MIB)).await);
    }
    assert!(store.get(&digests[0]).is_some());
    digests.push(store_blob(&store, &seeded(54, MIB)).await);
    assert_eq!(holds(&store, &digests), [true, false, true, true, true]);
    assert_eq!(evictions(&store, "ingest"), 1);
    assert_eq!(metric(&store, "darter_store_bytes"), 4 * MIB);
    // What left is gone from the disk too.
    assert!(!store.shared.disk.data(Shelf::Blobs, &digests[1]).exists());
    assert!(!store.shared.disk.record(Shelf::Blobs, &digests[1]).exists());
}

#[tokio::test]
async fn what_is_of_use_to_others_stays_as_if_it_were_used_here() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &settings(2 * MIB)).await;
    let mut digests = [store_blob(&store, &seeded(60, MIB)).await, store_blob(&store, &seeded(61, MIB)).await].to_vec();
    store.used(&digests[0]);
    digests.push(store_blob(&store, &seeded(62, MIB)).await);
    assert_eq!(holds(&store, &digests), [true, false, true]);
}

#[tokio::test]
async fn an_ingest_waits_for_room_that_is_being_made_and_nobody_leaves_for_it_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    let stays = store_blob(&store, &seeded(55, MIB)).await;
    let leaves = store_blob(&store, &seeded(56, 3 * MIB)).await;
    lock(&store.shared.index).leave(&leaves);
    let wanted = Digest::of(&seeded(57, 2 * MIB));
    let ingest = store.ingest(&wanted, 2 * MIB);
    tokio::pin!(ingest);
    let waited = tokio::time::timeout(Duration::from_millis(50), &mut ingest).await;
    assert!(waited.is_err(), "the room is not there yet");
    store.shared.remove(Shelf::Blobs, &[leaves]);
    let ingest = tokio::time::timeout(Duration::from_secs(5), ingest).await;
    assert!(ingest.is_ok_and(|ingest| ingest.is_ok()));
    assert_eq!(holds(&store, &[stays, leaves]), [true, false]);
}

#[tokio::test]
async fn pinned_open_and_running_ones_stay_and_parked_ingests_leave_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &settings(5 * MIB)).await;
    let pinned = store_blob(&store, &seeded(60, MIB)).await;
    store.pin("r.example/a:1", &[(pinned, MIB)], in_an_hour()).unwrap();
    let open = store_blob(&store, &seeded(61, MIB)).await;
    let handle = store.get(&open).unwrap();
    let idle_blob = store_blob(&store, &seeded(62, MIB)).await;
    let running_content = seeded(63, MIB);
    let running = store.ingest(&Digest::of(&running_content), MIB).await.unwrap();
    let parked = parked(&store, &seeded(64, MIB), span(0, 100)).await;

    let first = store_blob(&store, &seeded(65, MIB)).await;
    assert!(lock(&store.shared.index).slot(&parked).is_none());
    assert_eq!(holds(&store, &[pinned, open, idle_blob, first]), [true; 4]);
    let second = Digest::of(&seeded(66, 2 * MIB));
    let writing = store.ingest(&second, 2 * MIB).await.unwrap();
    assert_eq!(holds(&store, &[pinned, open, idle_blob, first]), [true, true, false, false]);
    // Nobody is left who could leave.
    let full = store.ingest(&Digest::of(b"x"), 1).await;
    assert!(matches!(full, Err(StoreError::Full { size: 1, source: None })));
    assert_eq!(holds(&store, &[pinned, open]), [true, true]);
    upkeep_pass(&store).await;
    assert!(matches!(store.state(), State::Full { .. }), "{:?}", store.state());

    fill(&running, &running_content).await;
    assert!(running.finish().await.is_ok());
    drop((writing, handle));
    idle(&store).await;
    assert!(store.unpin("r.example/a:1").unwrap());
    upkeep_pass(&store).await;
    assert_eq!(store.state(), State::Ok);
    store_blob(&store, &seeded(67, 5 * MIB)).await;
    assert_eq!(store.usage(), Usage { bytes: 5 * MIB, limit_bytes: 5 * MIB, blobs: 1, ingests: 0, pinned_bytes: 0 });
}

fn in_an_hour() -> SystemTime {
    SystemTime::now() + Duration::from_secs(3600)
}

async fn upkeep_pass(store: &Store) {
    let shared = Arc::clone(&store.shared);
    tokio::task::spawn_blocking(move || upkeep::pass(&shared)).await.unwrap();
}

#[tokio::test]
async fn what_can_never_fit_is_refused_and_evicts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &settings(2 * MIB)).await;
    let digest = store_blob(&store, &seeded(70, MIB)).await;
    let huge = store.ingest(&Digest::of(b"huge"), 2 * MIB + 1).await;
    assert!(matches!(huge, Err(StoreError::TooLarge { limit: 2_097_152, .. })));
    assert!(matches!(store.ingest(&Digest::of(b"lie"), u64::MAX).await, Err(StoreError::TooLarge { .. })));
    assert!(store.get(&digest).is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ingests_at_once_do_not_overshoot_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    let mut starting = tokio::task::JoinSet::new();
    for n in 0..16_u64 {
        let store = store.clone();
        starting.spawn(async move { store.ingest(&Digest::of(&n.to_le_bytes()), MIB).await.ok() });
    }
    let started: Vec<_> = starting.join_all().await.into_iter().flatten().collect();
    assert_eq!((started.len(), store.usage().bytes), (4, 4 * MIB));
}

#[tokio::test]
async fn a_restart_keeps_pins_and_the_order_of_use_and_a_lower_limit_is_obeyed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let mut digests = Vec::new();
    for seed in 80..84 {
        digests.push(store_blob(&store, &seeded(seed, MIB)).await);
    }
    store.pin("r.example/a:1", &[(digests[1], MIB)], in_an_hour()).unwrap();
    assert!(store.get(&digests[0]).is_some());
    upkeep(&store).await;
    drop(store);
    // 0 was used last, 1 is pinned: of 2 and 3 the older one leaves.
    let store = open_with(dir.path(), &settings(3 * MIB)).await;
    assert_eq!(holds(&store, &digests), [true, true, false, true]);
    assert_eq!((evictions(&store, "limit"), metric(&store, "darter_store_limit_bytes")), (1, 3 * MIB));
}
