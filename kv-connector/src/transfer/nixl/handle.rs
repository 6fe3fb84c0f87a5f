//! What a peer opens a pool with: where it lies, and the metadata of the agent that has registered it.
//!
//! ```text
//! address (8 bytes) | number of the GPU, or all ones for the host's memory (4) | metadata
//! ```

use common::device_pool::{ExportedPool, MemoryPlace};

/// Instead of a GPU's number.
const HOST: u32 = u32::MAX;

pub(super) fn encode(place: MemoryPlace, metadata: &[u8]) -> ExportedPool {
    let gpu = place.gpu.unwrap_or(HOST);
    let handle = [&place.address.to_le_bytes()[..], &gpu.to_le_bytes(), metadata].concat();
    ExportedPool { handle, num_bytes: place.num_bytes }
}

/// # Errors
/// A sentence.
pub(super) fn decode(exported: &ExportedPool) -> Result<(MemoryPlace, &[u8]), String> {
    let cut = || "a handle without an address".to_string();
    let (address, rest) = exported.handle.split_first_chunk().ok_or_else(cut)?;
    let (gpu, metadata) = rest.split_first_chunk().ok_or_else(cut)?;
    let (address, num_bytes) = (u64::from_le_bytes(*address), exported.num_bytes);
    address.checked_add(num_bytes).ok_or("a pool that goes beyond the last address")?;
    let gpu = Some(u32::from_le_bytes(*gpu)).filter(|number| *number != HOST);
    Ok((MemoryPlace { address, num_bytes, gpu }, metadata))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_says_where_a_pool_lies_and_a_cut_or_impossible_one_is_a_sentence() {
        for gpu in [None, Some(0), Some(7)] {
            let place = MemoryPlace { address: 0x7000_1234_5678, num_bytes: 99, gpu };
            let exported = encode(place, b"metadata");
            assert_eq!(decode(&exported), Ok((place, &b"metadata"[..])));
            for len in 0..12 {
                let cut = ExportedPool { handle: exported.handle[..len].to_vec(), num_bytes: 99 };
                assert_eq!(decode(&cut), Err("a handle without an address".to_string()));
            }
        }
        let last = MemoryPlace { address: u64::MAX - 9, num_bytes: 10, gpu: None };
        assert!(decode(&encode(last, b"")).unwrap_err().contains("beyond the last address"));
    }
}
