//! SIGTERM and Ctrl-C: the first begins the drain, the second ends the process at once.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGTERM or SIGINT. The second exits with status 130.
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
        tracing::info!("{name}: draining; once more ends at once");
        cancelled.cancel();
        next().await;
        std::process::exit(130);
    });
    Ok(token)
}
