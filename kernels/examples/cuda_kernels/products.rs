//! Products with a model's matrices: of few rows, which are bound by the bytes of the weights, and of many by the library.

use kernels::QuantizedWeights;
use kernels::cuda::limits::uniform_bf16;
use kernels::cuda::ops::{self, Multiply};
use kernels::cuda::{Buffer, DeviceError, DeviceWeights, MultiplyQuantized};

use super::Bench;

pub(crate) fn measure(bench: &Bench) -> Result<(), DeviceError> {
    dense(bench, &bench.args.rows, |bench, what, seconds, multiply| {
        bench.say_bytes(&format!("bf16 {what}"), seconds, 2 * multiply.n * multiply.k);
    })
}

pub(crate) fn measure_library(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.device.has_product() {
        println!("no products by the library, which is not there");
        return Ok(());
    }
    dense(bench, &bench.args.library_rows, |bench, what, seconds, multiply| {
        let num_ops = 2.0 * (multiply.m * multiply.n) as f64 * multiply.k as f64;
        bench.say_ops(&format!("library {what}"), seconds, num_ops);
    })
}

/// Rows that the kernel for few takes go there, more to the library.
fn dense(bench: &Bench, rows: &[usize], say: impl Fn(&Bench, &str, f64, &Multiply<'_>)) -> Result<(), DeviceError> {
    for (name, n, k) in bench.shapes.matrices() {
        let count = bench.num_to_rotate(2 * n * k);
        let Some(matrices) =
            (0..count).map(|seed| bench.filled(seed as u64, 2 * n * k)).collect::<Result<Option<Vec<_>>, _>>()?
        else {
            println!("{name} does not fit the memory");
            continue;
        };
        for &m in rows {
            let x = uniform_bf16(&bench.device, 7, m * k)?;
            let out = Buffer::new(&bench.device, m * n * 4)?;
            let multiply = |number: usize| Multiply {
                x: &x,
                w: &matrices[number % matrices.len()],
                bias: None,
                out: &out,
                m,
                n,
                k,
                add: false,
            };
            let seconds = bench.seconds(matrices.len(), |number| match m <= ops::SKINNY_ROWS_MAX {
                true => ops::skinny_matmul(&multiply(number)),
                false => ops::library_matmul(&multiply(number)),
            })?;
            say(bench, &format!("product of {m} rows, {name} [{n}, {k}]"), seconds, &multiply(0));
        }
    }
    Ok(())
}

/// q8_0 and q4_0, as codes and scales.
pub(crate) fn measure_quantized(bench: &Bench) -> Result<(), DeviceError> {
    let [layer @ .., _head] = bench.shapes.matrices();
    for (bits, format) in [(8, "q8_0"), (4, "q4_0")] {
        for (name, n, k) in layer {
            let weights = quantized(bits, n, k);
            let mut matrices = Vec::new();
            for _ in 0..bench.num_to_rotate(n * k * bits as usize / 8) {
                matrices.extend(DeviceWeights::new(&bench.device, &[&weights])?);
            }
            let Some(num_bytes) = matrices.first().map(DeviceWeights::num_bytes) else {
                println!("the device does not multiply with {format}");
                continue;
            };
            for &m in &bench.args.rows {
                let x = uniform_bf16(&bench.device, 7, m * k)?;
                let out = Buffer::new(&bench.device, m * n * 4)?;
                let multiply = MultiplyQuantized { x: &x, m, bias: None, out: &out, add: false };
                let seconds =
                    bench.seconds(matrices.len(), |number| matrices[number % matrices.len()].multiply(&multiply))?;
                bench.say_bytes(&format!("{format} product of {m} rows, {name} [{n}, {k}]"), seconds, num_bytes);
            }
        }
    }
    Ok(())
}

fn quantized(bits: u32, rows: usize, cols: usize) -> QuantizedWeights {
    const GROUP: usize = 32;
    let codes = 1usize << bits;
    QuantizedWeights {
        rows,
        cols,
        bits,
        offset: 1 << (bits - 1),
        group: GROUP,
        block: GROUP,
        codes: (0..rows * cols).map(|i| (i * 12_347 / 16 % codes) as u8).collect(),
        // A power of two, which an f16 holds.
        scales: vec![1.0 / 1024.0; rows * cols / GROUP],
        group_scales: None,
        mins: None,
    }
}
