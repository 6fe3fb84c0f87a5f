//! One row's logits and their weights.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // lane i of several arrays

use super::Candidate;
use crate::lanes::Lanes;
use crate::numerics::{EXP_LEAST, exp_not_positive as exp, ln};
use crate::sample::SampleParams;

/// Weights between two sums that are kept.
pub(super) const BLOCK: usize = 2048;

/// Weights made at a time.
pub(super) const CHUNK: usize = 32;

/// How far below the highest the logits of a band may lie, divided by the temperature. Most rows need only the first
/// bands, so that few of a large vocabulary are ever collected.
pub(super) const BANDS: [f32; 7] = [4.0, 6.0, 8.0, 12.0, 16.0, 32.0, f32::INFINITY];

/// One row's logits and what turns them into weights.
pub(super) struct Row<'a> {
    pub(super) logits: &'a [f32],
    pub(super) max: f32,
    pub(super) temperature: f32,
    /// Weights below this are none (step 5).
    pub(super) least: f32,
    /// The scaled logit and id of the worst token that has a weight (step 7).
    pub(super) worst: (f32, u32),
    /// No logit up to this has a weight.
    pub(super) weightless: f32,
}

impl<'a> Row<'a> {
    pub(super) fn new(params: &SampleParams<'_>, logits: &'a [f32], max: f32) -> Self {
        // No weight is negative: without `min_p` all are kept.
        let least = if params.min_p > 0.0 { params.min_p.min(1.0) } else { 0.0 };
        let worst = (f32::NEG_INFINITY, u32::MAX);
        let mut row = Row { logits, max, temperature: params.temperature, least, worst, weightless: f32::NEG_INFINITY };
        let depth = if least > 0.0 { -ln(f64::from(least)) as f32 } else { f32::INFINITY };
        row.weightless = row.logit_below(depth.min(-EXP_LEAST) + 0.01);
        row
    }

    /// A logit such that all that are scaled to more than `-depth` are higher, whatever was rounded on the way.
    pub(super) fn logit_below(&self, depth: f32) -> f32 {
        let below = self.max - (depth * self.temperature * 1.001 + self.max.abs() * 1e-6);
        if below.is_nan() { f32::NEG_INFINITY } else { below }
    }

    /// NaN stays NaN, which has no weight. Above zero is nothing but infinity, which counts as the largest number.
    #[inline(always)]
    pub(super) fn scaled(&self, logit: f32) -> f32 {
        let x = (logit - self.max) / self.temperature;
        // Zero has one sign here: equal logits are told apart by their ids alone.
        if x >= 0.0 { 0.0 } else { x }
    }

    /// Step 5. A NaN is not at least anything.
    #[inline(always)]
    pub(super) fn weight(&self, logit: f32) -> f32 {
        self.weight_of_scaled(self.scaled(logit))
    }

    #[inline(always)]
    pub(super) fn weight_of_scaled(&self, scaled: f32) -> f32 {
        let weight = exp(scaled);
        if weight >= self.least { weight } else { 0.0 }
    }

    /// The same behind step 7.
    #[inline(always)]
    fn kept_weight(&self, logit: f32, token: u32) -> f32 {
        let x = self.scaled(logit);
        let is_kept = (x > self.worst.0) | ((x == self.worst.0) & (token <= self.worst.1));
        if is_kept { self.weight_of_scaled(x) } else { 0.0 }
    }

    /// Whether any of them may have a weight.
    #[inline(always)]
    fn any_above(logits: &[f32; CHUNK], least: f32) -> bool {
        logits.iter().fold(false, |any, &logit| any | (logit > least))
    }

    /// The sum of all weights up to the end of each block, in any order.
    #[inline(always)]
    pub(super) fn sum_blocks(&self, ends: &mut Vec<f64>) {
        ends.clear();
        let mut sum = 0.0;
        for block in self.logits.chunks(BLOCK) {
            let mut lanes = [0.0f64; CHUNK];
            let (chunks, rest) = block.as_chunks::<CHUNK>();
            for chunk in chunks {
                if Self::any_above(chunk, self.weightless) {
                    let mut weights = [0.0; CHUNK];
                    for i in 0..CHUNK {
                        weights[i] = self.weight(chunk[i]);
                    }
                    add_to_lanes(&mut lanes, &weights);
                }
            }
            lanes.iter_mut().zip(rest).for_each(|(lane, &logit)| *lane += f64::from(self.weight(logit)));
            sum += sum_of_lanes(lanes);
            ends.push(sum);
        }
    }

    /// More than how far two sums of the row's weights in different orders lie apart. Each of fewer than n additions
    /// (2n where sums of blocks are made of candidates by their weight) is wrong by at most 2^-53 of the total, so two
    /// sums differ by less than 3n 2^-53 of it; so do those that a target is a share of, and rounding the target is one
    /// more.
    pub(super) fn margin(&self, total: f64) -> f64 {
        self.logits.len() as f64 * f64::EPSILON * 4.0 * total
    }

    /// Step 8: the first token with which the running sum exceeds `uniform` times all. `None` if the sums at hand do
    /// not tell.
    #[inline(always)]
    pub(super) fn draw(&self, uniform: f64, ends: &[f64]) -> Option<u32> {
        let total = *ends.last()?;
        let (target, margin) = (uniform * total, self.margin(total));
        // Running sums never fall: the first block that ends beyond the target has the token.
        let block = ends.partition_point(|end| *end <= target);
        let first = block * BLOCK;
        let mut sum = if block == 0 { 0.0 } else { ends[block - 1] };
        let logits = self.logits.get(first..)?;
        let (chunks, rest) = logits[..logits.len().min(BLOCK)].as_chunks::<CHUNK>();
        let mut pick = |weight: f32, token: u32| {
            let before = sum;
            sum += f64::from(weight);
            // A sum of nothing is zero in any order.
            let is_told = (before == 0.0 || before < target - margin) && sum > target + margin;
            (sum > target).then_some(is_told.then_some(token))
        };
        let mut token = first as u32;
        for chunk in chunks {
            let mut weights = [0.0; CHUNK];
            if Self::any_above(chunk, self.weightless) {
                for i in 0..CHUNK {
                    weights[i] = self.kept_weight(chunk[i], token + i as u32);
                }
            }
            for weight in weights {
                if let Some(picked) = pick(weight, token) {
                    return picked;
                }
                token += 1;
            }
        }
        rest.iter().zip(token..).find_map(|(&logit, token)| pick(self.kept_weight(logit, token), token)).flatten()
    }

    /// Step 8 as it is stated. Rounding may let no sum exceed the target: then it is the last with any weight.
    #[inline(always)]
    pub(super) fn stated_draw(&self, uniform: f64) -> u32 {
        let weights = || self.logits.iter().zip(0..).map(|(&logit, token)| (self.kept_weight(logit, token), token));
        let add = |sum: f64, weight: f32| sum + f64::from(weight);
        let target = uniform * weights().fold(0.0, |sum, (weight, _)| add(sum, weight));
        let (mut sum, mut last) = (0.0, 0);
        for (weight, token) in weights().filter(|(weight, _)| *weight > 0.0) {
            (sum, last) = (add(sum, weight), token);
            if sum > target {
                break;
            }
        }
        last
    }

    /// Appends the tokens that are scaled to `(-depth, -above]` (from the top: `(-depth, 0]`), in ascending order.
    #[inline(always)]
    pub(super) fn collect_band<S: Lanes>(&self, above: f32, depth: f32, candidates: &mut Vec<Candidate>) {
        let least = self.logit_below(depth);
        let is_seen = |x: f32| above > 0.0 && x > -above;
        let mut collect = |logit: f32, token: u32| {
            let x = self.scaled(logit);
            if x > -depth && !is_seen(x) && (self.least <= 0.0 || exp(x) >= self.least) {
                candidates.push(Candidate::new(x, token));
            }
        };
        let (chunks, rest) = self.logits.as_chunks::<CHUNK>();
        for (chunk, first) in chunks.iter().zip((0..).step_by(CHUNK)) {
            // SAFETY: the instruction set is that of the caller.
            let mut inside = unsafe { S::above(chunk, least) };
            while inside != 0 {
                let i = inside.trailing_zeros();
                collect(chunk[i as usize], first + i);
                inside &= inside - 1;
            }
        }
        let inside = |(logit, _): &(&f32, u32)| **logit > least;
        rest.iter()
            .zip((chunks.len() * CHUNK) as u32..)
            .filter(inside)
            .for_each(|(&logit, token)| collect(logit, token));
    }

    /// Step 6, in any order.
    #[inline(always)]
    pub(super) fn keep_top_k<S: Lanes>(&self, k: usize, candidates: &mut Vec<Candidate>) {
        candidates.clear();
        let mut above = 0.0;
        for depth in BANDS {
            self.collect_band::<S>(above, depth, candidates);
            if candidates.len() > k {
                candidates.select_nth_unstable(k - 1);
                candidates.truncate(k);
            }
            if candidates.len() == k {
                return;
            }
            above = depth;
        }
    }
}

/// The sum of their weights, in any order.
#[inline(always)]
pub(super) fn sum_of(candidates: &[Candidate]) -> f64 {
    let mut lanes = [0.0f64; CHUNK];
    let (chunks, rest) = candidates.as_chunks::<CHUNK>();
    for chunk in chunks {
        let mut weights = [0.0; CHUNK];
        for i in 0..CHUNK {
            weights[i] = exp(chunk[i].logit());
        }
        add_to_lanes(&mut lanes, &weights);
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, c)| *lane += f64::from(exp(c.logit())));
    sum_of_lanes(lanes)
}

/// A loop of its own: beside f64, f32 would be computed in vectors half as long.
#[inline(always)]
pub(super) fn add_to_lanes(lanes: &mut [f64; CHUNK], weights: &[f32; CHUNK]) {
    for i in 0..CHUNK {
        lanes[i] += f64::from(weights[i]);
    }
}

/// In the order of a tree, which is short.
#[inline(always)]
pub(super) fn sum_of_lanes(mut lanes: [f64; CHUNK]) -> f64 {
    let mut width = CHUNK / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
