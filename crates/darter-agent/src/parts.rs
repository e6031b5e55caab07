//! The long tasks of the agent: the first to end stops the rest, and none can keep the agent alive.

use std::time::Duration;

use futures_util::future::select_all;
use tokio::task::{JoinError, JoinHandle};
use tracing::{error, warn};

/// One long task.
pub struct Part {
    name: &'static str,
    task: JoinHandle<()>,
    ended: bool,
}

impl Part {
    /// Starts it.
    pub fn start(name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { name, task: tokio::spawn(task), ended: false }
    }

    async fn end(&mut self) -> &'static str {
        if !self.ended {
            let ended = (&mut self.task).await;
            self.note(ended);
        }
        self.name
    }

    fn note(&mut self, ended: Result<(), JoinError>) {
        self.ended = true;
        if let Err(error) = ended {
            error!(part = self.name, %error, "a part of the agent panicked");
        }
    }

    /// Waits for its end after it was told to stop; one that does not obey is ended.
    pub async fn finish(mut self, within: Duration) {
        if self.ended {
            return;
        }
        match tokio::time::timeout(within, &mut self.task).await {
            Ok(ended) => self.note(ended),
            Err(_) => {
                warn!(part = self.name, ?within, "a part of the agent does not stop; going on without it");
                self.task.abort();
            }
        }
    }
}

/// Waits until one of them ends, and says which.
pub async fn first_end(parts: impl IntoIterator<Item = &mut Part>) -> &'static str {
    let ends: Vec<_> = parts.into_iter().map(|part| Box::pin(part.end())).collect();
    select_all(ends).await.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_part_that_ended_early_is_named_and_not_waited_for_again() {
        let mut lasting = Part::start("lasting", std::future::pending());
        let mut brief = Part::start("brief", std::future::ready(()));
        assert_eq!(first_end([&mut lasting, &mut brief]).await, "brief");
        // Both return: the one that ended at once, the other after its time.
        brief.finish(Duration::from_secs(600)).await;
        lasting.finish(SOON).await;
    }

    #[tokio::test]
    async fn a_part_that_panics_has_ended_too() {
        let mut part = Part::start("panics", async { panic!("on purpose, for this test") });
        assert_eq!(first_end([&mut part]).await, "panics");
        part.finish(Duration::from_secs(600)).await;
    }
}
