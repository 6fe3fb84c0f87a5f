//! Where an extent lies in its sender's pool, on the wire of a transport whose receiver reads it there.
//!
//! ```text
//! extent header | number of runs u32 | each run: offset u64, bytes u32
//! ```
//!
//! All little-endian. The runs, one behind the other, are the payload that the header's digest is made of.

/// Most runs in a list. An extent of the largest size in the smallest blocks has 64.
pub const NUM_RUNS_MAX: usize = 1024;
/// Bytes of an encoded number of runs.
pub const NUM_RUNS_BYTES: usize = 4;
/// Bytes of an encoded run.
pub const RUN_BYTES: usize = 12;

/// Consecutive bytes of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolRun {
    /// Counted from the pool's first byte.
    pub offset: u64,
    /// How many.
    pub num_bytes: u32,
}

impl PoolRun {
    /// One behind its last byte.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.num_bytes))
    }
}

/// A list of runs that is not the payload of its extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRuns {
    /// More than [`NUM_RUNS_MAX`].
    #[error("more than {NUM_RUNS_MAX} runs")]
    TooMany,
    /// A run of no bytes.
    #[error("a run without bytes")]
    Empty,
    /// A run beyond the end of the pool.
    #[error("a run beyond the end of the pool")]
    Outside,
    /// Two runs share bytes.
    #[error("two runs overlap")]
    Overlap,
    /// Fewer bytes than the payload has.
    #[error("fewer bytes than the payload has")]
    TooShort,
    /// More bytes than the payload has.
    #[error("more bytes than the payload has")]
    TooLong,
}

/// The list's bytes.
///
/// # Panics
/// If there are more than [`NUM_RUNS_MAX`].
pub fn encode_runs(runs: &[PoolRun]) -> Vec<u8> {
    assert!(runs.len() <= NUM_RUNS_MAX, "{} runs, at most {NUM_RUNS_MAX} can be sent", runs.len());
    let mut out = Vec::with_capacity(NUM_RUNS_BYTES + runs.len() * RUN_BYTES);
    out.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        out.extend_from_slice(&run.offset.to_le_bytes());
        out.extend_from_slice(&run.num_bytes.to_le_bytes());
    }
    out
}

/// Bytes of the list behind its number of runs.
///
/// # Errors
/// [`InvalidRuns::TooMany`].
pub fn decode_num_runs(bytes: [u8; NUM_RUNS_BYTES]) -> Result<usize, InvalidRuns> {
    match u32::from_le_bytes(bytes) as usize {
        num_runs if num_runs <= NUM_RUNS_MAX => Ok(num_runs * RUN_BYTES),
        _ => Err(InvalidRuns::TooMany),
    }
}

/// Reads a list whose length [`decode_num_runs`] said, and holds it against the pool and the payload.
///
/// # Errors
/// [`InvalidRuns`].
pub fn decode_runs(bytes: &[u8], pool_bytes: u64, payload_bytes: u32) -> Result<Vec<PoolRun>, InvalidRuns> {
    let (encoded, _) = bytes.as_chunks::<RUN_BYTES>();
    let runs: Vec<PoolRun> = encoded.iter().map(decode_run).collect();
    if runs.iter().any(|run| run.num_bytes == 0) {
        return Err(InvalidRuns::Empty);
    }
    if runs.iter().any(|run| run.end() > pool_bytes) {
        return Err(InvalidRuns::Outside);
    }
    let mut sorted = runs.clone();
    sorted.sort_unstable_by_key(|run| run.offset);
    if sorted.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
        return Err(InvalidRuns::Overlap);
    }
    let num_bytes: u64 = runs.iter().map(|run| u64::from(run.num_bytes)).sum();
    match num_bytes.cmp(&u64::from(payload_bytes)) {
        std::cmp::Ordering::Less => Err(InvalidRuns::TooShort),
        std::cmp::Ordering::Greater => Err(InvalidRuns::TooLong),
        std::cmp::Ordering::Equal => Ok(runs),
    }
}

fn decode_run(bytes: &[u8; RUN_BYTES]) -> PoolRun {
    let (offset, rest) = bytes.split_first_chunk::<8>().expect("a run has 12 bytes");
    let num_bytes = rest.first_chunk::<4>().expect("a run has 12 bytes");
    PoolRun { offset: u64::from_le_bytes(*offset), num_bytes: u32::from_le_bytes(*num_bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(runs: &[(u64, u32)]) -> Vec<PoolRun> {
        runs.iter().map(|(offset, num_bytes)| PoolRun { offset: *offset, num_bytes: *num_bytes }).collect()
    }

    fn decode(runs: &[(u64, u32)], payload_bytes: u32) -> Result<Vec<PoolRun>, InvalidRuns> {
        let bytes = encode_runs(&list(runs));
        let (number, rest) = bytes.split_first_chunk().unwrap();
        assert_eq!(decode_num_runs(*number), Ok(rest.len()));
        decode_runs(rest, 1000, payload_bytes)
    }

    #[test]
    fn list_survives_the_round_trip_in_its_order() {
        let runs = [(900, 100), (0, 1), (1, 899)];
        assert_eq!(decode(&runs, 1000), Ok(list(&runs)));
    }

    #[test]
    fn list_that_is_not_the_payload_is_refused() {
        for (runs, reason) in [
            (&[(0, 50), (10, 0), (60, 50)][..], InvalidRuns::Empty),
            (&[(950, 100)], InvalidRuns::Outside),
            (&[(1000, 100)], InvalidRuns::Outside),
            (&[(u64::MAX, 100)], InvalidRuns::Outside),
            (&[(0, u32::MAX)], InvalidRuns::Outside),
            (&[(0, 60), (59, 40)], InvalidRuns::Overlap),
            (&[(0, 50), (0, 50)], InvalidRuns::Overlap),
            (&[(50, 40), (0, 60)], InvalidRuns::Overlap),
            (&[], InvalidRuns::TooShort),
            (&[(0, 99)], InvalidRuns::TooShort),
            (&[(0, 101)], InvalidRuns::TooLong),
        ] {
            assert_eq!(decode(runs, 100), Err(reason), "{runs:?}");
        }
        assert_eq!(decode_num_runs(1025u32.to_le_bytes()), Err(InvalidRuns::TooMany));
        assert_eq!(decode_num_runs(u32::MAX.to_le_bytes()), Err(InvalidRuns::TooMany));
    }
}
