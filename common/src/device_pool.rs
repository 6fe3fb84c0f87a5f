//! A node's KV pool in a device's memory, which processes of one host let each other read.

use std::sync::Arc;

use crate::ids::BlockId;
use crate::kv_memory::KvMemory;
use crate::wire::PoolRun;

/// Bytes of a handle at most.
pub const HANDLE_BYTES_MAX: usize = 256;

/// What another process of this host opens a pool with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedPool {
    /// The device driver's words, at most [`HANDLE_BYTES_MAX`].
    pub handle: Vec<u8>,
    /// Size of the pool's memory.
    pub num_bytes: u64,
}

/// A pool in a device's memory.
pub trait DevicePool: KvMemory {
    /// Lets others read it.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn export(&self) -> Result<ExportedPool, String>;

    /// Another process's pool, to be copied into this one. It can be read for as long as the answer lives, also when the
    /// other process has ended.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn open_peer(self: Arc<Self>, exported: &ExportedPool) -> Result<Arc<dyn PeerPool>, String>;
}

/// Another process's pool. What it holds may change while it is read: what was copied is worth what a digest of the copy
/// says.
pub trait PeerPool: Send + Sync {
    /// Size in bytes.
    fn num_bytes(&self) -> u64;

    /// Copies runs, which lie within it, one behind the other to whole granules of the pool that has opened it. Done when
    /// the call returns.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn copy_granules(
        &self,
        runs: &[PoolRun],
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
    ) -> Result<(), String>;

    /// Copies bytes that lie within it to the host.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), String>;
}
