//! The token of the agent's service account, as the kubelet renews it.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tracing::debug;

use crate::watch::Watch;

/// A token has some 1200 bytes.
const BYTES_MAX: u64 = 64 * 1024;
/// How often the file is looked at, though nothing was heard of it: some mounts tell nothing.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// What was in the file.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Token(String);

impl Token {
    /// Reads it.
    ///
    /// # Errors
    /// Why it cannot be, for people; never with any of it.
    pub(super) async fn read(file: &Path) -> Result<Self, String> {
        let path = file.to_owned();
        let read = move || {
            let mut text = String::new();
            std::fs::File::open(&path)?.take(BYTES_MAX).read_to_string(&mut text)?;
            Ok::<_, std::io::Error>(text)
        };
        let read = tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other).and_then(|read| read);
        let cannot = |why: String| {
            format!(
                "cannot use {} (report.token_file): {why}; mount the service account's token there, or set \
                report.token_file = \"\" where the scaler asks for none",
                file.display()
            )
        };
        let text = read.map_err(|error| cannot(error.to_string()))?;
        let token = text.trim();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(cannot("it is empty, or no token".to_owned()));
        }
        Ok(Self(token.to_owned()))
    }

    /// For the head of a request; hidden from logs.
    pub(super) fn bearer(&self) -> Option<MetadataValue<Ascii>> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", self.0).parse().ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Resolves once the file has another token. One that cannot be read has none.
    pub(super) async fn changed(&self, file: &Path) {
        let mut watch = Watch::new().inspect_err(|error| debug!(%error, "cannot watch the token's directory")).ok();
        let dirs: Vec<PathBuf> = file.parent().map(Path::to_owned).into_iter().collect();
        loop {
            // Before the look: a change after it is heard.
            if let Some(watch) = &mut watch {
                watch.cover(&dirs);
            }
            if Self::read(file).await.is_ok_and(|token| token != *self) {
                return;
            }
            let heard = async {
                match &mut watch {
                    Some(watch) => watch.changed().await.is_ok(),
                    None => std::future::pending().await,
                }
            };
            if tokio::time::timeout(LOOK_EVERY, heard).await == Ok(false) {
                watch = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_that_is_replaced_as_the_kubelet_does_it_is_seen_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        for (name, token) in [("one", "first\n"), ("two", "second\n")] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("token"), token).unwrap();
        }
        std::os::unix::fs::symlink("one", dir.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/token", &file).unwrap();
        let token = Token::read(&file).await.unwrap();
        let (changed, swap) = (token.changed(&file), async {
            std::os::unix::fs::symlink("two", dir.path().join("new")).unwrap();
            std::fs::rename(dir.path().join("new"), dir.path().join("..data")).unwrap();
        });
        let both = async { tokio::join!(changed, swap) };
        tokio::time::timeout(LOOK_EVERY / 2, both).await.expect("before the timer");
        let second = Token::read(&file).await.unwrap();
        assert!(second != token && second.bearer().unwrap().is_sensitive());
        assert_eq!(format!("{:?}", second.bearer().unwrap()), "Sensitive");
    }

    #[tokio::test]
    async fn what_is_no_token_is_refused_without_a_word_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        assert!(Token::read(&file).await.err().unwrap().contains("report.token_file"));
        for text in ["", " \n", "two words"] {
            std::fs::write(&file, text).unwrap();
            let error = Token::read(&file).await.err().unwrap();
            assert!(error.contains("no token") && !error.contains("words"), "{error}");
        }
    }
}
