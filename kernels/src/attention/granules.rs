//! Where the keys and values of a tile of 256 positions lie, and copies of what cannot be multiplied there.

use std::ops::Range;

use super::Job;
use super::tile_unit::{NUM_BLOCKS, VALUE_LANES};
use super::units::Unit;
use crate::kv_layout::GRANULE_TOKENS;
use crate::numerics::{ATTENTION_WIDE_TILE, LANES, TILE_STEPS};
use crate::simd::{Avx512Bf16, Simd, prefetch};

pub(super) const NUM_GRANULES: usize = ATTENTION_WIDE_TILE / GRANULE_TOKENS;

/// Where the keys and values of 256 positions lie; those of granules that nobody sees are others' instead.
pub(super) struct Granules {
    pub(super) k: [*const u32; NUM_GRANULES],
    pub(super) v: [*const u32; NUM_GRANULES],
}

impl Granules {
    #[inline(always)]
    pub(super) fn locate(job: &Job<'_>, unit: &Unit, start: usize, positions: &Range<usize>) -> Granules {
        let layout = job.layout;
        let block_table = &job.batch.block_tables[job.batch.spans[unit.span].block_table.clone()];
        let mut granules = Granules { k: [std::ptr::null(); NUM_GRANULES], v: [std::ptr::null(); NUM_GRANULES] };
        let (head, plane, len) = (unit.kv_head * layout.head_bytes(), layout.plane_bytes(), layout.granule_bytes());
        // Counted from the beginning of the sequence. One division for all of them.
        let (first, last) = (positions.start / GRANULE_TOKENS, (positions.end - 1) / GRANULE_TOKENS);
        let granules_per_block = layout.block_size / GRANULE_TOKENS;
        let mut granule = (start / GRANULE_TOKENS).clamp(first, last);
        let (mut block, mut of_block) = (granule / granules_per_block, granule % granules_per_block);
        for g in 0..NUM_GRANULES {
            if granule < (start / GRANULE_TOKENS + g).min(last) {
                (granule, of_block) = (granule + 1, of_block + 1);
                if of_block == granules_per_block {
                    (block, of_block) = (block + 1, 0);
                }
            }
            let offset = layout.granule_offset(job.layer, block_table[block], of_block);
            let k = job.arena.bytes(offset, len).cast_const();
            // SAFETY: heads and planes lie within the granule.
            unsafe {
                let k = k.add(head);
                granules.k[g] = k.cast();
                granules.v[g] = k.add(plane).cast::<u32>();
            }
        }
        granules
    }

    /// Has K and V of a block come nearer.
    #[inline(always)]
    pub(super) fn prefetch(&self, block: usize, head_lanes: usize) {
        prefetch_heads(&self.k[2 * block..2 * block + 2], head_lanes);
        prefetch_heads(&self.v[2 * block..2 * block + 2], head_lanes);
    }
}

/// Has heads come nearer: they are pieces of some lines, of which the machine foresees nothing.
#[inline(always)]
pub(super) fn prefetch_heads(heads: &[*const u32], head_lanes: usize) {
    for head in heads {
        for lane in (0..head_lanes).step_by(LANES) {
            prefetch(head.wrapping_add(lane));
        }
    }
}

/// Copies, within these blocks, the granules of V of which not all positions are seen, with zeros in place of the
/// others, and has `granules` lead there: what nobody has written may be no number.
#[inline(always)]
pub(super) fn mask_values(
    job: &Job<'_>,
    granules: &mut Granules,
    (start, positions): (usize, &Range<usize>),
    blocks: Range<usize>,
    copies: &mut [u32],
) {
    let len = GRANULE_TOKENS / 2 * job.layout.head_dim;
    for g in 2 * blocks.start..2 * blocks.end {
        let first = start + g * GRANULE_TOKENS;
        if positions.start <= first && first + GRANULE_TOKENS <= positions.end {
            continue;
        }
        // SAFETY: as in `copy_values`.
        let from = unsafe { std::slice::from_raw_parts(granules.v[g], len) };
        let into = &mut copies[g * len..][..len];
        let steps = into.chunks_exact_mut(job.layout.head_dim).zip(from.chunks_exact(job.layout.head_dim));
        for (step, (into, from)) in steps.enumerate() {
            let mask = pair_mask(positions, first + 2 * step);
            into.iter_mut().zip(from).for_each(|(into, from)| *into = from & mask);
        }
        granules.v[g] = into.as_ptr();
    }
}

/// The halves of the pair at `token` that are in `positions`.
#[inline(always)]
fn pair_mask(positions: &Range<usize>, token: usize) -> u32 {
    (u32::from(positions.contains(&token)) * 0xffff) | (u32::from(positions.contains(&(token + 1))) * 0xffff_0000)
}

/// Copies the values of these blocks of the tile at `start`, zeros in place of other than these positions and behind
/// heads that are not as wide.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
pub(super) unsafe fn copy_values(
    job: &Job<'_>,
    granules: &Granules,
    (start, positions): (usize, &Range<usize>),
    blocks: Range<usize>,
    copies: &mut [u32],
) {
    const STEPS: usize = GRANULE_TOKENS / 2;
    let head_dim = job.layout.head_dim;
    for g in 2 * blocks.start..2 * blocks.end {
        let first = start + g * GRANULE_TOKENS;
        // SAFETY: a head of V has as many pairs; it is 4-byte aligned and initialised; nobody writes positions that a
        // query sees, and others are only read as bits (the arena's invariant).
        let from = unsafe { std::slice::from_raw_parts(granules.v[g], STEPS * head_dim) };
        let is_whole = positions.start <= first && first + GRANULE_TOKENS <= positions.end;
        for (i, feature) in (0..head_dim).step_by(VALUE_LANES).enumerate() {
            let into = &mut copies[(i * NUM_BLOCKS * TILE_STEPS + g * STEPS) * VALUE_LANES..][..STEPS * VALUE_LANES];
            if is_whole && feature + VALUE_LANES <= head_dim {
                for step in 0..STEPS {
                    let from = from[step * head_dim + feature..].as_ptr();
                    let into = into[step * VALUE_LANES..].as_mut_ptr();
                    // SAFETY: the instruction set is the caller's promise; both have two vectors.
                    unsafe {
                        let (first, second) = (Avx512Bf16::load(from.cast()), Avx512Bf16::load(from.add(LANES).cast()));
                        Avx512Bf16::store(into.cast(), first);
                        Avx512Bf16::store(into.add(LANES).cast(), second);
                    }
                }
                continue;
            }
            into.fill(0);
            let len = VALUE_LANES.min(head_dim - feature);
            for (step, into) in into.chunks_exact_mut(VALUE_LANES).enumerate() {
                let mask = pair_mask(positions, first + 2 * step);
                let from = &from[step * head_dim + feature..][..len];
                into.iter_mut().zip(from).for_each(|(into, from)| *into = from & mask);
            }
        }
    }
}

/// Copies the keys of these blocks in the order in which they are multiplied, zeros behind heads that are no whole
/// blocks.
#[inline(always)]
pub(super) fn copy_keys(job: &Job<'_>, granules: &Granules, blocks: Range<usize>, width: usize, copies: &mut [u32]) {
    const LEN: usize = TILE_STEPS * GRANULE_TOKENS;
    let num_k = width / (2 * TILE_STEPS);
    for g in 2 * blocks.start..2 * blocks.end {
        // SAFETY: a head of K, as of V in `copy_values`.
        let from = unsafe { std::slice::from_raw_parts(granules.k[g], job.layout.head_dim / 2 * GRANULE_TOKENS) };
        for (k, from) in from.chunks(LEN).enumerate() {
            let into = &mut copies[((g / 2 * num_k + k) * 2 + g % 2) * LEN..][..LEN];
            into[..from.len()].copy_from_slice(from);
            into[from.len()..].fill(0);
        }
    }
}
