//! Attention of prompts by each kernel, and how far their results are apart.

use half::bf16;
use kernels::KvLayout;
use kernels::cuda::limits::uniform_bf16;
use kernels::cuda::ops::{self, AttentionShape, Dtype, PREFILL_ROWS, Part, Pool, PrefillKernel};
use kernels::cuda::{Buffer, DeviceError, Lane};

use super::{BLOCK_SIZE, Bench, Shapes};

/// Of all prompts of a launch, at least.
const NUM_TOKENS: usize = 8192;
/// Of values between -1 and 1, in bf16.
const DIFFERENCE_MAX: f32 = 1e-2;

pub(crate) fn measure(bench: &Bench) -> Result<bool, DeviceError> {
    let mut kernels = vec![PrefillKernel::Portable];
    match bench.device.check_hopper_kernels() {
        Ok(()) => kernels.push(PrefillKernel::Hopper),
        Err(reason) => println!("only the portable kernel: {reason}"),
    }
    let mut are_close = true;
    for &len in &bench.args.prompt_len {
        let prompts = Prompts::new(bench, len)?;
        let mut results = Vec::new();
        for &kernel in &kernels {
            let seconds = bench.seconds(1, |_| prompts.attend(kernel))?;
            bench.say_ops(&format!("attention of prompts of {len}, {kernel:?}"), seconds, prompts.num_operations());
            results.push(prompts.result()?);
        }
        if let [portable, hopper] = &results[..] {
            let difference = portable.iter().zip(hopper).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
            let num_same = portable.iter().zip(hopper).filter(|(one, other)| one == other).count();
            println!("    {num_same} of {} values are the same, at most {difference} apart", portable.len());
            // NaN is not close either.
            are_close &= difference <= DIFFERENCE_MAX && hopper.iter().all(|value| value.is_finite());
        }
    }
    Ok(are_close)
}

/// Prompts of one length from their first token on, whose blocks lie in any order.
struct Prompts {
    len: usize,
    num_prompts: usize,
    shapes: Shapes,
    layout: KvLayout,
    pool: Buffer,
    q: Buffer,
    out: Buffer,
    tiles: Buffer,
    num_tiles: usize,
    block_tables: Buffer,
}

impl Prompts {
    fn new(bench: &Bench, len: usize) -> Result<Self, DeviceError> {
        let (device, shapes) = (&bench.device, bench.shapes);
        let num_prompts = (NUM_TOKENS / bench.args.smaller).div_ceil(len);
        let (num_rows, blocks_each) = (num_prompts * len, len.div_ceil(BLOCK_SIZE));
        let layout = KvLayout {
            num_layers: 1,
            num_blocks: num_prompts * blocks_each,
            block_size: BLOCK_SIZE,
            num_kv_heads: shapes.num_kv_heads,
            head_dim: shapes.head_dim,
            dtype: Dtype::Bf16,
        };
        let mut tiles: Vec<[u32; 4]> = Vec::new();
        for prompt in 0..num_prompts {
            let tile = |first: usize| {
                let num_rows = PREFILL_ROWS.min(len - first);
                [prompt * len + first, num_rows, first, prompt * blocks_each].map(|n| n as u32)
            };
            tiles.extend((0..len).step_by(PREFILL_ROWS).map(tile));
        }
        let q = uniform_bf16(device, 3, num_rows * shapes.num_heads * shapes.head_dim)?;
        Ok(Self {
            len,
            num_prompts,
            shapes,
            pool: uniform_bf16(device, 4, layout.total_bytes() / 2)?,
            out: Buffer::new(device, q.num_bytes())?,
            q,
            num_tiles: tiles.len(),
            tiles: Buffer::of(device, tiles.as_flattened())?,
            block_tables: Buffer::of(device, &super::decode::any_order(layout.num_blocks))?,
            layout,
        })
    }

    fn attend(&self, kernel: PrefillKernel) -> Result<(), DeviceError> {
        let shape = AttentionShape {
            layer: 0,
            num_heads: self.shapes.num_heads,
            scale: 1.0 / (self.shapes.head_dim as f32).sqrt(),
            window: 0,
            num_rows: self.num_prompts * self.len,
        };
        let pool = Pool { buffer: &self.pool, layout: &self.layout };
        let (tiles, tables) = (Part::from(&self.tiles), Part::from(&self.block_tables));
        ops::attention_prefill(kernel, pool, &shape, &self.q, tiles, self.num_tiles, tables, &self.out)
    }

    /// Multiplications and additions of both products for what is seen: half of all pairs.
    fn num_operations(&self) -> f64 {
        let Shapes { num_heads, head_dim, .. } = self.shapes;
        4.0 * (self.num_prompts * num_heads * head_dim) as f64 * (self.len * self.len) as f64 / 2.0
    }

    fn result(&self) -> Result<Vec<f32>, DeviceError> {
        let mut bytes = vec![0; self.out.num_bytes()];
        self.out.read(Lane::Compute, 0, &mut bytes)?;
        Ok(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect())
    }
}
