//! From a row of logits to a token.

use std::cell::Cell;

use crate::isa::Isa;
use crate::numerics::{LANES, exp, ln};
use crate::simd::vectorised;

/// How often a token has occurred: what penalties need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount {
    /// The token id.
    pub token: u32,
    /// Whether the prompt holds it (counts for the repetition penalty).
    pub in_prompt: bool,
    /// How often it was generated.
    pub num_output: u32,
}

/// How one row is sampled.
#[derive(Clone, Copy, Debug)]
pub struct SampleParams<'a> {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen; 1 does nothing.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once from tokens in the output.
    pub presence_penalty: f32,
    /// Tokens of prompt and output, each once. Only read when a penalty is set.
    pub token_counts: &'a [TokenCount],
    /// Added to logits.
    pub logit_bias: &'a [(u32, f32)],
    /// Never chosen (end tokens before `min_tokens`).
    pub banned: &'a [u32],
    /// The random number in [0, 1), from [`uniform`](crate::uniform()).
    pub uniform: f64,
    /// `None`: no log-probabilities. `Some(n)`: of the chosen token and of the n most likely.
    pub num_logprobs: Option<usize>,
}

impl SampleParams<'_> {
    /// Greedy, nothing else.
    pub const GREEDY: SampleParams<'static> = SampleParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        token_counts: &[],
        logit_bias: &[],
        banned: &[],
        uniform: 0.0,
        num_logprobs: None,
    };
}

/// The outcome of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The chosen token.
    pub token: u32,
    /// Its log-probability under the model's raw logits (before penalties and temperature), if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens under the raw logits with their log-probabilities, best first, ties by id.
    pub top: Vec<(u32, f32)>,
}

/// Samples one row of logits `[vocab]` on the calling thread: the rows of a batch are tiles of a
/// [`WorkerPool`](crate::WorkerPool). Allocates only what it returns.
///
/// A row goes through these steps; the order is vLLM's:
/// 1. `+ logit_bias`, banned tokens to -infinity;
/// 2. repetition penalty (tokens of prompt or output), then frequency, then presence penalty (output);
/// 3. temperature below 1e-5: the highest logit, lowest id first, and done;
/// 4. weights are `exp((logit - highest) / temperature)` from here on;
/// 5. `min_p`: keep weights of at least `min_p`;
/// 6. `top_k`: keep the k highest, lower ids first among equals;
/// 7. `top_p`: of these, highest first, keep up to the one with which their sum reaches `top_p` of all;
/// 8. in ascending id, the first whose running sum of weights exceeds `uniform` times all of them.
///
/// Sums are in f64, in ascending id except for the running sum of step 7. NaN logits count as -infinity,
/// +infinity as the largest finite number.
///
/// Panics on a token id beyond the vocabulary: ids are checked where they enter.
pub fn sample_row(isa: Isa, logits: &[f32], params: &SampleParams<'_>) -> Sampled {
    assert!(!logits.is_empty(), "a vocabulary has tokens");
    vectorised!(isa, sample(logits: &[f32], params: &SampleParams<'_>) -> Sampled)
}

/// Below this a temperature means greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;

/// What a thread keeps between rows.
#[derive(Default)]
struct Scratch {
    /// Logits as the steps change them.
    scaled: Vec<f32>,
    /// `exp` of them.
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
    running_sums: Vec<f64>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = const {
        Cell::new(Scratch {
            scaled: Vec::new(),
            weights: Vec::new(),
            candidates: Vec::new(),
            running_sums: Vec::new(),
        })
    };
}

/// A token under its logit as one number: smaller is better, that is a higher logit, then a lower id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate(u64);

impl Candidate {
    #[inline(always)]
    fn new(logit: f32, token: u32) -> Self {
        let bits = logit.to_bits();
        // Ascending like the floats: negative ones have all bits flipped, others the sign. Then reversed.
        let ascending = bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000);
        Candidate(u64::from(!ascending) << 32 | u64::from(token))
    }

    #[inline(always)]
    fn logit(self) -> f32 {
        let ascending = !(self.0 >> 32) as u32;
        f32::from_bits(ascending ^ (((!ascending as i32 >> 31) as u32) | 0x8000_0000))
    }

    #[inline(always)]
    fn token(self) -> u32 {
        self.0 as u32
    }
}

#[inline(always)]
fn sample(logits: &[f32], params: &SampleParams<'_>) -> Sampled {
    let mut scratch = SCRATCH.take();
    let scaled = &mut scratch.scaled;
    let token = if params.leaves_logits_alone() && params.temperature < GREEDY_BELOW {
        first_of(logits, highest(logits))
    } else {
        scaled.clear();
        scaled.extend(logits.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x.min(f32::MAX) }));
        adjust(scaled, params);
        let max = highest(scaled);
        if params.temperature < GREEDY_BELOW || max == f32::NEG_INFINITY {
            first_of(scaled, max)
        } else {
            draw(params, max, &mut scratch)
        }
    };
    SCRATCH.set(scratch);
    let (logprob, top) = match params.num_logprobs {
        None => (None, Vec::new()),
        Some(num_top) => {
            let normaliser = Normaliser::of(logits);
            let top = highest_n(logits, num_top).iter().map(|c| (c.token(), normaliser.logprob(c.logit()))).collect();
            (Some(normaliser.logprob(logits[token as usize])), top)
        }
    };
    Sampled { token, logprob, top }
}

impl SampleParams<'_> {
    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    fn leaves_logits_alone(&self) -> bool {
        !self.has_penalties() && self.logit_bias.is_empty() && self.banned.is_empty()
    }
}

/// Steps 1 and 2.
fn adjust(logits: &mut [f32], params: &SampleParams<'_>) {
    for &(token, bias) in params.logit_bias {
        logits[token as usize] += bias;
    }
    for &token in params.banned {
        logits[token as usize] = f32::NEG_INFINITY;
    }
    if params.has_penalties() {
        for count in params.token_counts {
            let logit = &mut logits[count.token as usize];
            if count.in_prompt || count.num_output > 0 {
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
            if count.num_output > 0 {
                *logit -= params.frequency_penalty * count.num_output as f32;
                *logit -= params.presence_penalty;
            }
        }
    }
}

/// Steps 4 to 8 on logits the highest of which is `max`.
#[inline(always)]
fn draw(params: &SampleParams<'_>, max: f32, scratch: &mut Scratch) -> u32 {
    let Scratch { scaled, weights, candidates, running_sums } = scratch;
    let sums_all = params.top_k == 0;
    if sums_all {
        weights.resize(scaled.len(), 0.0);
        weigh(params, max, scaled, weights, running_sums);
    } else {
        scaled.iter_mut().for_each(|x| *x = (*x - max) / params.temperature);
        if params.min_p > 0.0 {
            let least = params.min_p.min(1.0);
            scaled.iter_mut().for_each(|x| *x = if exp(*x) >= least { *x } else { f32::NEG_INFINITY });
        }
    }
    let total_of_all = || running_sums.last().copied().unwrap_or(0.0);
    if sums_all && params.top_p >= 1.0 {
        let target = params.uniform * total_of_all();
        // Running sums never fall: the first block that ends beyond the target has the token.
        let block = running_sums.partition_point(|sum| *sum <= target).min(running_sums.len() - 1);
        let before = if block == 0 { 0.0 } else { running_sums[block - 1] };
        let block = block * SUM_BLOCK..weights.len();
        let within = weights[block.clone()].iter().zip(block.start as u32..).map(|(&weight, token)| (weight, token));
        return pick(within, before, target).unwrap_or_else(|| last_with_weight(weights));
    }
    candidates.clear();
    if params.top_k > 0 {
        keep_top_k(scaled, params.top_k as usize, candidates);
        if params.top_p < 1.0 {
            candidates.sort_unstable_by_key(|c| c.token());
            let total = candidates.iter().fold(0.0f64, |sum, c| sum + f64::from(exp(c.logit())));
            candidates.sort_unstable();
            let mut sum = 0.0f64;
            let reached = candidates.iter().position(|c| {
                sum += f64::from(exp(c.logit()));
                sum >= f64::from(params.top_p) * total
            });
            candidates.truncate(reached.map_or(candidates.len(), |last| last + 1));
        }
    } else {
        keep_top_p(scaled, f64::from(params.top_p) * total_of_all(), candidates);
    }
    candidates.sort_unstable_by_key(|c| c.token());
    let total = candidates.iter().fold(0.0f64, |sum, c| sum + f64::from(exp(c.logit())));
    let weighted = candidates.iter().map(|c| (exp(c.logit()), c.token()));
    let last = candidates.iter().rev().find(|c| exp(c.logit()) > 0.0).map_or(0, |c| c.token());
    pick(weighted, 0.0, params.uniform * total).unwrap_or(last)
}

/// Weights whose running sum is kept, so that drawing does not add up all before its token a second time.
const SUM_BLOCK: usize = 1024;

/// Weights made at a time: their loop is vectorised, and while their sum, which is not, waits for one addition after
/// another, the machine makes the next.
const WEIGH: usize = 64;

/// Steps 4 and 5: scales logits and makes their weights; then the running sum of these, in ascending order, at the end
/// of each block.
#[inline(always)]
fn weigh(params: &SampleParams<'_>, max: f32, logits: &mut [f32], weights: &mut [f32], running_sums: &mut Vec<f64>) {
    // No weight is negative: without `min_p` all are kept.
    let least = if params.min_p > 0.0 { params.min_p.min(1.0) } else { 0.0 };
    let temperature = params.temperature;
    let one = |logit: &mut f32, weight: &mut f32| {
        let x = (*logit - max) / temperature;
        let w = exp(x);
        *logit = if w >= least { x } else { f32::NEG_INFINITY };
        *weight = if w >= least { w } else { 0.0 };
    };
    running_sums.clear();
    let mut sum = 0.0f64;
    for (logits, weights) in logits.chunks_mut(SUM_BLOCK).zip(weights.chunks_mut(SUM_BLOCK)) {
        let (logits, last_logits) = logits.as_chunks_mut::<WEIGH>();
        let (weights, last_weights) = weights.as_chunks_mut::<WEIGH>();
        for (logits, weights) in logits.iter_mut().zip(weights) {
            logits.iter_mut().zip(weights.iter_mut()).for_each(|(logit, weight)| one(logit, weight));
            sum = weights.iter().fold(sum, |sum, &weight| sum + f64::from(weight));
        }
        last_logits.iter_mut().zip(last_weights.iter_mut()).for_each(|(logit, weight)| one(logit, weight));
        sum = last_weights.iter().fold(sum, |sum, &weight| sum + f64::from(weight));
        running_sums.push(sum);
    }
}

#[inline(always)]
fn last_with_weight(weights: &[f32]) -> u32 {
    weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0) as u32
}

/// How far below the highest the logits of a band may lie. Most rows need only the first bands, so that few
/// of a large vocabulary are ever collected and sorted.
const BANDS: [f32; 6] = [2.0, 4.0, 8.0, 16.0, 32.0, f32::INFINITY];

/// Collects the candidates whose logits are in `(-depth, -above]` (from the top: `(-depth, 0]`).
#[inline(always)]
fn collect_band(scaled: &[f32], above: f32, depth: f32, candidates: &mut Vec<Candidate>) {
    let seen = |x: f32| above > 0.0 && x > -above;
    for (chunk, first) in scaled.chunks(64).zip((0..).step_by(64)) {
        if chunk.iter().fold(false, |any, &x| any | (x > -depth && !seen(x))) {
            let inside = chunk.iter().zip(first..).filter(|(x, _)| **x > -depth && !seen(**x));
            candidates.extend(inside.map(|(&logit, token)| Candidate::new(logit, token)));
        }
    }
}

/// Step 6.
#[inline(always)]
fn keep_top_k(scaled: &[f32], k: usize, candidates: &mut Vec<Candidate>) {
    let enough = |depth: &f32| scaled.iter().map(|&x| u32::from(x > -depth)).sum::<u32>() as usize >= k;
    let depth = BANDS.into_iter().find(enough).unwrap_or(f32::INFINITY);
    collect_band(scaled, 0.0, depth, candidates);
    if k < candidates.len() {
        candidates.select_nth_unstable(k - 1);
        candidates.truncate(k);
    }
}

/// Step 7 over all tokens: sorts band after band, each wholly better than the next, until the sum is reached.
#[inline(always)]
fn keep_top_p(scaled: &[f32], target: f64, candidates: &mut Vec<Candidate>) {
    let (mut above, mut sum) = (0.0, 0.0f64);
    for depth in BANDS {
        let first = candidates.len();
        collect_band(scaled, above, depth, candidates);
        candidates[first..].sort_unstable();
        for i in first..candidates.len() {
            sum += f64::from(exp(candidates[i].logit()));
            if sum >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        above = depth;
    }
}

/// Step 8: the first token with which the running sum, which begins at `sum`, exceeds `target`. `None` if rounding
/// lets none: then it is the last with any weight.
#[inline(always)]
fn pick(weights: impl Iterator<Item = (f32, u32)>, mut sum: f64, target: f64) -> Option<u32> {
    for (weight, token) in weights {
        sum += f64::from(weight);
        if sum > target {
            return Some(token);
        }
    }
    None
}

/// The highest logit; -infinity if there is none.
#[inline(always)]
fn highest(logits: &[f32]) -> f32 {
    // As many lanes as hide the time of a comparison.
    let mut lanes = [f32::NEG_INFINITY; 4 * LANES];
    let (chunks, rest) = logits.as_chunks::<{ 4 * LANES }>();
    for chunk in chunks {
        for i in 0..4 * LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

/// The lowest id that has this logit; 0 if there is none.
#[inline(always)]
fn first_of(logits: &[f32], logit: f32) -> u32 {
    let holds = |chunk: &[f32]| chunk.iter().fold(false, |any, &x| any | (x == logit));
    let chunk = logits.chunks(4 * LANES).position(holds).unwrap_or(0) * 4 * LANES;
    logits[chunk..].iter().position(|&x| x == logit).map_or(0, |at| chunk + at) as u32
}

/// The `n` highest logits, best first.
fn highest_n(logits: &[f32], n: usize) -> Vec<Candidate> {
    let mut best: Vec<Candidate> = Vec::with_capacity(n + 1);
    for (&logit, token) in logits.iter().zip(0..) {
        if best.len() < n || best.last().is_some_and(|worst| logit > worst.logit()) {
            let candidate = Candidate::new(logit, token);
            best.insert(best.partition_point(|other| *other < candidate), candidate);
            best.truncate(n);
        }
    }
    best
}

/// Turns raw logits into log-probabilities: `(logit - max) - ln(sum of exp(logit - max))`, the sum in 16
/// lanes of f64, lane i over ids i + 16 j, then lane i takes i + 8, i + 4, i + 2, i + 1.
struct Normaliser {
    max: f32,
    log_sum: f64,
}

impl Normaliser {
    #[inline(always)]
    fn of(logits: &[f32]) -> Self {
        let max = highest(logits);
        let mut lanes = [0.0f64; LANES];
        let (chunks, rest) = logits.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                lanes[i] += f64::from(exp(chunk[i] - max));
            }
        }
        for (lane, &logit) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(exp(logit - max));
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        Normaliser { max, log_sum: ln(lanes[0]) }
    }

    fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.log_sum) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(logits: &[f32], params: &SampleParams<'_>) -> u32 {
        sample_row(Isa::detect(), logits, params).token
    }

    /// How often each token comes out over evenly spaced uniforms.
    fn shares(logits: &[f32], params: &SampleParams<'_>) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for i in 0..1000 {
            let uniform = (f64::from(i) + 0.5) / 1000.0;
            counts[token(logits, &SampleParams { uniform, ..*params }) as usize] += 0.001;
        }
        counts
    }

    fn close(a: &[f64], b: &[f64]) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.003), "{a:?} is not {b:?}");
    }

    const DRAW: SampleParams<'static> = SampleParams { temperature: 1.0, ..SampleParams::GREEDY };

    fn logs(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_the_highest_logits() {
        let mut logits = vec![0.5; 100];
        (logits[37], logits[90]) = (2.0, 2.0);
        assert_eq!(token(&logits, &SampleParams::GREEDY), 37);
        logits[3] = f32::NAN;
        assert_eq!(token(&logits, &SampleParams::GREEDY), 37);
        assert_eq!(token(&[f32::NAN; 5], &SampleParams::GREEDY), 0);
    }

    #[test]
    fn draws_follow_the_softmax_and_the_temperature() {
        close(&shares(&logs(&[0.1, 0.2, 0.3, 0.4]), &DRAW), &[0.1, 0.2, 0.3, 0.4]);
        let hot = SampleParams { temperature: 2.0, ..DRAW };
        let roots: Vec<f64> = [0.1f64, 0.2, 0.3, 0.4].iter().map(|p| p.sqrt()).collect();
        let total: f64 = roots.iter().sum();
        close(&shares(&logs(&[0.1, 0.2, 0.3, 0.4]), &hot), &roots.iter().map(|r| r / total).collect::<Vec<_>>());
    }

    #[test]
    fn filters_keep_what_their_names_say() {
        let logits = logs(&[0.1, 0.2, 0.3, 0.4]);
        close(&shares(&logits, &SampleParams { top_k: 2, ..DRAW }), &[0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]);
        close(&shares(&logits, &SampleParams { top_p: 0.69, ..DRAW }), &[0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]);
        close(&shares(&logits, &SampleParams { top_p: 0.71, ..DRAW }), &[0.0, 2.0 / 9.0, 3.0 / 9.0, 4.0 / 9.0]);
        close(&shares(&logits, &SampleParams { min_p: 0.6, ..DRAW }), &[0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]);
        // top_p counts within what top_k left.
        close(&shares(&logits, &SampleParams { top_k: 2, top_p: 0.5, ..DRAW }), &[0.0, 0.0, 0.0, 1.0]);
        // Among equals the lower ids stay.
        close(&shares(&[1.0; 4], &SampleParams { top_k: 2, ..DRAW }), &[0.5, 0.5, 0.0, 0.0]);
    }

    /// Steps 4 to 8 as they are stated, with a sort of everything.
    fn stated(logits: &[f32], params: &SampleParams<'_>) -> u32 {
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let scaled = |token: u32| (logits[token as usize] - max) / params.temperature;
        let weight = |token: u32| f64::from(exp(scaled(token)));
        let kept = |token: &u32| params.min_p <= 0.0 || exp(scaled(*token)) >= params.min_p;
        let mut tokens: Vec<u32> = (0..logits.len() as u32).filter(kept).collect();
        let best_first = |tokens: &mut Vec<u32>| {
            tokens.sort_by(|a, b| scaled(*b).total_cmp(&scaled(*a)).then(a.cmp(b)));
        };
        if params.top_k > 0 {
            best_first(&mut tokens);
            tokens.truncate(params.top_k as usize);
            tokens.sort_unstable();
        }
        let total = |tokens: &[u32]| tokens.iter().fold(0.0, |sum, token| sum + weight(*token));
        if params.top_p < 1.0 {
            let target = f64::from(params.top_p) * total(&tokens);
            best_first(&mut tokens);
            let mut sum = 0.0;
            let reached = tokens.iter().position(|token| {
                sum += weight(*token);
                sum >= target
            });
            tokens.truncate(reached.map_or(tokens.len(), |last| last + 1));
            tokens.sort_unstable();
        }
        let target = params.uniform * total(&tokens);
        let mut sum = 0.0;
        let drawn = tokens.iter().find(|token| {
            sum += weight(**token);
            sum > target
        });
        *drawn.unwrap_or_else(|| tokens.iter().rev().find(|token| weight(**token) > 0.0).unwrap())
    }

    #[test]
    fn what_is_drawn_is_what_the_steps_say() {
        for len in [1, 700, SUM_BLOCK, SUM_BLOCK + 1, 5 * SUM_BLOCK - 3] {
            let logits: Vec<f32> = (0..len).map(|i| (crate::uniform(9, 2, i as u32) * 14.0 - 7.0) as f32).collect();
            for i in 0..240u32 {
                let params = SampleParams {
                    temperature: 0.3 + (i % 7) as f32 * 0.3,
                    top_k: [0, 0, 40][i as usize % 3],
                    top_p: [1.0, 0.9, 1.0, 0.3][i as usize % 4],
                    min_p: [0.0, 0.0, 0.0, 0.02, 0.3][i as usize % 5],
                    uniform: if i % 40 == 39 { 1.0 - f64::EPSILON / 2.0 } else { crate::uniform(7, 0, i) },
                    ..SampleParams::GREEDY
                };
                assert_eq!(token(&logits, &params), stated(&logits, &params), "{len} logits, {params:?}");
            }
        }
    }

    #[test]
    fn bands_keep_what_a_full_sort_would() {
        for spread in [1.0, 10.0, 60.0] {
            let mut logits: Vec<f32> = (0..5000).map(|i| (-crate::uniform(3, 0, i) * spread) as f32).collect();
            (logits[77], logits[78], logits[4000]) = (0.0, -2.0, -2.0);
            logits[100..200].fill(f32::NEG_INFINITY);
            let mut sorted: Vec<Candidate> =
                logits.iter().zip(0..).map(|(&x, token)| Candidate::new(x, token)).collect();
            sorted.sort_unstable();
            assert!(sorted.is_sorted_by(|a, b| (b.logit(), a.token()) <= (a.logit(), b.token())));
            assert!(sorted.iter().all(|c| c.logit() == logits[c.token() as usize]));
            let total: f64 = logits.iter().map(|&x| f64::from(exp(x))).sum();
            for share in [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 2.0] {
                let mut kept = Vec::new();
                keep_top_p(&logits, share * total, &mut kept);
                assert!(kept == sorted[..kept.len()], "{spread} {share}");
                let sum = |n: usize| sorted[..n].iter().fold(0.0, |sum, c| sum + f64::from(exp(c.logit())));
                assert!(sum(kept.len() - 1) < share * total || kept.len() == 1);
                assert!(sum(kept.len()) >= share * total || kept.len() == 4900);
            }
            for k in [1, 2, 50, 3000, 4900, 6000] {
                let mut kept = Vec::new();
                keep_top_k(&logits, k, &mut kept);
                kept.sort_unstable();
                assert!(kept == sorted[..k.min(4900)], "{spread} {k}");
            }
        }
    }

    #[test]
    fn penalties_bias_and_bans_change_logits_in_order() {
        let counts = [
            TokenCount { token: 0, in_prompt: true, num_output: 0 },
            TokenCount { token: 1, in_prompt: false, num_output: 3 },
            TokenCount { token: 2, in_prompt: true, num_output: 1 },
        ];
        let params = SampleParams {
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            token_counts: &counts,
            logit_bias: &[(0, 1.0), (3, 5.0)],
            banned: &[4],
            ..SampleParams::GREEDY
        };
        let mut logits = [3.0, 4.0, -1.0, 0.0, 100.0];
        adjust(&mut logits, &params);
        assert_eq!(logits, [2.0, 0.25, -2.75, 5.0, f32::NEG_INFINITY]);
        assert_eq!(token(&[3.0, 4.0, -1.0, 0.0, 100.0], &params), 3);
    }

    #[test]
    fn logprobs_are_of_the_raw_logits_and_alternatives_come_best_first() {
        let logits = logs(&[0.1, 0.4, 0.1, 0.4]);
        let params = SampleParams { banned: &[1, 3], num_logprobs: Some(3), ..SampleParams::GREEDY };
        let sampled = sample_row(Isa::detect(), &logits, &params);
        assert_eq!(sampled.token, 0);
        assert!((sampled.logprob.unwrap() - 0.1f32.ln()).abs() < 1e-6);
        assert_eq!(sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 0]);
        assert!((sampled.top[0].1 - 0.4f32.ln()).abs() < 1e-6);
        let none = sample_row(Isa::detect(), &logits, &SampleParams { num_logprobs: Some(0), ..DRAW });
        assert!(none.logprob.is_some() && none.top.is_empty());
    }

    #[test]
    fn every_instruction_set_draws_the_same_token_with_the_same_logprob() {
        let logits: Vec<f32> = (0..3001).map(|i| (crate::uniform(5, 1, i) * 12.0 - 6.0) as f32).collect();
        for i in 0..60u32 {
            let params = SampleParams {
                temperature: 0.3 + i as f32 * 0.05,
                top_k: [0, 50, 3000][i as usize % 3],
                top_p: [1.0, 0.9][i as usize % 2],
                min_p: [0.0, 0.0, 0.0, 0.01][i as usize % 4],
                uniform: crate::uniform(7, 0, i),
                num_logprobs: Some(5),
                ..SampleParams::GREEDY
            };
            let want = sample_row(Isa::PORTABLE, &logits, &params);
            for &isa in Isa::available() {
                assert_eq!(sample_row(isa, &logits, &params), want, "{isa:?} {params:?}");
            }
        }
    }

    #[test]
    fn extreme_logits_and_uniforms_still_give_a_likely_token() {
        let inf = f32::INFINITY;
        assert_eq!(token(&[0.0, inf, 1.0], &DRAW), 1);
        assert_eq!(token(&[-inf, -inf, -3.0, -inf], &SampleParams { uniform: 1.0 - f64::EPSILON, ..DRAW }), 2);
        assert_eq!(token(&[-inf, 2.0, -inf], &SampleParams { uniform: 0.0, top_p: 0.5, ..DRAW }), 1);
        assert_eq!(token(&[-inf, -inf], &SampleParams { top_k: 1, ..DRAW }), 0);
        assert_eq!(token(&[1.0, 2.0], &SampleParams { top_p: 0.0, ..DRAW }), 1);
    }
}
