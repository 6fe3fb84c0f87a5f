//! The digest of an extent on its way: these bytes, and what they stand for.
//!
//! ```text
//! digest = xxh3_128(payload) XOR xxh3_128(binding)
//! binding = request u128, attempt u32, generation u64, group, layer, plane mask, first head, heads (u16 each),
//!           first token u32, tokens u32, content digest 32 bytes; little-endian, 78 bytes
//! ```
//!
//! So for the same bytes the digest differs whenever the hash of the binding does, and for the same binding whenever
//! the hash of the bytes does; and the bytes are hashed as they come, in any pieces.
//!
//! What it is for: bytes that are stale, late, torn, truncated, misplaced or damaged are refused, but for one chance in
//! 2^128. What it is not for: a peer that forges. Both ends hold certificates of one cluster and the bytes travel
//! encrypted, or in memory that only the sender can write to; and a peer that wanted to could make a right digest of
//! wrong bytes under any hash, since it is the one that makes it. What is *stored* meets readers that never spoke to
//! its writer, and keeps its keyed BLAKE3 digests.

use twox_hash::XxHash3_128;

use super::bulk::ExtentId;
use crate::content::PrefixDigest;
use crate::ids::{Attempt, Generation, RequestId};

/// Bytes of what an extent's digest is bound to.
const BINDING_BYTES: usize = 78;

/// Of an extent's bytes and of what they stand for; see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentDigest(pub u128);

/// What an extent stands for: whose it is, which content, and where it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentBinding {
    /// The request.
    pub request: RequestId,
    /// Its attempt.
    pub attempt: Attempt,
    /// The reservation at the receiver.
    pub generation: Generation,
    /// Layer, planes, heads and token range.
    pub extent: ExtentId,
    /// The prefix digest of the tokens up to the extent's end.
    pub content: PrefixDigest,
}

/// Makes an extent's digest of bytes that come in pieces.
#[derive(Clone)]
pub struct ExtentHasher {
    binding: u128,
    payload: XxHash3_128,
}

impl ExtentBinding {
    fn hash(&self) -> u128 {
        let Self { request, attempt, generation, extent, content } = self;
        let mut bytes = [0; BINDING_BYTES];
        let mut rest = &mut bytes[..];
        let mut put = |field: &[u8]| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(field.len());
            head.copy_from_slice(field);
            rest = tail;
        };
        put(&request.0.to_le_bytes());
        put(&attempt.0.to_le_bytes());
        put(&generation.0.to_le_bytes());
        for field in [extent.group, extent.layer, extent.plane_mask, extent.first_head, extent.num_heads] {
            put(&field.to_le_bytes());
        }
        put(&extent.first_token.to_le_bytes());
        put(&extent.num_tokens.to_le_bytes());
        put(&content.0);
        debug_assert!(rest.is_empty(), "the fields add up to the binding's length");
        XxHash3_128::oneshot(&bytes)
    }

    /// Of a payload in one piece.
    pub fn digest(&self, payload: &[u8]) -> ExtentDigest {
        ExtentDigest(XxHash3_128::oneshot(payload) ^ self.hash())
    }
}

impl ExtentHasher {
    /// No bytes yet.
    pub fn new(binding: &ExtentBinding) -> Self {
        Self { binding: binding.hash(), payload: XxHash3_128::new() }
    }

    /// The next bytes of the payload; how they are cut into pieces makes no difference.
    pub fn update(&mut self, bytes: &[u8]) {
        self.payload.write(bytes);
    }

    /// Of a payload that was hashed elsewhere, whatever bytes came here.
    pub fn digest_of_hashed(&self, payload: u128) -> ExtentDigest {
        ExtentDigest(payload ^ self.binding)
    }

    /// Of all bytes so far.
    pub fn digest(&self) -> ExtentDigest {
        ExtentDigest(self.payload.finish_128() ^ self.binding)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn binding() -> ExtentBinding {
        let extent = ExtentId {
            group: 1,
            layer: 2,
            plane_mask: 3,
            first_head: 4,
            num_heads: 5,
            first_token: 16,
            num_tokens: 33,
        };
        ExtentBinding {
            request: RequestId(0x2222),
            attempt: Attempt(3),
            generation: Generation(4),
            extent,
            content: PrefixDigest([1; 32]),
        }
    }

    /// The binding with one bit flipped: every bit of every field, one after the other.
    fn neighbours() -> Vec<ExtentBinding> {
        let base = binding();
        let bits = |count: u32| (0..count).map(|bit| 1u128 << bit);
        let mut others = Vec::new();
        others.extend(bits(128).map(|bit| ExtentBinding { request: RequestId(base.request.0 ^ bit), ..base }));
        others.extend(bits(32).map(|bit| ExtentBinding { attempt: Attempt(base.attempt.0 ^ bit as u32), ..base }));
        others.extend(bits(64).map(|bit| {
            let generation = Generation(base.generation.0 ^ bit as u64);
            ExtentBinding { generation, ..base }
        }));
        let narrow: [fn(&mut ExtentId) -> &mut u16; 5] = [
            |extent| &mut extent.group,
            |extent| &mut extent.layer,
            |extent| &mut extent.plane_mask,
            |extent| &mut extent.first_head,
            |extent| &mut extent.num_heads,
        ];
        let wide: [fn(&mut ExtentId) -> &mut u32; 2] =
            [|extent| &mut extent.first_token, |extent| &mut extent.num_tokens];
        let changed = |change: &dyn Fn(&mut ExtentId)| {
            let mut other = base;
            change(&mut other.extent);
            other
        };
        for field in narrow {
            others.extend(bits(16).map(|bit| changed(&|extent| *field(extent) ^= bit as u16)));
        }
        for field in wide {
            others.extend(bits(32).map(|bit| changed(&|extent| *field(extent) ^= bit as u32)));
        }
        others.extend((0..256).map(|bit| {
            let mut content = base.content;
            content.0[bit / 8] ^= 1 << (bit % 8);
            ExtentBinding { content, ..base }
        }));
        others
    }

    fn noise(len: usize) -> Vec<u8> {
        (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect()
    }

    /// Lengths around every border in XXH3: its short forms, a stripe, its buffer, a block of stripes.
    const LENGTHS: [usize; 13] = [0, 1, 16, 17, 128, 129, 240, 241, 256, 257, 1024, 1025, 5000];

    #[test]
    fn same_bytes_never_verify_under_another_binding() {
        for payload in [vec![], vec![0; 4096], noise(4096)] {
            let digest = binding().digest(&payload);
            let others = neighbours();
            assert_eq!(others.len(), 624, "one for each bit of {BINDING_BYTES} bytes");
            assert!(others.iter().all(|other| other.digest(&payload) != digest));
        }
    }

    #[test]
    fn every_flipped_bit_shows() {
        for len in LENGTHS {
            let mut payload = noise(len);
            let digest = binding().digest(&payload);
            for bit in 0..len * 8 {
                payload[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(binding().digest(&payload), digest, "bit {bit} of {len} bytes");
                payload[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn every_truncation_shows_even_of_zeros() {
        for payload in [noise(3000), vec![0; 3000]] {
            let digest = binding().digest(&payload);
            assert!((0..payload.len()).all(|len| binding().digest(&payload[..len]) != digest));
        }
    }

    #[test]
    fn swapped_pieces_show() {
        let (piece_bytes, payload) = (64, noise(4096));
        let digest = binding().digest(&payload);
        for one in 0..payload.len() / piece_bytes {
            for other in 0..one {
                let mut swapped = payload.clone();
                for at in 0..piece_bytes {
                    swapped.swap(one * piece_bytes + at, other * piece_bytes + at);
                }
                assert_ne!(binding().digest(&swapped), digest, "pieces {one} and {other}");
            }
        }
    }

    #[test]
    fn two_extents_do_not_verify_with_each_others_bytes() {
        let (here, mut there) = (binding(), binding());
        there.extent.layer += 1;
        let (ours, theirs) = (noise(2048), vec![7; 2048]);
        assert_ne!(here.digest(&theirs), here.digest(&ours));
        assert_ne!(here.digest(&theirs), there.digest(&theirs));
        assert_ne!(here.digest(&ours), there.digest(&theirs));
    }

    /// The vector was made with the reference's `xxh3_128bits`; both crates of this workspace agree with it.
    #[test]
    fn hash_is_xxh3_128_whatever_the_instruction_set() {
        for len in LENGTHS.into_iter().chain([1 << 16, (1 << 16) + 13]) {
            let payload = noise(len);
            assert_eq!(XxHash3_128::oneshot(&payload), xxhash_rust::xxh3::xxh3_128(&payload), "{len} bytes");
        }
        assert_eq!(XxHash3_128::oneshot(b""), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f);
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(len in 0usize..6000, cuts in prop::collection::vec(0usize..6000, 0..12)) {
            let payload = noise(len);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(len)).chain([0, len]).collect();
            cuts.sort_unstable();
            let mut hasher = ExtentHasher::new(&binding());
            for piece in cuts.windows(2) {
                hasher.update(&payload[piece[0]..piece[1]]);
            }
            prop_assert_eq!(hasher.digest(), binding().digest(&payload));
        }
    }
}
