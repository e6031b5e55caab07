//! Disks that are full, read-only, somebody else's, or not there.

use std::io::Write as _;
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate};

use super::*;

/// A small file system of its own, as far as this machine lets us mount one.
struct Tmpfs {
    dir: tempfile::TempDir,
}

impl Tmpfs {
    /// `None` where nothing can be mounted: the test then returns, and is said not to have run.
    fn new(test: &str, options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(dir.path()).output();
        match mount {
            Ok(output) if output.status.success() => Some(Self { dir }),
            _ => {
                not_run(&format!("NOT RUN: {test}: it mounts a tmpfs, which needs root\n"));
                None
            }
        }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn remount(&self, option: &str) {
        let option = format!("remount,{option}");
        assert!(Command::new("mount").args(["-o", &option]).arg(self.dir.path()).status().unwrap().success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a failed test may still have files open.
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

/// What `can_run` of the harness does: a line that the test runner does not hide, the same line in the
/// list that `make test` counts, each in one write because tests run at the same time.
fn not_run(line: &str) {
    assert!(std::env::var_os("DARTER_REQUIRE_ALL").is_none(), "{line}");
    let _ = io::stderr().write_all(line.as_bytes());
    if let Some(list) = std::env::var_os("DARTER_NOT_RUN") {
        let mut list = File::options().create(true).append(true).open(list).unwrap();
        list.write_all(line.as_bytes()).unwrap();
    }
}

async fn pass(store: &Store) -> State {
    let shared = Arc::clone(&store.shared);
    tokio::task::spawn_blocking(move || upkeep::pass(&shared)).await.unwrap();
    store.state()
}

/// Takes all the room that is left.
fn fill_up(tmpfs: &Tmpfs) -> PathBuf {
    let path = tmpfs.dir.path().join("filler");
    let block = vec![1; 4096];
    let file = File::create(&path).unwrap();
    let mut at = 0;
    while file.write_all_at(&block, at).is_ok() {
        at += 4096;
    }
    path
}

#[tokio::test]
async fn a_full_disk_is_a_state_and_the_store_recovers_once_there_is_room() {
    let Some(tmpfs) = Tmpfs::new("a_full_disk_is_a_state_and_the_store_recovers_once_there_is_room", "size=12m") else {
        return;
    };
    let store = open(&tmpfs.data()).await;
    let digest = store_blob(&store, &seeded(90, MIB)).await;
    let handle = store.get(&digest).unwrap();
    let filler = fill_up(&tmpfs);
    let content = seeded(91, 2 * MIB);
    let refused = store.ingest(&Digest::of(&content), 2 * MIB).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })));
    assert!(matches!(pass(&store).await, State::Full { .. }));
    assert!(store.state().to_string().starts_with("full: 0 bytes free"), "{}", store.state());
    // What is here is served.
    assert_eq!(content_of(&handle).await.len(), 1 << 20);
    std::fs::remove_file(filler).unwrap();
    assert_eq!(pass(&store).await, State::Ok);
    store_blob(&store, &content).await;
}

#[tokio::test]
async fn a_disk_that_is_full_in_the_middle_of_an_ingest_fails_it_and_a_later_one_goes_on() {
    let Some(tmpfs) =
        Tmpfs::new("a_disk_that_is_full_in_the_middle_of_an_ingest_fails_it_and_a_later_one_goes_on", "size=12m")
    else {
        return;
    };
    let store = open(&tmpfs.data()).await;
    let content = seeded(92, 4 * MIB);
    let digest = Digest::of(&content);
    let ingest = store.ingest(&digest, 4 * MIB).await.unwrap();
    ingest.write(0, content.slice(0..1 << 21)).await.unwrap();
    let mut readable = ingest.reader().readable();
    readable.wait_for(|progress| *progress == Progress::Readable(2 * MIB)).await.unwrap();
    // As on a file system that cannot set room aside.
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&**ingest.reader().file(), hole, 2 * MIB, 2 * MIB).unwrap();
    let filler = fill_up(&tmpfs);
    // Queued, and found out later.
    let _ = ingest.write(2 * MIB, content.slice(1 << 21..)).await;
    assert!(matches!(ingest.finish().await, Err(StoreError::Full { source: Some(_), .. })));
    assert!(matches!(&*readable.borrow_and_update(), Progress::Failed(reason) if reason.contains("No space")));
    assert!(matches!(store.state(), State::Full { .. }));
    std::fs::remove_file(filler).unwrap();
    assert_eq!(pass(&store).await, State::Ok);
    let ingest = store.ingest(&digest, 4 * MIB).await.unwrap();
    assert_eq!(ingest.next_missing(0), Some(span(2 * MIB, 4 * MIB)));
    fill(&ingest, &content).await;
    assert_eq!(content_of(&ingest.finish().await.unwrap()).await, content);
}

#[tokio::test]
async fn room_that_others_need_is_given_back() {
    let Some(tmpfs) = Tmpfs::new("room_that_others_need_is_given_back", "size=16m") else { return };
    let min_free = config::Store { min_free: Space::Bytes(Size(8 * MIB)), ..settings(1 << 30) };
    let store = open_with(&tmpfs.data(), &min_free).await;
    let mut digests = Vec::new();
    for seed in 93..97 {
        digests.push(store_blob(&store, &seeded(seed, MIB)).await);
    }
    assert_eq!(pass(&store).await, State::Ok);
    let most = metric(&store, "darter_store_limit_bytes");
    assert!((7 * MIB..=8 * MIB).contains(&most), "{most}");
    std::fs::write(tmpfs.dir.path().join("others"), vec![1; 6 << 20]).unwrap();
    assert_eq!(pass(&store).await, State::Ok);
    assert!(digests.iter().filter(|digest| store.get(digest).is_some()).count() < 3);
    assert!(metric(&store, "darter_store_evictions_total{reason=\"free_space\"}") >= 2);
    std::fs::write(tmpfs.dir.path().join("more"), vec![1; 2 << 20]).unwrap();
    assert!(matches!(pass(&store).await, State::Full { min_free_bytes: 8_388_608, .. }));
}

#[tokio::test]
async fn a_read_only_disk_is_a_state_and_its_blobs_are_served() {
    let Some(tmpfs) = Tmpfs::new("a_read_only_disk_is_a_state_and_its_blobs_are_served", "size=12m") else { return };
    let content = seeded(98, MIB);
    let store = open(&tmpfs.data()).await;
    let digest = store_blob(&store, &content).await;
    upkeep(&store).await;
    drop(store);
    tmpfs.remount("ro");
    let store = open(&tmpfs.data()).await;
    assert!(matches!(store.state(), State::ReadOnly { .. }), "{:?}", store.state());
    assert!(store.state().to_string().contains("Read-only file system"), "{}", store.state());
    assert_eq!(content_of(&store.get(&digest).unwrap()).await, content);
    assert!(matches!(store.ingest(&Digest::of(b"x"), 1).await, Err(StoreError::Unavailable { .. })));
    tmpfs.remount("rw");
    assert_eq!(pass(&store).await, State::Ok);
    store_blob(&store, &seeded(99, MIB)).await;
}

#[tokio::test]
async fn a_disk_that_turns_read_only_under_us_is_noticed_by_the_next_ingest() {
    let Some(tmpfs) = Tmpfs::new("a_disk_that_turns_read_only_under_us_is_noticed_by_the_next_ingest", "size=12m")
    else {
        return;
    };
    let store = open(&tmpfs.data()).await;
    upkeep(&store).await;
    // The kernel refuses to remount while files are open for writing: a bind mount over it is
    // read-only by itself.
    let data = tmpfs.data();
    let run = |args: &[&str]| Command::new("mount").args(args).arg(&data).status().unwrap().success();
    assert!(run(&["--bind", data.to_str().unwrap()]) && run(&["-o", "remount,bind,ro"]));
    let refused = store.ingest(&Digest::of(b"x"), 1).await;
    let state = store.state();
    assert!(Command::new("umount").arg(&data).status().unwrap().success());
    assert!(matches!(refused, Err(StoreError::Disk(_))));
    assert!(matches!(state, State::ReadOnly { .. }), "{state:?}");
    assert_eq!(pass(&store).await, State::Ok);
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_is_a_state_and_run_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let blocker = dir.path().join("blocker");
    std::fs::write(&blocker, b"a file, not a directory").unwrap();
    let store = open(&blocker.join("data")).await;
    let reason = store.state().to_string();
    assert!(reason.starts_with("unavailable: cannot create") && reason.contains("blocker/data"), "{reason}");
    assert!(store.get(&Digest::of(b"x")).is_none());
    assert!(matches!(store.ingest(&Digest::of(b"x"), 1).await, Err(StoreError::Unavailable { .. })));
    store.forget(&Digest::of(b"x"));

    std::fs::remove_file(&blocker).unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(store.clone().run(stop.clone()));
    let recovered = async {
        while store.state() != State::Ok {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), recovered).await.unwrap();
    store_blob(&store, &seeded(100, 5000)).await;
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_directory_deleted_under_us_fails_the_ingest_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let content = seeded(101, MIB);
    let digest = Digest::of(&content);
    let ingest = store.ingest(&digest, MIB).await.unwrap();
    std::fs::remove_dir(dir.path().join("blobs")).unwrap();
    ingest.write(0, content.clone()).await.unwrap();
    assert!(matches!(ingest.finish().await, Err(StoreError::Disk(_))));
    assert!(matches!(store.state(), State::Unavailable { .. }));
    assert_eq!(pass(&store).await, State::Ok);
    // Everything was there: it is hashed and complete.
    let again = store.ingest(&digest, MIB).await.unwrap();
    assert_eq!(again.next_missing(0), None);
    assert_eq!(content_of(&again.finish().await.unwrap()).await, content);
}

#[tokio::test]
async fn a_second_agent_on_the_same_directory_is_refused_until_the_first_ends() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).await;
    let digest = store_blob(&first, &seeded(102, 5000)).await;
    upkeep(&first).await;
    let second = open(dir.path()).await;
    let wanted = format!("it is used by another darter agent, pid {}", std::process::id());
    assert!(second.state().to_string().ends_with(&wanted), "{}", second.state());
    assert!(second.get(&digest).is_none());
    drop(first);
    assert_eq!(pass(&second).await, State::Ok);
    assert!(second.get(&digest).is_some());
}
