//! A node's KV pool in a device's memory, which other processes are let read: those of the same host by the device's
//! driver, any by a library that registers memory with a network.

use std::ops::Range;
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

/// Where memory lies, for a library that registers it with a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlace {
    /// Of its first byte.
    pub address: u64,
    /// Its size.
    pub num_bytes: u64,
    /// Number of the GPU that it is on, as its process counts them; `None`: it is the host's, also where the host counts
    /// as a device.
    pub gpu: Option<u32>,
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

    /// Where all of it lies.
    ///
    /// # Errors
    /// Why that is nobody's to know, as a sentence.
    fn place(&self) -> Result<MemoryPlace, String>;

    /// `num_bytes` of the same device's memory, from which blocks of this pool are filled.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn staging(self: Arc<Self>, num_bytes: usize) -> Result<Box<dyn StagingMemory>, String>;

    /// Lets the calling thread use a library that asks the device's driver by itself.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn enter(&self) -> Result<(), String>;
}

/// Memory on a pool's device that is no block's. Others may write to it: what was copied out of it is worth what a digest
/// of the copy says.
pub trait StagingMemory: Send + Sync {
    /// Where it lies.
    fn place(&self) -> MemoryPlace;

    /// Copies bytes `from` of it to `byte_offset` of the extent of its pool that begins at `first_granule`, passing by what
    /// the device computes. Done when the call returns.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn copy_to_blocks(
        &self,
        from: Range<usize>,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        byte_offset: usize,
    ) -> Result<(), String>;

    /// Copies bytes at `offset` of it to the host.
    ///
    /// # Errors
    /// What the device says, as a sentence.
    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), String>;
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
