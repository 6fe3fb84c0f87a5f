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

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use rand_distr::{Distribution, Zipf};

    const NUM_REQUESTS: usize = 12_000;
    const NUM_BLOCKS: usize = 400;

    /// Chains of four blocks, by the number that `chain` draws.
    fn trace(chain: impl FnMut(usize) -> u32) -> Trace {
        let chains = (0..NUM_REQUESTS).map(chain);
        let requests: Vec<Vec<u32>> = chains.map(|chain| (0..4).map(|depth| chain * 4 + depth).collect()).collect();
        let mut numbers = std::collections::HashMap::new();
        let mut number = |block: u32| {
            let next = numbers.len() as u32;
            *numbers.entry(block).or_insert(next)
        };
        let requests: Vec<Vec<u32>> =
            requests.iter().map(|blocks| blocks.iter().map(|block| number(*block)).collect()).collect();
        Trace { requests, num_distinct: numbers.len() }
    }

    #[test]
    fn where_kinds_of_blocks_do_not_differ_little_is_lost_against_lru() {
        let mut random = StdRng::seed_from_u64(3);
        let zipf = Zipf::new(2_000.0, 0.9).unwrap();
        let uniform = trace(|_| random.random_range(0..300));
        let mut random = StdRng::seed_from_u64(4);
        let popular = trace(|_| zipf.sample(&mut random) as u32);
        let mut random = StdRng::seed_from_u64(5);
        let zipf = Zipf::new(300.0, 0.9).unwrap();
        // Every tenth request begins a scan of 50 chains that never return.
        let scanned = trace(|request| match request / 50 % 3 {
            0 => 10_000 + request as u32,
            _ => zipf.sample(&mut random) as u32,
        });
        let mut random = StdRng::seed_from_u64(6);
        let zipf = Zipf::new(300.0, 0.9).unwrap();
        // What is popular changes every 2,000 requests.
        let shifting = trace(|request| (request / 2_000 * 1_000) as u32 + zipf.sample(&mut random) as u32);
        let looped = trace(|request| (request % 150) as u32);
        let fitting = trace(|request| (request % 90) as u32);
        let once = trace(|request| request as u32);
        for (name, trace, loss_max) in [
            ("uniform", uniform, 0.02),
            ("Zipf", popular, 0.02),
            ("Zipf with scans", scanned, 0.02),
            ("Zipf that shifts", shifting, 0.02),
            ("a loop larger than the pool", looped, 0.0),
            ("a loop that fits", fitting, 0.0),
            ("never again", once, 0.0),
        ] {
            let names = trace.names();
            let found = |policy| replay(&trace, &names, NUM_BLOCKS, policy).unwrap().ratio_from(0);
            let (lru, own) = (found(EvictionPolicy::Lru), found(EvictionPolicy::ReuseRate));
            println!("{name}: lru {lru:.4}, reuse-rate {own:.4}");
            assert!(own >= lru - loss_max, "{name}: LRU finds {lru:.4}, reuse-rate {own:.4}");
        }
    }

    #[test]
    fn a_prompt_that_does_not_fit_is_a_sentence() {
        let trace = trace(|request| request as u32);
        let error = replay(&trace, &trace.names(), 3, EvictionPolicy::Lru).unwrap_err();
        assert!(error.to_string().contains("request 1 has 4 blocks"), "{error}");
    }
}
