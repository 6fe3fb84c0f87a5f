//! The proxy as a whole: join the cluster, serve HTTP, drain.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use common::config::{HostPort, HttpArgs, ModelArgs, ProxyArgs, RoutingArgs};
use common::ids::{Epoch, Role};
use common::wire::Hello;
use kv_connector::{BindError, Fabric, FabricConfig, Identity};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpSocket;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cluster::follow::Target;
use crate::cluster::{Cluster, Members};
use crate::dispatch::{DispatchSettings, Dispatcher};
use crate::http::app::Accounting;
use crate::http::server::serve_http;
use crate::http::{App, HttpSettings};
use crate::index::BlockIndex;
use crate::metrics::ProxyMetrics;
use crate::text::ModelText;

/// How long a request that has tokens already waits for a node to go on with.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connections that wait to be let in.
const BACKLOG: u32 = 1024;

/// Everything the proxy needs to know, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyConfig {
    /// What the endpoint takes.
    pub http: HttpSettings,
    /// Routing and resuming.
    pub dispatch: DispatchSettings,
    /// Blocks that the index of what nodes hold knows at most; 0: there is none.
    pub block_index_max_blocks: usize,
    /// Prefill nodes to dial.
    pub prefill_nodes: Vec<HostPort>,
    /// Decode nodes to dial.
    pub decode_nodes: Vec<HostPort>,
    /// The fabric's own address, from which nodes are dialled.
    pub fabric_listen: SocketAddr,
    /// Whether nodes may announce themselves there.
    pub may_register: bool,
    /// How long running requests may go on after a shutdown began.
    pub drain_timeout: Duration,
}

impl ProxyConfig {
    /// From the groups of settings that every way to start a proxy has. No nodes are listed, none may
    /// register, and the fabric is bound to loopback.
    pub fn new(model: &ModelArgs, http: &HttpArgs, routing: &RoutingArgs) -> Self {
        Self {
            http: HttpSettings {
                model_names: http.served_model_names(&model.model),
                api_keys: http.api_key.clone(),
                allowed_origins: http.allowed_origins.clone(),
                body_bytes_max: usize::try_from(http.max_body_bytes).unwrap_or(usize::MAX),
                num_requests_max: http.max_concurrent_requests as usize,
                request_timeout: http.request_timeout,
                seed: http.seed,
            },
            dispatch: DispatchSettings {
                local_prefill_max_tokens: routing.local_prefill_max_tokens as usize,
                num_prefill_candidates: routing.num_prefill_candidates as usize,
                max_losses: routing.max_resumes as usize,
                retry_share: routing.retry_budget,
                patience: PATIENCE,
                request_weight_tokens: routing.request_weight_tokens as usize,
            },
            block_index_max_blocks: routing.block_index_max_blocks as usize,
            prefill_nodes: Vec::new(),
            decode_nodes: Vec::new(),
            fabric_listen: (Ipv4Addr::LOCALHOST, 0).into(),
            may_register: false,
            drain_timeout: Duration::from_secs(30),
        }
    }

    /// From the command line of a proxy process.
    ///
    /// # Errors
    /// If nodes may register and `--host` has no address.
    pub fn from_args(args: &ProxyArgs) -> Result<Self, ServeError> {
        let fabric_listen = match args.fabric_port {
            Some(port) => resolve(&args.http.host, port)?,
            None => dialling_address(args.prefill_node.iter().chain(&args.decode_node)),
        };
        Ok(Self {
            prefill_nodes: args.prefill_node.clone(),
            decode_nodes: args.decode_node.clone(),
            fabric_listen,
            may_register: args.fabric_port.is_some(),
            drain_timeout: args.identity.drain_timeout,
            ..Self::new(&args.model, &args.http, &args.routing)
        })
    }
}

/// The address to dial from: loopback if every node is there, otherwise any.
fn dialling_address<'a>(nodes: impl Iterator<Item = &'a HostPort>) -> SocketAddr {
    let ips: Vec<Option<IpAddr>> = nodes.map(|node| node.host.parse().ok()).collect();
    let is_v6 = ips.iter().any(|ip| matches!(ip, Some(IpAddr::V6(_))));
    let is_loopback = !ips.is_empty() && ips.iter().all(|ip| ip.is_some_and(|ip| ip.is_loopback()));
    let ip: IpAddr = match (is_v6, is_loopback) {
        (false, true) => Ipv4Addr::LOCALHOST.into(),
        (false, false) => Ipv4Addr::UNSPECIFIED.into(),
        (true, true) => Ipv6Addr::LOCALHOST.into(),
        (true, false) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, 0)
}

/// Where clients are to be served: the address is taken, and nobody is let in before [`serve`].
#[derive(Debug)]
pub struct Endpoint {
    addr: SocketAddr,
    socket: TcpSocket,
}

impl Endpoint {
    /// Takes a port of the first address of `host`; 0 is a free one.
    ///
    /// # Errors
    /// [`ServeError::Unresolved`] or [`ServeError::Listen`].
    pub fn bind(host: &str, port: u16) -> Result<Self, ServeError> {
        let addr = resolve(host, port)?;
        let socket = take_port(addr).map_err(|source| ServeError::Listen { addr, source })?;
        Ok(Self { addr, socket })
    }
}

/// A socket that has the port, and lets nobody in before it listens.
///
/// # Errors
/// The system's: the port is taken, the address is none of this host's.
pub fn take_port(addr: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // As a listener has it: connections of an earlier process do not keep the port.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    Ok(socket)
}

fn resolve(host: &str, port: u16) -> Result<SocketAddr, ServeError> {
    let unresolved = |reason: String| ServeError::Unresolved { host: host.to_string(), reason };
    let mut found = std::net::ToSocketAddrs::to_socket_addrs(&(host, port)).map_err(|e| unresolved(e.to_string()))?;
    found.next().ok_or_else(|| unresolved("it has no address".into()))
}

/// A proxy that could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The fabric.
    #[error(transparent)]
    Fabric(#[from] BindError),
    /// The endpoint's host.
    #[error("--host {host} cannot be resolved: {reason}")]
    Unresolved {
        /// As given.
        host: String,
        /// Why not.
        reason: String,
    },
    /// The endpoint's port.
    #[error("cannot listen on TCP {addr} ({source}): choose a free --port and a --host of this machine")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The endpoint failed while it served.
    #[error("the endpoint failed: {0}")]
    Serve(std::io::Error),
}

/// A proxy that serves.
pub struct ProxyHandle {
    http_addr: SocketAddr,
    fabric: Fabric,
    app: Arc<App>,
    cluster: Arc<Cluster>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl ProxyHandle {
    /// Where clients reach it.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr
    }

    /// Where nodes reach it.
    pub fn fabric_addr(&self) -> SocketAddr {
        self.fabric.local_addr()
    }

    /// What is in use; all zero when nothing runs.
    pub fn accounting(&self) -> Accounting {
        self.app.accounting()
    }

    /// Connections, streams and bytes of the fabric.
    pub fn fabric_accounting(&self) -> kv_connector::FabricAccounting {
        self.fabric.accounting()
    }

    /// Waits until that many nodes are ready.
    pub async fn ready(&self, num_decode: usize, num_prefill: usize) {
        let mut num_ready = self.cluster.members().num_ready();
        // The sender lives as long as the cluster, so waiting cannot fail.
        let _ = num_ready.wait_for(|(decode, prefill)| *decode >= num_decode && *prefill >= num_prefill).await;
    }

    /// Waits for the end, which the shutdown token begins.
    ///
    /// # Errors
    /// [`ServeError::Serve`].
    pub async fn wait(self) -> Result<(), ServeError> {
        let served = self.task.await.unwrap_or_else(|panic| Err(ServeError::Serve(std::io::Error::other(panic))));
        self.cluster.shut_down().await;
        served
    }
}

/// Starts a proxy. It serves until `shutdown`, then drains. Whoever installed the recorder behind
/// `prometheus` runs its upkeep: a process may hold several roles and has one recorder.
///
/// # Errors
/// [`ServeError`]: nothing is left running then.
pub async fn serve(
    config: ProxyConfig,
    endpoint: Endpoint,
    text: Arc<ModelText>,
    identity: Identity,
    prometheus: PrometheusHandle,
    shutdown: CancellationToken,
) -> Result<ProxyHandle, ServeError> {
    let hello = Hello {
        node: identity.node().clone(),
        role: Role::Proxy,
        epoch: Epoch(rand::random()),
        model: None,
        bulk_port: None,
    };
    let metrics = Arc::new(ProxyMetrics::new(&hello.node, &config.http.model_names[0]));
    let fabric = Fabric::bind(FabricConfig::new(config.fabric_listen, identity, hello))?;
    let Endpoint { addr, socket } = endpoint;
    let listener = socket.listen(BACKLOG).map_err(|source| ServeError::Listen { addr, source })?;
    let http_addr = listener.local_addr().map_err(ServeError::Serve)?;

    let members = Arc::new(Members::new(text.tokenizer.vocab_size()));
    let index = Arc::new(BlockIndex::new(config.block_index_max_blocks, metrics.clone()));
    let targets = [(Role::DecodeNode, &config.decode_nodes), (Role::PrefillNode, &config.prefill_nodes)]
        .into_iter()
        .flat_map(|(role, nodes)| nodes.iter().map(move |address| (role, address.clone())))
        .map(|(role, address)| Target { role, address, node: None })
        .collect();
    let cluster = Arc::new(Cluster::start(fabric.clone(), members, index, targets, config.may_register));
    let dispatcher = Arc::new(Dispatcher::new(cluster.clone(), config.dispatch, metrics.clone()));
    let app = Arc::new(App::new(text, dispatcher, config.http, metrics, prometheus));
    tracing::info!(%http_addr, fabric_addr = %fabric.local_addr(), "proxy serves");
    let serving = serve_http(listener, app.clone(), shutdown, config.drain_timeout);
    let task = tokio::spawn(async move { serving.await.map_err(ServeError::Serve) });
    Ok(ProxyHandle { http_addr, fabric, app, cluster, task })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialled_from_loopback_only_if_all_nodes_are_there() {
        let from = |nodes: &[&str]| {
            let nodes: Vec<HostPort> = nodes.iter().map(|node| node.parse().unwrap()).collect();
            dialling_address(nodes.iter()).to_string()
        };
        assert_eq!(from(&["127.0.0.1:1", "127.0.0.1:2"]), "127.0.0.1:0");
        assert_eq!(from(&["127.0.0.1:1", "10.0.0.1:2"]), "0.0.0.0:0");
        assert_eq!(from(&["prefill-0.local:1"]), "0.0.0.0:0");
        assert_eq!(from(&["[::1]:1"]), "[::1]:0");
    }
}
