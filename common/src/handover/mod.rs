//! The two ends of a hand-over, as state machines: events and `now` in, actions out.
//!
//! A hand-over brings the KV of a prompt, and token #1, from the prefill node that computed them to the
//! decode node that goes on with them:
//!
//! ```text
//!  decode node (DecodeHandover)                          prefill node (PrefillHandover)
//!
//!  blocks reserved                                                                 .
//!  Link -> Ask            ---- Prefill, credit window ----->   admitted: SendAccepted, or Busy, or Declined
//!  Landing                <--- Accepted ---------------------  Queued, or first a fetch (`fetch`)
//!                         <--- Progress ---------------------  Computing
//!  verify, place          <=== extent (bulk connection) =====  as each layer of a chunk is written
//!  SendCredit             ---- Credit ---------------------->
//!  DeliverFirstTokens     <--- FirstTokens ------------------  Sending: no more will be written
//!  last extent verified   <--- Sent -------------------------  AwaitingReceived
//!  Join                   ---- Received -------------------->  Unpin
//! ```
//!
//! When another node holds a prefix that the prefill node lacks, the prefill node takes the cheapest way
//! (`prefix_choice`): it has the decode node or another prefill node (`prefix_serving`) send that prefix, loads it
//! from the store, computes it again, or declines, and the decode node computes the rest itself.
//!
//! What holds, whatever is lost in between:
//!
//! - The decode node has every block of the prompt before it asks, and a prefill node admits only what
//!   fits now: neither keeps a pinned block while it waits for another node's memory. Credit paces bytes
//!   and never stands for memory. The same holds for a prefix that is fetched the other way: both ends have
//!   their blocks before its first byte moves.
//! - The stream is the lease. When it ends, in any way, the prefill node unpins and the decode node goes
//!   on with the next candidate or by itself, keeping the tokens whose KV is verified in every layer.
//! - Token #1 is delivered once. If the prefill node is lost behind it, the rest of the KV is computed
//!   for the same tokens, and the first token that comes with it (equal within a numerics id) is dropped.
//! - Every wait has a deadline: to be accepted, to make progress, and for the whole.
//!
//! The shells carry the actions out in order, each finished before the next: after `CloseLanding` nothing
//! of that ask may still write into the blocks. `explore` (tests) plays two prefill nodes and two decode
//! nodes with pools of one and a half prompts through every order of messages, losses and cancels.

pub mod decode;
#[cfg(test)]
mod explore;
pub mod fetch;
pub mod overlap;
pub mod prefill;
pub mod prefix_choice;
pub mod prefix_serving;

pub use decode::{CandidateLoss, DecodeAction, DecodeHandover, DecodeLimits, DecodeRequest, DecodeState};
pub use fetch::{FetchEnd, FetchFailure, FetchFrom, FetchPlan};
pub use overlap::{Overlap, OverlapPace};
pub use prefill::{PrefillAction, PrefillHandover, PrefillLimits, PrefillState};
pub use prefix_choice::{PeerPrefix, PrefixChoice, PrefixCosts, StoredPrefix, expected_prefill};
pub use prefix_serving::{PrefixServing, ServingAction, ServingLimits};

/// Which ask of one hand-over something belongs to, from 0. Each ask has its own stream and its own
/// [`Generation`](crate::ids::Generation); the shell tags what arrives with the ask it arrived for, and
/// what belongs to an earlier one is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AskIndex(pub u32);
