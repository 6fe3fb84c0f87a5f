//! Where in a sender's pool an extent lies, as the sender has posted it to a receiver that can read the pool.

use std::cmp::Ordering;

use common::wire::PoolRun;
use common::wire::runs::{InvalidRuns, NUM_RUNS_BYTES, decode_num_runs, decode_runs};

use crate::transfer::RefusedExtent;

/// The list behind an extent's header, held against the pool and the payload. `memory` is what the log calls the pool.
pub(super) fn posted_runs(
    encoded: &[u8],
    pool_bytes: u64,
    payload_bytes: usize,
    memory: &str,
) -> Result<Vec<PoolRun>, RefusedExtent> {
    let refused = |invalid: InvalidRuns| {
        tracing::warn!(%invalid, "an extent names places in {memory} that cannot be its payload");
        match invalid {
            InvalidRuns::TooShort => RefusedExtent::Truncated,
            InvalidRuns::TooLong => RefusedExtent::WrongSize,
            _ => RefusedExtent::BadRuns,
        }
    };
    let (number, list) = encoded.split_first_chunk::<NUM_RUNS_BYTES>().ok_or(RefusedExtent::Truncated)?;
    let num_bytes = decode_num_runs(*number).map_err(refused)?;
    match list.len().cmp(&num_bytes) {
        Ordering::Less => Err(RefusedExtent::Truncated),
        Ordering::Greater => Err(RefusedExtent::BadRuns),
        Ordering::Equal => decode_runs(list, pool_bytes, payload_bytes as u32).map_err(refused),
    }
}
