//! Bytes as lower-case hex digits, the one spelling of names, values and signatures in texts.

/// The digits of `bytes`, two a byte.
pub fn encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// The bytes whose digits are given: exactly so many, lower case only. Two spellings of one name
/// would be two names wherever texts are compared.
pub fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (nibble(pair[0])? << 4) | nibble(pair[1])?;
    }
    Some(bytes)
}

const fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_one_spelling_of_the_right_length_is_read() {
        assert_eq!(decode("00ff"), Some([0x00, 0xff]));
        for wrong in ["", "00f", "00ff0", "00FF", "00fg", "0x00", "é0f"] {
            assert_eq!(decode::<2>(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn digits_and_bytes_say_the_same(bytes: [u8; 9]) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }

        #[test]
        fn what_is_read_is_written_the_same(text in "[0-9a-fA-F ]{0,8}") {
            if let Some(bytes) = decode::<3>(&text) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }
}
