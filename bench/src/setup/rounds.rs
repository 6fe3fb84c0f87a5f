//! Set-ups in turn: each round gives every set-up its go, beginning with another one each time, so that a machine
//! that drifts does so to all of them.

use anyhow::Context;

use super::Setup;
use super::server::Server;

/// What `measure(round, index, server)` says of every set-up, by round and then by set-up.
///
/// A set-up with a start command is started for its go and ended after it; with `keep_running` it is left
/// running until the end.
///
/// # Errors
/// If a server does not come up, or the first of `measure`'s.
pub async fn in_turn<T>(
    setups: &[Setup],
    num_rounds: u64,
    keep_running: bool,
    measure: impl AsyncFn(u64, usize, &Server) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<Vec<T>>> {
    let mut kept: Vec<Option<Server>> = setups.iter().map(|_| None).collect();
    let mut rounds = Vec::new();
    for round in 0..num_rounds {
        let mut results: Vec<Option<T>> = setups.iter().map(|_| None).collect();
        for place in 0..setups.len() {
            let index = (place + round as usize) % setups.len();
            let setup = &setups[index];
            eprintln!("round {} of {num_rounds}: {}", round + 1, setup.name);
            let server = match kept[index].take() {
                Some(server) => server,
                None => Server::start(setup, &[]).await?,
            };
            let result = measure(round, index, &server).await;
            results[index] = Some(result.with_context(|| format!("round {} of {}", round + 1, setup.name))?);
            if keep_running {
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
