//! An answer as server-sent events.
//!
//! The response begins when a node has taken the request on, so that a refusal still has its own status.
//! An error behind that is an event of its own, and the stream ends without `[DONE]`: an answer that is
//! not complete must not look complete.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use common::timeline::NodeTimeline;

use super::app::{Slot, TimedSlot};
use super::generate::{Answering, add_usage};
use crate::answer::AnswerEvent;
use crate::openai::answers::{Piece, TextOffset, Usage};
use crate::openai::{ApiError, Endpoint};

/// Pause after which a comment shows that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Time behind a request's deadline for its last event, which says that it passed.
const LAST_EVENT: Duration = Duration::from_secs(1);

/// The response of a streamed request.
///
/// # Errors
/// What became known before a node took it on.
pub(super) async fn respond(mut answering: Answering, slot: Slot) -> Result<Response, (ApiError, Slot)> {
    let first = match answering.next().await {
        Ok(first) => first,
        Err(error) => return Err((error, slot)),
    };
    let num_choices = answering.num_prompts * answering.n;
    let slot = TimedSlot::new(slot, answering.deadline + LAST_EVENT);
    let mut stream = ChunkStream {
        answering,
        slot,
        span: tracing::Span::current(),
        chunks: VecDeque::new(),
        begun: vec![false; num_choices],
        text_offsets: vec![TextOffset::default(); num_choices],
        num_tokens: vec![0; num_choices],
        usage: Usage::default(),
        timelines: Vec::new(),
        num_done: 0,
        is_over: false,
    };
    stream.on_event(first);
    let events = futures::stream::unfold(stream, |mut stream| async move {
        let chunk = stream.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(chunk)), stream))
    });
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // Proxies in front (nginx) must not collect the events.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

struct ChunkStream {
    answering: Answering,
    slot: TimedSlot,
    /// The request's: the stream is read outside of its handler.
    span: tracing::Span,
    /// Chunks of one event that are still to be written: a handful.
    chunks: VecDeque<String>,
    begun: Vec<bool>,
    /// Where each choice's text goes on.
    text_offsets: Vec<TextOffset>,
    /// Tokens of each choice so far.
    num_tokens: Vec<u64>,
    usage: Usage,
    /// Of the prompts that are done, one each.
    timelines: Vec<NodeTimeline>,
    num_done: usize,
    is_over: bool,
}

impl ChunkStream {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(chunk) = self.chunks.pop_front() {
                return Some(chunk);
            }
            if self.is_over {
                return None;
            }
            match self.answering.next().await {
                Ok(event) => self.on_event(event),
                Err(error) => self.on_error(&error),
            }
        }
    }

    fn on_event(&mut self, event: AnswerEvent) {
        match event {
            AnswerEvent::Started => {}
            AnswerEvent::Piece { choice, piece } => self.on_piece(choice, &piece),
            AnswerEvent::Done { usage, timeline } => {
                add_usage(&mut self.usage, usage);
                self.timelines.push(timeline);
                self.num_done += 1;
                if self.num_done == self.answering.num_prompts {
                    let shape = &self.answering.shape;
                    if shape.stream_options.include_usage {
                        self.chunks.push_back(shape.usage_chunk(self.usage, &self.timelines));
                    }
                    self.chunks.push_back("[DONE]".into());
                    self.is_over = true;
                    self.slot.set_status(StatusCode::OK.as_u16());
                }
            }
        }
    }

    fn on_piece(&mut self, choice: usize, piece: &Piece) {
        let shape = &self.answering.shape;
        let tokenizer = &self.answering.app.text.tokenizer;
        let mut so_far = Usage {
            prompt_tokens: self.answering.prompt_lens[choice / self.answering.n],
            completion_tokens: self.num_tokens[choice],
            cached_tokens: 0,
        };
        if !std::mem::replace(&mut self.begun[choice], true) {
            match shape.endpoint {
                Endpoint::Chat => self.chunks.push_back(shape.role_chunk(choice, so_far)),
                Endpoint::Completions { .. } => {
                    if let Some(prompt) = self.answering.prompt_texts.get(choice / self.answering.n) {
                        let echoed = Piece { text: prompt.clone(), ..Piece::default() };
                        let text_offset = &mut TextOffset::default();
                        self.chunks.push_back(shape.text_chunk(choice, &echoed, so_far, text_offset, tokenizer));
                    }
                }
            }
        }
        self.num_tokens[choice] += piece.num_tokens;
        so_far.completion_tokens = self.num_tokens[choice];
        // A token that shows nothing has an event where tokens are counted by events, unless the end is one.
        let is_counted = shape.stream_options.continuous_usage_stats && piece.finish.is_none();
        if !piece.text.is_empty() || !piece.logprobs.is_empty() || is_counted {
            let text_offset = &mut self.text_offsets[choice];
            self.chunks.push_back(shape.text_chunk(choice, piece, so_far, text_offset, tokenizer));
        }
        if let Some(finish) = piece.finish {
            self.chunks.push_back(shape.finish_chunk(choice, finish, so_far));
        }
    }

    fn on_error(&mut self, error: &ApiError) {
        self.span.in_scope(|| tracing::warn!(%error, "answer broke off"));
        self.slot.set_status(error.kind.status().as_u16());
        self.chunks.push_back(error.to_json().to_string());
        self.is_over = true;
    }
}
