//! What happened to the named blocks of a node: the vocabulary of block events.
//!
//! The block manager notes in a [`BlockJournal`] what it names and forgets; the engine's loop hands that on to
//! a [`BlockSink`] after every step. A tier that knows what it keeps and gives up tells the same sink. Who listens
//! (the proxies' index, later other event formats) is not known here. An event says enough to tell a block to
//! anyone: its key, its parent's, the tokens it stands for, and in which medium it is.
//!
//! What is a block depends on the medium: in the pool one of the node's block size, in a tier one granule. Keys and
//! parents are those of granules in both, so a block of the pool and the last of its granules have one key.

use std::sync::Arc;

use bincode::{Decode, Encode};

use crate::content::ContentKey;
use crate::tokens::Token;

/// Where a node holds a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub enum Medium {
    /// The paged KV pool, where attention reads it.
    Pool,
    /// Host memory beside the pool.
    Host,
    /// A local disk. No node tells it: what leaves the disk is not known there.
    Disk,
    /// A store that several nodes share. No node tells it: it is nobody's own.
    Remote,
}

impl Medium {
    /// All of them.
    pub const ALL: [Medium; 4] = [Medium::Pool, Medium::Host, Medium::Disk, Medium::Remote];

    /// The value of the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Medium::Pool => "pool",
            Medium::Host => "host",
            Medium::Disk => "disk",
            Medium::Remote => "remote",
        }
    }
}

/// A block that can be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlock {
    /// Where it is.
    pub medium: Medium,
    /// Its name's key: that of its last granule.
    pub key: ContentKey,
    /// Key of the block before it; `None` for the first of a chain.
    pub parent: Option<ContentKey>,
    /// The tokens of this block, all of them: it is full.
    pub tokens: Arc<[Token]>,
}

/// What happened. Applying an event twice, or the removal of what is not known, changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockEvent {
    /// It can be found from now on.
    Stored(StoredBlock),
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

/// Takes events in the order in which they happened.
pub trait BlockSink: Send + Sync {
    /// Called by the engine's thread, and by whoever changes a tier: must not wait for anybody who listens.
    fn on_blocks(&self, events: Vec<BlockEvent>);
}

/// Events of the pool since they were last taken. Notes nothing until it is turned on.
///
/// Not bounded by itself: between two times that the engine's loop takes it, a block is named and forgotten at
/// most twice (by what the commands of the inbox complete, and by the step), so it holds a few entries per
/// block of the pool at most.
#[derive(Debug, Default)]
pub struct BlockJournal {
    is_on: bool,
    events: Vec<BlockEvent>,
}

impl BlockJournal {
    /// From now on events are noted.
    pub fn turn_on(&mut self) {
        self.is_on = true;
    }

    /// A block of the pool got its name; `block` is made only if somebody wants it.
    pub fn on_stored(&mut self, block: impl FnOnce() -> StoredBlock) {
        if self.is_on {
            self.events.push(BlockEvent::Stored(block()));
        }
    }

    /// A block of the pool lost its name.
    pub fn on_removed(&mut self, key: ContentKey) {
        if self.is_on {
            self.events.push(BlockEvent::Removed { medium: Medium::Pool, key });
        }
    }

    /// No block of the pool has a name any more.
    pub fn on_cleared(&mut self) {
        if self.is_on {
            self.events.clear();
            self.events.push(BlockEvent::Cleared { medium: Medium::Pool });
        }
    }

    /// Everything since the last call.
    pub fn take(&mut self) -> Vec<BlockEvent> {
        std::mem::take(&mut self.events)
    }
}
