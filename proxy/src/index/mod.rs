//! Which node holds which block: what the nodes' block events amount to.
//!
//! Coarse, bounded, and only ever a hint: a block is 64 bits of its key and one bit per holder, nothing is
//! verified, and a request that follows a wrong hint is computed like any other. What is kept exactly is the
//! bound: beyond `num_blocks_max` nothing is taken in, which is counted and logged. What is taken in always
//! continues a prefix that is known, so a full index holds whole beginnings and no orphans.
//!
//! ```text
//! table 0    key ──> 64 bits: one per holder 0..64       a holder is a node's life and a medium (pool, host, ...)
//! table 1    key ──> 64 bits: holders 64..128            made when there are so many
//! ```
//!
//! A node's followers write ([`IndexedNode`]); every request reads ([`BlockIndex::held_prefixes`]). Tables are
//! cut into shards, so that neither waits for the other for long.

mod node;
mod table;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

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
    holders: Vec<Holder>,
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

    /// How long a prefix each node is believed to hold of the prompt whose granules have these keys. Nodes that
    /// hold nothing are left out.
    pub fn held_prefixes(&self, keys: &[ContentKey]) -> HeldPrefixes {
        let view = self.view();
        // (node, granules held), as long as the next block may be held as well.
        let mut going: Vec<(usize, usize)> = (0..view.nodes.len()).map(|node| (node, 0)).collect();
        let mut held = HeldPrefixes::default();
        let mut masks = vec![0; view.tables.len()];
        for (granule, key) in keys.iter().enumerate() {
            let is_due =
                |(node, num_held): &(usize, usize)| num_held + view.nodes[*node].granules_per_block == granule + 1;
            if !going.iter().any(is_due) {
                continue;
            }
            for (mask, table) in masks.iter_mut().zip(&view.tables) {
                *mask = table.holders_of(*key);
            }
            going.retain_mut(|state| {
                if !is_due(state) {
                    return true;
                }
                let holders = &view.nodes[state.0].holders;
                if holders.iter().any(|holder| masks[holder.table] & holder.bit != 0) {
                    state.1 = granule + 1;
                    return true;
                }
                held.add(&view.nodes[state.0].life, state.1);
                false
            });
            if going.is_empty() {
                return held;
            }
        }
        for (node, num_held) in going {
            held.add(&view.nodes[node].life, num_held);
        }
        held
    }

    /// The life of a node whose blocks have `granules_per_block` granules, of which nothing is known yet.
    pub fn join(self: &Arc<Self>, life: NodeLife, granules_per_block: usize) -> IndexedNode {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let bits =
            NodeBits { id, life: life.clone(), granules_per_block: granules_per_block.max(1), holders: Vec::new() };
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
    fn take_holder(&self, id: u64) -> Option<(Holder, Arc<Table>)> {
        let free = self.free_holders().pop();
        let holder = free.or_else(|| self.new_holders())?;
        self.change_view(|view| {
            view.nodes.iter_mut().filter(|node| node.id == id).for_each(|node| node.holders.push(holder));
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
    use common::block_events::Medium;
    use common::ids::{Epoch, NodeId};
    use common::tokens::PackedTokens;
    use common::wire::BlockNews;
    use common::wire::blocks::BlockEvent;

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

    fn removed(key: u128) -> BlockEvent {
        BlockEvent::Removed { medium: Medium::Pool, key: ContentKey(key) }
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
        assert_eq!((held.num_tokens(&life("a")), held.num_tokens(&life("b"))), (64, 32));
        a.apply(&news(vec![removed(2)]));
        assert_eq!(index.held_prefixes(&keys(1..=6)).num_tokens(&life("a")), 16);
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
        assert_eq!((held.num_tokens(&life("s")), held.num_tokens(&life("l"))), (5 * 16, 8 * 16));
        assert_eq!(index.held_prefixes(&keys(1..=3)).num_tokens(&life("l")), 0);
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
        assert_eq!(index.held_prefixes(&keys([8])).num_tokens(&life("a")), 16);
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
        assert_eq!(index.held_prefixes(&keys(11..=12)).num_tokens(&life("b")), 32);
        // An orphan is one however often it is told.
        b.apply(&news(vec![stored(20, Some(19))]));
        assert!(!b.is_worth_relearning() && b.num_left_out() == 0);
    }

    #[test]
    fn block_stays_known_until_its_last_medium_is_gone() {
        let index = index(10);
        let mut node = index.join(life("a"), 1);
        node.apply(&news(vec![stored(1, None), stored_in(Medium::Host, 1, None), removed(1)]));
        assert_eq!(index.held_prefixes(&keys([1])).num_tokens(&life("a")), 16);
        node.apply(&news(vec![BlockEvent::Cleared { medium: Medium::Host }]));
        assert_eq!((index.held_prefixes(&keys([1])), index.num_blocks()), (HeldPrefixes::default(), 0));
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
        assert_eq!((held.num_tokens(&life("n129")), held.num_tokens(&life("n0"))), (32, 16));
        drop(nodes);
        assert_eq!(index.num_blocks(), 0);
    }
}
