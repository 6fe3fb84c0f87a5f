//! What a row cannot do without, and how fast this machine could do it.
//!
//! A step reads all weights that some row is multiplied with and the KV of every sequence once, and multiplies. The
//! limit is the longer of two times: those bytes at the bandwidth of reading a buffer of the same size, and those
//! multiply-adds at the peak of the same instruction set, both on the same threads and measured beside the row. On
//! a GPU the bandwidth is that of a copy within it, of which bytes read and bytes written both count, and the peak that of
//! a square product of bf16 by its library ([`engine::cuda::limits`]), measured beside the row, too. What
//! is not counted (activations, norms, softmax, drawing tokens) makes the limit shorter than any engine can be.

use std::sync::Arc;

use anyhow::Context;
use engine::backend::Backend;
use engine::cuda::limits::DeviceProbe;
use engine::limits::{Arithmetic, ReadProbe, peak_ops_per_second};
use engine::model::Model;
use engine::weights::ComputeDtype;

use super::Row;

/// What one step of decode, or one whole prompt, needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepWork {
    /// Tokens that it yields.
    pub num_tokens: f64,
    /// Bytes of weights and KV.
    pub num_bytes: f64,
    /// Operations in f32 or bf16, two for each multiply-add.
    pub float_ops: f64,
    /// Operations in 8-bit integers.
    pub int_ops: f64,
    /// What the first are.
    pub float: Arithmetic,
}

impl StepWork {
    /// Of a row with this model, whose prompts are computed in chunks of so many tokens.
    pub fn of<B: Backend>(model: &Model<B>, row: &Row, chunk_tokens: usize) -> Self {
        let (spec, sizes) = (model.spec(), model.weights().sizes());
        let bytes_per_token = model.info_for(16, 1).kv_spec.bytes_per_token() as f64;
        let float = match model.dtype() {
            ComputeDtype::F32 => Arithmetic::F32,
            ComputeDtype::Bf16 => Arithmetic::Bf16,
        };
        // Rows that go through all but the end of the last layer, and rows that are sampled.
        let (num_rows, num_sampled, positions) = match *row {
            Row::Prefill { num_tokens } => (num_tokens, 1, 0..num_tokens),
            // The middle of what is generated: as long as the average.
            Row::Decode { batch, context, num_tokens } => {
                let middle = context + num_tokens as usize / 2;
                (batch, batch, middle..middle + 1)
            }
        };
        let ops = |inner: u64, last: u64| 2.0 * (inner as f64 * num_rows as f64 + last as f64 * num_sampled as f64);
        let last = sizes.behind_last_kv + sizes.head;
        let attended = |layer: usize| {
            let window = spec.windows[layer].map_or(usize::MAX, |window| window as usize);
            let is_last = layer + 1 == spec.num_layers();
            // Of a prompt, the last layer's attention is asked for at its end alone.
            let first = if is_last { positions.end.saturating_sub(1) } else { positions.start };
            let seen: usize = (first..positions.end).map(|position| (position + 1).min(window)).sum();
            4.0 * (spec.num_heads * spec.head_dim) as f64 * seen as f64
        };
        let attention: f64 = (0..spec.num_layers()).map(attended).sum();
        let sequences = row.num_sequences() as f64;
        let num_bytes = match *row {
            Row::Prefill { num_tokens } => {
                let num_chunks = num_tokens.div_ceil(chunk_tokens) as f64;
                sizes.up_to_last_kv.num_bytes as f64 * num_chunks + last.num_bytes as f64
            }
            Row::Decode { .. } => {
                let weights = sizes.up_to_last_kv + last;
                let read = |window: &Option<u32>| window.map_or(positions.start, |w| positions.start.min(w as usize));
                let positions_read = spec.windows.iter().map(read).sum::<usize>() as f64;
                let bytes_per_position = bytes_per_token / spec.num_layers() as f64;
                weights.num_bytes as f64 + sequences * positions_read * bytes_per_position
            }
        };
        Self {
            num_tokens: num_rows as f64,
            num_bytes,
            float_ops: ops(sizes.up_to_last_kv.num_float_weights, last.num_float_weights) + sequences * attention,
            int_ops: ops(sizes.up_to_last_kv.num_quantized_weights, last.num_quantized_weights),
            float,
        }
    }
}

/// What bounds a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Reading weights and KV.
    Memory,
    /// Multiplying.
    Arithmetic,
}

impl Bound {
    /// As results name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Bound::Memory => "memory",
            Bound::Arithmetic => "arithmetic",
        }
    }
}

/// The speed that the machine would allow at that moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// Of the row.
    pub tokens_per_second: f64,
    /// Why not more.
    pub bound: Bound,
    /// Measured beside it.
    pub bytes_per_second: f64,
    /// Of the float arithmetic, measured beside it.
    pub float_ops_per_second: f64,
    /// Of integers, if the model has any.
    pub int_ops_per_second: Option<f64>,
}

impl Limit {
    /// Of this work at these speeds.
    pub fn of(work: &StepWork, bytes_per_second: f64, float: f64, int: Option<f64>) -> Self {
        let reading = work.num_bytes / bytes_per_second;
        let multiplying = work.float_ops / float + int.map_or(0.0, |int| work.int_ops / int);
        Self {
            tokens_per_second: work.num_tokens / reading.max(multiplying),
            bound: if reading >= multiplying { Bound::Memory } else { Bound::Arithmetic },
            bytes_per_second,
            float_ops_per_second: float,
            int_ops_per_second: int,
        }
    }
}

/// What limits are measured with.
pub enum Machine {
    /// The threads that compute, and memory that they read.
    Cpu(Arc<Model>, ReadProbe),
    /// Memory on the device.
    Device(DeviceProbe),
}

/// Memory that is read for a limit at most. Larger models read no faster.
const PROBE_BYTES_MAX: f64 = (2u64 << 30) as f64;

/// Timings of which the best counts: a limit is what is possible.
const TIMINGS: usize = 3;

impl Machine {
    /// The CPU, for these rows of this model.
    pub fn cpu(model: &Arc<Model>, rows: &[Row], chunk_tokens: usize) -> Self {
        let bytes = |row: &Row| StepWork::of(model, row, chunk_tokens).num_bytes;
        let least = rows.iter().map(bytes).fold(PROBE_BYTES_MAX, f64::min);
        Self::Cpu(model.clone(), ReadProbe::new(least as usize))
    }

    /// How fast this machine could do the work now. Infinite in arithmetic of which no peak is known: the portable
    /// instruction set, and f32 on a device.
    ///
    /// # Errors
    /// What the device says.
    pub fn limit(&self, work: &StepWork) -> anyhow::Result<Limit> {
        match self {
            Self::Cpu(model, probe) => Ok(Self::limit_of_cpu(model, probe, work)),
            Self::Device(probe) => Self::limit_of_device(probe, work).context("measure what the device can do"),
        }
    }

    fn limit_of_device(probe: &DeviceProbe, work: &StepWork) -> anyhow::Result<Limit> {
        let (mut bytes, mut ops) = (0.0, None);
        for _ in 0..TIMINGS {
            bytes = probe.copied_bytes_per_second()?.max(bytes);
            if work.float == Arithmetic::Bf16 {
                ops = probe.product_ops_per_second()?.into_iter().chain(ops).reduce(f64::max);
            }
        }
        Ok(Limit::of(work, bytes, ops.unwrap_or(f64::INFINITY), None))
    }

    fn limit_of_cpu(model: &Model, probe: &ReadProbe, work: &StepWork) -> Limit {
        let backend = model.backend();
        let ctx = backend.ctx();
        let bytes = (0..TIMINGS).map(|_| probe.bytes_per_second(&ctx)).fold(0.0, f64::max);
        let peak = |arithmetic| {
            let peaks = (0..TIMINGS).filter_map(|_| peak_ops_per_second(&ctx, arithmetic));
            peaks.reduce(f64::max).unwrap_or(f64::INFINITY)
        };
        Limit::of(work, bytes, peak(work.float), (work.int_ops > 0.0).then(|| peak(Arithmetic::Int8)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: StepWork =
        StepWork { num_tokens: 8.0, num_bytes: 100.0, float_ops: 30.0, int_ops: 80.0, float: Arithmetic::Bf16 };

    #[test]
    fn the_longer_of_reading_and_multiplying_is_the_limit() {
        let limit = Limit::of(&WORK, 10.0, 10.0, Some(40.0));
        assert_eq!((limit.tokens_per_second, limit.bound), (0.8, Bound::Memory));
        let limit = Limit::of(&WORK, 100.0, 10.0, Some(16.0));
        assert_eq!((limit.tokens_per_second, limit.bound), (1.0, Bound::Arithmetic));
        let limit = Limit::of(&StepWork { int_ops: 0.0, ..WORK }, 100.0, f64::INFINITY, None);
        assert_eq!((limit.tokens_per_second, limit.bound), (8.0, Bound::Memory));
    }

    #[test]
    fn a_step_reads_its_weights_and_kv_and_multiplies_with_every_weight() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
        let options = engine::model::LoadOptions {
            dtype: common::config::Dtype::Bfloat16,
            isa: engine::Isa::detect(),
            threads: Some(1),
            cache_folder: None,
        };
        let model = Model::load_with(&folder, options).unwrap();
        let spec = model.spec();
        let (hidden, heads) = (spec.hidden_size as f64, (spec.num_heads * spec.head_dim) as f64);
        let (qkv, ffn) = (spec.qkv_width() as f64, spec.intermediate_size as f64);
        let (layers, vocab) = (spec.num_layers() as f64, spec.vocab_size as f64);
        let of_layer = qkv * hidden + heads * hidden + 3.0 * ffn * hidden;

        let work = StepWork::of(&model, &Row::Decode { batch: 4, context: 90, num_tokens: 20 }, 2048);
        let attention = layers * 4.0 * heads * 101.0;
        assert_eq!(work.float_ops, 4.0 * (2.0 * (layers * of_layer + vocab * hidden) + attention));
        let kv = 4.0 * 100.0 * model.info_for(16, 1).kv_spec.bytes_per_token() as f64;
        // Every width is a multiple of a panel, so nothing is padded.
        assert_eq!(work.num_bytes, 2.0 * (layers * of_layer + vocab * hidden) + kv);
        assert_eq!((work.num_tokens, work.int_ops), (4.0, 0.0));

        // Of the last layer, only the last position goes on behind its KV.
        let work = StepWork::of(&model, &Row::Prefill { num_tokens: 100 }, 2048);
        let once = of_layer - qkv * hidden + vocab * hidden;
        let rest = layers * of_layer - (of_layer - qkv * hidden);
        let attention = 4.0 * heads * ((layers - 1.0) * 5050.0 + 100.0);
        assert_eq!(work.float_ops, 2.0 * (100.0 * rest + once) + attention);
    }
}
