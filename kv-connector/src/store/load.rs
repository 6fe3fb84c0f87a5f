//! From the store into blocks that were reserved for a prompt.
//!
//! Everything happens in the future of [`NodeStore::load`](super::NodeStore::load): entries are asked for several
//! at a time, checked, and written in order by whoever polls it. Where it ends or is dropped, nothing is written
//! any more, so the request that holds the blocks drops it before them, and no gate is needed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::content::{ContentName, GRANULE_TOKENS};
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use futures::{StreamExt, stream};

use super::BlockStore;
use super::entry::Entry;
use super::tiered::{Lookup, TieredStore};

/// Entries asked for at a time, however small they are.
const NUM_ASKED_MAX: usize = 64;

/// A prefix that the store holds, as it was found.
#[derive(Debug, Clone, Default)]
pub struct FoundPrefix {
    /// Of its granules.
    pub(super) names: Vec<ContentName>,
    pub(super) lookup: Lookup,
}

impl FoundPrefix {
    /// Leading tokens whose KV is there.
    pub fn num_tokens(&self) -> usize {
        self.names.len() * GRANULE_TOKENS
    }
}

/// How a load is paced, and when it is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadLimits {
    /// Bytes that may be on their way for one load, one entry at least.
    pub window_bytes: u64,
    /// Longest wait for the next entry.
    pub stall_timeout: Duration,
}

/// What is loaded where.
pub struct LoadPlan {
    /// What the pool has already; a multiple of the granule.
    pub first_token: usize,
    /// Block table of the sequence. Nobody else may use these blocks until the load has ended or is dropped.
    pub blocks: Arc<[BlockId]>,
    /// The pool.
    pub memory: Arc<dyn KvMemory>,
    /// For all of it; a stall timeout at least.
    pub total_timeout: Duration,
}

/// Why a load ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadEnd {
    /// All of it is there.
    Complete,
    /// An entry was not, or was not what it should be.
    Missing,
    /// Nothing came for too long.
    Stalled,
    /// All of it together took too long.
    TooSlow,
}

impl LoadEnd {
    /// The value of the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            LoadEnd::Complete => "complete",
            LoadEnd::Missing => "missing",
            LoadEnd::Stalled => "stalled",
            LoadEnd::TooSlow => "too_slow",
        }
    }
}

/// What came of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Leading tokens of the sequence whose KV is in its blocks in every layer.
    pub num_tokens: usize,
    /// Why there are no more.
    pub end: LoadEnd,
    /// How long it took.
    pub took: Duration,
}

/// Loads; `on_tokens` hears how many leading tokens are there.
pub(super) async fn load(
    store: &TieredStore,
    found: &FoundPrefix,
    plan: LoadPlan,
    limits: LoadLimits,
    on_tokens: impl Fn(usize),
) -> Loaded {
    let started_at = Instant::now();
    let first = plan.first_token / GRANULE_TOKENS;
    let entry_bytes = store.format().entry_bytes();
    let num_asked = (limits.window_bytes as usize / entry_bytes).clamp(1, NUM_ASKED_MAX);
    let total_timeout = plan.total_timeout.max(limits.stall_timeout);
    let names = found.names.get(first..).unwrap_or_default().to_vec();
    let mut entries = stream::iter(names).map(|name| store.get(name)).buffered(num_asked);
    let mut granule = first;
    let end = loop {
        if granule >= found.names.len() {
            break LoadEnd::Complete;
        }
        let left = total_timeout.saturating_sub(started_at.elapsed());
        let wait = limits.stall_timeout.min(left);
        match tokio::time::timeout(wait, entries.next()).await {
            Ok(Some(Some(entry))) => {
                place(&plan, granule, &entry);
                granule += 1;
                on_tokens(granule * GRANULE_TOKENS);
                // Checking and copying takes time, and entries in memory never make this wait.
                tokio::task::yield_now().await;
            }
            Ok(_) => break LoadEnd::Missing,
            Err(_) if wait < left => break LoadEnd::Stalled,
            Err(_) => break LoadEnd::TooSlow,
        }
    };
    let took = started_at.elapsed();
    store.on_loaded(&found.lookup, first, (granule - first) * entry_bytes, took);
    Loaded { num_tokens: granule * GRANULE_TOKENS, end, took }
}

fn place(plan: &LoadPlan, granule: usize, entry: &Entry) {
    let layers = entry.payload().chunks_exact(plan.memory.granule_bytes());
    for (layer, bytes) in layers.enumerate() {
        plan.memory.write_at(layer as u32, &plan.blocks, granule, 0, bytes);
    }
}
