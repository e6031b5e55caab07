//! Made-up demand, for tests and for trying out a policy: the same seed is the same trace.
//!
//! The one place here that counts in fractions; no decision is made of them.

use super::{Request, Trace};

/// How demand comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Requests without memory, at a rate that itself changes by lot every quarter of an hour.
    Bursts,
    /// A day's rhythm.
    Diurnal,
    /// Sessions of some requests a few seconds apart, and hours of silence.
    OnOff,
    /// Hardly anything, and once a hundred times as much.
    FlashCrowd,
}

impl Shape {
    /// All of them, by name.
    pub const ALL: [(&'static str, Self); 4] = [
        ("bursts", Self::Bursts),
        ("diurnal", Self::Diurnal),
        ("on-off", Self::OnOff),
        ("flash-crowd", Self::FlashCrowd),
    ];
}

/// Numbers by lot (splitmix64).
struct Lot(u64);

impl Lot {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Above 0 and at most 1.
    fn unit(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit exactly")]
        let bits = (self.next() >> 11) as f64;
        (bits + 1.0) / 9_007_199_254_740_992.0
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -self.unit().ln() * mean
    }

    /// A Gamma number of shape one half and this mean: half the square of a normal one.
    fn gamma(&mut self, mean: f64) -> f64 {
        let normal = (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos();
        normal * normal * mean
    }
}

const MINUTE: f64 = 60_000.0;
const DAY: f64 = 1440.0 * MINUTE;

/// A trace of `days` with `workloads`, each asked for at another mean rate.
pub fn generate(shape: Shape, workloads: u32, days: u32, seed: u64) -> Trace {
    let mut requests = Vec::new();
    for workload in 0..workloads {
        let mut lot = Lot(seed ^ (u64::from(workload) << 32));
        // From one in two minutes to one in some hours.
        let mean_gap = 2.0 * MINUTE * 1.6_f64.powi(i32::try_from(workload % 10).unwrap_or(0));
        let end = f64::from(days) * DAY;
        let mut at = lot.exponential(mean_gap);
        let mut rate = (0.0, 1.0);
        while at < end {
            requests.push(Request {
                at_ms: whole(at),
                workload,
                service_ms: whole(5_000.0 + lot.exponential(15_000.0)),
            });
            at += match shape {
                Shape::Bursts => {
                    if at >= rate.0 {
                        rate = (at + 15.0 * MINUTE, lot.gamma(1.0).max(0.02));
                    }
                    lot.exponential(mean_gap / rate.1).min(15.0 * MINUTE + lot.exponential(mean_gap))
                }
                Shape::Diurnal => {
                    let day = 1.0 + 0.95 * (std::f64::consts::TAU * at / DAY).sin();
                    lot.exponential(mean_gap / day)
                }
                Shape::OnOff if lot.unit() < 0.9 => lot.exponential(0.5 * MINUTE),
                Shape::OnOff => lot.exponential(mean_gap * 10.0),
                Shape::FlashCrowd => {
                    let crowded = (end * 0.4..end * 0.4 + 30.0 * MINUTE).contains(&at);
                    lot.exponential(if crowded { mean_gap / 20.0 } else { mean_gap * 5.0 })
                }
            };
        }
    }
    requests.sort_unstable();
    let first = requests.first().map_or(0, |request| request.at_ms);
    for request in &mut requests {
        request.at_ms -= first;
    }
    Trace { workloads: (0..workloads).map(|n| format!("made-up/{n}")).collect(), requests }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "milliseconds of some days")]
const fn whole(ms: f64) -> u64 {
    ms.max(0.0) as u64
}
