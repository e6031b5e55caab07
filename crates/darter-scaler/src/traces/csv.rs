//! Fields between commas, some of them in quotes.

/// The fields of a line. A quoted one may hold commas, and two quotes for one.
pub(super) fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.trim_end_matches(['\r', '\n']).chars().peekable();
    while let Some(found) = chars.next() {
        let field = fields.len() - 1;
        match found {
            '"' if quoted && chars.peek() == Some(&'"') => {
                fields[field].push('"');
                chars.next();
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            other => fields[field].push(other),
        }
    }
    fields
}

/// A decimal number in thousandths: `0.09` is 90. None where it is no number, or a negative one.
pub(super) fn milli(text: &str) -> Option<u64> {
    let (whole, fraction) = text.trim().split_once('.').unwrap_or_else(|| (text.trim(), ""));
    // Python writes very small ones so.
    if fraction.contains(['e', 'E']) || whole.contains(['e', 'E']) {
        return text.trim().to_ascii_lowercase().contains("e-").then_some(0);
    }
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let mut thousandths = 0;
    let mut rest = fraction.bytes();
    for place in [100, 10, 1] {
        thousandths += rest.next().map_or(0, |digit| u64::from(digit - b'0') * place);
    }
    // Half up by the next digit, so that 0.0899… is 90 thousandths.
    thousandths += u64::from(rest.next().is_some_and(|digit| digit >= b'5'));
    whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(thousandths)
}

/// `2024-11-15 16:57:50`, with or without a fraction, in milliseconds since 1970. None where it is none.
pub(super) fn moment(text: &str) -> Option<u64> {
    let (date, time) = text.trim().split_once([' ', 'T'])?;
    let mut parts = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let mut parts = time.trim_end_matches('Z').splitn(3, ':');
    let (hour, minute) = (parts.next()?.parse::<u64>().ok()?, parts.next()?.parse::<u64>().ok()?);
    let seconds = milli(parts.next()?)?;
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || seconds > 60_999 {
        return None;
    }
    let days = u64::try_from(days(year, month, day)).ok()?;
    Some(((days * 24 + hour) * 60 + minute) * 60_000 + seconds)
}

/// Days from 1970-01-01. Years begin in March here, so that a leap day is the last of one.
const fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap + (month * 153 + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_moments_are_read_exactly() {
        assert_eq!(milli("0.09000000000000001"), Some(90));
        assert_eq!(milli("0.11999999999999987"), Some(120));
        assert_eq!(milli("39010.0"), Some(39_010_000));
        assert_eq!(milli("-1"), None);
        assert_eq!(milli("NaN"), None);
        assert_eq!(moment("1970-01-01 00:00:00"), Some(0));
        assert_eq!(moment("2023-11-16 18:17:03.9799600"), Some(1_700_158_623_980));
        assert_eq!(moment("2024-02-29T23:59:59Z"), Some(1_709_251_199_000));
        assert_eq!(moment("yesterday"), None);
    }

    #[test]
    fn commas_in_quotes_end_no_field() {
        assert_eq!(
            fields("a,\"[{'x': 1, 'y': 2}]\",,\"say \"\"b\"\"\"\r"),
            ["a", "[{'x': 1, 'y': 2}]", "", "say \"b\""]
        );
    }
}
