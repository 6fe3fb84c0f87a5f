//! What the block index costs: bytes per block, events taken in per second, and lookups: how many, how long.
//!
//! ```text
//! cargo run --release -p proxy --example block_index [NUM_BLOCKS [NUM_NODES [host]]]
//! ```
//!
//! 10 million blocks of 16 nodes by default, as conversations of 64 blocks (2,048 tokens in blocks of 32), each
//! held by two of the nodes in their pools. With `host`, one of the two has it in its host tier, too, which is told
//! by granules: twice as many entries, of which half are those of the pool. A lookup is one request's: the keys of
//! its 128 granules, of which half, all or none are held. The keys are made outside of what is timed.
#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::block_events::Medium;
use common::content::{ContentKey, GRANULE_TOKENS};
use common::ids::{Epoch, NodeId};
use common::tokens::PackedTokens;
use common::wire::BlockNews;
use common::wire::blocks::BlockEvent;
use proxy::index::{BlockIndex, IndexedNode};
use proxy::metrics::ProxyMetrics;

const BLOCKS_PER_CHAIN: usize = 64;
const GRANULES_PER_BLOCK: usize = 2;
const NUM_LOOKUPS: usize = 200_000;

/// Key of a granule, mixed as a hash would be.
fn key(chain: usize, granule: usize) -> ContentKey {
    let mut x = (chain as u128) << 16 | granule as u128;
    for _ in 0..2 {
        x = (x ^ (x >> 61)).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
    }
    ContentKey(x ^ (x >> 64))
}

/// A conversation in a medium whose blocks have so many granules.
fn chain_events(chain: usize, medium: Medium, granules_per_block: usize) -> Vec<BlockEvent> {
    let last_granule = |block: usize| key(chain, (block + 1) * granules_per_block - 1);
    let event = |block: usize| BlockEvent::Stored {
        medium,
        key: last_granule(block),
        parent: block.checked_sub(1).map(last_granule),
        num_tokens: (granules_per_block * GRANULE_TOKENS) as u32,
        tokens: PackedTokens::default(),
    };
    (0..BLOCKS_PER_CHAIN * GRANULES_PER_BLOCK / granules_per_block).map(event).collect()
}

/// Resident memory of this process in bytes.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.unwrap_or(0) * 1024
}

fn main() {
    let (words, numbers): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|arg| arg == "host");
    let has_host_tier = !words.is_empty();
    let mut args = numbers.iter().map(|arg| arg.parse::<usize>().expect("a number, or the word host"));
    let num_blocks = args.next().unwrap_or(10_000_000);
    let num_nodes = args.next().unwrap_or(16).max(2);
    let num_chains = num_blocks / BLOCKS_PER_CHAIN;
    let metrics = ProxyMetrics::new(&NodeId::new("proxy").expect("a name"), "bench");
    // Room for the granules between the blocks, too.
    let index = Arc::new(BlockIndex::new(num_blocks * GRANULES_PER_BLOCK, Arc::new(metrics)));
    let life = |node: usize| (NodeId::new(format!("n{node}")).expect("a name"), Epoch(1));
    let mut nodes: Vec<IndexedNode> = (0..num_nodes).map(|node| index.join(life(node), GRANULES_PER_BLOCK)).collect();

    let before_bytes = resident_bytes();
    let (mut spent, mut num_events) = (Duration::ZERO, 0);
    for chain in 0..num_chains {
        let news = |events| BlockNews { is_restart: false, events, resume_at: None };
        let in_pool = news(chain_events(chain, Medium::Pool, GRANULES_PER_BLOCK));
        let on_host = has_host_tier.then(|| news(chain_events(chain, Medium::Host, 1)));
        let started = Instant::now();
        nodes[chain % num_nodes].apply(&in_pool);
        nodes[(chain + 1) % num_nodes].apply(&in_pool);
        num_events += 2 * in_pool.events.len();
        if let Some(on_host) = &on_host {
            nodes[chain % num_nodes].apply(on_host);
            num_events += on_host.events.len();
        }
        spent += started.elapsed();
    }
    let num_held = index.num_blocks();
    let bytes_per_block = (resident_bytes().saturating_sub(before_bytes)) as f64 / num_held as f64;
    println!("{num_held} blocks of {num_nodes} nodes: {bytes_per_block:.1} bytes each");
    println!("events      {:>12.0} /s", num_events as f64 / spent.as_secs_f64());

    let num_granules = BLOCKS_PER_CHAIN * GRANULES_PER_BLOCK;
    for (name, num_known) in [("all held", num_granules), ("half held", num_granules / 2), ("none held", 0)] {
        let mut times: Vec<Duration> = Vec::with_capacity(NUM_LOOKUPS);
        for i in 0..NUM_LOOKUPS {
            let chain = (i * 7919) % num_chains;
            // Behind what is known the text goes on otherwise.
            let granule_key = |granule| key(if granule < num_known { chain } else { num_chains + chain }, granule);
            let keys: Vec<ContentKey> = (0..num_granules).map(granule_key).collect();
            let started = Instant::now();
            let held = black_box(index.held_prefixes(black_box(&keys)));
            times.push(started.elapsed());
            assert_eq!(held.num_pool_tokens(&life(chain % num_nodes)), num_known * GRANULE_TOKENS);
        }
        let total: Duration = times.iter().sum();
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
        let num_probed = (num_known / GRANULES_PER_BLOCK + 1).min(BLOCKS_PER_CHAIN) * NUM_LOOKUPS;
        println!(
            "{name:<10}  {:>12.0} requests/s {:>12.0} blocks/s   p50 {:.2} us, p99 {:.2} us, p99.9 {:.2} us",
            NUM_LOOKUPS as f64 / total.as_secs_f64(),
            num_probed as f64 / total.as_secs_f64(),
            at(0.5),
            at(0.99),
            at(0.999),
        );
    }

    let started = Instant::now();
    drop(nodes.pop());
    println!("one node of {num_nodes} forgotten in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
}
