//! Decode node to prefill node: compute a prompt, send its KV and the first token.

use std::time::Duration;

use bincode::{Decode, Encode};

use crate::ids::{Attempt, ChoiceIndex, Generation, RequestId};
use crate::sampling::{SampledToken, SamplingParams};
use crate::timeline::NodeTimeline;
use crate::tokens::PackedTokens;
use crate::wire::fetch::PrefixPeer;
use crate::wire::generate::NodeError;

/// Asks for the KV of `tokens[num_held_tokens..]` and for the token behind the last one, for each choice.
///
/// The decode node has reserved blocks for all of it before it asks. The stream is the lease: while it
/// is open the prefill node keeps what it computed pinned until it is sent; a reset unpins.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Prefill {
    /// The request.
    pub request: RequestId,
    /// Which try.
    pub attempt: Attempt,
    /// The reservation the extents are for; they carry it back.
    pub generation: Generation,
    /// Prompt and committed tokens.
    pub tokens: PackedTokens,
    /// How many of `tokens` are the prompt.
    pub prompt_len: u32,
    /// Choices: one first token each.
    pub choices: Vec<ChoiceIndex>,
    /// Full sampling state, as in [`super::Generate`].
    pub params: SamplingParams,
    /// Tenant salt.
    pub salt: Vec<u8>,
    /// The decode node holds (and has pinned) the KV of this many tokens already: a multiple of the
    /// granule, less than the number of tokens.
    pub num_held_tokens: u32,
    /// Payload bytes that may be sent before the first [`PrefillControl::Credit`].
    pub credit_bytes: u64,
    /// Time left for this phase.
    pub deadline: Duration,
    /// What computing the rest behind `num_held_tokens` would cost the decode node itself, if it offers to:
    /// only then may the answer be [`PrefillEvent::Declined`].
    pub local_rest: Option<Duration>,
    /// As in [`super::Generate`]: where a prefix may be fetched from, if it is longer than what is found here.
    pub prefix_peer: Option<PrefixPeer>,
}

/// From the decode node, after [`Prefill`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum PrefillControl {
    /// This many payload bytes more may be sent.
    Credit {
        /// Bytes.
        bytes: u64,
    },
    /// Every extent is verified: unpin.
    Received,
    /// What [`PrefillEvent::Fetch`] asked for cannot be sent, or no more of it.
    FetchStopped,
}

/// From the prefill node: `Progress`... while the prompt waits in its queue; then `Busy` or `Declined` and
/// nothing else, or `Accepted`, `Progress`..., `FirstTokens`, `Sent`; `Failed` may end it at any point. Behind
/// `Accepted` there may be one fetch: `Fetch`, `FetchCredit`..., `FetchEnded`.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum PrefillEvent {
    /// Not now. Nothing is held.
    Busy {
        /// When it is worth asking again.
        retry_after: Duration,
    },
    /// Admitted; it found this many tokens in its own cache.
    Accepted {
        /// Prompt tokens it need not compute.
        num_cached_tokens: u32,
    },
    /// Sent while the prompt waits or computes, fed by the engine's step counter.
    Progress {
        /// Engine steps so far.
        num_steps: u64,
        /// Tokens of this prompt computed so far, cached ones included.
        num_computed_tokens: u32,
    },
    /// Token #1 of each choice, sampled from the last position. Sent before the KV is complete.
    FirstTokens {
        /// In the order of [`Prefill::choices`].
        tokens: Vec<SampledToken>,
        /// Queue and prefill time here.
        timeline: NodeTimeline,
    },
    /// All extents were handed to the transport.
    Sent {
        /// How many.
        num_extents: u32,
        /// Their payload.
        num_bytes: u64,
    },
    /// Ended without finishing.
    Failed(NodeError),
    /// The decode node's own way, [`Prefill::local_rest`], is cheaper. Nothing is held.
    Declined,
    /// Send the KV of `first_token..end_token`, which the decode node holds, on the bulk connection.
    Fetch {
        /// The reservation at the prefill node; the extents carry it back.
        generation: Generation,
        /// A multiple of the granule.
        first_token: u32,
        /// A multiple of the granule, at most [`Prefill::num_held_tokens`].
        end_token: u32,
        /// Payload bytes that may be sent before the first `FetchCredit`.
        credit_bytes: u64,
    },
    /// This many payload bytes more of what is fetched may be sent.
    FetchCredit {
        /// Bytes.
        bytes: u64,
    },
    /// What is fetched is complete, or no longer wanted: send no more of it.
    FetchEnded,
}
