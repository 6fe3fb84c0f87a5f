//! An OpenAI endpoint that answers at exact, scripted times: `tandem bench mock`. What a load generator says of
//! it can be held against the script, so it validates load generators: ours, and others.
//!
//! It runs no model and makes no sense: every token is the same word. Its only virtue is that token `k` of a
//! request leaves at the moment that the script says, by a clock of its own ([`clock`]).
//!
//! 1. [`script`]: when tokens leave, from a seed. 2. [`clock`]: wakes at those moments. 3. This file: HTTP.

pub mod clock;
pub mod script;

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Args;
use futures::StreamExt;
use serde_json::{Value, json};

use crate::serve::statistics::Samples;
use clock::Clock;
use script::{Script, Times};

/// Tokens of one answer: more is refused.
const NUM_TOKENS_MAX: u64 = 100_000;
/// Requests whose times are remembered for `/truth`; those behind them are answered and not remembered.
const NUM_REMEMBERED_MAX: usize = 1_000_000;

/// When it answers.
#[derive(Debug, Clone, Args)]
pub struct MockArgs {
    /// Where it listens; port 0 takes a free one, which is printed.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Mean time from a request to its first token.
    #[arg(long, value_name = "MS", default_value_t = 100.0)]
    pub ttft_ms: f64,
    /// Mean time between tokens.
    #[arg(long, value_name = "MS", default_value_t = 20.0)]
    pub itl_ms: f64,
    /// Both are drawn evenly from within this share of their mean on both sides; 0 to 1.
    #[arg(long, value_name = "R", default_value_t = 0.5)]
    pub spread: f64,
    /// The times are a function of it and of the order in which requests come.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What `bench mock` says at its end.
#[derive(Debug)]
pub struct Truth {
    ttft: Option<Samples>,
    itl: Option<Samples>,
    num_requests: usize,
}

struct Server {
    script: Script,
    clock: Clock,
    /// Of every request that was answered to its end.
    answered: Mutex<Vec<Times>>,
}

/// Serves until Ctrl-C, and says what its script was.
///
/// # Errors
/// If the settings are wrong or the address cannot be had.
pub fn run(args: &MockArgs) -> anyhow::Result<Truth> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let mock = Mock::start(args).await?;
        println!("listening on http://{}", mock.address);
        tokio::signal::ctrl_c().await.context("wait for Ctrl-C")?;
        Ok(mock.truth())
    })
}

/// A mock endpoint that ends with it.
pub struct Mock {
    /// Where it listens.
    pub address: SocketAddr,
    server: Arc<Server>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Mock {
    /// Listens.
    ///
    /// # Errors
    /// If the settings are wrong or the address cannot be had.
    pub async fn start(args: &MockArgs) -> anyhow::Result<Self> {
        let script = Script::new(args.ttft_ms, args.itl_ms, args.spread, args.seed)?;
        let server = Arc::new(Server { script, clock: Clock::start(), answered: Mutex::default() });
        let listener =
            tokio::net::TcpListener::bind(args.listen).await.with_context(|| format!("listen on {}", args.listen))?;
        let address = listener.local_addr()?;
        let app = Router::new()
            .route("/v1/completions", post(completions))
            .route("/v1/chat/completions", post(chat))
            .route("/v1/models", get(|| async { Json(json!({"object": "list", "data": [{"id": "mock"}]})) }))
            .route("/health", get(|| async { StatusCode::OK }))
            .route("/truth", get(|State(server): State<Arc<Server>>| async move { Json(server.truth().to_json()) }))
            .with_state(server.clone());
        let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
            // Tokens are small: collecting them would be a delay that no script has.
            let _ = stream.set_nodelay(true);
        });
        let task = tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Self { address, server, task })
    }

    /// What its script was for the requests that were answered.
    pub fn truth(&self) -> Truth {
        self.server.truth()
    }
}

impl Server {
    fn truth(&self) -> Truth {
        let answered = self.answered.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let ms = |span: std::time::Duration| span.as_secs_f64() * 1e3;
        Truth {
            ttft: Samples::new(answered.iter().map(|times| ms(times.first)).collect()),
            itl: Samples::new(answered.iter().flat_map(|times| times.gaps.iter().map(|gap| ms(*gap))).collect()),
            num_requests: answered.len(),
        }
    }
}

impl Truth {
    /// Under the keys of `bench serve`.
    pub fn to_json(&self) -> Value {
        let mut truth = json!({"completed": self.num_requests});
        for (name, samples) in [("ttft", &self.ttft), ("itl", &self.itl)] {
            let samples = samples.as_ref();
            truth[format!("mean_{name}_ms")] = json!(samples.map(Samples::mean));
            for percent in [50.0, 90.0, 99.0] {
                truth[format!("p{percent}_{name}_ms")] = json!(samples.map(|samples| samples.percentile(percent)));
            }
        }
        truth
    }
}

impl fmt::Display for Truth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.to_json())
    }
}

async fn completions(State(server): State<Arc<Server>>, Json(body): Json<Value>) -> Response {
    let choice = |text: &str| json!({"index": 0, "text": text, "finish_reason": null});
    answer(server, &body, &body["max_tokens"], "text_completion", choice)
}

async fn chat(State(server): State<Arc<Server>>, Json(body): Json<Value>) -> Response {
    let limit =
        if body["max_completion_tokens"].is_null() { &body["max_tokens"] } else { &body["max_completion_tokens"] };
    let choice = |text: &str| json!({"index": 0, "delta": {"content": text}, "finish_reason": null});
    answer(server, &body, limit, "chat.completion.chunk", choice)
}

/// `object` is what OpenAI calls an event of this answer: some clients read nothing of another name.
fn answer(
    server: Arc<Server>,
    body: &Value,
    limit: &Value,
    object: &'static str,
    choice: fn(&str) -> Value,
) -> Response {
    // The clock of a request begins where a server can first know of it.
    let begun = Instant::now();
    let refused =
        |message: &str| (StatusCode::BAD_REQUEST, Json(json!({"error": {"message": message}}))).into_response();
    let num_tokens = match limit.as_u64() {
        Some(num_tokens) if (1..=NUM_TOKENS_MAX).contains(&num_tokens) => num_tokens as usize,
        _ => return refused("max_tokens must be 1 to 100000: the script has a time for each"),
    };
    if body["stream"] != true {
        return refused("only streams are answered: an answer that comes at once has no times");
    }
    let num_prompt_tokens = body["prompt"].as_array().map_or(1, Vec::len);
    let times = server.script.next(num_tokens);
    let tokens = tokens(server.clock.clone(), begun, times.clone()).map(move |number| {
        let usage = json!({"prompt_tokens": num_prompt_tokens, "completion_tokens": number});
        json!({"id": "mock", "object": object, "model": "mock", "choices": [choice("word ")], "usage": usage})
            .to_string()
    });
    let usage = json!({"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens});
    let end = futures::stream::once(async move {
        let mut answered = server.answered.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if answered.len() < NUM_REMEMBERED_MAX {
            answered.push(times);
        }
        json!({"id": "mock", "object": object, "model": "mock", "choices": [], "usage": usage}).to_string()
    });
    let done = futures::stream::once(async { "[DONE]".to_string() });
    Sse::new(tokens.chain(end).chain(done).map(|data| Ok::<_, Infallible>(Event::default().data(data)))).into_response()
}

/// The number of each token, from 1, at its moment.
fn tokens(clock: Clock, begun: Instant, times: Times) -> impl futures::Stream<Item = usize> {
    let mut due = begun + times.first;
    futures::stream::unfold(0, move |number| {
        let gap = if number == 0 { Some(std::time::Duration::ZERO) } else { times.gaps.get(number - 1).copied() };
        due += gap.unwrap_or_default();
        let (clock, due) = (clock.clone(), due);
        async move {
            gap?;
            clock.wait_until(due).await;
            Some((number + 1, number + 1))
        }
    })
}
