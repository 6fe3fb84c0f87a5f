//! Sampling on the device: what each request asks for as arrays, tokens that stay there for the next step, and
//! their way to the host, with the most likely alternatives of those that want some.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::sampling::{LOGPROBS_MAX, SampledToken};
use common::tokens::Token;
use kernels::cuda::ops::{self, TOP_MAX};
use kernels::cuda::{Buffer, Device, Landing, Lane};

use super::done;
use super::step::{Growing, StepMemory, Words};
use crate::plan::SampleRow;

/// Tokens that steps drew. At most one per step in flight and one that the next step reads is in use; memory that
/// nobody uses any more is used again.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    memory: Mutex<Vec<Arc<DrawnMemory>>>,
}

/// Tokens, log-probabilities and alternatives of one step, on the device.
#[derive(Debug)]
pub(super) struct DrawnMemory {
    tokens: Buffer,
    logprobs: Buffer,
    alternatives: Mutex<Growing>,
}

impl DrawnMemory {
    pub(super) fn tokens(&self) -> &Buffer {
        &self.tokens
    }

    /// Of the samples that want some, in their order: all ids, then all log-probabilities, [`TOP_MAX`] of each.
    fn alternatives(&self) -> MutexGuard<'_, Growing> {
        self.alternatives.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a step draws, known when the step's event has come.
#[derive(Default, Clone)]
pub struct Drawn(Option<Arc<OnDevice>>);

struct OnDevice {
    memory: Arc<DrawnMemory>,
    /// The tokens on their way to the host: a part of the step, in front of its event.
    tokens: Box<dyn Landing>,
    /// The log-probabilities, if any is wanted.
    logprobs: Option<Box<dyn Landing>>,
    /// The most likely tokens, if any are wanted: what [`DrawnMemory::alternatives`] has.
    alternatives: Option<Box<dyn Landing>>,
    /// For each token, whether its log-probability is wanted and how many alternatives.
    wanted: Vec<Option<usize>>,
    vocab: usize,
}

/// What is asked for has room.
const _: () = assert!(LOGPROBS_MAX as usize <= TOP_MAX);

/// Values of 32 bits that have come.
fn landed(landing: &dyn Landing) -> &[[u8; 4]] {
    done(landing.bytes()).as_chunks().0
}

impl Drawn {
    pub(super) fn memory(&self) -> Option<Arc<DrawnMemory>> {
        self.0.as_ref().map(|drawn| drawn.memory.clone())
    }

    /// The tokens, in the order of the plan's samples. The step must have ended.
    pub fn read(&self) -> Vec<SampledToken> {
        let Some(OnDevice { tokens, logprobs, alternatives, wanted, vocab, .. }) = self.0.as_deref() else {
            return Vec::new();
        };
        let ids = landed(tokens.as_ref()).iter().map(|bytes| u32::from_le_bytes(*bytes));
        let logprobs: Vec<f32> = match logprobs {
            Some(logprobs) => landed(logprobs.as_ref()).iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            None => vec![0.0; wanted.len()],
        };
        let alternatives = alternatives.as_ref().map(|landing| top_logprobs(landed(landing.as_ref()), *vocab, wanted));
        let mut alternatives = alternatives.into_iter().flatten();
        let tokens = ids.zip(logprobs).zip(wanted);
        tokens
            .map(|((id, logprob), wanted)| SampledToken {
                id,
                logprob: if wanted.is_some() { logprob } else { 0.0 },
                top_logprobs: match wanted {
                    Some(1..) => alternatives.next().unwrap_or_default(),
                    _ => Vec::new(),
                },
            })
            .collect()
    }
}

/// The most likely tokens of each row that is wanted with some.
fn top_logprobs(values: &[[u8; 4]], vocab: usize, wanted: &[Option<usize>]) -> Vec<Vec<(Token, f32)>> {
    let counts: Vec<usize> = wanted.iter().flatten().copied().filter(|count| *count > 0).collect();
    let (ids, logprobs) = values.split_at(counts.len() * TOP_MAX);
    let rows = ids.chunks(TOP_MAX).zip(logprobs.chunks(TOP_MAX)).zip(counts);
    let pair = |(id, logprob): (&[u8; 4], &[u8; 4])| (u32::from_le_bytes(*id), f32::from_le_bytes(*logprob));
    rows.map(|((ids, logprobs), count)| ids.iter().zip(logprobs).map(pair).take(count.min(vocab)).collect()).collect()
}

/// What a request changes about one token.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Change {
    bias: f32,
    is_seen: bool,
    num_output: u32,
}

/// Everything a request changes about its row, by token. Ids beyond the vocabulary stand for nothing.
fn changes(sample: &SampleRow, vocab: usize) -> BTreeMap<Token, Change> {
    let params = &sample.params;
    let mut changes: BTreeMap<Token, Change> = BTreeMap::new();
    for (token, bias) in &params.logit_bias {
        changes.entry(*token).or_default().bias += bias;
    }
    if sample.is_stop_banned {
        for token in &params.stop_token_ids {
            changes.entry(*token).or_default().bias = f32::NEG_INFINITY;
        }
    }
    let has_penalties =
        params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
    if let (true, Some((history, prompt_len))) = (has_penalties, &sample.history) {
        for (index, token) in history.iter().enumerate() {
            let change = changes.entry(*token).or_default();
            change.is_seen = true;
            change.num_output += u32::from(index >= *prompt_len);
        }
    }
    changes.retain(|token, _| (*token as usize) < vocab);
    changes
}

impl Sampler {
    /// Launches the sampling of a step.
    pub(super) fn sample(
        &self,
        device: &Arc<dyn Device>,
        memory: &StepMemory,
        logits: &Buffer,
        vocab: usize,
        logit_rows: &[usize],
        samples: &[SampleRow],
    ) -> Drawn {
        let row_bytes = vocab * 4;
        let num_rows = logit_rows.iter().max().map_or(0, |last| last + 1);
        let (mut adjust_rows, mut adjustments, mut jobs) = (Vec::new(), Vec::new(), Vec::new());
        for (sample, raw_row) in samples.iter().zip(logit_rows) {
            let params = &sample.params;
            let changes = changes(sample, vocab);
            let row = if changes.is_empty() { *raw_row } else { num_rows + adjust_rows.len() };
            if !changes.is_empty() {
                let (first, num) = (adjustments.len() as u32, changes.len() as u32);
                adjust_rows.push([
                    *raw_row as u32,
                    row as u32,
                    first,
                    num,
                    params.repetition_penalty.to_bits(),
                    params.frequency_penalty.to_bits(),
                    params.presence_penalty.to_bits(),
                ]);
                let entries = changes.iter();
                adjustments
                    .extend(entries.map(|(token, c)| [*token, c.bias.to_bits(), u32::from(c.is_seen), c.num_output]));
            }
            let (low, high) = (params.seed as u32, (params.seed >> 32) as u32);
            jobs.push([
                low,
                high,
                sample.choice.0,
                sample.position,
                row as u32,
                *raw_row as u32,
                params.temperature.to_bits(),
                params.top_p.to_bits(),
                params.min_p.to_bits(),
                params.top_k,
            ]);
        }
        let tops: Vec<[u32; 2]> = (samples.iter().zip(logit_rows))
            .filter_map(|(sample, row)| Some((sample.params.logprobs.filter(|num| *num > 0)?, row)))
            .map(|(num, row)| [*row as u32, num.min(vocab as u32)])
            .collect();
        let (mut words, mut uploaded) = (Words::default(), memory.samples());
        let (num_adjusted, num_tops) = (adjust_rows.len(), tops.len());
        let tops = words.push(tops);
        let jobs = words.push(jobs);
        let (adjust_rows, adjustments) = (words.push(adjust_rows), words.push(adjustments));
        let uploaded = words.upload(device, &mut uploaded, None);
        let mut with_copies = memory.logits();
        let logits = if num_adjusted == 0 {
            logits
        } else {
            let all = with_copies.at_least(device, (num_rows + num_adjusted) * row_bytes, None);
            done(all.copy_from(Lane::Compute, 0, logits, 0, num_rows * row_bytes));
            done(ops::adjust_logits(
                all,
                num_rows + num_adjusted,
                adjust_rows.of(uploaded),
                num_adjusted,
                adjustments.of(uploaded),
                vocab,
            ));
            all
        };
        let wanted: Vec<Option<usize>> =
            samples.iter().map(|sample| sample.params.logprobs.map(|num| num as usize)).collect();
        let drawn = self.memory_for(device, samples.len());
        let logprobs = wanted.iter().any(Option::is_some).then_some(&drawn.logprobs);
        done(ops::sample(
            logits,
            num_rows + num_adjusted,
            jobs.of(uploaded),
            samples.len(),
            vocab,
            &drawn.tokens,
            logprobs,
        ));
        let num_bytes = samples.len() * 4;
        let logprobs = logprobs.map(|logprobs| done(logprobs.start_read(0, num_bytes)));
        let tokens = done(drawn.tokens.start_read(0, num_bytes));
        let alternatives = (num_tops > 0).then(|| {
            let (mut memory, num_bytes) = (drawn.alternatives(), num_tops * TOP_MAX * 8);
            let found = memory.at_least(device, num_bytes, None);
            done(ops::top_logprobs(logits, num_rows, tops.of(uploaded), num_tops, vocab, found));
            done(found.start_read(0, num_bytes))
        });
        Drawn(Some(Arc::new(OnDevice { memory: drawn, tokens, logprobs, alternatives, wanted, vocab })))
    }

    fn memory_for(&self, device: &Arc<dyn Device>, num_samples: usize) -> Arc<DrawnMemory> {
        let bytes = (num_samples * 4).next_power_of_two().max(256);
        let mut all = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|memory| memory.tokens.num_bytes() >= bytes || Arc::strong_count(memory) > 1);
        if let Some(free) =
            all.iter().find(|memory| Arc::strong_count(memory) == 1 && memory.tokens.num_bytes() >= bytes)
        {
            return free.clone();
        }
        let (tokens, logprobs) = (done(Buffer::new(device, bytes)), done(Buffer::new(device, bytes)));
        all.push(Arc::new(DrawnMemory { tokens, logprobs, alternatives: Mutex::default() }));
        all.last().expect("just pushed").clone()
    }
}
