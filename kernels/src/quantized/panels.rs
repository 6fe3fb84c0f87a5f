//! How the fast versions read a panel: 16 lanes of codes, scales and minima, in each format, and in the one that
//! all of them can be taken apart to.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

use super::packed::{INT4_BYTES, INT4_MIN_BYTES, INT6_BYTES, INT8_BYTES, QUAD_BYTES, int4_min_group, int6_part};
use super::simd::IntSimd;
use crate::numerics::LANES;
use crate::packed_matrix::PANEL;
use crate::simd::Simd;

/// How a panel format is read: 16 lanes from feature `lane` of the panel on.
///
/// # Safety
/// As for [`IntSimd`]; `panel` is a whole panel of the format (of [`Opened`]: some groups), the group one of its
/// groups.
pub(super) trait Panel: Sized {
    /// Quads of a group of weights; 0 if the group is the whole row.
    const QUADS: usize;
    /// Groups of weights to a group of activations.
    const GROUPS: usize;
    const HAS_MINS: bool;
    /// Bytes of 8 groups; 0 if the group is the whole row.
    const EIGHT_GROUPS_BYTES: usize;
    /// Whether taking codes apart costs so much that many tiles had better share it.
    const OPENS: bool = false;
    /// Whether these are some groups of a panel, whose sums go on in the next ones.
    const IS_PART: bool = false;
    unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I;
    unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, num_quads: usize, lane: usize) -> <S::F as Simd>::V;
    unsafe fn min<S: IntSimd>(_panel: *const u8, _group: usize, _lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe { S::F::splat(0.0) }
    }
}

/// 16 lanes of quad `quad` of 32, from nibbles.
#[inline(always)]
unsafe fn nibbles<S: IntSimd>(start: *const u8, quad: usize, lane: usize) -> S::I {
    // SAFETY: as required of the caller.
    unsafe {
        let lanes = S::load(start.add(quad % 4 * QUAD_BYTES + lane * 4));
        S::and(S::shift_right(lanes, (quad / 4 * 4) as u32), 0x0f0f_0f0f)
    }
}

pub(super) struct Int8;

impl Panel for Int8 {
    const QUADS: usize = 8;
    const GROUPS: usize = 1;
    const HAS_MINS: bool = false;
    const EIGHT_GROUPS_BYTES: usize = 8 * INT8_BYTES;

    #[inline(always)]
    unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
        // SAFETY: as required of the caller.
        unsafe { S::load(panel.add(group * INT8_BYTES + quad * QUAD_BYTES + lane * 4)) }
    }
    #[inline(always)]
    unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe { S::load_f16(panel.add(group * INT8_BYTES + 8 * QUAD_BYTES + lane * 2)) }
    }
}

pub(super) struct Int4;

impl Panel for Int4 {
    const QUADS: usize = 8;
    const GROUPS: usize = 1;
    const HAS_MINS: bool = false;
    const EIGHT_GROUPS_BYTES: usize = 8 * INT4_BYTES;

    #[inline(always)]
    unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
        // SAFETY: as required of the caller.
        unsafe { nibbles::<S>(panel.add(group * INT4_BYTES), quad, lane) }
    }
    #[inline(always)]
    unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe { S::load_f16(panel.add(group * INT4_BYTES + 4 * QUAD_BYTES + lane * 2)) }
    }
}

pub(super) struct Int4Min;

impl Panel for Int4Min {
    const QUADS: usize = 8;
    const GROUPS: usize = 1;
    const HAS_MINS: bool = true;
    const EIGHT_GROUPS_BYTES: usize = INT4_MIN_BYTES;

    #[inline(always)]
    unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
        // SAFETY: as required of the caller.
        unsafe { nibbles::<S>(panel.add(int4_min_group(group)), quad, lane) }
    }
    #[inline(always)]
    unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe {
            let block = S::load_f16(panel.add(group / 8 * INT4_MIN_BYTES + lane * 2));
            let small = S::load_u8(panel.add(int4_min_group(group) + 4 * QUAD_BYTES + lane));
            S::F::mul(block, S::to_f32(small))
        }
    }
    #[inline(always)]
    unsafe fn min<S: IntSimd>(panel: *const u8, group: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe {
            let block = S::load_f16(panel.add(group / 8 * INT4_MIN_BYTES + PANEL * 2 + lane * 2));
            let small = S::load_u8(panel.add(int4_min_group(group) + 4 * QUAD_BYTES + PANEL + lane));
            S::F::mul(block, S::to_f32(small))
        }
    }
}

pub(super) struct Int6;

impl Panel for Int6 {
    const QUADS: usize = 4;
    const GROUPS: usize = 2;
    const HAS_MINS: bool = false;
    const EIGHT_GROUPS_BYTES: usize = INT6_BYTES / 2;
    const OPENS: bool = true;

    #[inline(always)]
    unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
        // SAFETY: as required of the caller.
        unsafe {
            let (start, quad) = (panel.add(int6_part(group / 2)), group % 2 * 4 + quad);
            let high = S::load(start.add((4 + quad % 2) * QUAD_BYTES + lane * 4));
            let high = S::and(S::shift_right(high, (quad / 2 * 2) as u32), 0x0303_0303);
            S::or(nibbles::<S>(start, quad, lane), S::shift_left(high, 4))
        }
    }
    #[inline(always)]
    unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe {
            let block = S::load_f16(panel.add(group / 16 * INT6_BYTES + lane * 2));
            let start = int6_part(group / 2) + 6 * QUAD_BYTES + group % 2 * PANEL;
            S::F::mul(block, S::to_f32(S::load_i8(panel.add(start + lane))))
        }
    }
}

pub(super) struct Int8Row;

impl Panel for Int8Row {
    const QUADS: usize = 0;
    const GROUPS: usize = 1;
    const HAS_MINS: bool = false;
    const EIGHT_GROUPS_BYTES: usize = 0;

    #[inline(always)]
    unsafe fn quad<S: IntSimd>(panel: *const u8, _: usize, quad: usize, lane: usize) -> S::I {
        // SAFETY: as required of the caller.
        unsafe { S::load(panel.add(quad * QUAD_BYTES + lane * 4)) }
    }
    #[inline(always)]
    unsafe fn scale<S: IntSimd>(panel: *const u8, _: usize, num_quads: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe { S::F::load(panel.add(num_quads * QUAD_BYTES + lane * 4).cast()) }
    }
}

/// Some groups of a panel of format `P` taken apart, so that many tiles find whole bytes and f32 scales in the
/// first-level cache: per group `[QUADS][32] lanes of 4 codes | f32 scale [32] | f32 min [32]`.
pub(super) struct Opened<P>(PhantomData<P>);

impl<P: Panel> Opened<P> {
    const SCALES: usize = P::QUADS * QUAD_BYTES;
    const MINS: usize = Self::SCALES + PANEL * 4;
    pub(super) const GROUP_BYTES: usize = Self::MINS + PANEL * 4;

    /// Takes these groups of a panel apart, and subtracts something from each code.
    ///
    /// # Safety
    /// As for [`Panel`]; `into` has [`GROUP_BYTES`](Self::GROUP_BYTES) for each.
    #[inline(always)]
    pub(super) unsafe fn fill<S: IntSimd>(panel: *const u8, groups: Range<usize>, zero: u8, mut into: *mut u8) {
        for group in groups {
            for lane in [0, LANES] {
                // SAFETY: as required of the caller.
                unsafe {
                    for quad in 0..P::QUADS {
                        let codes = S::sub_bytes(P::quad::<S>(panel, group, quad, lane), zero);
                        S::store(into.add(quad * QUAD_BYTES + lane * 4), codes);
                    }
                    S::F::store(into.add(Self::SCALES + lane * 4).cast(), P::scale::<S>(panel, group, P::QUADS, lane));
                    if P::HAS_MINS {
                        S::F::store(into.add(Self::MINS + lane * 4).cast(), P::min::<S>(panel, group, lane));
                    }
                }
            }
            into = into.wrapping_add(Self::GROUP_BYTES);
        }
    }
}

impl<P: Panel> Panel for Opened<P> {
    const QUADS: usize = P::QUADS;
    const GROUPS: usize = P::GROUPS;
    const HAS_MINS: bool = P::HAS_MINS;
    const EIGHT_GROUPS_BYTES: usize = 8 * Self::GROUP_BYTES;
    const IS_PART: bool = true;

    #[inline(always)]
    unsafe fn quad<S: IntSimd>(panel: *const u8, group: usize, quad: usize, lane: usize) -> S::I {
        // SAFETY: as required of the caller.
        unsafe { S::load(panel.add(group * Self::GROUP_BYTES + quad * QUAD_BYTES + lane * 4)) }
    }
    #[inline(always)]
    unsafe fn scale<S: IntSimd>(panel: *const u8, group: usize, _: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe { S::F::load(panel.add(group * Self::GROUP_BYTES + Self::SCALES + lane * 4).cast()) }
    }
    #[inline(always)]
    unsafe fn min<S: IntSimd>(panel: *const u8, group: usize, lane: usize) -> <S::F as Simd>::V {
        // SAFETY: as required of the caller.
        unsafe { S::F::load(panel.add(group * Self::GROUP_BYTES + Self::MINS + lane * 4).cast()) }
    }
}
