//! Logs and metrics of a process: set up once, before anything else runs.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Context;
use common::config::{LogArgs, LogFormat};
use metrics_exporter_prometheus::PrometheusHandle;
use tracing_subscriber::EnvFilter;

/// Histograms are folded this often, so that they stay small when nobody scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Starts logging and installs the metrics recorder of the process. Must run inside the tokio runtime.
///
/// # Errors
/// If the filter cannot be parsed, or something has been installed before.
pub fn init(log: &LogArgs) -> anyhow::Result<PrometheusHandle> {
    let filter = EnvFilter::try_new(&log.log_level).with_context(|| {
        format!("--log-level \"{}\" is not a filter such as info or info,proxy=debug", log.log_level)
    })?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        // Who reads the log may go before the process does, which then still serves.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let installed = match log.log_format {
        LogFormat::Text => subscriber.try_init(),
        LogFormat::Json => subscriber.json().with_span_list(true).try_init(),
    };
    installed.map_err(|error| anyhow::anyhow!("start logging: {error}"))?;
    let recorder = proxy::metrics::install().context("install the metrics recorder")?;
    let upkeep = recorder.clone();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
        loop {
            interval.tick().await;
            upkeep.run_upkeep();
        }
    });
    Ok(recorder)
}
