//! From the store into blocks that were reserved for a prompt, from the end of what is stored towards its front,
//! while the engine computes the front ([`ArrivingPrefix`]).
//!
//! ```text
//! started  goal: the expected meeting point ([`Overlap`])
//!    │
//!    ├── entry: check, place, next ... until the engine has what is left (met), or all is there (complete)
//!    ├── an entry that is not there, or not what it should be, is left to the engine; the next is asked for
//!    ├── later than expected: divide what is left by the speed that was seen, raise the goal
//!    └── nothing for too long, or all of it too slow: the engine computes the rest
//! ```
//!
//! Everything happens in the future that [`NodeStore::load`](super::NodeStore::load) returns: entries are asked for
//! several at a time, checked, and placed in order by whoever polls it. Where it ends or is dropped, nothing is
//! written any more; the request drops it before the blocks. The engine closes the prefix before it takes the
//! blocks for somebody else.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use common::content::GRANULE_TOKENS;
use common::handover::{Overlap, OverlapPace, PrefixCosts};
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use common::scheduler::ArrivingPrefix;
use futures::{StreamExt, stream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::entry::Entry;
use super::named_tokens::NamedTokens;
use super::tiered::{Lookup, TieredStore};

/// Entries asked for at a time, however small they are.
const NUM_ASKED_MAX: usize = 64;
/// What is late is not divided anew sooner: entries come several at a time.
const DIVIDE_AFTER_MIN: Duration = Duration::from_millis(5);

/// A prefix that the store holds, as it was found.
#[derive(Debug, Clone, Default)]
pub struct FoundPrefix {
    pub(super) granules: NamedTokens,
    pub(super) lookup: Lookup,
}

impl FoundPrefix {
    /// Leading tokens whose KV is there.
    pub fn num_tokens(&self) -> usize {
        self.granules.names().len() * GRANULE_TOKENS
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

/// What is loaded where, and what is computed meanwhile.
pub struct LoadPlan {
    /// What may arrive.
    pub prefix: Arc<ArrivingPrefix>,
    /// Block table of the sequence. Nobody else may use these blocks until the prefix is closed, or the load has
    /// ended or is dropped.
    pub blocks: Arc<[BlockId]>,
    /// The pool.
    pub memory: Arc<dyn KvMemory>,
    /// Its tokens per block.
    pub block_size: usize,
    /// How it is divided at first.
    pub overlap: Overlap,
    /// How fast prompts are computed here.
    pub compute_tokens_per_second: f64,
    /// For all of it; a stall timeout at least.
    pub total_timeout: Duration,
    /// Has the engine look again at what it may compute.
    pub wake: Box<dyn Fn() + Send + Sync>,
}

impl LoadPlan {
    /// Loads what `costs` say is stored and not cached, into these blocks.
    pub fn new(
        costs: &PrefixCosts,
        blocks: Arc<[BlockId]>,
        memory: Arc<dyn KvMemory>,
        block_size: usize,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let end_token = costs.stored.map_or(0, |stored| stored.num_tokens);
        Self {
            prefix: Arc::new(ArrivingPrefix::new(costs.num_cached_tokens as usize, end_token as usize)),
            blocks,
            memory,
            block_size,
            overlap: costs.overlap(block_size),
            compute_tokens_per_second: costs.prefill_tokens_per_second,
            total_timeout: costs.recompute_stored(),
            wake,
        }
    }
}

/// Why a load ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadEnd {
    /// All of it is there.
    Complete,
    /// What is not there was computed meanwhile, or the sequence is gone.
    Met,
    /// Entries were not, or were not what they should be.
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
            LoadEnd::Met => "met",
            LoadEnd::Missing => "missing",
            LoadEnd::Stalled => "stalled",
            LoadEnd::TooSlow => "too_slow",
        }
    }
}

/// What came of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Tokens whose KV was loaded.
    pub num_tokens: usize,
    /// Stored tokens that were computed, or being so, when it ended.
    pub num_computed_tokens: usize,
    /// How it ended.
    pub end: LoadEnd,
    /// How long it took.
    pub took: Duration,
}

/// A load under way. To be polled, and dropped, by whoever holds the blocks.
pub struct PrefixLoad {
    loading: Pin<Box<dyn Future<Output = Loaded> + Send>>,
    prefix: Arc<ArrivingPrefix>,
    met: CancellationToken,
}

impl PrefixLoad {
    /// Starts when it is first polled.
    pub(super) fn new(
        prefix: Arc<ArrivingPrefix>,
        met: CancellationToken,
        loading: impl Future<Output = Loaded> + Send + 'static,
    ) -> Self {
        Self { loading: Box::pin(loading), prefix, met }
    }

    /// What the engine is to compute around.
    pub fn prefix(&self) -> &Arc<ArrivingPrefix> {
        &self.prefix
    }

    /// Loads until it ends. Cancel-safe; not to be called again afterwards.
    pub async fn ended(&mut self) -> Loaded {
        (&mut self.loading).await
    }

    /// The engine has passed over what has arrived: nothing more is wanted, so [`ended`](Self::ended) ends.
    pub fn on_met(&self) {
        self.met.cancel();
    }
}

/// Loads until `met`, or as long as something is wanted.
pub(super) async fn load(
    store: &TieredStore,
    found: &FoundPrefix,
    plan: LoadPlan,
    limits: LoadLimits,
    met: CancellationToken,
) -> Loaded {
    let started_at = Instant::now();
    let entry_bytes = store.format().entry_bytes();
    let num_asked = (limits.window_bytes as usize / entry_bytes).clamp(1, NUM_ASKED_MAX);
    let num_found = found.granules.names().len();
    let stored: Vec<_> = plan.prefix.granules().filter(|granule| *granule < num_found).collect();
    let num_stored = stored.len();
    let get = |granule: usize| async move { (granule, store.get_granule(&found.granules, granule).await) };
    let mut entries = stream::iter(stored).map(get).buffered(num_asked);
    let mut pace = Pace::new(&plan, limits, started_at, store.is_speed_set());
    // Not answered yet: everything before this granule.
    let mut next_granule = num_found;
    let (mut num_answered, mut num_placed, mut num_missing) = (0, 0, 0);
    let end = loop {
        tokio::select! {
            biased;
            () = met.cancelled() => break LoadEnd::Met,
            answer = entries.next() => match answer {
                None => break LoadEnd::Complete,
                Some((granule, entry)) => {
                    let is_wanted = match entry {
                        Some(entry) => plan.prefix.place(granule, || {
                            write(&plan, granule, &entry);
                            num_placed += 1;
                        }),
                        None => {
                            num_missing += 1;
                            plan.prefix.is_wanted(granule)
                        }
                    };
                    next_granule = granule;
                    num_answered += 1;
                    // Told by the next one as well, but that may be long in coming.
                    if !is_wanted || num_answered < num_stored && !plan.prefix.is_wanted(granule - 1) {
                        break LoadEnd::Met;
                    }
                    pace.stalled_at = Instant::now() + limits.stall_timeout;
                    // Checking and copying takes time, and entries in memory never make this wait.
                    tokio::task::yield_now().await;
                }
            },
            () = tokio::time::sleep_until(pace.deadline()) => {}
        }
        match pace.is_overdue(Instant::now()) {
            Some(end) => break end,
            None => pace.divide(&plan, next_granule, num_answered),
        }
    };
    let end = if num_missing > 0 { LoadEnd::Missing } else { end };
    let num_computed_tokens = plan.prefix.num_computed_tokens();
    plan.prefix.finish();
    (plan.wake)();
    let took = started_at.elapsed();
    store.on_loaded(&found.lookup, next_granule.min(num_found.saturating_sub(1)), num_placed * entry_bytes, took);
    Loaded { num_tokens: num_placed * GRANULE_TOKENS, num_computed_tokens, end, took }
}

/// When a load is late, and for how long it is waited for.
struct Pace {
    started_at: Instant,
    stalled_at: Instant,
    overdue_at: Instant,
    /// `None`: the operator has said how fast it is.
    divide_at: Option<Instant>,
}

impl Pace {
    fn new(plan: &LoadPlan, limits: LoadLimits, now: Instant, is_speed_set: bool) -> Self {
        plan.prefix.raise_goal(plan.prefix.num_claimed_tokens() + plan.overlap.num_computed_tokens);
        (plan.wake)();
        Self {
            started_at: now,
            stalled_at: later(now, limits.stall_timeout),
            overdue_at: later(now, plan.total_timeout.max(limits.stall_timeout)),
            divide_at: (!is_speed_set).then(|| later(now, plan.overlap.meet.max(DIVIDE_AFTER_MIN))),
        }
    }

    fn deadline(&self) -> Instant {
        let deadline = self.stalled_at.min(self.overdue_at);
        self.divide_at.map_or(deadline, |at| deadline.min(at))
    }

    fn is_overdue(&self, now: Instant) -> Option<LoadEnd> {
        if now >= self.stalled_at {
            return Some(LoadEnd::Stalled);
        }
        (now >= self.overdue_at).then_some(LoadEnd::TooSlow)
    }

    /// If it is later than expected, lets the engine compute its share of what is left, by the speed that was seen.
    fn divide(&mut self, plan: &LoadPlan, next_granule: usize, num_answered: usize) {
        let now = Instant::now();
        if self.divide_at.is_none_or(|at| now < at) {
            return;
        }
        let seconds = (now - self.started_at).as_secs_f64();
        let pace = OverlapPace {
            compute_tokens_per_second: plan.compute_tokens_per_second,
            load_tokens_per_second: (num_answered * GRANULE_TOKENS) as f64 / seconds,
        };
        let num_claimed = plan.prefix.num_claimed_tokens();
        let num_left = (next_granule * GRANULE_TOKENS).saturating_sub(num_claimed);
        let overlap = pace.divide(num_left, Duration::ZERO, plan.block_size);
        // At least a block, so that it ends.
        plan.prefix.raise_goal(num_claimed + overlap.num_computed_tokens.max(plan.block_size));
        (plan.wake)();
        self.divide_at = Some(later(now, overlap.meet.max(DIVIDE_AFTER_MIN)));
    }
}

/// A moment that the clock can tell.
fn later(now: Instant, wait: Duration) -> Instant {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    now + wait.min(DAY)
}

fn write(plan: &LoadPlan, granule: usize, entry: &Entry) {
    plan.memory.write_all_layers(&plan.blocks, granule, entry.payload());
}

#[cfg(test)]
mod tests;
