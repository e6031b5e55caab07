//! What the operating system allows this process.

use rustix::process::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// As many open files as may be: 10,000 connections need as many, and the soft limit is 1024 on most systems.
pub fn raise_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "cannot raise the limit of open files");
    }
}
