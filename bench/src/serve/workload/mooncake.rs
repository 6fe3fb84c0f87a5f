//! Traces in Mooncake's format: when requests came, how long they were, and which of their blocks were the
//! same. Nothing of their content is known, so a block's tokens are drawn from its hash: equal hashes become
//! equal tokens, and the structure of shared prefixes is kept.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::Session;
use crate::mooncake::{BLOCK_TOKENS, TraceRow, rows};

/// How a trace is bent to what can be run: all of it is part of the result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TraceScale {
    /// Lengths, and the tokens of a block, are divided by it; it divides [`BLOCK_TOKENS`].
    pub length_divisor: usize,
    /// Times are multiplied by it.
    pub time_scale: f64,
    /// Each time gets a random part of it added before that: the published times are rounded to 3 s.
    pub jitter: Duration,
}

/// A trace that is ready to be replayed.
#[derive(Debug, Clone)]
pub struct MooncakeTrace {
    /// In the order in which they are sent.
    rows: Vec<TraceRow>,
    length_divisor: usize,
    vocab_size: u32,
    seed: u64,
}

impl MooncakeTrace {
    /// The first `num_rows_max` rows of a trace.
    ///
    /// # Errors
    /// If a line is no request, or there is none.
    pub fn parse(
        text: &str,
        num_rows_max: usize,
        scale: TraceScale,
        vocab_size: u32,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let rows = rows(text.as_bytes()).take(num_rows_max).map(|row| Ok(row?.1));
        let rows: Vec<TraceRow> = rows.collect::<anyhow::Result<_>>()?;
        anyhow::ensure!(!rows.is_empty(), "there is no row");
        Ok(Self::new(rows, scale, vocab_size, seed))
    }

    fn new(mut rows: Vec<TraceRow>, scale: TraceScale, vocab_size: u32, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        for row in &mut rows {
            let jittered = row.timestamp.as_secs_f64() + scale.jitter.as_secs_f64() * rng.random::<f64>();
            row.timestamp = Duration::from_secs_f64(jittered * scale.time_scale);
            row.input_len = row.input_len.div_ceil(scale.length_divisor);
            row.output_len = row.output_len.div_ceil(scale.length_divisor);
        }
        // Rows of one rounded time have no order of their own.
        rows.sort_by_key(|row| row.timestamp);
        Self { rows, length_divisor: scale.length_divisor, vocab_size, seed }
    }

    /// Rows that are replayed.
    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    /// When each is sent.
    pub fn times(&self) -> Vec<Duration> {
        self.rows.iter().map(|row| row.timestamp).collect()
    }

    /// Row `index` as a request.
    pub fn session(&self, index: usize) -> Session {
        let row = &self.rows[index];
        let block_tokens = BLOCK_TOKENS / self.length_divisor;
        let mut tokens = Vec::with_capacity(row.hash_ids.len() * block_tokens);
        for hash in &row.hash_ids {
            let mut rng = StdRng::seed_from_u64(self.seed.rotate_left(32) ^ hash);
            tokens.extend((0..block_tokens).map(|_| rng.random_range(0..self.vocab_size)));
        }
        tokens.truncate(row.input_len);
        Session::of_tokens(tokens, row.output_len)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Prompt;
    use super::*;

    const ROWS: &str = r#"{"timestamp": 3000, "input_length": 1030, "output_length": 50, "hash_ids": [0, 7, 8]}
{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [0]}

{"timestamp": 3000, "input_length": 1500, "output_length": 33, "hash_ids": [0, 7, 9]}
"#;
    const AS_IT_IS: TraceScale = TraceScale { length_divisor: 1, time_scale: 1.0, jitter: Duration::ZERO };

    fn trace(scale: TraceScale) -> MooncakeTrace {
        MooncakeTrace::parse(ROWS, 10, scale, 512, 3).unwrap()
    }

    fn request(trace: &MooncakeTrace, index: usize) -> (Vec<u32>, usize) {
        let turn = trace.session(index).turns.remove(0);
        let Prompt::Tokens(tokens) = turn.prompt else { panic!("a trace has tokens") };
        (tokens, turn.max_tokens)
    }

    #[test]
    fn equal_hashes_are_equal_tokens() {
        let trace = trace(AS_IT_IS);
        assert_eq!(trace.times(), [0, 3, 3].map(Duration::from_secs));
        let (short, long, other) = (request(&trace, 0), request(&trace, 1), request(&trace, 2));
        assert_eq!((short.0.len(), long.0.len(), other.0.len()), (512, 1030, 1500));
        assert_eq!((short.1, long.1, other.1), (1, 50, 33));
        assert_eq!(long.0[..512], short.0);
        assert_eq!(long.0[..1024], other.0[..1024]);
        assert_ne!(long.0[1024..], other.0[1024..1030]);
        assert_ne!(long.0[..512], long.0[512..1024]);
    }

    #[test]
    fn lengths_are_divided_and_shared_prefixes_stay_shared() {
        let trace = trace(TraceScale { length_divisor: 16, ..AS_IT_IS });
        let (long, other) = (request(&trace, 1), request(&trace, 2));
        assert_eq!((long.0.len(), other.0.len()), (65, 94));
        assert_eq!((long.1, other.1), (4, 3));
        assert_eq!(long.0[..64], other.0[..64]);
        assert_ne!(long.0[64], other.0[64]);
    }

    #[test]
    fn times_are_jittered_within_their_bound_and_scaled() {
        let trace = trace(TraceScale { time_scale: 0.5, jitter: Duration::from_secs(3), ..AS_IT_IS });
        let times = trace.times();
        assert!(times.is_sorted());
        assert!(times[0] < Duration::from_millis(1500), "{times:?}");
        assert!(times[1..].iter().all(|at| (1.5..3.0).contains(&at.as_secs_f64())), "{times:?}");
    }

    #[test]
    fn as_many_rows_as_asked_for_are_read_and_none_is_an_error() {
        let parse = |text, num_rows_max| MooncakeTrace::parse(text, num_rows_max, AS_IT_IS, 512, 3);
        assert_eq!(parse(ROWS, 2).unwrap().num_rows(), 2);
        assert!(parse("\n", 10).is_err());
        assert!(parse("{\n", 10).is_err());
    }
}
