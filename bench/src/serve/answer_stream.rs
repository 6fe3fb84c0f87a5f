//! A streamed completion, from bytes with their arrival times to an [`Answer`]. No clock, no I/O.

use std::time::Duration;

use serde_json::Value;

use super::record::{Answer, Failure, Phases, TokenEvent};

/// A line longer than this is no event of a completion.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Events beyond one per token asked for: ends, usage, empty ones.
const SPARE_EVENTS: usize = 64;
/// Text beyond this for each token asked for is no answer of so many tokens.
const TEXT_BYTES_PER_TOKEN_MAX: usize = 1024;

/// Reads one answer. Memory is bounded by the tokens asked for and one line of 1 MiB.
#[derive(Debug)]
pub struct AnswerStream {
    line: Vec<u8>,
    num_events: usize,
    num_tokens_max: u64,
    /// Tokens of the events so far, while each said its own.
    num_tokens_told: Option<u64>,
    first: Option<Duration>,
    is_done: bool,
    keeps_text: bool,
    answer: Answer,
}

impl AnswerStream {
    /// Of a request for `max_tokens`; `keeps_text` if somebody wants to read it.
    pub fn new(max_tokens: usize, keeps_text: bool) -> Self {
        Self {
            line: Vec::new(),
            num_events: 0,
            num_tokens_max: max_tokens as u64,
            num_tokens_told: Some(0),
            first: None,
            is_done: false,
            keeps_text,
            answer: Answer::default(),
        }
    }

    /// Takes bytes that came at `at`; `true` once the answer is complete.
    ///
    /// # Errors
    /// If they are no completion, or more of one than was asked for.
    pub fn on_bytes(&mut self, at: Duration, bytes: &[u8]) -> Result<bool, Failure> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + part.len() > LINE_BYTES_MAX {
                return Err(broken(format!("a line is longer than {LINE_BYTES_MAX} bytes")));
            }
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                // Comments keep connections alive; other fields say nothing here.
                if let Some(data) = line.strip_prefix(b"data:") {
                    self.on_data(at, data.trim_ascii())?;
                }
            }
        }
        Ok(self.is_done)
    }

    /// Tokens so far: an event that does not tell counts as one.
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens_told.unwrap_or(self.answer.events.len() as u64)
    }

    /// The answer, at the end of the body.
    ///
    /// # Errors
    /// If it is not complete.
    pub fn finish(mut self) -> Result<Answer, Failure> {
        if !self.is_done {
            return Err(broken("it ended without [DONE]".into()));
        }
        self.answer.first = self.first.ok_or_else(|| broken("it ended without a choice".into()))?;
        Ok(self.answer)
    }

    fn on_data(&mut self, at: Duration, data: &[u8]) -> Result<(), Failure> {
        if data == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        self.num_events += 1;
        if self.num_events as u64 > self.num_tokens_max.saturating_add(SPARE_EVENTS as u64) {
            return Err(broken(format!("more events than {} tokens need", self.num_tokens_max)));
        }
        let event: Value =
            serde_json::from_slice(data).map_err(|error| broken(format!("an event is no JSON: {error}")))?;
        if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
            return Err(broken(error["message"].as_str().map_or_else(|| error.to_string(), str::to_string)));
        }
        let num_output_tokens = event["usage"]["completion_tokens"].as_u64();
        if num_output_tokens.is_some_and(|told| told > self.num_tokens_max) {
            return Err(broken(format!("its usage tells more than the {} tokens asked for", self.num_tokens_max)));
        }
        if let Some(choice) = event["choices"].get(0) {
            self.first.get_or_insert(at);
            self.answer.last = at;
            self.on_choice(at, choice, num_output_tokens)?;
        }
        self.answer.num_output_tokens = num_output_tokens.or(self.answer.num_output_tokens);
        let usage = &event["usage"];
        self.answer.num_prompt_tokens = usage["prompt_tokens"].as_u64().or(self.answer.num_prompt_tokens);
        let num_cached_tokens = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        self.answer.num_cached_tokens = num_cached_tokens.or(self.answer.num_cached_tokens);
        self.answer.phases = phases(&event["timelines"][0]).or(self.answer.phases);
        Ok(())
    }

    /// How many tokens came is said by `token_ids`, or by a usage in every event (its increase).
    fn on_choice(&mut self, at: Duration, choice: &Value, num_output_tokens: Option<u64>) -> Result<(), Failure> {
        let delta = &choice["delta"];
        let text = choice["text"].as_str().or(delta["content"].as_str()).unwrap_or_default();
        if self.keeps_text {
            let bytes_max = (self.num_tokens_max as usize).saturating_add(SPARE_EVENTS) * TEXT_BYTES_PER_TOKEN_MAX;
            if self.answer.text.len() + text.len() > bytes_max {
                return Err(broken(format!("more text than {} tokens can be", self.num_tokens_max)));
            }
            self.answer.text.push_str(text);
        }
        let by_ids = choice["token_ids"].as_array().map(|ids| ids.len() as u64);
        let by_usage = || num_output_tokens.zip(self.num_tokens_told).map(|(now, before)| now.saturating_sub(before));
        let num_tokens = by_ids.or_else(by_usage);
        let has_tokens = match num_tokens {
            Some(num_tokens) => num_tokens > 0,
            // An empty text without an end is a token that shows nothing yet; with an end it is the end alone.
            None if delta.is_null() => !text.is_empty() || choice["finish_reason"].is_null(),
            // A chat begins with a role alone, which is no token.
            None => {
                ["content", "reasoning_content", "reasoning", "tool_calls"].iter().any(|part| is_there(&delta[part]))
            }
        };
        if has_tokens {
            self.num_tokens_told = self.num_tokens_told.zip(num_tokens).map(|(told, more)| told + more);
            self.answer.events.push(TokenEvent { at, num_tokens });
        }
        Ok(())
    }
}

fn is_there(part: &Value) -> bool {
    match part {
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    }
}

fn phases(timeline: &Value) -> Option<Phases> {
    let ms = |key: &str| timeline[key].as_f64();
    Some(Phases {
        queue_ms: ms("queue_ms")?,
        prefill_ms: ms("prefill_ms")?,
        transfer_ms: ms("transfer_ms")?,
        handover_ms: ms("handover_ms")?,
        first_gap_ms: ms("first_gap_ms")?,
    })
}

fn broken(reason: String) -> Failure {
    Failure::BrokenStream(reason)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn read(max_tokens: usize, parts: &[(u64, &str)]) -> Result<Answer, Failure> {
        let mut stream = AnswerStream::new(max_tokens, true);
        for (ms, bytes) in parts {
            stream.on_bytes(at(*ms), bytes.as_bytes())?;
        }
        stream.finish()
    }

    fn times(answer: &Answer) -> Vec<(u64, Option<u64>)> {
        answer.events.iter().map(|event| (event.at.as_millis() as u64, event.num_tokens)).collect()
    }

    const A: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}],\"usage\":null}\n\n";
    const END: &str = "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\n\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[test]
    fn tokens_have_the_time_of_the_last_byte_of_their_event() {
        let (head, tail) = A.split_at(20);
        let parts = [(5, A), (6, head), (8, tail), (9, ": still here\r\n"), (10, END), (11, USAGE), (12, DONE)];
        let answer = read(3, &parts).unwrap();
        assert_eq!(times(&answer), [(5, None), (8, None)]);
        assert_eq!((answer.first, answer.last), (at(5), at(10)));
        assert_eq!((answer.num_prompt_tokens, answer.num_output_tokens), (Some(7), Some(3)));
    }

    #[test]
    fn an_event_tells_its_tokens_by_ids_or_by_a_usage_of_its_own() {
        let ids = "data:{\"choices\":[{\"text\":\"ab\",\"token_ids\":[4,5]}]}\r\n";
        assert_eq!(times(&read(2, &[(1, ids), (2, DONE)]).unwrap()), [(1, Some(2))]);
        let usage =
            |told| format!("data: {{\"choices\":[{{\"text\":\"x\"}}],\"usage\":{{\"completion_tokens\":{told}}}}}\n");
        let answer = read(8, &[(1, &usage(1)), (2, &usage(4)), (3, &usage(4)), (4, DONE)]).unwrap();
        assert_eq!(times(&answer), [(1, Some(1)), (2, Some(3))]);
        // A usage with the end alone is a total, not the tokens of that event.
        let end =
            "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"stop\"}],\"usage\":{\"completion_tokens\":2}}\n";
        let answer = read(2, &[(1, A), (2, A), (3, end), (4, DONE)]).unwrap();
        assert_eq!((times(&answer), answer.num_output_tokens), (vec![(1, None), (2, None)], Some(2)));
    }

    #[test]
    fn a_chat_has_deltas_and_its_role_is_no_token() {
        let delta = |delta: &str| format!("data: {{\"choices\":[{{\"delta\":{delta},\"finish_reason\":null}}]}}\n");
        let (role, text) = (delta(r#"{"role":"assistant","content":""}"#), delta(r#"{"content":"hi "}"#));
        let (thought, call) = (delta(r#"{"reasoning_content":"hm"}"#), delta(r#"{"tool_calls":[{"index":0}]}"#));
        let last = "data: {\"choices\":[],\"usage\":{\"completion_tokens\":3,\
                    \"prompt_tokens_details\":{\"cached_tokens\":16}},\"timelines\":[{\"queue_ms\":1.5,\
                    \"prefill_ms\":2,\"transfer_ms\":3,\"handover_ms\":4,\"first_gap_ms\":5}]}\n";
        let parts = [(1, &*role), (1, &*text), (2, &*thought), (4, &*call), (5, last), (5, DONE)];
        let answer = read(3, &parts).unwrap();
        assert_eq!(times(&answer), [(1, None), (2, None), (4, None)]);
        assert_eq!((answer.text.as_str(), answer.num_cached_tokens), ("hi ", Some(16)));
        assert_eq!(answer.phases.unwrap().named().map(|(_, ms)| ms), [1.5, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn what_is_not_complete_is_broken() {
        let long_line = format!("data: {}", "x".repeat(LINE_BYTES_MAX));
        let flood = A.repeat(1 + SPARE_EVENTS + 1);
        let cases = [
            (A, "[DONE]"),
            (DONE, "without a choice"),
            ("data: {\"error\":{\"message\":\"a node was lost\"}}\n", "a node was lost"),
            ("data: {\"choices\n", "no JSON"),
            (USAGE, "more than the 1 tokens"),
            (&long_line, "longer"),
            (&flood, "more events"),
        ];
        for (bytes, expected) in cases {
            match read(1, &[(1, bytes)]) {
                Err(Failure::BrokenStream(reason)) => assert!(reason.contains(expected), "{reason}"),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
