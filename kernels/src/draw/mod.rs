//! Steps 4 to 8 of [`sample_row`](crate::sample_row()): from logits to a drawn token, without sorting the vocabulary
//! and without waiting for one addition after another.
//!
//! The steps say in which order weights are added up. Which token comes out depends on these sums only through
//! comparisons, though, and a comparison is decided by sums in any order wherever its sides lie further apart than all
//! rounding could have moved them ([`Row::margin`]). So sums are made in lanes, and where that does not decide, the
//! steps are gone through as they are stated ([`Row::stated_draw`], [`Row::stated_cut`]). Of rows with 150,000 logits
//! like a bell that is one in some 40,000.
//!
//! Where `top_p` cuts is told in the same way by even less: only the few weights that are near to the highest are made
//! as they are stated, the others estimated and added up in f32 ([`Row::estimate`]). Of such rows one in 200 is not
//! told so with `top_p` 0.9, and one in 20 with 0.95; these have all weights made and added up in f64, and are cut then
//! ([`Row::cut`]), but for one in 190,000. The cut of 0.999 lies where weights are so small that it is one in 400, and
//! beyond 0.99999 most rows are sorted.
//!
//! Weights are made anew where they are needed instead of being kept: most of them only once, and those of chunks that
//! lie too low to have any not at all.

mod cut;
mod row;
#[cfg(test)]
mod tests;

use crate::lanes::Lanes;
use crate::numerics::exp_not_positive as exp;
use crate::sample::SampleParams;
use cut::Noted;
use row::Row;

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
    noted: Noted,
    /// Those among which the last one that `top_p` keeps is.
    near: Vec<Candidate>,
    /// The sum of all weights up to the end of each block.
    ends: Vec<f64>,
}

impl DrawScratch {
    pub(crate) const EMPTY: DrawScratch =
        DrawScratch { candidates: Vec::new(), noted: Noted::EMPTY, near: Vec::new(), ends: Vec::new() };
}

/// Draws from logits the highest of which is `max`, a finite number.
#[inline(always)]
pub(crate) fn draw<S: Lanes>(params: &SampleParams<'_>, logits: &[f32], max: f32, scratch: &mut DrawScratch) -> u32 {
    let DrawScratch { candidates, noted, near, ends } = scratch;
    let mut row = Row::new(params, logits, max);
    if params.top_k > 0 {
        row.keep_top_k::<S>(params.top_k as usize, candidates);
        return draw_candidate(params, candidates);
    }
    if params.top_p < 1.0 {
        let share = f64::from(params.top_p);
        let estimated = row.estimate::<S>(noted);
        let cut = estimated.and_then(|(total, margin)| row.cut_noted((share * total, margin), noted, near));
        let cut = cut.unwrap_or_else(|| {
            row.sum_blocks(ends);
            let total = ends.last().copied().unwrap_or(0.0);
            let cut = row.cut::<S>((share * total, row.margin(total)), candidates, near);
            let cut = cut.unwrap_or_else(|| row.stated_cut::<S>(params.top_p, candidates));
            noted.set(candidates);
            cut
        });
        row.keep_down_to(cut, noted, ends);
    } else {
        row.sum_blocks(ends);
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
