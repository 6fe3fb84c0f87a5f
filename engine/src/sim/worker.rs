//! Steps of a simulated model: KV written and read in every layer, at the pace of the cost model.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::model::ModelInfo;
use kernels::kv_layout::GRANULE_TOKENS;
use kernels::{Isa, WorkerPool};
use xxhash_rust::xxh3::Xxh3;

use super::kv::{LINK, SimKv};
use super::options::SimOptions;
use crate::backend::Backend;
use crate::conversion::granule_format;
use crate::cpu::{CpuBackend, CpuTensor};
use crate::plan::{Span, StepPlan};
use crate::pool::KvPool;
use crate::runner::{KvSink, StepOutput, StepToken};

/// By how much a step may take longer than it should, and how often, before it is said.
const LATE_MAX: f64 = 1.1;
const NUM_LATE_MAX: u32 = 10;

pub(super) struct Worker {
    options: SimOptions,
    kv: SimKv,
    /// Steps that took longer than they should: said once.
    num_late: u32,
}

impl Worker {
    pub(super) fn new(options: SimOptions, pool: Arc<KvPool>, info: &ModelInfo) -> Self {
        let format = granule_format(info).expect("K and V of a simulated model have one shape");
        let kv = SimKv { pool, format, dtype: options.kv_dtype };
        Self { options, kv, num_late: 0 }
    }

    pub(super) fn step(&mut self, plan: StepPlan, sink: &dyn KvSink) -> StepOutput {
        let started_at = Instant::now();
        let num_layers = self.options.num_layers;
        let num_before = plan.spans.iter().map(|span| span.first_position).sum();
        let time = self.options.time_of_step(plan.num_rows(), num_before);
        let is_reported = plan.spans.iter().any(|span| span.is_reported);
        let mut sampled = sampled_rows(&plan);
        let vocab = self.options.num_drawn();
        let mut logits = Vec::new();
        for layer in 0..num_layers {
            for span in &plan.spans {
                self.write_span(&plan, layer, span, &mut sampled);
            }
            for (row, hasher) in &mut sampled {
                self.read_context(&plan, layer, *row, hasher);
            }
            if layer + 1 == num_layers {
                logits = sampled.iter().flat_map(|(_, hasher)| logits_of(hasher, vocab)).collect();
            }
            // Where nobody looks, one sleep does.
            if is_reported || layer + 1 == num_layers {
                sleep_until(started_at + time.mul_f64(f64::from(layer + 1) / f64::from(num_layers)));
            }
            for span in plan.spans.iter().filter(|span| span.is_reported) {
                sink.on_layer_written(layer, span);
            }
        }
        let row_of = |row| sampled.binary_search_by_key(&row, |(known, _)| *known).expect("every sampled row is there");
        let logit_rows: Vec<usize> = plan.samples.iter().map(|sample| row_of(sample.row)).collect();
        let sampler = CpuBackend::new(WorkerPool::global(), Isa::detect());
        let mut drawn = Vec::new();
        sampler.sample(&CpuTensor::of(logits), vocab, &logit_rows, &plan.samples, &mut drawn);
        self.tell_if_late(started_at.elapsed(), time, plan.num_rows());
        let tokens = plan.samples.iter().zip(drawn);
        let tokens = tokens.map(|(row, token)| StepToken { sequence: row.sequence, choice: row.choice, token });
        StepOutput { tokens: tokens.collect(), plan }
    }

    fn tell_if_late(&mut self, took: Duration, should: Duration, num_rows: usize) {
        if should.is_zero() || took < should.mul_f64(LATE_MAX) {
            return;
        }
        self.num_late = self.num_late.saturating_add(1);
        if self.num_late != NUM_LATE_MAX {
            return;
        }
        tracing::warn!(
            ?took,
            ?should,
            num_rows,
            "this machine does not make, read and draw from KV as fast as the simulated model should: times are this machine's own, not those \
             that were asked for; lower the speeds (--sim-tokens-per-second, --sim-step-time) or take a smaller model"
        );
    }

    /// KV of one span in one layer, each token's from the one before it.
    fn write_span(&self, plan: &StepPlan, layer: u32, span: &Span, sampled: &mut [(usize, blake3::Hasher)]) {
        let blocks = &plan.block_tables[span.block_table.clone()];
        let mut link = match span.first_position {
            0 => [0; LINK],
            first => self.kv.read_link(layer, blocks, first - 1),
        };
        for row in span.first_row..span.first_row + span.num_rows {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.options.seed.to_le_bytes());
            for number in [layer, plan.positions[row], plan.tokens[row]] {
                hasher.update(&number.to_le_bytes());
            }
            hasher.update(&link);
            hasher.finalize_xof().fill(&mut link);
            self.kv.write_token(layer, plan.slots[row], &link);
            if let Ok(at) = sampled.binary_search_by_key(&row, |(sampled, _)| *sampled) {
                sampled[at].1.update(&link);
            }
        }
    }

    /// What a drawn token depends on in one layer: the granule that it is in, and of those before it as many as
    /// may be read, which others for each position.
    fn read_context(&self, plan: &StepPlan, layer: u32, row: usize, hasher: &mut blake3::Hasher) {
        let span = &plan.spans[plan.spans.partition_point(|span| span.first_row + span.num_rows <= row)];
        let blocks = &plan.block_tables[span.block_table.clone()];
        let position = plan.positions[row] as usize;
        let newest = position / GRANULE_TOKENS;
        // Counted in bf16, so that pools of either type read the same.
        let bytes = self.options.num_layers as usize
            * 2
            * self.kv.format.num_kv_heads
            * self.kv.format.head_dim
            * 2
            * GRANULE_TOKENS;
        let share = self.options.read_bytes_max / bytes as u64;
        let num_read_max = usize::try_from(share).unwrap_or(usize::MAX).max(1);
        let stride = newest.div_ceil(num_read_max).max(1);
        let mut read = Xxh3::new();
        for granule in (position % stride..newest).step_by(stride) {
            self.kv.read_granule(layer, blocks, granule, GRANULE_TOKENS, &mut read);
        }
        self.kv.read_granule(layer, blocks, newest, position % GRANULE_TOKENS + 1, &mut read);
        hasher.update(&read.digest128().to_le_bytes());
    }
}

/// Each row that is sampled, once, with what its logits are made from.
fn sampled_rows(plan: &StepPlan) -> Vec<(usize, blake3::Hasher)> {
    let mut rows: Vec<usize> = plan.samples.iter().map(|sample| sample.row).collect();
    rows.sort_unstable();
    rows.dedup();
    rows.into_iter().map(|row| (row, blake3::Hasher::new())).collect()
}

fn sleep_until(moment: Instant) {
    let left = moment.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

/// Logits from -8 to 8.
fn logits_of(row: &blake3::Hasher, vocab: usize) -> Vec<f32> {
    let mut bytes = vec![0; vocab * 4];
    row.finalize_xof().fill(&mut bytes);
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|b| (u32::from_le_bytes(*b) >> 8) as f32 / (1 << 20) as f32 - 8.0).collect()
}
