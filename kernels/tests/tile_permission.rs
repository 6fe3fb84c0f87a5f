//! Whether the process may use tile registers, which is up to the system and for good: a process of its own for one
//! test.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(unsafe_code)]

use kernels::Isa;

fn may_use_tiles() -> bool {
    const ARCH_GET_XCOMP_PERM: libc::c_long = 0x1022;
    const XFEATURE_XTILEDATA: u32 = 18;
    let mut permitted = 0u64;
    // SAFETY: the call writes 8 bytes, or none where the system does not know it.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &raw mut permitted) };
    permitted >> XFEATURE_XTILEDATA & 1 == 1
}

#[test]
fn tiles_are_asked_for_only_where_they_are_meant() {
    for name in ["portable", "portable-tiles", "avx2", "avx512", "avx512vnni", "avx512bf16"] {
        // One that is missing lists the others, for which it must ask.
        if Isa::parse(name).is_err() {
            break;
        }
        assert!(!may_use_tiles(), "{name}");
    }
    // Tiles that add up otherwise are refused behind the permission.
    assert_eq!(Isa::parse("amx").is_ok() || (Isa::tiles_refused().is_some() && may_use_tiles()), may_use_tiles());
}
