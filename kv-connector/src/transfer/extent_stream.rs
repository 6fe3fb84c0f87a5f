//! The stream that an extent, or the list of its places, leaves on.

use bytes::Bytes;
use quinn::{StoppedError, WriteError};

use crate::stream::StreamCode;
use crate::transfer::SendExtentError;

/// quinn finishes a stream that is dropped; here a dropped stream is an extent given up.
///
/// A reset also takes back what was written and not acknowledged, at once: when this has been dropped, the connection
/// refers to none of it any more.
pub(super) struct ExtentStream {
    stream: quinn::SendStream,
    is_done: bool,
}

impl ExtentStream {
    pub(super) fn new(stream: quinn::SendStream) -> Self {
        Self { stream, is_done: false }
    }

    pub(super) async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), SendExtentError> {
        self.stream.write_all_chunks(chunks).await.map_err(|error| match error {
            WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => SendExtentError::Refused,
            WriteError::ConnectionLost(error) => SendExtentError::ConnectionLost(error.into()),
        })
    }

    /// What was written will arrive, though this is dropped.
    pub(super) fn finish(mut self) -> Result<(), SendExtentError> {
        self.stream.finish().map_err(|_| SendExtentError::Refused)?;
        self.is_done = true;
        Ok(())
    }

    /// Resolves when all that was written has arrived; dropped before, it is given up.
    pub(super) async fn finish_and_arrive(mut self) -> Result<(), SendExtentError> {
        self.stream.finish().map_err(|_| SendExtentError::Refused)?;
        match self.stream.stopped().await {
            Ok(None) => {
                self.is_done = true;
                Ok(())
            }
            Ok(Some(_)) | Err(StoppedError::ZeroRttRejected) => Err(SendExtentError::Refused),
            Err(StoppedError::ConnectionLost(error)) => Err(SendExtentError::ConnectionLost(error.into())),
        }
    }
}

impl Drop for ExtentStream {
    fn drop(&mut self) {
        if !self.is_done {
            // Fails only if all of it has arrived, or the receiver stopped it already.
            let _ = self.stream.reset(StreamCode::Cancelled.code());
        }
    }
}
