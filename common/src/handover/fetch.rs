//! A prefix that the decode node or a peer holds, on its way to the prefill node: the books of both ends.
//!
//! ```text
//!  decode node (FetchSender, in DecodeHandover)          prefill node (FetchReceiver, in PrefillHandover)
//!
//!                         <--- Fetch (credit window) ------  blocks reserved, landing open
//!  extents of the prefix  ===> (bulk connection) ==========>  verify, place
//!                         <--- FetchCredit ---------------  as they are verified
//!                         <--- FetchEnded ----------------  complete, or given up: compute from there on
//!  cannot send: FetchStopped ------------------------------>  compute from there on
//! ```
//!
//! With a peer, another prefill node, the same goes over a stream of its own ([`FetchPrefix`](crate::wire::FetchPrefix)),
//! and its end holds [`PrefixServing`](super::PrefixServing).
//!
//! Both ends have their blocks before the first byte moves, so a fetch waits for bytes and never for memory.
//! It cannot fail the request: whatever happens to it, the prefill node keeps what is verified in every layer
//! and computes the rest. The stream is its lease: that of the `Prefill`, or the peer's.

use std::collections::VecDeque;
use std::time::Duration;

use crate::wire::ExtentId;

/// Who sends what is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FetchFrom {
    /// The decode node whose hand-over it is, which also hears how the fetch goes.
    DecodeNode,
    /// Another prefill node.
    Peer,
}

/// What a prefill node fetches, and how long it waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FetchPlan {
    /// From whom.
    pub from: FetchFrom,
    /// Its own prefix ends here, a multiple of the granule.
    pub first_token: u32,
    /// The other node's prefix ends here, as far as is known: a peer may turn out to hold less.
    pub end_token: u32,
    /// KV that may be on the way, at least 1. One extent may exceed it.
    pub credit_window_bytes: u64,
    /// Without a verified extent.
    pub stall_timeout: Duration,
    /// For all of it.
    pub total_timeout: Duration,
}

/// How a fetch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FetchEnd {
    /// All of it is here and verified.
    Complete,
    /// The hand-over ended first.
    Abandoned,
    /// It will not be complete.
    Failed(FetchFailure),
}

/// Why a fetch was given up; the rest is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FetchFailure {
    /// An extent's digest, size or place was wrong.
    #[error("an extent was refused")]
    ExtentRefused,
    /// The node that holds it sends no more.
    #[error("it can no longer be sent")]
    Stopped,
    /// There is no connection to the peer.
    #[error("the peer cannot be reached")]
    Unreachable,
    /// The peer sends as many prefixes as it may.
    #[error("the peer is busy")]
    Busy,
    /// The peer has forgotten it since the proxy heard of it.
    #[error("the peer no longer holds it")]
    NotHeld,
    /// Nothing was verified for the stall timeout.
    #[error("nothing came for too long")]
    Stalled,
    /// Computing it would have been done by now.
    #[error("it takes longer than computing")]
    TooSlow,
}

impl FetchFailure {
    /// The value of the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            FetchFailure::ExtentRefused => "extent_refused",
            FetchFailure::Stopped => "stopped",
            FetchFailure::Unreachable => "unreachable",
            FetchFailure::Busy => "busy",
            FetchFailure::NotHeld => "not_held",
            FetchFailure::Stalled => "stalled",
            FetchFailure::TooSlow => "too_slow",
        }
    }
}

/// The prefill node's end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct FetchReceiver {
    plan: FetchPlan,
    num_valid_tokens: u32,
    num_owed_bytes: u64,
    started_at: Duration,
    progress_at: Duration,
}

impl FetchReceiver {
    pub(super) fn new(plan: FetchPlan, now: Duration) -> Self {
        Self { plan, num_valid_tokens: plan.first_token, num_owed_bytes: 0, started_at: now, progress_at: now }
    }

    /// Who sends it.
    pub(super) fn from(&self) -> FetchFrom {
        self.plan.from
    }

    /// Leading tokens whose KV is here in every layer.
    pub(super) fn num_valid_tokens(&self) -> u32 {
        self.num_valid_tokens
    }

    pub(super) fn on_extent(&mut self, num_bytes: u64, num_contiguous_tokens: u32, now: Duration) {
        self.progress_at = now;
        self.num_owed_bytes += num_bytes;
        self.num_valid_tokens = self.num_valid_tokens.max(num_contiguous_tokens.min(self.plan.end_token));
    }

    /// Credit that is worth a message: a quarter of the window.
    pub(super) fn due_credit(&mut self) -> Option<u64> {
        if self.num_owed_bytes >= (self.plan.credit_window_bytes / 4).max(1) { self.owed_credit() } else { None }
    }

    /// All that is owed. Told now and then even if it is little, so that the other end sees this one move.
    pub(super) fn owed_credit(&mut self) -> Option<u64> {
        (self.num_owed_bytes > 0).then(|| std::mem::take(&mut self.num_owed_bytes))
    }

    pub(super) fn deadline(&self) -> Duration {
        let FetchPlan { stall_timeout, total_timeout, .. } = self.plan;
        self.progress_at.saturating_add(stall_timeout).min(self.started_at.saturating_add(total_timeout))
    }

    pub(super) fn is_overdue(&self, now: Duration) -> Option<FetchFailure> {
        let is_late = |from: Duration, timeout| now >= from.saturating_add(timeout);
        if is_late(self.progress_at, self.plan.stall_timeout) {
            Some(FetchFailure::Stalled)
        } else {
            is_late(self.started_at, self.plan.total_timeout).then_some(FetchFailure::TooSlow)
        }
    }
}

/// The sending end: extents leave in order, one while the credit left is above zero.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct FetchSender {
    waiting: VecDeque<(ExtentId, u64)>,
    credit_bytes: i64,
}

impl FetchSender {
    pub(super) fn new(credit_bytes: u64) -> Self {
        let credit_bytes = i64::try_from(credit_bytes).unwrap_or(i64::MAX);
        Self { waiting: VecDeque::new(), credit_bytes }
    }

    pub(super) fn on_extents(&mut self, extents: Vec<(ExtentId, u64)>) {
        self.waiting.extend(extents);
    }

    pub(super) fn on_credit(&mut self, bytes: u64) {
        self.credit_bytes = self.credit_bytes.saturating_add(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Whether all have left.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The next extent that may leave.
    pub(super) fn next(&mut self) -> Option<(ExtentId, u64)> {
        if self.credit_bytes <= 0 {
            return None;
        }
        let (extent, num_bytes) = self.waiting.pop_front()?;
        self.credit_bytes = self.credit_bytes.saturating_sub(i64::try_from(num_bytes).unwrap_or(i64::MAX));
        Some((extent, num_bytes))
    }
}
