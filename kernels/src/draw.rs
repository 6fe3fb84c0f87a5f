//! Steps 4 to 8 of [`sample_row`](crate::sample_row()): from logits to a drawn token, without sorting the vocabulary
//! and without waiting for one addition after another.
//!
//! The steps say in which order weights are added up. Which token comes out depends on these sums only through
//! comparisons, though, and a comparison is decided by sums in any order wherever its sides lie further apart than all
//! rounding could have moved them ([`Row::margin`]). So sums are made in lanes, and where that does not decide, the
//! steps are gone through as they are stated ([`Row::stated_draw`], [`Row::stated_cut`]). Of rows with 150,000 logits
//! like a bell that is one in some 40,000, and with `top_p` 0.9 one in 190,000; the cut of 0.999 lies where weights are
//! so small that it is one in 400, and beyond 0.99999 most rows are sorted.
//!
//! Weights are made anew where they are needed instead of being kept: most of them only once, and those of chunks that
//! lie too low to have any not at all.

#![allow(clippy::needless_range_loop)] // lane i of several arrays

use crate::numerics::{EXP_LEAST, exp_not_positive as exp, ln};
use crate::sample::SampleParams;

/// A token under its logit as one number: smaller is better, that is a higher logit, then a lower id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate(u64);

impl Candidate {
    #[inline(always)]
    pub(crate) fn new(logit: f32, token: u32) -> Self {
        let bits = logit.to_bits();
        // Ascending like the floats: negative ones have all bits flipped, others the sign. Then reversed.
        let ascending = bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000);
        Candidate(u64::from(!ascending) << 32 | u64::from(token))
    }

    #[inline(always)]
    pub(crate) fn logit(self) -> f32 {
        let ascending = !(self.0 >> 32) as u32;
        f32::from_bits(ascending ^ (((!ascending as i32 >> 31) as u32) | 0x8000_0000))
    }

    #[inline(always)]
    pub(crate) fn token(self) -> u32 {
        self.0 as u32
    }
}

/// What a thread keeps between rows.
#[derive(Default)]
pub(crate) struct DrawScratch {
    candidates: Vec<Candidate>,
    /// The sum of all weights up to the end of each block.
    ends: Vec<f64>,
}

impl DrawScratch {
    pub(crate) const EMPTY: DrawScratch = DrawScratch { candidates: Vec::new(), ends: Vec::new() };
}

/// Weights between two sums that are kept.
const BLOCK: usize = 2048;

/// Weights made at a time.
const CHUNK: usize = 32;

/// How far below the highest the logits of a band may lie, divided by the temperature. Most rows need only the first
/// bands, so that few of a large vocabulary are ever collected.
const BANDS: [f32; 7] = [4.0, 6.0, 8.0, 12.0, 16.0, 32.0, f32::INFINITY];

/// Draws from logits the highest of which is `max`, a finite number.
#[inline(always)]
pub(crate) fn draw(params: &SampleParams<'_>, logits: &[f32], max: f32, scratch: &mut DrawScratch) -> u32 {
    let DrawScratch { candidates, ends } = scratch;
    let mut row = Row::new(params, logits, max);
    if params.top_k > 0 {
        row.keep_top_k(params.top_k as usize, candidates);
        return draw_candidate(params, candidates);
    }
    row.sum_blocks(ends);
    if params.top_p < 1.0 {
        let total = ends.last().copied().unwrap_or(0.0);
        let cut = row.cut(f64::from(params.top_p) * total, row.margin(total), candidates);
        let cut = cut.unwrap_or_else(|| row.stated_cut(params.top_p, candidates));
        row.keep_down_to(cut, candidates, ends);
    }
    row.draw(params.uniform, ends).unwrap_or_else(|| row.stated_draw(params.uniform))
}

/// Steps 7 and 8 among few.
#[inline(always)]
fn draw_candidate(params: &SampleParams<'_>, candidates: &mut Vec<Candidate>) -> u32 {
    let add = |sum: f64, c: &Candidate| sum + f64::from(exp(c.logit()));
    candidates.sort_unstable_by_key(|c| c.token());
    if params.top_p < 1.0 {
        let target = f64::from(params.top_p) * candidates.iter().fold(0.0, add);
        candidates.sort_unstable();
        truncate_at(candidates, target);
        candidates.sort_unstable_by_key(|c| c.token());
    }
    let target = params.uniform * candidates.iter().fold(0.0, add);
    let mut sum = 0.0;
    let drawn = candidates.iter().find(|c| {
        sum = add(sum, c);
        sum > target
    });
    let last = || candidates.iter().rev().find(|c| exp(c.logit()) > 0.0);
    drawn.or_else(last).map_or(0, |c| c.token())
}

/// Step 7 as it is stated: of candidates that are sorted, keeps up to the one with which the sum reaches `target`.
fn truncate_at(candidates: &mut Vec<Candidate>, target: f64) {
    let mut sum = 0.0f64;
    let reached = candidates.iter().position(|c| {
        sum += f64::from(exp(c.logit()));
        sum >= target
    });
    candidates.truncate(reached.map_or(candidates.len(), |last| last + 1));
}

/// One row's logits and what turns them into weights.
struct Row<'a> {
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
    fn new(params: &SampleParams<'_>, logits: &'a [f32], max: f32) -> Self {
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
    fn keep_down_to(&mut self, cut: Candidate, candidates: &[Candidate], ends: &mut [f64]) {
        self.worst = (cut.logit(), cut.token());
        self.weightless = self.weightless.max(self.logit_below(0.01 - cut.logit()));
        ends.fill(0.0);
        for chunk in candidates.chunks(CHUNK) {
            let mut weights = [0.0; CHUNK];
            for i in 0..chunk.len() {
                weights[i] = if chunk[i] <= cut { exp(chunk[i].logit()) } else { 0.0 };
            }
            for i in 0..chunk.len() {
                ends[chunk[i].token() as usize / BLOCK] += f64::from(weights[i]);
            }
        }
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
        let weight = exp(self.scaled(logit));
        if weight >= self.least { weight } else { 0.0 }
    }

    /// The same behind step 7.
    #[inline(always)]
    fn kept_weight(&self, logit: f32, token: u32) -> f32 {
        let x = self.scaled(logit);
        let is_kept = (x > self.worst.0) | ((x == self.worst.0) & (token <= self.worst.1));
        if is_kept { self.weight(logit) } else { 0.0 }
    }

    /// Whether any of them may have a weight.
    #[inline(always)]
    fn any_above(logits: &[f32; CHUNK], least: f32) -> bool {
        logits.iter().fold(false, |any, &logit| any | (logit > least))
    }

    /// The sum of all weights up to the end of each block, in any order.
    #[inline(always)]
    fn sum_blocks(&self, ends: &mut Vec<f64>) {
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

    /// How far two sums of the row's weights in different orders lie apart at most, times two or more. Each of fewer
    /// than n additions is wrong by at most 2^-53 of the total, so a sum in lanes and one in order differ by less than
    /// n 2^-52 of it; so do those that a target is a share of, and rounding the target is one more.
    fn margin(&self, total: f64) -> f64 {
        self.logits.len() as f64 * f64::EPSILON * 4.0 * total
    }

    /// Step 8: the first token with which the running sum exceeds `uniform` times all. `None` if the sums at hand do
    /// not tell.
    #[inline(always)]
    fn draw(&self, uniform: f64, ends: &[f64]) -> Option<u32> {
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
    fn stated_draw(&self, uniform: f64) -> u32 {
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
    fn collect_band(&self, above: f32, depth: f32, candidates: &mut Vec<Candidate>) {
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
            if !Self::any_above(chunk, least) {
                continue;
            }
            // `map` would be a call into code without these instructions.
            let mut flags = [0; CHUNK];
            for i in 0..CHUNK {
                flags[i] = u8::from(chunk[i] > least);
            }
            let mut inside = bits_of(&flags);
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
    fn keep_top_k(&self, k: usize, candidates: &mut Vec<Candidate>) {
        candidates.clear();
        let mut above = 0.0;
        for depth in BANDS {
            self.collect_band(above, depth, candidates);
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
    /// than the next, and looks for it in the one that reaches beyond. `None` if the sums at hand do not tell.
    #[inline(always)]
    fn cut(&self, target: f64, margin: f64, candidates: &mut Vec<Candidate>) -> Option<Candidate> {
        candidates.clear();
        let (mut above, mut sum) = (0.0, 0.0);
        for depth in BANDS {
            let first = candidates.len();
            self.collect_band(above, depth, candidates);
            let band = &mut candidates[first..];
            let with_band = sum + sum_of(band);
            if with_band >= target {
                return cut_within(band, sum, target, margin);
            }
            (sum, above) = (with_band, depth);
        }
        None
    }

    /// Step 7 as it is stated.
    #[inline(always)]
    fn stated_cut(&self, top_p: f32, candidates: &mut Vec<Candidate>) -> Candidate {
        let weights = self.logits.iter().map(|&logit| self.weight(logit));
        let target = f64::from(top_p) * weights.fold(0.0, |sum, weight| sum + f64::from(weight));
        candidates.clear();
        self.collect_band(0.0, f32::INFINITY, candidates);
        candidates.sort_unstable();
        truncate_at(candidates, target);
        candidates.last().copied().expect("the highest logit is finite, and always kept")
    }
}

/// Up to so many candidates are sorted rather than halved.
const SORTED: usize = 64;

/// The candidate with which `sum` and the weights of all up to it reach `target`, if that is certain.
#[inline(always)]
fn cut_within(mut candidates: &mut [Candidate], mut sum: f64, target: f64, margin: f64) -> Option<Candidate> {
    while candidates.len() > SORTED {
        let half = candidates.len() / 2;
        candidates.select_nth_unstable(half);
        let (better, worse) = candidates.split_at_mut(half);
        let with_better = sum + sum_of(better);
        if with_better >= target {
            candidates = better;
        } else {
            (sum, candidates) = (with_better, worse);
        }
    }
    candidates.sort_unstable();
    for &mut candidate in candidates {
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

/// Bit i of flag i, which is 0 or 1.
#[inline(always)]
fn bits_of(flags: &[u8; CHUNK]) -> u32 {
    let eight = |flags: &[u8; 8]| (u64::from_le_bytes(*flags).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32;
    flags.as_chunks::<8>().0.iter().rev().fold(0, |bits, flags| bits << 8 | eight(flags))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics::exp;
    use crate::{Isa, sample_row};

    const DRAW: SampleParams<'static> = SampleParams { temperature: 1.0, ..SampleParams::GREEDY };

    fn token(logits: &[f32], params: &SampleParams<'_>) -> u32 {
        sample_row(Isa::detect(), logits, params).token
    }

    /// Steps 4 to 8 as they are stated, with a sort of everything.
    fn stated(logits: &[f32], params: &SampleParams<'_>) -> u32 {
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        // Adding zero gives zero one sign.
        let scaled = |token: u32| (logits[token as usize] - max) / params.temperature + 0.0;
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

    fn noise(len: usize, spread: f64) -> Vec<f32> {
        (0..len).map(|i| (crate::uniform(9, 2, i as u32) * 2.0 * spread - spread) as f32).collect()
    }

    #[test]
    fn what_is_drawn_is_what_the_steps_say() {
        for (len, spread) in [(1, 7.0), (700, 7.0), (BLOCK, 0.2), (BLOCK + 1, 7.0), (5 * BLOCK - 3, 70.0)] {
            let logits = noise(len, spread);
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
    fn where_sums_in_lanes_do_not_tell_the_stated_order_decides() {
        let logits = noise(3 * BLOCK + 7, 3.0);
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let sums: Vec<f64> = logits
            .iter()
            .scan(0.0, |sum, &x| {
                *sum += f64::from(exp(x - max));
                Some(*sum)
            })
            .collect();
        let mut num_undecided = 0;
        for (at, sum) in sums.iter().enumerate().step_by(19) {
            let uniform = sum / sums[sums.len() - 1];
            // The sum itself as a target, and its neighbours.
            for uniform in [uniform.next_down(), uniform, uniform.next_up()] {
                let params = SampleParams { uniform: uniform.min(1.0f64.next_down()), ..DRAW };
                assert_eq!(token(&logits, &params), stated(&logits, &params), "token {at}, {uniform}");
                let (row, mut ends) = (Row::new(&params, &logits, max), Vec::new());
                row.sum_blocks(&mut ends);
                num_undecided += usize::from(row.draw(params.uniform, &ends).is_none());
            }
        }
        assert_eq!(num_undecided, 3 * sums.len().div_ceil(19), "all of these lie within the margin");
    }

    #[test]
    fn equal_logits_are_cut_between_two_ids() {
        for len in [10, 100, 3000] {
            // Sums that meet the target exactly, which lanes do not dare to tell.
            let params = SampleParams { top_p: 0.5, uniform: 1.0f64.next_down(), ..DRAW };
            assert_eq!(token(&vec![2.5; len], &params), len as u32 / 2 - 1);
        }
        // One better than the rest, and a cut in the middle of these that lanes do tell.
        let mut logits = vec![0.0; 3000];
        logits[2999] = 1.0;
        for (top_p, uniform) in [(0.3, 0.999), (0.7, 0.5), (0.001, 0.9)] {
            let params = SampleParams { top_p, uniform, ..DRAW };
            assert_eq!(token(&logits, &params), stated(&logits, &params), "{top_p}");
        }
    }

    #[test]
    fn zeros_of_either_sign_are_equal_logits() {
        let mut logits = vec![-5.0f32; 128];
        (logits[1], logits[64]) = (-0.0, 0.0);
        for (top_p, expected) in [(0.3, 1), (0.5, 64)] {
            let params = SampleParams { top_p, uniform: 1.0f64.next_down(), ..DRAW };
            assert_eq!((token(&logits, &params), stated(&logits, &params)), (expected, expected), "{top_p}");
        }
    }

    #[test]
    fn where_sums_in_lanes_do_not_tell_the_cut_is_not_told() {
        let logits = noise(3 * BLOCK + 7, 3.0);
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let mut sorted: Vec<Candidate> =
            logits.iter().zip(0..).map(|(&x, token)| Candidate::new(x - max, token)).collect();
        sorted.sort_unstable();
        let sums: Vec<f64> = sorted
            .iter()
            .scan(0.0, |sum, candidate| {
                *sum += f64::from(exp(candidate.logit()));
                Some(*sum)
            })
            .collect();
        let row = Row::new(&DRAW, &logits, max);
        let margin = row.margin(sums[sums.len() - 1]);
        for (at, &sum) in sums.iter().enumerate().step_by(19) {
            for target in [sum.next_down(), sum, sum.next_up()] {
                assert_eq!(row.cut(target, margin, &mut Vec::new()), None, "token {at}");
            }
            let next = sums.get(at + 1).map_or(sum, |next| next - sum);
            if next > 4.0 * margin {
                assert_eq!(row.cut(sum + next / 2.0, margin, &mut Vec::new()), Some(sorted[at + 1]), "token {at}");
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
            let row = Row::new(&DRAW, &logits, 0.0);
            let total: f64 = logits.iter().map(|&x| f64::from(exp(x))).sum();
            let mut collected = Vec::new();
            for share in [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 2.0] {
                let cut = row.cut(share * total, 0.0, &mut collected);
                let sum = |n: usize| sorted[..n].iter().fold(0.0, |sum, c| sum + f64::from(exp(c.logit())));
                let Some(cut) = cut else {
                    assert!(sum(4900) < share * total, "{spread} {share}");
                    continue;
                };
                let num_kept = sorted.iter().position(|c| *c == cut).unwrap() + 1;
                assert!(sum(num_kept - 1) < share * total || num_kept == 1, "{spread} {share}");
                assert!(sum(num_kept) >= share * total, "{spread} {share}");
            }
            for k in [1, 2, 50, 3000, 4900, 6000] {
                row.keep_top_k(k, &mut collected);
                collected.sort_unstable();
                assert!(collected == sorted[..k.min(4900)], "{spread} {k}");
            }
        }
    }
}
