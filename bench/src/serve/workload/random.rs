//! Prompts of random tokens and how much to generate for each, from the seed. No clock, no I/O.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Phase, Session};

/// An odd factor keeps the seeds of neighbouring runs and requests apart.
const SEED_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
/// Streams of random numbers: two for each request, and those of the prefixes far behind them.
const FIRST_PREFIX_STREAM: u64 = 1 << 62;

/// Random prompts, as `--dataset-name random` and `prefix_repetition` of vLLM.
#[derive(Debug, Clone, Copy)]
pub struct RandomPrompts {
    /// Where all randomness comes from.
    pub seed: u64,
    /// Mean length of a prompt behind its prefix.
    pub input_len: usize,
    /// Mean number of tokens to generate.
    pub output_len: usize,
    /// Both lengths lie within this share of the mean on both sides; 0 to below 1.
    pub range_ratio: f64,
    /// Tokens are below it.
    pub vocab_size: u32,
    /// Tokens in front of each prompt that it shares with others.
    pub prefix_len: usize,
    /// How many such prefixes there are; at least 1. Requests take them in turn.
    pub num_prefixes: usize,
}

impl RandomPrompts {
    /// Request `index`, always the same. Warm-ups have no shared prefix, so that none of those that are
    /// measured is in a cache before.
    pub fn session(&self, phase: Phase, index: usize) -> Session {
        let mut rng = self.rng(2 * index as u64 + u64::from(phase == Phase::Warmup));
        let input_len = self.draw_len(&mut rng, self.input_len);
        let max_tokens = self.draw_len(&mut rng, self.output_len);
        let mut tokens = match phase {
            Phase::Warmup => self.draw_tokens(&mut rng, self.prefix_len),
            Phase::Measured => self.prefix(index % self.num_prefixes),
        };
        tokens.extend(self.draw_tokens(&mut rng, input_len));
        Session::of_tokens(tokens, max_tokens)
    }

    fn prefix(&self, index: usize) -> Vec<u32> {
        self.draw_tokens(&mut self.rng(FIRST_PREFIX_STREAM + index as u64), self.prefix_len)
    }

    fn rng(&self, stream: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed.wrapping_mul(SEED_FACTOR).wrapping_add(stream))
    }

    fn draw_tokens(&self, rng: &mut StdRng, count: usize) -> Vec<u32> {
        (0..count).map(|_| rng.random_range(0..self.vocab_size)).collect()
    }

    fn draw_len(&self, rng: &mut StdRng, mean: usize) -> usize {
        let low = (mean as f64 * (1.0 - self.range_ratio)).floor() as usize;
        let high = (mean as f64 * (1.0 + self.range_ratio)).ceil() as usize;
        rng.random_range(low.max(1)..=high.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Prompt;
    use super::*;

    const PROMPTS: RandomPrompts = RandomPrompts {
        seed: 1,
        input_len: 64,
        output_len: 8,
        range_ratio: 0.0,
        vocab_size: 512,
        prefix_len: 0,
        num_prefixes: 1,
    };

    fn drawn(prompts: RandomPrompts, phase: Phase, index: usize) -> (Vec<u32>, usize) {
        let turn = prompts.session(phase, index).turns.remove(0);
        let Prompt::Tokens(tokens) = turn.prompt else { panic!("random prompts are tokens") };
        (tokens, turn.max_tokens)
    }

    #[test]
    fn a_request_is_a_function_of_seed_phase_and_index() {
        let (tokens, max_tokens) = drawn(PROMPTS, Phase::Measured, 3);
        assert_eq!((tokens.len(), max_tokens), (64, 8));
        assert!(tokens.iter().all(|token| *token < 512));
        assert_eq!(tokens, drawn(PROMPTS, Phase::Measured, 3).0);
        assert_ne!(tokens, drawn(PROMPTS, Phase::Measured, 4).0);
        assert_ne!(tokens, drawn(PROMPTS, Phase::Warmup, 3).0);
        assert_ne!(tokens, drawn(RandomPrompts { seed: 2, ..PROMPTS }, Phase::Measured, 3).0);
    }

    #[test]
    fn lengths_fill_their_range_and_never_vanish() {
        let ranged = RandomPrompts { range_ratio: 0.25, ..PROMPTS };
        let all: Vec<(Vec<u32>, usize)> = (0..500).map(|index| drawn(ranged, Phase::Measured, index)).collect();
        let lens = || all.iter().map(|(tokens, _)| tokens.len());
        assert_eq!((lens().min(), lens().max()), (Some(48), Some(80)));
        let outputs = || all.iter().map(|(_, max_tokens)| *max_tokens);
        assert_eq!((outputs().min(), outputs().max()), (Some(6), Some(10)));
        let tiny = RandomPrompts { range_ratio: 0.99, input_len: 1, ..PROMPTS };
        assert!((0..100).all(|index| !drawn(tiny, Phase::Measured, index).0.is_empty()));
    }

    #[test]
    fn prefixes_are_shared_in_turn_and_never_with_a_warm_up() {
        let prompts = RandomPrompts { prefix_len: 32, num_prefixes: 2, ..PROMPTS };
        let prefix = |phase, index| drawn(prompts, phase, index).0[..32].to_vec();
        assert_eq!(prefix(Phase::Measured, 0), prefix(Phase::Measured, 2));
        assert_ne!(prefix(Phase::Measured, 0), prefix(Phase::Measured, 1));
        assert_ne!(prefix(Phase::Measured, 0), prefix(Phase::Warmup, 0));
        assert_eq!(drawn(prompts, Phase::Measured, 0).0.len(), 96);
        assert_ne!(drawn(prompts, Phase::Measured, 0).0[32..], drawn(prompts, Phase::Measured, 2).0[32..]);
    }
}
