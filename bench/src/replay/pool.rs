//! A trace through the block manager that the nodes have, one request after another.

use anyhow::{Context, ensure};
use common::block_manager::BlockManager;
use common::content::ContentName;
use common::eviction::EvictionPolicy;

use super::trace::Trace;

/// Of each request, the blocks that were found and the blocks it has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Hits(Vec<(usize, usize)>);

impl Hits {
    /// One more request.
    pub fn push(&mut self, num_hits: usize, num_blocks: usize) {
        self.0.push((num_hits, num_blocks));
    }

    /// Sums over all requests.
    pub fn total(&self) -> (usize, usize) {
        self.0.iter().fold((0, 0), |sum, (hits, blocks)| (sum.0 + hits, sum.1 + blocks))
    }

    /// Blocks found by blocks, over the requests from number `first` on.
    pub fn ratio_from(&self, first: usize) -> f64 {
        let (hits, blocks) = Self(self.0[first..].to_vec()).total();
        hits as f64 / blocks.max(1) as f64
    }
}

/// Serves the trace from a pool of `num_blocks` blocks. `names`: of the trace's blocks.
///
/// # Errors
/// If a prompt does not fit the pool, or the books of the block manager do not balance at the end.
pub fn replay(trace: &Trace, names: &[ContentName], num_blocks: usize, policy: EvictionPolicy) -> anyhow::Result<Hits> {
    let mut manager = BlockManager::with_policy(num_blocks, policy);
    let mut hits = Hits::default();
    for (number, blocks) in (1..).zip(&trace.requests) {
        let mut held = manager.longest_prefix(blocks.iter().map(|block| names[*block as usize]));
        let num_hits = held.len();
        manager.acquire(&held);
        let fresh = manager.allocate(blocks.len() - num_hits).with_context(|| {
            format!("request {number} has {} blocks, but the pool has {num_blocks}: raise --num-blocks", blocks.len())
        })?;
        for (id, block) in fresh.iter().zip(&blocks[num_hits..]) {
            manager.publish(*id, names[*block as usize]);
        }
        held.extend(fresh);
        manager.release(&held);
        hits.push(num_hits, blocks.len());
    }
    let integrity = manager.check_integrity();
    ensure!(integrity.is_ok(), "the block manager's books do not balance: {integrity:?}");
    Ok(hits)
}
