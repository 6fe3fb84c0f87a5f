//! Measures the attention of prompts on a GPU: each kernel at several lengths, as TFLOP/s and as a share of what a
//! product of the library reaches in the same run, and how far their results are apart. Fails if that is far.
//!
//! ```text
//! CUDA_HOME=$(kernels/cuda/install-nvcc) cargo run --release -p kernels --features cuda --example cuda_attention
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;
use kernels::KvLayout;
use kernels::cuda::ops::{self, AttentionShape, Dtype, Multiply, PREFILL_ROWS, Part, Pool, PrefillKernel};
use kernels::cuda::{Buffer, Device, DeviceError, Gpu, Lane};

/// Those of a model of 8B.
const NUM_HEADS: usize = 32;
const NUM_KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const BLOCK_SIZE: usize = 16;
/// Of all prompts of a launch, at least.
const NUM_TOKENS: usize = 8192;
/// Rows, columns and what is summed over of the product.
const PRODUCT: usize = 8192;
const ROUNDS: usize = 5;
const ROUND_TIME: Duration = Duration::from_millis(200);
/// Of values between -1 and 1, in bf16.
const DIFFERENCE_MAX: f32 = 1e-2;

fn main() -> ExitCode {
    match measure() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<bool, DeviceError> {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None)?);
    println!("{}, {NUM_HEADS} heads of {HEAD_DIM}, {NUM_KV_HEADS} of KV, blocks of {BLOCK_SIZE}", device.name());
    let mut kernels = vec![PrefillKernel::Portable];
    match device.check_hopper_kernels() {
        Ok(()) => kernels.push(PrefillKernel::Hopper),
        Err(reason) => println!("only the portable kernel: {reason}"),
    }
    let product = product_flops(&device)?;
    match product {
        Some(product) => println!("product of {PRODUCT} cubed: {:.0} TFLOP/s", product / 1e12),
        None => println!("no shares: libcublasLt is not there"),
    }
    let mut are_close = true;
    for len in [512, 2048, 8192, 32768] {
        let prompts = Prompts::new(&device, len)?;
        let mut results = Vec::new();
        for &kernel in &kernels {
            let seconds = seconds_of(&device, || prompts.attend(kernel))?;
            let flops = prompts.num_operations() / seconds;
            let share = product.map(|product| format!(", {:.0} % of the product", 100.0 * flops / product));
            println!("{len:6} tokens  {kernel:?}: {:.0} TFLOP/s{}", flops / 1e12, share.unwrap_or_default());
            results.push(prompts.result()?);
        }
        if let [portable, hopper] = &results[..] {
            let difference = portable.iter().zip(hopper).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
            let num_same = portable.iter().zip(hopper).filter(|(one, other)| one == other).count();
            println!("        {num_same} of {} values are the same, at most {difference} apart", portable.len());
            // NaN is not close either.
            are_close &= difference <= DIFFERENCE_MAX && hopper.iter().all(|value| value.is_finite());
        }
    }
    Ok(are_close)
}

/// The best of several rounds, in each of which launches follow one another.
fn seconds_of(
    device: &Arc<dyn Device>,
    mut launch: impl FnMut() -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    let mut timed = |count: u32| {
        let start = Instant::now();
        (0..count).try_for_each(|_| launch())?;
        device.record()?.wait()?;
        Ok(start.elapsed().as_secs_f64())
    };
    timed(1)?;
    let count = (ROUND_TIME.as_secs_f64() / timed(1)?).ceil().clamp(1.0, 10_000.0) as u32;
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        best = best.min(timed(count)? / f64::from(count));
    }
    Ok(best)
}

fn product_flops(device: &Arc<dyn Device>) -> Result<Option<f64>, DeviceError> {
    if !device.has_product() {
        return Ok(None);
    }
    let (x, w) = (values(device, 1, PRODUCT * PRODUCT)?, values(device, 2, PRODUCT * PRODUCT)?);
    let out = Buffer::new(device, PRODUCT * PRODUCT * 4)?;
    let (m, n, k) = (PRODUCT, PRODUCT, PRODUCT);
    let multiply = Multiply { x: &x, w: &w, bias: None, out: &out, m, n, k, add: false };
    let seconds = seconds_of(device, || ops::library_matmul(&multiply))?;
    Ok(Some(2.0 * (m * n * k) as f64 / seconds))
}

/// Values between -1 and 1.
fn values(device: &Arc<dyn Device>, seed: u64, count: usize) -> Result<Buffer, DeviceError> {
    // A few random values again and again: drawing as many as there are would take longer than all measurements.
    let some: Vec<bf16> = (0..65_521).map(|i| bf16::from_f64(2.0 * kernels::uniform(seed, 0, i) - 1.0)).collect();
    let all: Vec<bf16> = some.iter().copied().cycle().take(count).collect();
    Buffer::of(device, &all)
}

/// Prompts of one length from their first token on, whose blocks lie in any order.
struct Prompts {
    len: usize,
    num_prompts: usize,
    layout: KvLayout,
    pool: Buffer,
    q: Buffer,
    out: Buffer,
    tiles: Buffer,
    num_tiles: usize,
    block_tables: Buffer,
}

impl Prompts {
    fn new(device: &Arc<dyn Device>, len: usize) -> Result<Self, DeviceError> {
        let num_prompts = NUM_TOKENS.div_ceil(len);
        let (num_rows, blocks_each) = (num_prompts * len, len / BLOCK_SIZE);
        let layout = KvLayout {
            num_layers: 1,
            num_blocks: num_prompts * blocks_each,
            block_size: BLOCK_SIZE,
            num_kv_heads: NUM_KV_HEADS,
            head_dim: HEAD_DIM,
            dtype: Dtype::Bf16,
        };
        let mut tiles: Vec<[u32; 4]> = Vec::new();
        for prompt in 0..num_prompts {
            let tile = |first| [prompt * len + first, PREFILL_ROWS, first, prompt * blocks_each].map(|n| n as u32);
            tiles.extend((0..len).step_by(PREFILL_ROWS).map(tile));
        }
        // An odd step goes through all of a power of two.
        let block_tables: Vec<u32> = (0..layout.num_blocks).map(|i| (i * 12_347 % layout.num_blocks) as u32).collect();
        let q = values(device, 3, num_rows * NUM_HEADS * HEAD_DIM)?;
        Ok(Self {
            len,
            num_prompts,
            pool: values(device, 4, layout.total_bytes() / 2)?,
            out: Buffer::new(device, q.num_bytes())?,
            q,
            num_tiles: tiles.len(),
            tiles: Buffer::of(device, tiles.as_flattened())?,
            block_tables: Buffer::of(device, &block_tables)?,
            layout,
        })
    }

    fn attend(&self, kernel: PrefillKernel) -> Result<(), DeviceError> {
        let num_rows = self.num_prompts * self.len;
        let shape = AttentionShape {
            layer: 0,
            num_heads: NUM_HEADS,
            scale: 1.0 / (HEAD_DIM as f32).sqrt(),
            window: 0,
            num_rows,
        };
        let pool = Pool { buffer: &self.pool, layout: &self.layout };
        let (tiles, tables) = (Part::from(&self.tiles), Part::from(&self.block_tables));
        ops::attention_prefill(kernel, pool, &shape, &self.q, tiles, self.num_tiles, tables, &self.out)
    }

    /// Multiplications and additions of both products for what is seen: half of all pairs.
    fn num_operations(&self) -> f64 {
        4.0 * (self.num_prompts * NUM_HEADS * HEAD_DIM) as f64 * (self.len * self.len) as f64 / 2.0
    }

    fn result(&self) -> Result<Vec<f32>, DeviceError> {
        let mut bytes = vec![0; self.out.num_bytes()];
        self.out.read(Lane::Compute, 0, &mut bytes)?;
        Ok(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect())
    }
}
