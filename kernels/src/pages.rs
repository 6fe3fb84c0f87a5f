//! Zeroed memory from the kernel: page-aligned, huge pages where the machine gives them.
#![allow(unsafe_code)]

use std::ptr::NonNull;

/// Anonymous zeroed memory, given back on drop. Owns its bytes like a `Box<[u8]>`, but hands out only a
/// raw pointer: who may touch which bytes is its owner's contract.
pub(crate) struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory without thread affinity; the owner of a `Pages` states who accesses what.
unsafe impl Send for Pages {}
// SAFETY: as above; `Pages` itself only hands out the pointer and the length.
unsafe impl Sync for Pages {}

impl Pages {
    /// Huge pages are 2 MiB; a mapping of at least that is aligned to it.
    #[cfg(not(miri))]
    const HUGE: usize = 2 << 20;

    /// `len` zeroed bytes, aligned to 4096 at least.
    ///
    /// Panics when the kernel refuses the mapping: sizes come from checked configuration.
    #[cfg(not(miri))]
    pub(crate) fn zeroed(len: usize) -> Pages {
        let page = 4096;
        let len = len.max(1).next_multiple_of(page);
        let slack = if len >= Self::HUGE { Self::HUGE } else { 0 };
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len + slack,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert!(raw != libc::MAP_FAILED, "cannot map {len} bytes: {}", std::io::Error::last_os_error());
        let raw = raw.cast::<u8>();
        let head = if slack > 0 { raw.align_offset(Self::HUGE) } else { 0 };
        // SAFETY: head and tail are whole pages inside the mapping just made, and nobody knows them yet;
        // `raw + head .. raw + head + len` stays mapped.
        let start = unsafe {
            if head > 0 {
                libc::munmap(raw.cast(), head);
            }
            if slack > head {
                libc::munmap(raw.add(head + len).cast(), slack - head);
            }
            let start = raw.add(head);
            if slack > 0 {
                // Advice only: without huge pages everything works, slower.
                libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE);
            }
            start
        };
        Pages { start: NonNull::new(start).expect("the kernel does not map page zero"), len }
    }

    /// `len` zeroed bytes, aligned to 4096: Miri knows no `madvise`.
    #[cfg(miri)]
    pub(crate) fn zeroed(len: usize) -> Pages {
        let len = len.max(1).next_multiple_of(4096);
        let layout = std::alloc::Layout::from_size_align(len, 4096).expect("4096 is a power of two");
        // SAFETY: the layout has a size above zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        Pages { start: NonNull::new(start).expect("memory for a test"), len }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        #[cfg(not(miri))]
        // SAFETY: start and len are those of our own mapping, and nothing borrows from it any more.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.len);
        }
        #[cfg(miri)]
        // SAFETY: allocated in `zeroed` with the same size and alignment.
        unsafe {
            std::alloc::dealloc(
                self.start.as_ptr(),
                std::alloc::Layout::from_size_align(self.len, 4096).expect("as in zeroed"),
            );
        }
    }
}
