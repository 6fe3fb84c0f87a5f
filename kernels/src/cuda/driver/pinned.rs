//! Memory of the host that copies reach by themselves, and what lands in it.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, result};

use super::event::RecordedEvent;
use super::refusal::refused;
use crate::cuda::device::{DeviceError, Event, Landing};

/// Memory of the host that the driver keeps where it is, so that copies reach it by themselves.
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    pub(super) start: *mut u8,
    pub(super) num_bytes: usize,
}
// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: likewise; whoever borrows it reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// The context is current on this thread.
    pub(super) fn new(context: &Arc<CudaContext>, num_bytes: usize) -> Result<Self, DeviceError> {
        // SAFETY: any size; freed in `drop`.
        let start = unsafe { result::malloc_host(num_bytes, 0) }.map_err(refused("give memory for copies"))?;
        Ok(Self { context: context.clone(), start: start.cast(), num_bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A context that is gone has taken its memory with it.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: from `malloc_host`; whoever drops it knows that no copy uses it.
            let _ = unsafe { result::free_host(self.start.cast::<c_void>()) };
        }
    }
}

/// Memory for bytes that come from the device; as many as ever were on their way at the same time.
pub(super) type Landings = Arc<Mutex<Vec<Pinned>>>;

pub(super) struct GpuLanding {
    /// There until the landing is dropped.
    pub(super) memory: Option<Pinned>,
    pub(super) num_bytes: usize,
    /// Behind the copy.
    pub(super) event: RecordedEvent,
    pub(super) home: Landings,
}

impl Landing for GpuLanding {
    fn bytes(&self) -> Result<&[u8], DeviceError> {
        self.event.wait()?;
        let memory = self.memory.as_ref().expect("it is there until the drop");
        // SAFETY: as many bytes were copied, the copy is done, and nobody writes here before the drop.
        Ok(unsafe { std::slice::from_raw_parts(memory.start, self.num_bytes) })
    }
}

impl Drop for GpuLanding {
    fn drop(&mut self) {
        let memory = self.memory.take().expect("dropped once");
        // The copy may still write.
        match self.event.wait() {
            Ok(()) => self.home.lock().unwrap_or_else(PoisonError::into_inner).push(memory),
            Err(_) => std::mem::forget(memory), // whether it ever ends is not known
        }
    }
}
