//! The arithmetic of Tandem on CPUs: one operation per file, nothing of models, requests or networks.
//!
//! Every operation is a trio. The scalar reference in its file is the specification, down to the order of
//! additions; the fast versions (AVX-512 with and without `vdpbf16ps` and `vpdpbusd`, AVX2 with FMA) give the same
//! bits; one parity test per operation compares them. Processors with tile registers add products of bf16 up in another
//! order, which has a reference of its own. [`numerics`] states all orders on one page. An output row
//! depends on its own inputs and its absolute position alone, never on the batch, the chunk, the number of
//! threads or, within an order, the instruction set.
//!
//! What this crate does not do: it knows no model, no block manager and no configuration. Who may write
//! which bytes of the KV arena when is decided by the block manager, see [`arena`].
//!
//! A step goes through it in this order; so can a reader:
//! - [`numerics`]: the orders of all reductions, `exp`, `ln`, rounding to bf16.
//! - [`isa`]: which instruction sets the machine has; `amx`: its tiles, `tile_product`:
//!   products in these; [`workers`]: the pool of threads.
//! - [`packed_matrix`], [`matmul`](mod@matmul): weights in panels and the product with them; [`quantized`]: the
//!   same with weights of 4, 6 and 8 bits. [`product`], with [`operand`]: the job around both, from the rows that are
//!   normed or gated on the way to what is done with finished columns; [`qkv`]: that with heads.
//! - [`embed`](mod@embed), [`rms_norm`](mod@rms_norm), [`rope`](mod@rope), [`silu_mul`](mod@silu_mul),
//!   [`add`](mod@add): the row-wise operations.
//! - [`arena`], [`kv_layout`], [`kv_write`](mod@kv_write), [`attention`](mod@attention): the paged KV pool and
//!   attention over it.
//! - [`granule`]: KV of a pool of another order or type.
//! - `cuda`, with the feature of that name: GPUs, and the kernels of `kernels/cuda` on them.
//! - [`uniform`](mod@uniform), [`sample`](mod@sample), with `draw` and `lanes`: from logits to a token.
//! - [`limits`]: what the machine can do at most, which speeds are held against.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod add;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod arena;
pub mod attention;
pub mod ctx;
pub mod cuda;
mod draw;
pub mod embed;
pub mod granule;
pub mod isa;
pub mod kv_layout;
pub mod kv_write;
mod lanes;
pub mod limits;
pub mod matmul;
pub mod numerics;
pub mod operand;
pub mod packed_matrix;
mod pages;
pub mod product;
pub mod qkv;
pub mod quantized;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod silu_mul;
mod simd;
#[cfg(target_arch = "x86_64")]
mod tile_product;
pub mod uniform;
pub mod workers;

pub use add::add;
pub use arena::KvArena;
pub use attention::{AttentionParams, QueryBatch, QuerySpan, attention};
pub use ctx::{Columns, Ctx};
pub use embed::{embed, embed_quantized};
pub use granule::{GranuleFormat, GranuleOrder, convert_granules};
pub use isa::{Isa, IsaError};
pub use kv_layout::{GRANULE_TOKENS, KvDtype, KvLayout};
pub use kv_write::kv_write;
pub use matmul::matmul;
pub use numerics::Order;
pub use operand::Operand;
pub use packed_matrix::{PackedMatrix, WeightDtype, Weights};
pub use product::{MatrixRef, Product, SECTIONS_MAX, multiply, multiply_gated};
pub use qkv::{Qkv, qkv_rope_write};
pub use quantized::{Mins, PackError, PackedFormat, QuantizedMatrix, QuantizedWeights, matmul_quantized};
pub use rms_norm::{rms_norm, rms_norm_heads};
pub use rope::{RopeTable, rope};
pub use sample::{SampleParams, Sampled, TokenCount, sample_row};
pub use silu_mul::silu_mul;
pub use uniform::uniform;
pub use workers::{Priority, WorkerPool};
