//! Node to proxy: which blocks can be found there.

use bincode::{Decode, Encode};

use crate::block_events::{self, Medium};
use crate::content::ContentKey;
use crate::ids::Epoch;
use crate::tokens::PackedTokens;

/// Asks a node for its block events, from the first one or behind those that are known.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WatchBlocks {
    /// What was heard before. Of another life of the node it is worth nothing.
    pub after: Option<BlockCursor>,
    /// Whether the blocks' tokens are wanted: most of the bytes, and an index needs none.
    pub with_tokens: bool,
}

/// A place in the events of one life of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct BlockCursor {
    /// The node's life.
    pub epoch: Epoch,
    /// Number of the last event that was heard.
    pub number: u64,
}

/// Some events in their order, for the life of the stream. The first message comes at once.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct BlockNews {
    /// Forget what is known of this node, then take the events in: a snapshot begins.
    pub is_restart: bool,
    /// What happened.
    pub events: Vec<BlockEvent>,
    /// Where to go on behind these events on another stream; `None` inside a snapshot.
    pub resume_at: Option<BlockCursor>,
}

/// [`block_events::BlockEvent`] as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum BlockEvent {
    /// It can be found from now on.
    Stored {
        /// Where it is.
        medium: Medium,
        /// Its key.
        key: ContentKey,
        /// Key of the block before it; `None` for the first of a chain.
        parent: Option<ContentKey>,
        /// Tokens in the block: the node's block size in the pool, a granule in a tier.
        num_tokens: u32,
        /// The tokens; empty unless asked for.
        tokens: PackedTokens,
    },
    /// It can no longer be found there.
    Removed {
        /// Where it was.
        medium: Medium,
        /// Its key.
        key: ContentKey,
    },
    /// Nothing can be found there any more.
    Cleared {
        /// Where.
        medium: Medium,
    },
}

impl BlockEvent {
    /// Where it happened.
    pub fn medium(&self) -> Medium {
        match self {
            BlockEvent::Stored { medium, .. } | BlockEvent::Removed { medium, .. } | BlockEvent::Cleared { medium } => {
                *medium
            }
        }
    }

    /// The event to be sent.
    pub fn of(event: &block_events::BlockEvent, with_tokens: bool) -> Self {
        match event {
            block_events::BlockEvent::Stored(block) => BlockEvent::Stored {
                medium: block.medium,
                key: block.key,
                parent: block.parent,
                num_tokens: block.tokens.len() as u32,
                tokens: if with_tokens { block.tokens.to_vec().into() } else { PackedTokens::default() },
            },
            block_events::BlockEvent::Removed { medium, key } => BlockEvent::Removed { medium: *medium, key: *key },
            block_events::BlockEvent::Cleared { medium } => BlockEvent::Cleared { medium: *medium },
        }
    }
}
