//! A test whose threads of KV are one.
#![allow(dead_code, unreachable_pub, unsafe_code)]

/// Fabrics that this thread makes from now on have one thread for KV: what was spawned there runs behind what spawned it.
pub fn use_one_core() {
    // SAFETY: a set of cores is integers, for which zero is valid; the calls read and write it during the call.
    let (got, set) = unsafe {
        let mut cores: libc::cpu_set_t = std::mem::zeroed();
        let got = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut cores);
        let first = (0..libc::CPU_SETSIZE as usize).find(|core| libc::CPU_ISSET(*core, &cores)).unwrap_or(0);
        libc::CPU_ZERO(&mut cores);
        libc::CPU_SET(first, &mut cores);
        (got, libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &cores))
    };
    assert_eq!((got, set), (0, 0), "{}", std::io::Error::last_os_error());
}
