//! What a [`DecodeHandover`](super::DecodeHandover) asks of its shell, and why it gives a candidate up.

use std::time::Duration;

use super::super::AskIndex;
use crate::ids::{Generation, NodeId};
use crate::sampling::{FinishReason, SampledToken};
use crate::timeline::NodeTimeline;
use crate::wire::{ExtentId, NodeError, PrefillControl};

/// What the shell must do, in order, each finished before the next.
#[derive(Debug, Clone, PartialEq)]
pub enum DecodeAction {
    /// Find or make a connection to this node, then call [`on_link_ready`](super::DecodeHandover::on_link_ready) or
    /// [`on_link_failed`](super::DecodeHandover::on_link_failed).
    Link {
        /// Whom.
        candidate: NodeId,
    },
    /// Draw a new [`Generation`](crate::ids::Generation), open the landing of tokens `num_held_tokens..`
    /// under it, and send [`Prefill`](crate::wire::Prefill) on a new stream.
    Ask {
        /// Whom.
        candidate: NodeId,
        /// Tags what comes back.
        ask: AskIndex,
        /// For the message: a multiple of the granule, less than the number of tokens.
        num_held_tokens: u32,
        /// Whether the message says what the rest would cost here.
        is_local_offered: bool,
        /// For the message.
        credit_bytes: u64,
    },
    /// Find the way to the candidate and call [`on_fetch_opened`](super::DecodeHandover::on_fetch_opened) with
    /// the extents of these tokens, which are held and pinned.
    OpenFetch {
        /// The ask whose candidate wants them.
        ask: AskIndex,
        /// The candidate's reservation.
        generation: Generation,
        /// From here.
        first_token: u32,
        /// To here.
        end_token: u32,
    },
    /// Send this extent of the prefix that was opened last; call
    /// [`on_fetch_extent_lost`](super::DecodeHandover::on_fetch_extent_lost) if that fails.
    SendExtent {
        /// Which.
        extent: ExtentId,
        /// Its size.
        num_bytes: u64,
    },
    /// Give up the extents of that prefix which are on the way: when this is done none reads the blocks.
    StopFetch,
    /// Send this on the stream of the present ask.
    Send(PrefillControl),
    /// Send these to the proxy: they are the first tokens of the choices. Once per hand-over.
    DeliverFirstTokens {
        /// In the order of the choices.
        tokens: Vec<SampledToken>,
        /// Why a choice ends with its first token, if it does.
        finish: Vec<Option<FinishReason>>,
        /// Spans of the prefill node.
        timeline: NodeTimeline,
    },
    /// Refuse from now on what comes for the present ask, and stop what is being written.
    CloseLanding,
    /// End the stream of the present ask: the prefill node unpins.
    ResetStream,
    /// For logs and counters: this candidate is not coming back in this hand-over.
    CandidateLost {
        /// Which.
        candidate: NodeId,
        /// Why.
        loss: CandidateLoss,
    },
    /// KV and first tokens are complete: the unfinished choices join the running batch, which now owns
    /// the blocks. The stream may be dropped.
    Join,
    /// Compute the rest here; the local prefill now owns the blocks.
    PrefillLocally {
        /// Leading tokens with valid KV, less than the number of tokens.
        num_valid_tokens: u32,
        /// Token #1 was delivered already: those that this computes are dropped.
        has_first_tokens: bool,
    },
    /// Tell the proxy. `Release` follows.
    Fail(NodeError),
    /// Give the reservation back.
    Release {
        /// Leading tokens with valid KV, whose full blocks may stay as evictable cache.
        num_valid_tokens: u32,
    },
}

/// Why a candidate was given up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CandidateLoss {
    /// No connection.
    #[error("it could not be reached")]
    LinkFailed,
    /// It is full.
    #[error("it is busy for {retry_after:?}")]
    Busy {
        /// Its word on when to ask again.
        retry_after: Duration,
    },
    /// It said so.
    #[error("it failed: {0}")]
    Failed(NodeError),
    /// The connection or the stream ended early.
    #[error("its stream ended before the KV was complete")]
    StreamLost,
    /// An extent's digest, size or place was wrong.
    #[error("an extent it sent was refused")]
    ExtentRefused,
    /// No `Accepted` in time.
    #[error("it did not accept within {waited:?}")]
    NotAccepted {
        /// The limit.
        waited: Duration,
    },
    /// Accepted, then stood still.
    #[error("it made no progress within {waited:?}")]
    NoProgress {
        /// The limit.
        waited: Duration,
    },
    /// A message that cannot come at this place.
    #[error("it sent {what} where that cannot come")]
    Protocol {
        /// The message, in words.
        what: &'static str,
    },
}

impl CandidateLoss {
    /// The value of the metric label.
    pub fn as_str(&self) -> &'static str {
        match self {
            CandidateLoss::LinkFailed => "link_failed",
            CandidateLoss::Busy { .. } => "busy",
            CandidateLoss::Failed(_) => "failed",
            CandidateLoss::StreamLost => "stream_lost",
            CandidateLoss::ExtentRefused => "extent_refused",
            CandidateLoss::NotAccepted { .. } => "not_accepted",
            CandidateLoss::NoProgress { .. } => "no_progress",
            CandidateLoss::Protocol { .. } => "protocol",
        }
    }
}
