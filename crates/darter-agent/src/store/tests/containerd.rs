//! What other nodes may have of containerd's blobs, on real files.

use std::fs;
use std::os::unix::fs::symlink;

use darter_core::pieces::{Layout, chaining_value};

use super::*;
use crate::store::containerd::Ahead;

/// As in containerd's root directory, and made with the first blob.
const CONTENT: &str = "content/blobs/sha256";

/// A store and a content store that is offered to others.
struct Node {
    data: tempfile::TempDir,
    content: tempfile::TempDir,
    store: Store,
    ahead: Ahead,
}

impl Node {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()).await
    }

    async fn start_in(data: tempfile::TempDir, content: tempfile::TempDir) -> Self {
        let dirs = (data.path().to_owned(), Some(content.path().join(CONTENT)));
        let store = Store::open(dirs.0, &settings(1 << 30), dirs.1, Arc::new(Metrics::new("", ""))).await;
        store.offer_containerds_blobs();
        let ahead = Ahead::new(&store.shared).unwrap();
        Self { data, content, store, ahead }
    }

    /// The agent ends, and another begins in the same place.
    async fn start_again(self) -> Self {
        let Self { data, content, store, ahead } = self;
        drop((store, ahead));
        Self::start_in(data, content).await
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.content.path().join(CONTENT).join(digest.hex())
    }

    fn hashes(&self, digest: &Digest) -> PathBuf {
        self.data.path().join("containerd").join(format!("{}.hashes", digest.hex()))
    }

    /// containerd commits a blob.
    fn commit(&self, content: &Bytes) -> Digest {
        let (digest, new) = (Digest::of(content), self.content.path().join("new"));
        fs::create_dir_all(self.content.path().join(CONTENT)).unwrap();
        fs::write(&new, content).unwrap();
        fs::rename(new, self.path(&digest)).unwrap();
        digest
    }

    /// All that the background does until there is something new.
    async fn catch_up(&self) {
        self.ahead.look().await;
        while self.ahead.hash_one().await {}
    }

    /// How many blobs were read to be hashed so far, in the life of this agent.
    fn hashed(&self) -> u64 {
        self.store.shared.content.hashed()
    }

    fn offered(&self) -> Vec<Digest> {
        self.store.blobs().into_iter().map(|(digest, _)| digest).collect()
    }
}

fn sorted<const N: usize>(mut digests: [Digest; N]) -> [Digest; N] {
    digests.sort_unstable();
    digests
}

#[tokio::test]
async fn blobs_of_containerd_are_hashed_once_and_offered_with_the_values_of_their_pieces() {
    let node = Node::start().await;
    let (layer, manifest) = (seeded(400, 2 * MIB + 77), Bytes::from_static(b"{}"));
    let (large, small) = (node.commit(&layer), node.commit(&manifest));
    assert_eq!(node.store.blobs(), []);
    node.catch_up().await;
    let mut all = vec![(large, 2 * MIB + 77), (small, 2)];
    all.sort_unstable();
    assert_eq!(node.store.blobs(), all);
    assert_eq!((node.store.offers(&large), node.store.holds(&large)), (Some(2 * MIB + 77), false));
    assert_eq!(metric(&node.store, "darter_containerd_offered_blobs"), 2);
    assert_eq!(metric(&node.store, "darter_containerd_offered_bytes"), 2 * MIB + 79);
    let mut values = Vec::new();
    for piece in 0..3 {
        let (blob, value) = node.store.piece(&large, piece).await.unwrap();
        values.push(value);
        let span = Layout::new(blob.size()).piece(u64::from(piece));
        assert_eq!((blob.source(), value), (Source::Containerd, chaining_value(span.start, &slice(&layer, span))));
        assert_eq!(blob.read(span).await.unwrap(), slice(&layer, span));
    }
    assert_eq!(node.store.values(&large).await, Some(values));
    assert!(node.store.piece(&large, 3).await.is_none() && node.store.piece(&small, 1).await.is_none());
    assert_eq!(node.store.blobs(), all, "a piece that there is not is no loss of the others");
    node.catch_up().await;
    assert!(node.store.get_from_containerd(&large).await.is_some());
    assert_eq!(node.hashed(), 2);
}

#[tokio::test]
async fn what_is_no_blob_of_containerd_is_left_alone() {
    let node = Node::start().await;
    let content = seeded(401, 5000);
    let digest = node.commit(&content);
    let dir = node.content.path().join(CONTENT);
    fs::write(dir.join("README"), &content).unwrap();
    fs::write(dir.join(Digest::of(b"upper").hex().to_uppercase()), b"upper").unwrap();
    fs::write(dir.join(Digest::of(b"").hex()), b"").unwrap();
    fs::create_dir(dir.join(Digest::of(b"dir").hex())).unwrap();
    let outside = dir.join("outside");
    fs::write(&outside, b"linked").unwrap();
    symlink(&outside, dir.join(Digest::of(b"linked").hex())).unwrap();
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (vec![digest], 1));
}

#[tokio::test]
async fn without_other_nodes_nothing_is_hashed_ahead() {
    let (data, content) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let blob = seeded(402, 5000);
    fs::write(content.path().join(Digest::of(&blob).hex()), &blob).unwrap();
    let dir = Some(content.path().to_owned());
    let store = Store::open(data.path().to_owned(), &settings(1 << 30), dir, Arc::new(Metrics::new("", ""))).await;
    let ahead = Ahead::new(&store.shared).unwrap();
    ahead.look().await;
    assert!(!ahead.hash_one().await);
    assert_eq!((store.blobs(), store.shared.content.hashed()), (vec![], 0));
    assert!(Ahead::new(&open(&data.path().join("other")).await.shared).is_none(), "no containerd, nothing to do");
}

#[tokio::test]
async fn what_containerd_collects_is_offered_no_more_and_what_is_known_of_it_forgotten() {
    let node = Node::start().await;
    let [gone, stays] = [403, 404].map(|seed| node.commit(&seeded(seed, MIB + 5)));
    node.catch_up().await;
    assert_eq!(node.offered(), sorted([gone, stays]));
    // Whoever reads it reads on.
    let (blob, _) = node.store.piece(&gone, 1).await.unwrap();
    fs::remove_file(node.path(&gone)).unwrap();
    let changed = node.store.changed();
    node.catch_up().await;
    tokio::time::timeout(std::time::Duration::from_secs(20), changed).await.expect("nobody was told");
    assert_eq!(node.offered(), [stays]);
    assert!(node.store.piece(&gone, 0).await.is_none());
    assert_eq!(content_of(&blob).await, seeded(403, MIB + 5));
    let kept: Vec<_> = fs::read_dir(node.data.path().join("containerd")).unwrap().collect();
    assert_eq!(kept.len(), 1);
    assert_eq!(metric(&node.store, "darter_containerd_offered_blobs"), 1);
}

#[tokio::test]
async fn a_blob_that_vanished_before_it_was_asked_for_is_taken_back_at_once() {
    let node = Node::start().await;
    let [vanished, replaced, forgotten] = [405, 406, 407].map(|seed| node.commit(&seeded(seed, 5000)));
    node.catch_up().await;
    fs::remove_file(node.path(&vanished)).unwrap();
    fs::remove_file(node.path(&replaced)).unwrap();
    fs::write(node.path(&replaced), seeded(1, 5000)).unwrap();
    fs::remove_file(node.hashes(&forgotten)).unwrap();
    for digest in [vanished, replaced, forgotten] {
        assert!(node.store.piece(&digest, 0).await.is_none());
        tokio::time::timeout(std::time::Duration::from_secs(20), node.store.lost()).await.unwrap();
        assert!(!node.offered().contains(&digest));
    }
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (vec![forgotten], 5), "what was only forgotten is hashed anew");
}

#[tokio::test]
async fn another_file_under_the_name_is_hashed_before_it_is_offered() {
    let node = Node::start().await;
    let content = seeded(408, 5000);
    let digest = node.commit(&content);
    node.catch_up().await;
    // The same bytes, and nobody knows that.
    fs::remove_file(node.path(&digest)).unwrap();
    fs::write(node.path(&digest), &content).unwrap();
    node.ahead.look().await;
    assert_eq!(node.offered(), []);
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (vec![digest], 2));
    // Other bytes of the same size, in place.
    flip(&node.path(&digest), 4000);
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (vec![], 3));
}

#[tokio::test]
async fn a_blob_that_is_not_what_its_name_says_is_told_of_once_and_never_offered() {
    let node = Node::start().await;
    let digest = Digest::of(b"right");
    fs::create_dir_all(node.content.path().join(CONTENT)).unwrap();
    fs::write(node.path(&digest), b"wrong").unwrap();
    for _ in 0..3 {
        node.catch_up().await;
    }
    assert!(node.store.get_from_containerd(&digest).await.is_none());
    assert_eq!((node.offered(), node.hashed()), (vec![], 1));
    assert_eq!(metric(&node.store, "darter_containerd_corruptions_total"), 1);
    assert_eq!(metric(&node.store, "darter_store_corruptions_total"), 0);
}

#[tokio::test]
async fn a_restart_hashes_nothing_again_but_what_changed_or_whose_hashes_are_torn() {
    let node = Node::start().await;
    let [same, changed, torn] = [409, 410, 411].map(|seed| node.commit(&seeded(seed, MIB + 9)));
    node.catch_up().await;
    assert_eq!(node.hashed(), 3);
    let node = node.start_again().await;
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (sorted([same, changed, torn]).to_vec(), 0));
    assert!(node.store.get_from_containerd(&same).await.is_some());
    assert_eq!(node.hashed(), 0, "for this node neither");
    flip(&node.path(&changed), 77);
    File::options().write(true).open(node.hashes(&torn)).unwrap().set_len(100).unwrap();
    let node = node.start_again().await;
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (sorted([same, torn]).to_vec(), 2));
}

#[tokio::test]
async fn a_blob_that_both_have_is_offered_once_and_as_long_as_one_has_it() {
    let node = Node::start().await;
    let (first, second) = (seeded(412, MIB + 3), seeded(413, 5000));
    // The store's own comes first: containerd's need not be hashed.
    let own = store_blob(&node.store, &first).await;
    node.commit(&first);
    let digest = node.commit(&second);
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (sorted([own, digest]).to_vec(), 1));
    assert_eq!(node.store.piece(&own, 1).await.unwrap().0.source(), Source::Cache);
    store_blob(&node.store, &second).await;
    assert_eq!(node.offered(), sorted([own, digest]), "each once");
    assert_eq!(node.store.piece(&digest, 0).await.unwrap().0.source(), Source::Cache);
    // What was used last first, and what only containerd has after it.
    let borrowed = node.commit(&seeded(414, 6000));
    node.catch_up().await;
    assert_eq!(node.store.blobs_by_use(), [digest, own, borrowed]);
    // The store loses its own: of the one containerd's is known.
    node.store.forget(&digest);
    node.store.forget(&own);
    assert_eq!(node.offered(), sorted([digest, borrowed]));
    assert_eq!(node.store.piece(&digest, 0).await.unwrap().0.source(), Source::Containerd);
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (sorted([own, digest, borrowed]).to_vec(), 3));
    // And the other way round.
    store_blob(&node.store, &first).await;
    fs::remove_file(node.path(&own)).unwrap();
    node.catch_up().await;
    assert_eq!(node.offered(), sorted([own, digest, borrowed]));
}

#[tokio::test]
async fn rot_of_a_blob_of_containerd_is_found_by_a_sampled_rehash() {
    let data = tempfile::tempdir().unwrap();
    let content = tempfile::tempdir().unwrap();
    let settings = config::Store { verify_one_in: 2, ..settings(1 << 30) };
    let dir = Some(content.path().join(CONTENT));
    let store = Store::open(data.path().to_owned(), &settings, dir, Arc::new(Metrics::new("", ""))).await;
    store.offer_containerds_blobs();
    let node = Node { ahead: Ahead::new(&store.shared).unwrap(), data, content, store };
    let digest = node.commit(&seeded(415, 5000));
    node.catch_up().await;
    let path = node.path(&digest);
    let modified = path.metadata().unwrap().modified().unwrap();
    flip(&path, 1234);
    // As a disk does it, without a word.
    File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert!(node.store.piece(&digest, 0).await.is_some());
    assert!(node.store.piece(&digest, 0).await.is_none());
    node.catch_up().await;
    assert_eq!((node.offered(), metric(&node.store, "darter_containerd_corruptions_total")), (vec![], 1));
}

#[tokio::test]
async fn hashing_ahead_waits_while_somebody_waits() {
    let node = Node::start().await;
    let digest = node.commit(&seeded(415, MIB));
    let urgent = node.store.shared.content.urgent();
    node.ahead.look().await;
    let waits = tokio::time::timeout(std::time::Duration::from_millis(50), node.ahead.hash_one()).await;
    assert!(waits.is_err() && node.offered().is_empty());
    drop(urgent);
    node.catch_up().await;
    assert_eq!(node.offered(), [digest]);
}

#[tokio::test]
async fn hashing_ahead_leaves_the_page_cache_as_it_was() {
    // The kernel is asked to drop pages and need not, and a look at one that is gone may bring it back: of three
    // tries one is to show it. Where the agent drops nothing none does, nor where it drops all.
    let mut seen = Vec::new();
    for seeds in [[416, 417], [426, 427], [436, 437]] {
        let node = Node::start().await;
        let [cold, warm] = seeds.map(|seed| node.commit(&seeded(seed, 3 * MIB)));
        // Nothing drops a page that is not on the disk yet.
        [cold, warm].iter().for_each(|digest| File::open(node.path(digest)).unwrap().sync_all().unwrap());
        let file = File::open(node.path(&cold)).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        node.catch_up().await;
        assert_eq!(node.offered(), sorted([cold, warm]));
        let cached = |digest| warm::is_warm(&File::open(node.path(&digest)).unwrap(), 2 * MIB);
        seen.push((cached(cold), cached(warm)));
    }
    assert!(seen.contains(&(false, true)), "{seen:?}");
}

#[tokio::test]
async fn the_background_follows_containerd_by_itself_and_ends_when_told() {
    let node = Node::start().await;
    let stop = CancellationToken::new();
    let running = tokio::spawn(node.store.clone().run(stop.clone()));
    let until = async |wanted: &[Digest]| {
        let waiting = async {
            loop {
                let changed = node.store.changed();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if node.offered() == wanted {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), waiting).await.unwrap();
    };
    let digest = node.commit(&seeded(418, MIB + 1));
    until(&[digest]).await;
    fs::remove_file(node.path(&digest)).unwrap();
    until(&[]).await;
    // One that it begins to hash, and may not go on with.
    let _urgent = node.store.shared.content.urgent();
    let digest = node.commit(&seeded(419, 5000));
    let begun = async {
        while node.hashed() < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), begun).await.unwrap();
    stop.cancel();
    tokio::time::timeout(std::time::Duration::from_secs(20), running).await.unwrap().unwrap();
    assert!(!node.offered().contains(&digest));
}

#[tokio::test]
async fn what_cannot_be_kept_is_not_offered_and_not_hashed_again_at_once() {
    let node = Node::start().await;
    // Nothing can be written below a file.
    fs::write(node.data.path().join("containerd"), b"").unwrap();
    let digest = node.commit(&seeded(420, 5000));
    for _ in 0..2 {
        node.catch_up().await;
        assert_eq!((node.offered(), node.hashed()), (vec![], 1));
    }
    fs::remove_file(node.data.path().join("containerd")).unwrap();
    node.ahead.later();
    node.catch_up().await;
    assert_eq!((node.offered(), node.hashed()), (vec![digest], 2));
}

#[tokio::test]
async fn what_others_pulled_is_copied_and_outlives_containerds_garbage_collection() {
    let node = Node::start().await;
    let content = seeded(421, 2 * MIB + 1);
    let [used, other] = [node.commit(&content), node.commit(&seeded(422, 5000))];
    node.catch_up().await;
    let stop = CancellationToken::new();
    let running = tokio::spawn(node.store.clone().run(stop.clone()));
    node.store.used(&Digest::of(b"nobody has it"));
    node.store.used(&used);
    node.store.used(&used);
    wait_for(&node.store, |index| index.blob_size(&used).is_some()).await;
    for digest in [used, other] {
        fs::remove_file(node.path(&digest)).unwrap();
    }
    stop.cancel();
    running.await.unwrap();
    node.catch_up().await;
    assert_eq!(node.offered(), [used]);
    let (blob, _) = node.store.piece(&used, 2).await.unwrap();
    assert_eq!((blob.source(), content_of(&blob).await), (Source::Cache, content));
}
