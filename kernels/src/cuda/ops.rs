//! The kernels as functions: one each, with the arguments, grid and shared memory that stand on top of its file.
//!
//! Buffers are checked against the shapes: as many rows, positions and entries as are stated. What lies in them on the
//! device (block tables, slots, ids, rows) cannot be seen here: it names nothing beyond what is stated, which is the
//! caller's to have right, as it is on top of each kernel's file. Everything happens on [`Lane::Compute`] but
//! [`clear_blocks`] and [`copy_blocks`], which the owner of the pool calls between steps.
#![allow(unsafe_code)]

use super::device::{Args, BoxedTensor, Buffer, DeviceError, Lane, Launch, Product, TensorMap, as_bytes};
use crate::kv_layout::{GRANULE_TOKENS, KvDtype, KvLayout};

/// Type of operands, of stored KV and of what attention takes and gives.
pub type Dtype = KvDtype;

/// Instead of a row or a slot: an entry that only pads a list to a length that was fixed before (`NOTHING` of
/// device.cuh). [`rope_kv_write`] takes it as a slot, [`attention_plain`] and [`attention_decode`] as a row.
pub const NOTHING: u32 = u32::MAX;
/// Rows up to which [`skinny_matmul`] is made for.
pub const SKINNY_ROWS_MAX: usize = 16;
/// Positions after which decode attention splits.
pub const PART_TOKENS: usize = 512;
/// Rows of one tile of prefill attention.
pub const PREFILL_ROWS: usize = 64;

/// Some of a buffer: what begins at `offset` bytes.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    buffer: &'a Buffer,
    offset: usize,
}

impl<'a> Part<'a> {
    /// From `offset` bytes on.
    pub fn new(buffer: &'a Buffer, offset: usize) -> Self {
        Self { buffer, offset }
    }

    pub(super) fn at(&self, num_bytes: usize) -> u64 {
        self.buffer.at(self.offset, num_bytes)
    }
}

impl<'a> From<&'a Buffer> for Part<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Self { buffer, offset: 0 }
    }
}

/// What a layer of attention in a step fixes; how many KV heads and what type is in the pool's layout.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Layer of the pool.
    pub layer: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Positions that a query sees; 0: all.
    pub window: u32,
    /// Rows of the queries and of what comes out: those of the step, of which a kernel may take some.
    pub num_rows: usize,
}

/// The pool: its bytes and how they lie. Inside a head a token's features are contiguous, see
/// `kernels/cuda/kv_layout.cuh`; down to there it is [`KvLayout`].
#[derive(Debug, Clone, Copy)]
pub struct Pool<'a> {
    /// Its bytes.
    pub buffer: &'a Buffer,
    /// Their order.
    pub layout: &'a KvLayout,
}

impl Pool<'_> {
    fn address(&self) -> u64 {
        self.buffer.at(0, self.layout.total_bytes())
    }

    /// As attention_prefill_hopper.cu takes it: lines of a head of a granule, K and V planes' heads, granules.
    fn tensor_map(&self) -> Result<TensorMap, DeviceError> {
        let KvLayout { num_layers, num_blocks, block_size, num_kv_heads, head_dim, .. } = *self.layout;
        let num_granules = num_layers * num_blocks * (block_size / GRANULE_TOKENS);
        // A copy brings a tile's positions, or what of them is sure to lie in one block.
        let box_granules = [4, 2, 1].into_iter().find(|granules| block_size.is_multiple_of(granules * GRANULE_TOKENS));
        let dims = [head_dim, GRANULE_TOKENS, 2 * num_kv_heads, num_granules].map(|size| size as u64);
        let box_dims = [64, GRANULE_TOKENS as u32, 1, box_granules.expect("blocks are whole granules") as u32];
        self.buffer.device().tensor_map(&BoxedTensor { address: self.address(), dims, box_dims })
    }

    /// `KvShape` of kv_layout.cuh.
    fn shape(&self) -> [u32; 4] {
        let KvLayout { num_blocks, block_size, num_kv_heads, head_dim, .. } = *self.layout;
        [num_blocks, block_size, num_kv_heads, head_dim].map(|size| size as u32)
    }

    /// `AttentionJob` of attention_job.cuh.
    fn job(&self, shape: &AttentionShape) -> [u32; 9] {
        let [blocks, size, heads, dim] = self.shape();
        let AttentionShape { layer, num_heads, scale, window, .. } = *shape;
        assert!(layer < self.layout.num_layers, "layer {layer} of {}", self.layout.num_layers);
        [blocks, size, heads, dim, layer as u32, num_heads as u32, scale.to_bits(), 0f32.to_bits(), window]
    }
}

fn named(dtype: Dtype, f32: &'static str, bf16: &'static str) -> &'static str {
    match dtype {
        Dtype::F32 => f32,
        Dtype::Bf16 => bf16,
    }
}

pub(super) fn launch(
    on: &Buffer,
    lane: Lane,
    kernel: &'static str,
    grid: [usize; 3],
    threads: u32,
    shared_bytes: usize,
    args: &Args,
) -> Result<(), DeviceError> {
    let grid = grid.map(|blocks| u32::try_from(blocks).expect("grids of a step fit 32 bits"));
    if grid.contains(&0) {
        return Ok(()); // nothing to do, and the driver would refuse it
    }
    let launch = Launch { kernel, grid, threads, shared_bytes: shared_bytes as u32, args };
    // SAFETY: each function below hands over what is on top of its kernel's file and has checked that the buffers
    // hold the stated rows, positions and entries; that what is in them names no others is the agreement of the
    // module with its callers, which lay out these arrays from a checked plan.
    unsafe { on.device().launch(lane, &launch) }
}

/// `out` f32 `[rows, width]` = rows of `table` `[_, width]` named by `ids`; an id with its highest bit set names
/// an entry of `drawn`.
///
/// # Errors
/// What the device says.
pub fn embed(
    table: &Buffer,
    dtype: Dtype,
    ids: Part<'_>,
    drawn: Option<&Buffer>,
    out: &Buffer,
    rows: usize,
    width: usize,
) -> Result<(), DeviceError> {
    let args = Args::default()
        .address(table.at(0, width * dtype.size()))
        .address(ids.at(rows * 4))
        .address(drawn.map_or(0, |drawn| drawn.at(0, 4)))
        .address(out.at(0, rows * width * 4))
        .u32(width);
    launch(out, Lane::Compute, named(dtype, "embed_f32", "embed_bf16"), [rows, 1, 1], 256, 0, &args)
}

/// `out` `[rows, width]` in `dtype` = rows of `x` f32, normalised and times `weight`.
///
/// # Errors
/// What the device says.
pub fn rms_norm(
    x: &Buffer,
    weight: &Buffer,
    eps: f32,
    out: &Buffer,
    dtype: Dtype,
    rows: usize,
    width: usize,
) -> Result<(), DeviceError> {
    let args = Args::default()
        .address(x.at(0, rows * width * 4))
        .address(weight.at(0, width * 4))
        .f32(eps)
        .address(out.at(0, rows * width * dtype.size()))
        .u32(width);
    launch(x, Lane::Compute, named(dtype, "rms_norm_f32", "rms_norm_bf16"), [rows, 1, 1], 256, 0, &args)
}

/// Norms of heads and angles of [`rope_kv_write`].
#[derive(Debug, Clone, Copy)]
pub struct HeadWeights<'a> {
    /// f32 `[head_dim]` for queries and for keys, if the model has such norms.
    pub norms: Option<(&'a Buffer, &'a Buffer)>,
    /// What is added to the mean square.
    pub eps: f32,
    /// One behind the largest position of the step.
    pub num_positions: usize,
    /// f32 `[at least num_positions, rotated_dim / 2]`
    pub cosines: &'a Buffer,
    /// Likewise.
    pub sines: &'a Buffer,
    /// Features that turn.
    pub rotated_dim: usize,
}

/// Heads of `qkv` f32 `[rows, q | k | v]` normalised and rotated: queries to `q_out` in the pool's type, keys and
/// values to their slots of `layer`.
///
/// # Errors
/// What the device says.
#[allow(clippy::too_many_arguments, reason = "the kernel's own")]
pub fn rope_kv_write(
    pool: Pool<'_>,
    layer: usize,
    num_q_heads: usize,
    weights: &HeadWeights<'_>,
    qkv: &Buffer,
    positions: Part<'_>,
    slots: Part<'_>,
    q_out: &Buffer,
    rows: usize,
) -> Result<(), DeviceError> {
    let KvLayout { num_kv_heads, head_dim, dtype, .. } = *pool.layout;
    let heads = num_q_heads + 2 * num_kv_heads;
    let [blocks, size, kv_heads, dim] = pool.shape();
    let fields = [layer as u32, num_q_heads as u32, weights.rotated_dim as u32, weights.eps.to_bits()];
    let job = [blocks, size, kv_heads, dim, fields[0], fields[1], fields[2], fields[3]];
    let (q_norm, k_norm) = match weights.norms {
        Some((q, k)) => (q.at(0, head_dim * 4), k.at(0, head_dim * 4)),
        None => (0, 0),
    };
    assert!(layer < pool.layout.num_layers, "layer {layer} of {}", pool.layout.num_layers);
    let angles = weights.num_positions * (weights.rotated_dim / 2 * 4);
    let args = Args::default()
        .fields(job)
        .address(qkv.at(0, rows * heads * head_dim * 4))
        .address(q_norm)
        .address(k_norm)
        .address(weights.cosines.at(0, angles))
        .address(weights.sines.at(0, angles))
        .address(positions.at(rows * 4))
        .address(slots.at(rows * 4))
        .address(q_out.at(0, rows * num_q_heads * head_dim * dtype.size()))
        .address(pool.address());
    let kernel = named(dtype, "rope_kv_write_f32", "rope_kv_write_bf16");
    launch(qkv, Lane::Compute, kernel, [rows, heads.div_ceil(4), 1], 128, 0, &args)
}

/// Attention of `num_rows` rows, each named by an entry of `rows` (row, position, start of its block table), in
/// any type and size of heads.
///
/// # Errors
/// What the device says.
pub fn attention_plain(
    pool: Pool<'_>,
    shape: &AttentionShape,
    q: &Buffer,
    rows: Part<'_>,
    num_rows: usize,
    block_tables: Part<'_>,
    out: &Buffer,
) -> Result<(), DeviceError> {
    let args = attention_args(pool, shape, q, rows.at(num_rows * 12), block_tables, out);
    let kernel = named(pool.layout.dtype, "attention_plain_f32", "attention_plain_bf16");
    launch(q, Lane::Compute, kernel, [num_rows, shape.num_heads, 1], 128, 0, &args)
}

/// Of a kernel that attends to what `list` names, without sinks.
fn attention_args(
    pool: Pool<'_>,
    shape: &AttentionShape,
    q: &Buffer,
    list: u64,
    block_tables: Part<'_>,
    out: &Buffer,
) -> Args {
    Args::default()
        .fields(pool.job(shape))
        .address(q.at(0, all_rows_bytes(pool, shape)))
        .address(pool.address())
        .address(list)
        .address(block_tables.at(4))
        .address(0)
        .address(out.at(0, all_rows_bytes(pool, shape)))
}

/// Of the queries of a step, and of what comes out.
fn all_rows_bytes(pool: Pool<'_>, shape: &AttentionShape) -> usize {
    shape.num_rows * shape.num_heads * pool.layout.head_dim * pool.layout.dtype.size()
}

/// Which kernels on tensor cores a device has for a kind of KV. [`attention_plain`] is there for any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionKernels {
    /// [`attention_prefill`]; only where there is the other too.
    pub has_prefill: bool,
    /// [`attention_decode`]
    pub has_decode: bool,
}

impl AttentionKernels {
    /// For KV in `dtype` with heads of `head_dim` features, where blocks of threads have
    /// [at most so much](super::Device::shared_bytes_max) shared memory. Compute capabilities 8.6, 8.9 and 12.x have
    /// 99 KiB: too little for prefill with heads of 128, and for decode with heads of 256.
    pub fn of(dtype: Dtype, head_dim: usize, shared_bytes_max: usize) -> Self {
        let fits = |dynamic: usize| dynamic + ATTENTION_STATIC_BYTES_MAX <= shared_bytes_max;
        let is_bf16 = dtype == Dtype::Bf16;
        Self {
            has_prefill: is_bf16 && matches!(head_dim, 64 | 128) && fits(prefill_shared(head_dim)),
            has_decode: is_bf16 && matches!(head_dim, 64 | 128 | 256) && fits(decode_shared(head_dim)),
        }
    }
}

/// Which kernel computes the attention of chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefillKernel {
    /// attention_prefill.cu
    Portable,
    /// attention_prefill_hopper.cu
    Hopper,
}

impl PrefillKernel {
    /// Of a block, for heads that there is a kernel for.
    pub fn shared_bytes(self, head_dim: usize) -> usize {
        match self {
            PrefillKernel::Portable => prefill_shared(head_dim),
            PrefillKernel::Hopper => hopper_shared(head_dim),
        }
    }
}

/// The arrays of fixed size in both kernels take less.
const ATTENTION_STATIC_BYTES_MAX: usize = 4 << 10;

/// `PREFILL_SHARED` of attention_prefill.cu.
fn prefill_shared(head_dim: usize) -> usize {
    head_dim * (64 * 2 + 2 * 2 * 64 * 2 + 64 * 4)
}

/// `HOPPER_SHARED` of attention_prefill_hopper.cu.
fn hopper_shared(head_dim: usize) -> usize {
    1024 + (2 + 2 * 4) * 64 * head_dim * 2 + (4 * 4 + 3) * 8
}

/// `DECODE_SHARED` of attention_decode.cu.
fn decode_shared(head_dim: usize) -> usize {
    head_dim * (16 * 2 + 2 * 2 * 64 * 2)
}

/// Attention of tiles of consecutive rows (first row, rows, first position, start of the block table).
///
/// # Errors
/// What the device says.
///
/// # Panics
/// If there is [no such kernel](AttentionKernels) for heads of this size.
#[allow(clippy::too_many_arguments, reason = "the kernel's own, and which kernel")]
pub fn attention_prefill(
    kernel: PrefillKernel,
    pool: Pool<'_>,
    shape: &AttentionShape,
    q: &Buffer,
    tiles: Part<'_>,
    num_tiles: usize,
    block_tables: Part<'_>,
    out: &Buffer,
) -> Result<(), DeviceError> {
    let (dim, kv_heads) = (pool.layout.head_dim, pool.layout.num_kv_heads);
    let name = match (kernel, dim) {
        (PrefillKernel::Portable, 64) => "attention_prefill_64",
        (PrefillKernel::Portable, 128) => "attention_prefill_128",
        (PrefillKernel::Hopper, 64) => "attention_prefill_hopper_64",
        (PrefillKernel::Hopper, 128) => "attention_prefill_hopper_128",
        _ => panic!("prefill attention on tensor cores has no kernel for heads of {dim}"),
    };
    let (tiles, shared_bytes) = (tiles.at(num_tiles * 16), kernel.shared_bytes(dim));
    match kernel {
        PrefillKernel::Portable => {
            let args = attention_args(pool, shape, q, tiles, block_tables, out);
            launch(q, Lane::Compute, name, [num_tiles, shape.num_heads, 1], 128, shared_bytes, &args)
        }
        PrefillKernel::Hopper => {
            let args = Args::default()
                .fields(pool.job(shape))
                .address(q.at(0, all_rows_bytes(pool, shape)))
                .tensor_map(&pool.tensor_map()?, pool.address())
                .address(tiles)
                .address(block_tables.at(4))
                .address(0)
                .address(out.at(0, all_rows_bytes(pool, shape)));
            let pairs = (shape.num_heads / kv_heads).div_ceil(2);
            launch(q, Lane::Compute, name, [num_tiles, kv_heads * pairs, 1], 384, shared_bytes, &args)
        }
    }
}

/// Parts of single rows for [`attention_decode`]. All rows' units are in one list, those of a row in a row.
#[derive(Debug, Clone, Copy)]
pub struct DecodeParts<'a> {
    /// (row, position, start of the block table, part)
    pub units: Part<'a>,
    /// How many.
    pub num_units: usize,
    /// (row, first unit, how many)
    pub rows: Part<'a>,
    /// How many.
    pub num_rows: usize,
    /// At least [`partial_bytes`] bytes, used by nobody else in this order.
    pub partials: &'a Buffer,
}

/// Memory that decode attention needs between its two kernels.
pub fn partial_bytes(num_units: usize, num_heads: usize, head_dim: usize) -> usize {
    num_units * num_heads * (head_dim + 2) * 4
}

/// Attention of single rows, split over their keys, and the merge of the parts.
///
/// # Errors
/// What the device says.
///
/// # Panics
/// If there is [no such kernel](AttentionKernels) for heads of this size.
pub fn attention_decode(
    pool: Pool<'_>,
    shape: &AttentionShape,
    q: &Buffer,
    parts: &DecodeParts<'_>,
    block_tables: Part<'_>,
    out: &Buffer,
) -> Result<(), DeviceError> {
    let (dim, kv_heads) = (pool.layout.head_dim, pool.layout.num_kv_heads);
    let (decode, merge) = match dim {
        64 => ("attention_decode_64", "attention_merge_64"),
        128 => ("attention_decode_128", "attention_merge_128"),
        256 => ("attention_decode_256", "attention_merge_256"),
        _ => panic!("decode attention on tensor cores has no kernel for heads of {dim}"),
    };
    let acc_bytes = parts.num_units * shape.num_heads * dim * 4;
    let acc = parts.partials.at(0, acc_bytes);
    let state = parts.partials.at(acc_bytes, parts.num_units * shape.num_heads * 8);
    let args = Args::default()
        .fields(pool.job(shape))
        .address(q.at(0, all_rows_bytes(pool, shape)))
        .address(pool.address())
        .address(parts.units.at(parts.num_units * 16))
        .address(block_tables.at(4))
        .address(acc)
        .address(state);
    let grid = [parts.num_units, kv_heads, (shape.num_heads / kv_heads).div_ceil(16)];
    launch(q, Lane::Compute, decode, grid, 128, decode_shared(dim), &args)?;
    let args = Args::default()
        .address(acc)
        .address(state)
        .address(parts.rows.at(parts.num_rows * 12))
        .address(0)
        .address(out.at(0, all_rows_bytes(pool, shape)))
        .u32(shape.num_heads);
    launch(q, Lane::Compute, merge, [parts.num_rows, shape.num_heads, 1], 64, 0, &args)
}

/// `out` `[rows, ffn]` in `dtype` = silu(gate) * up, from f32 rows of gate and up side by side.
///
/// # Errors
/// What the device says.
pub fn silu_mul(gate_up: &Buffer, out: &Buffer, dtype: Dtype, rows: usize, ffn: usize) -> Result<(), DeviceError> {
    let args = Args::default()
        .address(gate_up.at(0, rows * 2 * ffn * 4))
        .address(out.at(0, rows * ffn * dtype.size()))
        .u32(ffn);
    let grid = [rows, ffn.div_ceil(1024), 1];
    launch(out, Lane::Compute, named(dtype, "silu_mul_f32", "silu_mul_bf16"), grid, 256, 0, &args)
}

/// The shapes of a product: `out[m, n] = x[m, k] w[n, k]^T`, with bias, and added to what is there, if said.
#[derive(Debug, Clone, Copy)]
pub struct Multiply<'a> {
    /// `[m, k]`
    pub x: &'a Buffer,
    /// `[n, k]`
    pub w: &'a Buffer,
    /// f32 `[n]`
    pub bias: Option<&'a Buffer>,
    /// f32 `[m, n]`
    pub out: &'a Buffer,
    /// Rows.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// Whether `out` is added to.
    pub add: bool,
}

impl Multiply<'_> {
    /// Addresses of buffers that were checked, operands of `size` bytes a value.
    fn product(&self, size: usize) -> Product {
        let Self { m, n, k, add, .. } = *self;
        Product {
            x: self.x.at(0, m * k * size),
            w: self.w.at(0, n * k * size),
            bias: self.bias.map_or(0, |bias| bias.at(0, n * 4)),
            out: self.out.at(0, m * n * 4),
            m,
            n,
            k,
            add,
        }
    }

    fn args(&self, size: usize) -> Args {
        let Product { x, w, bias, out, m, n, k, add } = self.product(size);
        Args::default().address(x).address(w).address(bias).address(out).u32(m).u32(n).u32(k).u32(usize::from(add))
    }
}

/// The product in f32.
///
/// # Errors
/// What the device says.
pub fn plain_matmul(multiply: &Multiply<'_>) -> Result<(), DeviceError> {
    let grid = [multiply.n.div_ceil(32), multiply.m.div_ceil(8), 1];
    launch(multiply.out, Lane::Compute, "plain_matmul_f32", grid, 256, 0, &multiply.args(4))
}

/// The product of bf16 operands, made for [`SKINNY_ROWS_MAX`] rows. `k` is a multiple of 8.
///
/// # Errors
/// What the device says.
pub fn skinny_matmul(multiply: &Multiply<'_>) -> Result<(), DeviceError> {
    assert!(multiply.k.is_multiple_of(8), "sums over {} values: expected a multiple of 8", multiply.k);
    let grid = [multiply.n.div_ceil(16), multiply.m.div_ceil(16), 1];
    launch(multiply.out, Lane::Compute, "skinny_matmul_bf16", grid, 256, 0, &multiply.args(2))
}

/// `out` bf16 `[m, ffn]` = silu(gate) * up, the products of `x` `[m, k]` with the two halves of `w` `[2 ffn, k]`, all bf16:
/// bits and restrictions of [`skinny_matmul`], then [`silu_mul`].
///
/// # Errors
/// What the device says.
pub fn skinny_gate_up(x: &Buffer, w: &Buffer, out: &Buffer, m: usize, ffn: usize, k: usize) -> Result<(), DeviceError> {
    assert!(k.is_multiple_of(8), "sums over {k} values: expected a multiple of 8");
    let args = Args::default()
        .address(x.at(0, m * k * 2))
        .address(w.at(0, 2 * ffn * k * 2))
        .address(out.at(0, m * ffn * 2))
        .u32(m)
        .u32(ffn)
        .u32(k);
    launch(out, Lane::Compute, "skinny_gate_up_bf16", [ffn.div_ceil(8), m.div_ceil(16), 1], 256, 0, &args)
}

/// The product of bf16 operands for many rows, by the device's library.
///
/// # Errors
/// What the library says.
pub fn library_matmul(multiply: &Multiply<'_>) -> Result<(), DeviceError> {
    let product = multiply.product(2);
    // SAFETY: the addresses are of buffers that were checked against the shapes.
    unsafe { multiply.out.device().multiply(&product) }
}

/// Copies of rows of `logits` `[num_logit_rows, vocab]` among them, with bias, bans and penalties: `AdjustRow`s and
/// `Adjustment`s of sample.cu.
///
/// # Errors
/// What the device says.
pub fn adjust_logits(
    logits: &Buffer,
    num_logit_rows: usize,
    rows: Part<'_>,
    num_rows: usize,
    adjustments: Part<'_>,
    vocab: usize,
) -> Result<(), DeviceError> {
    let args = Args::default()
        .address(logits.at(0, num_logit_rows * vocab * 4))
        .address(rows.at(num_rows * 28))
        .address(adjustments.at(0))
        .u32(vocab);
    launch(logits, Lane::Compute, "adjust_logits", [num_rows, 1, 1], 512, 0, &args)
}

/// A token for each of `num_samples` `SampleJob`s of sample.cu from `logits` `[num_logit_rows, vocab]` to `out` u32,
/// its log-probability to `logprobs` f32, if wanted.
///
/// # Errors
/// What the device says.
pub fn sample(
    logits: &Buffer,
    num_logit_rows: usize,
    jobs: Part<'_>,
    num_samples: usize,
    vocab: usize,
    out: &Buffer,
    logprobs: Option<&Buffer>,
) -> Result<(), DeviceError> {
    assert!(vocab < 1 << 24, "a vocabulary of {vocab}: expected fewer than 2^24 tokens");
    let args = Args::default()
        .address(logits.at(0, num_logit_rows * vocab * 4))
        .address(jobs.at(num_samples * 40))
        .u32(vocab)
        .address(out.at(0, num_samples * 4))
        .address(logprobs.map_or(0, |logprobs| logprobs.at(0, num_samples * 4)));
    launch(logits, Lane::Compute, "sample", [num_samples, 1, 1], 512, 0, &args)
}

/// Tokens that [`top_logprobs`] finds at most.
pub const TOP_MAX: usize = 20;

/// The most likely tokens of rows of `logits` `[num_logit_rows, vocab]`, one for each of `num_jobs` `TopJob`s of
/// top_logprobs.cu: to `out` ids u32 `[num_jobs, TOP_MAX]`, behind all of them log-probabilities f32 likewise.
///
/// # Errors
/// What the device says.
pub fn top_logprobs(
    logits: &Buffer,
    num_logit_rows: usize,
    jobs: Part<'_>,
    num_jobs: usize,
    vocab: usize,
    out: &Buffer,
) -> Result<(), DeviceError> {
    let bytes = num_jobs * TOP_MAX * 4;
    let args = Args::default()
        .address(logits.at(0, num_logit_rows * vocab * 4))
        .address(jobs.at(num_jobs * 8))
        .u32(vocab)
        .address(out.at(0, bytes))
        .address(out.at(bytes, bytes));
    launch(logits, Lane::Compute, "top_logprobs", [num_jobs, 1, 1], 512, 0, &args)
}

/// Pieces that [`digest`] takes at most.
pub const DIGEST_PIECES_MAX: usize = 1024;
/// Memory that [`digest`] needs for itself.
pub const DIGEST_BYTES: usize = 16 + DIGEST_PIECES_MAX * 16;

/// XXH3 of 128 bits of pieces of `buffer` (offset, bytes), one behind the other; on [`Lane::Transfer`]. Each piece is of
/// a multiple of 64 bytes at a multiple of 8, all together are at least 256. `scratch` is [`DIGEST_BYTES`] that nobody
/// else uses.
///
/// # Errors
/// What the device says.
pub fn digest(buffer: &Buffer, pieces: &[(usize, usize)], scratch: &Buffer) -> Result<u128, DeviceError> {
    assert!(pieces.len() <= DIGEST_PIECES_MAX, "{} pieces, at most {DIGEST_PIECES_MAX}", pieces.len());
    let (mut words, mut end) = (Vec::with_capacity(pieces.len() * 16), 0);
    for &(offset, num_bytes) in pieces {
        assert!(num_bytes.is_multiple_of(64) && offset.is_multiple_of(8), "a piece of {num_bytes} bytes at {offset}");
        buffer.at(offset, num_bytes);
        end += num_bytes as u64;
        words.extend((offset as u64).to_le_bytes());
        words.extend(end.to_le_bytes());
    }
    assert!(end >= 256, "the digest of {end} bytes: expected 256 at least");
    scratch.write(Lane::Transfer, 16, &words)?;
    let args = Args::default()
        .address(buffer.at(0, buffer.num_bytes()))
        .address(scratch.at(16, words.len()))
        .u64(end)
        .address(scratch.at(0, 16));
    launch(buffer, Lane::Transfer, "digest_pieces", [1, 1, 1], 1024, 0, &args)?;
    let mut halves = [0; 16];
    scratch.read(Lane::Transfer, 0, &mut halves)?;
    Ok(u128::from_le_bytes(halves))
}

/// Copies blocks in all layers; done when the call returns, as with bytes of the pool that are read or written.
/// `pairs` are source and destination in turn; `ids` is memory for as many numbers, used by nobody else.
///
/// # Errors
/// What the device says.
pub fn copy_blocks(pool: Pool<'_>, pairs: &[u32], ids: &Buffer) -> Result<(), DeviceError> {
    change_blocks(pool, "copy_blocks", pairs, pairs.len() / 2, ids)
}

/// Zeroes blocks in all layers; done when the call returns. `ids` is as for [`copy_blocks`].
///
/// # Errors
/// What the device says.
pub fn clear_blocks(pool: Pool<'_>, blocks: &[u32], ids: &Buffer) -> Result<(), DeviceError> {
    change_blocks(pool, "clear_blocks", blocks, blocks.len(), ids)
}

fn change_blocks(
    pool: Pool<'_>,
    kernel: &'static str,
    blocks: &[u32],
    count: usize,
    ids: &Buffer,
) -> Result<(), DeviceError> {
    let KvLayout { num_layers, num_blocks, .. } = *pool.layout;
    assert!(blocks.iter().all(|block| (*block as usize) < num_blocks), "blocks {blocks:?} of {num_blocks}");
    ids.write(Lane::Transfer, 0, as_bytes(blocks))?;
    let args = Args::default()
        .address(pool.address())
        .address(ids.at(0, blocks.len() * 4))
        .u32(num_blocks)
        .u64(pool.layout.block_bytes() as u64);
    launch(pool.buffer, Lane::Transfer, kernel, [count, num_layers, 1], 256, 0, &args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_those_whose_shared_memory_a_device_has() {
        let kernels = |head_dim, kib: usize| {
            let AttentionKernels { has_prefill, has_decode } = AttentionKernels::of(Dtype::Bf16, head_dim, kib << 10);
            (has_prefill, has_decode)
        };
        // Compute capabilities 9.0, 8.0, and 8.6, 8.9 or 12.0.
        for (kib, of_128, of_256) in [
            (227, (true, true), (false, true)),
            (163, (true, true), (false, true)),
            (99, (false, true), (false, false)),
        ] {
            assert_eq!((kernels(64, kib), kernels(128, kib), kernels(256, kib)), ((true, true), of_128, of_256));
        }
        let in_f32 = AttentionKernels::of(Dtype::F32, 64, 227 << 10);
        assert!(!in_f32.has_prefill && !in_f32.has_decode && kernels(80, 227) == (false, false));
    }
}
