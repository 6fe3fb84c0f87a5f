//! The whole proxy over the real fabric: nodes that are listed, register, drain, do not fit and go.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::config::HostPort;
use common::ids::{ChoiceIndex, Epoch, NodeId, Role};
use common::sampling::{FinishReason, SampledToken};
use common::timeline::NodeTimeline;
use common::wire::{Directory, GenerateEvent, Hello, NodeLoad, Open};
use kv_connector::membership::{NodePresence, stay_registered};
use kv_connector::{ClusterCa, Fabric, FabricConfig};
use proxy::Endpoint;
use proxy::dispatch::DispatchSettings;
use proxy::dispatch::fake::tiny_model_info;
use proxy::http::HttpSettings;
use proxy::text::ModelText;
use proxy::{ProxyConfig, ProxyHandle, serve};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const LOOPBACK: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

/// A node that answers every request with the same tokens.
struct Node {
    fabric: Fabric,
    presence: NodePresence,
    directory: watch::Receiver<Directory>,
    task: tokio::task::JoinHandle<()>,
}

/// Tokens of the answer; `None`: it accepts, sends one and then hangs.
type Answer = Option<Vec<u32>>;

impl Node {
    fn start(ca: &ClusterCa, role: Role, name: &str, answer: Answer, change: impl FnOnce(&mut Hello)) -> Self {
        let node = NodeId::new(name).unwrap();
        let model = Some(tiny_model_info());
        let mut hello = Hello { node: node.clone(), role, epoch: Epoch(rand::random()), model, bulk_port: None };
        change(&mut hello);
        let identity = ca.issue(role, &node).unwrap();
        let fabric = Fabric::bind(FabricConfig::new(LOOPBACK.into(), identity, hello)).unwrap();
        let presence =
            NodePresence::new(|| NodeLoad { num_blocks: 10, num_available_blocks: 10, ..NodeLoad::default() });
        let (told, directory) = watch::channel(Directory { prefill_nodes: Vec::new() });
        let told = Arc::new(told);
        let (accepting, shown) = (fabric.clone(), presence.clone());
        let task = tokio::spawn(async move {
            while let Some(mut incoming) = accepting.accept().await {
                let (presence, told, answer) = (shown.clone(), told.clone(), answer.clone());
                tokio::spawn(async move {
                    match incoming.open {
                        Open::Watch(_) => {
                            tokio::spawn(async move {
                                while let Ok(Some(directory)) = incoming.receiver.recv::<Directory>().await {
                                    told.send_replace(directory);
                                }
                            });
                            presence.serve_watch(incoming.sender).await;
                        }
                        Open::Generate(generate) => {
                            let committed = generate.tokens.0.len() - generate.prompt_len as usize;
                            incoming.sender.send(&GenerateEvent::Accepted).await.unwrap();
                            let (tokens, hangs) = match answer {
                                Some(tokens) => (tokens, false),
                                None => (vec![100], true),
                            };
                            for (i, id) in tokens.iter().enumerate().skip(committed) {
                                let is_last = i + 1 == tokens.len() && !hangs;
                                let event = GenerateEvent::Token {
                                    choice: ChoiceIndex(0),
                                    index: i as u32,
                                    token: SampledToken { id: *id, logprob: 0.0, top_logprobs: Vec::new() },
                                    finish: is_last.then_some(FinishReason::Length),
                                };
                                incoming.sender.send(&event).await.unwrap();
                            }
                            if hangs {
                                incoming.sender.stopped().await;
                                return;
                            }
                            let timeline = NodeTimeline { num_cached_tokens: 1, ..NodeTimeline::default() };
                            incoming.sender.send(&GenerateEvent::Done { timeline }).await.unwrap();
                            incoming.sender.finish();
                        }
                        _ => {}
                    }
                });
            }
        });
        Self { fabric, presence, directory, task }
    }

    fn address(&self) -> HostPort {
        self.fabric.local_addr().to_string().parse().unwrap()
    }

    fn kill(self) {
        self.task.abort();
        drop(self.fabric);
    }
}

async fn start_proxy(
    ca: &ClusterCa,
    decode: &[&Node],
    prefill: &[&Node],
    shutdown: &CancellationToken,
) -> (ProxyHandle, reqwest::Client) {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = ProxyConfig {
        http: HttpSettings {
            model_names: vec!["tiny".into()],
            api_keys: Vec::new(),
            allowed_origins: Vec::new(),
            body_bytes_max: 1 << 20,
            num_requests_max: 64,
            request_timeout: Duration::from_secs(30),
            seed: None,
        },
        dispatch: DispatchSettings {
            local_prefill_max_tokens: 0,
            num_prefill_candidates: 2,
            max_losses: 2,
            retry_share: 0.2,
            patience: Duration::from_secs(5),
            request_weight_tokens: 256,
        },
        block_index_max_blocks: 1000,
        prefill_nodes: prefill.iter().map(|node| node.address()).collect(),
        decode_nodes: decode.iter().map(|node| node.address()).collect(),
        fabric_listen: LOOPBACK.into(),
        may_register: true,
        drain_timeout: Duration::from_secs(5),
    };
    let identity = ca.issue(Role::Proxy, &NodeId::new("proxy").unwrap()).unwrap();
    let prometheus = proxy::metrics::install().unwrap();
    let model_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
    let text = Arc::new(ModelText::load(Path::new(model_dir)).unwrap());
    let endpoint = Endpoint::bind("127.0.0.1", 0).unwrap();
    let handle = serve(config, endpoint, text, identity, prometheus, shutdown.clone()).await.unwrap();
    (handle, reqwest::Client::new())
}

async fn complete(client: &reqwest::Client, addr: SocketAddr) -> (u16, Value) {
    let url = format!("http://{addr}/v1/completions");
    let response = client.post(url).json(&json!({"prompt": "hi"})).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

#[tokio::test]
async fn request_crosses_the_fabric_and_everything_is_given_back() {
    let (ca, shutdown) = (ClusterCa::generate().unwrap(), CancellationToken::new());
    let decode = Node::start(&ca, Role::DecodeNode, "d0", Some(vec![100, 101, 102]), |_| ());
    let mut prefill = Node::start(&ca, Role::PrefillNode, "p0", None, |_| ());
    let (proxy, client) = start_proxy(&ca, &[&decode], &[&prefill], &shutdown).await;
    within("both nodes", proxy.ready(1, 1)).await;
    let (status, body) = complete(&client, proxy.http_addr()).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["usage"]["completion_tokens"], 3);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    // The decode node has been told of the prefill node.
    let mut directory = decode.directory.clone();
    let told = within("the directory", directory.wait_for(|d| !d.prefill_nodes.is_empty())).await.unwrap().clone();
    assert_eq!(told.prefill_nodes[0].control, prefill.fabric.local_addr());
    // So have the prefill nodes of each other, whose prefixes they may fetch.
    let told = within("the directory", prefill.directory.wait_for(|d| !d.prefill_nodes.is_empty())).await.unwrap();
    assert_eq!(told.prefill_nodes[0].control, decode.directory.borrow().prefill_nodes[0].control);
    drop(told);
    assert_eq!(proxy.accounting(), Default::default());
    shutdown.cancel();
    within("the end of the proxy", proxy.wait()).await.unwrap();
}

#[tokio::test]
async fn draining_prefill_node_leaves_the_directory_and_a_draining_decode_node_the_choice() {
    let (ca, shutdown) = (ClusterCa::generate().unwrap(), CancellationToken::new());
    let d0 = Node::start(&ca, Role::DecodeNode, "d0", Some(vec![100]), |_| ());
    let p0 = Node::start(&ca, Role::PrefillNode, "p0", None, |_| ());
    let (proxy, client) = start_proxy(&ca, &[&d0], &[&p0], &shutdown).await;
    within("both nodes", proxy.ready(1, 1)).await;
    let mut directory = d0.directory.clone();
    within("the directory", directory.wait_for(|d| d.prefill_nodes.len() == 1)).await.unwrap();
    p0.presence.drain();
    within("the shorter directory", directory.wait_for(|d| d.prefill_nodes.is_empty())).await.unwrap();
    d0.presence.drain();
    within("the refusal", async { while complete(&client, proxy.http_addr()).await.0 != 503 {} }).await;
}

#[tokio::test]
async fn lost_node_is_taken_over_mid_answer() {
    let (ca, shutdown) = (ClusterCa::generate().unwrap(), CancellationToken::new());
    // d0 sends one token and hangs; d1 would have sent the same one first.
    let d0 = Node::start(&ca, Role::DecodeNode, "d0", None, |_| ());
    let (proxy, client) = start_proxy(&ca, &[&d0], &[], &shutdown).await;
    within("d0", proxy.ready(1, 0)).await;
    let addr = proxy.http_addr();
    let url = format!("http://{addr}/v1/completions");
    let request = json!({"prompt": "hi", "stream": true});
    let mut response = client.post(url).json(&request).send().await.unwrap();
    let first = within("the first token", response.chunk()).await.unwrap().unwrap();
    assert!(first.starts_with(b"data: "));
    let d1 = Node::start(&ca, Role::DecodeNode, "d1", Some(vec![100, 101, 102]), |_| ());
    let address = proxy.fabric_addr().to_string().parse().unwrap();
    let registration = stay_registered(d1.fabric.clone(), address, Role::DecodeNode, d1.fabric.local_addr());
    let registration = tokio::spawn(registration);
    within("d1", proxy.ready(2, 0)).await;
    d0.kill();
    let rest = within("the rest of the answer", response.text()).await.unwrap();
    assert!(rest.trim_end().ends_with("data: [DONE]"), "{rest}");
    let (status, _) = complete(&client, addr).await;
    assert_eq!(status, 200);
    // Its registration ends: it is no longer asked.
    registration.abort();
    within("the refusal", async { while complete(&client, addr).await.0 != 503 {} }).await;
}

#[tokio::test]
async fn node_with_another_model_is_refused() {
    let (ca, shutdown) = (ClusterCa::generate().unwrap(), CancellationToken::new());
    let d0 = Node::start(&ca, Role::DecodeNode, "d0", Some(vec![100]), |_| ());
    let (proxy, client) = start_proxy(&ca, &[&d0], &[], &shutdown).await;
    within("d0", proxy.ready(1, 0)).await;
    let change = |hello: &mut Hello| hello.model.as_mut().unwrap().identity.0[0] ^= 1;
    let d1 = Node::start(&ca, Role::DecodeNode, "d1", Some(vec![100]), change);
    let (seen, mut refusals) = mpsc::unbounded_channel();
    let link = d1.fabric.dial(proxy.fabric_addr(), Role::Proxy, None).await.unwrap();
    let peer = common::wire::Peer { node: NodeId::new("d1").unwrap(), control: d1.fabric.local_addr() };
    let register = Open::Register(common::wire::Register { peer, role: Role::DecodeNode });
    let _registration = link.open(&register).await.unwrap();
    // The proxy dials back, sees the model and closes.
    let accounting = d1.fabric.clone();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(Duration::from_millis(20));
        let mut was_dialled = false;
        loop {
            interval.tick().await;
            let num_links = accounting.accounting().connections;
            was_dialled |= num_links > 1;
            if was_dialled && num_links == 1 && seen.send(()).is_err() {
                return;
            }
        }
    });
    within("the refusal", refusals.recv()).await;
    assert_eq!(complete(&client, proxy.http_addr()).await.0, 200);
    let health = client.get(format!("http://{}/health", proxy.http_addr())).send().await.unwrap();
    assert_eq!(health.json::<Value>().await.unwrap()["decode_nodes"], 1);
}
