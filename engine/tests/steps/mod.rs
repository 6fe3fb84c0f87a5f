//! Drives a runner without scheduler: sequences with block tables of their own, stepped as a test says.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::config::Dtype;
use common::ids::{BlockId, ChoiceIndex, SequenceId};
use common::sampling::{SampledToken, SamplingParams};
use engine::cpu_runner::CpuRunner;
use engine::model::{LoadOptions, Model};
use engine::plan::{SampleRow, Span, StepPlan};
use engine::runner::{KvSink, NoSink, Runner};
use kernels::Isa;

/// The model of a folder below the repository's root.
pub(crate) fn load(folder: &str, dtype: Dtype) -> Arc<Model> {
    load_on(folder, dtype, Isa::detect())
}

/// The same on a given instruction set.
pub(crate) fn load_on(folder: &str, dtype: Dtype, isa: Isa) -> Arc<Model> {
    let options = LoadOptions { dtype, isa, threads: Some(2), cache_folder: None };
    Arc::new(Model::load_with(&root().join(folder), options).unwrap())
}

/// The repository's; `TANDEM_TEST_ROOT` says where it is on a machine that tests were only brought to.
pub(crate) fn root() -> PathBuf {
    match std::env::var_os("TANDEM_TEST_ROOT") {
        Some(root) => root.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
    }
}

/// A runner of `model` with a pool of `num_tokens` tokens.
pub(crate) fn runner(model: &Arc<Model>, block_size: usize, num_tokens: usize) -> CpuRunner {
    let bytes = model.info_for(block_size, 1).kv_spec.bytes_per_token() * num_tokens as u64;
    CpuRunner::new(model.clone(), block_size, bytes, None).unwrap()
}

/// Tokens, and where their KV lies.
#[derive(Debug, Clone)]
pub(crate) struct TestSequence {
    pub(crate) id: u64,
    pub(crate) tokens: Vec<u32>,
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) num_computed: usize,
    pub(crate) params: Arc<SamplingParams>,
}

impl TestSequence {
    pub(crate) fn new(id: u64, tokens: &[u32], blocks: impl IntoIterator<Item = u32>) -> Self {
        let blocks = blocks.into_iter().map(BlockId).collect();
        Self { id, tokens: tokens.to_vec(), blocks, num_computed: 0, params: Arc::new(SamplingParams::greedy(1000)) }
    }

    /// With this many alternatives and their log-probabilities.
    pub(crate) fn with_logprobs(self, num_top: usize) -> Self {
        let params = SamplingParams { logprobs: Some(num_top as u32), ..(*self.params).clone() };
        Self { params: Arc::new(params), ..self }
    }

    pub(crate) fn num_uncomputed(&self) -> usize {
        self.tokens.len() - self.num_computed
    }
}

/// Computes the next `count` tokens of each sequence in one step. A sequence whose last token is among them
/// gets its next token, which is returned and not appended.
pub(crate) fn step(runner: &mut dyn Runner, batch: &mut [(&mut TestSequence, usize)]) -> Vec<Option<SampledToken>> {
    step_with(runner, batch, Arc::new(NoSink), false)
}

pub(crate) fn step_with(
    runner: &mut dyn Runner,
    batch: &mut [(&mut TestSequence, usize)],
    sink: Arc<dyn KvSink>,
    is_reported: bool,
) -> Vec<Option<SampledToken>> {
    for (sequence, _) in batch.iter().filter(|(sequence, _)| sequence.num_computed == 0) {
        sequence.blocks.iter().for_each(|block| runner.pool().clear_block(*block));
    }
    let plan = plan(batch, runner.pool().block_size(), is_reported);
    let ticket = runner.submit(plan, sink);
    let output = runner.wait(ticket).unwrap();
    let mut tokens = output.tokens.into_iter();
    batch
        .iter_mut()
        .map(|(sequence, count)| {
            sequence.num_computed += *count;
            (sequence.num_uncomputed() == 0).then(|| tokens.next().unwrap().token)
        })
        .collect()
}

pub(crate) fn plan(batch: &[(&mut TestSequence, usize)], block_size: usize, is_reported: bool) -> StepPlan {
    let mut plan = StepPlan::default();
    for (sequence, count) in batch {
        let first_row = plan.num_rows();
        let range = sequence.num_computed..sequence.num_computed + count;
        for position in range.clone() {
            let block = sequence.blocks[position / block_size].0 as usize;
            plan.tokens.push(sequence.tokens[position]);
            plan.positions.push(position as u32);
            plan.slots.push((block * block_size + position % block_size) as u32);
        }
        let table = plan.block_tables.len();
        plan.block_tables.extend(sequence.blocks.iter().map(|block| block.0));
        plan.spans.push(Span {
            sequence: SequenceId(sequence.id),
            first_row,
            num_rows: *count,
            first_position: range.start,
            block_table: table..plan.block_tables.len(),
            is_reported,
        });
        if range.end == sequence.tokens.len() {
            plan.samples.push(SampleRow {
                row: first_row + count - 1,
                sequence: SequenceId(sequence.id),
                choice: ChoiceIndex(0),
                position: range.end as u32,
                params: sequence.params.clone(),
                is_stop_banned: false,
                history: None,
            });
            plan.has_decode |= *count == 1;
        }
    }
    plan
}

/// Prefills in one step and continues greedily by `count` tokens, one step each.
pub(crate) fn generate(runner: &mut dyn Runner, sequence: &mut TestSequence, count: usize) -> Vec<SampledToken> {
    (0..count)
        .map(|_| {
            let rows = sequence.num_uncomputed();
            let token = step(runner, &mut [(&mut *sequence, rows)]).remove(0).unwrap();
            sequence.tokens.push(token.id);
            token
        })
        .collect()
}

/// The stored KV of all layers, granule by granule; a partial last granule included.
pub(crate) fn kv_bytes(runner: &dyn Runner, sequence: &TestSequence) -> Vec<Vec<u8>> {
    let pool = runner.pool();
    let num_granules = sequence.num_computed.div_ceil(16);
    (0..pool.num_layers())
        .map(|layer| {
            let mut bytes = vec![0; pool.extent_bytes(num_granules)];
            pool.read_granules(layer, &sequence.blocks, 0, num_granules, &mut bytes);
            bytes
        })
        .collect()
}

/// A prompt of `len` tokens below `vocab`, the same for the same seed.
pub(crate) fn prompt(len: usize, vocab: u32, seed: u64) -> Vec<u32> {
    (0..len).map(|i| (kernels::uniform(seed, 0, i as u32) * f64::from(vocab)) as u32).collect()
}
