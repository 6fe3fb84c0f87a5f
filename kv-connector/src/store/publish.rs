//! From the pool into the store, behind the requests' backs.
//!
//! ```text
//!  request ends ── names ──> queue ──> what does the store lack? ──> pin in the pool ──> copy ──> put ──> unpin
//! ```
//!
//! One sequence at a time, and its blocks are pinned for the time of a copy, never of a write: the tiers have
//! queues of their own, and what these do not take is dropped there.

use std::sync::Arc;

use common::content::ContentName;
use common::ids::BlockId;
use common::kv_memory::KvMemory;
use metrics::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::backend::StoreFuture;
use super::entry::Entry;
use super::named_tokens::NamedTokens;
use super::tiered::TieredStore;

/// Sequences that may wait to be published.
const NUM_WAITING_MAX: usize = 64;
/// Granules that are copied before they are offered.
const NUM_COPIED: usize = 16;

/// Finds KV in a pool by its content and keeps it there for a while.
pub trait PinPrefix: Send + Sync {
    /// Pins the leading granules of `names` that are in the pool. `None`: there are none.
    fn pin(&self, names: Vec<ContentName>) -> StoreFuture<'_, Option<PinnedKv>>;
}

/// KV that stays where it is until this is dropped.
pub struct PinnedKv {
    /// Block table from the first token on.
    pub blocks: Vec<BlockId>,
    /// Granules that are in them.
    pub num_granules: usize,
    /// The pool.
    pub memory: Arc<dyn KvMemory>,
    /// Gives the blocks back when it is dropped.
    pub pin: Box<dyn Send + Sync>,
}

struct Publication {
    granules: NamedTokens,
    _waiting: OwnedSemaphorePermit,
    _counted: Counted,
}

/// Counts a publication until it is done.
struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

/// Publishes sequences. Its task ends with it.
pub(super) struct Publisher {
    sender: mpsc::UnboundedSender<Publication>,
    /// Bounds the channel.
    waiting: Arc<Semaphore>,
    publications: Gauge,
}

impl Publisher {
    pub(super) fn start(store: Arc<TieredStore>, pool: Arc<dyn PinPrefix>, publications: Gauge) -> Self {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Publication>();
        tokio::spawn(async move {
            while let Some(publication) = receiver.recv().await {
                publish(&store, pool.as_ref(), publication.granules).await;
            }
        });
        Self { sender, waiting: Arc::new(Semaphore::new(NUM_WAITING_MAX)), publications }
    }

    /// False if too many wait.
    pub(super) fn offer(&self, granules: NamedTokens) -> bool {
        let Ok(waiting) = self.waiting.clone().try_acquire_owned() else { return false };
        self.publications.increment(1);
        let counted = Counted(self.publications.clone());
        self.sender.send(Publication { granules, _waiting: waiting, _counted: counted }).is_ok()
    }

    /// Resolves when everything that was offered before has been put.
    pub(super) async fn emptied(&self) {
        // Fails only if somebody closed the semaphore, which nobody does.
        drop(self.waiting.acquire_many(NUM_WAITING_MAX as u32).await);
    }
}

async fn publish(store: &Arc<TieredStore>, pool: &dyn PinPrefix, granules: NamedTokens) {
    let names = granules.names();
    let Some(first) = names.iter().position(|name| store.lacks(*name)) else { return };
    let Some(pinned) = pool.pin(names.to_vec()).await else { return };
    let pinned = Arc::new(pinned);
    let end = pinned.num_granules.min(names.len());
    for start in (first..end).step_by(NUM_COPIED) {
        let copied = start..end.min(start + NUM_COPIED);
        let lacking: Vec<_> =
            copied.map(|granule| (granule, names[granule])).filter(|(_, name)| store.lacks(*name)).collect();
        let (store_, pinned) = (store.clone(), pinned.clone());
        // Hashing and copying some megabytes would hold a thread of the runtime up.
        let copying = tokio::task::spawn_blocking(move || {
            let copy = |(granule, name)| (granule, copy(&store_, &pinned, granule, name));
            lacking.into_iter().map(copy).collect::<Vec<(usize, Entry)>>()
        });
        let Ok(entries) = copying.await else { return };
        for (granule, entry) in entries {
            store.put_granule(&granules, granule, entry).await;
        }
    }
}

fn copy(store: &TieredStore, pinned: &PinnedKv, granule: usize, name: ContentName) -> Entry {
    store.format().encode(name, |payload| pinned.memory.read_all_layers(&pinned.blocks, granule, payload))
}
