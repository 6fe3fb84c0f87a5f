//! The left side of a product: rows as they are, normalised or gated, packed by the threads that need them.
//!
//! ```text
//! [m, k]  ──norm or gate──>  rows  ──round, interleave──>  packed [tile][depth][rows of the tile]
//! piece   up to 2048 columns of the rows of one tile, made as a whole by one thread
//! ```
//!
//! A thread that wants tiles makes those of their pieces that nobody has begun, and then waits for the ones that others
//! are at. So an operand is shared work without a barrier behind it, and rows are normed or gated where they are
//! packed. No order of additions depends on who makes what: a norm's sum is taken over its whole row by everyone who
//! needs it.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use crate::isa::Isa;
use crate::matmul::pack_row as pack_float_row;
#[cfg(target_arch = "x86_64")]
use crate::matmul::pack_row_in_blocks;
use crate::numerics::TILE_STEPS;
use crate::packed_matrix::WeightDtype;
use crate::pages::{Kept, lend};
use crate::product::Tiles;
use crate::quantized::{
    PackedFormat, lanes_per_row, lanes_per_row_in_blocks, pack_row as pack_quantized_row,
    pack_row_in_blocks as pack_quantized_row_in_blocks,
};
use crate::rms_norm::scale_of;
use crate::silu_mul::gate_row;
use crate::simd::vectorised;
use crate::workers::spin_until;

/// Columns of a piece: a multiple of every group that shares a scale, a fraction of a tile of a long row.
const PIECE_COLUMNS: usize = 2048;

/// Rows `[m, k]` of f32 to multiply.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// As they are.
    Rows(&'a [f32]),
    /// Each as [`rms_norm`](crate::rms_norm()) makes it.
    Normed {
        /// `[m, k]`
        x: &'a [f32],
        /// `[k]`
        weight: &'a [f32],
        /// Added to the mean square.
        eps: f32,
    },
    /// As [`silu_mul`](crate::silu_mul()) makes them of rows of gate and up `[m, 2 k]`.
    Gated(&'a [f32]),
    /// Rounded and packed by [`multiply_gated`](crate::multiply_gated) as they are to be multiplied: bits of pairs, `k`
    /// a multiple of 32.
    Packed(&'a [f32]),
}

impl Operand<'_> {
    /// Rows of `cols` values.
    ///
    /// Panics unless they are whole.
    pub(crate) fn num_rows(&self, cols: usize) -> usize {
        let (values, width) = match self {
            Operand::Rows(x) => (x, cols),
            Operand::Normed { x, weight, .. } => {
                assert_eq!(weight.len(), cols, "a norm of rows of {cols} values");
                (x, cols)
            }
            Operand::Gated(gate_up) => (gate_up, 2 * cols),
            Operand::Packed(pairs) => {
                assert!(cols.is_multiple_of(32), "packed rows of {cols} values: they are whole blocks of 32");
                (pairs, cols / 2)
            }
        };
        assert!(values.len().is_multiple_of(width), "{} values are not whole rows of {width}", values.len());
        values.len() / width
    }

    /// Some columns of a row of `cols`: where they lie, or made in `scratch`.
    #[inline(always)]
    fn columns<'s>(&'s self, row: usize, cols: usize, columns: Range<usize>, scratch: &'s mut [f32]) -> &'s [f32] {
        match *self {
            Operand::Rows(x) => &x[row * cols..][columns],
            Operand::Normed { x, weight, eps } => {
                let x = &x[row * cols..][..cols];
                let scale = scale_of(x, eps);
                let (x, weight, out) = (&x[columns.clone()], &weight[columns.clone()], &mut scratch[..columns.len()]);
                for i in 0..out.len() {
                    out[i] = x[i] * scale * weight[i];
                }
                out
            }
            Operand::Gated(gate_up) => {
                let (gate, up) = gate_up[row * 2 * cols..][..2 * cols].split_at(cols);
                let out = &mut scratch[..columns.len()];
                gate_row(&gate[columns.clone()], &up[columns], out);
                out
            }
            Operand::Packed(_) => unreachable!("has no pieces to make"),
        }
    }
}

/// How a matrix wants the rows it is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Packing {
    /// Rows of f32, one after the other: for the references.
    Rows,
    /// f32, or bf16 pairs in as many lanes.
    Float(WeightDtype, usize),
    /// bf16 pairs, 16 of each row side by side.
    Blocks,
    /// 8 bits with scales.
    Quantized(PackedFormat),
    /// The same, 32 or 64 of each row side by side.
    QuantizedBlocks(PackedFormat),
}

impl Packing {
    /// Lanes that a row of `cols`, or its first `cols`, takes.
    pub(crate) fn lanes_per_row(self, cols: usize) -> usize {
        match self {
            Packing::Rows | Packing::Float(WeightDtype::F32, _) => cols,
            Packing::Float(WeightDtype::Bf16, pair_lanes) => cols.div_ceil(2) * pair_lanes,
            Packing::Blocks => cols.div_ceil(2).next_multiple_of(TILE_STEPS),
            Packing::Quantized(format) => lanes_per_row(cols, format),
            Packing::QuantizedBlocks(format) => lanes_per_row_in_blocks(cols, format),
        }
    }

    /// Columns of a piece of rows of `cols`.
    pub(crate) fn piece_columns(self, cols: usize) -> usize {
        match self {
            // Their pieces would not lie in one place, or would not know their scale.
            Packing::Rows
            | Packing::Quantized(PackedFormat::Int8Row)
            | Packing::QuantizedBlocks(PackedFormat::Int8Row) => cols,
            _ => cols.min(PIECE_COLUMNS),
        }
    }

    /// Pieces of each tile of rows of `cols`.
    pub(crate) fn pieces_per_tile(self, cols: usize) -> usize {
        cols.div_ceil(self.piece_columns(cols))
    }
}

/// A piece that nobody has begun.
pub(crate) const UNTOUCHED: u8 = 0;
const BEGUN: u8 = 1;
const MADE: u8 = 2;
const FAILED: u8 = 3;

/// An operand on its way into the form of one matrix.
pub(crate) struct PackedOperand<'a> {
    pub(crate) operand: &'a Operand<'a>,
    pub(crate) isa: Isa,
    pub(crate) cols: usize,
    pub(crate) tiles: Tiles,
    pub(crate) packing: Packing,
    /// `lanes_per_row` of every row; only pieces that are made may be read.
    pub(crate) packed: *mut u32,
    /// Of every piece, `pieces_per_tile` of each tile.
    pub(crate) states: &'a [AtomicU8],
}

impl PackedOperand<'_> {
    /// Makes those of these pieces that nobody has begun, and waits for none.
    ///
    /// # Safety
    /// As of [`make`](Self::make).
    pub(crate) unsafe fn begin(&self, pieces: Range<usize>) {
        let per_tile = self.packing.pieces_per_tile(self.cols);
        for piece in pieces {
            let state = &self.states[piece];
            let is_ours = state.load(Ordering::Relaxed) == UNTOUCHED
                && state.compare_exchange(UNTOUCHED, BEGUN, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            if is_ours {
                let mut begun = Begun { state, end: FAILED };
                // SAFETY: this thread alone has claimed the piece.
                unsafe { self.make_piece(piece / per_tile, piece % per_tile) };
                begun.end = MADE;
            }
        }
    }

    /// Sees to it that these tiles can be read. False if another thread panicked while it made one of them.
    ///
    /// # Safety
    /// `packed` is valid for all rows, and only operands with the same `states` write there.
    pub(crate) unsafe fn make(&self, tiles: Range<usize>) -> bool {
        if matches!(self.operand, Operand::Packed(_)) {
            return true;
        }
        let per_tile = self.packing.pieces_per_tile(self.cols);
        let pieces = tiles.start * per_tile..tiles.end * per_tile;
        // SAFETY: as required of the caller.
        unsafe { self.begin(pieces.clone()) };
        self.states[pieces].iter().all(|state| {
            let is_over = || state.load(Ordering::Acquire) > BEGUN;
            // Its maker is running or will be: it holds nothing that it would have to wait for.
            while !spin_until(is_over) {
                thread::yield_now();
            }
            state.load(Ordering::Acquire) == MADE
        })
    }

    unsafe fn make_piece(&self, tile: usize, part: usize) {
        let (cols, isa, rows) = (self.cols, self.isa, self.tiles.rows(tile));
        let len = self.packing.piece_columns(cols);
        let columns = part * len..cols.min((part + 1) * len);
        let lanes = |cols: usize| if cols == 0 { 0 } else { self.packing.lanes_per_row(cols) };
        let start = rows.start * lanes(cols) + rows.len() * lanes(columns.start);
        let num_lanes = rows.len() * (lanes(columns.end) - lanes(columns.start));
        lend(&ROW, columns.len() * 4, |row| {
            // SAFETY: memory of this thread for as many values, initialised as pages are; and the piece's lanes of the
            // operand, which the caller has claimed.
            let (scratch, into) = unsafe {
                let scratch = std::slice::from_raw_parts_mut(row.cast::<f32>(), columns.len());
                (scratch, std::slice::from_raw_parts_mut(self.packed.add(start), num_lanes))
            };
            let piece = &Piece { operand: self.operand, cols, rows, columns, packing: self.packing };
            #[cfg(target_arch = "x86_64")]
            if self.packing == Packing::Blocks {
                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
                unsafe fn amx(piece: &Piece<'_>, scratch: &mut [f32], into: &mut [u32]) {
                    // SAFETY: as required of the caller.
                    unsafe { pack_piece_in_blocks(piece, scratch, into) }
                }
                // SAFETY: only instruction sets with tiles, which have these vectors, pack blocks.
                return unsafe { amx(piece, scratch, into) };
            }
            vectorised!(isa, pack_piece(piece: &Piece<'_>, scratch: &mut [f32], into: &mut [u32]));
        });
    }
}

thread_local! {
    /// Columns of one row on their way.
    static ROW: Kept = const { Cell::new(None) };
}

/// Says how it ended when it is over, so that nobody waits for what will not come.
struct Begun<'a> {
    state: &'a AtomicU8,
    end: u8,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        // Release: what was made is seen by whoever reads this.
        self.state.store(self.end, Ordering::Release);
    }
}

struct Piece<'a> {
    operand: &'a Operand<'a>,
    cols: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    packing: Packing,
}

#[inline(always)]
fn pack_piece(piece: &Piece<'_>, scratch: &mut [f32], into: &mut [u32]) {
    let (cols, num_rows) = (piece.cols, piece.rows.len());
    for (r, row) in piece.rows.clone().enumerate() {
        let values = piece.operand.columns(row, cols, piece.columns.clone(), scratch);
        match piece.packing {
            Packing::Rows => into[r * cols..][..cols].iter_mut().zip(values).for_each(|(into, x)| *into = x.to_bits()),
            Packing::Float(dtype, pair_lanes) => pack_float_row(values, dtype, pair_lanes, (r, num_rows), into),
            Packing::Blocks => unreachable!("blocks of pairs have a function of their own"),
            Packing::Quantized(format) => pack_quantized_row(values, cols, format, (r, num_rows), into),
            Packing::QuantizedBlocks(format) => pack_quantized_row_in_blocks(values, cols, format, (r, num_rows), into),
        }
    }
}

/// # Safety
/// The machine has AVX-512 and its bf16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn pack_piece_in_blocks(piece: &Piece<'_>, scratch: &mut [f32], into: &mut [u32]) {
    for (r, row) in piece.rows.clone().enumerate() {
        let values = piece.operand.columns(row, piece.cols, piece.columns.clone(), scratch);
        // SAFETY: as required of the caller.
        unsafe { pack_row_in_blocks(values, (r, piece.rows.len()), into) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::panic::{AssertUnwindSafe, catch_unwind};

    const COLS: usize = 4096;

    /// `act` on several threads with one operand of 12 rows in tiles of six, with these values; and what was packed.
    fn packed_by_several<T: Send>(x: &[f32], act: impl Fn(&PackedOperand<'_>) -> T + Sync) -> (Vec<T>, Vec<u32>) {
        const NUM_ROWS: usize = 12;
        struct Shared<'a>(PackedOperand<'a>);
        // SAFETY: pieces are written by whoever has claimed them.
        unsafe impl Sync for Shared<'_> {}
        let (operand, tiles) = (Operand::Rows(x), Tiles::of(NUM_ROWS, 6));
        let packing = Packing::Float(WeightDtype::F32, 1);
        let mut memory = vec![0; NUM_ROWS * COLS];
        let states: Vec<AtomicU8> = (0..4).map(|_| AtomicU8::new(UNTOUCHED)).collect();
        assert_eq!(tiles.count * packing.pieces_per_tile(COLS), states.len());
        let packed = memory.as_mut_ptr();
        let isa = Isa::detect();
        let shared =
            &Shared(PackedOperand { operand: &operand, isa, cols: COLS, tiles, packing, packed, states: &states });
        let act = &act;
        let ends = thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(move || {
                        let Shared(operand) = shared;
                        act(operand)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        (ends, memory)
    }

    #[test]
    fn every_piece_is_made_once_and_seen_by_all() {
        let x: Vec<f32> = (0..12 * COLS).map(|i| i as f32).collect();
        // SAFETY: memory for all rows, and one set of states.
        let (ends, packed) = packed_by_several(&x, |operand| unsafe { operand.make(0..2) });
        assert_eq!(ends, [true; 3]);
        for (i, value) in packed.iter().enumerate() {
            let (tile, depth, row) = (i / (6 * COLS), i % (6 * COLS) / 6, i % 6);
            assert_eq!(f32::from_bits(*value), x[(tile * 6 + row) * COLS + depth], "lane {i}");
        }
    }

    #[test]
    fn panic_of_who_makes_a_piece_is_told_to_all_who_wait_for_it() {
        // The last rows are missing.
        let x = vec![1.0; 11 * COLS];
        let (ends, _) = packed_by_several(&x, |operand| {
            // SAFETY: memory for all rows, and one set of states.
            catch_unwind(AssertUnwindSafe(|| unsafe { operand.make(0..2) })).ok()
        });
        assert!(ends.iter().all(|end| *end != Some(true)), "{ends:?}");
        assert!(ends.iter().any(Option::is_none) && ends.contains(&Some(false)), "{ends:?}");
    }
}
