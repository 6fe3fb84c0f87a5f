//! Another user of the host, which root may be for a moment.
#![allow(dead_code, unreachable_pub, unsafe_code, clippy::unwrap_used)]

const NOBODY: libc::c_long = 65_534;
const UNCHANGED: libc::c_long = -1;

/// Runs `what` on a thread of another user; `None` where this process may not be another user.
pub fn as_other_user<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let other = std::thread::spawn(move || {
        // SAFETY: changes the user of the calling thread alone, as the call of the kernel does and the C library's does
        // not; the thread ends with `what`.
        let failed = unsafe { libc::syscall(libc::SYS_setresuid, UNCHANGED, NOBODY, UNCHANGED) };
        (failed == 0).then(what)
    });
    other.join().unwrap()
}
