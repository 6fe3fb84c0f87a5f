//! KV on the wire: raw bytes behind a fixed header.
//!
//! A bulk stream is unidirectional, carries one extent and begins with [`ExtentHeader`], 80 bytes:
//!
//! ```text
//!  0  magic "TKV1"          4  payload bytes u32      8  destination epoch u64
//! 16  request u128         32  attempt u32           36  group u16, layer u16
//! 40  plane mask u16, first head u16, heads u16, 0   48  first token u32, tokens u32
//! 56  generation u64       64  digest u128
//! ```
//!
//! All little-endian. Where the receiver reads the payload from the sender's memory, [`runs`](super::runs) stand
//! behind the header, and no stream carries it.
//!
//! The payload is the pool's bytes of those granules in ascending order; a partial
//! last granule travels whole, its tail zero.

use super::extent_digest::{ExtentBinding, ExtentDigest};
use crate::content::PrefixDigest;
use crate::ids::{Attempt, Epoch, Generation, RequestId};

/// Bytes of an encoded [`ExtentHeader`].
pub const EXTENT_HEADER_BYTES: usize = 80;
const MAGIC: [u8; 4] = *b"TKV1";

/// Which part of a sequence's KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentId {
    /// Index into `KvSpec::groups`.
    pub group: u16,
    /// The model's layer number.
    pub layer: u16,
    /// Bit `i` set: plane `i` of the group is included.
    pub plane_mask: u16,
    /// First KV head.
    pub first_head: u16,
    /// Number of KV heads.
    pub num_heads: u16,
    /// First token, a multiple of the granule.
    pub first_token: u32,
    /// Number of tokens; only the extent that ends the prompt may end inside a granule.
    pub num_tokens: u32,
}

/// What stands before an extent's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentHeader {
    /// The receiver's life this is meant for.
    pub epoch: Epoch,
    /// The request.
    pub request: RequestId,
    /// Its attempt.
    pub attempt: Attempt,
    /// The reservation at the receiver.
    pub generation: Generation,
    /// Which part of its KV.
    pub extent: ExtentId,
    /// Bytes that follow.
    pub num_payload_bytes: u32,
    /// Of the payload under this header's [`binding`](Self::binding).
    pub digest: ExtentDigest,
}

/// A header that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a bulk stream begins with {found:02x?}, expected the extent header \"TKV1\": the other end is not a Tandem node of this version"
)]
pub struct InvalidExtentHeader {
    /// The first bytes found.
    pub found: [u8; 4],
}

impl ExtentHeader {
    /// What the extent's digest is bound to, where the tokens up to its end have the prefix digest `content`.
    pub fn binding(&self, content: PrefixDigest) -> ExtentBinding {
        let Self { request, attempt, generation, extent, .. } = *self;
        ExtentBinding { request, attempt, generation, extent, content }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; EXTENT_HEADER_BYTES] {
        let mut out = [0; EXTENT_HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &self.num_payload_bytes.to_le_bytes());
        put(8, &self.epoch.0.to_le_bytes());
        put(16, &self.request.0.to_le_bytes());
        put(32, &self.attempt.0.to_le_bytes());
        put(36, &self.extent.group.to_le_bytes());
        put(38, &self.extent.layer.to_le_bytes());
        put(40, &self.extent.plane_mask.to_le_bytes());
        put(42, &self.extent.first_head.to_le_bytes());
        put(44, &self.extent.num_heads.to_le_bytes());
        put(48, &self.extent.first_token.to_le_bytes());
        put(52, &self.extent.num_tokens.to_le_bytes());
        put(56, &self.generation.0.to_le_bytes());
        put(64, &self.digest.0.to_le_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`InvalidExtentHeader`] if the magic is not there. Field values are checked by whoever knows the
    /// reservation.
    pub fn decode(bytes: &[u8; EXTENT_HEADER_BYTES]) -> Result<Self, InvalidExtentHeader> {
        let mut rest = &bytes[..];
        fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
            let (head, tail) = rest.split_first_chunk::<N>().expect("the header's fields add up to its length");
            *rest = tail;
            *head
        }
        let magic = take::<4>(&mut rest);
        if magic != MAGIC {
            return Err(InvalidExtentHeader { found: magic });
        }
        let num_payload_bytes = u32::from_le_bytes(take(&mut rest));
        let epoch = Epoch(u64::from_le_bytes(take(&mut rest)));
        let request = RequestId(u128::from_le_bytes(take(&mut rest)));
        let attempt = Attempt(u32::from_le_bytes(take(&mut rest)));
        let [group, layer, plane_mask, first_head, num_heads, _reserved] =
            std::array::from_fn(|_| u16::from_le_bytes(take(&mut rest)));
        let first_token = u32::from_le_bytes(take(&mut rest));
        let num_tokens = u32::from_le_bytes(take(&mut rest));
        let generation = Generation(u64::from_le_bytes(take(&mut rest)));
        let digest = ExtentDigest(u128::from_le_bytes(take(&mut rest)));
        let extent = ExtentId { group, layer, plane_mask, first_head, num_heads, first_token, num_tokens };
        Ok(Self { epoch, request, attempt, generation, extent, num_payload_bytes, digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> ExtentHeader {
        let extent = ExtentId {
            group: 1,
            layer: 2,
            plane_mask: 3,
            first_head: 4,
            num_heads: 5,
            first_token: 16,
            num_tokens: 33,
        };
        ExtentHeader {
            epoch: Epoch(0x1111),
            request: RequestId(0x2222),
            attempt: Attempt(3),
            generation: Generation(4),
            extent,
            num_payload_bytes: 999,
            digest: ExtentDigest(0xab << 100),
        }
    }

    #[test]
    fn header_survives_the_round_trip() {
        assert_eq!(ExtentHeader::decode(&header().encode()).unwrap(), header());
    }

    #[test]
    fn wrong_magic_is_refused() {
        let mut bytes = header().encode();
        bytes[0] = 0;
        assert!(ExtentHeader::decode(&bytes).is_err());
    }
}
