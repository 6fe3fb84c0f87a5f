//! Step 7: which tokens `top_p` keeps.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // lane i of several arrays

use std::f32::consts::LOG2_E;

use super::row::{BANDS, BLOCK, CHUNK, Row, add_to_lanes, sum_of, sum_of_lanes};
use super::{Candidate, truncate_at};
use crate::lanes::Lanes;
use crate::numerics::{EXP_MAGIC, exp_not_positive as exp, exp2_estimate};

/// Down to here tokens are noted while weights are estimated, as long as they are not many: of most rows `top_p` keeps
/// no other.
const NOTED: f32 = 8.0;
const NOTED_MAX: usize = 16384;
/// Of what is noted with `min_p`, which is at least this, no other has a weight: `e^-8`.
const LEAST_NOTED: f32 = 3.4e-4;

/// The lowest power of two that is estimated. Lower weights, and none at all, count as this, where the highest is one.
const ESTIMATED: f32 = -43.0;
const WEIGHTLESS: f64 = 1.2e-13;

/// What a sum of estimated weights is within of the sum of these weights: 3e-6 for the power itself, 7.6e-6 for the
/// rounding of exponents of up to 43, 3.8e-6 for 63 additions in f32.
const ESTIMATE_ERROR: f64 = 2e-5;

/// Tokens in ascending order, their scaled logits and weights.
#[derive(Default)]
pub(super) struct Noted {
    /// As many as there are scaled logits, and then anything.
    tokens: Vec<u32>,
    scaled: Vec<f32>,
    weights: Vec<f32>,
}

impl Noted {
    pub(super) const EMPTY: Noted = Noted { tokens: Vec::new(), scaled: Vec::new(), weights: Vec::new() };

    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens[..self.scaled.len()]
    }

    /// Has room for as many tokens as are noted, and a chunk.
    fn make_room(&mut self) {
        if self.tokens.len() < NOTED_MAX + CHUNK {
            self.tokens.resize(NOTED_MAX + CHUNK, 0);
        }
    }

    /// The first so many tokens; what their logits and weights were is forgotten.
    fn set_len(&mut self, len: usize) {
        self.scaled.resize(len, 0.0);
        self.weights.resize(len, 0.0);
    }

    /// Forgets those without a weight.
    fn drop_weightless(&mut self) {
        let mut len = 0;
        for at in 0..self.scaled.len() {
            if self.weights[at] > 0.0 {
                self.tokens[len] = self.tokens[at];
                self.scaled[len] = self.scaled[at];
                self.weights[len] = self.weights[at];
                len += 1;
            }
        }
        self.set_len(len);
    }

    /// These and no others.
    pub(super) fn set(&mut self, candidates: &mut [Candidate]) {
        candidates.sort_unstable_by_key(|candidate| candidate.token());
        self.set_len(candidates.len());
        self.tokens.resize(self.tokens.len().max(candidates.len()), 0);
        for (i, candidate) in candidates.iter().enumerate() {
            self.tokens[i] = candidate.token();
            self.scaled[i] = candidate.logit();
            self.weights[i] = exp(candidate.logit());
        }
    }
}

/// A sum and more than how far it may be from the one that is stated.
pub(super) type Near = (f64, f64);

impl Row<'_> {
    /// The sum of all weights, of which only those of the highest are made as they are stated. These are noted, in
    /// ascending order of their tokens: all down to [`NOTED`], and few that lie lower; where no lower one has a weight,
    /// those that have one. `None` if they are too many, or if it takes exact weights to say which others have any.
    #[inline(always)]
    pub(super) fn estimate<S: Lanes>(&self, noted: &mut Noted) -> Option<Near> {
        let are_others_weightless = self.least > 0.0;
        if are_others_weightless && self.least < LEAST_NOTED {
            return None;
        }
        noted.make_room();
        let (mut len, mut estimated) = (0, 0.0);
        let above = if are_others_weightless { self.weightless } else { self.logit_below(NOTED) };
        for (block, first) in self.logits.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
            if !are_others_weightless {
                estimated += self.estimate_block(block, above);
            }
            for (chunk, token) in block.chunks(CHUNK).zip((first..).step_by(CHUNK)) {
                let mut filled_up = [f32::NEG_INFINITY; CHUNK];
                let chunk = chunk.as_array().unwrap_or_else(|| {
                    filled_up[..chunk.len()].copy_from_slice(chunk);
                    &filled_up
                });
                let room = &mut noted.tokens[len..len + CHUNK];
                // SAFETY: the instruction set is that of the caller; there is room for a chunk.
                unsafe {
                    let bits = S::above(chunk, above);
                    S::list(token, bits, room.as_mut_ptr());
                    len += bits.count_ones() as usize;
                }
                if len > NOTED_MAX {
                    return None;
                }
            }
        }
        noted.set_len(len);
        for (scaled, token) in noted.scaled.iter_mut().zip(&noted.tokens) {
            *scaled = self.logits[*token as usize];
        }
        let mut lanes = [0.0; CHUNK];
        let (scaled, weights) = (noted.scaled.as_chunks_mut::<CHUNK>(), noted.weights.as_chunks_mut::<CHUNK>());
        for (scaled, weights) in scaled.0.iter_mut().zip(weights.0) {
            for i in 0..CHUNK {
                scaled[i] = self.scaled(scaled[i]);
                weights[i] = self.weight_of_scaled(scaled[i]);
            }
            add_to_lanes(&mut lanes, weights);
        }
        for ((scaled, weight), lane) in scaled.1.iter_mut().zip(weights.1).zip(&mut lanes) {
            *scaled = self.scaled(*scaled);
            *weight = self.weight_of_scaled(*scaled);
            *lane += f64::from(*weight);
        }
        if are_others_weightless {
            noted.drop_weightless();
        }
        let total = sum_of_lanes(lanes) + estimated;
        let unseen = self.logits.len() as f64 * WEIGHTLESS;
        Some((total, self.margin(total) + ESTIMATE_ERROR * estimated + unseen))
    }

    /// About the sum of the weights of those that are not `above`.
    #[inline(always)]
    fn estimate_block(&self, block: &[f32], above: f32) -> f64 {
        let factor = LOG2_E / self.temperature;
        let mut lanes = [0.0f32; CHUNK];
        let (chunks, rest) = block.as_chunks::<CHUNK>();
        for chunk in chunks {
            for i in 0..CHUNK {
                let exponent = (chunk[i] - self.max) * factor;
                let weight = exp2_estimate(if exponent > ESTIMATED { exponent } else { ESTIMATED });
                lanes[i] += if chunk[i] > above { 0.0 } else { weight };
            }
        }
        for (lane, &logit) in lanes.iter_mut().zip(rest) {
            *lane += if logit > above { 0.0 } else { self.weight(logit) };
        }
        lanes.iter().map(|&lane| f64::from(lane)).sum()
    }

    /// The token with which the sum, best first, reaches `target`, if it is one of those down to [`NOTED`], and the
    /// sums at hand tell.
    #[inline(always)]
    pub(super) fn cut_noted(
        &self,
        (target, margin): Near,
        noted: &Noted,
        near: &mut Vec<Candidate>,
    ) -> Option<Candidate> {
        let mut sums = [0.0f64; PARTS + 1];
        for (&scaled, &weight) in noted.scaled.iter().zip(&noted.weights) {
            sums[part_of(scaled)] += f64::from(weight);
        }
        let (mut part, mut sum) = (0, 0.0);
        while part < PARTS && sum + sums[part] < target {
            sum += sums[part];
            part += 1;
        }
        if part == PARTS {
            return None;
        }
        near.clear();
        for (&scaled, &token) in noted.scaled.iter().zip(noted.tokens()) {
            if part_of(scaled) == part {
                near.push(Candidate::new(scaled, token));
            }
        }
        cut_within(near, sum, (target, margin))
    }

    /// The token with which the sum, best first, reaches `target`. Adds up band after band, each wholly better than the
    /// next, and looks for it in the one that reaches beyond. `None` if the sums at hand do not tell.
    #[inline(always)]
    pub(super) fn cut<S: Lanes>(
        &self,
        (target, margin): Near,
        candidates: &mut Vec<Candidate>,
        near: &mut Vec<Candidate>,
    ) -> Option<Candidate> {
        candidates.clear();
        let (mut above, mut sum, mut first) = (0.0, 0.0, 0);
        for depth in BANDS {
            self.collect_band::<S>(above, depth, candidates);
            let band = &candidates[first..];
            let with_band = sum + sum_of(band);
            if with_band >= target {
                near.clear();
                near.extend_from_slice(band);
                return cut_within(near, sum, (target, margin));
            }
            (sum, above, first) = (with_band, depth, candidates.len());
        }
        None
    }

    /// Step 7 as it is stated.
    #[inline(always)]
    pub(super) fn stated_cut<S: Lanes>(&self, top_p: f32, candidates: &mut Vec<Candidate>) -> Candidate {
        let weights = self.logits.iter().map(|&logit| self.weight(logit));
        let target = f64::from(top_p) * weights.fold(0.0, |sum, weight| sum + f64::from(weight));
        candidates.clear();
        self.collect_band::<S>(0.0, f32::INFINITY, candidates);
        candidates.sort_unstable();
        truncate_at(candidates, target);
        candidates.last().copied().expect("the highest logit is finite, and always kept")
    }

    /// Takes their weights from all that are worse than `cut`. No better one is missing from `noted`.
    #[inline(always)]
    pub(super) fn keep_down_to(&mut self, cut: Candidate, noted: &Noted, ends: &mut Vec<f64>) {
        self.worst = (cut.logit(), cut.token());
        self.weightless = self.weightless.max(self.logit_below(0.01 - cut.logit()));
        ends.clear();
        ends.resize(self.logits.len().div_ceil(BLOCK), 0.0);
        let is_kept =
            |scaled: f32, token: u32| (scaled > cut.logit()) | ((scaled == cut.logit()) & (token <= cut.token()));
        let (tokens, rest_tokens) = noted.tokens().as_chunks::<CHUNK>();
        let (scaled, rest_scaled) = noted.scaled.as_chunks::<CHUNK>();
        let (weights, rest_weights) = noted.weights.as_chunks::<CHUNK>();
        for ((tokens, scaled), weights) in tokens.iter().zip(scaled).zip(weights) {
            let mut kept = [0.0; CHUNK];
            for i in 0..CHUNK {
                kept[i] = if is_kept(scaled[i], tokens[i]) { weights[i] } else { 0.0 };
            }
            let (first, last) = (tokens[0] as usize / BLOCK, tokens[CHUNK - 1] as usize / BLOCK);
            if first == last {
                let mut lanes = [0.0; CHUNK];
                add_to_lanes(&mut lanes, &kept);
                ends[first] += sum_of_lanes(lanes);
            } else {
                for i in 0..CHUNK {
                    ends[tokens[i] as usize / BLOCK] += f64::from(kept[i]);
                }
            }
        }
        for ((&token, &scaled), &weight) in rest_tokens.iter().zip(rest_scaled).zip(rest_weights) {
            if is_kept(scaled, token) {
                ends[token as usize / BLOCK] += f64::from(weight);
            }
        }
        let mut sum = 0.0;
        ends.iter_mut().for_each(|end| {
            sum += *end;
            *end = sum;
        });
    }
}

/// Up to so many candidates are sorted rather than divided.
const SORTED: usize = 64;

/// Parts of candidates by how far they lie below the best of them.
const PARTS: usize = 64;

/// The part of what was noted that this is in, [`PARTS`] if it lies below all.
#[inline(always)]
fn part_of(scaled: f32) -> usize {
    // Rounds to an integer, held in the low bits. Where a part ends does not matter.
    let rounded = (scaled * -(PARTS as f32 / NOTED) + EXP_MAGIC).to_bits() - EXP_MAGIC.to_bits();
    (rounded as usize).min(PARTS)
}

/// The candidate with which `sum` and the weights of all up to it reach `target`, if that is certain. Leaves those that
/// are near to it.
#[inline(always)]
fn cut_within(near: &mut Vec<Candidate>, mut sum: f64, (target, margin): Near) -> Option<Candidate> {
    while near.len() > SORTED {
        let (best, worst) = near.iter().fold((f32::NEG_INFINITY, f32::INFINITY), |(best, worst), candidate| {
            (best.max(candidate.logit()), worst.min(candidate.logit()))
        });
        let parts_per_depth = PARTS as f32 / (best - worst);
        // Never falls from a better candidate to a worse one.
        let part_of = |candidate: &Candidate| ((best - candidate.logit()) * parts_per_depth) as usize;
        let mut sums = [0.0f64; PARTS + 1];
        for chunk in near.chunks(CHUNK) {
            let mut weights = [0.0; CHUNK];
            for i in 0..chunk.len() {
                weights[i] = exp(chunk[i].logit());
            }
            for i in 0..chunk.len() {
                sums[part_of(&chunk[i]).min(PARTS)] += f64::from(weights[i]);
            }
        }
        let mut part = 0;
        while part < PARTS && sum + sums[part] < target {
            sum += sums[part];
            part += 1;
        }
        let num_before = near.len();
        near.retain(|candidate| part_of(candidate).min(PARTS) == part);
        if near.len() == num_before {
            break;
        }
    }
    near.sort_unstable();
    for &candidate in near.iter() {
        let before = sum;
        sum += f64::from(exp(candidate.logit()));
        if sum >= target {
            let is_told = (before == 0.0 || before < target - margin) && sum >= target + margin;
            return is_told.then_some(candidate);
        }
    }
    None
}
