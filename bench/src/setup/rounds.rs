//! Set-ups in turn: each round gives every set-up its go, beginning with another one each time, so that a machine
//! that drifts does so to all of them.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::Setup;
use super::server::Server;

/// Which set-ups go how often, and what becomes of the results.
#[derive(Debug, Clone, Args)]
pub struct RoundsArgs {
    /// The set-ups: a TOML file of `[[setup]]` tables with name, base_url, and perhaps start (a command and its
    /// flags), env, flags (of bench serve) and ready_seconds. Ratios are to the first.
    #[arg(long, value_name = "PATH")]
    pub setups: PathBuf,
    /// Rounds, each with a seed of its own.
    #[arg(long, value_name = "ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub num_seeds: u64,
    /// Leave a set-up with a start command running until the end, instead of starting it for each round: caches
    /// stay warm, and all set-ups are there at the same time.
    #[arg(long)]
    pub keep_running: bool,
    /// Write all results as JSON.
    #[arg(long, value_name = "PATH")]
    pub save_result: Option<PathBuf>,
    /// Flags of bench serve, for all set-ups, behind --.
    #[arg(last = true, value_name = "FLAGS OF BENCH SERVE")]
    pub serve_flags: Vec<String>,
}

/// What `measure(round, index, server)` says of every set-up, by round and then by set-up.
///
/// A set-up with a start command is started for its go and ended after it, unless it is to be kept running.
///
/// # Errors
/// If a server does not come up, or the first of `measure`'s.
pub async fn in_turn<T>(
    setups: &[Setup],
    args: &RoundsArgs,
    measure: impl AsyncFn(u64, usize, &Server) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<Vec<T>>> {
    let mut kept: Vec<Option<Server>> = setups.iter().map(|_| None).collect();
    let mut rounds = Vec::new();
    for round in 0..args.num_seeds {
        let mut results: Vec<Option<T>> = setups.iter().map(|_| None).collect();
        for place in 0..setups.len() {
            let index = (place + round as usize) % setups.len();
            let setup = &setups[index];
            eprintln!("round {} of {}: {}", round + 1, args.num_seeds, setup.name);
            let server = match kept[index].take() {
                Some(server) => server,
                None => Server::start(setup, &[]).await?,
            };
            let result = measure(round, index, &server).await;
            results[index] = Some(result.with_context(|| format!("round {} of {}", round + 1, setup.name))?);
            if args.keep_running {
                kept[index] = Some(server);
            } else {
                server.stop().await;
            }
        }
        rounds.push(results.into_iter().flatten().collect());
    }
    for server in kept.into_iter().flatten() {
        server.stop().await;
    }
    Ok(rounds)
}
