//! Memory that NIXL reads into. It never writes to blocks: that a read has stopped cannot always be proven, and what it
//! would still write to must then be nobody's.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::library::Request;
use super::{Inner, Peer};
use crate::transfer::RefusedExtent;
use crate::transfer::pull::PullError;

/// Read at a time, while what was read before is copied and hashed.
pub(super) const HALF_BYTES: usize = 512 << 10;
/// A peer that lets a read wait so long is taken for dead, as one that is silent on a connection.
const READ_DEADLINE: Duration = Duration::from_secs(2);
/// Stagings that reads without an end may keep; then there is one less for every further one.
pub(super) const NUM_LOST_MAX: usize = 16;
/// For so long a read is asked for its end without a pause, then every [`PAUSE`].
const SPIN_TIME: Duration = Duration::from_micros(100);
const PAUSE: Duration = Duration::from_micros(50);

/// Two halves, one of which may be read into.
pub(super) struct Staging {
    start: NonNull<u8>,
}

// SAFETY: plain memory without thread affinity, owned by one at a time.
unsafe impl Send for Staging {}

impl Staging {
    const LAYOUT: Layout = match Layout::from_size_align(2 * HALF_BYTES, 4096) {
        Ok(layout) => layout,
        Err(_) => panic!("a size that fits"),
    };

    pub(super) fn new() -> Self {
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(Self::LAYOUT) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(Self::LAYOUT)) }
    }

    /// Where it lies, and its size.
    pub(super) fn place(&self) -> (usize, usize) {
        (self.start.as_ptr() as usize, Self::LAYOUT.size())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nothing refers to it any more.
        unsafe { dealloc(self.start.as_ptr(), Self::LAYOUT) };
    }
}

/// A staging in use for one extent.
pub(super) struct Borrowed<'a> {
    peer: &'a Peer,
    staging: Option<Staging>,
    reading: Option<Request>,
}

impl<'a> Borrowed<'a> {
    pub(super) fn new(peer: &'a Peer) -> Result<Self, PullError> {
        let staging = peer.inner.free().pop();
        // No fault of this peer's.
        let none = || PullError::Refused(RefusedExtent::Unreadable);
        Ok(Self { peer, staging: Some(staging.ok_or_else(none)?), reading: None })
    }

    fn half(&self, index: usize) -> NonNull<u8> {
        let staging = self.staging.as_ref().expect("it is given back on drop");
        // SAFETY: the index is 0 or 1, of two halves.
        unsafe { staging.start.add(index % 2 * HALF_BYTES) }
    }

    /// Begins to read pieces, which have at most [`HALF_BYTES`], into the half of `index`. Nothing else is being read.
    pub(super) fn begin(&mut self, index: usize, pieces: &[(usize, usize)]) -> Result<(), PullError> {
        assert!(self.reading.is_none() && pieces.iter().map(|(_, num_bytes)| num_bytes).sum::<usize>() <= HALF_BYTES);
        let into = self.half(index).as_ptr() as usize;
        // SAFETY: half a staging is registered, large enough, and copied from only behind `wait`, by its only owner.
        match unsafe { self.peer.inner.agent.read(&self.peer.name, pieces, into) } {
            Ok(request) => self.reading = Some(request),
            Err(reason) => return Err(self.lose(None, reason)),
        }
        Ok(())
    }

    /// What may still be read into stays for ever, and with it the agent that reads; another takes its place.
    fn lose(&mut self, request: Option<Request>, reason: String) -> PullError {
        self.peer.is_lost.store(true, Ordering::SeqCst);
        std::mem::forget((self.staging.take(), request, Arc::clone(&self.peer.inner)));
        if let Err(reason) = self.peer.inner.replace_lost() {
            tracing::warn!(%reason, "nixl has a buffer less");
        }
        PullError::Failed(reason)
    }

    /// Waits for what was begun.
    pub(super) fn wait(&mut self) -> Result<(), PullError> {
        let Some(request) = self.reading.take() else { return Ok(()) };
        let agent = &self.peer.inner.agent;
        let began = Instant::now();
        loop {
            match agent.has_ended(&request) {
                Ok(false) if began.elapsed() > READ_DEADLINE => {
                    return Err(self.lose(Some(request), format!("a read did not end within {READ_DEADLINE:?}")));
                }
                Ok(false) if began.elapsed() > SPIN_TIME => std::thread::sleep(PAUSE),
                Ok(false) => std::thread::yield_now(),
                Ok(true) => {
                    agent.release(request);
                    return Ok(());
                }
                // An error of one of its pieces says nothing of the others.
                Err(reason) => return Err(self.lose(Some(request), reason)),
            }
        }
    }

    /// Copies out of the half of `index`, behind `offset` bytes of it; what was read into it has been waited for.
    pub(super) fn copy_out(&self, index: usize, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= HALF_BYTES, "{} bytes behind {offset} are copied", into.len());
        // SAFETY: in bounds of a half that is not being read into: `wait` came before, and `begin` since then was for
        // the other one. Into memory that is exclusively borrowed.
        unsafe {
            std::ptr::copy_nonoverlapping(self.half(index).as_ptr().add(offset), into.as_mut_ptr(), into.len());
        }
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        // Whatever it says, nobody wants the bytes.
        let _ = self.wait();
        let inner: &Inner = &self.peer.inner;
        inner.free().extend(self.staging.take());
    }
}
