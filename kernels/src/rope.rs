//! Rotary position embedding.

use crate::ctx::{Columns, Ctx, for_rows};
use crate::simd::vectorised;

/// Cosines and sines `[max_positions, rot_dim / 2]` of every position's angles, made once per model by the
/// caller (rope scaling and attention factors included).
#[derive(Clone, Copy, Debug)]
pub struct RopeTable<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Features of a head that rotate, even: the first `rot_dim` of them.
    pub rot_dim: usize,
}

impl<'a> RopeTable<'a> {
    /// Cosines and sines of a position.
    ///
    /// Panics beyond the table.
    pub(crate) fn angles(&self, position: u32) -> (&'a [f32], &'a [f32]) {
        let angles = position as usize * (self.rot_dim / 2)..(position as usize + 1) * (self.rot_dim / 2);
        (&self.cos[angles.clone()], &self.sin[angles])
    }

    /// Panics unless heads have as many features as rotate.
    pub(crate) fn check(&self, head_dim: usize) {
        let rot_dim = self.rot_dim;
        assert!(rot_dim <= head_dim && rot_dim.is_multiple_of(2), "rot_dim {rot_dim} of head_dim {head_dim}");
    }
}

/// Rotates, in place, `num_heads` heads of `head_dim` values in the given columns of each row; row r is at
/// `positions[r]`. Feature i turns with feature `i + rot_dim / 2` (the NeoX order); features from `rot_dim`
/// on stay.
///
/// Panics on a position beyond the table: lengths are checked at admission.
pub fn rope(
    ctx: &Ctx<'_>,
    x: &mut [f32],
    columns: Columns,
    num_heads: usize,
    head_dim: usize,
    table: &RopeTable<'_>,
    positions: &[u32],
) {
    let isa = ctx.isa;
    table.check(head_dim);
    columns.check("rope", x, positions.len(), num_heads * head_dim);
    for_rows(ctx, &mut x[..positions.len() * columns.stride], columns.stride, &|first, rows| {
        for (row, &position) in rows.chunks_exact_mut(columns.stride).zip(&positions[first..]) {
            let (cos, sin) = table.angles(position);
            let heads = &mut row[columns.first..][..num_heads * head_dim];
            vectorised!(isa, rotate_heads(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]));
        }
    });
}

#[inline(always)]
pub(crate) fn rotate_heads(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let sin = &sin[..half];
    for head in heads.chunks_exact_mut(head_dim) {
        let (low, high) = head[..2 * half].split_at_mut(half);
        for i in 0..half {
            let (a, b) = (low[i], high[i]);
            low[i] = a.mul_add(cos[i], -(b * sin[i]));
            high[i] = b.mul_add(cos[i], a * sin[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::workers::{Priority, WorkerPool};

    #[test]
    fn every_instruction_set_rotates_the_first_features_of_each_head_alike() {
        let pool = WorkerPool::new(2);
        let (m, num_heads, columns) = (90, 3, Columns { first: 5, stride: 400 });
        let positions: Vec<u32> = (0..m as u32).map(|i| (i * 37) % 101).collect();
        for (head_dim, rot_dim) in [(8, 8), (20, 20), (80, 32), (128, 128)] {
            let half = rot_dim / 2;
            let angle = |i: usize| (i / half) as f64 / 1.3f64.powi((i % half) as i32);
            let cos: Vec<f32> = (0..101 * half).map(|i| angle(i).cos() as f32).collect();
            let sin: Vec<f32> = (0..101 * half).map(|i| angle(i).sin() as f32).collect();
            let table = RopeTable { cos: &cos, sin: &sin, rot_dim };
            let x: Vec<f32> = (0..m * 400).map(|i| crate::uniform(1, 0, i as u32) as f32).collect();
            let mut want = x.clone();
            for (row, &position) in positions.iter().enumerate() {
                for head in 0..num_heads {
                    let start = row * 400 + 5 + head * head_dim;
                    for i in 0..half {
                        let (c, s) = (cos[position as usize * half + i], sin[position as usize * half + i]);
                        let (a, b) = (x[start + i], x[start + half + i]);
                        want[start + i] = a.mul_add(c, -(b * s));
                        want[start + half + i] = b.mul_add(c, a * s);
                    }
                }
            }
            for &isa in Isa::available() {
                let ctx = Ctx { pool: &pool, isa, priority: Priority::Prefill };
                let mut got = x.clone();
                rope(&ctx, &mut got, columns, num_heads, head_dim, &table, &positions);
                assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?} {head_dim}");
            }
        }
    }
}
