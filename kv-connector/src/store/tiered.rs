//! Several tiers as one store, the fastest first.
//!
//! ```text
//! get   host ──miss──> disk ──miss──> remote      a hit is kept by the faster tiers too
//! put   host now, disk and remote through a queue each; a tier that has it already is left out
//! ```
//!
//! Where the caller says which granule of which text an entry is, a tier that tells its events tells this one. The
//! trait's `get` and `put` know only a name, so what they keep is told to nobody.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::content::ContentName;
use common::rate::Rate;
use tokio::time::Instant;

use super::BlockStore;
use super::backend::StoreFuture;
use super::entry::{Entry, EntryFormat};
use super::named_tokens::NamedTokens;
use super::tier::{Tier, TierKind};
use super::write_queue::WriteQueue;

/// Names asked for together.
const NUM_ASKED: usize = 32;
/// Longest that a prompt waits to learn what is held of it; what is known by then counts.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(500);

/// The tiers that a node has.
pub struct TieredStore {
    tiers: Vec<Placed>,
    format: EntryFormat,
    set_bytes_per_second: Option<f64>,
}

struct Placed {
    tier: Arc<Tier>,
    /// `None`: written at once.
    queue: Option<WriteQueue>,
    rate: Mutex<Rate>,
}

/// Leading names that are held, and by which tier each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lookup {
    tiers: Vec<usize>,
}

impl Lookup {
    /// How many.
    pub fn num_held(&self) -> usize {
        self.tiers.len()
    }
}

impl TieredStore {
    /// A store of these tiers, the fastest first, whose slow ones have a queue of `queue_bytes` each.
    /// `set_bytes_per_second` is expected of them all instead of what is measured.
    pub fn new(
        tiers: Vec<Arc<Tier>>,
        format: EntryFormat,
        queue_bytes: u64,
        set_bytes_per_second: Option<f64>,
    ) -> Self {
        let placed = |tier: Arc<Tier>| {
            let queue = (tier.kind() != TierKind::Host).then(|| WriteQueue::start(tier.clone(), queue_bytes));
            Placed { tier, queue, rate: Mutex::default() }
        };
        Self { tiers: tiers.into_iter().map(placed).collect(), format, set_bytes_per_second }
    }

    /// What its entries look like.
    pub fn format(&self) -> &EntryFormat {
        &self.format
    }

    /// Whether some tier is not known to hold the entry.
    pub fn lacks(&self, name: ContentName) -> bool {
        let mut well = self.tiers.iter().filter(|placed| !placed.tier.is_down());
        well.any(|placed| placed.tier.is_known_to_hold(name) != Some(true))
    }

    /// Leading names that are held. What is found may be gone when it is asked for.
    pub async fn look_up(&self, names: &[ContentName]) -> Lookup {
        let mut lookup = Lookup::default();
        let deadline = Instant::now() + LOOKUP_TIMEOUT;
        let mut is_late = false;
        while lookup.num_held() < names.len() {
            let rest = &names[lookup.num_held()..];
            if let Some(tier) = self.tiers.iter().position(|placed| placed.tier.is_known_to_hold(rest[0]) == Some(true))
            {
                lookup.tiers.push(tier);
                continue;
            }
            if is_late {
                break;
            }
            // Only the others are asked, for what nobody is known to have.
            let window = &rest[..rest.len().min(NUM_ASKED)];
            let mut num_found = 0;
            for (index, placed) in self.tiers.iter().enumerate() {
                if placed.tier.is_known_to_hold(rest[0]).is_none() {
                    let asked = tokio::time::timeout_at(deadline, placed.tier.num_held(window)).await;
                    // What was answered until then is remembered.
                    is_late = asked.is_err();
                    num_found = asked.unwrap_or(0);
                    lookup.tiers.extend(std::iter::repeat_n(index, num_found));
                }
                if num_found > 0 {
                    break;
                }
            }
            if num_found == 0 && !is_late {
                break;
            }
        }
        lookup
    }

    /// What getting the entries of `lookup` from `first` on is expected to take.
    pub fn expected_load(&self, lookup: &Lookup, first: usize) -> Duration {
        let seconds = lookup.tiers.iter().skip(first).map(|tier| {
            let placed = &self.tiers[*tier];
            let measured = placed.rate.lock().unwrap_or_else(PoisonError::into_inner).per_second();
            let expected = measured.unwrap_or(placed.tier.kind().unmeasured_bytes_per_second());
            self.format.entry_bytes() as f64 / self.set_bytes_per_second.unwrap_or(expected)
        });
        // A year for what never comes.
        Duration::from_secs_f64(seconds.sum::<f64>().clamp(0.0, 3.2e7))
    }

    /// Whether the operator has said how fast entries come.
    pub(super) fn is_speed_set(&self) -> bool {
        self.set_bytes_per_second.is_some()
    }

    /// A load that got `num_bytes` of what `lookup` promised from entry `first` on took this long; it counts for the slowest tier in it.
    pub(super) fn on_loaded(&self, lookup: &Lookup, first: usize, num_bytes: usize, took: Duration) {
        if let Some(slowest) = lookup.tiers.iter().skip(first).max() {
            let mut rate = self.tiers[*slowest].rate.lock().unwrap_or_else(PoisonError::into_inner);
            rate.observe(num_bytes as f64, took);
        }
    }

    /// Resolves when everything that was put before is written or given up.
    pub async fn written(&self) {
        for queue in self.tiers.iter().filter_map(|placed| placed.queue.as_ref()) {
            queue.emptied().await;
        }
    }

    /// Closes every tier, behind [`written`](Self::written).
    pub async fn close(&self) {
        self.written().await;
        for placed in &self.tiers {
            placed.tier.close().await;
        }
    }

    /// Puts the entry of granule `index`, and tells it where that is told. False if a tier has dropped it.
    pub(super) async fn put_granule(&self, granules: &NamedTokens, index: usize, entry: Entry) -> bool {
        self.keep(&self.tiers, granules.names()[index], &entry, Some((granules, index))).await
    }

    /// Gets the entry of granule `index`, which the faster tiers keep, and tell, too.
    pub(super) async fn get_granule(&self, granules: &NamedTokens, index: usize) -> Option<Entry> {
        self.find(granules.names()[index], Some((granules, index))).await
    }

    async fn find(&self, name: ContentName, granule: Option<(&NamedTokens, usize)>) -> Option<Entry> {
        for (index, placed) in self.tiers.iter().enumerate() {
            if placed.tier.is_known_to_hold(name) == Some(false) {
                continue;
            }
            if let Some(entry) = placed.tier.get(name).await {
                self.keep(&self.tiers[..index], name, &entry, granule).await;
                return Some(entry);
            }
        }
        None
    }

    async fn keep(
        &self,
        tiers: &[Placed],
        name: ContentName,
        entry: &Entry,
        granule: Option<(&NamedTokens, usize)>,
    ) -> bool {
        let mut is_kept = true;
        for placed in tiers {
            if placed.tier.is_known_to_hold(name) == Some(true) {
                continue;
            }
            is_kept &= match &placed.queue {
                Some(queue) => queue.offer(name, entry.clone()),
                None => {
                    let is_put = placed.tier.put(name, entry.clone()).await;
                    if let Some((granules, index)) = granule.filter(|_| is_put) {
                        placed.tier.tell_stored(name, granules.stored(index, placed.tier.kind().medium()));
                    }
                    placed.tier.show_usage();
                    is_put
                }
            };
        }
        is_kept
    }
}

impl BlockStore for TieredStore {
    fn num_held<'a>(&'a self, names: &'a [ContentName]) -> StoreFuture<'a, usize> {
        Box::pin(async move { self.look_up(names).await.num_held() })
    }

    fn get(&self, name: ContentName) -> StoreFuture<'_, Option<Entry>> {
        Box::pin(self.find(name, None))
    }

    /// False if a tier has dropped it.
    fn put(&self, name: ContentName, entry: Entry) -> StoreFuture<'_, bool> {
        Box::pin(async move { self.keep(&self.tiers, name, &entry, None).await })
    }

    fn remove(&self, name: ContentName) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            for placed in &self.tiers {
                placed.tier.remove(name).await;
            }
        })
    }
}
