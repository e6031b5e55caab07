//! Sizes, rates, durations and shares: a number, one unit, and the value that both make.

#![no_main]

use darter_core::units::{Rate, Seconds, Share, Size};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(size) = text.parse::<Size>() {
        assert_eq!(u128::from(size.0), bytes(text), "{text:?}");
        assert_eq!(size.to_string().parse(), Ok(size), "{text:?}");
    }
    if let Ok(rate) = text.parse::<Rate>() {
        let size = text.strip_suffix("/s").expect("a rate is per second");
        assert!(rate.0 > 0 && u128::from(rate.0) == bytes(size), "{text:?}");
        assert_eq!(rate.to_string().parse(), Ok(rate), "{text:?}");
    }
    if let Ok(duration) = text.parse::<Seconds>() {
        assert_eq!(duration.0.as_millis(), milliseconds(text), "{text:?}");
        assert_eq!(duration.to_string().parse(), Ok(duration), "{text:?}");
    }
    if let Ok(share) = text.parse::<Share>() {
        assert_eq!(share.to_string().parse(), Ok(share), "{text:?}");
        for whole in [0, 199, 1 << 40, u64::MAX] {
            assert_eq!(
                u128::from(share.of(whole)),
                u128::from(whole) * u128::from(share.0) / 100,
                "{text:?} of {whole}"
            );
        }
    }
});

/// The number and the unit of a text that is a quantity: digits, then letters.
fn parts(text: &str) -> (u128, &str) {
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).expect("a quantity has a unit");
    let (number, unit) = text.split_at(unit);
    (number.trim().parse().expect("a quantity starts with a number"), unit)
}

fn bytes(text: &str) -> u128 {
    let (number, unit) = parts(text);
    let powers =
        |base: u128| ["", "K", "M", "G", "T"].iter().zip(0u32..).map(move |(letter, n)| (*letter, base.pow(n)));
    let binary = powers(1024).skip(1).map(|(letter, factor)| (format!("{letter}iB"), factor));
    let decimal = powers(1000).map(|(letter, factor)| (format!("{letter}B").replace('K', "k"), factor));
    let (_, factor) = binary.chain(decimal).find(|(name, _)| name == unit).expect("a unit of size");
    number * factor
}

fn milliseconds(text: &str) -> u128 {
    if text.trim() == "0" {
        return 0;
    }
    let (number, unit) = parts(text);
    let minute = 60 * 1000;
    let factor = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => minute,
        "h" => 60 * minute,
        "d" => 24 * 60 * minute,
        other => panic!("{other} is no unit of time"),
    };
    number * factor
}
