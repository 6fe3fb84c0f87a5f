//! The memory of a KV pool, shared by the thread that computes and the threads that move blocks.
//!
//! **The invariant, upheld by the block manager**: bytes that someone writes are at that time accessed by
//! nobody else. Blocks make that natural: a block being received or computed belongs to one writer; a block
//! being sent, or read by attention, is full or (its last granule) written only by the engine thread that
//! also orders those reads. The arena checks bounds, not this. Breaking it yields torn bytes; digests over
//! extents and the generation of a block are what would notice.
//!
//! A shareable arena can be mapped by other processes, for reading only. They are no part of the invariant:
//! what they read while somebody writes is torn, and it is theirs to notice.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::cuda::{Buffer, DeviceError, Lane};
use crate::pages::Pages;

/// Zeroed memory of fixed size, `Send + Sync`; see the [module](self) for who may access what.
pub struct KvArena {
    memory: Memory,
    len: usize,
}

enum Memory {
    /// Page-aligned, in huge pages.
    Host(Pages),
    /// Every access is a copy, done when the call returns. A device that fails at one is lost: a panic.
    Device(Buffer),
}

impl KvArena {
    /// An arena of `len` zeroed bytes. The kernel hands pages out on first touch.
    ///
    /// Panics when the kernel refuses the mapping.
    pub fn new(len: usize) -> Self {
        KvArena { memory: Memory::Host(Pages::zeroed(len)), len }
    }

    /// As [`new`](Self::new), in a sealed file in memory that other processes can map for reading, without
    /// huge pages on most systems (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`).
    ///
    /// # Errors
    /// The kernel's, if it refuses such a file.
    pub fn shareable(len: usize) -> io::Result<Self> {
        Ok(KvArena { memory: Memory::Host(Pages::shareable(len)?), len })
    }

    /// An arena in a device's memory, which is zeroed here.
    ///
    /// # Errors
    /// What the device says.
    pub fn on_device(buffer: Buffer) -> Result<Self, DeviceError> {
        let len = buffer.num_bytes();
        buffer.zero(Lane::Transfer, 0, len)?;
        Ok(KvArena { memory: Memory::Device(buffer), len })
    }

    /// Its memory, if that is a device's.
    pub fn device(&self) -> Option<&Buffer> {
        match &self.memory {
            Memory::Host(_) => None,
            Memory::Device(buffer) => Some(buffer),
        }
    }

    /// Takes all of the arena's memory from the system now instead of on first touch. Nothing happens on kernels
    /// that cannot (before 5.14); a device's memory is there already.
    ///
    /// # Errors
    /// The kernel's, if there is not that much memory.
    pub fn populate(&self) -> io::Result<()> {
        match &self.memory {
            Memory::Host(pages) => pages.populate(),
            Memory::Device(_) => Ok(()),
        }
    }

    /// The file of a shareable arena and its size in bytes, which is that of the arena in whole pages. An
    /// offset in the arena is the offset in the file.
    pub fn file(&self) -> Option<(BorrowedFd<'_>, usize)> {
        match &self.memory {
            Memory::Host(pages) => pages.file(),
            Memory::Device(_) => None,
        }
    }

    /// Whether it is on the host and the kernel is set to give huge pages for it.
    pub fn gets_huge_pages(&self) -> bool {
        matches!(&self.memory, Memory::Host(pages) if pages.gets_huge_pages())
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
        if let Memory::Device(buffer) = &self.memory {
            return buffer.read(Lane::Transfer, offset, into).unwrap_or_else(|error| lost(&error));
        }
        let from = self.bytes(offset, into.len());
        // SAFETY: in bounds by `bytes`; `into` is exclusively borrowed memory outside the arena; nobody
        // writes these bytes meanwhile (the module's invariant).
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies what is at places, (offset, bytes) each, one behind the other into `into`, which holds exactly that. Panics
    /// beyond the end.
    pub fn read_places(&self, places: &[(usize, usize)], into: &mut [u8]) {
        if let Memory::Device(buffer) = &self.memory {
            return buffer.read_places(Lane::Transfer, places, into).unwrap_or_else(|error| lost(&error));
        }
        let mut rest = into;
        for &(offset, num_bytes) in places {
            let (now, later) = rest.split_at_mut(num_bytes);
            self.read(offset, now);
            rest = later;
        }
        assert!(rest.is_empty(), "{} bytes were asked for that no place has", rest.len());
    }

    /// Shows `visit` the `len` bytes at `offset`, where they lie if the host can see them. Panics beyond the end.
    pub fn visit(&self, offset: usize, len: usize, visit: impl FnOnce(&[u8])) {
        if self.device().is_some() {
            let mut copy = vec![0; len];
            self.read(offset, &mut copy);
            return visit(&copy);
        }
        let from = self.bytes(offset, len);
        // SAFETY: in bounds by `bytes` and initialised (zeroed by the kernel); nobody writes these bytes
        // meanwhile (the module's invariant), and the reference does not outlive the call.
        visit(unsafe { std::slice::from_raw_parts(from, len) })
    }

    /// The `len` bytes at `offset` where they lie, if the host can see them. Panics beyond the end.
    pub fn bytes_at(&self, offset: usize, len: usize) -> Option<&[u8]> {
        if self.device().is_some() {
            return None;
        }
        // SAFETY: in bounds by `bytes`, initialised (zeroed by the kernel) and mapped for as long as the arena lives;
        // nobody writes these bytes while the reference is used (the module's invariant).
        Some(unsafe { std::slice::from_raw_parts(self.bytes(offset, len), len) })
    }

    /// Copies `from` to `offset`. Panics beyond the end.
    pub fn write(&self, offset: usize, from: &[u8]) {
        if let Memory::Device(buffer) = &self.memory {
            return buffer.write(Lane::Transfer, offset, from).unwrap_or_else(|error| lost(&error));
        }
        let into = self.bytes(offset, from.len());
        // SAFETY: in bounds by `bytes`; nobody else accesses these bytes meanwhile (the module's invariant).
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) }
    }

    /// Copies what lies one behind the other in `from` to places, (offset, bytes) each, which have exactly as much. Panics
    /// beyond the end.
    pub fn write_places(&self, places: &[(usize, usize)], from: &[u8]) {
        if let Memory::Device(buffer) = &self.memory {
            return buffer.write_places(Lane::Transfer, places, from).unwrap_or_else(|error| lost(&error));
        }
        let mut rest = from;
        for &(offset, num_bytes) in places {
            let (now, later) = rest.split_at(num_bytes);
            self.write(offset, now);
            rest = later;
        }
        assert!(rest.is_empty(), "{} bytes were given that no place has", rest.len());
    }

    /// Lets `fill` write the `len` bytes at `offset`, where they lie if the host can see them: it then finds there what
    /// was there, else zeros. Panics beyond the end.
    pub fn fill(&self, offset: usize, len: usize, fill: impl FnOnce(&mut [u8])) {
        if self.device().is_some() {
            let mut bytes = vec![0; len];
            fill(&mut bytes);
            return self.write(offset, &bytes);
        }
        let into = self.bytes(offset, len);
        // SAFETY: in bounds by `bytes` and initialised (zeroed by the kernel); nobody else accesses these bytes
        // meanwhile (the module's invariant), and the reference does not outlive the call.
        fill(unsafe { std::slice::from_raw_parts_mut(into, len) })
    }

    /// Zeroes a range. Panics beyond the end.
    pub fn zero(&self, range: Range<usize>) {
        assert!(range.start <= range.end, "a range runs forward");
        if let Memory::Device(buffer) = &self.memory {
            let done = buffer.zero(Lane::Transfer, range.start, range.end - range.start);
            return done.unwrap_or_else(|error| lost(&error));
        }
        let into = self.bytes(range.start, range.end - range.start);
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(into, 0, range.end - range.start) }
    }

    /// Copies `len` bytes from `from` to `to`; the ranges may overlap on the host. Panics beyond the end.
    pub fn copy_within(&self, from: usize, to: usize, len: usize) {
        if let Memory::Device(buffer) = &self.memory {
            let done = buffer.copy_from(Lane::Transfer, to, buffer, from, len);
            return done.unwrap_or_else(|error| lost(&error));
        }
        let (source, target) = (self.bytes(from, len), self.bytes(to, len));
        // SAFETY: both in bounds; `copy` allows overlap; as in `read` and `write`.
        unsafe { std::ptr::copy(source, target, len) }
    }

    /// Pointer to `len` bytes at `offset`, for the CPU kernels. Panics beyond the end, and if they are a device's.
    pub(crate) fn bytes(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "bytes {offset}..+{len} lie outside an arena of {}",
            self.len
        );
        match &self.memory {
            // SAFETY: `offset` is within the mapping, which is at least `self.len` long.
            Memory::Host(pages) => unsafe { pages.as_ptr().add(offset) },
            Memory::Device(_) => panic!("a CPU kernel was given a KV pool in a device's memory"),
        }
    }
}

/// Nothing is known of KV whose device does not answer.
fn lost(error: &DeviceError) -> ! {
    panic!("the KV pool's device is lost: {error}")
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
        arena.fill(104, 3, |bytes| bytes.iter_mut().for_each(|byte| *byte += 1));
        arena.read(100, &mut bytes);
        assert_eq!(bytes[..8], [0, 0, 0, 0, 8, 8, 8, 7]);
        assert_eq!(arena.bytes_at(104, 4), Some(&[8, 8, 8, 7][..]));
        assert_eq!(arena.len(), 10_000);
        assert!(!arena.is_empty());
        let (places, mut back) = ([(300, 2), (200, 0), (100, 3)], [0; 5]);
        arena.write_places(&places, b"abcde");
        arena.read_places(&places, &mut back);
        assert_eq!((&back, arena.bytes_at(100, 3)), (b"abcde", Some(&b"cde"[..])));
    }

    #[test]
    #[cfg(not(miri))]
    fn shareable_arena_can_be_read_elsewhere_and_written_nowhere_else() {
        use std::os::fd::AsRawFd;
        use std::os::unix::fs::FileExt;

        let arena = KvArena::shareable(10_000).unwrap();
        arena.write(5_000, b"kv");
        let (fd, len) = arena.file().unwrap();
        assert_eq!((len, KvArena::new(10_000).file().is_none()), (12_288, true));
        let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, 5_000).unwrap();
        assert_eq!(&bytes, b"kv");
        arena.visit(5_000, 2, |bytes| assert_eq!(bytes, b"kv"));
        assert!(file.write_at(b"no", 5_000).is_err());
        assert!(file.set_len(4_096).is_err() && file.set_len(1 << 20).is_err());
        let map = |protection| {
            // SAFETY: a fresh mapping at an address of the kernel's choice, of a file of this size.
            let at =
                unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
            at != libc::MAP_FAILED
        };
        assert!(map(libc::PROT_READ));
        assert!(!map(libc::PROT_READ | libc::PROT_WRITE));
        // Large ones are aligned to huge pages, as private ones are.
        let large = KvArena::shareable(5 << 20).unwrap();
        assert!(large.bytes(0, 1).addr().is_multiple_of(2 << 20));
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
