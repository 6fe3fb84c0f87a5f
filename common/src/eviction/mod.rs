//! Which block without a reference is given away next.
//!
//! The block manager tells what it knows: which blocks a request used, in the order of its content
//! chain, when it gives them back (`Evictor::on_request_end`), and which of them nobody holds any more
//! (`Evictor::insert`). It asks for a victim with `Evictor::pop`. There is no clock: age is counted in
//! blocks that came into the pool meanwhile, so a pool that nobody uses does not age.
//!
//! 1. `lru`: the least recently released.
//! 2. `reuse_rate`: the one that is expected to bring the fewest hits for the room it takes, by
//!    `rates` learnt from the blocks of the pool and from a bounded `history` of those that left it.
//!
//! Either way a prefix goes after what follows it, since a block is found only with all before it.

mod history;
mod lru;
mod rates;
mod reuse_rate;

use clap::ValueEnum;

use crate::content::ContentKey;
use crate::ids::BlockId;

use lru::Lru;
use reuse_rate::ReuseRate;

/// How the victim is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EvictionPolicy {
    /// The block that is expected to bring the fewest hits for the room it takes, as learnt while running.
    #[default]
    ReuseRate,
    /// The least recently released block.
    Lru,
}

impl EvictionPolicy {
    /// As it is set.
    pub fn as_str(self) -> &'static str {
        match self {
            EvictionPolicy::ReuseRate => "reuse-rate",
            EvictionPolicy::Lru => "lru",
        }
    }
}

/// The blocks that may be given away, under one policy.
#[derive(Debug)]
pub(crate) enum Evictor {
    Lru(Lru),
    ReuseRate(Box<ReuseRate>),
}

impl Evictor {
    pub(crate) fn new(policy: EvictionPolicy, num_blocks: usize) -> Self {
        match policy {
            EvictionPolicy::Lru => Evictor::Lru(Lru::new(num_blocks)),
            EvictionPolicy::ReuseRate => Evictor::ReuseRate(Box::new(ReuseRate::new(num_blocks))),
        }
    }

    /// A request used these blocks, in the order of its chain, and gives them back now. Before
    /// [`insert`](Self::insert).
    pub(crate) fn on_request_end(&mut self, blocks: &[(BlockId, ContentKey)]) {
        match self {
            Evictor::Lru(_) => {}
            Evictor::ReuseRate(policy) => policy.on_request_end(blocks),
        }
    }

    /// Nobody holds `id` any more. The last blocks of a chain are inserted first.
    pub(crate) fn insert(&mut self, id: BlockId) {
        match self {
            Evictor::Lru(policy) => policy.insert(id),
            Evictor::ReuseRate(policy) => policy.insert(id),
        }
    }

    /// `id` was inserted and is held again.
    pub(crate) fn remove(&mut self, id: BlockId) {
        match self {
            Evictor::Lru(policy) => policy.remove(id),
            Evictor::ReuseRate(policy) => policy.remove(id),
        }
    }

    /// Takes the next victim out. [`forget`](Self::forget) must follow.
    pub(crate) fn pop(&mut self) -> Option<BlockId> {
        match self {
            Evictor::Lru(policy) => policy.pop(),
            Evictor::ReuseRate(policy) => policy.pop(),
        }
    }

    /// The content `key` is no longer in `id`, which was taken out before.
    pub(crate) fn forget(&mut self, id: BlockId, key: ContentKey) {
        match self {
            Evictor::Lru(_) => {}
            Evictor::ReuseRate(policy) => policy.forget(id, key),
        }
    }

    /// Blocks that could be popped.
    pub(crate) fn len(&self) -> usize {
        match self {
            Evictor::Lru(policy) => policy.len(),
            Evictor::ReuseRate(policy) => policy.len(),
        }
    }

    /// The same, one by one.
    pub(crate) fn blocks(&self) -> Vec<BlockId> {
        match self {
            Evictor::Lru(policy) => policy.blocks(),
            Evictor::ReuseRate(policy) => policy.blocks(),
        }
    }

    /// Proves that its own books balance.
    ///
    /// # Errors
    /// A sentence about the first contradiction.
    pub(crate) fn check_integrity(&self) -> Result<(), String> {
        match self {
            Evictor::Lru(policy) => policy.check_integrity(),
            Evictor::ReuseRate(policy) => policy.check_integrity(),
        }
    }
}
