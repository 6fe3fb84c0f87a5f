//! Granules of one pool's order and type made into those of another's.
//!
//! ```text
//! granule   [K, V][kv_head][16 tokens x head_dim]
//! lanes     K: bf16 [head_dim/2][16][2]    f32 [head_dim][16]      V: bf16 [16/2][head_dim][2]    f32 [16][head_dim]
//! rows      K and V: [16][head_dim]
//! ```
//!
//! `lanes` is what [`KvLayout`](crate::KvLayout) describes and the CPU kernels read, `rows` what the CUDA kernels
//! read. A value keeps its bits if the types are equal; bf16 becomes f32 exactly; f32 becomes bf16 through
//! [`round_bf16`], as [`kv_write`](crate::kv_write()) stores it. So narrowing what was widened gives back what was
//! there, for every value that a CPU pool can hold.

use crate::kv_layout::{GRANULE_TOKENS, KvDtype};
use crate::numerics::round_bf16;

/// How the values of a head of a granule follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GranuleOrder {
    /// In K tokens are next to one another, in V features.
    Lanes,
    /// Features are next to one another in both.
    Rows,
}

/// What a granule's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GranuleFormat {
    /// Order within a head.
    pub order: GranuleOrder,
    /// Type of the values.
    pub dtype: KvDtype,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Features per head: even, 8 to 256.
    pub head_dim: usize,
}

impl GranuleFormat {
    /// Bytes of one head of one plane.
    pub fn head_bytes(&self) -> usize {
        GRANULE_TOKENS * self.head_dim * self.dtype.size()
    }

    /// Bytes of the K plane, or the V plane.
    pub fn plane_bytes(&self) -> usize {
        self.num_kv_heads * self.head_bytes()
    }

    /// Bytes of both planes.
    pub fn granule_bytes(&self) -> usize {
        2 * self.plane_bytes()
    }

    /// Place, in values from the beginning of its head of the K plane, of feature `dim` of token `token`.
    #[inline(always)]
    pub fn k_index(&self, token: usize, dim: usize) -> usize {
        match (self.order, self.dtype) {
            (GranuleOrder::Rows, _) => token * self.head_dim + dim,
            (GranuleOrder::Lanes, KvDtype::F32) => dim * GRANULE_TOKENS + token,
            (GranuleOrder::Lanes, KvDtype::Bf16) => (dim / 2 * GRANULE_TOKENS + token) * 2 + dim % 2,
        }
    }

    /// The same in the V plane.
    #[inline(always)]
    pub fn v_index(&self, token: usize, dim: usize) -> usize {
        match (self.order, self.dtype) {
            (GranuleOrder::Rows, _) | (GranuleOrder::Lanes, KvDtype::F32) => token * self.head_dim + dim,
            (GranuleOrder::Lanes, KvDtype::Bf16) => (token / 2 * self.head_dim + dim) * 2 + token % 2,
        }
    }
}

/// Converts whole granules, one behind the other.
///
/// Panics if the two formats differ in heads or features, or the lengths are not those of as many granules.
pub fn convert_granules(from: &GranuleFormat, to: &GranuleFormat, source: &[u8], out: &mut [u8]) {
    assert_eq!((from.num_kv_heads, from.head_dim), (to.num_kv_heads, to.head_dim), "heads and features of a granule");
    let num_granules = source.len() / from.granule_bytes();
    assert_eq!(source.len(), num_granules * from.granule_bytes(), "whole granules");
    assert_eq!(out.len(), num_granules * to.granule_bytes(), "room for {num_granules} granules");
    if from == to {
        out.copy_from_slice(source);
        return;
    }
    // A granule is a K and a V plane of the same size, and a plane so many heads.
    let heads = source.chunks_exact(from.head_bytes()).zip(out.chunks_exact_mut(to.head_bytes()));
    for (index, (source, out)) in heads.enumerate() {
        let is_v = index / from.num_kv_heads % 2 == 1;
        let head = Head { from, to, is_v };
        match (from.dtype, to.dtype) {
            (KvDtype::F32, KvDtype::F32) => head.convert(source.as_chunks().0, out.as_chunks_mut().0, |x: [u8; 4]| x),
            (KvDtype::Bf16, KvDtype::Bf16) => head.convert(source.as_chunks().0, out.as_chunks_mut().0, |x: [u8; 2]| x),
            (KvDtype::F32, KvDtype::Bf16) => head.convert(source.as_chunks().0, out.as_chunks_mut().0, narrow),
            (KvDtype::Bf16, KvDtype::F32) => head.convert(source.as_chunks().0, out.as_chunks_mut().0, widen),
        }
    }
}

#[inline(always)]
fn narrow(x: [u8; 4]) -> [u8; 2] {
    round_bf16(f32::from_le_bytes(x)).to_le_bytes()
}

#[inline(always)]
fn widen([low, high]: [u8; 2]) -> [u8; 4] {
    [0, 0, low, high]
}

/// One head of one plane.
struct Head<'a> {
    from: &'a GranuleFormat,
    to: &'a GranuleFormat,
    is_v: bool,
}

impl Head<'_> {
    /// Every value to its place. What the order of the source lets be read in a row is read in a row.
    #[inline(always)]
    fn convert<A: Copy, B: Copy>(&self, source: &[A], out: &mut [B], value: impl Fn(A) -> B) {
        let Self { from, to, is_v } = *self;
        let place = |format: &GranuleFormat, token: usize, dim: usize| {
            if is_v { format.v_index(token, dim) } else { format.k_index(token, dim) }
        };
        let is_by_lane = from.order == GranuleOrder::Lanes && !is_v;
        if is_by_lane {
            for dim in 0..from.head_dim {
                for token in 0..GRANULE_TOKENS {
                    out[place(to, token, dim)] = value(source[place(from, token, dim)]);
                }
            }
        } else {
            for token in 0..GRANULE_TOKENS {
                for dim in 0..from.head_dim {
                    out[place(to, token, dim)] = value(source[place(from, token, dim)]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_layout::KvLayout;
    use crate::numerics::widen_bf16;

    const ORDERS: [GranuleOrder; 2] = [GranuleOrder::Lanes, GranuleOrder::Rows];
    const DTYPES: [KvDtype; 2] = [KvDtype::F32, KvDtype::Bf16];

    fn formats(num_kv_heads: usize, head_dim: usize) -> Vec<GranuleFormat> {
        let formats = |order| DTYPES.map(|dtype| GranuleFormat { order, dtype, num_kv_heads, head_dim });
        ORDERS.into_iter().flat_map(formats).collect()
    }

    /// K and V of one granule as `[16, heads, dim]`, values that bf16 does not hold among them.
    fn values(num_kv_heads: usize, head_dim: usize, seed: u64) -> [Vec<f32>; 2] {
        let number = |plane: u32| {
            move |i: u32| match i % 11 {
                0 => 0.0,
                1 => f32::from_bits(0x0180_0000 + i),
                _ => crate::uniform(seed, plane, i) as f32 * 8.0 - 4.0,
            }
        };
        let num_values = (GRANULE_TOKENS * num_kv_heads * head_dim) as u32;
        [0, 1].map(|plane| (0..num_values).map(number(plane)).collect())
    }

    /// The drawing on top of this file, value by value: the specification.
    fn pack(format: &GranuleFormat, [k, v]: &[Vec<f32>; 2]) -> Vec<u8> {
        let GranuleFormat { order, dtype, num_kv_heads, head_dim } = *format;
        if order == GranuleOrder::Lanes {
            let layout = KvLayout { num_layers: 1, num_blocks: 1, block_size: 16, num_kv_heads, head_dim, dtype };
            return layout.pack_granule(k, v);
        }
        let mut bytes = Vec::new();
        for plane in [k, v] {
            for head in 0..num_kv_heads {
                for token in 0..GRANULE_TOKENS {
                    for x in &plane[(token * num_kv_heads + head) * head_dim..][..head_dim] {
                        match dtype {
                            KvDtype::F32 => bytes.extend(x.to_le_bytes()),
                            KvDtype::Bf16 => bytes.extend(round_bf16(*x).to_le_bytes()),
                        }
                    }
                }
            }
        }
        bytes
    }

    /// Values as a pool of this type holds them.
    fn stored(dtype: KvDtype, values: &[Vec<f32>; 2]) -> [Vec<f32>; 2] {
        let hold = |x: &f32| if dtype == KvDtype::Bf16 { widen_bf16(round_bf16(*x)) } else { *x };
        [0, 1].map(|plane| values[plane].iter().map(hold).collect())
    }

    #[test]
    fn converted_granules_are_those_that_the_other_pool_would_hold() {
        for (num_kv_heads, head_dim, num_granules) in [(1, 8, 1), (2, 20, 3), (8, 64, 2), (3, 256, 1)] {
            let granules: Vec<_> = (0..num_granules).map(|i| values(num_kv_heads, head_dim, i)).collect();
            for from in formats(num_kv_heads, head_dim) {
                let source: Vec<u8> = granules.iter().flat_map(|values| pack(&from, values)).collect();
                for to in formats(num_kv_heads, head_dim) {
                    let expected: Vec<u8> =
                        granules.iter().flat_map(|values| pack(&to, &stored(from.dtype, values))).collect();
                    let mut out = vec![0xee; expected.len()];
                    convert_granules(&from, &to, &source, &mut out);
                    assert_eq!(out, expected, "{from:?} to {to:?}");
                }
            }
        }
    }

    #[test]
    fn narrowing_what_was_widened_and_reordering_twice_give_back_every_byte() {
        for from in formats(2, 12).into_iter().filter(|format| format.dtype == KvDtype::Bf16) {
            let source = pack(&from, &values(2, 12, 5));
            for to in formats(2, 12) {
                let (mut there, mut back) = (vec![0; to.granule_bytes()], vec![0; from.granule_bytes()]);
                convert_granules(&from, &to, &source, &mut there);
                convert_granules(&to, &from, &there, &mut back);
                assert_eq!(back, source, "{from:?} by way of {to:?}");
            }
        }
    }

    #[test]
    fn bits_of_one_type_are_moved_as_they_are() {
        // Neither tiny values nor the bits of a NaN go through arithmetic.
        let from = GranuleFormat { order: GranuleOrder::Rows, dtype: KvDtype::Bf16, num_kv_heads: 1, head_dim: 8 };
        let to = GranuleFormat { order: GranuleOrder::Lanes, ..from };
        let source: Vec<u8> = (0..from.granule_bytes()).map(|i| (i * 37 + 11) as u8).collect();
        let mut out = vec![0; source.len()];
        convert_granules(&from, &to, &source, &mut out);
        let sorted = |bytes: &[u8]| {
            let mut values: Vec<[u8; 2]> = bytes.as_chunks().0.to_vec();
            values.sort();
            values
        };
        assert_eq!(sorted(&out), sorted(&source));
        assert_ne!(out, source);
    }
}
