//! How much of a prompt each node is believed to hold.

use common::content::GRANULE_TOKENS;

use super::view::NodeLife;

/// Believed, not known: what a node said of its blocks a moment ago.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeldPrefixes {
    held: Vec<(NodeLife, usize)>,
}

impl HeldPrefixes {
    /// A node holds the first `num_granules` granules.
    pub fn add(&mut self, life: &NodeLife, num_granules: usize) {
        if num_granules > 0 {
            self.held.push((life.clone(), num_granules * GRANULE_TOKENS));
        }
    }

    /// Leading tokens whose KV this node holds.
    pub fn num_tokens(&self, life: &NodeLife) -> usize {
        self.held.iter().filter(|(of, _)| of == life).map(|(_, num_tokens)| *num_tokens).max().unwrap_or(0)
    }
}
