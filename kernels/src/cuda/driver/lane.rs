//! The order of launches and copies, and the memory through which copies go.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, CudaStream, result};

use super::event::RecordedEvent;
use super::pinned::Pinned;
use super::refusal::refused;
use crate::cuda::device::{DeviceError, Event};

/// Bytes of one piece of a copy between the device and memory of the host that the driver may move anywhere: it
/// goes through memory that stays where it is.
pub(super) const STAGING_BYTES: usize = 2 << 20;
/// Pieces that may be on their way, or wait behind what computes: a step has three, and two are in flight.
pub(super) const COMPUTE_STAGES: usize = 8;
/// Pieces of a transfer that may be on their way: one that the device moves, one that the host does.
pub(super) const TRANSFER_STAGES: usize = 2;

/// A stream, and memory through which copies go.
pub(super) struct LaneState {
    pub(super) stream: Arc<CudaStream>,
    /// Free, then those that a copy may still read.
    free: Vec<Pinned>,
    busy: VecDeque<(Pinned, RecordedEvent)>,
}

/// Places of a copy, taken in portions of any size.
struct Portions<'a> {
    places: &'a [(u64, usize)],
    /// Of the first, taken already.
    num_taken: usize,
}

impl<'a> Portions<'a> {
    fn of(places: &'a [(u64, usize)]) -> Self {
        Self { places, num_taken: 0 }
    }

    /// The next `num_bytes`: addresses, and which of these bytes belong there.
    fn next(&mut self, num_bytes: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let &(address, held) = self.places.first().filter(|_| start < num_bytes)?;
            let address = address + self.num_taken as u64;
            let range = start..num_bytes.min(start + held - self.num_taken);
            (start, self.num_taken) = (range.end, self.num_taken + range.len());
            if self.num_taken == held {
                (self.places, self.num_taken) = (&self.places[1..], 0);
            }
            Some((address, range))
        })
        .filter(|(_, range)| !range.is_empty())
    }
}

impl LaneState {
    pub(super) fn new(context: &Arc<CudaContext>, priority: i32, stages: usize) -> Result<Self, DeviceError> {
        let stream = context.new_stream_with_priority(priority).map_err(refused("make a stream"))?;
        let free = (0..stages).map(|_| Pinned::new(context, STAGING_BYTES)).collect::<Result<_, _>>()?;
        Ok(Self { stream, free, busy: VecDeque::new() })
    }

    /// Memory that no copy reads any more.
    fn stage(&mut self) -> Result<Pinned, DeviceError> {
        if let Some(stage) = self.free.pop() {
            return Ok(stage);
        }
        let Some((stage, event)) = self.busy.pop_front() else {
            let reason = "earlier copies have failed".to_string();
            return Err(DeviceError::Refused { asked: "copy".to_string(), reason });
        };
        event.wait()?;
        Ok(stage)
    }

    pub(super) fn copy_in(
        &mut self,
        context: &Arc<CudaContext>,
        places: &[(u64, usize)],
        from: &[u8],
    ) -> Result<(), DeviceError> {
        let mut places = Portions::of(places);
        for piece in from.chunks(STAGING_BYTES) {
            let stage = self.stage()?;
            // SAFETY: a stage has room for a piece, and nothing reads it.
            let staged = unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), stage.start, piece.len());
                std::slice::from_raw_parts(stage.start, piece.len())
            };
            let copied = places.next(piece.len()).try_for_each(|(to, range)| {
                // SAFETY: `to` has room by the caller's contract; the stage is as it is until the event has come.
                unsafe { result::memcpy_htod_async(to, &staged[range], self.stream.cu_stream()) }
            });
            let on_its_way = self.mark(context, stage)?;
            self.busy.push_back(on_its_way);
            copied.map_err(refused("take a copy"))?;
        }
        Ok(())
    }

    pub(super) fn copy_out(
        &mut self,
        context: &Arc<CudaContext>,
        places: &[(u64, usize)],
        to: &mut [u8],
    ) -> Result<(), DeviceError> {
        let mut places = Portions::of(places);
        let mut landing: VecDeque<(Pinned, RecordedEvent, &mut [u8])> = VecDeque::new();
        for piece in to.chunks_mut(STAGING_BYTES) {
            // One piece is copied on by the host while the next is on its way.
            if landing.len() == TRANSFER_STAGES {
                let first = landing.pop_front().expect("there are some");
                self.land(first)?;
            }
            let stage = self.stage()?;
            // SAFETY: a stage has room for a piece, and nothing else uses it.
            let staged = unsafe { std::slice::from_raw_parts_mut(stage.start, piece.len()) };
            let copied = places.next(piece.len()).try_for_each(|(from, range)| {
                // SAFETY: `from` has as many bytes by the caller's contract; nobody reads the stage before the event.
                unsafe { result::memcpy_dtoh_async(&mut staged[range], from, self.stream.cu_stream()) }
            });
            let (stage, event) = self.mark(context, stage)?;
            if let Err(error) = copied {
                self.busy.push_back((stage, event));
                return Err(refused("give a copy")(error));
            }
            landing.push_back((stage, event, piece));
        }
        for piece in landing {
            self.land(piece)?;
        }
        Ok(())
    }

    /// Copies from or to `stage` are on their way: the event that says when they are over.
    fn mark(&self, context: &Arc<CudaContext>, stage: Pinned) -> Result<(Pinned, RecordedEvent), DeviceError> {
        match RecordedEvent::on(context, self.stream.cu_stream()) {
            Ok(event) => Ok((stage, event)),
            Err(error) => {
                std::mem::forget(stage); // nobody hears of their end
                Err(error)
            }
        }
    }

    fn land(&mut self, (stage, event, to): (Pinned, RecordedEvent, &mut [u8])) -> Result<(), DeviceError> {
        event.wait()?;
        // SAFETY: the copy into the stage is done, by the event.
        unsafe { std::ptr::copy_nonoverlapping(stage.start, to.as_mut_ptr(), to.len()) };
        self.free.push(stage);
        Ok(())
    }
}

impl Drop for LaneState {
    fn drop(&mut self) {
        // Its stages are free when nothing runs any more. What the driver refuses now, it is gone.
        let _ = self.stream.synchronize();
    }
}

/// Of streams; 0 is the default, and what it is where the device has only one.
pub(super) fn highest_priority(context: &Arc<CudaContext>) -> i32 {
    let supported = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED);
    if supported != Ok(1) {
        return 0;
    }
    result::stream::get_priority_range().map_or(0, |(_, highest)| highest)
}
