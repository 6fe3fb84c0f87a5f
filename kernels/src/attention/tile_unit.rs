//! What a unit does tile after tile where the tiles of the processor multiply.
//!
//! ```text
//! subtile   32 rows, whose scores with 256 positions stay in the first-level cache
//! scores    q [head_dim/32][32][16 pairs]  x  2 granules of K [head_dim/2][16 tokens]     8 times
//! weights   over the scores, row by row: bf16, the pairs of a row in order
//! values    p [32][128 pairs]              x  V [8 blocks][16 pairs][2 of its vectors]    for all of its vectors
//! ```
//!
//! Keys are multiplied where they lie, if heads are whole blocks. Values are copied once for all subtiles: a block
//! takes two granules, which lie apart, and positions that no row sees must be zero. With up to 16 rows, single queries
//! above all, such a copy of all blocks, through the second-level cache, is not worth its time: each block is copied
//! within the first-level cache when it is multiplied.
#![allow(clippy::needless_range_loop)]

use std::cell::Cell;
use std::ops::Range;

use super::Job;
use super::granules::{Granules, NUM_GRANULES, copy_keys, copy_values, mask_values, prefetch_heads};
use super::softmax::{Softmax, add_weighted};
use super::tile::Lines;
use super::units::{Partials, Unit, clip};
use super::wide_softmax::{Factors, Rows, SCORES_ROW, join_rows, weigh_rows};
use crate::amx::{
    BlockCopy, Blocks, Configured, KeyBlocks, TILE_ROWS, ValueBlocks, fold_blocks, fold_keys, fold_values, panel_shapes,
};
use crate::kv_layout::GRANULE_TOKENS;
use crate::numerics::{ATTENTION_PART, ATTENTION_WIDE_TILE, LANES, Order, TILE_STEPS};
use crate::simd::{Avx512Bf16, Simd};

/// Rows of a subtile at most.
const SUBTILE_ROWS: usize = 2 * TILE_ROWS;

/// Positions of a block of weighted values, and of a step of scores.
const BLOCK_POSITIONS: usize = 2 * TILE_STEPS;

/// Lanes of values that are multiplied at once.
pub(super) const VALUE_LANES: usize = 2 * LANES;

pub(super) const NUM_BLOCKS: usize = ATTENTION_WIDE_TILE / BLOCK_POSITIONS;

/// Softmax states of a unit's rows: maximum, sum, and weighted values `[rows][width]`.
#[derive(Default)]
struct States {
    max: Lines<f32>,
    sum: Lines<f32>,
    acc: Lines<f32>,
}

impl States {
    fn reset(&mut self, rows: usize, width: usize) {
        self.max.resize(rows);
        self.max.fill(f32::MIN);
        self.sum.resize(rows);
        self.sum.fill(0.0);
        self.acc.resize(rows * width);
    }
}

/// What a thread keeps between units.
#[derive(Default)]
struct Scratch {
    /// Packed queries, subtile after subtile.
    q: Lines<u32>,
    part: States,
    total: States,
    /// K of a tile: `[2 granules][width / 32][2][16][16]`.
    keys: Lines<u32>,
    /// V of a tile: `[width / 32][block][16][32]`.
    values: Lines<u32>,
    /// Of a block of V, where it is not copied for others.
    copy: BlockCopy,
    /// The positions each row of the unit sees.
    visible: Vec<Range<usize>>,
    /// `[32][SCORES_ROW]`, then the weights.
    scores: Lines<f32>,
    /// Weighted values of a tile: `[32][width]`.
    sums: Lines<f32>,
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// The blocks of the tile at `start` that hold some of these positions.
#[inline(always)]
fn blocks(start: usize, positions: &Range<usize>) -> Range<usize> {
    let seen = positions.start.max(start) - start..positions.end.min(start + ATTENTION_WIDE_TILE) - start;
    seen.start / BLOCK_POSITIONS..seen.end.div_ceil(BLOCK_POSITIONS)
}

/// `[block][rows of the subtile][16 pairs]`, zeros after the last pair.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn pack_query(q: &[f32], (r, num_rows): (usize, usize), into: &mut [u32]) {
    for (block, q) in q.chunks(2 * TILE_STEPS).enumerate() {
        let into = &mut into[(block * num_rows + r) * TILE_STEPS..][..TILE_STEPS];
        let mut last = [0.0; 2 * TILE_STEPS];
        let from = if q.len() == last.len() {
            q.as_ptr()
        } else {
            last[..q.len()].copy_from_slice(q);
            last.as_ptr()
        };
        // SAFETY: 16 pairs of 32 values; the instruction set is the caller's promise.
        unsafe { Avx512Bf16::store_pairs(into.as_mut_ptr(), from) };
    }
}

/// Blocks from that which is read to that which is asked for.
const BLOCKS_AHEAD: usize = 2;

/// What is read once.
struct Stream<'a> {
    job: &'a Job<'a>,
    /// Where the tile begins, and all positions that some row sees.
    place: (usize, &'a Range<usize>),
    next: Option<&'a Granules>,
    /// Of a head of K or V.
    head_lanes: usize,
}

/// One subtile at one tile.
struct Step<'a> {
    /// Packed rows: as many as the tiles have.
    num_rows: usize,
    /// Features of a head in whole blocks.
    width: usize,
    q: *const u32,
    /// Where they lie, and their copies, if there are any.
    granules: &'a Granules,
    keys: Option<*const u32>,
    values: *mut u32,
    /// Blocks that some row sees something of.
    blocks: Range<usize>,
}

impl Step<'_> {
    /// Products with the keys into `scores` `[num_rows][SCORES_ROW]`. Where these rows are all that pass over them,
    /// keys and values come nearer two blocks before, and values are copied on the way.
    ///
    /// # Safety
    /// Tiles are configured; the pointers are valid for what is said.
    #[inline(always)]
    unsafe fn score(&self, scores: *mut f32, stream: Option<&Stream<'_>>) {
        for block in 0..NUM_BLOCKS {
            if let Some(stream) = stream {
                let later = block + BLOCKS_AHEAD;
                if later < NUM_BLOCKS {
                    self.granules.prefetch(later, stream.head_lanes);
                } else if let Some(next) = stream.next {
                    next.prefetch(later - NUM_BLOCKS, stream.head_lanes);
                }
            }
            if !self.blocks.contains(&block) {
                continue;
            }
            if let Some(&Stream { job, place, .. }) = stream {
                // SAFETY: as required of the caller; nobody else is at the copies, which have room for all blocks.
                unsafe {
                    let values = std::slice::from_raw_parts_mut(self.values, NUM_BLOCKS * TILE_STEPS * self.width);
                    copy_values(job, self.granules, place, block..block + 1, values);
                }
            }
            let num_k = self.width / (2 * TILE_STEPS);
            const LEN: usize = TILE_STEPS * GRANULE_TOKENS;
            let (b, b_block) = match self.keys {
                Some(keys) => {
                    let first = keys.wrapping_add(block * num_k * 2 * LEN);
                    ([first, first.wrapping_add(LEN)], 2 * LEN * 4)
                }
                None => ([self.granules.k[2 * block], self.granules.k[2 * block + 1]], LEN * 4),
            };
            let fold = Blocks {
                a: self.q,
                a_row: TILE_STEPS * 4,
                a_block: self.num_rows * TILE_STEPS * 4,
                b,
                b_row: GRANULE_TOKENS * 4,
                b_block,
                into: scores.wrapping_add(block * BLOCK_POSITIONS),
                into_row: SCORES_ROW * 4,
                num_blocks: num_k,
                is_two: self.num_rows > TILE_ROWS,
            };
            // SAFETY: as required of the caller.
            unsafe { fold_blocks(&fold) }
        }
    }

    /// Values by the weights that lie where the scores were, into `sums` `[num_rows][width]`.
    ///
    /// # Safety
    /// As of [`score`](Self::score).
    #[inline(always)]
    unsafe fn weigh_values(&self, weights: *const u32, sums: *mut f32) {
        for feature in (0..self.width).step_by(VALUE_LANES) {
            let first = feature / VALUE_LANES * NUM_BLOCKS + self.blocks.start;
            let values = self.values.wrapping_add(first * TILE_STEPS * VALUE_LANES);
            let fold = Blocks {
                a: weights.wrapping_add(self.blocks.start * TILE_STEPS),
                a_row: SCORES_ROW * 4,
                a_block: TILE_STEPS * 4,
                b: [values, values.wrapping_add(LANES)],
                b_row: VALUE_LANES * 4,
                b_block: TILE_STEPS * VALUE_LANES * 4,
                into: sums.wrapping_add(feature),
                into_row: self.width * 4,
                num_blocks: self.blocks.len(),
                is_two: self.num_rows > TILE_ROWS,
            };
            // SAFETY: as required of the caller.
            unsafe { fold_blocks(&fold) }
        }
    }
}

/// From the head that is read to that which is asked for, where they are read in place: more of them do not stay in the
/// first-level cache until their turn.
const GRANULES_AHEAD: usize = 4;

/// Heads in the order in which they are read: keys, values, the keys of the next tile (or any).
type Heads = [*const u32; 3 * NUM_GRANULES];

/// With up to 16 rows, and heads of whole blocks: nobody else reads these keys and values.
impl Step<'_> {
    /// As [`score`](Self::score).
    ///
    /// # Safety
    /// As of [`score`](Self::score).
    #[inline(always)]
    unsafe fn score_in_place(&self, scores: *mut f32, order: &Heads) {
        let keys = self.granules.k.as_chunks::<4>().0;
        // Blocks that nobody sees are multiplied beside one that is seen: they lie where others do, and nobody looks.
        for i in self.blocks.start / 2..self.blocks.end.div_ceil(2) {
            let fold = KeyBlocks {
                q: self.q,
                num_rows: self.num_rows,
                keys: &keys[i],
                num_blocks: self.width / (2 * TILE_STEPS),
                scores: scores.wrapping_add(2 * i * BLOCK_POSITIONS),
                scores_row: SCORES_ROW * 4,
                ahead: order[4 * i + GRANULES_AHEAD..].first_chunk().expect("values follow keys"),
            };
            // SAFETY: as required of the caller.
            unsafe { fold_keys(&fold) }
        }
    }

    /// As [`weigh_values`](Self::weigh_values), where they lie.
    ///
    /// # Safety
    /// As of [`score`](Self::score); heads are whole blocks.
    #[inline(always)]
    unsafe fn weigh_values_in_place(&self, weights: *const u32, sums: *mut f32, copy: &mut BlockCopy, order: &Heads) {
        let first_granule = 2 * self.blocks.start;
        let values = self.granules.v[first_granule..].as_ptr();
        for feature in (0..self.width).step_by(4 * LANES) {
            let blocks = ValueBlocks {
                weights: weights.wrapping_add(self.blocks.start * TILE_STEPS),
                weights_row: SCORES_ROW * 4,
                values,
                values_row: self.width * 4,
                first: feature * 4,
                ahead: order[NUM_GRANULES + first_granule + GRANULES_AHEAD..].as_ptr(),
                copy,
                into: sums.wrapping_add(feature),
                into_row: self.width * 4,
                num_blocks: self.blocks.len(),
            };
            // SAFETY: as required of the caller.
            unsafe {
                if feature + 4 * LANES <= self.width { fold_values::<4>(&blocks) } else { fold_values::<2>(&blocks) }
            }
        }
    }
}

/// Rows of tiles for the subtile that begins at a row of so many: all of its own, or whole tiles of them.
#[inline(always)]
fn packed_rows(first: usize, num_rows: usize) -> usize {
    if num_rows <= TILE_ROWS { num_rows } else { (num_rows - first).min(SUBTILE_ROWS).next_multiple_of(TILE_ROWS) }
}

/// # Safety
/// The machine has the instruction set; a thread computes one unit at a time, which nobody else does.
#[inline(always)]
pub(super) unsafe fn compute_in_tiles(job: &Job<'_>, unit: &Unit, partials: &Partials) {
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let (num_rows, head_dim, padded_dim) = (unit.rows.len(), job.layout.head_dim, job.padded_dim());
    let width = head_dim.next_multiple_of(2 * TILE_STEPS);
    let Softmax::Base2 { factor, cap } = Softmax::of(job.params, job.layout.dtype, Order::Tiles) else {
        unreachable!("tiles multiply bf16");
    };
    // SAFETY: as required of the caller; one configuration on a thread.
    let _tiles = unsafe { Configured::new(panel_shapes(packed_rows(0, num_rows))) };
    let all_rows = num_rows.next_multiple_of(SUBTILE_ROWS);
    scratch.q.resize(all_rows * width / 2);
    for first in (0..num_rows).step_by(SUBTILE_ROWS) {
        let into = &mut scratch.q[first * width / 2..][..SUBTILE_ROWS * width / 2];
        for row in first..num_rows.min(first + SUBTILE_ROWS) {
            // SAFETY: the caller has the instruction set.
            unsafe { pack_query(job.query_of(unit, row), (row - first, packed_rows(first, num_rows)), into) };
        }
    }
    let positions = job.positions(unit);
    scratch.visible.clear();
    for row in 0..num_rows {
        scratch.visible.push(job.visible(unit, row));
    }
    scratch.scores.resize(SUBTILE_ROWS * SCORES_ROW);
    scratch.sums.resize(SUBTILE_ROWS * width);
    scratch.values.resize(ATTENTION_WIDE_TILE / 2 * width);
    let unit_end = positions.end.min(unit.parts.end * ATTENTION_PART);
    let num_subtiles = num_rows.div_ceil(SUBTILE_ROWS);
    let pads_keys = width != head_dim;
    let in_place = num_rows <= TILE_ROWS && !pads_keys;
    if pads_keys {
        scratch.keys.resize(ATTENTION_WIDE_TILE / 2 * width);
    }
    let mut next: Option<Granules> = None;
    for part in unit.parts.clone() {
        scratch.part.reset(all_rows, width);
        let end = positions.end.min((part + 1) * ATTENTION_PART);
        let first_start = positions.start.max(part * ATTENTION_PART) / ATTENTION_WIDE_TILE * ATTENTION_WIDE_TILE;
        for start in (first_start..end).step_by(ATTENTION_WIDE_TILE) {
            let mut granules = next.take().unwrap_or_else(|| Granules::locate(job, unit, start, &positions));
            next = (start + ATTENTION_WIDE_TILE < unit_end)
                .then(|| Granules::locate(job, unit, start + ATTENTION_WIDE_TILE, &positions));
            let head_lanes = head_dim / 2 * GRANULE_TOKENS;
            // Where more rows pass over them, asking for keys and values was measured to take longer than waiting.
            if num_subtiles > 1 {
                let (place, seen) = ((start, &positions), blocks(start, &positions));
                // SAFETY: the caller has the instruction set.
                unsafe { copy_values(job, &granules, place, seen, &mut scratch.values) };
            } else if start == first_start && part == unit.parts.start {
                if in_place {
                    prefetch_heads(&granules.k[..GRANULES_AHEAD], head_lanes);
                } else {
                    (0..BLOCKS_AHEAD).for_each(|block| granules.prefetch(block, head_lanes));
                }
            }
            if in_place {
                let (place, seen) = ((start, &positions), blocks(start, &positions));
                mask_values(job, &mut granules, place, seen, &mut scratch.values);
            }
            if pads_keys {
                copy_keys(job, &granules, blocks(start, &positions), width, &mut scratch.keys);
            }
            let mut order: Heads = [std::ptr::null(); 3 * NUM_GRANULES];
            order[..NUM_GRANULES].copy_from_slice(&granules.k);
            order[NUM_GRANULES..2 * NUM_GRANULES].copy_from_slice(&granules.v);
            order[2 * NUM_GRANULES..].copy_from_slice(&next.as_ref().unwrap_or(&granules).k);
            for subtile in 0..num_subtiles {
                let first = subtile * SUBTILE_ROWS;
                let rows = first..num_rows.min(first + SUBTILE_ROWS);
                let tile = start..start + ATTENTION_WIDE_TILE;
                let seen = scratch.visible[rows.start].start..scratch.visible[rows.end - 1].end;
                if clip(&seen, tile.clone()).is_empty() {
                    continue;
                }
                let step = Step {
                    num_rows: packed_rows(first, num_rows),
                    width,
                    q: scratch.q[first * width / 2..].as_ptr(),
                    granules: &granules,
                    keys: pads_keys.then_some(scratch.keys.as_ptr()),
                    values: scratch.values.as_mut_ptr(),
                    blocks: blocks(start, &seen),
                };
                let scores = scratch.scores.as_mut_ptr();
                let acc = scratch.part.acc[first * width..][..SUBTILE_ROWS * width].as_mut_ptr();
                let is_first = start == first_start;
                // SAFETY: the caller has the instruction set; tiles are configured for these rows; scratch is as large
                // as said, for whole subtiles.
                unsafe {
                    let stream = (num_subtiles == 1).then_some(Stream {
                        job,
                        place: (start, &positions),
                        next: next.as_ref(),
                        head_lanes,
                    });
                    if in_place {
                        step.score_in_place(scores, &order);
                    } else {
                        step.score(scores, stream.as_ref());
                    }
                    let mut factors = [Factors::default(); 2];
                    for (half, half_rows) in
                        [first..first + TILE_ROWS, first + TILE_ROWS..rows.end].into_iter().enumerate()
                    {
                        let half_rows = half_rows.start..half_rows.end.min(rows.end);
                        if half_rows.is_empty() {
                            break;
                        }
                        let (max, sum) = (&mut scratch.part.max, &mut scratch.part.sum);
                        let mut rows = Rows {
                            scores: scores.add(half * TILE_ROWS * SCORES_ROW),
                            visible: &scratch.visible[half_rows.clone()],
                            tile: tile.clone(),
                            blocks: step.blocks.clone(),
                            max: &mut max[half_rows.start..][..LANES],
                            sum: &mut sum[half_rows.start..][..LANES],
                        };
                        factors[half] = weigh_rows(&mut rows, factor, cap);
                    }
                    let sums = if is_first { acc } else { scratch.sums.as_mut_ptr() };
                    if in_place {
                        step.weigh_values_in_place(scores.cast(), sums, &mut scratch.copy, &order);
                    } else {
                        step.weigh_values(scores.cast(), sums);
                    }
                    if !is_first {
                        for row in rows.clone() {
                            if clip(&scratch.visible[row], tile.clone()).is_empty() {
                                continue;
                            }
                            let r = row - first;
                            let correction = Avx512Bf16::splat(factors[r / LANES].0[r % LANES]);
                            for lane in (r * width..(r + 1) * width).step_by(LANES) {
                                let sum = Avx512Bf16::load(sums.add(lane));
                                let acc = acc.add(lane);
                                Avx512Bf16::store(acc, Avx512Bf16::fma(Avx512Bf16::load(acc), correction, sum));
                            }
                        }
                    }
                }
            }
            // Of subtiles that see nothing of the first tile of a part the second is not the first.
            if start == first_start {
                clear_unseen(&scratch.visible, start..start + ATTENTION_WIDE_TILE, &mut scratch.part.acc, width);
            }
        }
        if part == unit.parts.start {
            std::mem::swap(&mut scratch.part, &mut scratch.total);
            continue;
        }
        let (part_states, total) = (&scratch.part, &mut scratch.total);
        for first in (0..num_rows).step_by(LANES) {
            let lanes = first..first + LANES;
            // SAFETY: the caller has the instruction set.
            let [a, b] = unsafe {
                join_rows(
                    (&mut total.max[lanes.clone()], &mut total.sum[lanes.clone()]),
                    (&part_states.max[lanes.clone()], &part_states.sum[lanes.clone()]),
                    factor,
                )
            };
            for row in first..num_rows.min(first + LANES) {
                if clip(&scratch.visible[row], part * ATTENTION_PART..(part + 1) * ATTENTION_PART).is_empty() {
                    continue;
                }
                let features = row * width..row * width + padded_dim;
                let (a, b) = (a.0[row - first], b.0[row - first]);
                add_weighted(&mut total.acc[features.clone()], a, &part_states.acc[features], b);
            }
        }
    }
    for row in 0..num_rows {
        let acc = &scratch.total.acc[row * width..][..padded_dim];
        // SAFETY: as required of the caller.
        unsafe { job.finish(unit, partials, row, scratch.total.max[row], scratch.total.sum[row], acc) };
    }
    SCRATCH.set(Some(scratch));
}

/// Zeros for the rows of subtiles that have not been at this tile.
#[inline(always)]
fn clear_unseen(visible: &[Range<usize>], tile: Range<usize>, acc: &mut [f32], width: usize) {
    for (subtile, rows) in visible.chunks(SUBTILE_ROWS).enumerate() {
        let seen = rows[0].start..rows[rows.len() - 1].end;
        if clip(&seen, tile.clone()).is_empty() {
            let first = subtile * SUBTILE_ROWS;
            acc[first * width..(first + rows.len()) * width].fill(0.0);
        }
    }
}
