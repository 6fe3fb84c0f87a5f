//! The system calls of shared memory: a peer's pool mapped for reading, and descriptors over UNIX sockets.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use crate::transfer::ahead;

/// Another process's memory, for reading only. Unmapped on drop.
pub(super) struct MappedFile {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory without thread affinity, of which only copies are handed out.
unsafe impl Send for MappedFile {}
// SAFETY: as above.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps `file`, which must be of exactly `num_bytes` and sealed against shrinking: touching a page behind
    /// the end of a file ends the process.
    ///
    /// # Errors
    /// If it is not, or the kernel's.
    pub(super) fn new(file: &OwnedFd, num_bytes: u64) -> io::Result<Self> {
        // SAFETY: an integer call on a descriptor that is open.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(io::Error::other("what was sent is not memory that keeps its size"));
        }
        let found = std::fs::File::from(file.try_clone()?).metadata()?.len();
        let len = usize::try_from(num_bytes).ok().filter(|len| *len > 0 && num_bytes == found);
        let len =
            len.ok_or_else(|| io::Error::other(format!("{found} bytes of memory, {num_bytes} were announced")))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: NonNull::new(start.cast()).expect("the kernel does not map page zero"), len })
    }

    /// Size in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Copies what is at `offset` now. The other process may write there meanwhile: what is copied may then
    /// be torn, and is only as good as the digest made of the copy.
    ///
    /// # Panics
    /// Beyond the end.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        assert!(
            offset <= self.len && into.len() <= self.len - offset,
            "bytes {offset}..+{} of {} are read",
            into.len(),
            self.len
        );
        ahead::to_read(self.start.as_ptr().wrapping_add(offset + into.len()));
        // SAFETY: in bounds of a mapping that lives as long as `self` and whose file cannot shrink (checked in
        // `new`), into memory that is exclusively borrowed. No reference to the shared bytes exists; any bit
        // pattern is a valid byte.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr().add(offset), into.as_mut_ptr(), into.len()) }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: start and length are those of our own mapping, and nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Who runs this process.
pub(super) fn own_user() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// Room for one descriptor in a control message, aligned as its header must be.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [u8; CONTROL_BYTES],
}

// SAFETY: computes with its argument only.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;

/// Calls `act` with a message of `byte` and room for one descriptor.
fn with_message<T>(byte: &mut u8, act: impl FnOnce(&mut libc::msghdr) -> T) -> T {
    let mut iov = libc::iovec { iov_base: std::ptr::from_mut(byte).cast(), iov_len: 1 };
    let mut control = Control { bytes: [0; CONTROL_BYTES] };
    // SAFETY: all zeros is a valid `msghdr`: no name, no buffers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = std::ptr::from_mut(&mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    act(&mut message)
}

/// Sends one byte and a copy of `file` over a UNIX socket, without waiting.
///
/// # Errors
/// The kernel's; `WouldBlock` if there is no room.
pub(super) fn send_file(socket: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = 0;
    with_message(&mut byte, |message| {
        // SAFETY: `message` points to a control buffer that is aligned for, and has room for, one header and one
        // descriptor; both outlive the call.
        let sent = unsafe {
            let header = libc::CMSG_FIRSTHDR(message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(file.as_raw_fd());
            libc::sendmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    })
}

/// Receives what [`send_file`] sent, without waiting.
///
/// # Errors
/// The kernel's; `WouldBlock` if nothing is there; `UnexpectedEof` if the other end closed without sending one.
pub(super) fn receive_file(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut byte = 0;
    with_message(&mut byte, |message| {
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: `message` points to buffers that outlive the call. There is room for one descriptor; the
        // kernel closes any further one.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), message, flags) };
        if received < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel filled the control buffer and its length in; the header is within them.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(message);
            let is_file = !header.is_null()
                && (*header).cmsg_level == libc::SOL_SOCKET
                && (*header).cmsg_type == libc::SCM_RIGHTS
                && (*header).cmsg_len as usize >= libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            if !is_file {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // A descriptor that was made for us, and that nobody else owns.
            Ok(OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
        }
    })
}

/// A file in memory, for tests.
#[cfg(test)]
pub(super) fn sealed_file(num_bytes: u64, seals: i32) -> std::fs::File {
    // SAFETY: the name is a C string that outlives the call; the descriptor is made here and owned by the file.
    let file = unsafe {
        std::fs::File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING))
    };
    file.set_len(num_bytes).expect("a file in memory has any size");
    // SAFETY: an integer call on a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }, 0);
    file
}
