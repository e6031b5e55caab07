//! Frames on a stream of the control plane: however the bytes come, the same frames are read, and what was read
//! can be written.

#![no_main]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use darter_agent::swarm::frame::{self, FRAME_MAX, FrameError};
use darter_api::v1;
use futures_util::AsyncRead;
use libfuzzer_sys::fuzz_target;

/// A stream that gives at most so many bytes at a time.
struct Drip<'a>(&'a [u8], usize);

impl AsyncRead for Drip<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let count = buffer.len().min(self.1).min(self.0.len());
        let (now, rest) = self.0.split_at(count);
        buffer[..count].copy_from_slice(now);
        self.0 = rest;
        Poll::Ready(Ok(count))
    }
}

/// All frames up to the first that is none, and how many bytes were left then.
async fn read(mut stream: Drip<'_>) -> (Vec<v1::frame::Kind>, usize, bool) {
    let mut kinds = Vec::new();
    loop {
        match frame::read(&mut stream).await {
            Ok(kind) => kinds.push(kind),
            Err(FrameError::Bad(_)) => return (kinds, stream.0.len(), true),
            Err(FrameError::Stream(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "the stream only ends");
                return (kinds, stream.0.len(), false);
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((step, bytes)) = bytes.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let at_once = read(Drip(bytes, usize::MAX)).await;
        assert_eq!(read(Drip(bytes, usize::from(*step).max(1))).await, at_once, "in steps of {step}");
        let (kinds, left, is_bad) = at_once;
        assert!(left == 0 || is_bad, "{left} bytes were left unread");
        let mut written = Vec::new();
        for kind in &kinds {
            let frame = v1::Frame { kind: Some(kind.clone()) };
            // A number that came short may be long in its one form: only such a frame can outgrow its bound.
            assert!(frame::append(&mut written, &frame) || bytes.len() > FRAME_MAX / 2);
        }
        assert_eq!(read(Drip(&written, usize::MAX)).await, (kinds, 0, false), "what was read can be written");
    });
});
