//! This node's device, as it copies out of its peers' pools.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::device_pool::DevicePool;
use common::ids::{Epoch, NodeId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Extents that are copied at a time, each by a thread that waits for the device: a lane takes one after the other, and
/// while one is hashed the next can be told to it. More threads would only wait.
const NUM_COPIES_MAX: usize = 4;
/// Lives of peers that are remembered for a copy that failed; the oldest is forgotten, and tried again.
const NUM_FAILED_MAX: usize = 256;

/// One per node: what its bulk connections share.
pub(crate) struct Copier {
    pool: Arc<dyn DevicePool>,
    places: Arc<Semaphore>,
    failed: Mutex<FailedLives>,
}

/// Lives of peers, the latest that failed last; one per node, since it has one at a time.
#[derive(Default)]
struct FailedLives(VecDeque<(NodeId, Epoch)>);

impl Copier {
    pub(crate) fn new(pool: Arc<dyn DevicePool>) -> Self {
        Self { pool, places: Arc::new(Semaphore::new(NUM_COPIES_MAX)), failed: Mutex::default() }
    }

    /// Where the copies go.
    pub(crate) fn pool(&self) -> &Arc<dyn DevicePool> {
        &self.pool
    }

    /// Resolves when one more extent may be copied; it is, for as long as the answer lives.
    pub(super) async fn place(&self) -> OwnedSemaphorePermit {
        self.places.clone().acquire_owned().await.expect("the semaphore of the copies is never closed")
    }

    /// A copy out of the pool of `life` has failed.
    pub(super) fn on_failed(&self, life: &(NodeId, Epoch)) {
        self.failed().insert(life);
    }

    /// Whether that has happened in this life of a node.
    pub(crate) fn has_failed(&self, life: &(NodeId, Epoch)) -> bool {
        self.failed().0.contains(life)
    }

    fn failed(&self) -> MutexGuard<'_, FailedLives> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FailedLives {
    fn insert(&mut self, life: &(NodeId, Epoch)) {
        self.0.retain(|(node, _)| *node != life.0);
        if self.0.len() == NUM_FAILED_MAX {
            self.0.pop_front();
        }
        self.0.push_back(life.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_remembered_for_its_last_life_and_the_oldest_is_forgotten() {
        let life = |number: usize, epoch: u64| (NodeId::new(format!("p{number}")).unwrap(), Epoch(epoch));
        let mut failed = FailedLives::default();
        for number in 0..NUM_FAILED_MAX {
            failed.insert(&life(number, 1));
        }
        failed.insert(&life(0, 2));
        assert!(!failed.0.contains(&life(0, 1)) && failed.0.contains(&life(0, 2)) && failed.0.contains(&life(1, 1)));
        failed.insert(&life(NUM_FAILED_MAX, 1));
        assert!(!failed.0.contains(&life(1, 1)) && failed.0.contains(&life(2, 1)));
        assert_eq!(failed.0.len(), NUM_FAILED_MAX);
    }
}
