//! How fast a simulated model is.

use std::time::Duration;

use clap::Args;

use super::values::{parse_above_zero, parse_sim_time};

/// Speeds of `--device sim`. A step takes the longer of two times: of reading weights and KV, and of computing its
/// tokens.
///
/// The defaults are about those of 8 billion parameters in bf16 on a GPU that reads 3 TB/s.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Simulated model (--device sim)")]
pub struct SimArgs {
    /// Tokens that a simulated model computes in a second: how fast it prefills.
    #[arg(long, value_name = "TOKENS", default_value_t = 20_000, value_parser = parse_above_zero)]
    pub sim_tokens_per_second: u32,

    /// What a step of a simulated model takes at least: reading the weights.
    #[arg(long, value_name = "DURATION", default_value = "6ms", value_parser = parse_sim_time)]
    pub sim_step_time: Duration,

    /// What is added to that for each 1,000 tokens of KV which the sequences of the step have before them.
    #[arg(long, value_name = "DURATION", default_value = "50us", value_parser = parse_sim_time)]
    pub sim_context_time: Duration,
}
