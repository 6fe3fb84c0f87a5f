//! Asking for memory before it is needed.
//!
//! KV is copied and hashed piece by piece between pools that are larger than any cache. A core that only copies one
//! piece behind the other waits for memory most of the time: its own prefetchers stop at the end of each page of
//! 4 KiB. So before one piece is worked on, the memory behind it is asked for.
//!
//! It is a hint, which the processor may ignore: nothing is read or written, and what lies behind a piece need not
//! be memory at all.
#![allow(unsafe_code)]

/// Worked on at a time: what is asked for meanwhile, behind it, is one page.
pub(super) const PIECE_BYTES: usize = 4 << 10;

/// What a cache is filled by.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;
/// Places that are asked for in turn: each is followed by the core's own prefetchers.
#[cfg(target_arch = "x86_64")]
const NUM_STREAMS: usize = 4;

/// Asks for a piece at `address`, to be read.
#[cfg(target_arch = "x86_64")]
pub(super) fn to_read(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint that never faults, whatever the address.
    lines(address, |line| unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) });
}

/// Asks for a piece at `address`, to be written.
#[cfg(target_arch = "x86_64")]
pub(super) fn to_write(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
    // SAFETY: as above.
    lines(address, |line| unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.cast()) });
}

#[cfg(target_arch = "x86_64")]
fn lines(address: *const u8, ask: impl Fn(*const u8)) {
    const STREAM_BYTES: usize = PIECE_BYTES / NUM_STREAMS;
    for offset in (0..STREAM_BYTES).step_by(LINE_BYTES) {
        for stream in 0..NUM_STREAMS {
            ask(address.wrapping_add(stream * STREAM_BYTES + offset));
        }
    }
}

/// Other processors are left to themselves.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn to_read(_address: *const u8) {}

/// As [`to_read`].
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn to_write(_address: *const u8) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_need_not_be_memory() {
        let piece = vec![7; PIECE_BYTES];
        for address in [piece.as_ptr(), piece.as_ptr_range().end, std::ptr::null(), std::ptr::without_provenance(!0)] {
            to_read(address);
            to_write(address);
        }
        assert!(piece.iter().all(|byte| *byte == 7));
    }
}
