//! `cuda-ipc`: a device copies out of another process's device memory, of the same host.
//!
//! No byte of KV goes through either host: sender and receiver hash where it lies
//! ([`KvMemory::hash_granules`](common::kv_memory::KvMemory::hash_granules)), the receiver its own copy. Drivers open
//! handles of the same user alone.

use std::sync::Arc;

use common::device_pool::{DevicePool, ExportedPool, HANDLE_BYTES_MAX, PeerPool};
use common::kv_memory::KvMemory;
use common::wire::PoolRun;

use crate::accounting::Carrier;
use crate::transfer::Arriving;
use crate::transfer::pull::{PullError, PullMethod, PulledPool};
use crate::turns;

/// This node's pool on a device.
pub(crate) struct CudaIpc {
    pool: Arc<dyn DevicePool>,
    memory: Arc<dyn KvMemory>,
}

impl CudaIpc {
    pub(crate) fn new(pool: Arc<dyn DevicePool>) -> Self {
        Self { memory: pool.clone(), pool }
    }
}

impl PullMethod for CudaIpc {
    fn carrier(&self) -> Carrier {
        Carrier::CudaIpc
    }

    fn question(&self) -> [u8; 4] {
        *b"TKCI"
    }

    fn is_within_host(&self) -> bool {
        true
    }

    fn handle_bytes_max(&self) -> usize {
        HANDLE_BYTES_MAX
    }

    fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.memory
    }

    fn export(&self) -> Result<ExportedPool, String> {
        self.pool.export()
    }

    fn open_peer(&self, exported: &ExportedPool) -> Result<Arc<dyn PulledPool>, String> {
        let peer = self.pool.clone().open_peer(exported)?;
        Ok(Arc::new(OpenedPool { peer, own: self.memory.clone() }))
    }
}

/// A peer's pool, opened by this node's device.
struct OpenedPool {
    peer: Arc<dyn PeerPool>,
    own: Arc<dyn KvMemory>,
}

impl PulledPool for OpenedPool {
    fn num_bytes(&self) -> u64 {
        self.peer.num_bytes()
    }

    /// Device to device where the landing is in the pool that opened the peer's; else through the host.
    fn pull(&self, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), PullError> {
        if arriving.lands_in(&self.own) {
            let num_bytes = runs.iter().map(|run| run.num_bytes as usize).sum();
            return arriving.fill_on_device(num_bytes, |layer, blocks, first_granule, _| {
                self.peer.copy_granules(runs, layer, blocks, first_granule).map_err(PullError::Failed)
            });
        }
        for run in runs {
            let mut bytes = vec![0; run.num_bytes as usize];
            self.peer.read(run.offset, &mut bytes).map_err(PullError::Failed)?;
            arriving.write(&bytes)?;
            turns::give_way();
        }
        Ok(())
    }
}
