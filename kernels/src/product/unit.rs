//! What a unit of a product computes with, and where its sums go.
#![allow(unsafe_code)]

use super::cut::Tiles;
use crate::numerics::LANES;
use crate::simd::Simd;

/// What a unit computes with.
pub(crate) struct Job<'a, W> {
    /// The packed operand; tile t starts at `first_row(t) * lanes_per_row`.
    pub(crate) a: *const u32,
    pub(crate) lanes_per_row: usize,
    pub(crate) tiles: Tiles,
    pub(crate) w: &'a W,
    pub(crate) out: Output<'a>,
    /// Weights that this thread will most likely read next; null where nobody knows.
    pub(crate) next: *const u32,
}

impl<W> Job<'_, W> {
    /// A row of `cols` values of an operand of [`Packing::Rows`].
    ///
    /// # Safety
    /// It is one, and the row's tile is made.
    pub(crate) unsafe fn row(&self, row: usize, cols: usize) -> &[f32] {
        // SAFETY: as required of the caller.
        unsafe { std::slice::from_raw_parts(self.a.cast::<f32>().add(row * cols), cols) }
    }
}

/// The specification of the end: bias, then residual.
#[inline(always)]
fn finish(mut y: f32, bias: Option<f32>, residual: Option<f32>) -> f32 {
    if let Some(bias) = bias {
        y += bias;
    }
    residual.map_or(y, |residual| residual + y)
}

/// Where a product goes: rows `stride` values apart, `width` columns in all, and what is added at the end.
pub(crate) struct Output<'a> {
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) add: bool,
    /// Where the row and column `first` go.
    pub(crate) start: *mut f32,
    pub(crate) first: (usize, usize),
    pub(crate) stride: usize,
    pub(crate) width: usize,
}

impl Output<'_> {
    /// Where a row and column go.
    ///
    /// # Safety
    /// `start` is valid for them.
    #[inline(always)]
    pub(crate) unsafe fn place(&self, row: usize, column: usize) -> *mut f32 {
        let (first_row, first_column) = self.first;
        // SAFETY: as required of the caller.
        unsafe { self.start.add((row - first_row) * self.stride + column - first_column) }
    }

    /// Ends one output in the specified order.
    ///
    /// # Safety
    /// `start` is valid for this row and column, which nobody else touches.
    pub(crate) unsafe fn put(&self, row: usize, column: usize, y: f32) {
        // SAFETY: as required of the caller.
        unsafe {
            let out = self.place(row, column);
            *out = finish(y, self.bias.map(|bias| bias[column]), self.add.then(|| *out));
        }
    }

    /// Ends 16 outputs from `column` on; those beyond the width are dropped.
    ///
    /// # Safety
    /// As for [`put`](Self::put), and the machine has the instruction set.
    #[inline(always)]
    pub(crate) unsafe fn put_lanes<S: Simd>(&self, row: usize, column: usize, mut y: S::V) {
        // SAFETY: as required of the caller; stores stay in columns below the width.
        unsafe {
            if column + LANES <= self.width {
                let out = self.place(row, column);
                if let Some(bias) = self.bias {
                    y = S::add(y, S::load(bias.as_ptr().add(column)));
                }
                if self.add {
                    y = S::add(S::load(out), y);
                }
                S::store(out, y);
            } else if column < self.width {
                let mut values = [0.0f32; LANES];
                S::store(values.as_mut_ptr(), y);
                self.put_some(row, column, &values[..self.width - column]);
            }
        }
    }

    /// Ends a few outputs. Not inlined: loops over whole vectors keep what they need in registers.
    ///
    /// # Safety
    /// As for [`put`](Self::put), each.
    #[cold]
    #[inline(never)]
    unsafe fn put_some(&self, row: usize, column: usize, values: &[f32]) {
        for (i, &y) in values.iter().enumerate() {
            // SAFETY: as required of the caller.
            unsafe { self.put(row, column + i, y) };
        }
    }
}
