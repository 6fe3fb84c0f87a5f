//! This node's end of one way to pull, as its bulk connections share it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use common::device_pool::ExportedPool;
use common::ids::{Epoch, NodeId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::PullMethod;

/// Extents that are fetched at a time, each by a thread that waits for it.
pub(crate) const NUM_PULLS_MAX: usize = 6;
/// Of those, from one peer: a lane takes one after the other, and while one is hashed the next can be told to it, so that
/// more would only wait; and a peer that stands still leaves places to the others.
pub(crate) const NUM_PULLS_OF_PEER_MAX: usize = 4;
/// Lives of peers that are remembered for a fetch that failed; the oldest is forgotten, and tried again.
const NUM_FAILED_MAX: usize = 256;

/// One per node and way: fetches out of its peers' pools, and lets them fetch out of its own.
pub(crate) struct Puller {
    method: Box<dyn PullMethod>,
    /// This node's pool, exported when the first asks for it.
    exported: OnceLock<Result<ExportedPool, String>>,
    places: Arc<Semaphore>,
    failed: Mutex<FailedLives>,
}

/// Lives of peers, the latest that failed last; one per node, since it has one at a time.
#[derive(Default)]
struct FailedLives(VecDeque<(NodeId, Epoch)>);

impl Puller {
    pub(crate) fn new(method: impl PullMethod + 'static) -> Self {
        Self {
            method: Box::new(method),
            exported: OnceLock::new(),
            places: Arc::new(Semaphore::new(NUM_PULLS_MAX)),
            failed: Mutex::default(),
        }
    }

    pub(crate) fn method(&self) -> &dyn PullMethod {
        self.method.as_ref()
    }

    /// Lets others fetch out of this node's pool. The first call may take its time.
    pub(super) fn exported(&self) -> Result<&ExportedPool, &String> {
        self.exported
            .get_or_init(|| {
                let exported = self.method.export()?;
                if exported.handle.len() > self.method.handle_bytes_max() {
                    return Err(format!("a handle of {} bytes cannot be sent", exported.handle.len()));
                }
                Ok(exported)
            })
            .as_ref()
    }

    /// Resolves when one more extent may be fetched; it is, for as long as the answer lives.
    pub(super) async fn place(&self) -> OwnedSemaphorePermit {
        self.places.clone().acquire_owned().await.expect("the semaphore of the fetches is never closed")
    }

    /// A fetch out of the pool of `life` has failed.
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
