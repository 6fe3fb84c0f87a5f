//! Answers in OpenAI's shapes: whole bodies, and the chunks of a stream.

use std::time::Duration;

use common::timeline::NodeTimeline;
use common::tokens::Token;
use serde::Serialize;
use serde_json::{Value, json};

use super::request::{Endpoint, StreamOptions};
use crate::text::Tokenizer;

/// Tokens read and written by one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Of all prompts, each counted once.
    pub prompt_tokens: u64,
    /// Of all answers, end tokens included.
    pub completion_tokens: u64,
    /// Prompt tokens whose KV was held already.
    pub cached_tokens: u64,
}

impl Usage {
    /// Without the details, which are only known at the end.
    fn counts(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }

    /// OpenAI's `usage` object.
    pub fn to_json(self) -> Value {
        let mut usage = self.counts();
        usage["prompt_tokens_details"] = json!({"cached_tokens": self.cached_tokens});
        usage
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens` or the model's length.
    Length,
}

impl Finish {
    /// OpenAI's `finish_reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A token with its log probability, and the best alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: Token,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Best first.
    pub top: Vec<(Token, f32)>,
}

/// One answer, whole or the next piece of it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// Tokens generated since the piece before, shown or not.
    pub num_tokens: u64,
    /// Its tokens with their log probabilities, if they were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Set with the last piece.
    pub finish: Option<Finish>,
}

/// What all bodies and chunks of one request have in common.
#[derive(Debug, Clone)]
pub struct AnswerShape {
    /// `chatcmpl-...` or `cmpl-...`.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model's name.
    pub model: String,
    /// Which shapes.
    pub endpoint: Endpoint,
    /// Whether log probabilities are part of them.
    pub has_logprobs: bool,
    /// Whether special tokens take no place in the text.
    pub skip_special_tokens: bool,
    /// What a stream carries beside the answer.
    pub stream_options: StreamOptions,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'a str,
    created: u64,
    model: &'a str,
    choices: [ChunkChoice<'a>; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl AnswerShape {
    fn chunk(&self, choice: ChunkChoice<'_>, so_far: Usage) -> String {
        let object = match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completions { .. } => "text_completion",
        };
        let usage = match self.stream_options {
            StreamOptions { include_usage: false, .. } => None,
            StreamOptions { continuous_usage_stats: true, .. } => Some(so_far.counts()),
            StreamOptions { .. } => Some(Value::Null),
        };
        let chunk = Chunk { id: &self.id, object, created: self.created, model: &self.model, choices: [choice], usage };
        serde_json::to_string(&chunk).expect("strings and numbers are always JSON")
    }

    /// The first chunk of a chat answer: who speaks. `so_far` of this and the others is the usage of their
    /// choice.
    pub fn role_chunk(&self, index: usize, so_far: Usage) -> String {
        let delta = Delta { role: Some("assistant"), content: Some("") };
        let choice = ChunkChoice { index, delta: Some(delta), text: None, logprobs: None, finish_reason: None };
        self.chunk(choice, so_far)
    }

    /// A chunk with the next text of an answer, whose tokens go on at `text_offset`.
    pub fn text_chunk(
        &self,
        index: usize,
        piece: &Piece,
        so_far: Usage,
        text_offset: &mut TextOffset,
        tokenizer: &Tokenizer,
    ) -> String {
        let logprobs = self.logprobs(&piece.logprobs, text_offset, tokenizer);
        let choice = match self.endpoint {
            Endpoint::Chat => {
                let delta = Delta { role: None, content: Some(&piece.text) };
                ChunkChoice { index, delta: Some(delta), text: None, logprobs, finish_reason: None }
            }
            Endpoint::Completions { .. } => {
                ChunkChoice { index, delta: None, text: Some(&piece.text), logprobs, finish_reason: None }
            }
        };
        self.chunk(choice, so_far)
    }

    /// The last chunk of an answer.
    pub fn finish_chunk(&self, index: usize, finish: Finish, so_far: Usage) -> String {
        let (delta, text) = match self.endpoint {
            Endpoint::Chat => (Some(Delta::default()), None),
            Endpoint::Completions { .. } => (None, Some("")),
        };
        let finish_reason = Some(finish.as_str());
        self.chunk(ChunkChoice { index, delta, text, logprobs: None, finish_reason }, so_far)
    }

    /// The chunk behind all others, with the usage and no choice. `timelines` are those of the prompts, in
    /// the order in which they were done.
    pub fn usage_chunk(&self, usage: Usage, timelines: &[NodeTimeline]) -> String {
        let object = match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completions { .. } => "text_completion",
        };
        let mut chunk = json!({"id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": [], "usage": usage.to_json()});
        if self.stream_options.include_timeline {
            chunk["timelines"] = timelines.iter().map(timeline_json).collect();
        }
        chunk.to_string()
    }

    /// The body of an answer that is not streamed; `choices` in the order of their index.
    pub fn body(&self, choices: &[Piece], prompt_texts: &[String], usage: Usage, tokenizer: &Tokenizer) -> Value {
        let object = match self.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completions { .. } => "text_completion",
        };
        let choices: Vec<Value> = choices
            .iter()
            .enumerate()
            .map(|(index, piece)| {
                let logprobs = self.logprobs(&piece.logprobs, &mut TextOffset::default(), tokenizer);
                let finish_reason = piece.finish.map(Finish::as_str);
                match self.endpoint {
                    Endpoint::Chat => json!({
                        "index": index,
                        "message": {"role": "assistant", "content": piece.text, "refusal": null},
                        "logprobs": logprobs,
                        "finish_reason": finish_reason,
                    }),
                    Endpoint::Completions { echo } => {
                        let per_prompt = choices.len() / prompt_texts.len().max(1);
                        let text = match prompt_texts.get(index / per_prompt.max(1)) {
                            Some(prompt) if echo => format!("{prompt}{}", piece.text),
                            _ => piece.text.clone(),
                        };
                        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason})
                    }
                }
            })
            .collect();
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
            "usage": usage.to_json()})
    }

    fn logprobs(&self, tokens: &[TokenLogprob], text_offset: &mut TextOffset, tokenizer: &Tokenizer) -> Option<Value> {
        if !self.has_logprobs {
            return None;
        }
        Some(match self.endpoint {
            Endpoint::Chat => chat_logprobs(tokens, tokenizer),
            Endpoint::Completions { .. } => self.completion_logprobs(tokens, text_offset, tokenizer),
        })
    }

    /// `{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`, the older shape.
    fn completion_logprobs(
        &self,
        tokens: &[TokenLogprob],
        text_offset: &mut TextOffset,
        tokenizer: &Tokenizer,
    ) -> Value {
        let (mut texts, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
        for token in tokens {
            offsets.push(text_offset.num_chars);
            if !(self.skip_special_tokens && tokenizer.is_special(token.id)) {
                text_offset.advance(&tokenizer.bytes_of(token.id));
            }
            texts.push(token_name(tokenizer, token.id));
            logprobs.push(finite(token.logprob));
            // The chosen token is always listed, the best ones first.
            let mut top = serde_json::Map::new();
            for (id, logprob) in token.top.iter().chain(std::iter::once(&(token.id, token.logprob))) {
                top.entry(token_name(tokenizer, *id)).or_insert_with(|| finite(*logprob).into());
            }
            tops.push(Value::Object(top));
        }
        json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
    }
}

/// `{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}`. A token that is part of
/// a character shows U+FFFD; `bytes` is exact.
fn chat_logprobs(tokens: &[TokenLogprob], tokenizer: &Tokenizer) -> Value {
    let entry = |id: Token, logprob: f32| {
        let bytes = tokenizer.bytes_of(id);
        json!({"token": String::from_utf8_lossy(&bytes), "logprob": finite(logprob), "bytes": bytes})
    };
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let mut value = entry(token.id, token.logprob);
            value["top_logprobs"] = token.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
            value
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// Where the next token of an answer begins in its text, in characters. One for each answer, from its first
/// token to its last, however they are cut into chunks: a character may begin in one and end in another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextOffset {
    num_chars: usize,
    /// Bytes of a character that is not complete yet.
    unfinished: Vec<u8>,
}

impl TextOffset {
    /// Goes on behind a token's `bytes`. What is no UTF-8 counts as the U+FFFD that the text shows.
    fn advance(&mut self, bytes: &[u8]) {
        self.unfinished.extend_from_slice(bytes);
        loop {
            let (num_valid, num_invalid) = match std::str::from_utf8(&self.unfinished) {
                Ok(_) => (self.unfinished.len(), Some(0)),
                Err(error) => (error.valid_up_to(), error.error_len()),
            };
            // Each character has one byte that does not continue another.
            self.num_chars += self.unfinished[..num_valid].iter().filter(|byte| (**byte as i8) >= -0x40).count();
            self.unfinished.drain(..num_valid + num_invalid.unwrap_or(0));
            match num_invalid {
                Some(0) | None => return,
                Some(_) => self.num_chars += 1,
            }
        }
    }
}

/// Where the time of one prompt went on the nodes, in milliseconds.
fn timeline_json(timeline: &NodeTimeline) -> Value {
    let ms = |span: Duration| span.as_secs_f64() * 1e3;
    json!({
        "queue_ms": ms(timeline.queue),
        "prefill_ms": ms(timeline.prefill),
        "transfer_ms": ms(timeline.transfer),
        "handover_ms": ms(timeline.handover),
        "first_gap_ms": ms(timeline.first_gap),
        "fetch_ms": ms(timeline.fetch),
        "fetched_tokens": timeline.num_fetched_tokens,
        "transferred_bytes": timeline.transferred_bytes,
        "is_local_prefill": timeline.is_local_prefill,
    })
}

/// A token as a key: its text, or `bytes:\xe4\xbd` where it is only part of a character.
fn token_name(tokenizer: &Tokenizer, id: Token) -> String {
    String::from_utf8(tokenizer.bytes_of(id)).unwrap_or_else(|error| {
        let hex: String = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        format!("bytes:{hex}")
    })
}

/// JSON has no infinity: a token that cannot come has OpenAI's -9999.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_count_where_they_are_complete() {
        let mut offset = TextOffset::default();
        let steps: [(&[u8], usize); 6] =
            [(b"ab", 2), (b"\xe7", 2), (b"\x81", 2), (b"\xab!", 4), (b"\xe7\x81", 4), (b"\xffz\xc3\xa9", 8)];
        for (bytes, expected) in steps {
            offset.advance(bytes);
            assert_eq!(offset.num_chars, expected, "{bytes:?}");
        }
    }
}
