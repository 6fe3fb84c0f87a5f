//! Prompts of random tokens and how much to generate for each, from the seed. No clock, no I/O.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A workload of random prompts, as `--dataset-name random` of vLLM without its shared prefix.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Where all randomness comes from.
    pub seed: u64,
    /// Mean length of a prompt.
    pub input_len: usize,
    /// Mean number of tokens to generate.
    pub output_len: usize,
    /// Lengths lie within this share of the mean on both sides; 0 to below 1.
    pub range_ratio: f64,
    /// Tokens are below it.
    pub vocab_size: u32,
}

/// What one request asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// Tokens to generate.
    pub max_tokens: usize,
}

/// Which of the requests, so that warm-ups leave no prefix in a cache that a measured prompt could hit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Phase {
    /// Before the run.
    Warmup,
    /// Part of the figures.
    Measured,
}

impl Workload {
    /// Request `index`, always the same.
    pub fn ask(&self, phase: Phase, index: usize) -> Ask {
        let stream = 2 * index as u64 + u64::from(phase == Phase::Warmup);
        // An odd factor keeps the seeds of neighbouring runs and requests apart.
        let mut rng = StdRng::seed_from_u64(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(stream));
        let input_len = self.draw_len(&mut rng, self.input_len);
        let max_tokens = self.draw_len(&mut rng, self.output_len);
        Ask { prompt: (0..input_len).map(|_| rng.random_range(0..self.vocab_size)).collect(), max_tokens }
    }

    fn draw_len(&self, rng: &mut StdRng, mean: usize) -> usize {
        let low = (mean as f64 * (1.0 - self.range_ratio)).floor() as usize;
        let high = (mean as f64 * (1.0 + self.range_ratio)).ceil() as usize;
        rng.random_range(low.max(1)..=high.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKLOAD: Workload = Workload { seed: 1, input_len: 64, output_len: 8, range_ratio: 0.0, vocab_size: 512 };

    #[test]
    fn a_request_is_a_function_of_seed_phase_and_index() {
        let ask = WORKLOAD.ask(Phase::Measured, 3);
        assert_eq!((ask.prompt.len(), ask.max_tokens), (64, 8));
        assert!(ask.prompt.iter().all(|token| *token < 512));
        assert_eq!(ask, WORKLOAD.ask(Phase::Measured, 3));
        assert_ne!(ask.prompt, WORKLOAD.ask(Phase::Measured, 4).prompt);
        assert_ne!(ask.prompt, WORKLOAD.ask(Phase::Warmup, 3).prompt);
        assert_ne!(ask.prompt, Workload { seed: 2, ..WORKLOAD }.ask(Phase::Measured, 3).prompt);
    }

    #[test]
    fn lengths_fill_their_range_and_never_vanish() {
        let workload = Workload { range_ratio: 0.25, ..WORKLOAD };
        let asks: Vec<Ask> = (0..500).map(|index| workload.ask(Phase::Measured, index)).collect();
        let lens = || asks.iter().map(|ask| ask.prompt.len());
        assert_eq!((lens().min(), lens().max()), (Some(48), Some(80)));
        let outputs = || asks.iter().map(|ask| ask.max_tokens);
        assert_eq!((outputs().min(), outputs().max()), (Some(6), Some(10)));
        let tiny = Workload { range_ratio: 0.99, input_len: 1, ..WORKLOAD };
        assert!((0..100).all(|index| !tiny.ask(Phase::Measured, index).prompt.is_empty()));
    }
}
