//! From a row of logits to a token.
#![allow(unsafe_code)]

use std::cell::Cell;

use crate::draw::{Candidate, DrawScratch, draw};
use crate::isa::Isa;
use crate::lanes::{Lanes, Portable};
use crate::numerics::{LANES, exp_not_positive as exp, ln};
use crate::simd::with_simd;

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
    with_simd!(
        isa,
        sample(logits: &[f32], params: &SampleParams<'_>) -> Sampled,
        else sample::<Portable>(logits, params)
    )
}

/// Below this a temperature means greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;

thread_local! {
    /// Logits as penalties and the like change them, and what drawing takes; kept between rows.
    static SCRATCH: Cell<(Vec<f32>, DrawScratch)> = const { Cell::new((Vec::new(), DrawScratch::EMPTY)) };
}

/// # Safety
/// The machine has the instruction set.
#[inline(always)]
unsafe fn sample<S: Lanes>(logits: &[f32], params: &SampleParams<'_>) -> Sampled {
    let (mut adjusted, mut scratch) = SCRATCH.take();
    let logits_drawn_from = if params.leaves_logits_alone() {
        logits
    } else {
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        adjust(&mut adjusted, params);
        &adjusted
    };
    let max = highest(logits_drawn_from);
    let token = if params.temperature < GREEDY_BELOW || max == f32::NEG_INFINITY {
        first_of(logits_drawn_from, max.min(f32::MAX))
    } else {
        draw::<S>(params, logits_drawn_from, max.min(f32::MAX), &mut scratch)
    };
    SCRATCH.set((adjusted, scratch));
    let (logprob, top) = match params.num_logprobs {
        None => (None, Vec::new()),
        Some(num_top) => {
            let highest = if params.leaves_logits_alone() { max } else { highest(logits) };
            let normaliser = Normaliser::of(logits, highest);
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
    let finite = |logit: f32| if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) };
    for &(token, bias) in params.logit_bias {
        let logit = &mut logits[token as usize];
        *logit = finite(*logit) + bias;
    }
    for &token in params.banned {
        logits[token as usize] = f32::NEG_INFINITY;
    }
    if params.has_penalties() {
        for count in params.token_counts {
            let logit = &mut logits[count.token as usize];
            *logit = finite(*logit);
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

/// The lowest id whose logit is at least this; 0 if there is none.
#[inline(always)]
fn first_of(logits: &[f32], logit: f32) -> u32 {
    let holds = |chunk: &[f32]| chunk.iter().fold(false, |any, &x| any | (x >= logit));
    let chunk = logits.chunks(4 * LANES).position(holds).unwrap_or(0) * 4 * LANES;
    logits[chunk..].iter().position(|&x| x >= logit).map_or(0, |at| chunk + at) as u32
}

/// The `n` highest logits, best first.
#[inline(always)]
fn highest_n(logits: &[f32], n: usize) -> Vec<Candidate> {
    let mut best: Vec<Candidate> = Vec::with_capacity(n + 1);
    // What a logit has to exceed.
    let mut worst = f32::NEG_INFINITY;
    for (chunk, first) in logits.chunks(4 * LANES).zip((0..).step_by(4 * LANES)) {
        if best.len() == n && !chunk.iter().fold(false, |any, &logit| any | (logit > worst)) {
            continue;
        }
        for (&logit, token) in chunk.iter().zip(first..) {
            if best.len() < n || logit > worst {
                let candidate = Candidate::new(logit, token);
                best.insert(best.partition_point(|other| *other < candidate), candidate);
                best.truncate(n);
                worst = best.last().map_or(f32::INFINITY, |worst| worst.logit());
            }
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
    fn of(logits: &[f32], max: f32) -> Self {
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
        // Infinity is the largest number, also where only one of two was touched.
        let biased = SampleParams { logit_bias: &[(3, 0.0)], ..SampleParams::GREEDY };
        assert_eq!(token(&[0.0, 1.0, 0.0, f32::INFINITY, 0.0, f32::INFINITY], &biased), 3);
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
