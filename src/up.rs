//! All roles in one process, joined by the real fabric over loopback under a CA that lives as long as the
//! process.

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use common::config::{DEMO_MODEL, HostPort, UpArgs};
use common::ids::{NodeId, Role};
use futures::future::{join_all, select_all, try_join_all};
use kv_connector::certs::ClusterCa;
use metrics_exporter_prometheus::PrometheusHandle;
use proxy::{Endpoint, ProxyConfig, ProxyHandle};
use tokio_util::sync::CancellationToken;

use crate::nodes::{self, NodeSetup, RoleArgs, RunningNode};
use crate::{console, device, endpoint, shutdown, store, telemetry};

/// Nodes on loopback are there within moments, or something is wrong.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// What requests get to end with an error when an engine is lost: longer than a proxy waits for another node.
const FAILED_TIMEOUT: Duration = Duration::from_secs(15);

/// What only those can answer to whom all of the prompt's KV came; in single quotes of a shell, inside JSON.
const DEMO_QUESTION: &str = "The code of Nora is 7391. Hugo lives in Oslo. The code of Omar is 2864. Kate owns the lamp. \
                             What is the code of Nora?";

/// `tandem up`
///
/// # Errors
/// If a role cannot start, or an engine fails while serving.
pub async fn run(args: UpArgs) -> anyhow::Result<()> {
    let recorder = telemetry::init(&args.log)?;
    let stop = shutdown::on_signal()?;
    let mut running = Vec::new();
    let started = shutdown::until_ready(&stop, start(&args, recorder, &stop, &mut running)).await;
    let proxy = match started {
        Some(Ok(proxy)) => proxy,
        left => {
            leave_at_once(&running).await;
            return left.map_or(Ok(()), |started| started.map(drop));
        }
    };
    greet(&args, proxy.http_addr());
    let mut serving = pin!(proxy.wait());
    let left = tokio::select! {
        (reason, _, _) = select_all(running.iter().map(|node| Box::pin(node.failed()))) => {
            // Clients hear of it before the process ends; what is left to do nobody here can.
            stop.cancel();
            let _ = tokio::time::timeout(FAILED_TIMEOUT, serving).await;
            Err(reason)
        }
        served = &mut serving => {
            served.context("serve")?;
            try_join_all(running.iter().map(|node| node.drain(args.drain_timeout))).await.map(|_| ())
        }
    };
    if let Err(reason) = left {
        leave_at_once(&running).await;
        anyhow::bail!("an engine failed: {reason}");
    }
    Ok(())
}

async fn leave_at_once(running: &[RunningNode]) {
    join_all(running.iter().map(RunningNode::leave_at_once)).await;
}

/// All roles, ready: the proxy, and nodes in `running`, where they are also if it fails or is given up.
async fn start(
    args: &UpArgs,
    recorder: PrometheusHandle,
    stop: &CancellationToken,
    running: &mut Vec<RunningNode>,
) -> anyhow::Result<ProxyHandle> {
    // Before the weights: what is wrong with a port, a folder or a few kilobytes should not be told after minutes.
    let endpoint = Endpoint::bind(&args.http.host, args.http.port)?;
    let roles: Vec<(NodeId, RoleArgs)> = (0..args.num_prefill_nodes)
        .map(|index| (format!("prefill-{index}"), RoleArgs::Prefill(args.prefill.clone())))
        .chain(
            (0..args.num_decode_nodes).map(|index| (format!("decode-{index}"), RoleArgs::Decode(args.decode.clone()))),
        )
        .map(|(name, role)| (NodeId::new(name).expect("numbered role names are node names"), role))
        .collect();
    for (node, _) in &roles {
        store::check(&args.store, node).with_context(|| format!("open the prefix-block store of {node}"))?;
    }
    let ca = ClusterCa::generate().context("make the process's own CA")?;
    let folder = nodes::model_folder(&args.model).await?;
    let text = endpoint::model_text(folder.clone()).await?;
    let loaded = device::load_model(folder, &args.weights, &args.engine, roles.len()).await?;
    for (node, role) in roles {
        let identity = ca.issue(role.role(), &node).context("issue a certificate")?;
        let setup = NodeSetup {
            node,
            identity,
            listen: loopback(),
            bulk_port: 0,
            kv_transports: args.kv_transports.clone(),
            nixl: args.nixl.clone(),
            kv_quic: args.kv_quic.clone(),
            // All roles share the cores, and one that waits cannot see that another computes.
            busy_poll: Duration::ZERO,
            engine: args.engine.clone(),
            max_model_len: args.weights.max_model_len,
            store: args.store.clone(),
            role,
        };
        running.push(nodes::start(loaded.clone(), setup).await?);
    }
    let addresses = |role: Role| {
        running
            .iter()
            .filter(move |node| node.role() == role)
            .map(|node| HostPort { host: node.address().ip().to_string(), port: node.address().port() })
    };
    let mut config = ProxyConfig::new(&args.model, &args.http, &args.routing);
    config.prefill_nodes = addresses(Role::PrefillNode).collect();
    config.decode_nodes = addresses(Role::DecodeNode).collect();
    config.drain_timeout = args.drain_timeout;
    let name = NodeId::new("proxy").expect("it is a node name");
    let identity = ca.issue(Role::Proxy, &name).context("issue a certificate")?;
    let proxy = proxy::serve(config, endpoint, text, identity, recorder, stop.clone()).await?;
    let ready = proxy.ready(args.num_decode_nodes as usize, args.num_prefill_nodes as usize);
    tokio::time::timeout(READY_TIMEOUT, ready).await.context("the nodes did not become ready")?;
    Ok(proxy)
}

/// Says that it is ready, with a line to paste.
fn greet(args: &UpArgs, address: SocketAddr) {
    let model = &args.http.served_model_names(&args.model.model)[0];
    let key = args.http.api_key.first().map(|_| " -H \"Authorization: Bearer $TANDEM_API_KEY\"").unwrap_or_default();
    let question = if args.model.model == DEMO_MODEL { DEMO_QUESTION } else { "Hello" };
    let body = format!(
        r#"{{"model":"{model}","messages":[{{"role":"user","content":"{question}"}}],"max_tokens":32,"temperature":0}}"#
    );
    let (num_prefill, num_decode) = (args.num_prefill_nodes, args.num_decode_nodes);
    console::say(format_args!("Tandem is ready on http://{address}: {num_prefill} prefill, {num_decode} decode."));
    let url = format!("http://{address}/v1/chat/completions");
    console::say(format_args!("\n  curl {url}{key} -H 'Content-Type: application/json' -d '{body}'\n"));
}

fn loopback() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}
