//! The two halves of a control stream: framed messages, and an end that means something.
//!
//! ```text
//! frame      u32 length, little-endian | that many bytes of common::wire encoding
//! end        finish: all was said      | reset (or the connection's end): cancelled
//! ```
//!
//! A half that is dropped cancels: the sender resets unless it finished, the receiver asks the other end
//! to stop. The other end notices within a round trip, through [`ControlSender::stopped`] and
//! [`ControlReceiver::recv`].

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use common::wire::{self, CodecError, FRAME_BYTES_MAX, Message};
use quinn::{ReadError, VarInt, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::accounting::Held;
use crate::link::{CloseReason, Link};

const LENGTH_BYTES: usize = 4;
/// Bytes taken from the connection at a time.
const READ_BYTES: usize = 64 << 10;
/// Frames up to this size are received without asking for a share of the node's frame memory.
const SMALL_FRAME_BYTES: usize = 64 << 10;
/// Unit of the frame memory.
const BUDGET_UNIT_BYTES: usize = 1 << 10;

/// Why a stream was reset or stopped, as its error code on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamCode {
    /// Whoever dropped it no longer wants it.
    Cancelled,
    /// This role may not open such a stream here.
    NotAllowed,
    /// Too many streams wait.
    Overloaded,
    /// What arrived is not a message.
    Malformed,
    /// An extent was refused.
    Refused,
    /// An extent is not fetched now: its bytes are wanted.
    Busy,
}

impl StreamCode {
    pub(crate) fn code(self) -> VarInt {
        VarInt::from_u32(match self {
            StreamCode::Cancelled => 1,
            StreamCode::NotAllowed => 2,
            StreamCode::Overloaded => 3,
            StreamCode::Malformed => 4,
            StreamCode::Refused => 5,
            StreamCode::Busy => 6,
        })
    }

    fn meaning(code: VarInt) -> &'static str {
        match code.into_inner() {
            1 => "cancelled",
            2 => "this role may not open such a stream there",
            3 => "too many streams wait there",
            4 => "it could not read what was sent",
            5 => "refused",
            6 => "it has no room to fetch it now",
            _ => "for a reason this version does not know",
        }
    }
}

/// A message that could not be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Too large, or not encodable.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The other end no longer reads.
    #[error("the other end stopped reading ({reason})")]
    Stopped {
        /// What it said.
        reason: &'static str,
    },
    /// Finished or reset here already.
    #[error("the stream was ended here before this message")]
    Ended,
    /// The connection is gone.
    #[error("the connection was lost: {0}")]
    ConnectionLost(CloseReason),
}

/// A message that could not be received.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecvError {
    /// The other end cancelled.
    #[error("the other end reset the stream ({reason})")]
    Reset {
        /// What it said.
        reason: &'static str,
    },
    /// A frame over the limit, or not the message that belongs here. The stream was stopped.
    #[error(transparent)]
    Malformed(#[from] CodecError),
    /// The stream finished inside a frame.
    #[error("the stream ended after {found} of a frame's {expected} bytes: the other end is broken")]
    Truncated {
        /// Bytes that were there.
        found: usize,
        /// Bytes of the frame, its length included.
        expected: usize,
    },
    /// A frame began and did not end in time. The stream was stopped.
    #[error("the rest of a frame did not arrive within {0:?}")]
    TimedOut(Duration),
    /// The connection is gone.
    #[error("the connection was lost: {0}")]
    ConnectionLost(CloseReason),
}

/// What both halves of one stream share; the stream counts as open until both are gone. It also keeps
/// the link alive.
pub(crate) struct StreamHold {
    _held: Held,
    _link: Option<Link>,
}

impl StreamHold {
    pub(crate) fn new(held: Held, link: Option<Link>) -> Arc<Self> {
        Arc::new(Self { _held: held, _link: link })
    }
}

/// Bounds that all receivers of a fabric share.
#[derive(Clone)]
pub(crate) struct FrameBudget {
    units: Arc<Semaphore>,
    deadline: Duration,
}

impl FrameBudget {
    /// `num_bytes` of large frames at a time; at least one frame of the largest size.
    pub(crate) fn new(num_bytes: usize, deadline: Duration) -> Self {
        let num_units = num_bytes.max(FRAME_BYTES_MAX + SMALL_FRAME_BYTES).div_ceil(BUDGET_UNIT_BYTES);
        Self { units: Arc::new(Semaphore::new(num_units)), deadline }
    }

    /// The share of a frame of `num_bytes`, from now until it is dropped.
    async fn take(&self, num_bytes: usize) -> OwnedSemaphorePermit {
        let num_units = num_bytes.div_ceil(BUDGET_UNIT_BYTES) as u32;
        let permit = self.units.clone().acquire_many_owned(num_units).await;
        permit.expect("the semaphore of the frame memory is never closed")
    }
}

/// The sending half. Dropped without [`finish`](Self::finish) it resets the stream, which cancels what the
/// stream stands for.
pub struct ControlSender {
    stream: quinn::SendStream,
    unsent: BytesMut,
    is_ended: bool,
    _hold: Arc<StreamHold>,
}

impl ControlSender {
    pub(crate) fn new(stream: quinn::SendStream, hold: Arc<StreamHold>) -> Self {
        Self { stream, unsent: BytesMut::new(), is_ended: false, _hold: hold }
    }

    /// Sends one message. Waits while the other end takes nothing.
    ///
    /// A call that is dropped midway tears nothing: what is left of its message goes out ahead of the
    /// next one.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send<M: Message + Sync>(&mut self, message: &M) -> Result<(), SendError> {
        if self.is_ended {
            return Err(SendError::Ended);
        }
        let body = wire::encode(message)?;
        self.unsent.reserve(LENGTH_BYTES + body.len());
        self.unsent.extend_from_slice(&(body.len() as u32).to_le_bytes());
        self.unsent.extend_from_slice(&body);
        while !self.unsent.is_empty() {
            let num_written = self.stream.write(&self.unsent).await.map_err(send_error)?;
            self.unsent.advance(num_written);
        }
        Ok(())
    }

    /// Says that nothing more comes. What was sent still arrives. Resets instead if the last
    /// [`send`](Self::send) was dropped midway, since its message would be cut off.
    pub fn finish(&mut self) {
        if !self.unsent.is_empty() {
            return self.reset();
        }
        if !std::mem::replace(&mut self.is_ended, true) {
            // Fails only if the other end stopped reading, which is its right.
            let _ = self.stream.finish();
        }
    }

    /// Cancels now. What was sent may not arrive.
    pub fn reset(&mut self) {
        self.reset_with(StreamCode::Cancelled);
    }

    pub(crate) fn reset_with(&mut self, code: StreamCode) {
        if !std::mem::replace(&mut self.is_ended, true) {
            let _ = self.stream.reset(code.code());
        }
    }

    /// Resolves when nobody reads any more: the other end dropped its receiver, the connection was lost,
    /// or, after [`finish`](Self::finish), everything has arrived. May be called again and dropped at will.
    pub async fn stopped(&self) {
        let _ = self.stream.stopped().await;
    }
}

impl Drop for ControlSender {
    fn drop(&mut self) {
        self.reset();
    }
}

/// The receiving half. Dropped before the end it asks the other end to stop.
pub struct ControlReceiver {
    stream: quinn::RecvStream,
    buffer: BytesMut,
    budget: FrameBudget,
    share: Option<OwnedSemaphorePermit>,
    frame_deadline: Option<Instant>,
    is_ended: bool,
    _hold: Arc<StreamHold>,
}

impl ControlReceiver {
    pub(crate) fn new(stream: quinn::RecvStream, budget: FrameBudget, hold: Arc<StreamHold>) -> Self {
        let buffer = BytesMut::new();
        Self { stream, buffer, budget, share: None, frame_deadline: None, is_ended: false, _hold: hold }
    }

    /// Receives one message; `None` when the other end finished.
    ///
    /// Cancel-safe: a call that is dropped loses nothing, the next one goes on where it stopped.
    ///
    /// # Errors
    /// [`RecvError`]; all but a lost connection mean that the other end cancelled or is broken.
    pub async fn recv<M: Message>(&mut self) -> Result<Option<M>, RecvError> {
        loop {
            let expected = self.frame_bytes()?;
            if self.buffer.len() >= expected {
                let frame = self.buffer.split_to(expected);
                self.share = None;
                self.frame_deadline = (!self.buffer.is_empty()).then(|| Instant::now() + self.budget.deadline);
                return match wire::decode(&frame[LENGTH_BYTES..]) {
                    Ok(message) => Ok(Some(message)),
                    Err(error) => Err(self.refuse(error.into())),
                };
            }
            if expected > SMALL_FRAME_BYTES && self.share.is_none() {
                let share = self.budget.take(expected).await;
                self.share = Some(share);
                // The wait for memory was ours, not the other end's.
                self.frame_deadline = Some(Instant::now() + self.budget.deadline);
                self.buffer.reserve(expected - self.buffer.len());
            }
            if !self.read_more().await? {
                self.is_ended = true;
                let found = self.buffer.len();
                return if found == 0 { Ok(None) } else { Err(RecvError::Truncated { found, expected }) };
            }
        }
    }

    /// Bytes of the frame at the front of the buffer, as far as they are known.
    fn frame_bytes(&mut self) -> Result<usize, RecvError> {
        let Some(length) = self.buffer.first_chunk::<LENGTH_BYTES>() else { return Ok(LENGTH_BYTES) };
        let num_bytes = u32::from_le_bytes(*length) as usize;
        if num_bytes > FRAME_BYTES_MAX {
            return Err(self.refuse(CodecError::TooLarge { num_bytes }.into()));
        }
        Ok(LENGTH_BYTES + num_bytes)
    }

    /// False at the end of the stream.
    async fn read_more(&mut self) -> Result<bool, RecvError> {
        let read = self.stream.read_chunk(READ_BYTES, true);
        let chunk = match self.frame_deadline {
            None => read.await,
            Some(deadline) => match tokio::time::timeout_at(deadline, read).await {
                Ok(chunk) => chunk,
                Err(_) => return Err(self.refuse(RecvError::TimedOut(self.budget.deadline))),
            },
        };
        match chunk {
            Ok(Some(chunk)) => {
                self.frame_deadline.get_or_insert_with(|| Instant::now() + self.budget.deadline);
                self.buffer.extend_from_slice(&chunk.bytes);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) => {
                self.is_ended = true;
                Err(recv_error(error))
            }
        }
    }

    fn refuse(&mut self, error: RecvError) -> RecvError {
        self.stop_with(StreamCode::Malformed);
        error
    }

    pub(crate) fn stop_with(&mut self, code: StreamCode) {
        if !std::mem::replace(&mut self.is_ended, true) {
            let _ = self.stream.stop(code.code());
        }
    }
}

impl Drop for ControlReceiver {
    fn drop(&mut self) {
        self.stop_with(StreamCode::Cancelled);
    }
}

fn send_error(error: WriteError) -> SendError {
    match error {
        WriteError::Stopped(code) => SendError::Stopped { reason: StreamCode::meaning(code) },
        WriteError::ConnectionLost(error) => SendError::ConnectionLost(error.into()),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => SendError::Ended,
    }
}

fn recv_error(error: ReadError) -> RecvError {
    match error {
        ReadError::Reset(code) => RecvError::Reset { reason: StreamCode::meaning(code) },
        ReadError::ConnectionLost(error) => RecvError::ConnectionLost(error.into()),
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            RecvError::Reset { reason: "the stream was ended here before" }
        }
    }
}
