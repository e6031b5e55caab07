//! Sizes, rates and durations as people write them in a configuration: `100GiB`, `50MB/s`, `200ms`.
//!
//! A bare number is refused: nobody can tell seconds from milliseconds by looking at it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error("`{0}` is not a size: expected a number with a unit, such as 512MiB, 100GiB or 40GB")]
    Size(String),
    /// Not a rate.
    #[error("`{0}` is not a rate: expected a size per second, such as 100MB/s or 1GiB/s")]
    Rate(String),
    /// Not a duration.
    #[error("`{0}` is not a duration: expected a number with a unit, such as 200ms, 5s, 10m or 12h")]
    Duration(String),
    /// Not a percentage.
    #[error("`{0}` is not a share: expected a percentage from 0% to 100%, such as 15%")]
    Share(String),
}

macro_rules! quantity {
    ($type:ident, $inner:ty) => {
        impl TryFrom<String> for $type {
            type Error = UnitError;

            fn try_from(text: String) -> Result<Self, UnitError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);
quantity!(Size, u64);

const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

impl FromStr for Size {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Size(text.to_owned());
        let (unit, factor) = SIZE_UNITS.iter().find(|(unit, _)| text.ends_with(unit)).ok_or_else(wrong)?;
        let number = whole(text.strip_suffix(unit).unwrap_or(text)).ok_or_else(wrong)?;
        number.checked_mul(*factor).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = SIZE_UNITS.iter().find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor));
        let (unit, factor) = exact.copied().unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

/// A number of bytes per second.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate(pub u64);
quantity!(Rate, u64);

impl FromStr for Rate {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let size = text.strip_suffix("/s").and_then(|size| size.parse::<Size>().ok()).filter(|size| size.0 > 0);
        size.map(|size| Self(size.0)).ok_or_else(|| UnitError::Rate(text.to_owned()))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Size(self.0))
    }
}

/// A length of time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Seconds(pub Duration);
quantity!(Seconds, Duration);

const TIME_UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

impl FromStr for Seconds {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        // Nothing is nothing in every unit.
        if text.trim() == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let wrong = || UnitError::Duration(text.to_owned());
        let (unit, factor) = TIME_UNITS.iter().find(|(unit, _)| text.ends_with(unit)).ok_or_else(wrong)?;
        let number = whole(text.strip_suffix(unit).unwrap_or(text)).ok_or_else(wrong)?;
        number.checked_mul(*factor).map(|ms| Self(Duration::from_millis(ms))).ok_or_else(wrong)
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        let exact = TIME_UNITS
            .iter()
            .rev()
            .find(|(_, factor)| ms >= u128::from(*factor) && ms.is_multiple_of(u128::from(*factor)));
        let (unit, factor) = exact.copied().unwrap_or(("ms", 1));
        write!(f, "{}{unit}", ms / u128::from(factor))
    }
}

/// A share of a whole, in percent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share(pub u8);
quantity!(Share, u8);

impl Share {
    /// This share of `whole`, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        whole / 100 * u64::from(self.0) + whole % 100 * u64::from(self.0) / 100
    }
}

impl FromStr for Share {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let percent = text.strip_suffix('%').and_then(whole).and_then(|n| u8::try_from(n).ok()).filter(|n| *n <= 100);
        percent.map(Self).ok_or_else(|| UnitError::Share(text.to_owned()))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

fn whole(text: &str) -> Option<u64> {
    let text = text.trim();
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_mean_what_they_say() {
        assert_eq!("40GB".parse(), Ok(Size(40_000_000_000)));
        assert_eq!("2 GiB".parse(), Ok(Size(2 << 30)));
        assert_eq!("0B".parse(), Ok(Size(0)));
        assert_eq!("100MB/s".parse(), Ok(Rate(100_000_000)));
        assert_eq!("200ms".parse(), Ok(Seconds(Duration::from_millis(200))));
        assert_eq!("0".parse(), Ok(Seconds(Duration::ZERO)));
        assert_eq!("12h".parse(), Ok(Seconds(Duration::from_secs(43_200))));
        assert_eq!("15%".parse::<Share>().map(|share| share.of(1_000)), Ok(150));
    }

    #[test]
    fn a_number_without_its_unit_is_refused() {
        for text in ["", "5", "-5s", "5 parsecs", "1.5s", "s", "99999999999999999999d"] {
            assert!(text.parse::<Seconds>().is_err(), "{text}");
        }
        for text in ["", "5", "5G", "5gib", "-1B", "B", "99999999999TiB", "5MiB/s", "5GiBGiB", "5BB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for text in ["", "5MB", "0B/s", "5/s", "5MB/m"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        for text in ["", "15", "101%", "-1%", "%"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_and_value_are_the_same(bytes: u64, ms in 0u64..1 << 50) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
            let duration = Seconds(Duration::from_millis(ms));
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }
    }
}
