//! One timeline of a request, carried through the processes as durations.
//!
//! Clocks of two hosts are never subtracted: each process measures spans on its own clock and sends
//! them along; the proxy puts them together.

use std::time::Duration;

use bincode::{Decode, Encode};

/// Spans that one request spent in the phases of a node. A phase that did not happen is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct NodeTimeline {
    /// From admission to the first scheduled token (prefill: in its queue; decode: until blocks were reserved).
    pub queue: Duration,
    /// From the first scheduled prompt token to token #1.
    pub prefill: Duration,
    /// From the first KV byte received to the last one verified.
    pub transfer: Duration,
    /// From token #1's arrival at the decode node to the sequence joining the running batch.
    pub handover: Duration,
    /// From token #1 to token #2, as the decode node saw them.
    pub first_gap: Duration,
    /// At the prefill node: from asking the decode node for its prefix to its last extent, or to giving it up.
    pub fetch: Duration,
    /// Prompt tokens whose KV the prefill node fetched instead of computing them.
    pub num_fetched_tokens: u32,
    /// KV bytes that crossed for this request.
    pub transferred_bytes: u64,
    /// Prompt tokens that were not computed because their KV was held.
    pub num_cached_tokens: u32,
    /// Whether the decode node computed the prompt itself.
    pub is_local_prefill: bool,
}
