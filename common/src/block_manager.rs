//! Who holds which block of the KV pool.
//!
//! Every block is in exactly one of three states, and [`BlockManager::check_integrity`] proves it:
//!
//! ```text
//!            allocate                     release (no name)
//!   free ───────────────> referenced ───────────────────────> free
//!    ^                     ^      │ release (named)
//!    │ evict               │      v
//!    └──────────────────── cached          acquire (hit): cached -> referenced
//! ```
//!
//! A block gets a name ([`BlockManager::publish`]) once it is full and its bytes are final; it keeps the
//! name when released, until it is evicted. A hit compares the whole-prefix digest, not the key alone.
//! A partial last block is private to its sequence: it has no name. Which cached block is evicted is up to
//! the [`eviction`](crate::eviction) policy.
//!
//! The index from keys to blocks holds block ids alone; the key it compares is the one in the block, which
//! has to be read for its digest anyway.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use crate::block_events::BlockJournal;
use crate::content::{ContentKey, ContentName, PrefixDigest};
use crate::eviction::{EvictionPolicy, Evictor};
use crate::ids::BlockId;

/// 64 bytes, a cache line: name and state in one read.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// Meaningful while `is_named`.
    name: ContentName,
    ref_count: u32,
    is_named: bool,
}

const NAMELESS: Block =
    Block { name: ContentName { key: ContentKey(0), digest: PrefixDigest([0; 32]) }, ref_count: 0, is_named: false };

/// Hashes keys, which are hashes already: one multiplication, under a secret of the process. Whoever can
/// choose prompts can compute keys, and so could fill one bucket of the index with blocks of their own;
/// without the secret they do not know which keys share a bucket.
#[derive(Debug, Clone, Copy)]
struct KeyHasher {
    secret: [u64; 2],
}

impl KeyHasher {
    fn new() -> Self {
        let random = RandomState::new();
        Self { secret: [random.hash_one(0u8), random.hash_one(1u8)] }
    }

    fn hash(self, key: ContentKey) -> u64 {
        let low = key.0 as u64 ^ self.secret[0];
        let high = (key.0 >> 64) as u64 ^ self.secret[1];
        let product = u128::from(low) * u128::from(high);
        product as u64 ^ (product >> 64) as u64
    }
}

/// Books over the blocks of one pool. Touches no bytes.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    free: VecDeque<BlockId>,
    by_key: HashTable<BlockId>,
    hasher: KeyHasher,
    /// Cached blocks.
    evictor: Evictor,
    num_evictions: u64,
    /// What was named and forgotten, for those who listen.
    pub(crate) journal: BlockJournal,
}

/// How many blocks are in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCounts {
    /// All.
    pub total: usize,
    /// Without content.
    pub free: usize,
    /// Unreferenced, with content that may be hit.
    pub cached: usize,
    /// Held by sequences.
    pub referenced: usize,
}

impl BlockManager {
    /// Books over `num_blocks` free blocks, under the default eviction policy.
    pub fn new(num_blocks: usize) -> Self {
        Self::with_policy(num_blocks, EvictionPolicy::default())
    }

    /// Books over `num_blocks` free blocks.
    pub fn with_policy(num_blocks: usize, policy: EvictionPolicy) -> Self {
        Self {
            blocks: vec![NAMELESS; num_blocks],
            free: (0..num_blocks as u32).map(BlockId).collect(),
            by_key: HashTable::new(),
            hasher: KeyHasher::new(),
            evictor: Evictor::new(policy, num_blocks),
            num_evictions: 0,
            journal: BlockJournal::default(),
        }
    }

    /// Blocks that [`allocate`](Self::allocate) could give now: free and cached ones.
    pub fn num_available(&self) -> usize {
        self.free.len() + self.evictor.len()
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        let (free, cached) = (self.free.len(), self.evictor.len());
        BlockCounts { total: self.blocks.len(), free, cached, referenced: self.blocks.len() - free - cached }
    }

    /// Cached blocks that were given away since the start.
    pub fn num_evictions(&self) -> u64 {
        self.num_evictions
    }

    /// Leading blocks of `names` that are here, verified by digest.
    pub fn longest_prefix(&self, names: impl Iterator<Item = ContentName>) -> Vec<BlockId> {
        names.map_while(|name| self.lookup(name)).collect()
    }

    fn lookup(&self, name: ContentName) -> Option<BlockId> {
        let id = self.find(name.key)?;
        (self.blocks[id.0 as usize].name.digest == name.digest).then_some(id)
    }

    /// The block under `key`, whatever its digest.
    fn find(&self, key: ContentKey) -> Option<BlockId> {
        self.by_key.find(self.hasher.hash(key), |id| self.blocks[id.0 as usize].name.key == key).copied()
    }

    /// Whether giving `id` back makes it available.
    pub(crate) fn is_held_once(&self, id: BlockId) -> bool {
        self.blocks[id.0 as usize].ref_count == 1
    }

    /// Of `hits`, those that are cached now and would no longer be available to allocate once acquired.
    pub fn num_unreferenced(&self, hits: &[BlockId]) -> usize {
        hits.iter().filter(|id| self.blocks[id.0 as usize].ref_count == 0).count()
    }

    /// Takes one more reference on each block.
    pub fn acquire(&mut self, ids: &[BlockId]) {
        for id in ids {
            let block = &mut self.blocks[id.0 as usize];
            if block.ref_count == 0 {
                self.evictor.remove(*id);
            }
            block.ref_count += 1;
        }
    }

    /// Takes `count` blocks with one reference each, evicting cached blocks if need be. All or nothing.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.num_available() {
            return None;
        }
        Some((0..count).map(|_| self.allocate_one()).collect())
    }

    fn allocate_one(&mut self) -> BlockId {
        let id = self.free.pop_front().unwrap_or_else(|| {
            let id = self.evictor.pop().expect("the caller checked that a block is available");
            self.forget_name(id);
            self.num_evictions += 1;
            id
        });
        let block = &mut self.blocks[id.0 as usize];
        debug_assert_eq!(block.ref_count, 0);
        block.ref_count = 1;
        id
    }

    fn forget_name(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if std::mem::take(&mut block.is_named) {
            let key = block.name.key;
            if let Ok(entry) = self.by_key.find_entry(self.hasher.hash(key), |other| *other == id) {
                entry.remove();
            }
            self.evictor.forget(id, key);
            self.journal.on_removed(key);
        }
    }

    /// Gives one reference of each block back: all blocks of a request, in the order of its chain. The last
    /// blocks of the list become evictable first: a prefix is worth more than what follows it.
    ///
    /// # Panics
    /// If a block is not referenced: the caller released twice.
    pub fn release(&mut self, ids: &[BlockId]) {
        self.note_use(ids);
        self.give_back(ids);
    }

    /// A request used these blocks, in the order of its chain, and is about to give them back.
    pub(crate) fn note_use(&mut self, ids: &[BlockId]) {
        let named = ids.iter().map(|id| (*id, &self.blocks[id.0 as usize])).filter(|(_, block)| block.is_named);
        let named: Vec<_> = named.map(|(id, block)| (id, block.name.key)).collect();
        self.evictor.on_request_end(&named);
    }

    /// [`release`](Self::release) of blocks whose use has been noted; the last of a chain first.
    pub(crate) fn give_back(&mut self, ids: &[BlockId]) {
        for id in ids.iter().rev() {
            let block = &mut self.blocks[id.0 as usize];
            assert!(block.ref_count > 0, "block {} was released twice", id.0);
            block.ref_count -= 1;
            if block.ref_count > 0 {
                continue;
            }
            if block.is_named {
                self.evictor.insert(*id);
            } else {
                self.free.push_back(*id);
            }
        }
    }

    /// Names a referenced block whose content is complete and final. If other bytes are already known
    /// under that key, they stay the ones that are found and this block remains nameless. Whether it was named.
    pub fn publish(&mut self, id: BlockId, name: ContentName) -> bool {
        debug_assert!(self.blocks[id.0 as usize].ref_count > 0, "only a held block can be published");
        if self.blocks[id.0 as usize].is_named || self.find(name.key).is_some() {
            return false;
        }
        let block = &mut self.blocks[id.0 as usize];
        (block.name, block.is_named) = (name, true);
        let Self { blocks, by_key, hasher, .. } = self;
        by_key.insert_unique(hasher.hash(name.key), id, |id| hasher.hash(blocks[id.0 as usize].name.key));
        true
    }

    /// Makes every cached block free.
    pub fn clear_cached(&mut self) {
        while let Some(id) = self.evictor.pop() {
            self.forget_name(id);
            self.free.push_back(id);
        }
        if self.by_key.is_empty() {
            self.journal.on_cleared();
        }
    }

    /// Proves that every block is in exactly one state and every name leads to its block.
    ///
    /// # Errors
    /// A sentence about the first contradiction.
    pub fn check_integrity(&self) -> Result<(), String> {
        let mut seen = vec![0u8; self.blocks.len()];
        let cached = self.evictor.blocks();
        for id in self.free.iter().chain(&cached) {
            seen[id.0 as usize] += 1;
            if self.blocks[id.0 as usize].ref_count != 0 {
                return Err(format!("block {} is listed as unused but has references", id.0));
            }
        }
        for (index, block) in self.blocks.iter().enumerate() {
            let expected = u8::from(block.ref_count == 0);
            if seen[index] != expected {
                return Err(format!(
                    "block {index} has {} references and is listed {} times",
                    block.ref_count, seen[index]
                ));
            }
            if block.is_named && self.find(block.name.key) != Some(BlockId(index as u32)) {
                return Err(format!("block {index} has a name that does not lead to it"));
            }
        }
        if let Some(id) = cached.iter().find(|id| !self.blocks[id.0 as usize].is_named) {
            return Err(format!("block {} is cached without content", id.0));
        }
        let named = self.blocks.iter().filter(|block| block.is_named).count();
        if named != self.by_key.len() {
            return Err(format!("{named} blocks have names but {} names are known", self.by_key.len()));
        }
        self.evictor.check_integrity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;
    use proptest::prelude::*;

    fn name(n: u8) -> ContentName {
        ContentName { key: ContentKey(n.into()), digest: PrefixDigest([n; 32]) }
    }

    #[test]
    fn freed_block_keeps_its_name_until_reused() {
        let mut manager = BlockManager::new(2);
        let ids = manager.allocate(1).unwrap();
        manager.publish(ids[0], name(1));
        manager.release(&ids);
        assert_eq!(manager.longest_prefix([name(1)].into_iter()), ids);
        let both = manager.allocate(2).unwrap();
        assert_eq!(manager.longest_prefix([name(1)].into_iter()), []);
        assert_eq!(manager.num_evictions(), 1);
        manager.release(&both);
        manager.check_integrity().unwrap();
    }

    #[test]
    fn allocation_is_all_or_nothing() {
        let mut manager = BlockManager::new(3);
        assert!(manager.allocate(4).is_none());
        assert_eq!(manager.num_available(), 3);
    }

    #[test]
    fn collision_is_a_miss_also_in_a_parent() {
        let mut manager = BlockManager::new(3);
        let ids = manager.allocate(2).unwrap();
        manager.publish(ids[0], name(1));
        manager.publish(ids[1], name(2));
        let forged = ContentName { key: ContentKey(1), digest: PrefixDigest([9; 32]) };
        assert_eq!(manager.longest_prefix([forged, name(2)].into_iter()), []);
        let forged_child = ContentName { key: ContentKey(2), digest: PrefixDigest([9; 32]) };
        assert_eq!(manager.longest_prefix([name(1), forged_child].into_iter()), [ids[0]]);
    }

    #[test]
    fn deepest_block_is_evicted_first() {
        for policy in EvictionPolicy::value_variants() {
            let mut manager = BlockManager::with_policy(2, *policy);
            let ids = manager.allocate(2).unwrap();
            manager.publish(ids[0], name(1));
            manager.publish(ids[1], name(2));
            manager.release(&ids);
            manager.allocate(1).unwrap();
            assert_eq!(manager.longest_prefix([name(1), name(2)].into_iter()), [ids[0]]);
        }
    }

    #[test]
    fn a_cached_block_is_given_away_even_if_what_follows_it_is_held() {
        for policy in EvictionPolicy::value_variants() {
            let mut manager = BlockManager::with_policy(3, *policy);
            let first = manager.allocate(2).unwrap();
            manager.publish(first[0], name(1));
            manager.publish(first[1], name(2));
            manager.release(&first);
            manager.acquire(&first[1..]);
            assert_eq!(manager.num_available(), 2);
            let rest = manager.allocate(2).unwrap();
            manager.check_integrity().unwrap();
            manager.release(&rest);
            manager.release(&first[1..]);
            manager.clear_cached();
            assert_eq!(manager.counts().free, 3);
            manager.check_integrity().unwrap();
        }
    }

    #[test]
    fn a_block_is_a_cache_line() {
        assert_eq!(std::mem::size_of::<Block>(), 64);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn releasing_twice_is_a_bug_that_shows() {
        let mut manager = BlockManager::new(1);
        let ids = manager.allocate(1).unwrap();
        manager.release(&ids);
        manager.release(&ids);
    }

    /// A request for the path of `turns` down a binary tree of contents, one block per node.
    fn path(turns: &[bool]) -> Vec<ContentName> {
        let node = |node: u8, turn: &bool| Some(2 * node + 1 + u8::from(*turn));
        turns.iter().scan(0u8, |at, turn| node(*at, turn).inspect(|next| *at = *next)).map(name).collect()
    }

    /// Runs one request to its end: finds, allocates, publishes, gives back. Returns the blocks it found.
    fn serve(manager: &mut BlockManager, names: &[ContentName]) -> usize {
        let hits = manager.longest_prefix(names.iter().copied());
        manager.acquire(&hits);
        let fresh = manager.allocate(names.len() - hits.len()).unwrap();
        for (id, name) in fresh.iter().zip(&names[hits.len()..]) {
            manager.publish(*id, *name);
        }
        manager.release(&[hits.clone(), fresh].concat());
        hits.len()
    }

    proptest! {
        /// What could not be hit would take room for nothing: a prefix outlives what follows it.
        #[test]
        fn whatever_is_cached_can_be_hit(
            is_lru: bool,
            num_blocks in 6usize..40,
            paths in prop::collection::vec(prop::collection::vec(any::<bool>(), 1..=6), 1..200),
        ) {
            let policy = if is_lru { EvictionPolicy::Lru } else { EvictionPolicy::ReuseRate };
            let mut manager = BlockManager::with_policy(num_blocks, policy);
            for turns in paths {
                serve(&mut manager, &path(&turns));
                prop_assert_eq!(manager.check_integrity(), Ok(()));
                for node in (1..127).map(name).filter(|name| manager.lookup(*name).is_some()) {
                    let parent = (node.key.0 as u8 - 1) / 2;
                    prop_assert!(parent == 0 || manager.lookup(name(parent)).is_some(), "{node:?} is stranded");
                }
            }
        }
        #[test]
        fn books_balance_under_any_use(is_lru: bool, ops in prop::collection::vec((0u8..5, any::<u8>()), 0..400)) {
            let policy = if is_lru { EvictionPolicy::Lru } else { EvictionPolicy::ReuseRate };
            let mut manager = BlockManager::with_policy(8, policy);
            let mut held: Vec<Vec<BlockId>> = Vec::new();
            for (op, arg) in ops {
                match op {
                    0 => held.extend(manager.allocate(usize::from(arg % 4))),
                    1 if !held.is_empty() => {
                        let ids = held.swap_remove(usize::from(arg) % held.len());
                        manager.release(&ids);
                    }
                    2 => if let Some(id) = held.iter().flatten().nth(usize::from(arg) % 8) {
                        manager.publish(*id, name(arg % 12));
                    },
                    3 => {
                        let hits = manager.longest_prefix((arg % 12..12).map(name));
                        manager.acquire(&hits);
                        held.push(hits);
                    }
                    4 if arg == 0 => manager.clear_cached(),
                    _ => {}
                }
                prop_assert_eq!(manager.check_integrity(), Ok(()));
                let distinct: std::collections::HashSet<_> = held.iter().flatten().collect();
                prop_assert_eq!(manager.counts().referenced, distinct.len());
            }
            for ids in held {
                manager.release(&ids);
            }
            prop_assert_eq!(manager.num_available(), 8);
        }
    }
}
