use super::row::BLOCK;
use super::*;
use crate::lanes::Portable;
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

/// Of a row nothing was noted of, which is what it is with what was noted.
fn cut(row: &Row<'_>, target: (f64, f64), candidates: &mut Vec<Candidate>) -> Option<Candidate> {
    let mut noted = Noted::default();
    row.estimate::<Portable>(&mut noted).expect("rows of tests have few candidates");
    let with_noted = row.cut_noted(target, &noted, &mut Vec::new());
    let cut = row.cut::<Portable>(target, candidates, &mut Vec::new());
    assert!(with_noted == cut || with_noted.is_none() && cut.is_some_and(|cut| cut.logit() < -7.9), "{target:?}");
    cut
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
    let mut sorted: Vec<Candidate> = logits.iter().zip(0..).map(|(&x, token)| Candidate::new(x - max, token)).collect();
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
            assert_eq!(cut(&row, (target, margin), &mut Vec::new()), None, "token {at}");
        }
        let next = sums.get(at + 1).map_or(sum, |next| next - sum);
        if next > 4.0 * margin {
            assert_eq!(cut(&row, (sum + next / 2.0, margin), &mut Vec::new()), Some(sorted[at + 1]), "token {at}");
        }
    }
}

#[test]
fn bands_keep_what_a_full_sort_would() {
    for spread in [1.0, 10.0, 60.0] {
        let mut logits: Vec<f32> = (0..5000).map(|i| (-crate::uniform(3, 0, i) * spread) as f32).collect();
        (logits[77], logits[78], logits[4000]) = (0.0, -2.0, -2.0);
        logits[100..200].fill(f32::NEG_INFINITY);
        let mut sorted: Vec<Candidate> = logits.iter().zip(0..).map(|(&x, token)| Candidate::new(x, token)).collect();
        sorted.sort_unstable();
        assert!(sorted.is_sorted_by(|a, b| (b.logit(), a.token()) <= (a.logit(), b.token())));
        assert!(sorted.iter().all(|c| c.logit() == logits[c.token() as usize]));
        let row = Row::new(&DRAW, &logits, 0.0);
        let total: f64 = logits.iter().map(|&x| f64::from(exp(x))).sum();
        let mut collected = Vec::new();
        for share in [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 2.0] {
            let cut = cut(&row, (share * total, 0.0), &mut collected);
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
            row.keep_top_k::<Portable>(k, &mut collected);
            collected.sort_unstable();
            assert!(collected == sorted[..k.min(4900)], "{spread} {k}");
        }
    }
}

#[test]
fn rows_with_too_much_to_note_are_cut_alike() {
    let logits = noise(20_000, 2.0);
    for (top_p, uniform) in [(0.2, 0.1), (0.5, 0.99), (0.9, 0.5), (0.99, 0.999)] {
        let params = SampleParams { top_p, uniform, ..DRAW };
        let row = Row::new(&params, &logits, 2.0);
        assert_eq!(row.estimate::<Portable>(&mut Noted::default()), None);
        assert_eq!(token(&logits, &params), stated(&logits, &params), "{params:?}");
    }
}

#[test]
fn estimated_sums_are_as_near_as_they_say() {
    for (i, spread) in (0..).zip([0.5, 3.0, 8.0, 30.0, 100.0, 3000.0]) {
        for temperature in [1e-4, 0.3, 1.0, 1.7, 100.0] {
            let mut logits = noise(20 * BLOCK + 5 + i, spread);
            (logits[9], logits[4000], logits[20 * BLOCK + 4]) = (f32::NAN, f32::NEG_INFINITY, 1.5 * spread as f32);
            let max = 1.5 * spread as f32;
            let row = Row::new(&SampleParams { temperature, ..DRAW }, &logits, max);
            let mut noted = Noted::default();
            let Some((total, margin)) = row.estimate::<Portable>(&mut noted) else {
                assert!(spread / f64::from(temperature) < 8.0, "{spread} at {temperature}");
                continue;
            };
            let mut ends = Vec::new();
            row.sum_blocks(&mut ends);
            let exact = ends[ends.len() - 1];
            assert!((total - exact).abs() < margin, "{spread} at {temperature}: {total} for {exact}, within {margin}");
            assert!(margin < 3e-5 * exact, "{spread} at {temperature}: {margin} of {exact}");
            let above = |depth: f32| -> Vec<u32> {
                let scaled = logits.iter().map(|&x| (x - max) / temperature);
                scaled.zip(0..).filter(|(x, _)| *x > -depth).map(|(_, token)| token).collect()
            };
            let tokens = noted.tokens();
            assert!(tokens.is_sorted(), "{spread} at {temperature}");
            assert!(above(8.0).iter().all(|token| tokens.binary_search(token).is_ok()), "{spread} at {temperature}");
            let near = above(8.1);
            assert!(tokens.iter().all(|token| near.binary_search(token).is_ok()), "{spread} at {temperature}");
        }
    }
}
