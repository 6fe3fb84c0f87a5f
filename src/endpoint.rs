//! The proxy: model text, certificates, membership, HTTP; and the lines a newcomer pastes.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use common::config::ProxyArgs;
use common::ids::{NodeId, Role};
use kv_connector::certs::Identity;
use kv_connector::check_holder;
use proxy::text::ModelText;
use proxy::{Endpoint, ProxyConfig};

use crate::{console, nodes, shutdown, telemetry};

/// `tandem proxy`
///
/// # Errors
/// If the proxy cannot start, or its listener fails.
pub async fn run(args: ProxyArgs) -> anyhow::Result<()> {
    let recorder = telemetry::init(&args.log)?;
    let stop = shutdown::on_signal()?;
    let name = args.identity.node_id_or(NodeId::new("proxy").expect("it is a node name"));
    let tls = args.identity.tls_paths(&name)?;
    let identity = Identity::load(&tls.ca, &tls.cert, &tls.key)?;
    check_holder(&identity, Role::Proxy, &name)?;
    let config = ProxyConfig::from_args(&args)?;
    // Before a download: what is wrong with a port should not be told after it.
    let endpoint = Endpoint::bind(&args.http.host, args.http.port)?;
    let text = async { model_text(nodes::model_folder(&args.model).await?).await };
    let Some(text) = shutdown::until_ready(&stop, text).await else { return Ok(()) };
    let (num_decode, num_prefill) = (config.decode_nodes.len().max(1), config.prefill_nodes.len());
    let proxy = proxy::serve(config, endpoint, text?, identity, recorder, stop.clone()).await?;
    let (http, fabric) = (proxy.http_addr(), proxy.fabric_addr());
    console::say(format_args!("proxy {name} listening on http://{http}, fabric on {fabric}"));
    tokio::select! {
        () = proxy.ready(num_decode, num_prefill) => {
            console::say(format_args!("ready: {num_decode} decode and {num_prefill} prefill nodes"));
        }
        () = stop.cancelled() => {}
    }
    proxy.wait().await.context("serve")
}

/// The tokenizer and the chat template of a checkpoint folder.
///
/// # Errors
/// If one is missing or damaged.
pub async fn model_text(folder: PathBuf) -> anyhow::Result<Arc<ModelText>> {
    let text = tokio::task::spawn_blocking(move || ModelText::load(&folder)).await;
    Ok(Arc::new(text.context("read the tokenizer and the chat template")??))
}
