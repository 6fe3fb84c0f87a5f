//! The listening socket, and its farewell.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::{Listener, ListenerExt};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::app::App;
use super::connections::BoundedListener;
use super::router::router;

/// Time for the last answers to be written once requests were cut off.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Time for a connection to send the head of its next request; also how long it may stay open between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Time in which a client must take something of what is written to it.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How often an HTTP/2 connection is asked whether its client is still there, and the time to answer.
const PING: Duration = Duration::from_secs(20);

/// Client connections at a time; further ones wait in the system's queue until one ends.
const CONNECTIONS_MAX: usize = 8192;

/// Serves until `shutdown`, then drains: new requests get 503, running ones go on for `drain_timeout`, what
/// is left is cut off with an error.
///
/// # Errors
/// If the listener fails.
pub async fn serve_http(
    listener: TcpListener,
    app: Arc<App>,
    shutdown: CancellationToken,
    drain_timeout: Duration,
) -> std::io::Result<()> {
    let stop = CancellationToken::new();
    let addr: SocketAddr = listener.local_addr()?;
    // A token is a small write that must not wait for the next one.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
    });
    let mut listener = BoundedListener::new(listener, CONNECTIONS_MAX, HEAD_TIMEOUT, STALL_TIMEOUT);
    let router = router(app.clone());
    let connections = TaskTracker::new();
    let serve = async {
        while let Some((io, _)) = stop.run_until_cancelled(listener.accept()).await {
            connections.spawn(serve_connection(io, router.clone(), stop.clone()));
        }
        connections.close();
        connections.wait().await;
    };
    let drain = async {
        shutdown.cancelled().await;
        app.drain();
        let num_open = app.accounting().num_open_requests;
        tracing::info!(%addr, num_open, ?drain_timeout, "draining");
        if tokio::time::timeout(drain_timeout, app.idle()).await.is_err() {
            tracing::warn!(num_open = app.accounting().num_open_requests, "drain time is over: cutting requests off");
            app.abort.cancel();
        }
        stop.cancel();
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        () = serve => {}
        () = drain => {}
    }
    Ok(())
}

/// Serves one connection until its client leaves, is silent for too long, or `stop` comes and what runs on
/// it is done.
async fn serve_connection<T>(io: T, router: Router, stop: CancellationToken)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(PING).keep_alive_timeout(PING);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(error = %error, "a client's connection ended");
    }
}
