//! An endpoint over scripted nodes, and a client.
#![allow(dead_code, unreachable_pub)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::ids::{ChoiceIndex, NodeId};
use common::tokens::Token;
use common::wire::Generate;
use proxy::dispatch::fake::{Behaviour, FakeNodes, tiny_model_info};
use proxy::dispatch::{DispatchSettings, Dispatcher};
use proxy::http::server::serve_http;
use proxy::http::{App, HttpSettings};
use proxy::metrics::ProxyMetrics;
use proxy::text::{ModelText, Tokenizer};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// `<|im_end|>` of the small checkpoint.
pub const EOS: Token = 3;

pub fn model_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny"))
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(&model_dir().join("tokenizer.json")).unwrap()
}

/// The tokens of a text, as an answer would have them.
pub fn tokens_of(text: &str) -> Vec<Token> {
    tokenizer().encode(text, false).unwrap()
}

pub fn http_settings() -> HttpSettings {
    HttpSettings {
        model_names: vec!["tiny".into(), "other/name".into()],
        api_keys: Vec::new(),
        allowed_origins: Vec::new(),
        body_bytes_max: 1 << 20,
        num_requests_max: 64,
        request_timeout: Duration::from_secs(30),
        seed: Some(1),
    }
}

/// A served endpoint.
pub struct Endpoint {
    pub url: String,
    pub addr: SocketAddr,
    pub nodes: Arc<FakeNodes>,
    pub app: Arc<App>,
    pub shutdown: CancellationToken,
    pub client: reqwest::Client,
    pub server: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Endpoint {
    /// Nodes that answer every choice with `text`.
    pub async fn answering(text: &str) -> Self {
        Self::scripted(&["d0", "d1", "d2"], text, |_, _, _| Behaviour::Serve).await
    }

    pub async fn scripted(
        names: &[&str],
        text: &str,
        script: impl Fn(usize, &NodeId, &Generate) -> Behaviour + Send + Sync + 'static,
    ) -> Self {
        let answer = tokens_of(text);
        let answer = move |_: ChoiceIndex, index: u32| answer.get(index as usize).copied();
        let nodes = FakeNodes::new(names, tiny_model_info(), EOS, answer, script).with_cached_tokens(2);
        Self::over(nodes, http_settings()).await
    }

    pub async fn over(nodes: FakeNodes, settings: HttpSettings) -> Self {
        // One provider per process; a second test finds it installed.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let node = NodeId::new("proxy").unwrap();
        let metrics = Arc::new(ProxyMetrics::new(&node, "tiny"));
        let prometheus = proxy::metrics::install().unwrap();
        let text = Arc::new(ModelText::load(&model_dir()).unwrap());
        let nodes = Arc::new(nodes);
        let dispatch = DispatchSettings {
            local_prefill_max_tokens: 0,
            num_prefill_candidates: 2,
            max_losses: 2,
            retry_share: 0.2,
            patience: Duration::from_millis(300),
            request_weight_tokens: 256,
        };
        let dispatcher = Arc::new(Dispatcher::new(nodes.clone(), dispatch, metrics.clone()));
        let app = Arc::new(App::new(text, dispatcher, settings, metrics, prometheus));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serving = serve_http(listener, app.clone(), shutdown.clone(), Duration::from_secs(5));
        let server = tokio::spawn(serving);
        let url = format!("http://{addr}");
        Self { url, addr, nodes, app, shutdown, client: reqwest::Client::new(), server }
    }

    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(format!("{}{path}", self.url)).json(body).send().await.unwrap()
    }

    pub async fn post_ok(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let body: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{body}");
        body
    }

    /// Status and `error` object of a refused request.
    pub async fn post_refused(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.post(path, body).await;
        let status = response.status().as_u16();
        let body: Value = response.json().await.unwrap();
        (status, body["error"].clone())
    }

    /// The chunks of a stream, the last `[DONE]` as a string.
    pub async fn post_stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        text.split("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).unwrap_or_else(|_| Value::from(data)))
            .collect()
    }

    /// Everything is given back: waits for it, and fails if it does not come.
    pub async fn assert_idle(&self) {
        tokio::time::timeout(Duration::from_secs(5), self.app.idle()).await.expect("a request still holds its slot");
        for _ in 0..10_000 {
            if self.app.accounting().num_open_streams == 0 {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!("streams are still open: {:?}", self.app.accounting());
    }
}

/// Nodes that answer every choice with `text`.
pub fn nodes(text: &str) -> FakeNodes {
    let answer = tokens_of(text);
    let answer = move |_: ChoiceIndex, index: u32| answer.get(index as usize).copied();
    FakeNodes::new(&["d0", "d1", "d2"], tiny_model_info(), EOS, answer, |_, _, _| Behaviour::Serve)
}
