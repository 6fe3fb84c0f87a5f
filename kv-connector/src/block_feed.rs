//! A node's block events, for the proxies that follow them.
//!
//! The engine's thread appends to a log ([`BlockLog`]) and never waits: each listener reads at its own pace,
//! one bounded message at a time, and one that falls too far behind starts over with a snapshot.

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::block_events::{BlockEvent, BlockSink};
use common::block_log::{BlockLog, LogReader};
use common::ids::Epoch;
use common::wire::blocks::{self, BlockCursor, BlockNews, WatchBlocks};
use tokio::sync::watch;

use crate::ControlSender;

/// Size of one message, about: what the log is locked for is what is copied into it.
const NEWS_BYTES_MAX: usize = 64 << 10;
/// Removals that a listener may be behind before it starts over: a minute of a node that evicts a thousand
/// blocks a second, for 2 MiB.
const NUM_REMOVALS_MAX: usize = 65_536;

/// Block events of this life of the node.
#[derive(Debug)]
pub struct BlockFeed {
    log: Mutex<BlockLog>,
    newest: watch::Sender<u64>,
}

impl Default for BlockFeed {
    fn default() -> Self {
        Self::new(NUM_REMOVALS_MAX)
    }
}

impl BlockSink for BlockFeed {
    fn on_blocks(&self, events: Vec<BlockEvent>) {
        let mut log = self.lock();
        for event in events {
            log.append(event);
        }
        let newest = log.newest();
        drop(log);
        self.newest.send_replace(newest);
    }
}

impl BlockFeed {
    /// Nothing stored yet; a listener may be `num_removals_max` removals behind.
    pub fn new(num_removals_max: usize) -> Self {
        Self { log: Mutex::new(BlockLog::new(num_removals_max)), newest: watch::Sender::new(0) }
    }

    /// Tells one listener, from where it asked to begin. Returns when it no longer listens. `epoch` is this life
    /// of the node.
    pub async fn serve(&self, epoch: Epoch, watch: WatchBlocks, mut sender: ControlSender) {
        let after = watch.after.filter(|cursor| cursor.epoch == epoch).map(|cursor| cursor.number);
        let mut reader = LogReader::new(after);
        let mut newest = self.newest.subscribe();
        let mut is_first = true;
        loop {
            newest.borrow_and_update();
            let batch = self.lock().read(&mut reader, NEWS_BYTES_MAX);
            if !batch.is_empty() || is_first {
                is_first = false;
                let news = BlockNews {
                    is_restart: batch.is_restart,
                    events: batch.events.iter().map(|event| blocks::BlockEvent::of(event, watch.with_tokens)).collect(),
                    resume_at: batch.resume_at.map(|number| BlockCursor { epoch, number }),
                };
                if sender.send(&news).await.is_err() {
                    return;
                }
                continue;
            }
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = sender.stopped() => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BlockLog> {
        // The log is valid after every append.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
