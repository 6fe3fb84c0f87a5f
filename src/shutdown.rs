//! SIGTERM and Ctrl-C: the first begins the drain, a later one ends the process at once.
//!
//! One request to leave can arrive as two signals: `timeout` and some supervisors signal the process and
//! its whole group. What follows the first within a second is therefore still the first.

use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Signals this soon after the first are part of it.
const SAME_REQUEST: Duration = Duration::from_secs(1);

/// Ends the process with `status` and without exit handlers: other threads may be computing, and handlers take down what
/// they use.
pub fn leave_at_once(status: u8) -> ! {
    signal_hook::low_level::exit(status.into())
}

/// [`None`] if `stop` comes before `starting` is over, as its caller then leaves: nothing serves yet that could be drained.
pub async fn until_ready<T>(stop: &CancellationToken, starting: impl Future<Output = T>) -> Option<T> {
    let started = stop.run_until_cancelled(starting).await;
    if started.is_none() {
        tracing::info!("it leaves before it is ready");
    }
    started
}

/// A token that is cancelled by the first SIGTERM or SIGINT. One more than a second later exits with
/// status 130.
///
/// # Errors
/// If the signal handlers cannot be installed.
pub fn on_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "Ctrl-C",
            }
        };
        let name = next().await;
        cancelled.cancel();
        tracing::info!("{name}: draining; once more ends at once");
        let told_at = Instant::now();
        while told_at.elapsed() < SAME_REQUEST {
            next().await;
        }
        leave_at_once(130);
    });
    Ok(token)
}
