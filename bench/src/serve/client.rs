//! One request over HTTP, as a record.

use std::time::Duration;

use anyhow::Context;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::redirect::Policy;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::answer_stream::AnswerStream;
use super::record::{Answer, Failure, RequestRecord};
use super::workload::{Message, Phase, Prompt, Session, Turn, words};

/// Of the body of a refusal, this much is kept to be shown.
const MESSAGE_BYTES_MAX: usize = 300;
/// An endpoint that does not end its body behind `[DONE]` loses the connection, not the answer.
const END_TIMEOUT: Duration = Duration::from_millis(100);

/// Which of OpenAI's endpoints is spoken to, under vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// `/v1/completions`, with prompts as token ids.
    Openai,
    /// `/v1/chat/completions`.
    OpenaiChat,
}

impl Backend {
    /// Where it is, as a rule.
    pub fn path(self) -> &'static str {
        match self {
            Self::Openai => "/v1/completions",
            Self::OpenaiChat => "/v1/chat/completions",
        }
    }
}

/// What is the same for all requests.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Base and path.
    pub url: String,
    /// What is found there.
    pub backend: Backend,
    /// `model` of the body.
    pub model: String,
    /// `ignore_eos` of the body, if it is to be sent.
    pub ignore_eos: bool,
    /// Send nothing that OpenAI does not define, so no wish to be told the tokens of each event.
    pub is_strict: bool,
    /// Further fields of every body.
    pub extra_body: Map<String, Value>,
    /// This share of the requests is left before its end.
    pub cancel_fraction: f64,
    /// Draws which, and after how many tokens.
    pub seed: u64,
    /// `x-request-id` is this and the request's number.
    pub request_id_prefix: String,
    /// Sent as `Authorization: Bearer`.
    pub api_key: Option<String>,
    /// From sending to the end of the answer.
    pub request_timeout: Duration,
    /// Whether a connection serves another request behind the first.
    pub keeps_alive: bool,
}

/// A client of one endpoint.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    url: Url,
    endpoint: Endpoint,
    authorization: Option<HeaderValue>,
}

/// When a request was meant to be sent, counted from `start`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) start: Instant,
    pub(super) scheduled: Duration,
    pub(super) due: Duration,
}

/// A request among all of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Which {
    pub(super) phase: Phase,
    pub(super) session: usize,
    pub(super) turn: usize,
}

/// The turns of a session so far, with the answers that were given.
#[derive(Debug, Default)]
pub(super) struct History(Vec<Message>);

impl History {
    /// Goes on behind `turn` and its `answer`.
    pub(super) fn add(&mut self, turn: &Turn, answer: &str) {
        if let Prompt::Messages(messages) = &turn.prompt {
            self.0.extend_from_slice(messages);
            self.0.push(Message { role: "assistant".into(), content: answer.into() });
        }
    }
}

/// A request that is ready to be sent.
#[derive(Debug)]
pub(super) struct Ready {
    which: Which,
    request_id: String,
    body: Vec<u8>,
    num_prompt_tokens: Option<u64>,
    max_tokens: usize,
    /// What the answer must be.
    expected: Option<String>,
    /// Whether the answer is read by somebody.
    keeps_text: bool,
    /// Leave when so many tokens have come.
    cancel_after: Option<u64>,
}

impl Client {
    /// A client that goes straight to the endpoint: a proxy of the environment would be part of the figures.
    ///
    /// # Errors
    /// If the address, the request ids or the API key cannot be sent, or TLS cannot be set up.
    pub fn new(endpoint: Endpoint) -> anyhow::Result<Self> {
        let url = Url::parse(&endpoint.url).with_context(|| format!("\"{}\" is no address", endpoint.url))?;
        let is_http = ["http", "https"].contains(&url.scheme()) && url.has_host();
        anyhow::ensure!(is_http, "\"{url}\" is no address of HTTP: expected http:// or https://");
        HeaderValue::from_str(&endpoint.request_id_prefix).context("--request-id-prefix is no header value")?;
        let bearer = |key: &String| HeaderValue::from_str(&format!("Bearer {key}"));
        let mut authorization =
            endpoint.api_key.as_ref().map(bearer).transpose().context("OPENAI_API_KEY is no header value")?;
        if let Some(value) = &mut authorization {
            value.set_sensitive(true);
        }
        let http = http(endpoint.keeps_alive)?;
        Ok(Self { http, url, endpoint, authorization })
    }

    /// Prepares what costs time, before it is due.
    ///
    /// # Panics
    /// If the session has messages and the endpoint takes none: the flags are checked before the run.
    pub(super) fn ready(&self, which: Which, session: &Session, history: &History) -> Ready {
        let turn = &session.turns[which.turn];
        let mut body = json!({"model": self.endpoint.model, "temperature": 0.0, "stream": true});
        let limit = match self.endpoint.backend {
            Backend::Openai => "max_tokens",
            Backend::OpenaiChat => "max_completion_tokens",
        };
        body[limit] = turn.max_tokens.into();
        match (self.endpoint.backend, &turn.prompt) {
            (Backend::Openai, Prompt::Tokens(tokens)) => body["prompt"] = json!(tokens),
            (Backend::OpenaiChat, Prompt::Tokens(tokens)) => {
                body["messages"] = json!([{"role": "user", "content": words::of_tokens(tokens)}]);
            }
            (Backend::OpenaiChat, Prompt::Messages(messages)) => {
                body["messages"] = history.0.iter().chain(messages).map(Message::to_json).collect();
            }
            (Backend::Openai, Prompt::Messages(_)) => unreachable!("messages need --backend openai-chat"),
        }
        body["stream_options"] = json!({"include_usage": true});
        if !self.endpoint.is_strict {
            body["stream_options"]["continuous_usage_stats"] = true.into();
            body["stream_options"]["include_timeline"] = true.into();
        }
        if self.endpoint.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        for (key, value) in &self.endpoint.extra_body {
            body[key] = value.clone();
        }
        let num_prompt_tokens = match (self.endpoint.backend, &turn.prompt) {
            (Backend::Openai, Prompt::Tokens(tokens)) => Some(tokens.len() as u64),
            _ => None,
        };
        Ready {
            which,
            request_id: self.request_id(which),
            body: body.to_string().into_bytes(),
            num_prompt_tokens,
            max_tokens: turn.max_tokens,
            expected: turn.expected.clone(),
            keeps_text: turn.expected.is_some() || session.turns.len() > 1,
            cancel_after: self.cancel_after(which, turn.max_tokens),
        }
    }

    fn request_id(&self, which: Which) -> String {
        let Which { phase, session, turn } = which;
        let prefix = &self.endpoint.request_id_prefix;
        let session = match phase {
            Phase::Warmup => format!("{prefix}warmup-{session}"),
            Phase::Measured => format!("{prefix}{session}"),
        };
        if turn == 0 { session } else { format!("{session}.{turn}") }
    }

    /// Drawn from the seed: the same requests are left after the same tokens in every run.
    fn cancel_after(&self, which: Which, max_tokens: usize) -> Option<u64> {
        let Which { phase, session, turn } = which;
        if phase == Phase::Warmup || self.endpoint.cancel_fraction == 0.0 {
            return None;
        }
        let stream = (session as u64).wrapping_mul(1 << 20).wrapping_add(turn as u64);
        let mut rng = StdRng::seed_from_u64(self.endpoint.seed.rotate_left(17) ^ stream);
        let is_left = rng.random_bool(self.endpoint.cancel_fraction);
        is_left.then(|| rng.random_range(1..=max_tokens as u64))
    }

    /// Sends it now and reads the answer to its end.
    pub(super) async fn send(&self, ready: Ready, slot: Slot) -> RequestRecord {
        let Ready { which, request_id, body, num_prompt_tokens, max_tokens, expected, keeps_text, cancel_after } =
            ready;
        let mut request = self
            .http
            .post(self.url.clone())
            .header(CONTENT_TYPE, "application/json")
            .header("x-request-id", request_id)
            .body(body);
        if let Some(value) = &self.authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        let sent = slot.start.elapsed();
        let timeout = self.endpoint.request_timeout;
        let stream = AnswerStream::new(max_tokens, keeps_text);
        let outcome = match tokio::time::timeout(timeout, answer(request, stream, cancel_after, slot.start)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Timeout(timeout)),
        };
        let ended = slot.start.elapsed();
        let is_right = expected.zip(outcome.as_ref().ok()).map(|(right, answer)| answer.text.trim() == right);
        RequestRecord {
            scheduled: slot.scheduled,
            due: slot.due,
            sent,
            ended,
            session: which.session,
            turn: which.turn,
            num_prompt_tokens,
            is_right,
            outcome,
        }
    }
}

/// A client that goes straight to the address it is given: a proxy of the environment would be part of the
/// figures. Connections are used again if `keeps_alive`.
///
/// # Errors
/// If TLS cannot be set up.
pub(crate) fn http(keeps_alive: bool) -> anyhow::Result<reqwest::Client> {
    // Whoever installed one before has the same.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let num_idle_max = if keeps_alive { usize::MAX } else { 0 };
    let builder = reqwest::Client::builder().no_proxy().redirect(Policy::none()).pool_max_idle_per_host(num_idle_max);
    builder.build().context("set up the HTTP client")
}

async fn answer(
    request: reqwest::RequestBuilder,
    mut stream: AnswerStream,
    cancel_after: Option<u64>,
    start: Instant,
) -> Result<Answer, Failure> {
    let mut response = request.send().await.map_err(|error| Failure::Connection(told(&error)))?;
    let status = response.status();
    if status != reqwest::StatusCode::OK {
        let mut message = Vec::new();
        // What was read before an error is still worth showing.
        while let Ok(Some(bytes)) = response.chunk().await {
            message.extend_from_slice(&bytes[..bytes.len().min(MESSAGE_BYTES_MAX - message.len())]);
            if message.len() == MESSAGE_BYTES_MAX {
                break;
            }
        }
        let message = String::from_utf8_lossy(&message).into_owned();
        return Err(Failure::Status { status: status.as_u16(), message });
    }
    while let Some(bytes) = response.chunk().await.map_err(|error| Failure::BrokenStream(told(&error)))? {
        if stream.on_bytes(start.elapsed(), &bytes)? {
            // What is left is the end of the body: read, so that the connection can be used again.
            let _ = tokio::time::timeout(END_TIMEOUT, response.chunk()).await;
            break;
        }
        if cancel_after.is_some_and(|after| stream.num_tokens() >= after) {
            // Dropping the response closes its connection: that is how a client leaves.
            return Err(Failure::Cancelled(stream.num_tokens()));
        }
    }
    stream.finish()
}

/// The error and its causes: the first alone only says that something failed.
fn told(error: &reqwest::Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |told, cause| format!("{told}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_sent_is_told_before_the_run() {
        let right = Endpoint {
            url: "http://127.0.0.1:1/v1/completions".into(),
            backend: Backend::Openai,
            model: "m".into(),
            ignore_eos: false,
            is_strict: false,
            keeps_alive: true,
            extra_body: Map::new(),
            cancel_fraction: 0.0,
            seed: 0,
            request_id_prefix: "bench-".into(),
            api_key: None,
            request_timeout: Duration::from_secs(1),
        };
        assert!(Client::new(right.clone()).is_ok());
        for (wrong, expected) in [
            (Endpoint { url: "http://127.0.0.1:1:/v1".into(), ..right.clone() }, "no address"),
            (Endpoint { url: "127.0.0.1:1/v1".into(), ..right.clone() }, "no address"),
            (Endpoint { url: "ftp://h/v1".into(), ..right.clone() }, "http://"),
            (Endpoint { request_id_prefix: "a\nb".into(), ..right.clone() }, "--request-id-prefix"),
            (Endpoint { api_key: Some("a\nb".into()), ..right.clone() }, "OPENAI_API_KEY"),
        ] {
            let reason = Client::new(wrong).map(|_| ()).expect_err(expected).to_string();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
