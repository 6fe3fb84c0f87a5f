//! The block that is expected to bring the fewest hits for the room it takes goes first.
//!
//! ```text
//!                 on_request_end: class, uses, parent
//!   leaves   [class][age] -> blocks, oldest first    <──┐ the last child left
//!   interior blocks that others in the pool follow   ───┘
//! ```
//!
//! Only leaves are given away, in the list with the lowest index ([`Rates`]): a chain loses its end first,
//! whatever the classes say. A block's class is what its last request shows: how much of the request was
//! known before, how often the block itself was used, and, if it never was before, how deep it lies. That
//! is what tells the next turn of a chat from a prompt that comes once, without knowing of either.
//!
//! All operations take constant time but for sweeps and renewed indices, which happen once in so many new
//! blocks that their share is constant too.

use super::history::{History, LastUse};
use super::rates::{NUM_AGES, Rates};
use crate::content::ContentKey;
use crate::ids::BlockId;

/// A new block at the end of its request; blocks known before, by uses, in requests known mostly or not;
/// new blocks, by depth, in requests by how much of them was known.
pub(crate) const NUM_CLASSES: usize = 1 + 2 * NUM_USES_MAX as usize + 3 * NUM_DEPTHS;
const NUM_USES_MAX: u8 = 6;
/// By powers of two.
const NUM_DEPTHS: usize = 8;

const NUM_LISTS: usize = NUM_CLASSES * NUM_AGES;
/// The list of the blocks that are no leaves.
const INTERIOR: u16 = NUM_LISTS as u16;
const UNLISTED: u16 = u16::MAX;
const NOBODY: u32 = u32::MAX;
/// New blocks between two sweeps, at least; and a part of the shortest age.
const SWEEP_EVERY_MIN: usize = 64;
const SWEEPS_PER_POOL: usize = 128;
/// New blocks between two renewals of the indices.
const RENEW_EVERY: u32 = 1024;

#[derive(Debug, Clone, Copy)]
struct Tracked {
    last_use: u32,
    /// Differs between the contents that a block has one after another; 0 while it has none.
    serial: u32,
    /// The block before this one in the chain, with its serial.
    parent: (u32, u32),
    num_children: u32,
    list: u16,
    class: u8,
    num_uses: u8,
    previous: u32,
    next: u32,
}

const UNTRACKED: Tracked = Tracked {
    last_use: 0,
    serial: 0,
    parent: (NOBODY, 0),
    num_children: 0,
    list: UNLISTED,
    class: 0,
    num_uses: 0,
    previous: NOBODY,
    next: NOBODY,
};

#[derive(Debug, Clone, Copy)]
struct List {
    first: u32,
    last: u32,
}

#[derive(Debug)]
pub(crate) struct ReuseRate {
    blocks: Vec<Tracked>,
    /// `[class][age]`, then the interior.
    lists: Vec<List>,
    /// Lists of leaves by index, lowest first, and the place of each list in there.
    order: Vec<u16>,
    rank: Vec<u16>,
    /// Which places of `order` have blocks.
    filled: [u64; NUM_LISTS.div_ceil(64)],
    rates: Rates,
    history: History,
    /// Blocks that came into the pool.
    clock: u32,
    next_serial: u32,
    sweep_every: u32,
    swept_at: u32,
    renewed_at: u32,
    num_listed: usize,
}

impl ReuseRate {
    pub(crate) fn new(num_blocks: usize) -> Self {
        let rates = Rates::new(num_blocks);
        let mut policy = Self {
            blocks: vec![UNTRACKED; num_blocks],
            lists: vec![List { first: NOBODY, last: NOBODY }; NUM_LISTS + 1],
            order: Vec::new(),
            rank: vec![0; NUM_LISTS],
            filled: [0; NUM_LISTS.div_ceil(64)],
            rates,
            history: History::new(num_blocks),
            clock: 0,
            next_serial: 1,
            sweep_every: (num_blocks / SWEEPS_PER_POOL).clamp(SWEEP_EVERY_MIN, RENEW_EVERY as usize) as u32,
            swept_at: 0,
            renewed_at: 0,
            num_listed: 0,
        };
        policy.renew_order();
        policy
    }

    pub(crate) fn on_request_end(&mut self, blocks: &[(BlockId, ContentKey)]) {
        let is_new = |(id, _): &&(BlockId, ContentKey)| self.blocks[id.0 as usize].serial == 0;
        let num_new = blocks.iter().filter(is_new).count() as u32;
        let last_uses: Vec<Option<LastUse>> = blocks.iter().map(|(id, key)| self.last_use(*id, *key)).collect();
        let num_known = last_uses.iter().take_while(|last_use| last_use.is_some()).count();
        self.clock = self.clock.wrapping_add(num_new);
        self.rates.on_time(self.clock);
        let mut parent = (NOBODY, 0);
        for (depth, ((id, _), last_use)) in blocks.iter().zip(&last_uses).enumerate() {
            if let Some(last_use) = last_use {
                self.rates.on_reuse(last_use.class, self.clock.wrapping_sub(last_use.at));
            }
            let num_uses = last_use.map_or(1, |last_use| (last_use.num_uses + 1).min(NUM_USES_MAX));
            let class = class_of(depth, blocks.len(), num_known, num_uses);
            self.rates.on_use(class);
            if self.blocks[id.0 as usize].serial == 0 {
                self.track(*id, parent);
            }
            let block = &mut self.blocks[id.0 as usize];
            block.last_use = self.clock;
            block.class = class;
            block.num_uses = num_uses;
            parent = (id.0, block.serial);
        }
        self.keep_up();
    }

    fn last_use(&mut self, id: BlockId, key: ContentKey) -> Option<LastUse> {
        let block = &self.blocks[id.0 as usize];
        if block.serial == 0 {
            return self.history.take(key);
        }
        Some(LastUse { at: block.last_use, class: block.class, num_uses: block.num_uses })
    }

    fn track(&mut self, id: BlockId, parent: (u32, u32)) {
        let block = &mut self.blocks[id.0 as usize];
        debug_assert_eq!(block.list, UNLISTED);
        *block = Tracked { serial: self.next_serial, parent, ..UNTRACKED };
        // Wraps after four thousand million blocks; 0 is none.
        self.next_serial = self.next_serial.wrapping_add(1).max(1);
        if parent.0 != NOBODY {
            self.blocks[parent.0 as usize].num_children += 1;
        }
    }

    pub(crate) fn insert(&mut self, id: BlockId) {
        self.push(self.list_of(id), id);
        self.num_listed += 1;
    }

    pub(crate) fn remove(&mut self, id: BlockId) {
        self.unlink(id);
        self.num_listed -= 1;
    }

    pub(crate) fn pop(&mut self) -> Option<BlockId> {
        let filled = self.filled.iter().enumerate().find(|(_, places)| **places != 0);
        // Without a leaf: one whose children are still held, by a sequence with a copy of its own of this one.
        let list = filled.map_or(INTERIOR, |(word, places)| self.order[word * 64 + places.trailing_zeros() as usize]);
        let id = self.lists[usize::from(list)].first;
        if id == NOBODY {
            return None;
        }
        self.remove(BlockId(id));
        Some(BlockId(id))
    }

    pub(crate) fn forget(&mut self, id: BlockId, key: ContentKey) {
        let block = std::mem::replace(&mut self.blocks[id.0 as usize], UNTRACKED);
        debug_assert_eq!(block.list, UNLISTED);
        // Content that no request has given back yet was never tracked.
        if block.serial == 0 {
            return;
        }
        let last_use = LastUse { at: block.last_use, class: block.class, num_uses: block.num_uses };
        self.history.put(key, last_use, self.clock);
        let (parent, serial) = block.parent;
        if parent == NOBODY || self.blocks[parent as usize].serial != serial {
            return;
        }
        let parent_block = &mut self.blocks[parent as usize];
        parent_block.num_children -= 1;
        if parent_block.num_children == 0 && parent_block.list == INTERIOR {
            self.unlink(BlockId(parent));
            // Behind the others of its kind, so that chains of a kind are cut back in turn: what is left of each
            // is its beginning, which is what other requests share.
            self.push(self.list_of(BlockId(parent)), BlockId(parent));
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.num_listed
    }

    fn list_of(&self, id: BlockId) -> u16 {
        let block = &self.blocks[id.0 as usize];
        if block.num_children > 0 {
            return INTERIOR;
        }
        let age = self.rates.age_step(self.clock.wrapping_sub(block.last_use));
        (usize::from(block.class) * NUM_AGES + age) as u16
    }

    fn push(&mut self, list: u16, id: BlockId) {
        let last = self.lists[usize::from(list)].last;
        let block = &mut self.blocks[id.0 as usize];
        debug_assert_eq!(block.list, UNLISTED);
        (block.list, block.previous, block.next) = (list, last, NOBODY);
        match last {
            NOBODY => self.lists[usize::from(list)].first = id.0,
            last => self.blocks[last as usize].next = id.0,
        }
        self.lists[usize::from(list)].last = id.0;
        self.mark(list);
    }

    fn unlink(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        let (list, previous, next) = (block.list, block.previous, block.next);
        assert!(list != UNLISTED, "only an inserted block is removed");
        block.list = UNLISTED;
        match previous {
            NOBODY => self.lists[usize::from(list)].first = next,
            previous => self.blocks[previous as usize].next = next,
        }
        match next {
            NOBODY => self.lists[usize::from(list)].last = previous,
            next => self.blocks[next as usize].previous = previous,
        }
        self.mark(list);
    }

    /// Notes whether a list of leaves has blocks.
    fn mark(&mut self, list: u16) {
        if list == INTERIOR {
            return;
        }
        let rank = usize::from(self.rank[usize::from(list)]);
        let bit = 1u64 << (rank % 64);
        match self.lists[usize::from(list)].first {
            NOBODY => self.filled[rank / 64] &= !bit,
            _ => self.filled[rank / 64] |= bit,
        }
    }

    fn keep_up(&mut self) {
        if self.clock.wrapping_sub(self.swept_at) >= self.sweep_every {
            self.swept_at = self.clock;
            self.sweep();
        }
        if self.clock.wrapping_sub(self.renewed_at) >= RENEW_EVERY {
            self.renewed_at = self.clock;
            self.renew_order();
        }
    }

    /// Moves on what has grown out of its age.
    fn sweep(&mut self) {
        for list in (0..NUM_LISTS as u16).rev() {
            loop {
                let first = self.lists[usize::from(list)].first;
                if first == NOBODY || self.list_of(BlockId(first)) == list {
                    break;
                }
                self.unlink(BlockId(first));
                self.push(self.list_of(BlockId(first)), BlockId(first));
            }
        }
    }

    fn renew_order(&mut self) {
        let index = self.rates.index();
        let mut order: Vec<u16> = (0..NUM_LISTS as u16).collect();
        // Where nothing tells them apart, the oldest go first.
        let age = |list: u16| usize::from(list) % NUM_AGES;
        order.sort_by(|a, b| {
            index[usize::from(*a)].total_cmp(&index[usize::from(*b)]).then(age(*b).cmp(&age(*a))).then(a.cmp(b))
        });
        for (rank, list) in order.iter().enumerate() {
            self.rank[usize::from(*list)] = rank as u16;
        }
        self.order = order;
        self.filled.fill(0);
        (0..NUM_LISTS as u16).for_each(|list| self.mark(list));
    }

    fn blocks_of(&self, list: usize) -> impl Iterator<Item = BlockId> + '_ {
        let some = |id: u32| (id != NOBODY).then_some(id);
        let next = move |id: &u32| some(self.blocks[*id as usize].next);
        std::iter::successors(some(self.lists[list].first), next).map(BlockId)
    }

    pub(crate) fn blocks(&self) -> Vec<BlockId> {
        (0..=NUM_LISTS).flat_map(|list| self.blocks_of(list)).collect()
    }

    pub(crate) fn check_integrity(&self) -> Result<(), String> {
        let mut num_children = vec![0; self.blocks.len()];
        for block in &self.blocks {
            let (parent, serial) = block.parent;
            if parent != NOBODY && block.serial != 0 && self.blocks[parent as usize].serial == serial {
                num_children[parent as usize] += 1;
            }
        }
        for (id, (block, num_children)) in self.blocks.iter().zip(num_children).enumerate() {
            if block.num_children != num_children {
                return Err(format!("block {id} counts {} children and has {num_children}", block.num_children));
            }
        }
        for list in 0..=NUM_LISTS {
            let is_interior = list == usize::from(INTERIOR);
            for id in self.blocks_of(list) {
                let block = &self.blocks[id.0 as usize];
                if usize::from(block.list) != list || block.serial == 0 {
                    return Err(format!("block {} is in a list that is not its own", id.0));
                }
                if (block.num_children > 0) != is_interior {
                    return Err(format!("block {} has {} children and is listed otherwise", id.0, block.num_children));
                }
            }
            let rank = if is_interior { continue } else { usize::from(self.rank[list]) };
            let is_marked = self.filled[rank / 64] >> (rank % 64) & 1 == 1;
            if is_marked != (self.lists[list].first != NOBODY) {
                return Err(format!("list {list} of the eviction policy is marked wrongly"));
            }
        }
        match self.blocks().len() == self.num_listed {
            true => Ok(()),
            false => Err(format!("{} blocks are listed, {} counted", self.blocks().len(), self.num_listed)),
        }
    }
}

/// Of the block number `depth` in a request of `num_blocks`, the first `num_known` of which were seen before.
fn class_of(depth: usize, num_blocks: usize, num_known: usize, num_uses: u8) -> u8 {
    let is_mostly_known = 4 * num_known >= 3 * num_blocks;
    let class = if num_uses > 1 {
        1 + usize::from(is_mostly_known) * usize::from(NUM_USES_MAX) + usize::from(num_uses) - 1
    } else if depth + 1 == num_blocks {
        0
    } else {
        let known = if is_mostly_known { 2 } else { usize::from(4 * num_known >= num_blocks) };
        let depth = ((depth + 1).ilog2() as usize).min(NUM_DEPTHS - 1);
        1 + 2 * usize::from(NUM_USES_MAX) + known * NUM_DEPTHS + depth
    };
    class as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: usize) -> ContentKey {
        ContentKey(n as u128)
    }

    #[test]
    fn every_class_is_in_the_table_and_means_one_thing() {
        let mut seen = std::collections::HashSet::new();
        for num_blocks in 1..300 {
            for num_known in 0..=num_blocks {
                for (depth, num_uses) in [(0, 1), (num_blocks - 1, 1), (num_blocks / 2, 1), (0, 2), (0, NUM_USES_MAX)] {
                    let class = class_of(depth, num_blocks, num_known, num_uses);
                    assert!(usize::from(class) < NUM_CLASSES);
                    seen.insert((class, num_uses > 1));
                }
            }
        }
        let classes: std::collections::HashSet<_> = seen.iter().map(|(class, _)| class).collect();
        assert_eq!(classes.len(), seen.len(), "a class holds both new blocks and known ones");
    }

    #[test]
    fn a_block_that_left_the_pool_is_known_when_it_returns() {
        let mut policy = ReuseRate::new(4);
        for _ in 0..2 {
            policy.on_request_end(&[(BlockId(0), key(1))]);
            policy.insert(BlockId(0));
            assert_eq!(policy.pop(), Some(BlockId(0)));
            policy.forget(BlockId(0), key(1));
        }
        policy.on_request_end(&[(BlockId(2), key(1))]);
        assert_eq!(policy.blocks[2].num_uses, 3);
    }

    /// One kind of prompt always comes back after 300 new blocks, the other never does; the pool has room for
    /// the first kind alone.
    #[test]
    fn blocks_that_come_back_are_kept_and_blocks_that_do_not_make_room() {
        let num_blocks = 300;
        let mut manager = crate::block_manager::BlockManager::new(num_blocks);
        let digest = crate::content::PrefixDigest([0; 32]);
        // Keys as xxh3 gives them: spread over all bits.
        let name = |chain: u128, depth: u128| crate::content::ContentName {
            key: ContentKey((chain * 64 + depth + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)),
            digest,
        };
        let (mut num_hits, mut num_late_hits) = (0, 0);
        for round in 0u128..6_000 {
            // Of 3 prompts, one (2 blocks) is one of 40 that return in turn; two (4 blocks) come once.
            let (chain, len) = if round % 3 == 0 { (round / 3 % 40, 2) } else { (1_000 + round, 4) };
            let names: Vec<_> = (0..len).map(|depth| name(chain, depth)).collect();
            let hits = manager.longest_prefix(names.iter().copied());
            manager.acquire(&hits);
            let fresh = manager.allocate(names.len() - hits.len()).unwrap();
            for (id, name) in fresh.iter().zip(&names[hits.len()..]) {
                manager.publish(*id, *name);
            }
            manager.release(&[hits.clone(), fresh].concat());
            num_hits += hits.len();
            num_late_hits += if round >= 3_000 { hits.len() } else { 0 };
        }
        // LRU never hits: 40 rounds bring 320 new blocks. At most 2 blocks of every third prompt can be.
        assert!(num_late_hits >= 1_800, "{num_late_hits} of 2000 late hits, {num_hits} of 3920 in all");
    }

    proptest! {
        #[test]
        fn the_victim_is_the_first_of_the_list_with_the_lowest_index(
            requests in prop::collection::vec((0usize..6, 1usize..6, 0usize..12), 1..40)
        ) {
            let num_blocks = 30;
            let mut policy = ReuseRate::new(num_blocks);
            let mut contents: Vec<Option<usize>> = vec![None; num_blocks];
            for (chain, len, num_popped) in requests {
                let mut used = Vec::new();
                for content in (0..len).map(|depth| chain * 10 + depth) {
                    let id = contents.iter().position(|held| *held == Some(content));
                    let id = id.inspect(|id| policy.remove(BlockId(*id as u32)));
                    let Some(id) = id.or_else(|| contents.iter().position(Option::is_none)) else { break };
                    contents[id] = Some(content);
                    used.push((BlockId(id as u32), key(content)));
                }
                policy.on_request_end(&used);
                used.iter().rev().for_each(|(id, _)| policy.insert(*id));
                for _ in 0..num_popped {
                    let listed = policy.blocks();
                    prop_assert_eq!(listed.len(), contents.iter().flatten().count());
                    let list = |id: &BlockId| policy.blocks[id.0 as usize].list;
                    let leaves = listed.iter().filter(|id| policy.blocks[id.0 as usize].num_children == 0);
                    let lowest = leaves.map(list).min_by_key(|list| policy.rank[usize::from(*list)]);
                    let expected = lowest.map(|list| BlockId(policy.lists[usize::from(list)].first));
                    let victim = policy.pop();
                    prop_assert_eq!(victim, expected);
                    let Some(victim) = victim else { break };
                    let content = contents[victim.0 as usize].take();
                    policy.forget(victim, key(content.expect("only a block with content is listed")));
                    prop_assert_eq!(policy.check_integrity(), Ok(()));
                }
            }
        }
    }
}
