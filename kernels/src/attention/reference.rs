//! The specification of attention: one query head at one position, value by value.

use super::softmax::{Softmax, normalise};
use super::{AttentionParams, first_visible};
use crate::arena::KvArena;
use crate::kv_layout::{GRANULE_TOKENS, KvDtype, KvLayout};
use crate::numerics::{ATTENTION_PART, LANES, Order, TILE_STEPS, bf16_pair, tree_sum};

/// Running state of an online softmax: maximum, sum, weighted values.
struct Partial {
    max: f32,
    sum: f32,
    acc: Vec<f32>,
}

/// The specification: one query head at one position.
pub(super) fn attend(q: &[f32], position: usize, keys: &Keys<'_>, params: &AttentionParams, out: &mut [f32]) {
    let first = first_visible(position, params);
    let softmax = Softmax::of(params, keys.layout.dtype, keys.order);
    let mut total: Option<Partial> = None;
    for part in first / ATTENTION_PART..=position / ATTENTION_PART {
        let partial = attend_part(q, part, first, position, keys, softmax);
        total = Some(match total {
            None => partial,
            Some(mut t) => {
                (t.max, t.sum) = softmax.merge((t.max, t.sum), &mut t.acc, (partial.max, partial.sum), &partial.acc);
                t
            }
        });
    }
    let total = total.expect("a query sees at least itself");
    normalise(&total.acc, total.sum, out);
}

fn attend_part(q: &[f32], part: usize, first: usize, last: usize, keys: &Keys<'_>, softmax: Softmax) -> Partial {
    let mut state = Partial { max: f32::MIN, sum: 0.0, acc: vec![0.0; q.len()] };
    for start in (part * ATTENTION_PART..(part + 1) * ATTENTION_PART).step_by(softmax.tile()) {
        let positions = 0..softmax.tile();
        let visible = |i: usize| (first..=last).contains(&(start + i));
        if !positions.clone().any(visible) {
            continue;
        }
        let mut scores = vec![f32::MIN; positions.len()];
        for i in positions.clone().filter(|&i| visible(i)) {
            scores[i] = softmax.score(keys.product(q, start + i));
        }
        let max = scores.iter().fold(state.max, |max, &score| max.max(score));
        let (_, correction, _) = softmax.join(state.max, max);
        let mut weights = vec![0.0f32; positions.len()];
        let mut lanes = [0.0f32; LANES];
        for i in positions.filter(|&i| visible(i)) {
            weights[i] = softmax.weight(scores[i], max);
            lanes[i % LANES] += weights[i];
        }
        state.max = max;
        state.sum = state.sum.mul_add(correction, tree_sum(lanes));
        for (dim, acc) in state.acc.iter_mut().enumerate() {
            *acc = acc.mul_add(correction, keys.weighted(&weights, start, dim, visible));
        }
    }
    state
}

/// Keys and values of one KV head of one sequence, value by value.
pub(super) struct Keys<'a> {
    pub(super) arena: &'a KvArena,
    pub(super) layout: &'a KvLayout,
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    pub(super) block_table: &'a [u32],
    pub(super) order: Order,
}

impl Keys<'_> {
    fn head(&self, position: usize) -> usize {
        let block = self.block_table[position / self.layout.block_size];
        let granule = position % self.layout.block_size / GRANULE_TOKENS;
        self.layout.granule_offset(self.layer, block, granule) + self.kv_head * self.layout.head_bytes()
    }

    fn load(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.arena.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Of a query with the key of a position.
    fn product(&self, q: &[f32], position: usize) -> f32 {
        let (head, token) = (self.head(position), position % GRANULE_TOKENS);
        match self.layout.dtype {
            KvDtype::F32 => (0..q.len()).fold(0.0, |acc, dim| {
                q[dim].mul_add(f32::from_bits(self.load(head + self.layout.k_offset(token, dim))), acc)
            }),
            KvDtype::Bf16 => {
                let pairs = (0..q.len())
                    .step_by(2)
                    .map(|dim| (bf16_pair(q[dim], q[dim + 1]), self.load(head + self.layout.k_offset(token, dim))));
                self.order.fold(0.0, TILE_STEPS, pairs)
            }
        }
    }

    /// Fold of `weights` with feature `dim` of the visible values of a tile.
    fn weighted(&self, weights: &[f32], start: usize, dim: usize, visible: impl Fn(usize) -> bool) -> f32 {
        let at = |i: usize| {
            let position = start + i;
            self.head(position) + self.layout.plane_bytes() + self.layout.v_offset(position % GRANULE_TOKENS, dim)
        };
        match self.layout.dtype {
            KvDtype::F32 => (0..weights.len())
                .filter(|&i| visible(i))
                .fold(0.0, |acc, i| weights[i].mul_add(f32::from_bits(self.load(at(i))), acc)),
            KvDtype::Bf16 => {
                // A block at a time: it is counted from its first position, seen or not.
                (0..weights.len()).step_by(2 * TILE_STEPS).fold(0.0, |acc, block| {
                    let steps = (block..block + 2 * TILE_STEPS).step_by(2);
                    let pairs = steps.filter(|&i| visible(i) || visible(i + 1)).map(|i| {
                        let mask = (u32::from(visible(i)) * 0xffff) | (u32::from(visible(i + 1)) * 0xffff_0000);
                        (bf16_pair(weights[i], weights[i + 1]), self.load(at(i)) & mask)
                    });
                    self.order.fold(acc, TILE_STEPS, pairs)
                })
            }
        }
    }
}
