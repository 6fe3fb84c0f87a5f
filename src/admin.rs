//! A node's own HTTP listener: metrics for Prometheus, health for whoever restarts it.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;

/// Whether the node is well; the sentence says what is wrong.
pub type Health = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Serves `/metrics` and `/health` on `address` until the process ends; returns the bound address.
///
/// # Errors
/// If the address cannot be bound.
pub async fn serve(address: SocketAddr, metrics: PrometheusHandle, health: Health) -> anyhow::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("listen on {address} for metrics (--metrics-port): is the port taken?"))?;
    let bound = listener.local_addr().context("read the metrics address")?;
    let app = Router::new().route("/metrics", get(move || std::future::ready(metrics.render()))).route(
        "/health",
        get(move || {
            std::future::ready(match health() {
                Ok(()) => (StatusCode::OK, "ok\n".to_string()),
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            })
        }),
    );
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!(%error, "the metrics listener ended");
        }
    });
    Ok(bound)
}
