//! Who holds which block of the KV pool.
//!
//! Every block is in exactly one of three states, and [`BlockManager::check_integrity`] proves it:
//!
//! ```text
//!            allocate                     release (no name)
//!   free ───────────────> referenced ───────────────────────> free
//!    ^                     ^      │ release (named)
//!    │ evict (oldest)      │      v
//!    └──────────────────── cached          acquire (hit): cached -> referenced
//! ```
//!
//! A block gets a name ([`BlockManager::publish`]) once it is full and its bytes are final; it keeps the
//! name when released, until it is evicted. A hit compares the whole-prefix digest, not the key alone.
//! A partial last block is private to its sequence: it has no name.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::block_events::BlockJournal;
use crate::content::{ContentKey, ContentName};
use crate::ids::BlockId;

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    ref_count: u32,
    name: Option<ContentName>,
    /// Position in `lru`, meaningful while cached.
    released_at: u64,
}

/// Books over the blocks of one pool. Touches no bytes.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    free: VecDeque<BlockId>,
    by_key: HashMap<ContentKey, BlockId>,
    /// Cached blocks by the time of their release, oldest first.
    lru: BTreeMap<u64, BlockId>,
    clock: u64,
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
    /// Books over `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); num_blocks],
            free: (0..num_blocks as u32).map(BlockId).collect(),
            by_key: HashMap::new(),
            lru: BTreeMap::new(),
            clock: 0,
            num_evictions: 0,
            journal: BlockJournal::default(),
        }
    }

    /// Blocks that [`allocate`](Self::allocate) could give now: free and cached ones.
    pub fn num_available(&self) -> usize {
        self.free.len() + self.lru.len()
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        let (free, cached) = (self.free.len(), self.lru.len());
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
        let id = *self.by_key.get(&name.key)?;
        (self.blocks[id.0 as usize].name == Some(name)).then_some(id)
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
                self.lru.remove(&block.released_at).expect("an unreferenced block with content is in the LRU list");
            }
            block.ref_count += 1;
        }
    }

    /// Takes `count` blocks with one reference each, evicting the least recently released cached blocks
    /// if need be. All or nothing.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.num_available() {
            return None;
        }
        Some((0..count).map(|_| self.allocate_one()).collect())
    }

    fn allocate_one(&mut self) -> BlockId {
        let id = self.free.pop_front().unwrap_or_else(|| {
            let (_, id) = self.lru.pop_first().expect("the caller checked that a block is available");
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
        if let Some(name) = self.blocks[id.0 as usize].name.take() {
            self.by_key.remove(&name.key);
            self.journal.on_removed(name.key);
        }
    }

    /// Gives one reference of each block back. The last blocks of the list become evictable first: a
    /// prefix is worth more than what follows it.
    ///
    /// # Panics
    /// If a block is not referenced: the caller released twice.
    pub fn release(&mut self, ids: &[BlockId]) {
        for id in ids.iter().rev() {
            let block = &mut self.blocks[id.0 as usize];
            assert!(block.ref_count > 0, "block {} was released twice", id.0);
            block.ref_count -= 1;
            if block.ref_count > 0 {
                continue;
            }
            if block.name.is_some() {
                self.clock += 1;
                block.released_at = self.clock;
                self.lru.insert(self.clock, *id);
            } else {
                self.free.push_back(*id);
            }
        }
    }

    /// Names a referenced block whose content is complete and final. If other bytes are already known
    /// under that key, they stay the ones that are found and this block remains nameless. Whether it was named.
    pub fn publish(&mut self, id: BlockId, name: ContentName) -> bool {
        debug_assert!(self.blocks[id.0 as usize].ref_count > 0, "only a held block can be published");
        let is_named = self.blocks[id.0 as usize].name.is_none() && !self.by_key.contains_key(&name.key);
        if is_named {
            self.by_key.insert(name.key, id);
            self.blocks[id.0 as usize].name = Some(name);
        }
        is_named
    }

    /// Makes every cached block free.
    pub fn clear_cached(&mut self) {
        while let Some((_, id)) = self.lru.pop_first() {
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
        for id in self.free.iter().chain(self.lru.values()) {
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
            if let Some(name) = block.name
                && self.by_key.get(&name.key) != Some(&BlockId(index as u32))
            {
                return Err(format!("block {index} has a name that does not lead to it"));
            }
        }
        for (stamp, id) in &self.lru {
            let block = &self.blocks[id.0 as usize];
            if block.name.is_none() || block.released_at != *stamp {
                return Err(format!("block {} is cached without content or out of order", id.0));
            }
        }
        let named = self.blocks.iter().filter(|block| block.name.is_some()).count();
        if named != self.by_key.len() {
            return Err(format!("{named} blocks have names but {} names are known", self.by_key.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::PrefixDigest;
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
        let mut manager = BlockManager::new(2);
        let ids = manager.allocate(2).unwrap();
        manager.publish(ids[0], name(1));
        manager.publish(ids[1], name(2));
        manager.release(&ids);
        manager.allocate(1).unwrap();
        assert_eq!(manager.longest_prefix([name(1), name(2)].into_iter()), [ids[0]]);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn releasing_twice_is_a_bug_that_shows() {
        let mut manager = BlockManager::new(1);
        let ids = manager.allocate(1).unwrap();
        manager.release(&ids);
        manager.release(&ids);
    }

    proptest! {
        #[test]
        fn books_balance_under_any_use(ops in prop::collection::vec((0u8..5, any::<u8>()), 0..400)) {
            let mut manager = BlockManager::new(8);
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
