//! Products with weights of 4, 6 or 8 bits.
//!
//! ```text
//! checkpoint ──loader──> QuantizedWeights ──pack──> QuantizedMatrix ──matmul_quantized──> f32
//!                        (one logical form)         (one of few panel formats)
//! ```
//!
//! A weight is `scale * (code - offset) - min`, a code being a small unsigned integer, a scale shared by a
//! group of consecutive k. Activations are quantized to 8 bits per token and 32 k, so the products inside a
//! group are integers and their sum is exact in whatever order an instruction set adds; only the scales are
//! f32, and their order is in [`numerics`](crate::numerics). So all instruction sets of one order give the same bits.
//!
//! Where the processor has tile registers, weights of 8 bits with a scale for 32 are opened to bf16 instead, and
//! multiplied as such: sums of a group would have to leave the tile for their scale.
//!
//! - `weights`: the logical form. `packed`: panels, one layout for every batch size.
//! - `activations`: f32 rows to 8 bits. `product`: the matrix product; `tiles`: its fast version; `panels`: how that
//!   reads each layout; `blocks`: what is taken apart once for many tiles; `simd`: its instructions; `amx`: the same in
//!   tile registers; `opening`: weights to bf16.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod opening;
mod packed;
#[cfg(target_arch = "x86_64")]
mod panels;
mod product;
#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod weights;

pub(crate) use activations::{lanes_per_row, lanes_per_row_in_blocks, pack_row, pack_row_in_blocks};
pub use packed::{PackedFormat, QuantizedMatrix};
pub use product::matmul_quantized;
pub(crate) use product::{compute, multiplies_tiles, tile_rows};
#[cfg(target_arch = "x86_64")]
pub(crate) use simd::dot_in_registers;
pub use weights::{Mins, PackError, QuantizedWeights};
