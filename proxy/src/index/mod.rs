//! Which node holds which block: what the nodes' block events amount to.
//!
//! Coarse, bounded, and only ever a hint: a block is 64 bits of its key and one bit per holder, nothing is
//! verified, and a request that follows a wrong hint is computed like any other. What is kept exactly is the
//! bound: beyond `num_blocks_max` nothing is taken in, which is counted and logged. Once that has happened to a node,
//! what is taken in continues a prefix that is known there: room is not spent on what no lookup would reach.
//!
//! ```text
//! table 0    key ──> 64 bits: one per holder 0..64       a holder is a node's life and a medium (pool, host, ...)
//! table 1    key ──> 64 bits: holders 64..128            made when there are so many
//! ```
//!
//! A block in the pool is one of the node's block size, in a tier one granule of 16 tokens. Its key is that of its
//! last granule in both, so what a node holds in two media is one entry with two bits; a tier of a node with larger
//! blocks has entries between those of the pool.
//!
//! A node's followers write ([`IndexedNode`]); every request reads ([`BlockIndex::held_prefixes`]). Tables are
//! cut into shards, so that neither waits for the other for long.

mod node;
mod table;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use common::block_events::Medium;
use common::content::ContentKey;

use crate::metrics::ProxyMetrics;
use crate::route::{HeldPrefixes, NodeLife};
pub use node::IndexedNode;
use table::{HOLDERS_PER_TABLE, Table};

/// Holders in all: nodes times the media they use. The fabric's own limit of connections is of this size.
const NUM_HOLDERS_MAX: usize = 1024;

/// See the module.
pub struct BlockIndex {
    num_blocks_max: usize,
    num_blocks: AtomicUsize,
    view: RwLock<Arc<View>>,
    free_holders: Mutex<Vec<Holder>>,
    next_id: AtomicU64,
    is_full_told: AtomicBool,
    metrics: Arc<ProxyMetrics>,
}

/// A bit of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holder {
    table: usize,
    bit: u64,
}

/// What a lookup needs, replaced when a node comes or goes.
#[derive(Clone, Default)]
struct View {
    tables: Vec<Arc<Table>>,
    nodes: Vec<NodeBits>,
}

/// The holders of one node.
#[derive(Clone)]
struct NodeBits {
    id: u64,
    life: NodeLife,
    granules_per_block: usize,
    pool: Vec<Holder>,
    /// Any of them: a node looks a prefix up in all its tiers together.
    tiers: Vec<Holder>,
}

/// How far a prefix was found at one node, in its pool or in its tiers.
struct Walk<'a> {
    node: &'a NodeBits,
    is_in_tiers: bool,
    num_held_granules: usize,
}

impl Walk<'_> {
    fn holders(&self) -> &[Holder] {
        if self.is_in_tiers { &self.node.tiers } else { &self.node.pool }
    }

    /// Whether the block that ends with `granule` is the next one.
    fn is_due(&self, granule: usize) -> bool {
        let num_granules = if self.is_in_tiers { 1 } else { self.node.granules_per_block };
        self.num_held_granules + num_granules == granule + 1
    }

    fn end(&self, held: &mut HeldPrefixes) {
        if self.is_in_tiers {
            held.add_in_tiers(&self.node.life, self.num_held_granules);
        } else {
            held.add(&self.node.life, self.num_held_granules);
        }
    }
}

impl BlockIndex {
    /// An empty index of at most `num_blocks_max` blocks; a block counts once per 64 holders.
    pub fn new(num_blocks_max: usize, metrics: Arc<ProxyMetrics>) -> Self {
        Self {
            num_blocks_max,
            num_blocks: AtomicUsize::new(0),
            view: RwLock::default(),
            free_holders: Mutex::default(),
            next_id: AtomicU64::new(0),
            is_full_told: AtomicBool::new(false),
            metrics,
        }
    }

    /// Whether there is an index at all.
    pub fn is_on(&self) -> bool {
        self.num_blocks_max > 0
    }

    /// Blocks it knows.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks.load(Ordering::Relaxed)
    }

    /// Whether what was left out for want of room could be taken in now: not at the first block that goes, or
    /// a full index would be learnt anew all the time.
    fn has_room_again(&self) -> bool {
        self.num_blocks() < self.num_blocks_max / 4 * 3
    }

    /// How long a prefix each node is believed to hold of the prompt whose granules have these keys, in its pool and
    /// in its tiers. Nodes that hold nothing are left out.
    pub fn held_prefixes(&self, keys: &[ContentKey]) -> HeldPrefixes {
        let view = self.view();
        let walk = |node, is_in_tiers| Walk { node, is_in_tiers, num_held_granules: 0 };
        // Those who may hold the next block as well.
        let mut going: Vec<Walk<'_>> =
            view.nodes.iter().flat_map(|node| [walk(node, false), walk(node, true)]).collect();
        going.retain(|walk| !walk.holders().is_empty());
        let mut held = HeldPrefixes::default();
        let mut masks = vec![0; view.tables.len()];
        for (granule, key) in keys.iter().enumerate() {
            if !going.iter().any(|walk| walk.is_due(granule)) {
                continue;
            }
            for (mask, table) in masks.iter_mut().zip(&view.tables) {
                *mask = table.holders_of(*key);
            }
            going.retain_mut(|walk| {
                if !walk.is_due(granule) {
                    return true;
                }
                if walk.holders().iter().any(|holder| masks[holder.table] & holder.bit != 0) {
                    walk.num_held_granules = granule + 1;
                    return true;
                }
                walk.end(&mut held);
                false
            });
            if going.is_empty() {
                return held;
            }
        }
        for walk in going {
            walk.end(&mut held);
        }
        held
    }

    /// The life of a node whose blocks have `granules_per_block` granules, of which nothing is known yet.
    pub fn join(self: &Arc<Self>, life: NodeLife, granules_per_block: usize) -> IndexedNode {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let bits = NodeBits {
            id,
            life: life.clone(),
            granules_per_block: granules_per_block.max(1),
            pool: Vec::new(),
            tiers: Vec::new(),
        };
        self.change_view(|view| view.nodes.push(bits));
        IndexedNode::new(self.clone(), id, life)
    }

    fn view(&self) -> Arc<View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change_view(&self, change: impl FnOnce(&mut View)) {
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut view));
    }

    /// One more holder for a node, and its table; `None` if there are too many.
    fn take_holder(&self, id: u64, medium: Medium) -> Option<(Holder, Arc<Table>)> {
        let free = self.free_holders().pop();
        let holder = free.or_else(|| self.new_holders())?;
        self.change_view(|view| {
            for node in view.nodes.iter_mut().filter(|node| node.id == id) {
                let holders = if medium == Medium::Pool { &mut node.pool } else { &mut node.tiers };
                holders.push(holder);
            }
        });
        Some((holder, self.view().tables[holder.table].clone()))
    }

    /// Makes a table more.
    fn new_holders(&self) -> Option<Holder> {
        let mut free = self.free_holders();
        let mut made = None;
        self.change_view(|view| {
            let table = view.tables.len();
            if (table + 1) * HOLDERS_PER_TABLE <= NUM_HOLDERS_MAX {
                view.tables.push(Arc::new(Table::new()));
                made = Some(table);
            }
        });
        let table = made?;
        free.extend((0..HOLDERS_PER_TABLE).rev().map(|i| Holder { table, bit: 1 << i }));
        free.pop()
    }

    fn free_holders(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.free_holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one block more may be taken in; it counts then.
    fn reserve_block(&self) -> bool {
        let reserve = |num| (num < self.num_blocks_max).then_some(num + 1);
        self.num_blocks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve).is_ok()
    }

    fn on_forgotten(&self, num_blocks: usize) {
        self.num_blocks.fetch_sub(num_blocks, Ordering::Relaxed);
    }

    /// Tells, once each time it becomes full, that blocks were left out.
    fn on_left_out(&self, life: &NodeLife, num_blocks: u64) {
        self.metrics.on_index_dropped(num_blocks);
        if !self.is_full_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                node = %life.0,
                num_blocks,
                num_blocks_max = self.num_blocks_max,
                "the block index is full and leaves blocks out: requests may miss the nodes that hold them; raise \
                 --block-index-max-blocks"
            );
        }
    }

    fn show(&self) {
        if self.has_room_again() {
            self.is_full_told.store(false, Ordering::Relaxed);
        }
        self.metrics.set_index_blocks(self.num_blocks());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::block_events::{self, StoredBlock};
    use common::block_log::{BlockLog, LogReader};
    use common::ids::{Epoch, NodeId};
    use common::tokens::PackedTokens;
    use common::wire::BlockNews;
    use common::wire::blocks::BlockEvent;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn index(num_blocks_max: usize) -> Arc<BlockIndex> {
        let metrics = ProxyMetrics::new(&NodeId::new("proxy").unwrap(), "tiny");
        Arc::new(BlockIndex::new(num_blocks_max, Arc::new(metrics)))
    }

    fn life(name: &str) -> NodeLife {
        (NodeId::new(name).unwrap(), Epoch(1))
    }

    fn keys(numbers: impl IntoIterator<Item = u128>) -> Vec<ContentKey> {
        numbers.into_iter().map(ContentKey).collect()
    }

    fn stored_in(medium: Medium, key: u128, parent: Option<u128>) -> BlockEvent {
        let parent = parent.map(ContentKey);
        BlockEvent::Stored { medium, key: ContentKey(key), parent, num_tokens: 16, tokens: PackedTokens::default() }
    }

    fn stored(key: u128, parent: Option<u128>) -> BlockEvent {
        stored_in(Medium::Pool, key, parent)
    }

    fn removed_from(medium: Medium, key: u128) -> BlockEvent {
        BlockEvent::Removed { medium, key: ContentKey(key) }
    }

    fn removed(key: u128) -> BlockEvent {
        removed_from(Medium::Pool, key)
    }

    fn news(events: Vec<BlockEvent>) -> BlockNews {
        BlockNews { is_restart: false, events, resume_at: None }
    }

    /// Blocks `keys`, each the child of the one before it.
    fn chain(keys: impl IntoIterator<Item = u128>) -> BlockNews {
        let mut parent = None;
        news(keys.into_iter().map(|key| stored(key, parent.replace(key))).collect())
    }

    #[test]
    fn each_node_is_known_for_what_it_holds_without_a_gap() {
        let index = index(100);
        let (mut a, mut b) = (index.join(life("a"), 1), index.join(life("b"), 1));
        a.apply(&chain(1..=4));
        b.apply(&chain(1..=2));
        let held = index.held_prefixes(&keys(1..=6));
        assert_eq!((held.num_pool_tokens(&life("a")), held.num_pool_tokens(&life("b"))), (64, 32));
        a.apply(&news(vec![removed(2)]));
        assert_eq!(index.held_prefixes(&keys(1..=6)).num_pool_tokens(&life("a")), 16);
        assert_eq!(index.held_prefixes(&keys([9, 1, 2])), HeldPrefixes::default());
        assert_eq!(index.num_blocks(), 4, "a block that two nodes hold counts once");
    }

    #[test]
    fn nodes_of_different_block_sizes_are_looked_up_at_their_own_blocks() {
        let index = index(100);
        let (mut small, mut large) = (index.join(life("s"), 1), index.join(life("l"), 4));
        small.apply(&chain(1..=5));
        // Its blocks are named by their last granules.
        large.apply(&chain([4, 8]));
        let held = index.held_prefixes(&keys(1..=11));
        assert_eq!((held.num_pool_tokens(&life("s")), held.num_pool_tokens(&life("l"))), (5 * 16, 8 * 16));
        assert_eq!(index.held_prefixes(&keys(1..=3)).num_pool_tokens(&life("l")), 0);
    }

    #[test]
    fn full_index_keeps_whole_beginnings_and_counts_what_it_leaves_out() {
        let index = index(3);
        let mut node = index.join(life("a"), 1);
        node.apply(&chain(1..=5));
        assert_eq!((index.num_blocks(), node.num_left_out()), (3, 2));
        node.apply(&news(vec![removed(1)]));
        // 7 continues what is not known.
        node.apply(&news(vec![stored(7, Some(6)), stored(8, None)]));
        assert_eq!((index.num_blocks(), node.num_left_out()), (3, 3));
        assert_eq!(index.held_prefixes(&keys([8])).num_pool_tokens(&life("a")), 16);
        node.apply(&BlockNews { is_restart: true, ..chain(1..=3) });
        assert_eq!((index.num_blocks(), node.num_left_out()), (3, 0));
    }

    #[test]
    fn node_is_relearnt_when_a_quarter_is_free_and_only_if_room_was_what_it_lacked() {
        let index = index(8);
        let (mut a, mut b) = (index.join(life("a"), 1), index.join(life("b"), 1));
        a.apply(&chain(1..=8));
        b.apply(&chain(11..=12));
        assert!(!b.is_worth_relearning());
        a.apply(&news(vec![removed(8), removed(7)]));
        assert!(!b.is_worth_relearning(), "two of eight are free");
        a.apply(&news(vec![removed(6)]));
        assert!(b.is_worth_relearning());
        b.apply(&BlockNews { is_restart: true, ..chain(11..=12) });
        assert!(!b.is_worth_relearning());
        assert_eq!(index.held_prefixes(&keys(11..=12)).num_pool_tokens(&life("b")), 32);
        // What continues nothing that is known is taken in where there is room.
        b.apply(&news(vec![stored(20, Some(19))]));
        assert!(!b.is_worth_relearning() && b.num_left_out() == 0);
    }

    /// Tokens of the prompt with these granules that `a` holds, in its pool and in its tiers.
    fn held_by_a(index: &BlockIndex, granules: impl IntoIterator<Item = u128>) -> (usize, usize) {
        let held = index.held_prefixes(&keys(granules));
        (held.num_pool_tokens(&life("a")), held.num_tier_tokens(&life("a")))
    }

    #[test]
    fn index_follows_a_block_from_the_pool_into_a_tier_and_out_of_it() {
        let index = index(10);
        let mut node = index.join(life("a"), 1);
        let steps = [
            (stored(1, None), (16, 0)),
            (stored_in(Medium::Host, 1, None), (16, 16)),
            (removed(1), (0, 16)),
            // Loaded again.
            (stored(1, None), (16, 16)),
            (removed(1), (0, 16)),
            (removed_from(Medium::Host, 1), (0, 0)),
        ];
        for (step, (event, expected)) in steps.into_iter().enumerate() {
            node.apply(&news(vec![event]));
            assert_eq!(held_by_a(&index, [1]), expected, "step {step}");
            assert_eq!(index.num_blocks(), usize::from(expected != (0, 0)), "one entry, whatever media it is in");
        }
        node.apply(&news(vec![stored(1, None), stored_in(Medium::Host, 1, None)]));
        node.apply(&news(vec![BlockEvent::Cleared { medium: Medium::Pool }]));
        assert_eq!((held_by_a(&index, [1]), index.num_blocks()), ((0, 16), 1));
    }

    #[test]
    fn tiers_are_looked_up_by_granules_and_the_pool_by_blocks() {
        let index = index(100);
        let mut node = index.join(life("a"), 2);
        // Two blocks of two granules in the pool; on the host four granules, one of them told twice.
        let mut events = vec![stored(2, None), stored(4, Some(2))];
        let host = |key: u128| stored_in(Medium::Host, key, (key > 1).then(|| key - 1));
        events.extend([1, 2, 3, 5, 2].map(host));
        node.apply(&news(events));
        assert_eq!(held_by_a(&index, 1..=6), (64, 48), "the pool's blocks do not continue the host's");
        node.apply(&news(vec![stored_in(Medium::Disk, 4, Some(3))]));
        assert_eq!(held_by_a(&index, 1..=6), (64, 80), "tiers continue each other");
        assert_eq!(held_by_a(&index, 2..=6), (0, 64), "blocks of the pool end where they end");
        assert_eq!(index.num_blocks(), 5);
    }

    #[test]
    fn beginning_that_comes_back_joins_what_was_left_of_it() {
        let index = index(10);
        let mut node = index.join(life("a"), 1);
        // As a snapshot of the node tells it: the granule that came back has the newest number.
        let host = |key: u128| stored_in(Medium::Host, key, (key > 1).then(|| key - 1));
        node.apply(&BlockNews { is_restart: true, ..news(vec![host(2), host(3), host(1)]) });
        assert_eq!(held_by_a(&index, 1..=3), (0, 48));
    }

    #[test]
    fn node_that_goes_takes_its_part_along_and_its_bit_is_given_to_the_next() {
        let index = index(100);
        let mut a = index.join(life("a"), 1);
        a.apply(&chain(1..=4));
        drop(a);
        assert_eq!(index.num_blocks(), 0);
        let mut b = index.join(life("b"), 1);
        b.apply(&chain([9]));
        assert_eq!(index.held_prefixes(&keys(1..=4)), HeldPrefixes::default());
        assert_eq!(index.view().tables.len(), 1);
    }

    #[test]
    fn more_nodes_than_a_table_has_bits_are_told_apart() {
        let index = index(1000);
        let mut nodes: Vec<_> = (0..130).map(|i| index.join(life(&format!("n{i}")), 1)).collect();
        for (i, node) in nodes.iter_mut().enumerate() {
            node.apply(&chain([1, 100 + i as u128]));
        }
        let held = index.held_prefixes(&keys([1, 229]));
        assert_eq!((held.num_pool_tokens(&life("n129")), held.num_pool_tokens(&life("n0"))), (32, 16));
        drop(nodes);
        assert_eq!(index.num_blocks(), 0);
    }

    proptest! {
        /// Two nodes, each with a pool and a host tier, whose logs are read in pieces, by connections that end, and
        /// now and then too late: once all is read, the index says what the nodes hold, block by block.
        #[test]
        fn index_agrees_with_what_the_nodes_hold(
            ops in prop::collection::vec((0u8..16, any::<bool>(), any::<bool>(), 1u128..9), 0..200),
            num_gone_max in 0usize..8,
        ) {
            let index = index(1000);
            let names = ["a", "b"];
            let mut nodes = names.map(|name| (BlockLog::new(num_gone_max), LogReader::new(None), index.join(life(name), 1)));
            let mut truth: HashSet<(usize, Medium, u128)> = HashSet::new();
            let hear = |log: &BlockLog, reader: &mut LogReader, node: &mut IndexedNode, num_bytes_max: usize| {
                let batch = log.read(reader, num_bytes_max);
                let resume_at = batch.resume_at;
                let is_empty = batch.is_empty();
                let events = batch.events.iter().map(|event| BlockEvent::of(event, false)).collect();
                node.apply(&BlockNews { is_restart: batch.is_restart, events, resume_at: None });
                (is_empty, resume_at)
            };
            for (op, is_b, is_host, key) in ops {
                let at = usize::from(is_b);
                let (log, reader, node) = &mut nodes[at];
                let medium = if is_host { Medium::Host } else { Medium::Pool };
                match op {
                    0..8 => {
                        let parent = (key > 1).then(|| ContentKey(key - 1));
                        let block = StoredBlock { medium, key: ContentKey(key), parent, tokens: [0; 16].into() };
                        log.append(block_events::BlockEvent::Stored(block));
                        truth.insert((at, medium, key));
                    }
                    8..13 => {
                        log.append(block_events::BlockEvent::Removed { medium, key: ContentKey(key) });
                        truth.remove(&(at, medium, key));
                    }
                    13 => {
                        log.append(block_events::BlockEvent::Cleared { medium });
                        truth.retain(|(of, cleared, _)| (*of, *cleared) != (at, medium));
                    }
                    14 => { hear(log, reader, node, 1); }
                    // The connection ends: the next one goes on where the last message said.
                    _ => {
                        let (_, resume_at) = hear(log, reader, node, 200);
                        *reader = LogReader::new(resume_at);
                    }
                }
            }
            for (log, reader, node) in &mut nodes {
                while !hear(log, reader, node, 300).0 {}
            }
            for (at, name) in names.into_iter().enumerate() {
                let expected = |medium| (1..9).take_while(|key| truth.contains(&(at, medium, *key))).count() * 16;
                let held = index.held_prefixes(&keys(1..9));
                let found = (held.num_pool_tokens(&life(name)), held.num_tier_tokens(&life(name)));
                prop_assert_eq!(found, (expected(Medium::Pool), expected(Medium::Host)));
                // Each block by itself, whatever comes before it.
                for key in 1..9u128 {
                    let held = index.held_prefixes(&keys([key]));
                    let found = [held.num_pool_tokens(&life(name)), held.num_tier_tokens(&life(name))];
                    let expected = [Medium::Pool, Medium::Host].map(|medium| usize::from(truth.contains(&(at, medium, key))) * 16);
                    prop_assert_eq!(found, expected);
                }
            }
            let known: HashSet<u128> = truth.iter().map(|(_, _, key)| *key).collect();
            prop_assert_eq!(index.num_blocks(), known.len());
        }
    }
}
