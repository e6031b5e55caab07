//! The signed URLs that a registry redirects blobs to, used again while they are good.
//!
//! ECR counts each redirect as a GetDownloadUrlForLayer, of which an account has 3,000 a second;
//! four ranges of a layer need one. A signed URL opens its blob for whoever has it, so it is kept
//! for the credential and repository it was given for, and shown to nobody.

use std::time::Duration;

use darter_core::Digest;
use darter_core::access::CredentialKey;
use http::Uri;
use tokio::time::Instant;

use super::url::query;

/// Blobs whose URLs are kept, of up to 3 KiB each: those of the images that a node starts at once.
pub(super) const SIGNED_MAX: usize = 1024;
/// A URL that does not say how long it is good.
const LIFETIME: Duration = Duration::from_secs(5 * 60);
/// No URL is kept for longer, whatever it says.
const LIFETIME_MAX: Duration = Duration::from_secs(60 * 60);

/// What a signed URL was given for.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Which of the registry's origins: its root.
    pub(super) origin: String,
    pub(super) repository: String,
    pub(super) digest: Digest,
    pub(super) credential: CredentialKey,
}

/// Where a blob comes from.
#[derive(Clone)]
pub(super) enum Known {
    /// The registry sends it.
    Direct,
    /// A signed URL does.
    Signed { uri: Uri, until: Instant },
}

impl Known {
    pub(super) fn signed(uri: Uri, now: Instant) -> Self {
        let until = now + lifetime(&uri);
        Self::Signed { uri, until }
    }

    /// Whether to use it now; not if it is `refused`, which the storage did not take.
    pub(super) fn is_good(&self, now: Instant, refused: Option<&Uri>) -> bool {
        match self {
            Self::Direct => true,
            Self::Signed { uri, until } => *until > now && Some(uri) != refused,
        }
    }
}

/// How long a URL is good, a tenth early: a response that starts in time may go on.
fn lifetime(uri: &Uri) -> Duration {
    let seconds = ["X-Amz-Expires", "X-Goog-Expires"].into_iter().find_map(|name| query(uri, name)?.parse().ok());
    seconds.map_or(LIFETIME, Duration::from_secs).min(LIFETIME_MAX) * 9 / 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signed_url_is_used_while_it_is_good() {
        let uri: Uri = "https://s3.example/k?X-Amz-Expires=100&X-Amz-Signature=s".parse().unwrap();
        let t0 = Instant::now();
        let known = Known::signed(uri.clone(), t0);
        assert!(known.is_good(t0 + Duration::from_secs(89), None));
        assert!(!known.is_good(t0 + Duration::from_secs(90), None), "about to end");
        assert!(!known.is_good(t0, Some(&uri)), "the storage refused it");
        let plain = Known::signed("https://cdn.example/k".parse().unwrap(), t0);
        assert!(!plain.is_good(t0 + LIFETIME, None));
    }
}
