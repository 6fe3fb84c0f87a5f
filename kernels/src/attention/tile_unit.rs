//! What a unit does tile after tile where the tiles of the processor multiply.
//!
//! ```text
//! subtile   32 rows, whose scores with 256 positions stay in the first-level cache
//! scores    q [head_dim/32][32][16 pairs]  x  2 granules of K [head_dim/2][16 tokens]     8 times
//! weights   over the scores, row by row: bf16, the pairs of a row in order
//! values    p [32][128 pairs]              x  V [8 blocks][16 pairs][2 of its vectors]    for all of its vectors
//! ```
//!
//! Keys are multiplied where they lie, if heads are whole blocks. Values are copied once for all subtiles: a block takes
//! two granules, which lie apart, and positions that no row sees must be zero.
#![allow(clippy::needless_range_loop)]

use std::cell::Cell;
use std::ops::Range;

use super::Job;
use super::softmax::{Softmax, add_weighted};
use super::tile::Lines;
use super::units::{Partials, Unit, clip};
use super::wide_softmax::{Factors, Rows, SCORES_ROW, join_rows, weigh_rows};
use crate::amx::{Blocks, Configured, TILE_ROWS, fold_blocks, panel_shapes};
use crate::kv_layout::GRANULE_TOKENS;
use crate::numerics::{ATTENTION_PART, ATTENTION_WIDE_TILE, LANES, Order, TILE_STEPS};
use crate::simd::{Avx512Bf16, Simd, prefetch};

/// Rows of a subtile at most.
const SUBTILE_ROWS: usize = 2 * TILE_ROWS;

/// Positions of a block of weighted values, and of a step of scores.
const BLOCK_POSITIONS: usize = 2 * TILE_STEPS;

/// Lanes of values that are multiplied at once.
const VALUE_LANES: usize = 2 * LANES;

const NUM_BLOCKS: usize = ATTENTION_WIDE_TILE / BLOCK_POSITIONS;
const NUM_GRANULES: usize = ATTENTION_WIDE_TILE / GRANULE_TOKENS;

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

/// Where the keys and values of 256 positions lie; those of granules that nobody sees are others' instead.
struct Granules {
    k: [*const u32; NUM_GRANULES],
    v: [*const u32; NUM_GRANULES],
}

impl Granules {
    #[inline(always)]
    fn locate(job: &Job<'_>, unit: &Unit, start: usize, positions: &Range<usize>) -> Granules {
        let layout = job.layout;
        let block_table = &job.batch.block_tables[job.batch.spans[unit.span].block_table.clone()];
        let mut granules = Granules { k: [std::ptr::null(); NUM_GRANULES], v: [std::ptr::null(); NUM_GRANULES] };
        for g in 0..NUM_GRANULES {
            let position = (start + g * GRANULE_TOKENS).clamp(positions.start, positions.end - 1);
            let block = block_table[position / layout.block_size];
            let offset = layout.granule_offset(job.layer, block, position % layout.block_size / GRANULE_TOKENS);
            let k = job.arena.bytes(offset, layout.granule_bytes()).cast_const();
            // SAFETY: heads and planes lie within the granule.
            unsafe {
                let k = k.add(unit.kv_head * layout.head_bytes());
                granules.k[g] = k.cast();
                granules.v[g] = k.add(layout.plane_bytes()).cast::<u32>();
            }
        }
        granules
    }

    /// Has K and V of a block come nearer: they lie in pieces of some lines, of which the machine foresees nothing.
    #[inline(always)]
    fn prefetch(&self, block: usize, head_lanes: usize) {
        for g in 2 * block..2 * block + 2 {
            for lane in (0..head_lanes).step_by(LANES) {
                prefetch(self.k[g].wrapping_add(lane));
                prefetch(self.v[g].wrapping_add(lane));
            }
        }
    }
}

/// The blocks of the tile at `start` that hold some of these positions.
#[inline(always)]
fn blocks(start: usize, positions: &Range<usize>) -> Range<usize> {
    let seen = positions.start.max(start) - start..positions.end.min(start + ATTENTION_WIDE_TILE) - start;
    seen.start / BLOCK_POSITIONS..seen.end.div_ceil(BLOCK_POSITIONS)
}

/// Copies the values of these blocks of the tile at `start`, zeros in place of other than these positions and behind heads
/// that are not as wide.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn copy_values(
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
        // SAFETY: a head of V has as many pairs; it is 4-byte aligned and initialised; nobody writes positions that a query
        // sees, and others are only read as bits (the arena's invariant).
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
                let token = first + 2 * step;
                let mask = (u32::from(positions.contains(&token)) * 0xffff)
                    | (u32::from(positions.contains(&(token + 1))) * 0xffff_0000);
                let from = &from[step * head_dim + feature..][..len];
                into.iter_mut().zip(from).for_each(|(into, from)| *into = from & mask);
            }
        }
    }
}

/// Copies the keys of these blocks in the order in which they are multiplied, zeros behind heads that are no whole blocks.
#[inline(always)]
fn copy_keys(job: &Job<'_>, granules: &Granules, blocks: Range<usize>, width: usize, copies: &mut [u32]) {
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
    /// Products with the keys into `scores` `[num_rows][SCORES_ROW]`. Where these rows are all that pass over them, keys
    /// and values come nearer two blocks before, and values are copied on the way.
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
    if pads_keys {
        scratch.keys.resize(ATTENTION_WIDE_TILE / 2 * width);
    }
    for part in unit.parts.clone() {
        scratch.part.reset(all_rows, width);
        let end = positions.end.min((part + 1) * ATTENTION_PART);
        let first_start = positions.start.max(part * ATTENTION_PART) / ATTENTION_WIDE_TILE * ATTENTION_WIDE_TILE;
        for start in (first_start..end).step_by(ATTENTION_WIDE_TILE) {
            let granules = Granules::locate(job, unit, start, &positions);
            let next = (start + ATTENTION_WIDE_TILE < unit_end)
                .then(|| Granules::locate(job, unit, start + ATTENTION_WIDE_TILE, &positions));
            let head_lanes = head_dim / 2 * GRANULE_TOKENS;
            // Where more rows pass over them, asking for keys and values was measured to take longer than waiting.
            if num_subtiles > 1 {
                let (place, seen) = ((start, &positions), blocks(start, &positions));
                // SAFETY: the caller has the instruction set.
                unsafe { copy_values(job, &granules, place, seen, &mut scratch.values) };
            } else if start == first_start && part == unit.parts.start {
                (0..BLOCKS_AHEAD).for_each(|block| granules.prefetch(block, head_lanes));
            }
            if pads_keys {
                copy_keys(job, &granules, blocks(start, &positions), width, &mut scratch.keys);
            }
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
                // SAFETY: the caller has the instruction set; tiles are configured for these rows; scratch is as large as
                // said, for whole subtiles.
                unsafe {
                    let stream = (num_subtiles == 1).then_some(Stream {
                        job,
                        place: (start, &positions),
                        next: next.as_ref(),
                        head_lanes,
                    });
                    step.score(scores, stream.as_ref());
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
                    if is_first {
                        step.weigh_values(scores.cast(), acc);
                    } else {
                        let sums = scratch.sums.as_mut_ptr();
                        step.weigh_values(scores.cast(), sums);
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
