//! Frames on a stream between two agents: a big-endian u32, the length, and that many bytes.
//!
//! Not here: what a frame says (`wire`).

use std::io;
use std::time::Duration;

use darter_api::v1;
use futures_util::{AsyncRead, AsyncReadExt};
use prost::Message as _;

use super::wire::WireError;

/// Longer frames are refused: the largest message within the bounds of `wire` has half of it.
pub const FRAME_MAX: usize = 1 << 20;
/// A frame that has begun is here whole by then, or its sender is stuck.
const FRAME_PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no next frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream broke or ended.
    #[error("the stream ended")]
    Stream(#[from] io::Error),
    /// The peer sent what no agent sends.
    #[error("a bad frame")]
    Bad(#[from] WireError),
}

/// Appends a frame to what is to be written. False, and nothing appended: it is too large.
pub fn append(buffer: &mut Vec<u8>, frame: &v1::Frame) -> bool {
    let length = frame.encoded_len();
    match u32::try_from(length) {
        Ok(prefix) if length <= FRAME_MAX => {
            buffer.extend_from_slice(&prefix.to_be_bytes());
            buffer.extend_from_slice(&frame.encode_to_vec());
            true
        }
        _ => false,
    }
}

/// Reads the next frame. Not cancel safe: a frame half read is lost.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<v1::frame::Kind, FrameError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let length = u32::from_be_bytes(prefix);
    if usize::try_from(length).is_ok_and(|length| length > FRAME_MAX) {
        let (found, max) = (length.into(), FRAME_MAX as u64);
        return Err(WireError::TooMuch { field: "a frame", found, max }.into());
    }
    // Grows with what arrives: a length alone costs nothing.
    let mut body = Vec::new();
    let mut stream = stream.take(length.into());
    let whole = tokio::time::timeout(FRAME_PATIENCE, stream.read_to_end(&mut body));
    whole.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if u32::try_from(body.len()) != Ok(length) {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let frame = v1::Frame::decode(body.as_slice()).map_err(WireError::from)?;
    Ok(frame.kind.ok_or(WireError::Unknown("a frame"))?)
}

#[cfg(test)]
mod tests {
    use futures_util::io::Cursor;
    use v1::frame::Kind;

    use super::*;

    fn peers(count: usize) -> v1::Frame {
        let addresses = vec![v1::Address { ip: vec![10, 0, 0, 1], port: 4002 }; count];
        v1::Frame { kind: Some(Kind::Peers(v1::Peers { addresses })) }
    }

    #[tokio::test]
    async fn frames_come_back_one_after_the_other() {
        let mut bytes = Vec::new();
        assert!(append(&mut bytes, &peers(1)) && append(&mut bytes, &peers(3)));
        let mut stream = Cursor::new(bytes);
        for count in [1, 3] {
            assert_eq!(Some(read(&mut stream).await.unwrap()), peers(count).kind);
        }
        assert!(matches!(read(&mut stream).await, Err(FrameError::Stream(_))));
    }

    #[tokio::test]
    async fn a_frame_past_the_bound_is_neither_written_nor_read() {
        let mut bytes = Vec::new();
        assert!(!append(&mut bytes, &peers(FRAME_MAX / 8)) && bytes.is_empty());
        bytes.extend_from_slice(&u32::MAX.to_be_bytes());
        let error = read(&mut Cursor::new(bytes)).await.unwrap_err();
        assert!(matches!(error, FrameError::Bad(WireError::TooMuch { .. })), "{error:?}");
    }

    #[tokio::test]
    async fn garbage_is_a_bad_frame_and_a_cut_one_a_broken_stream() {
        for (bytes, is_bad) in [
            (vec![0, 0, 0, 2, 255, 255], true),
            // No kind at all, which a later version's frame looks like.
            (vec![0, 0, 0, 0], true),
            (vec![0, 0, 0, 9, 1], false),
            (vec![0, 0], false),
        ] {
            let error = read(&mut Cursor::new(bytes.clone())).await.unwrap_err();
            assert_eq!(matches!(error, FrameError::Bad(_)), is_bad, "{bytes:?}: {error:?}");
        }
    }
}
