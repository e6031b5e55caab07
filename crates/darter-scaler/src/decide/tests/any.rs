//! Random states: small, and full of edges.

use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;

use crate::Millis;
use crate::policy::{Policy, Remove};
use crate::state::{
    Freeze, Gap, Gpu, Held, Image, Job, Lease, Needed, Node, Pod, Pool, Pull, Removal, Report, Sample, State, Work,
    Workload,
};

/// All states are decided on at this moment.
pub(super) const NOW: Millis = Millis(1_700_000_000_000);
pub(super) const IMAGES: u32 = 5;
const POOLS: [&str; 2] = ["l4", "h100"];
const ZONES: [&str; 2] = ["a", "b"];
const MINUTE: u64 = 60_000;

/// A moment in the past: now, or some seconds, minutes or hours ago.
fn past() -> impl Strategy<Value = Millis> {
    prop_oneof![Just(0), 0..30_000_u64, 0..20 * MINUTE, 0..8 * 60 * MINUTE].prop_map(|ago| Millis(NOW.0 - ago))
}

fn future() -> impl Strategy<Value = Millis> {
    prop_oneof![Just(0), 0..11 * MINUTE].prop_map(|ahead| NOW.plus(ahead))
}

fn gpu() -> impl Strategy<Value = Gpu> {
    let work = prop_oneof![1 => Just(Work::Unread), 8 => past().prop_map(Work::Until)];
    (work, prop_oneof![5 => Just(None), 1 => past().prop_map(Some)]).prop_map(|(work, sick)| Gpu { work, sick })
}

fn report() -> impl Strategy<Value = Report> {
    let held = vec((0..IMAGES, past()).prop_map(|(image, used)| Held { image, used }), 0..5);
    let pulls = vec((0..IMAGES, 0..9_000_000_000_u64).prop_map(|(image, bytes_left)| Pull { image, bytes_left }), 0..2);
    let jobs = vec(future().prop_map(|until| Job { name: "train".to_owned(), until }), 0..2);
    let rest = (prop_oneof![4 => Just(None), 1 => future().prop_map(Some)], of(past()), prop::bool::weighted(0.8));
    (past(), vec(gpu(), 1..3), held, pulls, jobs, rest).prop_map(
        |(heard, gpus, mut held, pulls, jobs, (notice, served, warm))| {
            held.sort_by_key(|held| held.image);
            held.dedup_by_key(|held| held.image);
            Report { heard, gpus, held, pulls, jobs, notice, served, warm }
        },
    )
}

fn pod(n: usize) -> impl Strategy<Value = Pod> {
    (of(0..3_usize), 0..8_i32, of(past())).prop_map(move |(workload, place, ranked)| Pod {
        uid: format!("pod-{n}-{place}"),
        workload: workload.map(|n| format!("models/w{n}")),
        cost: place * 100_000,
        ranked,
    })
}

fn node(n: usize) -> impl Strategy<Value = Node> {
    let lease = of((past(), future()).prop_map(|(since, until)| Lease { since, until }));
    let flags = (prop::bool::weighted(0.9), prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    let report = prop_oneof![1 => Just(None), 6 => report().prop_map(Some)];
    let asked = vec(0..IMAGES, 0..2);
    (0..2_usize, 0..2_usize, past(), flags, of(past()), vec(pod(n), 0..2), lease, asked, report).prop_map(
        move |(pool, zone, created, (registered, tainted, deleting), untainted, pods, lease, asked, report)| Node {
            name: format!("gpu-{n}"),
            pool: POOLS[pool].to_owned(),
            zone: ZONES[zone].to_owned(),
            created,
            registered,
            tainted,
            untainted,
            deleting,
            pods,
            lease,
            asked,
            report,
        },
    )
}

fn workload() -> impl Strategy<Value = Workload> {
    let samples = vec((past(), 0..9_000_u64), 0..5);
    let gaps = vec((0..900_000_u64, 0..600_000_u64).prop_map(|(ms, kept_ms)| Gap { ms, kept_ms }), 0..9);
    let sizes = (0..2_usize, 1..3_u32, 0..2_u32, 1..9_u32, 0..12_u32);
    let since = (past(), of(past()), of(past()));
    (sizes, samples, gaps, 0..900_u64, since, vec((1..9_u32, past()), 0..3)).prop_map(
        |((pool, gpus, least, most, answered), mut samples, gaps, cold, (known, raised, ahead), mut needed)| {
            samples.sort_unstable();
            needed.sort_by_key(|(replicas, at)| (*at, *replicas));
            Workload {
                pool: POOLS[pool].to_owned(),
                gpus,
                least: least.min(most),
                most,
                target_milli: 1000,
                cold_start_micros: cold * 1000,
                lead_ms: 60_000,
                samples: samples.into_iter().map(|(at, backlog_milli)| Sample { at, backlog_milli }).collect(),
                floors: Vec::new(),
                answered,
                raised,
                ahead,
                known,
                needed: needed.into_iter().map(|(replicas, at)| Needed { replicas, at }).collect(),
                gaps,
            }
        },
    )
}

fn pool() -> impl Strategy<Value = Pool> {
    (1..4_u32, (0..2_u32, 0..3_u32), 2..9_u32, 0..5_u32, vec(0..4_u32, 0..30), of(past())).prop_map(
        |(gpus, (nodes_least, buffer_least), nodes_most, buffer, increments, grew)| Pool {
            micros_per_hour: u64::from(gpus) * 3_600_000,
            gpus,
            nodes_least,
            nodes_most,
            buffer,
            buffer_least,
            increments,
            grew,
        },
    )
}

fn nodes() -> impl Strategy<Value = Vec<Node>> {
    (0..7_usize).prop_flat_map(|count| (0..count).map(node).collect::<Vec<_>>())
}

/// A state whose bounds hold.
pub(super) fn state() -> impl Strategy<Value = State> {
    let removals = vec((past(), 0..2_usize, 0..2_usize), 0..2);
    let freeze = prop_oneof![9 => Just(None), 1 => past().prop_map(Some)];
    let watched = prop_oneof![4 => Just(NOW), 1 => past()];
    (nodes(), vec(workload(), 0..4), [pool(), pool()], removals, freeze, watched).prop_map(
        |(nodes, workloads, pools, removals, freeze, watched)| State {
            nodes: nodes.into_iter().enumerate().map(|(n, node)| (format!("uid-{n}"), node)).collect(),
            images: (0..IMAGES).map(image).collect(),
            workloads: workloads.into_iter().enumerate().map(|(n, one)| (format!("models/w{n}"), one)).collect(),
            pools: POOLS.iter().map(|name| (*name).to_owned()).zip(pools).collect(),
            removals: removals
                .into_iter()
                .map(|(at, pool, zone)| Removal { at, pool: POOLS[pool].to_owned(), zone: ZONES[zone].to_owned() })
                .collect(),
            freeze: freeze.map(|since| Freeze { since, why: "a drill".to_owned() }),
            watched,
        },
    )
}

pub(super) fn image(n: u32) -> Image {
    let digest = format!("sha256:{n:064x}").parse().unwrap();
    Image { digest, bytes: 11_200_000_000 + u64::from(n) }
}

/// A policy that lets nodes be removed, as rails are worth nothing where nothing is.
pub(super) fn policy() -> impl Strategy<Value = Policy> {
    (1..3_u16, 1..4_u32, prop::bool::ANY).prop_map(|(copies, removals_most, all)| {
        let mut policy = Policy { remove: Remove { doomed: true, stuck: all, sick: all }, ..Policy::default() };
        policy.protect.copies = copies;
        policy.rails.removals_most = removals_most;
        policy.rails.victims_percent = 40;
        policy.rails.gpus_most = 12;
        policy
    })
}
