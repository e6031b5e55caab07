//! One screen that is drawn anew: the terminal's second one, so that leaving it brings back the first.

use std::io::{Write as _, stdout};

use anyhow::{Context as _, Result};

/// To the second screen, and back.
const ENTER: &str = "\x1b[?1049h";
const LEAVE: &str = "\x1b[?1049l";
/// Draws over what is there, so that nothing flickers: home, the rest of a line, the rest of the screen.
const HOME: &str = "\x1b[H";
const LINE: &str = "\x1b[K\n";
const REST: &str = "\x1b[J";

/// The second screen, as long as this lives.
pub(super) struct Screen;

impl Screen {
    pub(super) fn open() -> Result<Self> {
        put(ENTER)?;
        Ok(Self)
    }

    /// Shows the beginning of a text: as many lines as there is room for.
    pub(super) fn draw(&self, text: &str) -> Result<()> {
        let size = console::Term::stdout().size_checked().map(|(rows, columns)| (rows.into(), columns.into()));
        put(&picture(text, size))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone has nothing to be put back.
        let _ = put(LEAVE);
    }
}

fn put(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot draw on the terminal")
}

/// What draws a text on a screen of so many rows and columns.
fn picture(text: &str, size: Option<(usize, usize)>) -> String {
    let (mut room, columns) = size.unwrap_or((usize::MAX, usize::MAX));
    let mut drawn = vec![];
    for line in text.lines() {
        let rows = console::strip_ansi_codes(line).chars().count().div_ceil(columns.max(1)).max(1);
        if rows > room {
            break;
        }
        room -= rows;
        drawn.push(line);
    }
    format!("{HOME}{}\x1b[K{REST}", drawn.join(LINE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_left_out_at_the_end_and_the_top_stays() {
        assert_eq!(picture("one\ntwo\nthree\n", None), "\x1b[Hone\x1b[K\ntwo\x1b[K\nthree\x1b[K\x1b[J");
        assert_eq!(picture("one\ntwo\nthree\n", Some((2, 80))), "\x1b[Hone\x1b[K\ntwo\x1b[K\x1b[J");
        // The first takes two rows; colours take none.
        let coloured = "\x1b[31mabcdef\x1b[0m\n\x1b[31mabcd\x1b[0m\nx\n";
        let wanted = "\x1b[H\x1b[31mabcdef\x1b[0m\x1b[K\n\x1b[31mabcd\x1b[0m\x1b[K\x1b[J";
        assert_eq!(picture(coloured, Some((3, 4))), wanted);
    }
}
