//! A file of tokens and what each may, read again when it changes.
//!
//! Tokens are kept as their hashes: looking one up takes the same time whatever is wrong with it, and no dump of
//! memory has them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use darter_base::log::chain;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Denied, Granted, Wish, read};
use crate::clock::stopwatch;

/// Whether it changed is looked at so often, whoever asks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Shorter ones are guessed.
const TOKEN_MIN: usize = 16;

/// Why there are no tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error("cannot read {} (access.token_file)", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line of it makes no sense. Its text is not told: it has a token.
    #[error("{}:{line}: {message}", .path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

/// What one token may.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Right {
    /// As this node; none: as every node.
    Report(Option<String>),
    /// A workload, the workloads of a namespace (`ns/*`), or all (`*`).
    Demand(String),
    Freeze,
}

type Rights = BTreeMap<[u8; 32], Vec<Right>>;

/// The file, as it was when it was last looked at.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rights: Rights,
    changed: Option<SystemTime>,
    looked: Instant,
}

impl TokenFile {
    /// Reads it.
    pub fn open(path: &Path) -> Result<Self, TokenFileError> {
        let changed = changed(path);
        let state = State { rights: load(path)?, changed, looked: stopwatch() };
        Ok(Self { path: path.to_owned(), state: Mutex::new(state) })
    }

    /// Whether who has this token may.
    pub fn may(&self, token: &str, wish: &Wish) -> Result<Granted, Denied> {
        let hash = hash(token);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // One that is not known may just have been added.
        if state.looked.elapsed() >= LOOK_EVERY || !state.rights.contains_key(&hash) {
            self.look(&mut state);
        }
        let rights = state.rights.get(&hash).ok_or(Denied::BadToken)?;
        granted(rights, wish)
    }

    fn look(&self, state: &mut State) {
        state.looked = stopwatch();
        let changed = changed(&self.path);
        if changed == state.changed {
            return;
        }
        match load(&self.path) {
            Ok(rights) => {
                info!(path = %self.path.display(), tokens = rights.len(), "read the tokens again");
                (state.rights, state.changed) = (rights, changed);
            }
            // Told at each change, and those that were read before hold.
            Err(error) => {
                state.changed = changed;
                warn!(error = %chain(&error), "the tokens that were read before hold");
            }
        }
    }
}

fn granted(rights: &[Right], wish: &Wish) -> Result<Granted, Denied> {
    match wish {
        Wish::Report => {
            let found = rights.iter().find_map(|right| match right {
                Right::Report(node) => Some(Granted { node: node.clone() }),
                _ => None,
            });
            found.ok_or_else(|| Denied::Forbidden("this token may not report".to_owned()))
        }
        Wish::Demand(workload) => {
            let is_it = |pattern: &String| match pattern.strip_suffix('*') {
                Some(begin) => workload.starts_with(begin),
                None => pattern == workload,
            };
            let may = rights.iter().any(|right| matches!(right, Right::Demand(pattern) if is_it(pattern)));
            let no = || Denied::Forbidden(format!("this token may not say demand of {workload}"));
            may.then(Granted::default).ok_or_else(no)
        }
        Wish::Freeze => {
            let no = || Denied::Forbidden("this token may not freeze".to_owned());
            rights.contains(&Right::Freeze).then(Granted::default).ok_or_else(no)
        }
    }
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn changed(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|data| data.modified()).ok()
}

fn load(path: &Path) -> Result<Rights, TokenFileError> {
    let text = read(path).map_err(|source| TokenFileError::Read { path: path.to_owned(), source })?;
    parse(&text).map_err(|(line, message)| TokenFileError::Line { path: path.to_owned(), line, message })
}

fn parse(text: &str) -> Result<Rights, (usize, String)> {
    let mut rights = Rights::new();
    for (n, line) in text.lines().enumerate() {
        let wrong = |message: &str| (n + 1, message.to_owned());
        let mut words = line.split_whitespace();
        let Some(token) = words.next().filter(|token| !token.starts_with('#')) else { continue };
        if token.len() < TOKEN_MIN {
            return Err(wrong("a token has at least 16 characters"));
        }
        let of = words.map(right).collect::<Result<Vec<_>, _>>().map_err(|message| (n + 1, message))?;
        if of.is_empty() {
            return Err(wrong("a token without rights: report:<node>, demand:<namespace>/<workload> or freeze"));
        }
        if rights.insert(hash(token), of).is_some() {
            return Err(wrong("this token is there twice"));
        }
    }
    Ok(rights)
}

fn right(word: &str) -> Result<Right, String> {
    let wrong = || format!("`{word}` is no right: report:<node>, demand:<namespace>/<workload> or freeze");
    match word.split_once(':') {
        None if word == "freeze" => Ok(Right::Freeze),
        Some(("report", "*")) => Ok(Right::Report(None)),
        Some(("report", node)) if !node.is_empty() && !node.contains('*') => Ok(Right::Report(Some(node.to_owned()))),
        Some(("demand", "*")) => Ok(Right::Demand("*".to_owned())),
        Some(("demand", of)) => {
            let parts = of.split_once('/').filter(|(namespace, name)| {
                !namespace.is_empty()
                    && !namespace.contains('*')
                    && !name.is_empty()
                    && (*name == "*" || !name.contains('*'))
            });
            parts.map(|_| Right::Demand(of.to_owned())).ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# of a test\n0123456789abcdef report:gpu-1\n\nfedcba9876543210 demand:models/* freeze\n\
                        aaaaaaaaaaaaaaaa report:* demand:a/b\n";

    #[test]
    fn a_token_may_what_its_line_says_and_nothing_else() {
        let rights = parse(FILE).unwrap();
        let may = |token: &str, wish: Wish| match rights.get(&hash(token)) {
            Some(rights) => granted(rights, &wish).map_err(|denied| denied.word()),
            None => Err(Denied::BadToken.word()),
        };
        let of = |node: Option<&str>| Ok(Granted { node: node.map(ToOwned::to_owned) });
        assert_eq!(may("0123456789abcdef", Wish::Report), of(Some("gpu-1")));
        assert_eq!(may("aaaaaaaaaaaaaaaa", Wish::Report), of(None));
        assert_eq!(may("fedcba9876543210", Wish::Report), Err("forbidden"));
        assert_eq!(may("fedcba987654321", Wish::Freeze), Err("bad_token"));
        assert_eq!(may("fedcba9876543210", Wish::Demand("models/llm".to_owned())), of(None));
        assert_eq!(may("fedcba9876543210", Wish::Demand("models2/llm".to_owned())), Err("forbidden"));
        assert_eq!(may("aaaaaaaaaaaaaaaa", Wish::Demand("a/bc".to_owned())), Err("forbidden"));
        assert_eq!(may("0123456789abcdef", Wish::Freeze), Err("forbidden"));
    }

    #[test]
    fn a_line_that_makes_no_sense_is_named_and_its_token_is_not() {
        for (text, line, said) in [
            ("short report:a", 1, "16 characters"),
            ("\n0123456789abcdef", 2, "without rights"),
            ("0123456789abcdef root", 1, "`root` is no right"),
            ("0123456789abcdef report:gpu-*", 1, "no right"),
            ("0123456789abcdef demand:*/x", 1, "no right"),
            ("0123456789abcdef freeze\n0123456789abcdef freeze", 2, "twice"),
        ] {
            let (at, message) = parse(text).unwrap_err();
            assert!(at == line && message.contains(said) && !message.contains("0123456789abcdef"), "{text}: {message}");
        }
    }

    #[test]
    fn a_file_that_changed_is_read_again_and_one_that_became_wrong_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        assert!(matches!(TokenFile::open(&path), Err(TokenFileError::Read { .. })));
        let write = |text: &str, seconds| {
            std::fs::write(&path, text).unwrap();
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(at).unwrap();
        };
        write("0123456789abcdef freeze\n", 1);
        let file = TokenFile::open(&path).unwrap();
        assert!(file.may("0123456789abcdef", &Wish::Freeze).is_ok());
        assert_eq!(file.may("fedcba9876543210", &Wish::Freeze), Err(Denied::BadToken));
        write("fedcba9876543210 freeze\n", 2);
        assert!(file.may("fedcba9876543210", &Wish::Freeze).is_ok(), "a new token works at once");
        assert_eq!(file.may("0123456789abcdef", &Wish::Freeze), Err(Denied::BadToken));
        write("nonsense\n", 3);
        assert_eq!(file.may("0123456789abcdef", &Wish::Freeze), Err(Denied::BadToken));
        assert!(file.may("fedcba9876543210", &Wish::Freeze).is_ok());
    }
}
