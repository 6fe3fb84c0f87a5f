//! Gated rows on their way into the operand of the product behind them.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use crate::numerics::TILE_STEPS;
#[cfg(target_arch = "x86_64")]
use crate::packed_matrix::PANEL;
#[cfg(target_arch = "x86_64")]
use crate::silu_mul::gate_row;
#[cfg(target_arch = "x86_64")]
use crate::simd::Avx512Bf16;

/// Gate and up of some columns of a tile's rows, on their way into its blocks.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) struct GatedColumns {
    /// Of each row `num_columns`, whole panels, `stride` values to the next.
    pub(crate) gate: *const f32,
    pub(crate) up: *const f32,
    pub(crate) stride: usize,
    pub(crate) num_rows: usize,
    pub(crate) num_columns: usize,
    /// `[num_columns / 32][num_rows][16]` pairs.
    pub(crate) into: *mut u32,
}

impl GatedColumns {
    /// Gates, rounds and packs.
    ///
    /// # Safety
    /// The pointers are valid for what is said, and nobody else is at `into`; the machine has tiles.
    pub(crate) unsafe fn pack(&self) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
            unsafe fn amx(columns: &GatedColumns) {
                let &GatedColumns { gate, up, stride, num_rows, num_columns, into } = columns;
                let mut gated = [0.0; PANEL];
                for row in 0..num_rows {
                    for column in (0..num_columns).step_by(PANEL) {
                        let at = row * stride + column;
                        // SAFETY: as required of the caller; 32 columns are 16 pairs.
                        unsafe {
                            let gate = std::slice::from_raw_parts(gate.add(at), PANEL);
                            gate_row(gate, std::slice::from_raw_parts(up.add(at), PANEL), &mut gated);
                            let into = into.add(column / PANEL * num_rows * TILE_STEPS + row * TILE_STEPS);
                            Avx512Bf16::store_pairs(into, gated.as_ptr());
                        }
                    }
                }
            }
            // SAFETY: what has tiles has these.
            unsafe { amx(self) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no other machine has tiles");
    }
}
