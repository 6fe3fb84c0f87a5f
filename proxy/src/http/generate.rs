//! `/v1/chat/completions` and `/v1/completions`: the way of a generating request.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use common::ids::RequestId;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument;

use super::admission::{Tenant, read_json};
use super::app::{App, Slot, unix_seconds};
use super::prepare::{PreparedPrompt, check_model_name, prepare};
use super::sse;
use crate::answer::{AnswerEvent, AnswerPlan, PIECES_MAX, run_answer};
use crate::openai::answers::{AnswerShape, Piece, Usage};
use crate::openai::chat::parse_chat;
use crate::openai::completions::parse_completions;
use crate::openai::{ApiError, Endpoint, ErrorKind, ValidatedRequest};

/// `POST /v1/chat/completions`.
pub async fn chat_completions(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Extension(tenant): Extension<Tenant>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    handle(app, id, tenant, headers, body, parse_chat).await
}

/// `POST /v1/completions`.
pub async fn completions(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    Extension(tenant): Extension<Tenant>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    handle(app, id, tenant, headers, body, parse_completions).await
}

async fn handle(
    app: Arc<App>,
    id: RequestId,
    tenant: Tenant,
    headers: HeaderMap,
    body: Body,
    parse: fn(&Value) -> Result<ValidatedRequest, ApiError>,
) -> Response {
    let slot = match app.arrive() {
        Ok(slot) => slot,
        Err(error) => {
            app.metrics.on_status(error.kind.status().as_u16());
            return error.into_response();
        }
    };
    match answer(&app, id, tenant, headers, body, parse, slot).await {
        Ok(response) => response,
        Err((error, mut slot)) => {
            slot.set_status(error.kind.status().as_u16());
            tracing::info!(status = error.kind.status().as_u16(), param = error.param, %error, "refused");
            error.into_response()
        }
    }
}

/// Read, admit, validate, encode, dispatch, answer.
async fn answer(
    app: &Arc<App>,
    id: RequestId,
    tenant: Tenant,
    headers: HeaderMap,
    body: Body,
    parse: fn(&Value) -> Result<ValidatedRequest, ApiError>,
    mut slot: Slot,
) -> Result<Response, (ApiError, Slot)> {
    let prepared = async {
        let body = read_json(&headers, body, app.body_room()).await?;
        let arrived = Instant::now();
        slot.take_place(app)?;
        let mut request = parse(&body)?;
        let model = check_model_name(app, request.model.as_deref())?;
        let prompts = prepare(app, id, &tenant, &mut request, arrived).await?;
        Ok((arrived, request, model, prompts))
    };
    let (arrived, request, model, prompts) = match prepared.await {
        Ok(prepared) => prepared,
        Err(error) => return Err((error, slot)),
    };
    let shape = AnswerShape {
        id: match request.endpoint {
            Endpoint::Chat => format!("chatcmpl-{id}"),
            Endpoint::Completions { .. } => format!("cmpl-{id}"),
        },
        created: unix_seconds(),
        model,
        endpoint: request.endpoint,
        has_logprobs: request.sampling.logprobs.is_some(),
        skip_special_tokens: request.skip_special_tokens,
        stream_options: request.stream_options,
    };
    let num_prompts = prompts.len();
    let prompt_lens: Vec<u64> = prompts.iter().map(|prompt| prompt.request.prompt.len() as u64).collect();
    let prompt_texts: Vec<String> = prompts.iter().filter_map(|prompt| prompt.text.clone()).collect();
    let events = match start(app, &request, prompts, arrived) {
        Ok(events) => events,
        Err(error) => return Err((error, slot)),
    };
    let n = request.n as usize;
    let deadline = arrived + app.settings.request_timeout;
    let answering = Answering { app: app.clone(), shape, prompt_texts, prompt_lens, num_prompts, n, deadline, events };
    if request.stream {
        sse::respond(answering, slot).await
    } else {
        match answering.collect().await {
            Ok(body) => {
                slot.set_status(StatusCode::OK.as_u16());
                Ok(Json(body).into_response())
            }
            Err(error) => Err((error, slot)),
        }
    }
}

/// Starts a task per prompt; all write to one bounded channel.
fn start(
    app: &Arc<App>,
    request: &ValidatedRequest,
    prompts: Vec<PreparedPrompt>,
    arrived: Instant,
) -> Result<mpsc::Receiver<Result<AnswerEvent, ApiError>>, ApiError> {
    let (sender, receiver) = mpsc::channel(PIECES_MAX);
    for (i, prompt) in prompts.into_iter().enumerate() {
        let plan = AnswerPlan {
            tokenizer: app.text.tokenizer.clone(),
            prompt: prompt.request.prompt.clone(),
            n: request.n as usize,
            first_choice: i * request.n as usize,
            stop: request.stop.clone(),
            include_stop_string: request.include_stop_string,
            min_tokens: request.sampling.min_tokens,
            skip_special_tokens: request.skip_special_tokens,
            has_logprobs: request.sampling.logprobs.is_some(),
            tells_each_token: request.stream && request.stream_options.continuous_usage_stats,
            arrived,
            deadline: prompt.request.deadline,
            metrics: app.metrics.clone(),
            abort: app.abort.clone(),
        };
        let dispatch = app.dispatcher.begin(prompt.request)?;
        tokio::spawn(run_answer(dispatch, plan, sender.clone()).in_current_span());
    }
    Ok(receiver)
}

/// A request whose prompts are being answered.
pub(super) struct Answering {
    pub(super) app: Arc<App>,
    pub(super) shape: AnswerShape,
    /// For `echo`; empty without it.
    pub(super) prompt_texts: Vec<String>,
    /// Tokens of each prompt.
    pub(super) prompt_lens: Vec<u64>,
    pub(super) num_prompts: usize,
    pub(super) n: usize,
    /// When the request is given up.
    pub(super) deadline: Instant,
    pub(super) events: mpsc::Receiver<Result<AnswerEvent, ApiError>>,
}

impl Answering {
    /// The next event; an end before every prompt was done is an error.
    pub(super) async fn next(&mut self) -> Result<AnswerEvent, ApiError> {
        let ended = || match Instant::now() < self.deadline {
            true => Err(ApiError::new(ErrorKind::Internal, "the answer ended before it was complete")),
            // Who reads slowly finds the events of before, and then nothing.
            false => Err(ApiError::new(
                ErrorKind::Timeout,
                "the request's time limit passed before its answer was read: read it faster, or ask for less",
            )),
        };
        self.events.recv().await.unwrap_or_else(ended)
    }

    /// The whole answer.
    async fn collect(mut self) -> Result<Value, ApiError> {
        let mut choices = vec![Piece::default(); self.num_prompts * self.n];
        let (mut usage, mut num_done) = (Usage::default(), 0);
        while num_done < self.num_prompts {
            match self.next().await? {
                AnswerEvent::Started => {}
                AnswerEvent::Piece { choice, piece } => {
                    let whole = &mut choices[choice];
                    whole.text.push_str(&piece.text);
                    whole.logprobs.extend(piece.logprobs);
                    whole.finish = piece.finish;
                }
                AnswerEvent::Done { usage: of_prompt, timeline: _ } => {
                    add_usage(&mut usage, of_prompt);
                    num_done += 1;
                }
            }
        }
        Ok(self.shape.body(&choices, &self.prompt_texts, usage, &self.app.text.tokenizer))
    }
}

/// Adds up the usage of several prompts.
pub(super) fn add_usage(sum: &mut Usage, of_prompt: Usage) {
    sum.prompt_tokens += of_prompt.prompt_tokens;
    sum.completion_tokens += of_prompt.completion_tokens;
    sum.cached_tokens += of_prompt.cached_tokens;
}
