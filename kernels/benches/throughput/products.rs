//! Matrix products in every weight format, at the row counts of decode and of prompts.

use kernels::limits::Arithmetic;
use kernels::{
    Mins, PackedMatrix, Priority, QuantizedMatrix, QuantizedWeights, WeightDtype, Weights, matmul, matmul_quantized,
};

use crate::harness::{Bench, Work, noise};

/// (name, input features, output features)
const SHAPES: [(&str, usize, usize); 5] = [
    ("S gate_up", 512, 2816),
    ("S down", 1408, 512),
    ("M qkv", 2048, 3072),
    ("M gate_up", 2048, 16384),
    ("M down", 8192, 2048),
];

/// Rows: decode at three batch sizes, a prompt.
const ROWS: [usize; 4] = [1, 8, 32, 512];

pub(crate) fn run(bench: &Bench<'_>) {
    bench.line("job of 2 empty tiles", &Work::reading(0), || bench.ctx.pool.run(Priority::Decode, 2, &|_| {}));
    pack(bench);
    let shapes = if bench.is_measuring() { &SHAPES[..] } else { &SHAPES[..2] };
    for dtype in [WeightDtype::Bf16, WeightDtype::F32] {
        for &(name, k, n) in shapes {
            let name = format!("matmul {dtype:?} {name}").to_lowercase();
            float(bench, &name, dtype, k, n);
        }
    }
    step(bench);
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K, Format::W8A8] {
        quantized_step(bench, format);
        for &(name, k, n) in shapes.iter().filter(|(_, k, _)| k % format.block(*k) == 0) {
            let name = format!("matmul {format:?} {name}").to_lowercase();
            quantized(bench, &name, format, k, n);
        }
    }
}

/// Weights as a checkpoint has them into panels, once per start.
fn pack(bench: &Bench<'_>) {
    if !bench.wants("pack bf16 2048 x 8192") {
        return;
    }
    let values = vec![half::bf16::from_f32(0.5); 2048 * 8192];
    bench.line("pack bf16 2048 x 8192", &Work::reading(2 * values.len()), || {
        PackedMatrix::pack(WeightDtype::Bf16, 2048, &[Weights::Bf16(&values)]);
    });
}

fn float(bench: &Bench<'_>, name: &str, dtype: WeightDtype, k: usize, n: usize) {
    let rows: Vec<usize> = ROWS.into_iter().filter(|m| bench.wants(&format!("{name} x {m}"))).collect();
    if rows.is_empty() {
        return;
    }
    let w = PackedMatrix::pack(dtype, k, &[Weights::F32(&noise(n * k))]);
    let arithmetic = if dtype == WeightDtype::F32 { Arithmetic::F32 } else { Arithmetic::Bf16 };
    for m in rows {
        let (x, mut out) = (noise(m * k), vec![0.0; m * n + 16]);
        let start = out.as_ptr().align_offset(64);
        let out = &mut out[start..][..m * n];
        let work = Work { bytes: w.size_bytes(), ops: 2.0 * (m * n * k) as f64, arithmetic };
        bench.line(&format!("{name} x {m}"), &work, || matmul(&bench.ctx, &x, m, &w, None, false, out));
    }
}

/// All products of the layers of S in turn, each with weights of its own: they lie further away than those of one
/// product that is repeated.
fn step(bench: &Bench<'_>) {
    const PRODUCTS: [(usize, usize); 4] = [(512, 1024), (512, 512), (512, 2816), (1408, 512)];
    let name = |m: usize| format!("matmul bf16 all of S x {m}");
    let num_layers = if bench.is_measuring() { 8 } else { 1 };
    let rows: Vec<usize> = ROWS.into_iter().filter(|m| bench.wants(&name(*m))).collect();
    if rows.is_empty() {
        return;
    }
    let matrix = |(k, n): (usize, usize)| PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&noise(n * k))]);
    let weights: Vec<PackedMatrix> = (0..num_layers).flat_map(|_| PRODUCTS.map(matrix)).collect();
    let num_weights: usize = weights.iter().map(|w| w.rows() * w.cols()).sum();
    let bytes = weights.iter().map(PackedMatrix::size_bytes).sum();
    for m in rows {
        let (x, mut out) = (noise(m * 1408), vec![0.0; m * 2816]);
        let work = Work { bytes, ops: 2.0 * (m * num_weights) as f64, arithmetic: Arithmetic::Bf16 };
        bench.line(&name(m), &work, || {
            for w in &weights {
                matmul(&bench.ctx, &x[..m * w.cols()], m, w, None, false, &mut out[..m * w.rows()]);
            }
        });
    }
}

/// The same of M in a quantized format: larger than every cache, as the weights of a model are.
fn quantized_step(bench: &Bench<'_>, format: Format) {
    const PRODUCTS: [(usize, usize); 4] = [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)];
    let name = |m: usize| format!("matmul {format:?} all of M x {m}").to_lowercase();
    let rows: Vec<usize> = ROWS.into_iter().filter(|m| bench.is_measuring() && bench.wants(&name(*m))).collect();
    if rows.is_empty() {
        return;
    }
    let of_layer = PRODUCTS.map(|(k, n)| format.weights(k, n));
    let matrix = |weights| QuantizedMatrix::pack(bench.ctx.isa.order(), &[weights]).expect("a format with a kernel");
    let weights: Vec<QuantizedMatrix> = (0..16).flat_map(|_| of_layer.each_ref().map(matrix)).collect();
    let num_weights: usize = weights.iter().map(|w| w.rows() * w.cols()).sum();
    let bytes = weights.iter().map(QuantizedMatrix::size_bytes).sum();
    for m in rows {
        let (x, mut out) = (noise(m * 8192), vec![0.0; m * 16384]);
        let work = Work { bytes, ops: 2.0 * (m * num_weights) as f64, arithmetic: arithmetic(&weights[0]) };
        bench.line(&name(m), &work, || {
            for w in &weights {
                matmul_quantized(&bench.ctx, &x[..m * w.cols()], m, w, None, false, &mut out[..m * w.rows()]);
            }
        });
    }
}

/// What its products are held against.
fn arithmetic(w: &QuantizedMatrix) -> Arithmetic {
    if w.computes_bf16() { Arithmetic::Bf16 } else { Arithmetic::Int8 }
}

/// What checkpoints quantize to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    Q8_0,
    Q4_0,
    Q4K,
    Q6K,
    W8A8,
}

impl Format {
    /// (bits, offset, group)
    fn shape(self, k: usize) -> (u32, i32, usize) {
        match self {
            Format::Q8_0 => (8, 128, 32),
            Format::Q4_0 => (4, 8, 32),
            Format::Q4K => (4, 0, 32),
            Format::Q6K => (6, 32, 16),
            Format::W8A8 => (8, 128, k),
        }
    }

    /// Weights that share a scale of the first level, of a row of `k`.
    fn block(self, k: usize) -> usize {
        if matches!(self, Format::Q4K | Format::Q6K) { 256 } else { self.shape(k).2 }
    }

    fn weights(self, k: usize, n: usize) -> QuantizedWeights {
        let ((bits, offset, group), block) = (self.shape(k), self.block(k));
        let has_levels = block == 256;
        QuantizedWeights {
            rows: n,
            cols: k,
            bits,
            offset,
            group,
            block,
            codes: (0..n * k).map(|i| (i * 7919 % (1 << bits)) as u8).collect(),
            scales: vec![0.0625; n * k / block],
            group_scales: has_levels.then(|| vec![3; n * k / group]),
            mins: (self == Format::Q4K)
                .then(|| Mins { scales: vec![0.25; n * k / block], group_mins: vec![5; n * k / group] }),
        }
    }
}

fn quantized(bench: &Bench<'_>, name: &str, format: Format, k: usize, n: usize) {
    let rows: Vec<usize> = ROWS.into_iter().filter(|m| bench.wants(&format!("{name} x {m}"))).collect();
    if rows.is_empty() {
        return;
    }
    let order = bench.ctx.isa.order();
    let w = QuantizedMatrix::pack(order, &[&format.weights(k, n)]).expect("a format with a kernel");
    for m in rows {
        let (x, mut out) = (noise(m * k), vec![0.0; m * n]);
        let work = Work { bytes: w.size_bytes(), ops: 2.0 * (m * n * k) as f64, arithmetic: arithmetic(&w) };
        bench.line(&format!("{name} x {m}"), &work, || {
            matmul_quantized(&bench.ctx, &x, m, &w, None, false, &mut out);
        });
    }
}
