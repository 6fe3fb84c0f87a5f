//! A point that a stream has come to.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};
use cudarc::driver::{CudaContext, result};

use super::refusal::refused;
use crate::cuda::device::{DeviceError, Event};

/// A point of a stream.
pub(super) struct RecordedEvent {
    context: Arc<CudaContext>,
    event: CUevent,
}
// SAFETY: events may be used from any thread.
unsafe impl Send for RecordedEvent {}
// SAFETY: likewise.
unsafe impl Sync for RecordedEvent {}

impl RecordedEvent {
    pub(super) fn on(context: &Arc<CudaContext>, stream: CUstream) -> Result<Self, DeviceError> {
        let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(refused("make an event"))?;
        let recorded = Self { context: context.clone(), event };
        // SAFETY: both were made in this context.
        unsafe { result::event::record(event, stream) }.map_err(refused("record an event"))?;
        Ok(recorded)
    }
}

impl Event for RecordedEvent {
    fn wait(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(refused("be used by this thread"))?;
        // SAFETY: made in `on`, destroyed in `drop`.
        unsafe { result::event::synchronize(self.event) }.map_err(refused("finish what was launched"))
    }
}

impl Drop for RecordedEvent {
    fn drop(&mut self) {
        // A context that is gone has taken its events with it.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made in `on`, not used again.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
