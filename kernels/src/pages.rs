//! Zeroed memory from the kernel: page-aligned, huge pages where the machine gives them. Private to the
//! process, or in a file in memory that other processes can be let read.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
#[cfg(not(miri))]
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::LocalKey;

/// Zeroed memory, given back on drop. Owns its bytes like a `Box<[u8]>`, but hands out only a raw pointer:
/// who may touch which bytes is its owner's contract.
pub(crate) struct Pages {
    start: NonNull<u8>,
    len: usize,
    file: Option<OwnedFd>,
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
        let len = len.max(1).next_multiple_of(4096);
        let start = Self::reserve(len);
        Self::advise_huge(start, len);
        Pages { start: NonNull::new(start).expect("the kernel does not map page zero"), len, file: None }
    }

    /// As [`zeroed`](Self::zeroed), in a sealed file in memory: it never changes its size, and whoever gets
    /// the file can map it for reading only. `len` is at least 1.
    ///
    /// Huge pages are given to such files only where `/sys/kernel/mm/transparent_hugepage/shmem_enabled`
    /// says `advise` (or more); on most systems it says `never`.
    ///
    /// # Errors
    /// The kernel's, if it has no such files, no such seals or no address space left.
    #[cfg(not(miri))]
    pub(crate) fn shareable(len: usize) -> io::Result<Pages> {
        use std::os::fd::{AsRawFd, FromRawFd};

        let len = len.max(1).next_multiple_of(4096);
        let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string that outlives the call.
        let create = |flags| check(unsafe { libc::memfd_create(c"tandem-kv".as_ptr(), flags) });
        // Linux before 6.3 does not know the flag; later ones may insist on it.
        let raw = create(flags | libc::MFD_NOEXEC_SEAL).or_else(|_| create(flags))?;
        // SAFETY: a descriptor just made, which nobody else knows.
        let file = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: an integer call on a descriptor of our own.
        check(unsafe { libc::ftruncate(file.as_raw_fd(), len as libc::off_t) })?;
        let start = Self::reserve(len);
        let pages =
            Pages { start: NonNull::new(start).expect("the kernel does not map page zero"), len, file: Some(file) };
        let fd = pages.file.as_ref().expect("it was put there just now").as_raw_fd();
        // SAFETY: replaces exactly the reservation just made, which nobody uses yet.
        let mapped = unsafe {
            libc::mmap(
                start.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Self::advise_huge(start, len);
        // The one writable mapping there will ever be exists; the size is final, and so are the seals.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
        // SAFETY: an integer call on a descriptor of our own.
        check(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) })?;
        Ok(pages)
    }

    /// Miri has no files in memory.
    #[cfg(miri)]
    pub(crate) fn shareable(_len: usize) -> io::Result<Pages> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Fresh anonymous memory of whole pages, aligned to huge pages if it is as large as one.
    #[cfg(not(miri))]
    fn reserve(len: usize) -> *mut u8 {
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
        unsafe {
            if head > 0 {
                libc::munmap(raw.cast(), head);
            }
            if slack > head {
                libc::munmap(raw.add(head + len).cast(), slack - head);
            }
            raw.add(head)
        }
    }

    /// Whether the kernel is set to give huge pages for this.
    pub(crate) fn gets_huge_pages(&self) -> bool {
        self.len >= (2 << 20) && huge_pages_are_given(self.file.is_some())
    }

    #[cfg(not(miri))]
    fn advise_huge(start: *mut u8, len: usize) {
        if len >= Self::HUGE {
            // SAFETY: a mapping of our own. Advice only: without huge pages everything works, slower.
            unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        }
    }

    /// Has the kernel find memory for every page now, on several threads, rather than when it is first touched:
    /// zeroing a huge page takes longer than a step of a small model. Does nothing on kernels that cannot
    /// (before 5.14), where memory comes with the first touch.
    ///
    /// # Errors
    /// The kernel's, if there is not that much memory.
    #[cfg(not(miri))]
    pub(crate) fn populate(&self) -> io::Result<()> {
        /// What one thread takes at a time: enough to be worth a thread, whole huge pages.
        const PIECE: usize = 64 << 20;
        let num_threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(self.len.div_ceil(PIECE));
        let next = AtomicUsize::new(0);
        let pieces = || {
            loop {
                let at = next.fetch_add(PIECE, Relaxed);
                if at >= self.len {
                    return Ok(());
                }
                // SAFETY: whole pages of our own mapping; populating them changes no byte.
                let result = unsafe {
                    libc::madvise(
                        self.start.as_ptr().add(at).cast(),
                        PIECE.min(self.len - at),
                        libc::MADV_POPULATE_WRITE,
                    )
                };
                let error = io::Error::last_os_error();
                if result != 0 && error.raw_os_error() != Some(libc::EINVAL) {
                    return Err(error);
                }
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..num_threads).map(|_| scope.spawn(pieces)).collect();
            let mine = pieces();
            others.into_iter().map(|thread| thread.join().expect("populating does not panic")).fold(mine, Result::and)
        })
    }

    /// Miri's memory is there as soon as it is allocated.
    #[cfg(miri)]
    pub(crate) fn populate(&self) -> io::Result<()> {
        Ok(())
    }

    /// `len` zeroed bytes, aligned to 4096: Miri knows no `madvise`.
    #[cfg(miri)]
    pub(crate) fn zeroed(len: usize) -> Pages {
        let len = len.max(1).next_multiple_of(4096);
        let layout = std::alloc::Layout::from_size_align(len, 4096).expect("4096 is a power of two");
        // SAFETY: the layout has a size above zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        Pages { start: NonNull::new(start).expect("memory for a test"), len, file: None }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The file that the memory is in, if it is shareable, and its size in bytes.
    pub(crate) fn file(&self) -> Option<(BorrowedFd<'_>, usize)> {
        use std::os::fd::AsFd;
        self.file.as_ref().map(|file| (file.as_fd(), self.len))
    }
}

/// Memory that a thread keeps between uses, and its size.
pub(crate) type Kept = Cell<Option<(Pages, usize)>>;

/// Lends this thread's memory, `len` bytes or more of anything, aligned to pages; `kept` is a `thread_local`.
pub(crate) fn lend(kept: &'static LocalKey<Kept>, len: usize, f: impl FnOnce(*mut u8)) {
    // Taken, not borrowed: while a thread waits for its units it may compute units of other jobs.
    let (pages, capacity) = match kept.take() {
        Some((pages, capacity)) if capacity >= len => (pages, capacity),
        _ => (Pages::zeroed(len.next_power_of_two()), len.next_power_of_two()),
    };
    f(pages.as_ptr());
    kept.set(Some((pages, capacity)));
}

/// Whether the kernel is set to give huge pages to who asks for them: for memory of one process, or for files in
/// memory.
pub(crate) fn huge_pages_are_given(is_shareable: bool) -> bool {
    let name = if is_shareable { "shmem_enabled" } else { "enabled" };
    let setting = std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{name}")).unwrap_or_default();
    is_given(&setting)
}

/// `always [madvise] never`: the setting in brackets is in force.
fn is_given(setting: &str) -> bool {
    ["[always]", "[within_size]", "[advise]", "[madvise]", "[force]"].iter().any(|given| setting.contains(given))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(miri))]
    fn resident_pages(pages: &Pages) -> usize {
        let mut resident = vec![0u8; pages.len.div_ceil(4096)];
        // SAFETY: a mapping of our own, and a byte for each of its pages.
        let result = unsafe { libc::mincore(pages.start.as_ptr().cast(), pages.len, resident.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        resident.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    #[cfg(not(miri))]
    fn populated_memory_is_there_before_it_is_touched() {
        // More than one piece, so that more than one thread may take part, and no whole number of them.
        let len = (130 << 20) + 4096;
        for pages in [Pages::zeroed(len), Pages::shareable(len).unwrap()] {
            assert_eq!(resident_pages(&pages), 0);
            pages.populate().unwrap();
            assert_eq!(resident_pages(&pages), len / 4096);
        }
    }

    #[test]
    fn huge_pages_are_given_by_the_setting_in_brackets() {
        assert!(is_given("always [madvise] never\n"));
        assert!(is_given("always within_size [advise] never deny force\n"));
        assert!(!is_given("always madvise [never]\n"));
        assert!(!is_given(""));
    }

    #[test]
    fn small_memory_is_in_no_huge_page() {
        assert!(!Pages::zeroed(4096).gets_huge_pages());
    }
}
