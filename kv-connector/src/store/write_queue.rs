//! Entries on their way into a slow tier. Nobody waits for them: what has no room is dropped and counted.

use std::sync::Arc;

use common::content::ContentName;
use futures::{StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::BlockStore;
use super::entry::Entry;
use super::tier::Tier;

/// Entries that are written at a time.
const NUM_WRITERS: usize = 8;
/// The room is counted in these.
const UNIT_BYTES: usize = 1024;

struct Write {
    name: ContentName,
    entry: Entry,
    _room: OwnedSemaphorePermit,
}

/// A queue with room for so many bytes, and the task that empties it.
pub(super) struct WriteQueue {
    tier: Arc<Tier>,
    sender: mpsc::UnboundedSender<Write>,
    /// Bounds the channel: a write holds its share until it is done.
    room: Arc<Semaphore>,
    num_units: u32,
}

impl WriteQueue {
    /// Starts the task; it ends with the queue.
    pub(super) fn start(tier: Arc<Tier>, num_bytes_max: u64) -> Self {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Write>();
        let num_units = (num_bytes_max / UNIT_BYTES as u64).clamp(1, u64::from(u32::MAX >> 3)) as u32;
        let room = Arc::new(Semaphore::new(num_units as usize));
        let writing = {
            let tier = tier.clone();
            let writes = stream::poll_fn(move |context| receiver.poll_recv(context));
            writes.for_each_concurrent(NUM_WRITERS, move |write| {
                let tier = tier.clone();
                async move {
                    let num_bytes = write.entry.bytes().len();
                    tier.put(write.name, write.entry.clone()).await;
                    drop(write);
                    tier.metrics().on_unqueued(num_bytes);
                    tier.show_usage();
                }
            })
        };
        tokio::spawn(writing);
        Self { tier, sender, room, num_units }
    }

    /// False if there is no room.
    pub(super) fn offer(&self, name: ContentName, entry: Entry) -> bool {
        let num_units = entry.bytes().len().div_ceil(UNIT_BYTES) as u32;
        let Ok(room) = self.room.clone().try_acquire_many_owned(num_units) else {
            self.tier.metrics().count_dropped("queue_full");
            return false;
        };
        self.tier.metrics().on_queued(entry.bytes().len());
        // The task lives as long as this does.
        self.sender.send(Write { name, entry, _room: room }).is_ok()
    }

    /// Resolves when everything that was offered before is written or given up.
    pub(super) async fn emptied(&self) {
        // Fails only if somebody closed the semaphore, which nobody does.
        drop(self.room.acquire_many(self.num_units).await);
    }
}
