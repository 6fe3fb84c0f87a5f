//! How much of a prompt each node is believed to hold.

use common::content::GRANULE_TOKENS;

use super::view::NodeLife;

/// Believed, not known: what a node said of its blocks a moment ago.
///
/// A node's pool and its tiers are two answers, each counted from the first token: a node finds a prefix in its
/// tiers only if they have its beginning, too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeldPrefixes {
    in_pools: Vec<(NodeLife, usize)>,
    in_tiers: Vec<(NodeLife, usize)>,
}

impl HeldPrefixes {
    /// A node holds the first `num_granules` granules in its pool.
    pub fn add(&mut self, life: &NodeLife, num_granules: usize) {
        add(&mut self.in_pools, life, num_granules);
    }

    /// A node holds the first `num_granules` granules in tiers of its own.
    pub fn add_in_tiers(&mut self, life: &NodeLife, num_granules: usize) {
        add(&mut self.in_tiers, life, num_granules);
    }

    /// Leading tokens whose KV is in this node's pool.
    pub fn num_pool_tokens(&self, life: &NodeLife) -> usize {
        num_tokens(&self.in_pools, life)
    }

    /// Leading tokens whose KV is in tiers of this node.
    pub fn num_tier_tokens(&self, life: &NodeLife) -> usize {
        num_tokens(&self.in_tiers, life)
    }

    /// The same without what is in tiers.
    pub fn only_in_pools(&self) -> Self {
        Self { in_pools: self.in_pools.clone(), in_tiers: Vec::new() }
    }
}

fn add(held: &mut Vec<(NodeLife, usize)>, life: &NodeLife, num_granules: usize) {
    if num_granules > 0 {
        held.push((life.clone(), num_granules * GRANULE_TOKENS));
    }
}

fn num_tokens(held: &[(NodeLife, usize)], life: &NodeLife) -> usize {
    held.iter().filter(|(of, _)| of == life).map(|(_, num_tokens)| *num_tokens).max().unwrap_or(0)
}
