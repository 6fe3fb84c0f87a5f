//! What every operation is given beside its operands: threads, instruction set and priority.

#![allow(unsafe_code)]

use crate::isa::Isa;
use crate::workers::{Priority, WorkerPool};

/// Where and how an operation runs. It never changes a result.
#[derive(Clone, Copy)]
pub struct Ctx<'a> {
    /// The threads that share the work; the calling thread takes part.
    pub pool: &'a WorkerPool,
    /// The instruction set of the inner loops.
    pub isa: Isa,
    /// Decode steps go before prefill chunks when both wait for the same threads.
    pub priority: Priority,
}

/// Some columns of a wider row-major matrix: `width` (known to the operation) values of each row, from
/// column `first` on, rows `stride` values apart. Lets operations work inside a fused q/k/v product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// First column of the view.
    pub first: usize,
    /// Values from one row's start to the next.
    pub stride: usize,
}

impl Columns {
    /// All columns of a matrix `width` values wide.
    pub fn all(width: usize) -> Self {
        Columns { first: 0, stride: width }
    }

    /// The values of row `row`, `width` of them.
    pub(crate) fn row<'x>(&self, data: &'x [f32], row: usize, width: usize) -> &'x [f32] {
        let start = row * self.stride + self.first;
        &data[start..start + width]
    }

    /// Panics unless `data` holds `rows` rows of which the view takes `width` columns.
    pub(crate) fn check(&self, what: &str, data: &[f32], rows: usize, width: usize) {
        assert!(
            self.first + width <= self.stride,
            "{what}: columns {}..{} do not fit rows of {} values",
            self.first,
            self.first + width,
            self.stride
        );
        assert!(
            data.len() >= rows * self.stride,
            "{what}: {} values given, {rows} rows of {} expected",
            data.len(),
            self.stride
        );
    }
}

/// Values that one tile of a row-wise operation covers at least: a few microseconds of work.
const TILE_VALUES: usize = 16 << 10;

/// Calls `rows(first_row, some whole rows)` over all of `x` `[m, stride]`, in tiles over the pool where it is
/// worth it.
pub(crate) fn for_rows(ctx: &Ctx<'_>, x: &mut [f32], stride: usize, rows: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    struct Shared(*mut f32);
    // SAFETY: tiles take disjoint parts of `x`, which this call borrows exclusively.
    unsafe impl Sync for Shared {}
    if stride == 0 {
        return;
    }
    let num_rows = x.len() / stride;
    let rows_per_tile = (TILE_VALUES / stride).max(1);
    if num_rows <= rows_per_tile {
        return rows(0, &mut x[..num_rows * stride]);
    }
    let shared = &Shared(x.as_mut_ptr());
    ctx.pool.run(ctx.priority, num_rows.div_ceil(rows_per_tile), &|tile| {
        let first = tile * rows_per_tile;
        let count = rows_per_tile.min(num_rows - first);
        // SAFETY: rows first..first + count of `x`, which no other tile touches.
        rows(first, unsafe { std::slice::from_raw_parts_mut(shared.0.add(first * stride), count * stride) });
    });
}
