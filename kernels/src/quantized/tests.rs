//! Parity over instruction sets, batches and threads in bits; closeness to the f32 product.

use half::f16;

use super::*;
use crate::ctx::Ctx;
use crate::isa::Isa;
use crate::numerics::Order;
use crate::packed_matrix::{PackedMatrix, WeightDtype, Weights};
use crate::workers::{Priority, WorkerPool};

const FORMATS: [PackedFormat; 5] =
    [PackedFormat::Int8, PackedFormat::Int4, PackedFormat::Int4Min, PackedFormat::Int6, PackedFormat::Int8Row];

fn uniform(seed: u32, index: usize) -> f64 {
    crate::uniform(u64::from(seed), 0, index as u32)
}

/// Numbers in (-1, 1) that differ in many bits.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    (0..len).map(|i| (uniform(seed, i) * 2.0 - 1.0) as f32).collect()
}

/// Weights whose codes, scales and minima take all their values.
fn weights(format: PackedFormat, rows: usize, cols: usize, seed: u32) -> QuantizedWeights {
    let (bits, offset, group, block) = match format {
        PackedFormat::Int8 | PackedFormat::Int8Pairs => (8, 128, 32, 32),
        PackedFormat::Int4 => (4, 8, 32, 32),
        PackedFormat::Int4Min => (4, 0, 32, 256),
        PackedFormat::Int6 => (6, 32, 16, 256),
        PackedFormat::Int8Row => (8, 128, cols, cols),
    };
    let halves = |seed: u32| -> Vec<f32> {
        (0..rows * cols / block).map(|i| f16::from_f64(uniform(seed, i) * 0.02 + 1e-6).to_f32()).collect()
    };
    let small = |seed: u32, i: usize| (uniform(seed, i) * 64.0) as u8;
    let groups = rows * cols / group;
    QuantizedWeights {
        rows,
        cols,
        bits,
        offset,
        group,
        block,
        codes: (0..rows * cols).map(|i| (uniform(seed, i) * f64::from(1u32 << bits)) as u8).collect(),
        scales: if format == PackedFormat::Int8Row { noise(rows, seed + 1) } else { halves(seed + 1) },
        group_scales: (group < block).then(|| {
            let sign = if format == PackedFormat::Int6 { 32 } else { 0 };
            (0..groups).map(|i| small(seed + 2, i) as i8 - sign).collect()
        }),
        mins: (format == PackedFormat::Int4Min)
            .then(|| Mins { scales: halves(seed + 3), group_mins: (0..groups).map(|i| small(seed + 4, i)).collect() }),
    }
}

/// The same weights for each order of additions.
struct Packed([QuantizedMatrix; 2]);

impl Packed {
    const ORDERS: [Order; 2] = [Order::Pairs, Order::Tiles];

    fn of(weights: &QuantizedWeights) -> Packed {
        Packed(Self::ORDERS.map(|order| QuantizedMatrix::pack(order, &[weights]).unwrap()))
    }

    fn order(&self, order: Order) -> &QuantizedMatrix {
        &self.0[usize::from(order == Order::Tiles)]
    }
}

/// What `act` makes of the reference of each order, for instruction sets of that order.
fn for_orders<T>(act: impl Fn(Isa) -> T) -> impl Fn(Isa) -> T
where
    T: Clone,
{
    let (pairs, tiles) = (act(Isa::PORTABLE), act(Isa::PORTABLE_TILES));
    move |isa| if isa.order() == Order::Pairs { pairs.clone() } else { tiles.clone() }
}

fn product(isa: Isa, threads: usize, x: &[f32], m: usize, w: &Packed, bias: Option<&[f32]>, add: bool) -> Vec<u32> {
    let pool = WorkerPool::new(threads);
    let ctx = Ctx { pool: &pool, isa, priority: Priority::Decode };
    let mut out = noise(m * w.0[0].rows(), 9);
    matmul_quantized(&ctx, x, m, w.order(isa.order()), bias, add, &mut out);
    out.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_row_of_a_packed_table_has_the_bits_of_the_logical_form() {
    let pool = WorkerPool::new(2);
    let ctx = Ctx { pool: &pool, isa: Isa::detect(), priority: Priority::Decode };
    for (format, cols) in FORMATS.map(|format| (format, 512)).into_iter().chain([(PackedFormat::Int8Row, 77)]) {
        let table = weights(format, 70, cols, 31);
        let expected = table.dequantize();
        let ids: Vec<u32> = (0..140).map(|i| (i * 3) % 70).collect();
        for packed in &Packed::of(&table).0 {
            let mut out = vec![0.0; ids.len() * cols];
            crate::embed_quantized(&ctx, packed, &ids, &mut out);
            for (out, &id) in out.chunks(cols).zip(&ids) {
                let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(out), bits(&expected[id as usize * cols..][..cols]), "{packed:?} row {id}");
            }
        }
    }
}

#[test]
fn a_packed_matrix_holds_exactly_what_it_was_made_of() {
    let of_order = |format, order| match (format, order) {
        (PackedFormat::Int8, Order::Tiles) => PackedFormat::Int8Pairs,
        _ => format,
    };
    for (format, order) in FORMATS.into_iter().flat_map(|format| Packed::ORDERS.map(|order| (format, order))) {
        let (first, second) = (weights(format, 33, 512, 1), weights(format, 37, 512, 20));
        let packed = QuantizedMatrix::pack(order, &[&first, &second]).unwrap();
        assert_eq!((packed.rows(), packed.cols(), packed.format()), (70, 512, of_order(format, order)));
        for row in 0..70 {
            let (part, part_row) = if row < 33 { (&first, row) } else { (&second, row - 33) };
            for k in 0..512 {
                let code = i32::from(part.codes[part_row * 512 + k]);
                assert_eq!(packed.weight(row, k), code - part.offset, "{format:?} row {row} k {k}");
            }
            for group in 0..512 / part.group {
                assert_eq!(packed.scale(row, group), part.scale(part_row, group), "{format:?} row {row} group {group}");
                assert_eq!(
                    packed.min(row, group).unwrap_or(0.0),
                    part.min(part_row, group),
                    "{format:?} {row} {group}"
                );
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_reference() {
    for format in FORMATS {
        for (m, k, n) in [
            (1, 256, 1),
            (1, 512, 96),
            (2, 256, 33),
            (5, 768, 70),
            (7, 256, 31),
            (29, 512, 64),
            (17, 1280, 40),
            (7, 2304, 33),
            // Tiles of the processor, of one size and of two.
            (8, 768, 96),
            (14, 256, 33),
            (16, 512, 32),
            (31, 1024, 65),
            (47, 768, 31),
            (67, 2304, 40),
        ] {
            let w = Packed::of(&weights(format, n, k, 1));
            let (x, bias) = (noise(m * k, 2), noise(n, 3));
            for (bias, add) in [(None, false), (Some(&bias[..]), true)] {
                let want = for_orders(|isa| product(isa, 1, &x, m, &w, bias, add));
                for &isa in Isa::available() {
                    assert_eq!(product(isa, 2, &x, m, &w, bias, add), want(isa), "{isa:?} {format:?} [{m}, {k}] x {n}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    let (k, n) = (512, 80);
    let x = noise(40 * k, 4);
    for format in FORMATS {
        let w = Packed::of(&weights(format, n, k, 5));
        for &isa in Isa::available() {
            let whole = product(isa, 2, &x, 40, &w, None, false);
            for m in [1, 2, 5, 6, 7, 13, 16, 25, 33] {
                let some = product(isa, 1, &x[3 * k..(3 + m) * k], m, &w, None, false);
                assert_eq!(some, whole[3 * n..(3 + m) * n], "{isa:?} {format:?} {m} rows");
            }
        }
    }
}

/// The largest codes with the largest activations: where 16 bits would not hold a sum.
#[test]
fn the_largest_integers_do_not_saturate() {
    for format in FORMATS {
        let mut largest = weights(format, 40, 512, 7);
        let top = ((1u32 << largest.bits) - 1) as u8;
        largest.codes.iter_mut().enumerate().for_each(|(i, code)| *code = if i % 5 == 0 { 0 } else { top });
        let w = Packed::of(&largest);
        let x: Vec<f32> = (0..20 * 512).map(|i| if i % 7 == 0 { -1.0 } else { 1.0 }).collect();
        for m in [3, 20] {
            let x = &x[..m * 512];
            let want = for_orders(|isa| product(isa, 1, x, m, &w, None, false));
            for &isa in Isa::available() {
                assert_eq!(product(isa, 1, x, m, &w, None, false), want(isa), "{isa:?} {format:?} {m} rows");
            }
        }
    }
}

#[test]
fn rows_and_columns_of_any_number_with_a_scale_per_row() {
    for (m, k, n) in [
        (3, 1, 1),
        (3, 30, 7),
        (3, 513, 33),
        (1, 100, 64),
        (17, 95, 40),
        (35, 1057, 70),
        (70, 2999, 33),
        (70, 1200, 1030),
    ] {
        let w = Packed::of(&weights(PackedFormat::Int8Row, n, k, 1));
        let x = noise(m * k, 2);
        let want = product(Isa::PORTABLE, 1, &x, m, &w, None, false);
        for &isa in Isa::available() {
            // Memory that is lent has something else in it the second time.
            for threads in [1, 2] {
                assert_eq!(product(isa, threads, &x, m, &w, None, false), want, "{isa:?} [{m}, {k}] x {n}");
            }
        }
    }
}

/// Groups of 32 in rows that are no whole blocks of 256.
#[test]
fn columns_of_any_number_of_groups() {
    for format in [PackedFormat::Int8, PackedFormat::Int4] {
        for (m, k, n) in [(1, 96, 33), (9, 96, 40), (20, 1120, 33), (15, 2336, 64)] {
            let w = Packed::of(&weights(format, n, k, 1));
            let x = noise(m * k, 2);
            let want = for_orders(|isa| product(isa, 1, &x, m, &w, None, false));
            for &isa in Isa::available() {
                assert_eq!(product(isa, 2, &x, m, &w, None, false), want(isa), "{isa:?} {format:?} [{m}, {k}] x {n}");
            }
        }
    }
}

/// Also scales that are subnormal as f16, zero or negative, and ones that make ties.
#[test]
fn weights_that_are_opened_compute_what_their_bf16_does() {
    for (m, k, n) in [(1, 64, 1), (1, 2048, 96), (5, 1120, 33), (40, 352, 70), (300, 288, 300)] {
        let mut logical = weights(PackedFormat::Int8, n, k, 11);
        for (i, scale) in logical.scales.iter_mut().enumerate() {
            let odd = [f16::from_bits(1 + i as u16 % 99).to_f32(), 0.0, -0.75, 257.0 / 256.0, 259.0 / 256.0];
            *scale = odd.get(i % 9).copied().unwrap_or(*scale);
        }
        let (w, x, bias) = (Packed::of(&logical), noise(m * k, 12), noise(n, 3));
        let float = PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::F32(&logical.dequantize())]);
        assert!(w.order(Order::Tiles).computes_bf16() && !w.order(Order::Pairs).computes_bf16());
        for &isa in Isa::available().iter().filter(|isa| isa.order() == Order::Tiles) {
            for (bias, add) in [(None, false), (Some(&bias[..]), true)] {
                let pool = WorkerPool::new(2);
                let ctx = Ctx { pool: &pool, isa, priority: Priority::Prefill };
                let mut want = noise(m * n, 9);
                crate::matmul(&ctx, &x, m, &float, bias, add, &mut want);
                let want: Vec<u32> = want.iter().map(|y| y.to_bits()).collect();
                assert_eq!(product(isa, 2, &x, m, &w, bias, add), want, "{isa:?} [{m}, {k}] x {n}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "packed for another order")]
fn weights_of_another_order_are_refused() {
    let w = QuantizedMatrix::pack(Order::Pairs, &[&weights(PackedFormat::Int8, 32, 64, 1)]).unwrap();
    let ctx = Ctx { pool: &WorkerPool::new(1), isa: Isa::PORTABLE_TILES, priority: Priority::Decode };
    matmul_quantized(&ctx, &[1.0; 64], 1, &w, None, false, &mut [0.0; 32]);
}

/// Rounding an activation is off by at most half a step, m / 254 with m the largest magnitude that shares its
/// scale; so an output is off by at most the sum of |weight| * m / 254 (and the rounding of f32 sums).
#[test]
fn products_differ_from_those_of_f32_by_the_rounding_of_activations_alone() {
    let (m, k, n) = (4, 512, 37);
    let x = noise(m * k, 1);
    for format in FORMATS {
        let logical = weights(format, n, k, 2);
        let values = logical.dequantize();
        let got = product(Isa::PORTABLE, 2, &x, m, &Packed::of(&logical), None, false);
        let shared = if format == PackedFormat::Int8Row { k } else { 32 };
        for row in 0..m {
            for column in 0..n {
                let (mut want, mut bound) = (0.0f64, 0.0f64);
                for (x, w) in x[row * k..][..k].chunks(shared).zip(values[column * k..][..k].chunks(shared)) {
                    let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    for (x, w) in x.iter().zip(w) {
                        want += f64::from(*x) * f64::from(*w);
                        bound += f64::from(w.abs()) * f64::from(max) / 254.0 * 1.001;
                    }
                }
                let error = (f64::from(f32::from_bits(got[row * n + column])) - want).abs();
                assert!(error <= bound + 1e-5, "{format:?} [{row}, {column}]: {error} > {bound}");
                // The errors of 512 roundings do not all point the same way.
                assert!(error <= bound / 3.0 + 1e-5, "{format:?} [{row}, {column}]: {error} of {bound} is no rounding");
            }
        }
    }
}

#[test]
fn tiny_huge_and_impossible_activations_have_one_result() {
    let k = 256;
    let cases = [0.0, 1e-45, 1e-38, 9e-31, 2e-30, 1e30, f32::MAX, f32::INFINITY, f32::NAN, -0.0];
    for format in FORMATS {
        let w = Packed::of(&weights(format, 33, k, 3));
        for case in cases {
            let mut x = noise(k, 4).iter().map(|x| x * 1e-31).collect::<Vec<f32>>();
            x[37] = case;
            let want = for_orders(|isa| product(isa, 1, &x, 1, &w, None, false));
            for &isa in Isa::available() {
                let got = product(isa, 1, &x, 1, &w, None, false);
                let same = |(a, b): (&u32, &u32)| a == b || f32::from_bits(*a).is_nan() && f32::from_bits(*b).is_nan();
                assert!(got.iter().zip(&want(isa)).all(same), "{isa:?} {format:?} {case}");
                let is_finite = got.iter().all(|y| f32::from_bits(*y).is_finite());
                assert!(case.is_finite() || !is_finite, "{case} is lost");
            }
        }
    }
}

#[test]
fn weights_without_a_kernel_are_named() {
    let odd = QuantizedWeights { bits: 3, ..weights(PackedFormat::Int4, 2, 64, 1) };
    let error = QuantizedMatrix::pack(Order::Pairs, &[&odd]).unwrap_err().to_string();
    assert_eq!(error, "no kernel computes with [2, 64] of 3 bits in groups of 32, blocks of 32");
    let (four, eight) = (weights(PackedFormat::Int4, 2, 64, 1), weights(PackedFormat::Int8, 2, 64, 1));
    assert!(QuantizedMatrix::pack(Order::Tiles, &[&four, &eight]).unwrap_err().to_string().contains("stacked on"));
    let mut inexact = weights(PackedFormat::Int8, 2, 64, 1);
    inexact.scales[1] = 0.1;
    assert!(QuantizedMatrix::pack(Order::Tiles, &[&inexact]).is_err());
}

/// A row of one group of 32 is a block of q8_0 but for its scale, which is an f32.
#[test]
fn rows_of_32_with_a_scale_that_is_no_f16_are_packed() {
    let logical = weights(PackedFormat::Int8Row, 3, 32, 7);
    assert!(logical.scales.iter().any(|scale| f16::from_f32(*scale).to_f32() != *scale));
    for packed in Packed::of(&logical).0 {
        let mut row = vec![0.0; 32];
        packed.row(2, &mut row);
        assert_eq!(row, logical.dequantize()[64..]);
    }
}
