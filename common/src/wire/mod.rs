//! The messages between processes, and their bounded encoding.
//!
//! Every bidirectional stream of a control connection begins with one [`Open`] frame from the side that
//! opened it; what follows depends on it:
//!
//! ```text
//! Open::Hello      dialler: Hello            accepter: HelloReply            first stream of a connection
//! Open::HelloBulk  dialler: HelloBulk        accepter: HelloReply            the same, bulk, from version 2 on
//! Open::Watch      proxy:   Directory ...    node:     NodeStatus ...        for the life of the connection
//! Open::Generate   proxy:   (nothing)        decode:   GenerateEvent ...     one request; reset = cancel
//! Open::Prefill    decode:  PrefillControl   prefill:  PrefillEvent ...      one hand-over; reset = cancel
//! Open::Register   node:    (nothing)        proxy:    (nothing)             lease of a self-registering node
//! Open::WatchBlocks proxy:  (nothing)        node:     BlockNews ...         for the life of the connection
//! Open::FetchPrefix prefill: FetchPrefixControl  prefill: FetchPrefixEvent ... reset = cancel
//! ```
//!
//! KV never travels here: it goes over the bulk connection as raw bytes behind [`bulk::ExtentHeader`],
//! or, between processes of one host, as the places where the receiver reads them ([`runs`]).
//!
//! A frame is a `u32` little-endian length and that many bytes of `bincode` 2 (standard configuration)
//! under a limit; this module is the only user of `bincode` (unmaintained, isolated here).

pub mod blocks;
pub mod bulk;
pub mod extent_digest;
pub mod fetch;
pub mod generate;
pub mod hello;
pub mod prefill;
pub mod runs;

use bincode::config;
use bincode::{Decode, Encode};

pub use blocks::{BlockCursor, BlockNews, WatchBlocks};
pub use bulk::{ExtentHeader, ExtentId};
pub use extent_digest::{ExtentBinding, ExtentDigest, ExtentHasher};
pub use fetch::{FetchPrefix, FetchPrefixControl, FetchPrefixEvent, PrefixPeer};
pub use generate::{Generate, GenerateEvent, NodeError};
pub use hello::{BulkGroup, Directory, Hello, HelloBulk, HelloReply, NodeLoad, NodeState, NodeStatus, Peer};
pub use hello::{Register, Registration, Watch};
pub use prefill::{Prefill, PrefillControl, PrefillEvent};
pub use runs::PoolRun;

/// Versions of the protocol that this build speaks, newest first; one number for the messages of this
/// module and for the extents on bulk connections. Both ends take the newest that they share (ALPN).
///
/// To change anything that crosses the wire: put N+1 in front, keep N behind it and drop N-1 in the same
/// release, so that a cluster can be upgraded node by node. Whoever sends asks the link for its version and
/// writes what that version knows; a field or message of N+1 is never sent over a link that speaks N. The
/// hello's own encoding changes like any other message: it is sent after the version is known.
pub const PROTOCOL_VERSIONS: &[u16] = &[2, 1];

/// The version from which bulk connections begin with [`HelloBulk`] and may be several to a peer.
pub const BULK_GROUPS_SINCE: u16 = 2;

/// Largest frame in bytes: a prompt of one million tokens with room to spare. Nothing larger is
/// allocated, whatever a length prefix claims.
pub const FRAME_BYTES_MAX: usize = 8 << 20;

/// Anything that can be a frame. Names the bound for those who carry messages without knowing their
/// encoding.
pub trait Message: Encode + Decode<()> {}

impl<M: Encode + Decode<()>> Message for M {}

/// First frame of a bidirectional stream.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum Open {
    /// Who is calling.
    Hello(Hello),
    /// Follow a node's state.
    Watch(Watch),
    /// Generate tokens (proxy to decode node).
    Generate(Box<Generate>),
    /// Compute a prompt and send its KV (decode node to prefill node).
    Prefill(Box<Prefill>),
    /// Announce oneself to a proxy.
    Register(Register),
    /// Follow which blocks a node holds.
    WatchBlocks(WatchBlocks),
    /// Send KV that is in the pool (prefill node to prefill node).
    FetchPrefix(Box<FetchPrefix>),
    /// Who is calling, on a bulk connection; from version 2 on.
    HelloBulk(Box<HelloBulk>),
}

/// A frame that could not be written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Too large to send or to accept.
    #[error("a message of {num_bytes} bytes exceeds the limit of {FRAME_BYTES_MAX}: shorten the prompt")]
    TooLarge {
        /// Its size, or the size it claimed.
        num_bytes: usize,
    },
    /// Not what was expected at this place.
    #[error(
        "a {what} message could not be decoded ({reason}): the other end runs an incompatible version or sent garbage"
    )]
    Malformed {
        /// The type that was expected.
        what: &'static str,
        /// The decoder's reason.
        reason: String,
    },
}

/// Body of a frame (without its length).
///
/// # Errors
/// [`CodecError::TooLarge`].
pub fn encode<M: Encode>(message: &M) -> Result<Vec<u8>, CodecError> {
    let config = config::standard().with_limit::<FRAME_BYTES_MAX>();
    match bincode::encode_to_vec(message, config) {
        Ok(bytes) if bytes.len() <= FRAME_BYTES_MAX => Ok(bytes),
        Ok(bytes) => Err(CodecError::TooLarge { num_bytes: bytes.len() }),
        Err(error) => Err(CodecError::Malformed { what: std::any::type_name::<M>(), reason: error.to_string() }),
    }
}

/// Reads a frame's body. All bytes must be consumed.
///
/// # Errors
/// [`CodecError`], never a panic, and never an allocation beyond [`FRAME_BYTES_MAX`].
pub fn decode<M: Decode<()>>(bytes: &[u8]) -> Result<M, CodecError> {
    let what = std::any::type_name::<M>();
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(CodecError::TooLarge { num_bytes: bytes.len() });
    }
    let config = config::standard().with_limit::<FRAME_BYTES_MAX>();
    match bincode::decode_from_slice(bytes, config) {
        Ok((message, used)) if used == bytes.len() => Ok(message),
        Ok((_, used)) => Err(CodecError::Malformed { what, reason: format!("{} bytes left over", bytes.len() - used) }),
        Err(error) => Err(CodecError::Malformed { what, reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_events::Medium;
    use crate::content::{ContentKey, hex};
    use crate::ids::{Attempt, ChoiceIndex, Epoch, Generation, NodeId, RequestId, Role};
    use crate::sampling::SamplingParams;
    use std::time::Duration;

    fn generate() -> Generate {
        Generate {
            request: RequestId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            attempt: Attempt(2),
            tokens: vec![1, 300, 70_000].into(),
            prompt_len: 2,
            choices: vec![ChoiceIndex(0)],
            params: SamplingParams { logit_bias: vec![(3, -1.5)], ..SamplingParams::greedy(9) },
            salt: vec![],
            prefill_candidates: vec![NodeId::new("p0").unwrap()],
            deadline: Duration::from_secs(60),
            prefix_peer: Some(PrefixPeer { node: NodeId::new("p1").unwrap(), num_tokens: 320 }),
        }
    }

    /// Committed vectors: a change here is a new protocol version.
    #[test]
    fn messages_match_the_committed_vectors() {
        let prefill = Prefill {
            request: RequestId(7),
            attempt: Attempt(1),
            generation: Generation(5),
            tokens: vec![1, 2].into(),
            prompt_len: 2,
            choices: vec![ChoiceIndex(0), ChoiceIndex(1)],
            params: SamplingParams::greedy(1),
            salt: vec![9],
            num_held_tokens: 0,
            credit_bytes: 1 << 20,
            deadline: Duration::from_millis(1500),
            local_rest: Some(Duration::from_millis(250)),
            prefix_peer: Some(PrefixPeer { node: NodeId::new("p1").unwrap(), num_tokens: 320 }),
        };
        let fetch =
            PrefillEvent::Fetch { generation: Generation(6), first_token: 16, end_token: 320, credit_bytes: 1 << 20 };
        let fetch_prefix = FetchPrefix {
            request: RequestId(7),
            attempt: Attempt(1),
            generation: Generation(6),
            tokens: vec![1; 32].into(),
            first_token: 16,
            salt: vec![9],
            deadline: Duration::from_millis(1500),
        };
        let cursor = BlockCursor { epoch: Epoch(9), number: 300 };
        let watch_blocks = WatchBlocks { after: Some(cursor), with_tokens: true };
        let stored = blocks::BlockEvent::Stored {
            medium: Medium::Pool,
            key: ContentKey(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            parent: Some(ContentKey(1)),
            num_tokens: 2,
            tokens: vec![1, 300].into(),
        };
        let removed = blocks::BlockEvent::Removed { medium: Medium::Disk, key: ContentKey(2) };
        let cleared = blocks::BlockEvent::Cleared { medium: Medium::Host };
        let news = BlockNews { is_restart: true, events: vec![stored, removed, cleared], resume_at: Some(cursor) };
        let (node, role) = (NodeId::new("d0").unwrap(), Role::DecodeNode);
        let hello = Hello { node, role, epoch: Epoch(9), model: None, bulk_port: None };
        let hello_bulk = HelloBulk { hello, group: BulkGroup { id: 300, num_connections: 4, joins: true } };
        let got = [
            hex(&encode(&Open::Generate(Box::new(generate()))).unwrap()),
            hex(&encode(&Open::Prefill(Box::new(prefill))).unwrap()),
            hex(&encode(&fetch).unwrap()),
            hex(&encode(&PrefillControl::FetchStopped).unwrap()),
            hex(&encode(&Open::WatchBlocks(watch_blocks)).unwrap()),
            hex(&encode(&news).unwrap()),
            hex(&encode(&Open::FetchPrefix(Box::new(fetch_prefix))).unwrap()),
            hex(&encode(&FetchPrefixControl::Credit { bytes: 1 << 20 }).unwrap()),
            hex(&encode(&FetchPrefixEvent::Held { num_tokens: 320 }).unwrap()),
            hex(&encode(&Open::HelloBulk(Box::new(hello_bulk))).unwrap()),
        ];
        let expected = include_str!("vectors.txt").lines().collect::<Vec<_>>();
        assert_eq!(got.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn message_survives_the_round_trip() {
        let open = Open::Generate(Box::new(generate()));
        assert_eq!(decode::<Open>(&encode(&open).unwrap()).unwrap(), open);
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_an_error_or_a_message_but_never_a_panic() {
        let bytes = encode(&Open::Generate(Box::new(generate()))).unwrap();
        for len in 0..bytes.len() {
            assert!(decode::<Open>(&bytes[..len]).is_err());
        }
        for i in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[i] ^= flip;
                let _ = decode::<Open>(&bad);
            }
        }
        let mut long = bytes.clone();
        long.push(0);
        assert!(matches!(decode::<Open>(&long), Err(CodecError::Malformed { .. })));
    }

    #[test]
    fn claimed_length_beyond_the_limit_is_refused() {
        // Open::Generate, zero ids, then a token vector that claims 2^60 bytes.
        let mut bytes = vec![2, 0, 0];
        bytes.push(253);
        bytes.extend_from_slice(&(1u64 << 60).to_le_bytes());
        assert!(decode::<Open>(&bytes).is_err());
    }
}
