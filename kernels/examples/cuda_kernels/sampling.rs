//! From logits to tokens: greedy, within a share of the probability, and the most likely ones as alternatives. The logits
//! may lie in the second-level cache, as they do behind the product that made them; the bytes are those of reading them
//! once.

use kernels::cuda::limits::uniform_bf16;
use kernels::cuda::ops::{self, Multiply, Part};
use kernels::cuda::{Buffer, DeviceError};

use super::Bench;

pub(crate) fn measure(bench: &Bench) -> Result<(), DeviceError> {
    let (device, vocab) = (&bench.device, bench.shapes.vocab);
    for &num_rows in &bench.args.samples {
        let logits = logits(bench, num_rows)?;
        let out = Buffer::new(device, num_rows * 4)?;
        for (way, temperature, top_p) in [("greedy", 0.0f32, 1.0f32), ("drawn", 1.0, 1.0), ("top_p 0.9", 1.0, 0.9)] {
            // As `SampleJob` of sample.cu.
            let job = |row: u32| [row, 0, 0, 7, row, row, temperature.to_bits(), top_p.to_bits(), 0f32.to_bits(), 0];
            let jobs: Vec<[u32; 10]> = (0..num_rows as u32).map(job).collect();
            let jobs = Buffer::of(device, jobs.as_flattened())?;
            let seconds =
                bench.seconds(1, |_| ops::sample(&logits, num_rows, Part::from(&jobs), num_rows, vocab, &out, None))?;
            let what = format!("sampling {num_rows} rows of {vocab}, {way}");
            bench.say_bytes(&what, seconds, num_rows * vocab * 4);
        }
        // As `TopJob` of top_logprobs.cu.
        let jobs: Vec<[u32; 2]> = (0..num_rows as u32).map(|row| [row, ops::TOP_MAX as u32]).collect();
        let jobs = Buffer::of(device, jobs.as_flattened())?;
        let out = Buffer::new(device, 2 * num_rows * ops::TOP_MAX * 4)?;
        let seconds =
            bench.seconds(1, |_| ops::top_logprobs(&logits, num_rows, Part::from(&jobs), num_rows, vocab, &out))?;
        let what = format!("the {} most likely of {vocab}, {num_rows} rows", ops::TOP_MAX);
        bench.say_bytes(&what, seconds, num_rows * vocab * 4);
    }
    Ok(())
}

/// Logits about as far apart as a model's: sums of products of what is evenly drawn.
fn logits(bench: &Bench, num_rows: usize) -> Result<Buffer, DeviceError> {
    const INNER: usize = 64;
    let (device, vocab) = (&bench.device, bench.shapes.vocab);
    let (x, w) = (uniform_bf16(device, 8, num_rows * INNER)?, uniform_bf16(device, 9, vocab * INNER)?);
    let out = Buffer::new(device, num_rows * vocab * 4)?;
    ops::skinny_matmul(&Multiply { x: &x, w: &w, bias: None, out: &out, m: num_rows, n: vocab, k: INNER, add: false })?;
    Ok(out)
}
