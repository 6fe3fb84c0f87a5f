//! Keeps a shared folder within a budget: nobody else does. What was written longest ago goes first.
//!
//! Each node that writes there sweeps for itself: it cannot know what others wrote since, so the budget may be
//! exceeded by what all of them write between two sweeps, a sixteenth of it each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::TryStreamExt;
use opendal::Operator;

/// Of the budget: so much is written before it is looked again, and so much room is made below it.
const SHARE: u64 = 16;
/// Entries that one sweep looks at; more of them are seen by the next one.
const NUM_ENTRIES_MAX: usize = 1 << 20;
/// Stands for: never looked.
const UNKNOWN: u64 = u64::MAX;

pub(super) struct Sweeper {
    operator: Operator,
    budget_bytes: u64,
    written_bytes: AtomicU64,
    used_bytes: AtomicU64,
    evicted_bytes: AtomicU64,
    is_sweeping: AtomicBool,
}

impl Sweeper {
    pub(super) fn new(operator: Operator, budget_bytes: u64) -> Self {
        Self {
            operator,
            budget_bytes,
            // The first write looks: what is there may be more already.
            written_bytes: AtomicU64::new(budget_bytes / SHARE),
            used_bytes: AtomicU64::new(UNKNOWN),
            evicted_bytes: AtomicU64::new(0),
            is_sweeping: AtomicBool::new(false),
        }
    }

    pub(super) fn used_bytes(&self) -> Option<u64> {
        let used = self.used_bytes.load(Ordering::Relaxed);
        (used != UNKNOWN).then_some(used)
    }

    pub(super) fn evicted_bytes(&self) -> u64 {
        self.evicted_bytes.load(Ordering::Relaxed)
    }

    /// Sweeps in the background once enough was written.
    pub(super) fn on_written(self: &Arc<Self>, num_bytes: u64) {
        let written = self.written_bytes.fetch_add(num_bytes, Ordering::Relaxed) + num_bytes;
        if written < self.budget_bytes / SHARE || self.is_sweeping.swap(true, Ordering::AcqRel) {
            return;
        }
        self.written_bytes.store(0, Ordering::Relaxed);
        let sweeper = self.clone();
        tokio::spawn(async move {
            if let Err(error) = sweeper.sweep().await {
                tracing::warn!(%error, "the shared folder could not be looked through");
            }
            sweeper.is_sweeping.store(false, Ordering::Release);
        });
    }

    async fn sweep(&self) -> opendal::Result<()> {
        let mut lister = self.operator.lister_with("v1/").recursive(true).await?;
        let mut entries = Vec::new();
        let mut used = 0;
        while let Some(entry) = lister.try_next().await? {
            if !entry.metadata().is_file() || entries.len() == NUM_ENTRIES_MAX {
                continue;
            }
            // Gone since: another node sweeps too.
            let Ok(metadata) = self.operator.stat(entry.path()).await else { continue };
            used += metadata.content_length();
            entries.push((metadata.last_modified(), entry.path().to_string(), metadata.content_length()));
        }
        if used > self.budget_bytes {
            entries.sort_unstable();
            let goal = self.budget_bytes - self.budget_bytes / SHARE;
            for (_, path, num_bytes) in entries {
                if used <= goal {
                    break;
                }
                self.operator.delete(&path).await?;
                used -= num_bytes;
                self.evicted_bytes.fetch_add(num_bytes, Ordering::Relaxed);
            }
        }
        self.used_bytes.store(used, Ordering::Relaxed);
        Ok(())
    }
}
