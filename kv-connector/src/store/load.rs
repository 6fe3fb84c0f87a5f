//! From the store into blocks that were reserved for a prompt.
//!
//! Everything happens in the future of [`NodeStore::load`](super::NodeStore::load): entries are asked for several
//! at a time, checked, and written in order by whoever polls it. Where it ends or is dropped, nothing is written
//! any more, so the request that holds the blocks drops it before them, and no gate is needed.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::content::ContentName;
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use futures::{StreamExt, stream};

use super::BlockStore;
use super::entry::Entry;
use super::tiered::{Lookup, TieredStore};

/// Entries asked for at a time, however small they are.
const NUM_ASKED_MAX: usize = 64;

/// What is loaded where.
pub struct LoadPlan {
    /// Names of the prompt's granules from the first token on, at least up to the end of `granules`.
    pub names: Vec<ContentName>,
    /// Which of them.
    pub granules: Range<usize>,
    /// Block table of the sequence. Nobody else may use these blocks until the load has ended or is dropped.
    pub blocks: Arc<[BlockId]>,
    /// The pool.
    pub memory: Arc<dyn KvMemory>,
    /// Bytes that may be on their way, at least one entry.
    pub window_bytes: u64,
    /// Longest wait for the next entry.
    pub stall_timeout: Duration,
    /// For all of it.
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
    /// Granules that are in their blocks in every layer, counted from the first of the plan.
    pub num_granules: usize,
    /// Why there are no more.
    pub end: LoadEnd,
    /// How long it took.
    pub took: Duration,
}

/// Loads; `on_granule` hears the number of granules that are there.
pub(super) async fn load(
    store: &TieredStore,
    lookup: &Lookup,
    plan: LoadPlan,
    mut on_granule: impl FnMut(usize),
) -> Loaded {
    let started_at = Instant::now();
    let first = plan.granules.start;
    let entry_bytes = store.format().entry_bytes();
    let num_asked = (plan.window_bytes as usize / entry_bytes).clamp(1, NUM_ASKED_MAX);
    let names = plan.names[plan.granules.clone()].to_vec();
    let mut entries = stream::iter(names).map(|name| store.get(name)).buffered(num_asked);
    let mut num_granules = 0;
    let end = loop {
        let left = plan.total_timeout.saturating_sub(started_at.elapsed());
        if num_granules == plan.granules.len() {
            break LoadEnd::Complete;
        }
        let wait = plan.stall_timeout.min(left);
        match tokio::time::timeout(wait, entries.next()).await {
            Ok(Some(Some(entry))) => {
                place(&plan, first + num_granules, &entry);
                num_granules += 1;
                on_granule(num_granules);
            }
            Ok(_) => break LoadEnd::Missing,
            Err(_) if wait < left => break LoadEnd::Stalled,
            Err(_) => break LoadEnd::TooSlow,
        }
    };
    let took = started_at.elapsed();
    store.on_loaded(lookup, first, num_granules * entry_bytes, took);
    Loaded { num_granules, end, took }
}

fn place(plan: &LoadPlan, granule: usize, entry: &Entry) {
    let layers = entry.payload().chunks_exact(plan.memory.granule_bytes());
    for (layer, bytes) in layers.enumerate() {
        plan.memory.write_at(layer as u32, &plan.blocks, granule, 0, bytes);
    }
}
