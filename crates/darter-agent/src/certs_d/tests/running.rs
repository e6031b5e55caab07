//! The loop: the file follows the self-test, changes are heard, and readers and writers beside us see
//! whole files only.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;

/// A running writer, and what is needed to end it.
struct Running {
    serving: channel::Sender<bool>,
    states: channel::Receiver<States>,
    others: channel::Receiver<Others>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    metrics: Arc<Metrics>,
    uninstaller: Uninstaller,
}

impl Running {
    fn start(host: &Host, is_serving: bool) -> Self {
        let certs_d = host.certs_d();
        let (metrics, states, others) = (certs_d.keeper.metrics.clone(), certs_d.states(), certs_d.others());
        let (serving, heard) = channel::channel(is_serving);
        let uninstaller = certs_d.uninstaller();
        let stop = CancellationToken::new();
        let task = tokio::spawn(certs_d.run(heard, stop.clone()));
        Self { serving, states, others, stop, task, metrics, uninstaller }
    }

    async fn until(&mut self, wanted: impl Fn(&HostsState) -> bool) {
        let found = self.states.wait_for(|states| states.first().is_some_and(|(_, state)| wanted(state)));
        tokio::time::timeout(Duration::from_secs(20), found).await.expect("in time").unwrap();
    }

    /// Waits until the file's other hosts are these. The timer is an hour away: it is heard.
    async fn until_foreign(&mut self, wanted: &[ForeignOrigin]) {
        let found = self.others.wait_for(|others| others[&REGISTRY.parse().unwrap()] == wanted);
        tokio::time::timeout(Duration::from_secs(20), found).await.expect("in time").unwrap();
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

/// Looks until it is so: the tree is another program's view, nobody tells it.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_follows_the_self_test_and_goes_when_the_agent_stops() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    let before = host.tree();
    let mut running = Running::start(&host, false);
    running.until(|state| matches!(state, HostsState::Absent { .. })).await;
    assert_eq!(host.tree(), before);
    running.serving.send_replace(true);
    running.until(|state| *state == HostsState::Written).await;
    assert!(host.hosts().contains(MIRROR));
    running.serving.send_replace(false);
    running.until(|state| matches!(state, HostsState::Absent { .. })).await;
    assert_eq!(host.tree(), before);
    running.serving.send_replace(true);
    running.until(|state| *state == HostsState::Written).await;
    assert!(running.metrics.render().contains("state=\"written\"} 1"));
    assert!(!running.metrics.render().contains("state=\"absent\""));
    running.stop().await;
    assert_eq!(host.tree(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_uninstalled_stays_so_whatever_the_self_test_says() {
    for (name, host) in hosts() {
        let before = host.tree();
        let mut running = Running::start(&host, true);
        running.until(|state| *state == HostsState::Written).await;
        let done = running.uninstaller.uninstall().await.unwrap();
        assert_eq!((done.certs_d, done.undone.len()), (host.config.certs_d.path.clone(), 1), "{name}");
        assert_eq!(running.states.borrow()[0].1, HostsState::Uninstalled, "{name}");
        running.serving.send_replace(false);
        running.serving.send_replace(true);
        assert_eq!(running.uninstaller.uninstall().await.unwrap().undone, [], "{name}");
        let orders = running.uninstaller.clone();
        running.stop().await;
        assert!(matches!(orders.uninstall().await, Err(OrderError::Stopping)), "{name}");
        assert_eq!(host.tree(), before, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_self_test_takes_the_file_away() {
    let host = Host::new();
    let before = host.tree();
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    drop(std::mem::replace(&mut running.serving, channel::channel(true).0));
    running.until(|state| matches!(state, HostsState::Absent { .. })).await;
    assert_eq!(host.tree(), before);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_is_heard_healed_and_counted_at_once() {
    let host = Host::new();
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    let right = host.tree();
    let repairs = running.metrics.clone();
    // What is done to it while it is being put right would be one repair with that.
    let healed = async |what: &str, count: u64| {
        eventually(what, || host.tree() == right && repairs.hosts_toml_repairs.get() == count).await;
    };
    // The timer is an hour away: what heals here was heard.
    fs::remove_file(host.path(&format!("{REGISTRY}/hosts.toml"))).unwrap();
    healed("a deleted file comes back", 1).await;
    host.put(&format!("{REGISTRY}/hosts.toml"), &host.hosts().replace("\"resolve\"", "\"push\""));
    healed("an edit of our table is undone", 2).await;
    // In one step, for the same reason.
    fs::rename(&host.config.certs_d.path, host.dir.path().join("gone")).unwrap();
    healed("certs.d itself comes back", 3).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_goes_or_comes_is_heard_wherever_it_was_folded_from() {
    let host = Host::with(&[("_default/a.crt", "CA")]);
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    assert!(host.hosts().contains("_default/a.crt\"]"), "{}", host.hosts());
    // containerd fails every pull of a registry whose `ca` it cannot read.
    fs::remove_file(host.path("_default/a.crt")).unwrap();
    eventually("a certificate that is gone is not named", || !host.hosts().contains("ca = ")).await;
    host.put(&format!("{REGISTRY}/own.crt"), "CA");
    eventually("the registry's own counts", || host.hosts().contains("ca = [\"own.crt\"]")).await;
    running.stop().await;
    assert_eq!(host.get(&format!("{REGISTRY}/own.crt")), "CA");
    assert_eq!(fs::read_dir(host.path(REGISTRY)).unwrap().count(), 1, "the user's file, in a directory now theirs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_remove_on_exit_off_the_file_stays() {
    let mut host = Host::new();
    host.config.certs_d.remove_on_exit = false;
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    let installed = host.tree();
    running.stop().await;
    assert_eq!(host.tree(), installed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_every_instant_the_file_is_whole() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    let path = host.path(&format!("{REGISTRY}/hosts.toml"));
    let done = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let done = done.clone();
        move || {
            let (mut with, mut without) = (0_u32, 0_u32);
            while !done.load(Ordering::Relaxed) {
                // Over a user's file there is one at every instant, and it is the user's or ours.
                let text = fs::read_to_string(&path).expect("a file");
                assert!(text == HARBOR || (text.contains(MIRROR) && text.ends_with(&HARBOR[HARBOR.len() - 33..])));
                if text == HARBOR { without += 1 } else { with += 1 }
            }
            (with, without)
        }
    });
    let mut running = Running::start(&host, true);
    for _ in 0..25 {
        running.until(|state| *state == HostsState::Written).await;
        running.serving.send_replace(false);
        running.until(|state| matches!(state, HostsState::Absent { .. })).await;
        running.serving.send_replace(true);
    }
    running.until(|state| *state == HostsState::Written).await;
    running.stop().await;
    done.store(true, Ordering::Relaxed);
    let (with, without) = reader.join().unwrap();
    assert!(with > 0 && without > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_beside_us_never_loses_its_last_word() {
    let host = Host::with(&[(&format!("{REGISTRY}/hosts.toml"), HARBOR)]);
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    let path = host.path(&format!("{REGISTRY}/hosts.toml"));
    let temp = host.path("theirs");
    for n in 0..200 {
        // As configuration management does it: a new file, by rename.
        fs::write(&temp, format!("[host.\"https://n{n}.example\"]\n")).unwrap();
        fs::rename(&temp, &path).unwrap();
        assert!(host.tree().len() < 9, "no litter");
    }
    eventually("the last word is merged", || host.hosts().contains("n199.example") && host.hosts().contains(MIRROR))
        .await;
    running.stop().await;
    assert_eq!(host.hosts(), "[host.\"https://n199.example\"]\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hosts_that_a_user_names_are_followed_and_stay_while_nobody_can_tell() {
    let (host, file) = (Host::new(), format!("{REGISTRY}/hosts.toml"));
    let mut running = Running::start(&host, true);
    running.until(|state| *state == HostsState::Written).await;
    let ours = host.hosts();
    let cache = ForeignOrigin { url: "https://cache.example".to_owned(), resolve: false };
    let cache_text = "[host.\"https://cache.example\"]\ncapabilities = [\"pull\"]\n";
    for (text, wanted) in [
        (format!("{ours}\n[host.\"https://harbor.example\"]\n"), vec![harbor()]),
        (format!("{ours}\n[host.\"https://harbor.example\"]\n{cache_text}"), vec![harbor(), cache.clone()]),
        (format!("{ours}\n{cache_text}[host.\"https://harbor.example\"]\n"), vec![cache.clone(), harbor()]),
        (ours.clone(), vec![]),
        // Somebody's own file instead of ours.
        (HARBOR.to_owned(), vec![harbor()]),
    ] {
        host.put(&file, &text);
        running.until_foreign(&wanted).await;
        eventually("ours is in it", || host.hosts().contains(MIRROR)).await;
    }
    // Also while the mirror is out of the file.
    running.serving.send_replace(false);
    running.until(|state| matches!(state, HostsState::Absent { .. })).await;
    host.put(&file, cache_text);
    running.until_foreign(std::slice::from_ref(&cache)).await;
    running.serving.send_replace(true);
    running.until(|state| *state == HostsState::Written).await;
    // A file that cannot be read says nothing, and not that there are none.
    let directory = host.path(&format!("{REGISTRY}/directory"));
    fs::create_dir(&directory).unwrap();
    // At once: a file that is gone would be put back in between.
    let here = rustix::fs::CWD;
    rustix::fs::renameat_with(here, &directory, here, host.path(&file), rustix::fs::RenameFlags::EXCHANGE).unwrap();
    running.until(|state| matches!(state, HostsState::Failed { .. })).await;
    running.until_foreign(&[cache]).await;
    running.stop().await;
}
