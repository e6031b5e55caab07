//! How fast a link really is, how busy the machine is, and what a run is worth.
//!
//! The gates are those of the fact sheet on distribution: a run on a machine that is too small, or in
//! a topology that plain TCP cannot fill, says nothing about a swarm and is void.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_core::simulate::{Bound, Scenario};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::net::Place;

/// A flow is counted after its slow start, and what the buckets let through at once.
const WARM_UP: Duration = Duration::from_millis(500);

/// Bytes a second that reach a program at `to` from one at `from`, over one connection, in so long.
pub async fn goodput(from: &Place, to: &Place, during: Duration) -> Result<f64> {
    let listener = to.listen((to.address(), 0).into())?;
    let mut sender = from.connect(listener.local_addr()?).await?;
    let (mut receiver, _) = listener.accept().await?;
    let mut send = async || {
        let chunk = vec![0; 64 * 1024];
        while sender.write_all(&chunk).await.is_ok() {}
    };
    let receive = async {
        let mut buffer = vec![0; 64 * 1024];
        let start = Instant::now();
        while start.elapsed() < WARM_UP {
            ensure!(receiver.read(&mut buffer).await? > 0, "the sender left");
        }
        let (start, mut bytes) = (Instant::now(), 0);
        while start.elapsed() < during {
            bytes += receiver.read(&mut buffer).await?;
        }
        Ok(crate::stage::bytes(bytes as u64) / start.elapsed().as_secs_f64())
    };
    tokio::select! {
        rate = receive => rate,
        () = send() => anyhow::bail!("the flow broke"),
    }
}

/// The least time in which `nodes` get `size` bytes, by the formula that the simulator is held
/// against, from what links and origin were measured to carry.
pub fn bound(nodes: usize, size: u64, link: f64, origin: f64) -> Result<Bound> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes a second")]
    let (link, origin) = (link as u64, origin as u64);
    let mut scenario = Scenario::cold(u32::try_from(nodes)?, size, 1);
    (scenario.uplink, scenario.downlink) = (link, link);
    (scenario.origin.rate, scenario.origin.connection_rate) = (origin, origin);
    Ok(Bound::of(&scenario))
}

/// The same for `nodes` that get it from others that have it, and from no origin.
pub fn warm_bound(nodes: usize, holders: usize, size: u64, link: f64) -> Result<Bound> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes a second")]
    let link = link as u64;
    let mut scenario = Scenario::warm(u32::try_from(nodes)?, u32::try_from(holders)?, size);
    (scenario.uplink, scenario.downlink) = (link, link);
    Ok(Bound::of(&scenario))
}

/// What goal G1 of the fact sheet leaves to TCP and to real machines.
const TOLERANCE: f64 = 0.07;

/// The seconds that goal G1 allows real agents on real links: the bound, three piece-times for each
/// doubling of the nodes, and 7 %.
pub fn goal_seconds(bound: &Bound) -> f64 {
    (bound.rounds + bound.allowance) * bound.piece_seconds * (1.0 + TOLERANCE)
}

/// Processor time of the whole machine up to a moment.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    busy: u64,
    all: u64,
}

impl Machine {
    /// Up to now.
    pub fn now() -> Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        Self::parse(&stat).context("/proc/stat has no line for all processors")
    }

    fn parse(stat: &str) -> Option<Self> {
        // proc(5): user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user's.
        let ticks: Vec<u64> =
            stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8).flat_map(str::parse).collect();
        let all = ticks.iter().sum();
        Some(Self { busy: all - ticks.get(3)? - ticks.get(4)?, all })
    }

    /// The share of all processors that was busy since an earlier moment: 0 to 1.
    pub fn busy_since(self, before: Self) -> f64 {
        crate::stage::bytes(self.busy - before.busy) / crate::stage::bytes((self.all - before.all).max(1))
    }
}

/// Above this the machine, and not the network, may have set the time.
const BUSY_MAX: f64 = 0.80;

/// The control program may take so much longer than the bound.
const CONTROL_MAX: f64 = 1.03;

/// Twice the bytes take twice the time, within this: else constants are a part of it.
const DOUBLE: std::ops::RangeInclusive<f64> = 1.96..=2.04;

/// One condition of a valid run.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    /// What was looked at.
    pub what: &'static str,
    /// What was found.
    pub value: f64,
    /// What is allowed, for people.
    pub allowed: String,
    /// Whether it is.
    pub holds: bool,
}

/// What a run is worth.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict(pub Vec<Gate>);

impl Verdict {
    /// From the busy share of the machine, the control program's time against the bound, and its
    /// times for F and 2F bytes where they were taken.
    pub fn of(busy: f64, control: Duration, bound: Duration, doubled: Option<(Duration, Duration)>) -> Self {
        let ratio = control.as_secs_f64() / bound.as_secs_f64();
        let mut gates = vec![
            Gate { what: "machine busy", value: busy, allowed: format!("< {BUSY_MAX:.2}"), holds: busy < BUSY_MAX },
            Gate {
                what: "control program / bound",
                value: ratio,
                allowed: format!("<= {CONTROL_MAX:.2}"),
                holds: ratio <= CONTROL_MAX,
            },
        ];
        if let Some((once, twice)) = doubled {
            let value = twice.as_secs_f64() / once.as_secs_f64();
            let allowed = format!("{:.2} to {:.2}", DOUBLE.start(), DOUBLE.end());
            gates.push(Gate { what: "time of 2F / time of F", value, allowed, holds: DOUBLE.contains(&value) });
        }
        Self(gates)
    }

    /// The gates that do not hold, for people; empty if the run counts.
    pub fn objections(&self) -> String {
        let failed = self.0.iter().filter(|gate| !gate.holds);
        failed
            .map(|Gate { what, value, allowed, .. }| format!("{what} {value:.3}, not {allowed}"))
            .collect::<Vec<_>>()
            .join(" and ")
    }

    /// Whether the run counts.
    pub fn is_valid(&self) -> bool {
        self.0.iter().all(|gate| gate.holds)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_valid() { "valid:" } else { "VOID:" })?;
        for Gate { what, value, allowed, holds } in &self.0 {
            write!(f, " {what} {value:.3} ({}{allowed});", if *holds { "" } else { "NOT " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(busy: f64, control: u64, twice: u64) -> Verdict {
        let ms = Duration::from_millis;
        Verdict::of(busy, ms(control), ms(1000), Some((ms(control), ms(twice))))
    }

    #[test]
    fn each_gate_alone_makes_a_run_void() {
        assert!(verdict(0.79, 1030, 2060).is_valid());
        let failing = [verdict(0.80, 1030, 2060), verdict(0.79, 1031, 2062), verdict(0.79, 1030, 2110)];
        for (number, verdict) in failing.into_iter().enumerate() {
            let holds: Vec<_> = verdict.0.iter().map(|gate| gate.holds).collect();
            assert_eq!(holds.iter().filter(|holds| !**holds).count(), 1, "{verdict}");
            assert!(!holds[number] && verdict.to_string().starts_with("VOID:"), "{verdict}");
        }
    }

    #[test]
    fn a_control_program_faster_than_the_bound_is_not_held_against_the_run() {
        assert!(verdict(0.1, 950, 1900).is_valid());
    }

    #[test]
    fn the_machine_is_busy_but_for_idle_and_waiting_for_disks() {
        let before = Machine::parse("cpu  10 0 10 100 50 0 0 0 0 0\ncpu0 1 1 1 1\n").unwrap();
        let after = Machine::parse("cpu  20 5 20 150 70 1 2 2 99 99\n").unwrap();
        assert_eq!(after.busy_since(before), 0.3);
    }

    #[test]
    fn the_goal_is_the_fact_sheets_for_four_nodes_and_one_layer() {
        // 200 Mbit/s carry 189.8 of payload; 258 piece-times of 1 MiB are the bound, 12.5 s the goal.
        let bound = bound(4, 256 << 20, 23_725_000.0, 23_725_000.0).unwrap();
        assert_eq!((bound.rounds, bound.allowance), (258.0, 6.0));
        assert!((12.4..12.55).contains(&goal_seconds(&bound)), "{}", goal_seconds(&bound));
        // The holder sends each piece once, and the last one takes one more step to the third node.
        assert_eq!(warm_bound(3, 1, 256 << 20, 23_725_000.0).unwrap().rounds, 257.0);
    }

    #[test]
    fn objections_name_the_gates_that_do_not_hold() {
        assert_eq!(verdict(0.79, 1030, 2060).objections(), "");
        assert_eq!(verdict(0.85, 1030, 2060).objections(), "machine busy 0.850, not < 0.80");
    }
}
