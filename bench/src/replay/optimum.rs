//! The most hits that any policy could have, knowing all requests in advance.
//!
//! A hit of a block needs the block to have been kept from its last use to this one, and while a request runs
//! its own blocks take their room too. So hits are intervals between two uses, and between every two requests
//! at most `num_blocks` intervals may be open, less the blocks of the running request. The largest set of such
//! intervals is found by going through time and giving up, wherever there are too many, the one that ends last
//! (Belady): of all intervals that are open there, it is the one that stands in the way longest.
//!
//! That a hit also needs all blocks before it costs the optimum nothing: whoever uses a block uses those
//! before it, so they are used again no later, and of equals the deepest is given up first. What is kept is
//! therefore always a set of prefixes, and the bound is reached.

use std::collections::BTreeSet;

use super::pool::Hits;
use super::trace::Trace;

const NEVER: usize = usize::MAX;

/// Hits of the optimal offline policy with `num_blocks` blocks.
pub fn optimum(trace: &Trace, num_blocks: usize) -> Hits {
    let next_uses = next_uses(trace);
    // (next use, depth, block), of blocks that are kept.
    let mut kept: BTreeSet<(usize, usize, u32)> = BTreeSet::new();
    let mut place: Vec<Option<(usize, usize, u32)>> = vec![None; trace.num_distinct];
    let mut hits = Hits::default();
    for (request, blocks) in trace.requests.iter().enumerate() {
        let mut num_hits = 0;
        for block in blocks {
            if let Some(entry) = place[*block as usize].take() {
                kept.remove(&entry);
                num_hits += 1;
            }
        }
        while kept.len() + blocks.len() > num_blocks {
            let Some((_, _, block)) = kept.pop_last() else { break };
            place[block as usize] = None;
        }
        for (depth, block) in blocks.iter().enumerate() {
            let entry = (next_uses[request][depth], depth, *block);
            if entry.0 != NEVER {
                kept.insert(entry);
                place[*block as usize] = Some(entry);
            }
        }
        hits.push(num_hits, blocks.len());
    }
    hits
}

/// Of each block of each request, the request that uses it next.
fn next_uses(trace: &Trace) -> Vec<Vec<usize>> {
    let mut next = vec![NEVER; trace.num_distinct];
    let mut next_uses: Vec<Vec<usize>> = vec![Vec::new(); trace.requests.len()];
    for (request, blocks) in trace.requests.iter().enumerate().rev() {
        next_uses[request] =
            blocks.iter().map(|block| std::mem::replace(&mut next[*block as usize], request)).collect();
    }
    next_uses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::pool::replay;
    use common::eviction::EvictionPolicy;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn trace(requests: Vec<Vec<u32>>) -> Trace {
        let num_distinct = requests.iter().flatten().max().map_or(0, |block| *block as usize + 1);
        Trace { requests, num_distinct }
    }

    /// The most hits over all choices of what to keep after each request.
    fn best_by_trying(requests: &[Vec<u32>], kept: &BTreeSet<u32>, num_blocks: usize) -> usize {
        let Some((request, rest)) = requests.split_first() else { return 0 };
        let num_hits = request.iter().take_while(|block| kept.contains(block)).count();
        let others: Vec<u32> = kept.iter().filter(|block| !request.contains(block)).copied().collect();
        let room = num_blocks - request.len();
        let mut best = 0;
        for choice in 0u32..1 << others.len() {
            if choice.count_ones() as usize <= room {
                let chosen = others.iter().enumerate().filter(|(i, _)| choice >> i & 1 == 1).map(|(_, block)| *block);
                let kept = chosen.chain(request.iter().copied()).collect();
                best = best.max(best_by_trying(rest, &kept, num_blocks));
            }
        }
        num_hits + best
    }

    #[test]
    fn no_choice_is_better_and_the_optimum_is_reached() {
        let mut random = StdRng::seed_from_u64(7);
        for _ in 0..60 {
            // Paths down a tree: 0 | 1, 2 | 3 to 6.
            let paths = [vec![0], vec![0, 1], vec![0, 2], vec![0, 1, 3], vec![0, 1, 4], vec![0, 2, 5], vec![0, 2, 6]];
            let requests: Vec<_> = (0..7).map(|_| paths[random.random_range(0..paths.len())].clone()).collect();
            for num_blocks in 3..6 {
                let expected = best_by_trying(&requests, &BTreeSet::new(), num_blocks);
                let found = optimum(&trace(requests.clone()), num_blocks).total().0;
                assert_eq!(found, expected, "{num_blocks} blocks, {requests:?}");
            }
        }
    }

    #[test]
    fn no_policy_beats_the_optimum() {
        let mut random = StdRng::seed_from_u64(8);
        let mut requests = Vec::new();
        let mut next = 0;
        for _ in 0..500 {
            let mut blocks: Vec<u32> = match requests.len() {
                0 => Vec::new(),
                len => Vec::clone(&requests[random.random_range(0..len)]),
            };
            blocks.truncate(random.random_range(0..=blocks.len()));
            for _ in 0..random.random_range(1..4) {
                blocks.push(next);
                next += 1;
            }
            requests.push(blocks);
        }
        let longest = requests.iter().map(Vec::len).max().unwrap();
        let trace = trace(requests);
        let names = trace.names();
        for num_blocks in [longest, 2 * longest, 8 * longest] {
            let best = optimum(&trace, num_blocks).total().0;
            for policy in [EvictionPolicy::Lru, EvictionPolicy::ReuseRate] {
                assert!(replay(&trace, &names, num_blocks, policy).unwrap().total().0 <= best);
            }
        }
        let (num_hits, num_blocks) = optimum(&trace, next as usize).total();
        assert_eq!(num_hits, num_blocks - next as usize, "with room for all, only first uses miss");
    }
}
