//! Memory that NIXL reads into: of the host, or of the device that the pool is on. It never writes to blocks: that a read
//! has stopped cannot always be proven, and what it would still write to must then be nobody's.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use common::device_pool::{MemoryPlace, StagingMemory};

use super::NixlPool;
use crate::transfer::Arriving;
use crate::transfer::pull::PullError;
use crate::turns;

/// Read at a time to the host, while what was read before is copied and hashed: a cache has it still.
const HOST_HALF_BYTES: usize = 512 << 10;
/// Likewise to a device, where a copy is waited for as long as it takes for several times as much.
const DEVICE_HALF_BYTES: usize = 1 << 20;
/// Copied by the host at a time; as long as closing a landing waits.
const SLICE_BYTES: usize = 64 << 10;

/// Two halves, one of which may be read into.
pub(super) enum Staging {
    Host(HostMemory),
    Device(Box<dyn StagingMemory>),
}

impl Staging {
    /// On the device that `pool` is on, if it is on one.
    pub(super) fn new(pool: &NixlPool) -> Result<Self, String> {
        Ok(match pool {
            NixlPool::Host { .. } => Self::on_host(),
            NixlPool::Device(pool) => Staging::Device(pool.clone().staging(2 * DEVICE_HALF_BYTES)?),
        })
    }

    pub(super) fn on_host() -> Self {
        Staging::Host(HostMemory::new())
    }

    pub(super) fn half_bytes(&self) -> usize {
        match self {
            Staging::Host(_) => HOST_HALF_BYTES,
            Staging::Device(_) => DEVICE_HALF_BYTES,
        }
    }

    /// Where it lies.
    pub(super) fn place(&self) -> MemoryPlace {
        match self {
            Staging::Host(memory) => MemoryPlace {
                address: memory.0.as_ptr() as u64,
                num_bytes: HostMemory::LAYOUT.size() as u64,
                gpu: None,
            },
            Staging::Device(memory) => memory.place(),
        }
    }

    /// Where the half of `index` begins in it.
    fn start(&self, index: usize) -> usize {
        index % 2 * self.half_bytes()
    }

    /// Where the half of `index` lies.
    pub(super) fn half(&self, index: usize) -> MemoryPlace {
        let address = self.place().address + self.start(index) as u64;
        MemoryPlace { address, num_bytes: self.half_bytes() as u64, ..self.place() }
    }

    /// Puts the first `num_bytes` of the half of `index`, which nobody reads into, into the blocks: device to device where
    /// the landing is in the pool `own`, else by the host.
    pub(super) fn deliver(
        &self,
        index: usize,
        num_bytes: usize,
        own: &NixlPool,
        arriving: &mut Arriving,
    ) -> Result<(), PullError> {
        let (start, mut done) = (self.start(index), 0);
        match self {
            Staging::Host(memory) => {
                while done < num_bytes {
                    arriving.fill(SLICE_BYTES.min(num_bytes - done), |into| {
                        memory.copy_out(start + done, into);
                        done += into.len();
                    })?;
                    turns::give_way();
                }
                Ok(())
            }
            Staging::Device(memory) if arriving.lands_in(&own.memory()) => {
                arriving.fill_on_device(num_bytes, |layer, blocks, first_granule, byte_offset| {
                    let copied =
                        memory.copy_to_blocks(start..start + num_bytes, layer, blocks, first_granule, byte_offset);
                    copied.map_err(PullError::Failed)
                })
            }
            Staging::Device(memory) => {
                while done < num_bytes {
                    let mut bytes = vec![0; SLICE_BYTES.min(num_bytes - done)];
                    memory.read(start + done, &mut bytes).map_err(PullError::Failed)?;
                    arriving.write(&bytes)?;
                    done += bytes.len();
                    turns::give_way();
                }
                Ok(())
            }
        }
    }
}

/// Both halves in the host's memory.
pub(super) struct HostMemory(NonNull<u8>);

// SAFETY: plain memory without thread affinity, owned by one at a time.
unsafe impl Send for HostMemory {}

impl HostMemory {
    const LAYOUT: Layout = match Layout::from_size_align(2 * HOST_HALF_BYTES, 4096) {
        Ok(layout) => layout,
        Err(_) => panic!("a size that fits"),
    };

    fn new() -> Self {
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(Self::LAYOUT) };
        Self(NonNull::new(start).unwrap_or_else(|| handle_alloc_error(Self::LAYOUT)))
    }

    /// Copies out of a half that nobody reads into.
    fn copy_out(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= Self::LAYOUT.size(), "{} bytes behind {offset} are copied", into.len());
        // SAFETY: in bounds; whoever has the staging has waited for what was read into this half, and what is read since
        // then goes to the other one. Into memory that is exclusively borrowed.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr().add(offset), into.as_mut_ptr(), into.len()) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nothing refers to it any more.
        unsafe { dealloc(self.0.as_ptr(), Self::LAYOUT) };
    }
}
