//! Queries, keys and values of one layer: the fused product, norms of heads, rotation, and K and V into the pool.
//!
//! ```text
//! hidden  ──norm, x w──>  [rows, q heads | k heads | v heads]
//! q head  norm of the head, rotation              stays
//! k head  norm of the head, rotation              goes into the pool
//! v head                                          goes into the pool
//! ```
//!
//! A head is finished by the thread that ended its last panel, for the rows of that unit, while it is in its cache.
//! What is computed is that of [`rms_norm_heads`](crate::rms_norm_heads), [`rope`](crate::rope()) and
//! [`kv_write`](crate::kv_write()), one after the other.

use crate::arena::KvArena;
use crate::ctx::Ctx;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, Kind};
#[cfg(target_arch = "x86_64")]
use crate::kv_layout::KvDtype;
use crate::kv_layout::{GRANULE_TOKENS, KvLayout};
use crate::kv_write::Target;
#[cfg(target_arch = "x86_64")]
use crate::numerics::LANES;
use crate::product::{Finished, Groups, Product, Then, multiply_then};
use crate::rms_norm::norm_heads;
use crate::rope::{RopeTable, rotate_heads};
use crate::simd::vectorised;

/// What becomes of the rows of a step in one layer.
#[derive(Clone, Copy, Debug)]
pub struct Qkv<'a> {
    /// `[rows, (num_heads + 2 num_kv_heads) * head_dim]`; a head lies in one section.
    pub product: Product<'a>,
    /// Query heads; the layout says the others.
    pub num_heads: usize,
    /// Weights of the norms of query and key heads, and what is added to the mean square.
    pub head_norms: Option<(&'a [f32], &'a [f32], f32)>,
    /// Angles.
    pub rope: RopeTable<'a>,
    /// Of each row.
    pub positions: &'a [u32],
    /// Where K and V go.
    pub arena: &'a KvArena,
    /// How they lie there.
    pub layout: &'a KvLayout,
    /// The layer's index in it.
    pub layer: usize,
    /// Slot of each row, all distinct: `block * block_size + offset in the block`.
    pub slots: &'a [u32],
}

/// Computes the queries of `out` `[rows, (num_heads + 2 num_kv_heads) * head_dim]`, and writes K and V to the pool:
/// their columns of `out` may be anything.
///
/// Panics on a position beyond the table or a slot beyond the pool.
pub fn qkv_rope_write(ctx: &Ctx<'_>, qkv: &Qkv<'_>, out: &mut [f32]) {
    let head_dim = qkv.layout.head_dim;
    qkv.layout.check();
    qkv.rope.check(head_dim);
    let width = (qkv.num_heads + 2 * qkv.layout.num_kv_heads) * head_dim;
    assert_eq!(out.len(), qkv.positions.len() * width, "rows of {width} values");
    assert_eq!(qkv.positions.len(), qkv.slots.len(), "a position and a slot for each row");
    if let Some((q_norm, k_norm, _)) = qkv.head_norms {
        assert!(q_norm.len() == head_dim && k_norm.len() == head_dim, "norms of heads of {head_dim} values");
    }
    let isa = ctx.isa;
    let finish = |mut head: Finished<'_>| {
        let head = &mut head;
        #[cfg(target_arch = "x86_64")]
        if qkv.writes_granules(isa) {
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
            fn avx512bf16(qkv: &Qkv<'_>, head: &mut Finished<'_>) {
                finish_head::<true>(qkv, head);
            }
            // SAFETY: an `Isa` exists only for instruction sets of this machine.
            #[allow(unsafe_code)]
            return unsafe { avx512bf16(qkv, head) };
        }
        vectorised!(isa, finish_rows(qkv: &Qkv<'_>, head: &mut Finished<'_>));
    };
    multiply_then(ctx, &qkv.product, out, Then::Groups(&Groups { width: head_dim, finish: &finish }));
}

impl Qkv<'_> {
    /// Whether the keys and values of 16 rows that are a granule are written at once.
    #[cfg(target_arch = "x86_64")]
    fn writes_granules(&self, isa: Isa) -> bool {
        let is_whole = self.layout.dtype == KvDtype::Bf16 && self.layout.head_dim.is_multiple_of(2 * LANES);
        is_whole && matches!(isa.0, Kind::Avx512Bf16 | Kind::Amx)
    }
}

/// Rows from the first of these slots on that are finished at once: those of a granule, if it begins here, or one.
#[inline(always)]
fn rows_at_once(slots: &[u32]) -> usize {
    let is_granule = slots.len() >= GRANULE_TOKENS
        && slots[0].is_multiple_of(GRANULE_TOKENS as u32)
        && (1..GRANULE_TOKENS).all(|i| slots[i] == slots[0] + i as u32);
    if is_granule { GRANULE_TOKENS } else { 1 }
}

#[inline(always)]
fn finish_rows(qkv: &Qkv<'_>, head: &mut Finished<'_>) {
    finish_head::<false>(qkv, head);
}

/// With `GRANULES` only where these are written at once.
#[inline(always)]
fn finish_head<const GRANULES: bool>(qkv: &Qkv<'_>, head: &mut Finished<'_>) {
    let (num_heads, num_kv_heads) = (qkv.num_heads, qkv.layout.num_kv_heads);
    let index = head.group();
    let (is_query, is_value) = (index < num_heads, index >= num_heads + num_kv_heads);
    let rows = head.rows();
    let mut first = rows.start;
    while first < rows.end {
        let count = if GRANULES && !is_query { rows_at_once(&qkv.slots[first..rows.end]) } else { 1 };
        let rotated = if is_value { first..first } else { first..first + count };
        for row in rotated {
            let values = head.row(row);
            if let Some((q_norm, k_norm, eps)) = qkv.head_norms {
                norm_heads(values, if is_query { q_norm } else { k_norm }, eps);
            }
            let (cos, sin) = qkv.rope.angles(qkv.positions[row]);
            rotate_heads(values, qkv.layout.head_dim, cos, sin);
            if is_query {
                head.put(row);
            }
        }
        if !is_query {
            let target = Target::of(qkv.arena, qkv.layout, qkv.layer, qkv.slots[first]);
            let kv_head = (index - num_heads) % num_kv_heads;
            match (count, is_value) {
                (1, false) => target.write_key(kv_head, head.read(first)),
                (1, true) => target.write_value(kv_head, head.read(first)),
                #[cfg(target_arch = "x86_64")]
                _ => {
                    let mut values = [&[][..]; GRANULE_TOKENS];
                    for (i, values) in values.iter_mut().enumerate() {
                        *values = head.read(first + i);
                    }
                    // SAFETY: the machine has the instruction set where granules are written at once.
                    #[allow(unsafe_code)]
                    unsafe {
                        if is_value {
                            target.write_values(kv_head, &values)
                        } else {
                            target.write_keys(kv_head, &values)
                        }
                    }
                }
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("rows are written one by one"),
            }
        }
        first += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctx::Columns;
    use crate::isa::Isa;
    use crate::kv_layout::KvDtype;
    use crate::numerics::Order;
    use crate::operand::Operand;
    use crate::packed_matrix::{PackedMatrix, WeightDtype, Weights};
    use crate::product::MatrixRef;
    use crate::workers::{Priority, WorkerPool};

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| (crate::uniform(seed, 0, i as u32) * 2.0 - 1.0) as f32).collect()
    }

    /// Bits of q and of the pool: by the operation, and by the plain ones in turn.
    fn fused_and_plain(
        isa: Isa,
        threads: usize,
        (rows, k, head_dim, dtype): (usize, usize, usize, KvDtype),
    ) -> [(Vec<u32>, Vec<u8>); 2] {
        let pool = WorkerPool::new(threads);
        let ctx = Ctx { pool: &pool, isa, priority: Priority::Decode };
        let (num_heads, num_kv_heads) = (6, 3);
        let layout = KvLayout {
            num_layers: 2,
            num_blocks: rows.div_ceil(16) + 1,
            block_size: 16,
            num_kv_heads,
            head_dim,
            dtype,
        };
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let (x, norm, bias) = (noise(rows * k, 1), noise(k, 2), noise(width, 3));
        let weights = noise(width * k, 4);
        // Values in a section of their own.
        let cut = (num_heads + num_kv_heads) * head_dim * k;
        let [q_and_k, v] = [&weights[..cut], &weights[cut..]]
            .map(|part| PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(part)]));
        let (cos, sin) = (noise(rows * head_dim / 2, 5), noise(rows * head_dim / 2, 6));
        let rope = RopeTable { cos: &cos, sin: &sin, rot_dim: head_dim };
        let positions: Vec<u32> = (0..rows as u32).rev().collect();
        let slots: Vec<u32> = (0..rows as u32).map(|row| row + 7).collect();
        let (q_norm, k_norm) = (noise(head_dim, 7), noise(head_dim, 8));
        let arenas = [(); 2].map(|()| KvArena::new(layout.total_bytes()));
        let mut outs = [(); 2].map(|()| vec![0.0; rows * width]);

        let product = Product {
            operand: Operand::Normed { x: &x, weight: &norm, eps: 1e-5 },
            sections: [Some(MatrixRef::Float(&q_and_k)), Some(MatrixRef::Float(&v)), None],
            bias: Some(&bias),
            add: false,
        };
        let fused = Qkv {
            product,
            num_heads,
            head_norms: Some((&q_norm, &k_norm, 1e-6)),
            rope,
            positions: &positions,
            arena: &arenas[0],
            layout: &layout,
            layer: 1,
            slots: &slots,
        };
        qkv_rope_write(&ctx, &fused, &mut outs[0]);

        let whole = PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&weights)]);
        let mut normed = vec![0.0; x.len()];
        crate::rms_norm(&ctx, &x, &norm, 1e-5, &mut normed);
        let out = &mut outs[1];
        crate::matmul(&ctx, &normed, rows, &whole, Some(&bias), false, out);
        let columns = |first: usize| Columns { first: first * head_dim, stride: width };
        crate::rms_norm_heads(&ctx, out, rows, columns(0), num_heads, &q_norm, 1e-6);
        crate::rms_norm_heads(&ctx, out, rows, columns(num_heads), num_kv_heads, &k_norm, 1e-6);
        crate::rope(&ctx, out, columns(0), num_heads + num_kv_heads, head_dim, &rope, &positions);
        let (k, v) = (columns(num_heads), columns(num_heads + num_kv_heads));
        crate::kv_write(&ctx, &arenas[1], &layout, 1, &slots, out, k, out, v);

        let bytes = arenas.map(|arena| {
            let mut bytes = vec![0; layout.total_bytes()];
            arena.read(0, &mut bytes);
            bytes
        });
        // Queries: nobody looks at the other columns.
        let queries = |row: &[f32]| row[..num_heads * head_dim].iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        let [first, second] = outs.map(|out| out.chunks(width).flat_map(queries).collect());
        let [fused, plain] = bytes;
        [(first, fused), (second, plain)]
    }

    #[test]
    fn heads_finished_on_the_way_have_the_bits_of_one_operation_after_the_other() {
        // Heads of half a panel, of two to four, and across the borders of panels; rows of several tiles. Granules of
        // bf16 that lie in one unit are written at once where heads are whole blocks: not those of 20 and 80. At last
        // two tiles of rows that share a stream of weights.
        let shapes = [
            (1, 96, 64, KvDtype::Bf16),
            (3, 96, 16, KvDtype::F32),
            (40, 96, 20, KvDtype::F32),
            (40, 96, 20, KvDtype::Bf16),
            (130, 96, 64, KvDtype::Bf16),
            (29, 96, 80, KvDtype::F32),
            (61, 96, 80, KvDtype::Bf16),
            (70, 96, 96, KvDtype::F32),
            (61, 96, 96, KvDtype::Bf16),
            (75, 96, 128, KvDtype::Bf16),
            (40, 1030, 64, KvDtype::Bf16),
        ];
        for shape in shapes {
            let references = [Isa::PORTABLE, Isa::PORTABLE_TILES].map(|isa| fused_and_plain(isa, 1, shape));
            for &isa in Isa::available() {
                for threads in [1, 3] {
                    let [fused, plain] = fused_and_plain(isa, threads, shape);
                    assert!(fused == plain, "{isa:?} {shape:?}");
                    let [_, reference] = &references[usize::from(isa.order() == Order::Tiles)];
                    assert!(fused == *reference, "{isa:?} {shape:?}, against the portable one");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "range")]
    fn a_position_beyond_the_table_is_told_to_the_caller() {
        let pool = WorkerPool::new(2);
        let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Decode };
        let layout = KvLayout {
            num_layers: 1,
            num_blocks: 4,
            block_size: 16,
            num_kv_heads: 2,
            head_dim: 64,
            dtype: KvDtype::F32,
        };
        let (x, width) = (noise(40 * 64, 1), 6 * 64);
        let w = PackedMatrix::pack(WeightDtype::F32, 64, &[Weights::F32(&noise(width * 64, 2))]);
        let angles = vec![0.0; 32 * 39];
        let positions: Vec<u32> = (0..40).collect();
        let product = Product {
            operand: Operand::Rows(&x),
            sections: [Some(MatrixRef::Float(&w)), None, None],
            bias: None,
            add: false,
        };
        let qkv = Qkv {
            product,
            num_heads: 2,
            head_norms: None,
            rope: RopeTable { cos: &angles, sin: &angles, rot_dim: 64 },
            positions: &positions,
            arena: &KvArena::new(layout.total_bytes()),
            layout: &layout,
            layer: 0,
            slots: &positions,
        };
        qkv_rope_write(&ctx, &qkv, &mut vec![0.0; 40 * width]);
    }
}
