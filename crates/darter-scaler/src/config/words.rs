//! Prices, days and times of the day, as people write them, in integers.

use serde::{Deserialize, Serialize};

use crate::fleet::known::thousandths;

/// An amount of money, in millionths of a dollar: `"0.526"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Dollars(pub u64);

impl TryFrom<String> for Dollars {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a price in dollars, such as 0.526");
        let (whole, rest) = text.split_once('.').unwrap_or((&text, ""));
        let padded: String = rest.chars().chain("000000".chars()).take(6).collect();
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(&padded) || text.ends_with('.') || rest.len() > 6 {
            return Err(wrong());
        }
        let (whole, part): (u64, u64) = (whole.parse().map_err(|_| wrong())?, padded.parse().map_err(|_| wrong())?);
        whole.checked_mul(1_000_000).and_then(|micros| micros.checked_add(part)).map(Self).ok_or_else(wrong)
    }
}

impl From<Dollars> for String {
    fn from(Dollars(micros): Dollars) -> Self {
        format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
    }
}

/// A decimal number above nothing, in thousandths: `"4"`, `"0.5"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Milli(pub u64);

impl TryFrom<String> for Milli {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let found = thousandths(&text).filter(|milli| *milli > 0).map(Self);
        found.ok_or_else(|| format!("`{text}` is not a number above nothing, such as 4 or 0.5"))
    }
}

impl From<Milli> for String {
    fn from(Milli(milli): Milli) -> Self {
        format!("{}.{:03}", milli / 1000, milli % 1000)
    }
}

/// Days of the week, bit 0 Monday: `"mon-fri"`, `"sat,sun"`, `"daily"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Days(pub u8);

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

impl TryFrom<String> for Days {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "daily" {
            return Ok(Self(0x7f));
        }
        let wrong = || format!("`{text}` are no days: expected such as mon-fri, sat,sun or daily");
        let day = |name: &str| DAYS.iter().position(|day| *day == name).ok_or_else(wrong);
        let mut bits = 0;
        for part in text.split(',') {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to) = (day(from)?, day(to)?);
            if to < from {
                return Err(wrong());
            }
            bits |= (from..=to).fold(0, |bits, day| bits | 1 << day);
        }
        Ok(Self(bits))
    }
}

impl From<Days> for String {
    fn from(Days(bits): Days) -> Self {
        let named: Vec<_> =
            DAYS.iter().enumerate().filter(|(day, _)| bits >> day & 1 == 1).map(|(_, name)| *name).collect();
        named.join(",")
    }
}

/// A minute of the day in UTC: `"08:00"`; `"24:00"` is its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Minute(pub u16);

impl TryFrom<String> for Minute {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a time of the day, such as 08:00 (UTC)");
        let (hour, minute) = text.split_once(':').filter(|(h, m)| h.len() == 2 && m.len() == 2).ok_or_else(wrong)?;
        let (hour, minute): (u16, u16) = (hour.parse().map_err(|_| wrong())?, minute.parse().map_err(|_| wrong())?);
        Some(Self(hour * 60 + minute)).filter(|found| minute < 60 && found.0 <= 1440).ok_or_else(wrong)
    }
}

impl From<Minute> for String {
    fn from(Minute(minute): Minute) -> Self {
        format!("{:02}:{:02}", minute / 60, minute % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_days_and_times_are_read_as_they_are_written_and_nothing_else_is() {
        let price = |text: &str| Dollars::try_from(text.to_owned()).ok().map(|dollars| dollars.0);
        assert_eq!(
            [price("0.526"), price("12"), price("0.0000001"), price("-1"), price("1e3"), price("")].as_slice(),
            [Some(526_000), Some(12_000_000), None, None, None, None]
        );
        let days = |text: &str| Days::try_from(text.to_owned()).ok().map(|days| days.0);
        assert_eq!(
            [days("mon-fri"), days("sat,sun"), days("daily"), days("fri-mon"), days("Mon")].as_slice(),
            [Some(0x1f), Some(0x60), Some(0x7f), None, None]
        );
        let minute = |text: &str| Minute::try_from(text.to_owned()).ok().map(|minute| minute.0);
        assert_eq!(
            [minute("08:30"), minute("24:00"), minute("24:01"), minute("8:00"), minute("07:60")].as_slice(),
            [Some(510), Some(1440), None, None, None]
        );
        assert_eq!(String::from(Days(0x41)), "mon,sun");
        assert_eq!(String::from(Minute(510)), "08:30");
    }
}
