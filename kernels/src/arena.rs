//! The memory of a KV pool, shared by the thread that computes and the threads that move blocks.
//!
//! **The invariant, upheld by the block manager**: bytes that someone writes are at that time accessed by
//! nobody else. Blocks make that natural: a block being received or computed belongs to one writer; a block
//! being sent, or read by attention, is full or (its last granule) written only by the engine thread that
//! also orders those reads. The arena checks bounds, not this. Breaking it yields torn bytes; digests over
//! extents and the generation of a block are what would notice.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::pages::Pages;

/// Zeroed, page-aligned memory of fixed size in huge pages, `Send + Sync`; see the [module](self) for who
/// may access what.
pub struct KvArena {
    pages: Pages,
    len: usize,
}

impl KvArena {
    /// An arena of `len` zeroed bytes. The kernel hands pages out on first touch.
    ///
    /// Panics when the kernel refuses the mapping.
    pub fn new(len: usize) -> Self {
        KvArena { pages: Pages::zeroed(len), len }
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the arena has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the bytes at `offset` into `into`. Panics beyond the end.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.bytes(offset, into.len());
        // SAFETY: in bounds by `bytes`; `into` is exclusively borrowed memory outside the arena; nobody
        // writes these bytes meanwhile (the module's invariant).
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies `from` to `offset`. Panics beyond the end.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let into = self.bytes(offset, from.len());
        // SAFETY: in bounds by `bytes`; nobody else accesses these bytes meanwhile (the module's invariant).
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) }
    }

    /// Zeroes a range. Panics beyond the end.
    pub fn zero(&self, range: Range<usize>) {
        assert!(range.start <= range.end, "a range runs forward");
        let into = self.bytes(range.start, range.end - range.start);
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(into, 0, range.end - range.start) }
    }

    /// Copies `len` bytes from `from` to `to`; the ranges may overlap. Panics beyond the end.
    pub fn copy_within(&self, from: usize, to: usize, len: usize) {
        let (source, target) = (self.bytes(from, len), self.bytes(to, len));
        // SAFETY: both in bounds; `copy` allows overlap; as in `read` and `write`.
        unsafe { std::ptr::copy(source, target, len) }
    }

    /// Pointer to `len` bytes at `offset`, for the kernels. Panics beyond the end.
    pub(crate) fn bytes(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "bytes {offset}..+{len} lie outside an arena of {}",
            self.len
        );
        // SAFETY: `offset` is within the mapping, which is at least `self.len` long.
        unsafe { self.pages.as_ptr().add(offset) }
    }
}

impl std::fmt::Debug for KvArena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvArena").field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_arena_is_zero_and_gives_back_what_was_written() {
        let arena = KvArena::new(10_000);
        let mut bytes = [1u8; 16];
        arena.read(9_984, &mut bytes);
        assert_eq!(bytes, [0; 16]);
        arena.write(100, &[7; 16]);
        arena.copy_within(100, 108, 16);
        arena.zero(100..104);
        arena.read(100, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
        assert_eq!(arena.len(), 10_000);
        assert!(!arena.is_empty());
    }

    #[test]
    fn threads_use_disjoint_ranges_at_once() {
        let arena = KvArena::new(4 * 1024);
        std::thread::scope(|scope| {
            for i in 0..4u8 {
                let arena = &arena;
                scope.spawn(move || {
                    arena.write(usize::from(i) * 1024, &[i + 1; 1024]);
                    let mut back = [0; 1024];
                    arena.read(usize::from(i) * 1024, &mut back);
                    assert_eq!(back, [i + 1; 1024]);
                });
            }
        });
    }

    #[test]
    #[should_panic(expected = "lie outside an arena of 64")]
    fn access_beyond_the_end_panics() {
        KvArena::new(64).write(60, &[0; 5]);
    }
}
