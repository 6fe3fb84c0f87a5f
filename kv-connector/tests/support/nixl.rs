//! NIXL for tests: the library that `./test` installs.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;

use kv_connector::transfer::Nixl;

use super::file_pool::FilePool;

/// The library; without it the tests that need it say that they are skipped.
pub fn library() -> Option<PathBuf> {
    let library = std::env::var_os("TANDEM_TEST_NIXL").map(PathBuf::from);
    if library.is_none() {
        println!("SKIPPED: TANDEM_TEST_NIXL does not name NIXL's libnixl_capi.so; ./test installs it and sets it");
    }
    library
}

/// A pool that peers fetch from, and whose owner fetches from them.
pub fn of(pool: &Arc<FilePool>, library: &std::path::Path) -> Nixl {
    Nixl::new(library, pool.clone(), pool.num_bytes() as usize).unwrap()
}
