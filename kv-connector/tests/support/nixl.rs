//! NIXL for tests: the library that `./test` installs.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kv_connector::transfer::{Nixl, NixlPool};

use super::TestMemory;
use super::device::OnDevice;
use super::file_pool::FilePool;

/// The library; without it the tests that need it say that they are skipped.
pub fn library() -> Option<PathBuf> {
    let library = std::env::var_os("TANDEM_TEST_NIXL").map(PathBuf::from);
    if library.is_none() {
        println!("SKIPPED: TANDEM_TEST_NIXL does not name NIXL's libnixl_capi.so; ./test installs it and sets it");
    }
    library
}

/// For a node whose pool peers fetch from: `exported`, which is a device's, or else the host's.
pub fn of_sender(library: &Path, pool: &Arc<FilePool>, exported: Option<&Arc<OnDevice>>) -> Nixl {
    let host = || NixlPool::Host { memory: pool.clone(), num_bytes: pool.num_bytes() as usize };
    Nixl::new(library, exported.map_or_else(host, |pool| NixlPool::Device(pool.clone())), true).unwrap()
}

/// For a node that fetches into its pool: `own`, which is a device's, or else the host's.
pub fn of_receiver(library: &Path, memory: &Arc<TestMemory>, own: Option<&Arc<OnDevice>>) -> Nixl {
    let host = || NixlPool::Host { memory: memory.clone(), num_bytes: 0 };
    Nixl::new(library, own.map_or_else(host, |pool| NixlPool::Device(pool.clone())), false).unwrap()
}
