//! One request over HTTP, as a record.

use std::time::Duration;

use anyhow::Context;
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::redirect::Policy;
use serde_json::json;
use tokio::time::Instant;

use super::answer_stream::AnswerStream;
use super::record::{Answer, Failure, RequestRecord};
use super::workload::{Ask, Phase};

/// Of the body of a refusal, this much is kept to be shown.
const MESSAGE_BYTES_MAX: usize = 300;
/// An endpoint that does not end its body behind `[DONE]` loses the connection, not the answer.
const END_TIMEOUT: Duration = Duration::from_millis(100);

/// What is the same for all requests.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Base and path.
    pub url: String,
    /// `model` of the body.
    pub model: String,
    /// `ignore_eos` of the body, if it is to be sent.
    pub ignore_eos: bool,
    /// `x-request-id` is this and the request's number.
    pub request_id_prefix: String,
    /// Sent as `Authorization: Bearer`.
    pub api_key: Option<String>,
    /// From sending to the end of the answer.
    pub request_timeout: Duration,
}

/// A client of one endpoint. Connections are kept and used again.
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

/// A request that is ready to be sent.
#[derive(Debug)]
pub(super) struct Ready {
    request_id: String,
    body: Vec<u8>,
    num_prompt_tokens: u64,
    max_tokens: usize,
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
        // Whoever installed one before has the same.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let bearer = |key: &String| HeaderValue::from_str(&format!("Bearer {key}"));
        let mut authorization =
            endpoint.api_key.as_ref().map(bearer).transpose().context("OPENAI_API_KEY is no header value")?;
        if let Some(value) = &mut authorization {
            value.set_sensitive(true);
        }
        let http = reqwest::Client::builder().no_proxy().redirect(Policy::none()).build()?;
        Ok(Self { http, url, endpoint, authorization })
    }

    /// Prepares what costs time, before it is due.
    pub(super) fn ready(&self, phase: Phase, index: usize, ask: &Ask) -> Ready {
        let prefix = &self.endpoint.request_id_prefix;
        let mut body = json!({
            "model": self.endpoint.model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0.0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.endpoint.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        Ready {
            request_id: match phase {
                Phase::Warmup => format!("{prefix}warmup-{index}"),
                Phase::Measured => format!("{prefix}{index}"),
            },
            body: body.to_string().into_bytes(),
            num_prompt_tokens: ask.prompt.len() as u64,
            max_tokens: ask.max_tokens,
        }
    }

    /// Sends it now and reads the answer to its end.
    pub(super) async fn send(&self, ready: Ready, slot: Slot) -> RequestRecord {
        let Ready { request_id, body, num_prompt_tokens, max_tokens } = ready;
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
        let outcome = match tokio::time::timeout(timeout, answer(request, max_tokens, slot.start)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Timeout(timeout)),
        };
        let ended = slot.start.elapsed();
        RequestRecord { scheduled: slot.scheduled, due: slot.due, sent, ended, num_prompt_tokens, outcome }
    }
}

async fn answer(request: reqwest::RequestBuilder, max_tokens: usize, start: Instant) -> Result<Answer, Failure> {
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
    let mut stream = AnswerStream::new(max_tokens);
    while let Some(bytes) = response.chunk().await.map_err(|error| Failure::BrokenStream(told(&error)))? {
        if stream.on_bytes(start.elapsed(), &bytes)? {
            // What is left is the end of the body: read, so that the connection can be used again.
            let _ = tokio::time::timeout(END_TIMEOUT, response.chunk()).await;
            break;
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
            model: "m".into(),
            ignore_eos: false,
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
