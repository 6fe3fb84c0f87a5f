//! The tokens of one prompt become text: detokenized, ended by stop strings, counted and clocked.
//!
//! A task per prompt reads the dispatch and writes pieces into a bounded channel. When the channel is full
//! it stops reading, so a slow client slows its own node stream and nothing is stored; when the receiver
//! is gone it drops the dispatch, which cancels the request on the nodes.

use std::sync::Arc;

use common::sampling::{FinishReason, SampledToken};
use common::timeline::NodeTimeline;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::dispatch::{Dispatch, DispatchEvent};
use crate::metrics::{ProxyMetrics, RequestClock};
use crate::openai::answers::{Finish, Piece, TokenLogprob, Usage};
use crate::openai::{ApiError, ErrorKind};
use crate::text::{Detokenizer, StopStrings, Tokenizer};

/// Pieces that wait for a slow client, per request.
pub const PIECES_MAX: usize = 32;

/// What happens to an answer, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerEvent {
    /// A node took it on.
    Started,
    /// More of one choice.
    Piece {
        /// Which, counted over all prompts of the request.
        choice: usize,
        /// What.
        piece: Piece,
    },
    /// Every choice of this prompt is complete.
    Done {
        /// What it took.
        usage: Usage,
        /// Where the time went on the nodes.
        timeline: NodeTimeline,
    },
}

/// How the tokens of a prompt become text.
pub struct AnswerPlan {
    /// The model's.
    pub tokenizer: Arc<Tokenizer>,
    /// The prompt, for the text's context.
    pub prompt: Vec<u32>,
    /// How many answers.
    pub n: usize,
    /// Number of the first of them within the request.
    pub first_choice: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Show them.
    pub include_stop_string: bool,
    /// No stop string before that many tokens.
    pub min_tokens: u32,
    /// Leave special tokens out.
    pub skip_special_tokens: bool,
    /// Pass log probabilities on.
    pub has_logprobs: bool,
    /// Pass tokens on that show nothing yet, or never will: somebody counts them as they come.
    pub tells_each_token: bool,
    /// When the request arrived.
    pub arrived: Instant,
    /// When it is given up.
    pub deadline: Instant,
    /// Where it is counted.
    pub metrics: Arc<ProxyMetrics>,
    /// Cuts it off at the end of a drain.
    pub abort: CancellationToken,
}

/// The text of one choice.
struct ChoiceText {
    detokenizer: Detokenizer,
    stop: StopStrings,
    num_tokens: u32,
    /// Of them, those that a piece has brought.
    num_tokens_passed: u32,
    logprobs: Vec<TokenLogprob>,
    first_at: Option<Instant>,
    last_at: Option<Instant>,
    is_finished: bool,
}

/// Runs one prompt to its end and sends what happens to `events`.
pub async fn run_answer(mut dispatch: Dispatch, plan: AnswerPlan, events: mpsc::Sender<Result<AnswerEvent, ApiError>>) {
    let mut answer = Answer::new(plan);
    loop {
        let event = tokio::select! {
            biased;
            () = events.closed() => {
                tracing::info!("client left");
                return;
            }
            () = answer.plan.abort.cancelled() => {
                Err(ApiError::new(ErrorKind::Unavailable, "the proxy is leaving and its drain time is over"))
            }
            event = dispatch.next() => event,
        };
        let (event, is_last) = match event {
            Ok(Some(DispatchEvent::Accepted)) => (Ok(AnswerEvent::Started), false),
            Ok(Some(DispatchEvent::Token { choice, token, finish })) => {
                let Some(piece) = answer.on_token(choice, token, finish) else { continue };
                if piece.finish.is_some() {
                    dispatch.finish_choice(choice);
                }
                (Ok(AnswerEvent::Piece { choice: answer.plan.first_choice + choice, piece }), false)
            }
            Ok(Some(DispatchEvent::Done { timeline })) => {
                let usage = answer.usage(timeline.num_cached_tokens);
                let plan = &answer.plan;
                plan.metrics.on_answered(answer.clock(), &timeline, usage);
                tracing::info!(
                    prompt_tokens = usage.prompt_tokens,
                    completion_tokens = usage.completion_tokens,
                    cached_tokens = usage.cached_tokens,
                    queue_ms = timeline.queue.as_secs_f64() * 1e3,
                    prefill_ms = timeline.prefill.as_secs_f64() * 1e3,
                    transfer_ms = timeline.transfer.as_secs_f64() * 1e3,
                    handover_ms = timeline.handover.as_secs_f64() * 1e3,
                    e2e_ms = plan.arrived.elapsed().as_secs_f64() * 1e3,
                    "answered"
                );
                (Ok(AnswerEvent::Done { usage, timeline }), true)
            }
            Ok(None) => return,
            Err(error) => (Err(error), true),
        };
        let sent = tokio::select! {
            biased;
            sent = events.send(event) => sent.is_ok(),
            () = answer.plan.abort.cancelled() => false,
            () = tokio::time::sleep_until(answer.plan.deadline) => {
                tracing::warn!("client read too slowly: the request's time limit passed");
                false
            }
        };
        if !sent || is_last {
            return;
        }
    }
}

struct Answer {
    plan: AnswerPlan,
    choices: Vec<ChoiceText>,
    has_first_token: bool,
    first_token_at: Option<Instant>,
}

impl Answer {
    fn new(plan: AnswerPlan) -> Self {
        let choice = || ChoiceText {
            detokenizer: Detokenizer::new(plan.tokenizer.clone(), &plan.prompt, plan.skip_special_tokens),
            stop: StopStrings::new(&plan.stop, plan.include_stop_string),
            num_tokens: 0,
            num_tokens_passed: 0,
            logprobs: Vec::new(),
            first_at: None,
            last_at: None,
            is_finished: false,
        };
        let choices = (0..plan.n).map(|_| choice()).collect();
        Self { plan, choices, has_first_token: false, first_token_at: None }
    }

    /// What a token makes certain; `None` if it is nothing yet.
    fn on_token(&mut self, choice: usize, token: SampledToken, finish: Option<FinishReason>) -> Option<Piece> {
        self.clock_token(choice);
        let choice = &mut self.choices[choice];
        if choice.is_finished {
            return None;
        }
        choice.num_tokens += 1;
        let id = token.id;
        if self.plan.has_logprobs {
            choice.logprobs.push(TokenLogprob { id, logprob: token.logprob, top: token.top_logprobs });
        }
        // The token that ends an answer is not shown.
        let is_shown = !matches!(finish, Some(FinishReason::StopToken(_)));
        let mut text = if is_shown { choice.detokenizer.push(id) } else { String::new() };
        if finish.is_some() {
            text.push_str(&choice.detokenizer.finish());
        }
        let passed = choice.stop.push(&text, choice.num_tokens >= self.plan.min_tokens);
        let finish = match finish {
            _ if passed.is_stopped => Some(Finish::Stop),
            Some(FinishReason::StopToken(_)) => Some(Finish::Stop),
            Some(FinishReason::Length) => Some(Finish::Length),
            None => None,
        };
        let mut text = passed.text;
        if let Some(reason) = finish {
            choice.is_finished = true;
            if !passed.is_stopped {
                text.push_str(&choice.stop.finish());
            }
            self.plan.metrics.on_finished(reason.as_str());
        }
        let is_shown = !text.is_empty() || finish.is_some();
        if !is_shown && !self.plan.tells_each_token {
            return None;
        }
        let num_tokens = u64::from(choice.num_tokens - choice.num_tokens_passed);
        choice.num_tokens_passed = choice.num_tokens;
        // Log probabilities go with the text that their token becomes part of.
        let logprobs = if is_shown { std::mem::take(&mut choice.logprobs) } else { Vec::new() };
        Some(Piece { text, num_tokens, logprobs, finish })
    }

    fn clock_token(&mut self, choice: usize) {
        let now = Instant::now();
        let metrics = &self.plan.metrics;
        if !std::mem::replace(&mut self.has_first_token, true) {
            self.first_token_at = Some(now);
            metrics.on_first_token(now - self.plan.arrived);
        }
        let choice = &mut self.choices[choice];
        match choice.last_at {
            Some(last_at) => metrics.on_next_token(now - last_at, choice.num_tokens == 1),
            None => choice.first_at = Some(now),
        }
        choice.last_at = Some(now);
    }

    fn usage(&self, num_cached_tokens: u32) -> Usage {
        Usage {
            prompt_tokens: self.plan.prompt.len() as u64,
            completion_tokens: self.choices.iter().map(|choice| u64::from(choice.num_tokens)).sum(),
            cached_tokens: u64::from(num_cached_tokens).min(self.plan.prompt.len() as u64),
        }
    }

    fn clock(&self) -> RequestClock {
        let spans = self.choices.iter().filter(|choice| choice.num_tokens > 1);
        let (mut total, mut num_gaps) = (std::time::Duration::ZERO, 0);
        for choice in spans {
            if let (Some(first), Some(last)) = (choice.first_at, choice.last_at) {
                total += last - first;
                num_gaps += choice.num_tokens - 1;
            }
        }
        RequestClock {
            ttft: self.first_token_at.map(|at| at - self.plan.arrived),
            e2e: self.plan.arrived.elapsed(),
            tpot: (num_gaps > 0).then(|| total / num_gaps),
        }
    }
}
