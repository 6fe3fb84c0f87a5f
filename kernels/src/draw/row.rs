//! One row's logits, their weights, and where these are cut.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // lane i of several arrays

use super::{Candidate, truncate_at};
use crate::lanes::Lanes;
use crate::numerics::{EXP_LEAST, exp_not_positive as exp, ln};
use crate::sample::SampleParams;

/// Weights between two sums that are kept.
pub(super) const BLOCK: usize = 2048;

/// Weights made at a time.
const CHUNK: usize = 32;

/// How far below the highest the logits of a band may lie, divided by the temperature. Most rows need only the first
/// bands, so that few of a large vocabulary are ever collected.
const BANDS: [f32; 7] = [4.0, 6.0, 8.0, 12.0, 16.0, 32.0, f32::INFINITY];

/// Down to here candidates are noted while all weights are added up, as long as they are not many: of most rows
/// `top_p` keeps no other.
const NOTED: f32 = BANDS[1];
const NOTED_MAX: usize = 8192;

/// Candidates in ascending order, scaled logits and tokens, and how many; no more once they are too many.
#[derive(Default)]
pub(super) struct Noted {
    scaled: Vec<f32>,
    tokens: Vec<u32>,
    len: usize,
}

impl Noted {
    pub(super) const EMPTY: Noted = Noted { scaled: Vec::new(), tokens: Vec::new(), len: 0 };

    fn clear(&mut self) {
        self.scaled.resize(NOTED_MAX + CHUNK, 0.0);
        self.tokens.resize(NOTED_MAX + CHUNK, 0);
        self.len = 0;
    }

    /// Those of a chunk that lie high enough and have a weight; its first is `token`.
    #[inline(always)]
    fn push<S: Lanes>(&mut self, scaled: &[f32; CHUNK], weights: &[f32; CHUNK], token: u32) {
        if self.len <= NOTED_MAX {
            let room = self.len..self.len + CHUNK;
            let (scaled_room, tokens_room) = (&mut self.scaled[room.clone()], &mut self.tokens[room]);
            // SAFETY: the instruction set is that of the caller; there is room for a chunk.
            unsafe {
                let chosen = S::above(scaled, -NOTED) & S::above(weights, 0.0);
                S::gather(scaled, token, chosen, scaled_room.as_mut_ptr(), tokens_room.as_mut_ptr());
                self.len += chosen.count_ones() as usize;
            }
        }
    }

    /// Has `candidates` be what was noted, or nothing if that was too much.
    #[inline(always)]
    pub(super) fn list(&self, candidates: &mut Vec<Candidate>) -> bool {
        candidates.clear();
        let has_all = self.len > 0 && self.len <= NOTED_MAX;
        if has_all {
            let (scaled, tokens) = (&self.scaled[..self.len], &self.tokens[..self.len]);
            candidates.extend(scaled.iter().zip(tokens).map(|(&x, &token)| Candidate::new(x, token)));
        }
        has_all
    }
}

/// One row's logits and what turns them into weights.
pub(super) struct Row<'a> {
    logits: &'a [f32],
    max: f32,
    temperature: f32,
    /// Weights below this are none (step 5).
    least: f32,
    /// The scaled logit and id of the worst token that has a weight (step 7).
    worst: (f32, u32),
    /// No logit up to this has a weight.
    weightless: f32,
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

    /// Step 7: takes their weights from all that are worse than `cut`. No better one is missing from `candidates`.
    #[inline(always)]
    pub(super) fn keep_down_to(&mut self, cut: Candidate, candidates: &[Candidate], ends: &mut [f64]) {
        self.worst = (cut.logit(), cut.token());
        self.weightless = self.weightless.max(self.logit_below(0.01 - cut.logit()));
        ends.fill(0.0);
        // Of the block that candidates are in: nearly all have the same one as the one before.
        let (mut block, mut block_sum) = (0, 0.0);
        for chunk in candidates.chunks(CHUNK) {
            let mut weights = [0.0; CHUNK];
            for i in 0..chunk.len() {
                weights[i] = if chunk[i] <= cut { exp(chunk[i].logit()) } else { 0.0 };
            }
            for i in 0..chunk.len() {
                let next = chunk[i].token() as usize / BLOCK;
                if next != block {
                    ends[block] += block_sum;
                    (block, block_sum) = (next, 0.0);
                }
                block_sum += f64::from(weights[i]);
            }
        }
        ends[block] += block_sum;
        let mut sum = 0.0;
        ends.iter_mut().for_each(|end| {
            sum += *end;
            *end = sum;
        });
    }

    /// A logit such that all that are scaled to more than `-depth` are higher, whatever was rounded on the way.
    fn logit_below(&self, depth: f32) -> f32 {
        let below = self.max - (depth * self.temperature * 1.001 + self.max.abs() * 1e-6);
        if below.is_nan() { f32::NEG_INFINITY } else { below }
    }

    /// NaN stays NaN, which has no weight. Above zero is nothing but infinity, which counts as the largest number.
    #[inline(always)]
    fn scaled(&self, logit: f32) -> f32 {
        let x = (logit - self.max) / self.temperature;
        // Zero has one sign here: equal logits are told apart by their ids alone.
        if x >= 0.0 { 0.0 } else { x }
    }

    /// Step 5. A NaN is not at least anything.
    #[inline(always)]
    fn weight(&self, logit: f32) -> f32 {
        self.weight_of_scaled(self.scaled(logit))
    }

    #[inline(always)]
    fn weight_of_scaled(&self, scaled: f32) -> f32 {
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

    /// The sum of all weights up to the end of each block, in any order. With `noted`, what lies down to [`NOTED`] is
    /// there afterwards, or more than [`NOTED_MAX`] of it.
    #[inline(always)]
    pub(super) fn sum_blocks<S: Lanes>(&self, ends: &mut Vec<f64>, mut noted: Option<&mut Noted>) {
        ends.clear();
        if let Some(noted) = &mut noted {
            noted.clear();
        }
        let (mut sum, mut token) = (0.0, 0);
        for block in self.logits.chunks(BLOCK) {
            let mut lanes = [0.0f64; CHUNK];
            let (chunks, rest) = block.as_chunks::<CHUNK>();
            for chunk in chunks {
                if Self::any_above(chunk, self.weightless) {
                    let (mut scaled, mut weights) = ([0.0; CHUNK], [0.0; CHUNK]);
                    for i in 0..CHUNK {
                        scaled[i] = self.scaled(chunk[i]);
                        weights[i] = self.weight_of_scaled(scaled[i]);
                    }
                    add_to_lanes(&mut lanes, &weights);
                    if let Some(noted) = &mut noted {
                        noted.push::<S>(&scaled, &weights, token);
                    }
                }
                token += CHUNK as u32;
            }
            let (mut scaled, mut weights) = ([0.0; CHUNK], [0.0; CHUNK]);
            for (i, &logit) in rest.iter().enumerate() {
                scaled[i] = self.scaled(logit);
                weights[i] = self.weight_of_scaled(scaled[i]);
                lanes[i] += f64::from(weights[i]);
            }
            // Only the last block has a rest.
            if let Some(noted) = &mut noted {
                noted.push::<S>(&scaled, &weights, token);
            }
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
    fn collect_band<S: Lanes>(&self, above: f32, depth: f32, candidates: &mut Vec<Candidate>) {
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

    /// Step 7: the token with which the sum, best first, reaches `target`. Adds up band after band, each wholly better
    /// than the next, and looks for it in the one that reaches beyond; of the first ones all are `noted`, unless that
    /// was too much. `None` if the sums at hand do not tell.
    #[inline(always)]
    pub(super) fn cut<S: Lanes>(
        &self,
        (target, margin): (f64, f64),
        noted: &Noted,
        candidates: &mut Vec<Candidate>,
        near: &mut Vec<Candidate>,
    ) -> Option<Candidate> {
        let has_noted = noted.list(candidates);
        let (mut above, mut sum, mut first) = (0.0, 0.0, 0);
        for depth in BANDS {
            if has_noted && depth < NOTED {
                continue;
            }
            if !has_noted || depth > NOTED {
                self.collect_band::<S>(above, depth, candidates);
            }
            let band = &candidates[first..];
            let with_band = sum + sum_of(band);
            if with_band >= target {
                return cut_within(band, sum, (target, margin), near);
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
}

/// Up to so many candidates are sorted rather than divided.
const SORTED: usize = 64;

/// Parts of candidates by how far they lie below the best of them.
const PARTS: usize = 64;

/// The candidate with which `sum` and the weights of all up to it reach `target`, if that is certain. Leaves candidates
/// as they are and has those near to it in `near`.
#[inline(always)]
fn cut_within(
    candidates: &[Candidate],
    mut sum: f64,
    (target, margin): (f64, f64),
    near: &mut Vec<Candidate>,
) -> Option<Candidate> {
    near.clear();
    near.extend_from_slice(candidates);
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

/// The sum of their weights, in any order.
#[inline(always)]
fn sum_of(candidates: &[Candidate]) -> f64 {
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
fn add_to_lanes(lanes: &mut [f64; CHUNK], weights: &[f32; CHUNK]) {
    for i in 0..CHUNK {
        lanes[i] += f64::from(weights[i]);
    }
}

/// In the order of a tree, which is short.
#[inline(always)]
fn sum_of_lanes(mut lanes: [f64; CHUNK]) -> f64 {
    let mut width = CHUNK / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
