//! Captured boards at rest and at work, and what holds for every reading.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn at(seconds: u64) -> Time {
    Time::ZERO + Duration::from_secs(seconds)
}

/// A board at rest: milliwatts, and what is in its memory.
#[derive(Clone, Copy)]
struct Board {
    milliwatts: u64,
    memory_used: u64,
    has_mig: bool,
}

impl Board {
    const fn idle(milliwatts: u64) -> Self {
        Self { milliwatts, memory_used: 0, has_mig: false }
    }
}

/// A reading of a board that does nothing, `seconds` after the start. All is known of it.
fn rest(board: Board, seconds: u64) -> Sample {
    let util = (!board.has_mig).then_some(0);
    Sample {
        at: at(seconds),
        utilization_percent: util,
        utilization_max_percent: util,
        sm_active_ratio: Some(0.0),
        is_idle_bit_set: Some(true),
        energy_millijoules: Some(board.milliwatts * seconds),
        power_milliwatts: Some(board.milliwatts),
        pcie_bytes: Some(100 * seconds),
        memory_used_bytes: Some(board.memory_used),
        processes: Some(0),
        is_allocated: Some(false),
        has_mig: board.has_mig,
    }
}

/// Plays readings every 5 s. What is concluded after the last.
fn play(seconds: u64, sample: impl Fn(u64) -> Sample) -> Idleness {
    play_on(&mut Idle::new(at(0), Policy::default(), Floor::default()), 0, seconds, sample)
}

fn play_on(idle: &mut Idle, from: u64, seconds: u64, sample: impl Fn(u64) -> Sample) -> Idleness {
    let mut last = idle.judge(at(from));
    for second in (from..from + seconds).step_by(5) {
        idle.note(sample(second));
        last = idle.judge(at(second));
    }
    last
}

fn says(idleness: &Idleness, witness: Witness) -> Says {
    idleness.evidence.iter().find(|evidence| evidence.witness == witness).map_or(Says::Nothing, |found| found.says)
}

/// T4, A10 (for A10G), A100, H100, H200, L40S: milliwatts at rest. 55 MiB are in use of an H200 with MIG.
const BOARDS: [Board; 7] = [
    Board::idle(33_500),
    Board::idle(15_000),
    Board::idle(49_700),
    Board::idle(68_600),
    Board::idle(77_700),
    Board::idle(66_000),
    Board { milliwatts: 77_700, memory_used: 57_671_680, has_mig: true },
];

#[test]
fn every_board_at_rest_is_empty_where_processes_can_be_seen_and_idle_where_not() {
    for board in BOARDS {
        assert_eq!(play(600, |second| rest(board, second)).state, State::Empty);
        let blind = play(600, |second| Sample { processes: None, ..rest(board, second) });
        assert_eq!(blind.state, State::LoadedIdle, "an empty list would say nothing");
        let taken = play(600, |second| Sample { is_allocated: Some(true), ..rest(board, second) });
        assert_eq!(taken.state, State::LoadedIdle);
        let unknown = play(600, |second| Sample { is_allocated: None, ..rest(board, second) });
        assert_eq!(unknown.state, State::LoadedIdle);
    }
}

#[test]
fn the_h200_under_load_is_busy_and_every_witness_says_so() {
    let mut idle =
        Idle::new(at(0), Policy::default(), Floor { loaded_milliwatts: Some(118_000.0), ..Floor::default() });
    let load = |second| Sample {
        utilization_percent: Some(100),
        utilization_max_percent: Some(100),
        sm_active_ratio: Some(0.9),
        is_idle_bit_set: Some(false),
        energy_millijoules: Some(627_400 * second),
        power_milliwatts: Some(627_400),
        pcie_bytes: Some(50 * MIB * second),
        memory_used_bytes: Some(33_934_016_512),
        processes: Some(3),
        is_allocated: Some(true),
        ..rest(BOARDS[4], second)
    };
    let found = play_on(&mut idle, 0, 600, load);
    assert_eq!((found.state, found.busy_ratio), (State::Busy, Some(1.0)));
    for witness in [Witness::Activity, Witness::IdleBit, Witness::Power, Witness::Pcie] {
        assert_eq!(says(&found, witness), Says::Busy, "{witness:?}");
    }
    let power = found.evidence.iter().find(|evidence| evidence.witness == Witness::Power).unwrap();
    assert_eq!(power.value.map(f64::round), Some(627.0));
    assert_eq!(power.limit.map(f64::round), Some(136.0), "118 W and 15 %");
    assert_eq!(power.age, Some(Duration::ZERO));
}

#[test]
fn a_server_that_waits_is_loaded_and_one_that_serves_is_busy() {
    let board = Board { milliwatts: 118_000, memory_used: 129 << 30, has_mig: false };
    let waits = |second| Sample { is_allocated: Some(true), processes: Some(1), ..rest(board, second) };
    let mut idle = Idle::new(at(0), Policy::default(), Floor::default());
    assert_eq!(play_on(&mut idle, 0, 600, waits).state, State::LoadedIdle);
    // One request between two looks: only the energy counter has seen it.
    let serves = |second: u64| Sample {
        energy_millijoules: Some(118_000 * second + if second >= 605 { 5_000_000 } else { 0 }),
        ..waits(second)
    };
    let found = play_on(&mut idle, 600, 10, serves);
    assert_eq!((found.state, says(&found, Witness::Power)), (State::Busy, Says::Busy));
    assert_eq!((says(&found, Witness::Activity), says(&found, Witness::IdleBit)), (Says::Idle, Says::Idle));
    assert_eq!(found.idle_since, None);
    let found = play_on(&mut idle, 610, 300, serves);
    assert_eq!((found.state, found.since), (State::LoadedIdle, at(730)), "two minutes after the request");
}

#[test]
fn a_board_that_has_just_started_is_not_judged_by_what_the_driver_does() {
    // The L40S without persistence: 100 %, 127 to 242 W, no idle bit.
    let starts = |second| Sample {
        utilization_percent: Some(100),
        is_idle_bit_set: Some(false),
        energy_millijoules: Some(242_000 * second),
        ..rest(BOARDS[5], second)
    };
    let mut idle = Idle::new(at(0), Policy::default(), Floor { empty_milliwatts: Some(66_000.0), ..Floor::default() });
    assert_eq!(play_on(&mut idle, 0, 30, starts).state, State::Unknown);
    let after = |second| Sample { energy_millijoules: Some(66_000 * second), ..rest(BOARDS[5], second) };
    let found = play_on(&mut idle, 30, 300, after);
    assert_eq!((found.state, found.busy_ratio), (State::Empty, Some(0.0)));
    idle.initialised(at(330));
    assert_eq!(idle.judge(at(331)).state, State::Unknown, "what was read before says nothing of it now");
    assert_eq!(play_on(&mut idle, 330, 25, starts).state, State::Unknown, "and again with the next start");
}

#[test]
fn mig_without_utilisation_goes_by_the_other_witnesses() {
    let board = BOARDS[6];
    let ampere = |second| Sample { sm_active_ratio: None, ..rest(board, second) };
    assert_eq!(play(900, ampere).state, State::Empty);
    let loaded = Board { memory_used: 17_782_800_384, ..board };
    let waits = |second| Sample { sm_active_ratio: None, is_allocated: Some(true), ..rest(loaded, second) };
    assert_eq!(play(900, waits).state, State::LoadedIdle, "the idle bit and the power");
    let no_power = |second| Sample { energy_millijoules: None, power_milliwatts: None, ..waits(second) };
    assert_eq!(play(900, no_power).state, State::Unknown, "the idle bit alone");
    let works = |second| Sample { is_idle_bit_set: Some(false), ..waits(second) };
    assert_eq!(play(900, works).state, State::Busy);
    let whole =
        |second| Sample { has_mig: false, utilization_percent: None, utilization_max_percent: None, ..ampere(second) };
    assert_eq!(play(900, whole).state, State::Unknown, "a whole GPU has a utilisation");
}

#[test]
fn one_number_is_never_enough() {
    let only = |change: fn(&mut Sample)| {
        play(900, |second| {
            let known = rest(BOARDS[4], second);
            let mut sample = Sample { at: known.at, memory_used_bytes: Some(1 << 30), ..Sample::default() };
            sample.utilization_percent = Some(0);
            change(&mut sample);
            sample
        })
    };
    assert_eq!(only(|_| ()).state, State::Unknown, "utilisation 0");
    assert_eq!(only(|sample| sample.sm_active_ratio = Some(0.0)).state, State::Unknown, "both look at the SMs");
    assert_eq!(only(|sample| sample.is_allocated = Some(false)).state, State::Unknown, "no pod has it");
    assert_eq!(only(|sample| sample.power_milliwatts = Some(77_700)).state, State::Unknown, "power without a least");
    assert_eq!(only(|sample| sample.is_idle_bit_set = Some(true)).state, State::LoadedIdle, "the idle bit as well");
    assert_eq!(only(|sample| sample.utilization_percent = Some(1)).state, State::Busy);
}

#[test]
fn the_least_power_is_learned_from_idle_time_that_is_past() {
    let mut idle = Idle::new(at(0), Policy::default(), Floor::default());
    // It works from the start, at a power that never changes.
    play_on(&mut idle, 0, 900, |second| Sample { is_idle_bit_set: Some(false), ..rest(Board::idle(300_000), second) });
    assert_eq!(idle.floor(), Floor::default());
    play_on(&mut idle, 900, 150, |second| rest(BOARDS[4], second));
    assert_eq!(idle.floor(), Floor::default(), "the window would be its own witness");
    play_on(&mut idle, 1050, 300, |second| rest(BOARDS[4], second));
    assert_eq!(idle.floor().empty_milliwatts.map(f64::round), Some(77_700.0));
    assert_eq!(idle.floor().loaded_milliwatts, None);
    // One reading that is far too low is no floor.
    play_on(&mut idle, 1350, 5, |second| Sample {
        energy_millijoules: None,
        power_milliwatts: Some(1),
        ..rest(BOARDS[4], second)
    });
    play_on(&mut idle, 1355, 600, |second| rest(BOARDS[4], second));
    assert!(idle.floor().empty_milliwatts > Some(70_000.0), "{:?}", idle.floor());
}

#[test]
fn idle_time_that_is_interrupted_teaches_nothing() {
    let mut idle = Idle::new(at(0), Policy::default(), Floor::default());
    let serves = |second| Sample { is_idle_bit_set: Some(second % 100 != 0), ..rest(BOARDS[4], second) };
    play_on(&mut idle, 0, 1800, serves);
    assert_eq!(idle.floor(), Floor::default(), "never two minutes on end");
}

#[test]
fn a_hole_in_the_readings_or_an_old_one_is_not_idle() {
    let mut idle = Idle::new(at(0), Policy::default(), Floor::default());
    assert_eq!(play_on(&mut idle, 0, 600, |second| rest(BOARDS[4], second)).state, State::Empty);
    assert_eq!(idle.judge(at(610)).state, State::Empty);
    assert_eq!(idle.judge(at(611)).state, State::Unknown, "nothing for 16 s");
    let found = play_on(&mut idle, 620, 60, |second| rest(BOARDS[4], second));
    assert_eq!(found.state, State::Unknown, "25 s are missing");
    let found = play_on(&mut idle, 680, 120, |second| rest(BOARDS[4], second));
    assert_eq!((found.state, found.idle_since), (State::Empty, Some(at(725))));
}

#[test]
fn whoever_looks_may_wake_it_once_in_a_window() {
    let woken = |every: u64| {
        play(900, move |second| Sample {
            is_idle_bit_set: Some(second % every != 0),
            // Nobody else speaks for it but its utilisation.
            processes: None,
            energy_millijoules: None,
            power_milliwatts: None,
            ..rest(BOARDS[4], second)
        })
    };
    assert_eq!(woken(125).state, State::LoadedIdle, "1 of 25");
    assert_eq!(woken(60).state, State::Busy, "2 of 25");
}

fn reading() -> impl Strategy<Value = Sample> {
    let counters = (option::of(0u64..1 << 40), option::of(0u64..700_000), option::of(0u64..1 << 40));
    let activity = (option::of(0u8..=2), option::of(0u8..=2), option::of(0.0f64..0.02), option::of(any::<bool>()));
    let owners = (option::of(0u64..128 << 20), option::of(0u32..2), option::of(any::<bool>()), any::<bool>());
    (activity, counters, owners).prop_map(
        |((util, max, sm, bit), (energy, power, pcie), (memory, processes, pod, mig))| Sample {
            at: Time::ZERO,
            utilization_percent: util,
            utilization_max_percent: max,
            sm_active_ratio: sm,
            is_idle_bit_set: bit,
            energy_millijoules: energy,
            power_milliwatts: power,
            pcie_bytes: pcie,
            memory_used_bytes: memory,
            processes,
            is_allocated: pod,
            has_mig: mig,
        },
    )
}

const fn is_idle(state: State) -> bool {
    matches!(state, State::Empty | State::LoadedIdle)
}

proptest! {
    #[test]
    fn the_conclusion_follows_the_evidence(readings in vec((reading(), 1u64..20), 1..80)) {
        let mut idle = Idle::new(at(0), Policy::default(), Floor::default());
        let mut second = 30;
        for (sample, passed) in readings {
            second += passed;
            idle.note(Sample { at: at(second), ..sample });
            let found = idle.judge(at(second));
            let votes = |says| found.evidence.iter().filter(|evidence| evidence.says == says).count();
            prop_assert_eq!(found.state == State::Busy, votes(Says::Busy) > 0);
            prop_assert!(!is_idle(found.state) || votes(Says::Idle) >= 2);
            prop_assert_eq!(found.idle_since.is_some(), is_idle(found.state));
            prop_assert!(found.since <= at(second));
        }
    }

    #[test]
    fn what_is_missing_is_never_idle(missing in 0usize..20, what in 0usize..3, board in 0usize..7) {
        let found = play(600, |second| {
            let mut sample = rest(BOARDS[board], second);
            // Somewhere in the last window; 0 is the last reading.
            if second == 595 - 5 * missing as u64 {
                match what {
                    0 => sample.memory_used_bytes = None,
                    1 if sample.has_mig => sample.memory_used_bytes = None,
                    1 => (sample.utilization_percent, sample.utilization_max_percent, sample.sm_active_ratio) = (None, None, None),
                    _ => sample = Sample { at: sample.at, ..Sample::default() },
                }
            }
            sample
        });
        prop_assert!(!is_idle(found.state), "{:?}", found);
    }

    #[test]
    fn nobody_is_empty_without_every_list(missing in 0usize..20, what in 0usize..4, board in 0usize..7) {
        let found = play(600, |second| {
            let mut sample = rest(BOARDS[board], second);
            if second == 595 - 5 * missing as u64 {
                match what {
                    0 => sample.processes = None,
                    1 => sample.processes = Some(1),
                    2 => sample.is_allocated = None,
                    _ => sample.is_allocated = Some(true),
                }
            }
            sample
        });
        prop_assert_eq!(found.state, State::LoadedIdle);
    }

    #[test]
    fn one_witness_makes_it_busy(when in 0usize..20, what in 0usize..5, board in 0usize..6) {
        let found = play(900, |second| {
            let mut sample = rest(BOARDS[board], second);
            let is_then = second == 895 - 5 * when as u64;
            let is_after = second >= 895 - 5 * when as u64;
            match what {
                0 if is_then => sample.utilization_percent = Some(1),
                1 if is_then => sample.utilization_max_percent = Some(3),
                2 if is_then => sample.sm_active_ratio = Some(0.01),
                3 if is_after => sample.pcie_bytes = sample.pcie_bytes.map(|bytes| bytes + (200 << 20)),
                4 if is_after => sample.energy_millijoules = sample.energy_millijoules.map(|energy| energy + 2_000_000),
                _ => (),
            }
            sample
        });
        prop_assert_eq!(found.state, State::Busy, "{:?}", found);
    }
}

#[test]
fn what_is_kept_has_a_bound() {
    let mut idle = Idle::new(at(0), Policy::default(), Floor::default());
    for tick in 0..20_000u64 {
        idle.note(Sample { at: at(30) + Duration::from_millis(tick), ..rest(BOARDS[0], 0) });
    }
    assert!(idle.looks() <= 1024);
    play_on(&mut idle, 100, 3600, |second| rest(BOARDS[0], second));
    assert!(idle.looks() <= 181, "{}", idle.looks());
}
