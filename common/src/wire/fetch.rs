//! Prefill node to prefill node: send the KV of a prefix that is in your pool.
//!
//! ```text
//!  fetches                                        holds
//!  FetchPrefix (tokens)    ------------------->   pins what it has of them
//!                          <------------ Held     how many; or Busy
//!  landing open: Credit    ------------------->
//!                          <=========== extents   on the bulk connection that the fetching node has dialled
//!  Credit ...              ------------------->
//!  (end of the stream)     <------------------>   unpins
//! ```

use std::time::Duration;

use bincode::{Decode, Encode};

use crate::ids::{Attempt, Generation, NodeId, RequestId};
use crate::tokens::PackedTokens;

/// A prefill node that is believed to hold the beginning of a prompt in its pool: a hint, and no address. A node
/// dials only whom a directory has named.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PrefixPeer {
    /// Which.
    pub node: NodeId,
    /// Leading tokens that it is believed to hold.
    pub num_tokens: u32,
}

/// Asks for the KV of `tokens[first_token..]`, as much of it as is there without computing anything. The stream
/// is the lease: while it is open what is being sent stays pinned.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FetchPrefix {
    /// The request; the extents carry it back.
    pub request: RequestId,
    /// Which try; the extents carry it back.
    pub attempt: Attempt,
    /// The reservation at the node that asks; the extents carry it back.
    pub generation: Generation,
    /// The prefix that is wanted, from position 0: whole granules.
    pub tokens: PackedTokens,
    /// What the node that asks has itself ends here: a multiple of the granule, less than the number of tokens.
    pub first_token: u32,
    /// Tenant salt.
    pub salt: Vec<u8>,
    /// Time left for this phase.
    pub deadline: Duration,
}

/// From the node that fetches, after [`FetchPrefix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum FetchPrefixControl {
    /// This many payload bytes more may be sent; none before the first.
    Credit {
        /// Bytes.
        bytes: u64,
    },
}

/// From the node that holds the prefix: `Busy` and nothing else; or `Held`, and `Stopped` if not all of that can
/// be sent. It ends the stream when all has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum FetchPrefixEvent {
    /// Not now: as many prefixes are being sent as may be.
    Busy,
    /// This is here and pinned. Nothing is sent if it is not beyond [`FetchPrefix::first_token`].
    Held {
        /// Leading tokens, whole granules of those that were asked for.
        num_tokens: u32,
    },
    /// No more is sent.
    Stopped,
}
