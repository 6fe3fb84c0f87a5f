//! How scores become weights, value by value, and how states of several parts become one.

use super::AttentionParams;
use crate::kv_layout::KvDtype;
use crate::numerics::{ATTENTION_TILE, ATTENTION_WIDE_TILE, Order, exp, exp2_weight, tanh};

/// Which of the two softmaxes of [`numerics`](crate::numerics).
#[derive(Clone, Copy, Debug)]
pub(super) enum Softmax {
    /// `e^(score - max)` of scores times `scale`.
    Natural { scale: f32, softcap: Option<f32> },
    /// `2^(score * factor - max * factor)` of scores as they are; of capped ones where there is a cap for `scale` times
    /// them.
    Base2 { factor: f32, cap: Option<(f32, f32)> },
}

impl Softmax {
    pub(super) fn of(params: &AttentionParams, dtype: KvDtype, order: Order) -> Softmax {
        let &AttentionParams { scale, softcap, .. } = params;
        if order == Order::Pairs || dtype == KvDtype::F32 {
            return Softmax::Natural { scale, softcap };
        }
        let factor = std::f32::consts::LOG2_E * if softcap.is_some() { 1.0 } else { scale };
        Softmax::Base2 { factor, cap: softcap.map(|cap| (scale, cap)) }
    }

    /// Positions that are weighed against one maximum.
    pub(super) fn tile(self) -> usize {
        match self {
            Softmax::Natural { .. } => ATTENTION_TILE,
            Softmax::Base2 { .. } => ATTENTION_WIDE_TILE,
        }
    }

    /// The score of a product of a query with a key.
    pub(super) fn score(self, product: f32) -> f32 {
        let capped = |scale: f32, cap: f32| cap * tanh(product * scale / cap);
        match self {
            Softmax::Natural { scale, softcap } => softcap.map_or(product * scale, |cap| capped(scale, cap)),
            Softmax::Base2 { cap, .. } => cap.map_or(product, |(scale, cap)| capped(scale, cap)),
        }
    }

    /// The weight of a score beside the highest one.
    pub(super) fn weight(self, score: f32, max: f32) -> f32 {
        match self {
            Softmax::Natural { .. } => exp(score - max),
            Softmax::Base2 { factor, .. } => exp2_weight(score.mul_add(factor, -(max * factor))),
        }
    }

    /// The factor on what was summed below one maximum, now that it is another.
    #[inline(always)]
    fn decay(self, from: f32, to: f32) -> f32 {
        match self {
            Softmax::Natural { .. } => exp(from - to),
            Softmax::Base2 { factor, .. } => exp2_weight((from - to) * factor),
        }
    }

    /// The higher maximum of two states, and the factors on what each has summed.
    #[inline(always)]
    pub(super) fn join(self, first: f32, second: f32) -> (f32, f32, f32) {
        let max = if second > first { second } else { first };
        (max, self.decay(first, max), self.decay(second, max))
    }

    /// Takes a later part's state (maximum, sum, weighted values) into the running one; returns the new maximum and
    /// sum.
    #[inline(always)]
    pub(super) fn merge(self, total: (f32, f32), total_acc: &mut [f32], part: (f32, f32), acc: &[f32]) -> (f32, f32) {
        let (max, a, b) = self.join(total.0, part.0);
        add_weighted(total_acc, a, acc, b);
        (max, part.1.mul_add(b, total.1 * a))
    }
}

/// `total = total * a + acc * b`.
#[inline(always)]
pub(super) fn add_weighted(total: &mut [f32], a: f32, acc: &[f32], b: f32) {
    for (t, &p) in total.iter_mut().zip(acc) {
        *t = p.mul_add(b, *t * a);
    }
}

/// The weighted values of a row, by their sum of weights.
#[inline(always)]
pub(super) fn normalise(acc: &[f32], sum: f32, out: &mut [f32]) {
    let inverse = 1.0 / sum;
    out.iter_mut().zip(acc).for_each(|(out, acc)| *out = acc * inverse);
}
