//! What an agent that was killed, or a machine that lost power, leaves behind.
//!
//! The crash is a copy of the data directory, taken while the store runs and damaged afterwards.

use proptest::prelude::*;

use super::*;
use crate::store::index::Phase;

/// The directory as a crash at this moment leaves it.
fn crash(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for shelf in ["", "blobs", "ingest"] {
        std::fs::create_dir_all(copy.path().join(shelf)).unwrap();
        for entry in std::fs::read_dir(dir.join(shelf)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), copy.path().join(shelf).join(entry.file_name())).unwrap();
            }
        }
    }
    copy
}

fn file_of(dir: &Path, shelf: &str, digest: &Digest, suffix: &str) -> PathBuf {
    dir.join(shelf).join(digest.hex() + suffix)
}

#[tokio::test]
async fn after_a_crash_whole_pieces_are_kept_and_the_rest_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(20, 4 * MIB);
    let digest = parked(&store, &content, span(0, MIB + 5)).await;
    parked(&store, &content, span(2 * MIB, 3 * MIB)).await;

    let crashed = crash(dir.path());
    let store = open(crashed.path()).await;
    assert_eq!((store.usage().ingests, store.usage().bytes), (1, 4 * MIB));
    let ingest = store.ingest(&digest, 4 * MIB).await.unwrap();
    let missing = (ingest.next_missing(0), ingest.next_missing(2 * MIB));
    assert_eq!(missing, (Some(span(MIB, 2 * MIB)), Some(span(3 * MIB, 4 * MIB))));
    assert_eq!(*ingest.reader().readable().borrow(), Progress::Readable(MIB));
    fill(&ingest, &content).await;
    assert_eq!(content_of(&ingest.finish().await.unwrap()).await, content);
}

#[tokio::test]
async fn what_is_left_of_ingests_is_hashed_ahead_of_their_next_use() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(21, 3 * MIB);
    let digest = parked(&store, &content, span(MIB, 3 * MIB)).await;
    let crashed = crash(dir.path());
    flip(&file_of(crashed.path(), "ingest", &digest, ""), 2 * MIB + 9);
    let store = open(crashed.path()).await;
    upkeep(&store).await;
    let index = lock(&store.shared.index);
    let Some(Slot::Ingest { phase: Phase::Parked(Some(tally)), .. }) = index.slot(&digest) else { panic!() };
    assert!(tally.written().covers(span(MIB, 2 * MIB)) && !tally.written().has(2 * MIB));
}

#[tokio::test]
async fn a_blob_that_was_not_synced_is_hashed_before_it_counts() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (whole, rotten, unrecorded) = (seeded(22, 2 * MIB), seeded(23, 2 * MIB), seeded(24, 2 * MIB));
    let mut digests = Vec::new();
    for content in [&whole, &rotten, &unrecorded] {
        digests.push(store_blob(&store, content).await);
    }
    let crashed = crash(dir.path());
    flip(&file_of(crashed.path(), "blobs", &digests[1], ""), 10);
    std::fs::remove_file(file_of(crashed.path(), "blobs", &digests[2], ".pieces")).unwrap();
    let store = open(crashed.path()).await;
    assert!(digests.iter().all(|digest| store.get(digest).is_none()));
    upkeep(&store).await;
    assert_eq!(content_of(&store.get(&digests[0]).unwrap()).await, whole);
    assert_eq!(content_of(&store.get(&digests[2]).unwrap()).await, unrecorded);
    // Of the rotten one a good piece is left.
    assert!(store.get(&digests[1]).is_none());
    let ingest = store.ingest(&digests[1], 2 * MIB).await.unwrap();
    assert_eq!(ingest.next_missing(0), Some(span(0, MIB)));
    // By now they are synced: another crash costs nothing.
    drop(ingest);
    let crashed = crash(crashed.path());
    let store = open(crashed.path()).await;
    assert!(store.get(&digests[0]).is_some() && store.get(&digests[2]).is_some());
}

#[tokio::test]
async fn an_unrecorded_blob_that_is_wrong_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let digest = store_blob(&store, &seeded(25, 2 * MIB)).await;
    let crashed = crash(dir.path());
    flip(&file_of(crashed.path(), "blobs", &digest, ""), 10);
    std::fs::remove_file(file_of(crashed.path(), "blobs", &digest, ".pieces")).unwrap();
    let store = open(crashed.path()).await;
    upkeep(&store).await;
    assert_eq!((store.usage().blobs, store.usage().ingests, store.usage().bytes), (0, 0, 0));
}

#[tokio::test]
async fn a_crash_between_the_renames_of_a_promotion_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(26, 2 * MIB);
    let digest = store_blob(&store, &content).await;
    for moved in ["", ".pieces"] {
        // Of two renames a power loss may keep either.
        let crashed = crash(dir.path());
        let from = file_of(crashed.path(), "blobs", &digest, moved);
        std::fs::rename(from, file_of(crashed.path(), "ingest", &digest, moved)).unwrap();
        let store = open(crashed.path()).await;
        upkeep(&store).await;
        assert_eq!(content_of(&store.get(&digest).unwrap()).await, content, "{moved}");
        let strays = std::fs::read_dir(crashed.path().join("ingest")).unwrap().count();
        assert_eq!(strays, 0, "{moved}");
    }
}

#[tokio::test]
async fn a_blob_whose_size_is_not_the_journals_is_dropped_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let (good, bad) = (store_blob(&store, &seeded(27, 5000)).await, store_blob(&store, &seeded(28, 5000)).await);
    upkeep(&store).await;
    let crashed = crash(dir.path());
    let path = file_of(crashed.path(), "blobs", &bad, "");
    File::options().write(true).open(&path).unwrap().set_len(4999).unwrap();
    let store = open(crashed.path()).await;
    assert!(store.get(&good).is_some() && store.get(&bad).is_none());
    assert_eq!(metric(&store, "darter_store_corruptions_total"), 1);
    assert!(!path.exists());
    assert!(!std::fs::read_to_string(crashed.path().join("journal")).unwrap().contains(&bad.hex()));
}

#[tokio::test]
async fn a_torn_journal_costs_hashing_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let contents: Vec<Bytes> = (30..34).map(|seed| seeded(seed, 9000)).collect();
    for content in &contents {
        store_blob(&store, content).await;
    }
    upkeep(&store).await;
    let text = std::fs::read(dir.path().join("journal")).unwrap();
    for cut in [0, 1, text.len() / 2, text.len() - 1] {
        let crashed = crash(dir.path());
        std::fs::write(crashed.path().join("journal"), &text[..cut]).unwrap();
        let store = open(crashed.path()).await;
        upkeep(&store).await;
        assert_eq!(store.usage().blobs, 4, "{cut}");
    }
}

#[tokio::test]
async fn files_of_others_stay_and_half_written_ones_of_ours_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let digest = store_blob(&store, &seeded(35, 9000)).await;
    upkeep(&store).await;
    let crashed = crash(dir.path());
    let name = Digest::of(b"other").hex();
    let foreign = ["blobs/README", "blobs/x.pieces", "ingest/core.1", "note", "identity.key"];
    foreign.iter().for_each(|path| std::fs::write(crashed.path().join(path), b"x").unwrap());
    std::fs::create_dir(crashed.path().join("blobs").join(&name)).unwrap();
    let ours = [format!("ingest/{name}"), format!("blobs/{name}.pieces"), format!("ingest/{}.pieces", digest.hex())];
    ours.iter().for_each(|path| std::fs::write(crashed.path().join(path), b"x").unwrap());
    let store = open(crashed.path()).await;
    assert_eq!((store.state(), store.usage().blobs, store.usage().ingests), (State::Ok, 1, 0));
    assert!(foreign.iter().all(|path| crashed.path().join(path).exists()));
    assert!(crashed.path().join("blobs").join(&name).is_dir());
    assert!(!ours.iter().any(|path| crashed.path().join(path).exists()));
}

#[tokio::test]
async fn a_blob_that_left_is_not_vouched_for_by_an_old_line_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(36, 9000);
    let digest = store_blob(&store, &content).await;
    upkeep(&store).await;
    store.forget(&digest);
    idle(&store).await;
    store_blob(&store, &content).await;
    // Crash before the sync: what is there now was never synced.
    let crashed = crash(dir.path());
    flip(&file_of(crashed.path(), "blobs", &digest, ""), 10);
    let store = open(crashed.path()).await;
    upkeep(&store).await;
    assert!(store.get(&digest).is_none());
}

/// One thing that a crash, or a bad disk, does to a file.
#[derive(Debug, Clone)]
enum Damage {
    Flip(u64),
    Cut(u64),
    Garbage { at: u64, bytes: Vec<u8> },
    Grow(u64),
    Remove,
}

impl Damage {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            4 => any::<u64>().prop_map(Self::Flip),
            2 => any::<u64>().prop_map(Self::Cut),
            2 => (any::<u64>(), prop::collection::vec(any::<u8>(), 1..200))
                .prop_map(|(at, bytes)| Self::Garbage { at, bytes }),
            1 => (1u64..5000).prop_map(Self::Grow),
            1 => Just(Self::Remove),
        ]
    }

    fn inflict(&self, path: &Path) {
        let Ok(file) = File::options().read(true).write(true).open(path) else { return };
        let len = file.metadata().unwrap().len();
        let within = |at: u64| at % (len + 1);
        match self {
            Self::Flip(at) if len > 0 => flip(path, at % len),
            Self::Flip(_) => {}
            Self::Cut(at) => file.set_len(within(*at)).unwrap(),
            Self::Garbage { at, bytes } => file.write_all_at(bytes, within(*at)).unwrap(),
            Self::Grow(by) => file.set_len(len + by).unwrap(),
            Self::Remove => std::fs::remove_file(path).unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 40, ..ProptestConfig::default() })]
    #[test]
    fn whatever_a_crash_leaves_a_resume_ends_with_the_right_bytes(
        spans in prop::collection::vec((0u64..4 * MIB, 1u64..3 * MIB), 0..4),
        complete in any::<bool>(),
        damages in prop::collection::vec((any::<bool>(), Damage::any()), 0..5),
        journal in prop::option::of(Damage::any()),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let store = open(dir.path()).await;
            let size = 4 * MIB + 777;
            let content = seeded(40, size);
            let digest = Digest::of(&content);
            let ingest = store.ingest(&digest, size).await.unwrap();
            for (start, len) in spans {
                let span = span(start, size.min(start + len));
                ingest.write(span.start, slice(&content, span)).await.unwrap();
            }
            if complete {
                fill(&ingest, &content).await;
                ingest.finish().await.unwrap();
            }
            drop(ingest);
            idle(&store).await;

            let crashed = crash(dir.path());
            for (record, damage) in &damages {
                for shelf in ["blobs", "ingest"] {
                    damage.inflict(&file_of(crashed.path(), shelf, &digest, if *record { ".pieces" } else { "" }));
                }
            }
            if let Some(damage) = &journal {
                damage.inflict(&crashed.path().join("journal"));
            }
            let store = open(crashed.path()).await;
            assert_eq!(store.state(), State::Ok);
            upkeep(&store).await;
            let blob = match store.get(&digest) {
                Some(blob) => blob,
                None => {
                    let ingest = store.ingest(&digest, size).await.unwrap();
                    fill(&ingest, &content).await;
                    ingest.finish().await.unwrap()
                }
            };
            assert!(content_of(&blob).await == content, "wrong bytes");
        });
    }
}
