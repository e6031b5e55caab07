//! The agents that listen, by their nodes' names: what is asked of a node goes over the stream that its agent
//! opened last.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use darter_api::report::{Directive, PrewarmImages, Protect};
use tokio::sync::mpsc;
use tonic::Status;

/// Directives that wait for one agent: that its report was taken, and what is asked of it. One that reads none
/// of so many is not there.
pub(super) const WAITING_MAX: usize = 16;
/// Bytes of a reason.
const REASON_MAX: usize = 256;
/// Images of one directive.
const IMAGES_MAX: usize = 16;

/// What comes out of a stream.
pub(super) type Said = Result<Directive, Status>;

/// All of them.
#[derive(Debug, Default)]
pub struct Lines {
    open: Mutex<BTreeMap<String, Line>>,
    numbers: AtomicU64,
}

/// One stream.
#[derive(Debug, Clone)]
struct Line {
    number: u64,
    sender: mpsc::Sender<Said>,
    /// Of the last directive that asked for something, on this stream.
    sequence: Arc<AtomicU64>,
    /// The images that were asked for: each directive names all.
    images: Arc<Mutex<Vec<String>>>,
}

/// Why a node was not asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAsked {
    /// No agent listens.
    Away,
    /// It does not read.
    Full,
}

impl Lines {
    /// A number that no other stream has.
    pub(super) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The stream of this node is this one. One that it had before is ended.
    pub(super) fn open(&self, node: &str, number: u64, sender: &mpsc::Sender<Said>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(node).is_some_and(|line| line.number == number) {
            return;
        }
        let (sequence, images) = (Arc::default(), Arc::default());
        let before = open.insert(node.to_owned(), Line { number, sender: sender.clone(), sequence, images });
        if let Some(before) = before {
            // If it reads nothing it ends by itself.
            let _ = before.sender.try_send(Err(Status::aborted("the agent of this node opened another stream")));
        }
    }

    /// This stream ended.
    pub(super) fn close(&self, node: &str, number: u64) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(node).is_some_and(|line| line.number == number) {
            open.remove(node);
        }
    }

    /// Asks a node's agent to hold its removal off.
    pub fn protect(&self, node: &str, for_ms: u64, reason: &str) -> Result<(), NotAsked> {
        let reason = clip(reason, REASON_MAX).to_owned();
        let protect = Some(Protect { for_ms, reason });
        self.line(node)?.ask(Directive { protect, ..Directive::default() })
    }

    /// Asks it to bring an image, besides those that it was asked for.
    pub fn bring(&self, node: &str, image: &str) -> Result<(), NotAsked> {
        let line = self.line(node)?;
        let images = {
            let mut images = line.images.lock().unwrap_or_else(PoisonError::into_inner);
            images.retain(|other| other != image);
            if images.len() >= IMAGES_MAX {
                images.remove(0);
            }
            images.push(image.to_owned());
            images.clone()
        };
        line.ask(Directive { prewarm: Some(PrewarmImages { images }), ..Directive::default() })
    }

    fn line(&self, node: &str) -> Result<Line, NotAsked> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(node).cloned().ok_or(NotAsked::Away)
    }
}

impl Line {
    fn ask(&self, directive: Directive) -> Result<(), NotAsked> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        self.sender.try_send(Ok(Directive { sequence, ..directive })).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => NotAsked::Full,
            mpsc::error::TrySendError::Closed(_) => NotAsked::Away,
        })
    }
}

/// The beginning of a text, if it is long.
fn clip(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_goes_over_the_newest_stream_and_names_all_images_each_time() {
        let lines = Lines::default();
        let ((old, mut old_said), (new, mut new_said)) = (mpsc::channel(4), mpsc::channel(3));
        assert_eq!(lines.protect("a", 5, "why"), Err(NotAsked::Away));
        lines.open("a", 1, &old);
        lines.open("a", 2, &new);
        assert_eq!(old_said.try_recv().unwrap().unwrap_err().code(), tonic::Code::Aborted);
        lines.close("a", 1);
        assert_eq!(lines.protect("a", 5, &"ä".repeat(200)), Ok(()));
        assert_eq!((lines.bring("a", "r/x@1"), lines.bring("a", "r/y@2")), (Ok(()), Ok(())));
        assert_eq!(lines.bring("a", "r/z@3"), Err(NotAsked::Full));
        let said: Vec<_> = std::iter::from_fn(|| new_said.try_recv().ok()).map(Result::unwrap).collect();
        assert_eq!(said.iter().map(|directive| directive.sequence).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(said[0].protect.as_ref().unwrap().reason.len(), REASON_MAX);
        assert_eq!(said[2].prewarm.as_ref().unwrap().images, ["r/x@1", "r/y@2"]);
        lines.close("a", 2);
        assert_eq!(lines.protect("a", 5, "why"), Err(NotAsked::Away));
    }
}
