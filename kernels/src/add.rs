//! The residual sum.

use crate::ctx::{Ctx, for_rows};

/// `out = out + x`, value by value.
pub fn add(ctx: &Ctx<'_>, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "operands of equal size");
    // One rounding per value: no order to keep, and memory sets the pace, so the base instruction set does.
    for_rows(ctx, out, 1, &|first, out| {
        out.iter_mut().zip(&x[first..]).for_each(|(out, x)| *out += x);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::workers::{Priority, WorkerPool};

    #[test]
    fn every_value_gets_its_own() {
        let pool = WorkerPool::new(2);
        let x: Vec<f32> = (0..100_003).map(|i| i as f32).collect();
        let mut out = vec![0.5; x.len()];
        add(&Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Decode }, &x, &mut out);
        assert!(out.iter().zip(&x).all(|(out, x)| *out == x + 0.5));
    }
}
