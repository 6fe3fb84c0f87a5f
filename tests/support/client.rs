//! A client of the endpoint: requests, answers, streams.

use std::sync::Once;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use serde_json::Value;

use super::metrics::Scrape;

/// One answer of a request with `n` choices.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Answer {
    /// In the order of their index.
    pub(crate) choices: Vec<Choice>,
}

/// One choice. Log probabilities are compared bit for bit.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Choice {
    /// The text.
    pub(crate) text: String,
    /// The tokens' names, if log probabilities were asked for.
    pub(crate) tokens: Vec<String>,
    /// Their log probabilities.
    pub(crate) token_logprobs: Vec<f64>,
    /// Where each begins in the text, in characters.
    pub(crate) text_offsets: Vec<u64>,
    /// The best alternatives of each.
    pub(crate) top_logprobs: Vec<Value>,
    /// Why it ended.
    pub(crate) finish: Option<String>,
}

/// An HTTP answer that is not a stream.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Reply {
    /// The message of OpenAI's error object.
    pub(crate) fn error_message(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_else(|| panic!("no error: {self:?}"))
    }

    /// The seconds of `Retry-After`.
    pub(crate) fn retry_after(&self) -> Option<u64> {
        self.headers.get("retry-after")?.to_str().ok()?.parse().ok()
    }
}

/// The endpoint at one address. Every request has a connection of its own.
#[derive(Clone)]
pub(crate) struct Api {
    http: reqwest::Client,
    base: String,
    key: String,
}

impl Api {
    pub(crate) fn new(base: &str) -> Self {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            // Another copy of this harness in the same process may have been first.
            let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        });
        let http = reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .timeout(Duration::from_secs(180))
            .build()
            .expect("an HTTP client can be made");
        Self { http, base: base.to_string(), key: "none".to_string() }
    }

    /// The same with an API key.
    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { key: key.to_string(), ..self.clone() }
    }

    /// The address.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// POST; `Err` if there was no HTTP answer.
    pub(crate) async fn try_post(&self, path: &str, body: &Value) -> Result<Reply, reqwest::Error> {
        let response = self.http.post(format!("{}{path}", self.base)).bearer_auth(&self.key).json(body).send().await?;
        Self::reply(response).await
    }

    /// POST.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.try_post(path, body).await.unwrap_or_else(|error| panic!("POST {path}: {error:?}"))
    }

    /// GET; `Err` if there was no HTTP answer.
    pub(crate) async fn try_get(&self, path: &str) -> Result<Reply, reqwest::Error> {
        Self::reply(self.http.get(format!("{}{path}", self.base)).send().await?).await
    }

    /// POST to `/v1/completions`, expecting 200.
    pub(crate) async fn complete(&self, body: &Value) -> Answer {
        let reply = self.post("/v1/completions", body).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.body);
        Answer::of_body(&reply.body)
    }

    /// POST to `/v1/completions` with `stream`; `Err` with the reply if it is refused.
    pub(crate) async fn try_stream(&self, body: &Value) -> Result<AnswerStream, Reply> {
        self.try_stream_at("/v1/completions", body).await
    }

    /// POST to `path` with `stream`; `Err` with the reply if it is refused.
    pub(crate) async fn try_stream_at(&self, path: &str, body: &Value) -> Result<AnswerStream, Reply> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let sent = self.http.post(format!("{}{path}", self.base)).bearer_auth(&self.key).json(&body).send().await;
        let response = sent.unwrap_or_else(|error| panic!("POST {path}: {error:?}"));
        if response.status() != StatusCode::OK {
            return Err(Self::reply(response).await.expect("an error has a body"));
        }
        Ok(AnswerStream {
            bytes: response.bytes_stream().map(|bytes| bytes.map(|bytes| bytes.to_vec())).boxed(),
            unread: Vec::new(),
            answer: Answer::default(),
            usage: None,
            num_chunks: 0,
            is_done: false,
        })
    }

    /// [`try_stream`](Self::try_stream), expecting 200.
    pub(crate) async fn stream(&self, body: &Value) -> AnswerStream {
        match self.try_stream(body).await {
            Ok(stream) => stream,
            Err(reply) => panic!("no stream: {reply:?}"),
        }
    }

    /// A scrape of `/metrics`; `Err` with the reason if there was none.
    pub(crate) async fn try_metrics(&self) -> Result<Scrape, String> {
        let get = self.http.get(format!("{}/metrics", self.base)).timeout(Duration::from_secs(10)).send();
        let response = get.await.map_err(|error| format!("{error:?}"))?;
        assert_eq!(response.status(), StatusCode::OK);
        Ok(Scrape::parse(&response.text().await.map_err(|error| format!("{error:?}"))?))
    }

    async fn reply(response: reqwest::Response) -> Result<Reply, reqwest::Error> {
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await?;
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Ok(Reply { status, headers, body })
    }
}

impl Answer {
    /// The answer in a body that was not streamed.
    pub(crate) fn of_body(body: &Value) -> Self {
        let mut answer = Self::default();
        answer.add(body);
        answer
    }

    /// Adds a chunk, or a whole body.
    fn add(&mut self, body: &Value) {
        for part in body["choices"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().expect("a choice has an index") as usize;
            if self.choices.len() <= index {
                self.choices.resize_with(index + 1, Choice::default);
            }
            let choice = &mut self.choices[index];
            assert_eq!(choice.finish, None, "a choice goes on behind its end: {body}");
            let text = [&part["text"], &part["delta"]["content"], &part["message"]["content"]];
            choice.text.extend(text.into_iter().filter_map(Value::as_str));
            let logprobs = &part["logprobs"];
            let list = |name: &str| logprobs[name].as_array().cloned().unwrap_or_default();
            choice.tokens.extend(list("tokens").iter().filter_map(Value::as_str).map(str::to_string));
            choice.token_logprobs.extend(list("token_logprobs").iter().filter_map(Value::as_f64));
            choice.top_logprobs.extend(list("top_logprobs"));
            choice.text_offsets.extend(list("text_offset").iter().filter_map(Value::as_u64));
            for entry in list("content") {
                choice.tokens.push(entry["token"].as_str().unwrap_or_default().to_string());
                choice.token_logprobs.extend(entry["logprob"].as_f64());
                choice.top_logprobs.push(entry["top_logprobs"].clone());
            }
            choice.finish = part["finish_reason"].as_str().map(str::to_string);
        }
    }
}

/// An answer that is being streamed. Dropping it is a client that leaves.
pub(crate) struct AnswerStream {
    bytes: BoxStream<'static, Result<Vec<u8>, reqwest::Error>>,
    unread: Vec<u8>,
    answer: Answer,
    usage: Option<Value>,
    num_chunks: usize,
    is_done: bool,
}

impl AnswerStream {
    /// Waits for the next chunk. `Ok(false)`: the stream has ended as it should. `Err`: why it broke.
    pub(crate) async fn next(&mut self) -> Result<bool, String> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.unread.drain(..end + 2).collect();
                let event = String::from_utf8(event).map_err(|error| error.to_string())?;
                let Some(data) = event.trim_end().strip_prefix("data:").map(str::trim_start) else { continue };
                if data == "[DONE]" {
                    self.is_done = true;
                    continue;
                }
                let chunk: Value = serde_json::from_str(data).map_err(|error| format!("{error}: {data}"))?;
                if chunk.get("error").is_some_and(|error| !error.is_null()) {
                    return Err(format!("the stream ended with {chunk}"));
                }
                if chunk["usage"].is_object() {
                    self.usage = Some(chunk["usage"].clone());
                }
                self.answer.add(&chunk);
                self.num_chunks += 1;
                return Ok(true);
            }
            match self.bytes.next().await {
                Some(Ok(bytes)) => self.unread.extend(bytes),
                Some(Err(error)) => return Err(format!("the connection broke: {error:?}")),
                None if self.is_done => return Ok(false),
                None => return Err("the stream ended without [DONE]".to_string()),
            }
        }
    }

    /// Reads on until `num_chunks` chunks have come in all.
    pub(crate) async fn read_chunks(&mut self, num_chunks: usize) {
        while self.num_chunks < num_chunks {
            let is_open = self.next().await.unwrap_or_else(|reason| panic!("{reason}"));
            assert!(is_open, "the stream ended after {} chunks", self.num_chunks);
        }
    }

    /// Reads to the end.
    pub(crate) async fn rest(mut self) -> Result<Answer, String> {
        while self.next().await? {}
        Ok(self.answer)
    }

    /// Reads to the end: answer, and usage if it was asked for.
    pub(crate) async fn rest_with_usage(mut self) -> Result<(Answer, Option<Value>), String> {
        while self.next().await? {}
        Ok((self.answer, self.usage))
    }

    /// What has come so far.
    pub(crate) fn so_far(&self) -> &Answer {
        &self.answer
    }

    /// Chunks that have come so far.
    pub(crate) fn num_chunks(&self) -> usize {
        self.num_chunks
    }
}
