//! A node's own HTTP listener: metrics for Prometheus, health for whoever restarts it.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use proxy::serve::take_port;
use tokio::net::TcpSocket;

/// Connections that wait to be let in.
const BACKLOG: u32 = 1024;

/// Whether the node is well; the sentence says what is wrong.
pub type Health = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Takes `address` for [`serve`], before which nobody is let in.
///
/// # Errors
/// If it cannot be bound.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpSocket> {
    take_port(address).with_context(|| format!("listen on {address} for metrics (--metrics-port): is the port taken?"))
}

/// Serves `/metrics` and `/health` until the process ends; returns the bound address.
///
/// # Errors
/// If somebody else listens there since.
pub fn serve(socket: TcpSocket, metrics: PrometheusHandle, health: Health) -> anyhow::Result<SocketAddr> {
    let listener = socket.listen(BACKLOG).context("listen for metrics (--metrics-port): is the port taken?")?;
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
