//! Attention of decode: the bytes of KV that a layer's launch reads, over its time.

use kernels::KvLayout;
use kernels::cuda::limits::uniform_bf16;
use kernels::cuda::ops::{self, AttentionShape, DecodeParts, Dtype, PART_TOKENS, Part, Pool};
use kernels::cuda::{Buffer, DeviceError};

use super::{BLOCK_SIZE, Bench, Shapes};

pub(crate) fn measure(bench: &Bench) -> Result<(), DeviceError> {
    for &context in &bench.args.context {
        for &batch in &bench.args.batch {
            let what = format!("decode attention, {batch} with contexts of {context}");
            match Batch::new(bench, batch, context)? {
                Some(batch) => {
                    let seconds = bench.seconds(batch.layout.num_layers, |number| batch.attend(number))?;
                    bench.say_bytes(&what, seconds, batch.num_bytes);
                }
                None => println!("{what:<54} does not fit the memory"),
            }
        }
    }
    Ok(())
}

/// All blocks of a pool in an order that is not theirs: an odd step goes through all of a power of two.
pub(crate) fn any_order(num_blocks: usize) -> Vec<u32> {
    (0..num_blocks).map(|i| (i * 12_347 % num_blocks) as u32).collect()
}

/// Sequences of one context; each launch is of another layer of their pool.
struct Batch {
    shapes: Shapes,
    num_rows: usize,
    layout: KvLayout,
    pool: Buffer,
    q: Buffer,
    out: Buffer,
    units: Buffer,
    num_units: usize,
    rows: Buffer,
    partials: Buffer,
    block_tables: Buffer,
    /// K and V of all contexts.
    num_bytes: usize,
}

impl Batch {
    fn new(bench: &Bench, batch: usize, context: usize) -> Result<Option<Self>, DeviceError> {
        let (device, shapes) = (&bench.device, bench.shapes);
        let Shapes { num_heads, num_kv_heads, head_dim, .. } = shapes;
        let blocks_each = context.div_ceil(BLOCK_SIZE);
        let num_bytes = 2 * batch * context * num_kv_heads * head_dim * 2;
        let layout = KvLayout {
            num_layers: bench.num_to_rotate(num_bytes),
            num_blocks: batch * blocks_each,
            block_size: BLOCK_SIZE,
            num_kv_heads,
            head_dim,
            dtype: Dtype::Bf16,
        };
        let Some(pool) = bench.filled(5, layout.total_bytes())? else { return Ok(None) };
        let parts = context.div_ceil(PART_TOKENS);
        let unit = |row: usize, part: usize| [row, context - 1, row * blocks_each, part].map(|n| n as u32);
        let units: Vec<[u32; 4]> = (0..batch).flat_map(|row| (0..parts).map(move |part| unit(row, part))).collect();
        let rows: Vec<[u32; 3]> = (0..batch).map(|row| [row, row * parts, parts].map(|n| n as u32)).collect();
        let q = uniform_bf16(device, 6, batch * num_heads * head_dim)?;
        Ok(Some(Self {
            shapes,
            num_rows: batch,
            pool,
            out: Buffer::new(device, q.num_bytes())?,
            q,
            num_units: units.len(),
            partials: Buffer::new(device, ops::partial_bytes(units.len(), num_heads, head_dim))?,
            units: Buffer::of(device, units.as_flattened())?,
            rows: Buffer::of(device, rows.as_flattened())?,
            block_tables: Buffer::of(device, &any_order(layout.num_blocks))?,
            layout,
            num_bytes,
        }))
    }

    fn attend(&self, number: usize) -> Result<(), DeviceError> {
        let shape = AttentionShape {
            layer: number % self.layout.num_layers,
            num_heads: self.shapes.num_heads,
            scale: 1.0 / (self.shapes.head_dim as f32).sqrt(),
            window: 0,
            num_rows: self.num_rows,
        };
        let parts = DecodeParts {
            units: Part::from(&self.units),
            num_units: self.num_units,
            rows: Part::from(&self.rows),
            num_rows: self.num_rows,
            partials: &self.partials,
        };
        let pool = Pool { buffer: &self.pool, layout: &self.layout };
        ops::attention_decode(pool, &shape, &self.q, &parts, Part::from(&self.block_tables), &self.out)
    }
}
