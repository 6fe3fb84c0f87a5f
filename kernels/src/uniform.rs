//! Randomness as a function: no generator state to carry between nodes.

/// A uniform number in `[0, 1)` for the token at `position` (its absolute index in the sequence) of choice
/// number `choice` of a request with this seed.
///
/// The function is part of the protocol: a request resumed on another node draws the same numbers. It is
/// three rounds of the splitmix64 finaliser `mix`, keyed in turn by seed, choice and position, of whose
/// result the upper 53 bits are the fraction:
///
/// ```text
/// a = mix(seed + G);  b = mix((a ^ choice) + G);  c = mix((b ^ position) + G);  (c >> 11) / 2^53
/// G = 0x9e3779b97f4a7c15, additions and multiplications modulo 2^64
/// ```
///
/// | seed | choice | position | c |
/// |---|---|---|---|
/// | 0 | 0 | 0 | `0x238275bc38fcbe91` |
/// | 42 | 3 | 1000 | `0x7d65dc5f620c3da2` |
pub fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    (bits(seed, choice, position) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn bits(seed: u64, choice: u32, position: u32) -> u64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let a = mix(seed.wrapping_add(GOLDEN));
    let b = mix((a ^ u64::from(choice)).wrapping_add(GOLDEN));
    mix((b ^ u64::from(position)).wrapping_add(GOLDEN))
}

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed by an independent program from the formula above.
    #[test]
    fn vectors_of_the_protocol_hold() {
        let vectors = [
            ((0, 0, 0), 0x2382_75bc_38fc_be91u64),
            ((0, 0, 1), 0x2f32_a784_96c6_7c60u64),
            ((0, 1, 0), 0x44e5_b981_00c6_7fb0u64),
            ((1, 0, 0), 0xb18a_02f4_6d8d_86c3u64),
            ((42, 3, 1000), 0x7d65_dc5f_620c_3da2u64),
            ((u64::MAX, u32::MAX, u32::MAX), 0x6929_a5a8_17aa_4459u64),
        ];
        for ((seed, choice, position), expected) in vectors {
            assert_eq!(bits(seed, choice, position), expected, "{seed} {choice} {position}");
            assert_eq!(uniform(seed, choice, position), (expected >> 11) as f64 / 2f64.powi(53));
        }
        assert_eq!(uniform(42, 3, 1000), 0.4898355229252481);
    }

    #[test]
    fn draws_are_spread_evenly_and_differ_by_position_choice_and_seed() {
        let mut buckets = [0u32; 16];
        for position in 0..16_000 {
            let u = uniform(42, 0, position);
            assert!((0.0..1.0).contains(&u));
            buckets[(u * 16.0) as usize] += 1;
        }
        assert!(buckets.iter().all(|&n| (850..1150).contains(&n)), "{buckets:?}");
        assert_ne!(bits(1, 0, 5), bits(1, 1, 5));
        assert_ne!(bits(1, 0, 5), bits(2, 0, 5));
        assert_ne!(bits(1, 2, 3), bits(1, 3, 2));
    }
}
