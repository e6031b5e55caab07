//! Pinned images: what eviction spares, for how long, and where it ends.

use std::time::{Duration, SystemTime};

use super::*;

const A: &str = "r.example/a:1";
const B: &str = "r.example/b:1";
const HOUR: Duration = Duration::from_secs(3600);

/// A moment of this test; the store is told all its times.
fn start() -> SystemTime {
    SystemTime::now()
}

/// Pins blobs of `MIB` each.
fn pin(store: &Store, image: &str, digests: &[Digest], until: SystemTime) -> Result<u64, PinError> {
    let blobs: Vec<_> = digests.iter().map(|digest| (*digest, MIB)).collect();
    store.pin(image, &blobs, until)
}

async fn pass_at(store: &Store, now: SystemTime) {
    let shared = Arc::clone(&store.shared);
    tokio::task::spawn_blocking(move || upkeep::pass_at(&shared, now)).await.unwrap();
}

async fn blobs(store: &Store, seeds: std::ops::Range<u64>) -> Vec<Digest> {
    let mut digests = Vec::new();
    for seed in seeds {
        digests.push(store_blob(store, &seeded(seed, MIB)).await);
    }
    digests
}

fn holds(store: &Store, digests: &[Digest]) -> Vec<bool> {
    digests.iter().map(|digest| store.holds(digest)).collect()
}

fn pinned(store: &Store) -> u64 {
    assert_eq!(metric(store, "darter_store_pinned_bytes"), store.usage().pinned_bytes);
    store.usage().pinned_bytes
}

#[tokio::test]
async fn a_pin_ends_and_until_then_eviction_spares_its_blobs() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    let first = blobs(&store, 200..202).await;
    assert_eq!(pin(&store, A, &first, now + HOUR).unwrap(), 2 * MIB);
    assert_eq!(pinned(&store), 2 * MIB);
    blobs(&store, 202..208).await;
    pass_at(&store, now + HOUR - Duration::from_secs(1)).await;
    blobs(&store, 208..212).await;
    assert_eq!((holds(&store, &first), pinned(&store)), (vec![true, true], 2 * MIB));
    pass_at(&store, now + HOUR).await;
    assert_eq!(pinned(&store), 0);
    blobs(&store, 212..216).await;
    assert_eq!(holds(&store, &first), [false, false]);
}

#[tokio::test]
async fn a_pin_outlives_the_agent_and_no_longer_than_it_was_ordered() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    let first = blobs(&store, 220..224).await;
    pin(&store, A, &first[..1], now + HOUR).unwrap();
    pin(&store, B, &first[1..2], now + HOUR).unwrap();
    assert!(store.unpin(B).unwrap());
    // Without a last pass, as after a kill: it was written down at once.
    drop(store);
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    upkeep(&store).await;
    assert_eq!(pinned(&store), MIB);
    // The journal is written anew at each start.
    drop(store);
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    upkeep(&store).await;
    blobs(&store, 224..228).await;
    assert_eq!(holds(&store, &first), [true, false, false, false]);
    pass_at(&store, now + 2 * HOUR).await;
    drop(store);
    let store = open_with(dir.path(), &settings(4 * MIB)).await;
    pass_at(&store, now + 2 * HOUR).await;
    assert_eq!(pinned(&store), 0);
}

#[tokio::test]
async fn another_order_for_an_image_takes_the_place_of_the_one_before() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open(dir.path()).await;
    let first = blobs(&store, 230..233).await;
    pin(&store, A, &first[..2], now + HOUR).unwrap();
    // The tag means something else by now, and the pin is fresh.
    pin(&store, A, &first[1..], now + 3 * HOUR).unwrap();
    pass_at(&store, now + 2 * HOUR).await;
    assert_eq!(pinned(&store), 2 * MIB);
    let index = lock(&store.shared.index);
    let until = |digest| index.pins().until(digest);
    assert_eq!(first.iter().map(until).collect::<Vec<_>>(), [None, Some(now + 3 * HOUR), Some(now + 3 * HOUR)]);
}

#[tokio::test]
async fn a_layer_of_two_images_stays_while_one_of_them_is_pinned() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open(dir.path()).await;
    let first = blobs(&store, 240..243).await;
    pin(&store, A, &first[..2], now + HOUR).unwrap();
    assert_eq!(pin(&store, B, &first[1..], now + 2 * HOUR).unwrap(), 3 * MIB, "the shared layer counts once");
    assert!(store.unpin(A).unwrap());
    assert!(!store.unpin(A).unwrap());
    assert_eq!(pinned(&store), 2 * MIB);
    let index = lock(&store.shared.index);
    assert_eq!(index.pins().until(&first[1]), Some(now + 2 * HOUR));
}

#[tokio::test]
async fn pins_past_their_share_are_refused_and_change_nothing() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open_with(dir.path(), &settings(6 * MIB)).await;
    let first = blobs(&store, 250..255).await;
    assert_eq!(pin(&store, A, &first[..3], now + HOUR).unwrap(), 3 * MIB);
    let refused = pin(&store, B, &first[2..4], now + HOUR);
    let told = refused.as_ref().unwrap_err().to_string();
    assert!(matches!(refused, Err(PinError::TooMuch { wanted, limit }) if (wanted, limit) == (4 * MIB, 3 * MIB)));
    assert!(told.contains("4194304 bytes") && told.contains("store.pin_share"), "{told}");
    assert_eq!(pinned(&store), 3 * MIB);
    // A blob that is not here yet counts with the size that was told; one of the image itself once.
    let absent = [(Digest::of(b"absent"), MIB + 1)];
    assert!(matches!(store.may_pin(B, &absent), Err(PinError::TooMuch { .. })));
    assert!(store.may_pin(A, &[(first[0], MIB), (first[3], MIB)]).is_ok());
    assert!(matches!(store.may_pin(B, &[(Digest::of(b"lie"), u64::MAX); 2]), Err(PinError::TooMuch { .. })));
}

#[tokio::test]
async fn images_and_blobs_of_pins_have_a_bound() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open(dir.path()).await;
    let many: Vec<_> = (0..65_537_u64).map(|n| (Digest::of(&n.to_le_bytes()), 0)).collect();
    assert!(matches!(store.may_pin(A, &many), Err(PinError::TooMany)));
    assert!(store.pin(A, &many[..65_536], now + HOUR).is_ok());
    assert!(matches!(store.may_pin(B, &many[65_535..]), Err(PinError::TooMany)));
    assert!(store.may_pin(A, &many[1..]).is_ok());
    // All of them come back in one line.
    drop(store);
    let store = open(dir.path()).await;
    assert_eq!(lock(&store.shared.index).pins().digests().count(), 65_536);
}

#[tokio::test]
async fn a_disk_that_shrank_takes_pins_past_their_share_last_and_the_one_that_ends_first_before() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open_with(dir.path(), &settings(8 * MIB)).await;
    let first = blobs(&store, 260..266).await;
    pin(&store, A, &first[..2], now + 2 * HOUR).unwrap();
    pin(&store, B, &first[2..4], now + HOUR).unwrap();
    upkeep(&store).await;
    drop(store);
    // Half of 5 MiB: of the four that are pinned two may stay, if others want the room.
    let store = open_with(dir.path(), &settings(5 * MIB)).await;
    assert_eq!(holds(&store, &first), [true, true, true, true, false, true]);
    assert_eq!(pinned(&store), 4 * MIB);
    store_blob(&store, &seeded(270, 3 * MIB)).await;
    assert_eq!(holds(&store, &first), [true, true, false, false, false, false]);
    assert_eq!(pinned(&store), 2 * MIB);
    // What is left of them is within the share: nothing makes it leave.
    let full = store.ingest(&Digest::of(b"x"), 4 * MIB).await;
    assert!(matches!(full, Err(StoreError::Full { .. })));
    // One that comes back is pinned as before.
    store.shared.change(|index| index.set_pin(A, None));
    store_blob(&store, &seeded(262, MIB)).await;
    assert_eq!(pinned(&store), MIB);
}

#[tokio::test]
async fn a_pin_that_another_clock_wrote_ends_within_the_longest_lifetime() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open(dir.path()).await;
    let first = blobs(&store, 280..281).await;
    pin(&store, A, &first, now + 400 * PIN_MAX).unwrap();
    pass_at(&store, now).await;
    assert_eq!(pinned(&store), MIB);
    pass_at(&store, now + PIN_MAX).await;
    assert_eq!(pinned(&store), 0);
}

#[tokio::test]
async fn a_pin_that_cannot_be_written_down_is_refused() {
    let (dir, now) = (tempfile::tempdir().unwrap(), start());
    let store = open(&dir.path().join("data")).await;
    let first = blobs(&store, 290..292).await;
    pin(&store, A, &first[..1], now + HOUR).unwrap();
    // Neither the old journal nor a new one can be written.
    lock(&store.shared.mount.get().unwrap().journal).lose_file();
    std::fs::create_dir(dir.path().join("data/journal.new")).unwrap();
    assert!(matches!(pin(&store, A, &first, now + HOUR), Err(PinError::Disk(_))));
    assert!(matches!(store.unpin(A), Err(PinError::Disk(_))));
    assert_eq!(pinned(&store), MIB, "what was pinned before still is");
    let absent = open(&dir.path().join("data/journal/x")).await;
    assert!(matches!(pin(&absent, A, &first, now + HOUR), Err(PinError::Unavailable)));
}
