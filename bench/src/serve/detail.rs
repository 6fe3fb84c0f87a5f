//! Every request of a run as JSON: what `bench report` draws, and vLLM's arrays of the same.

use serde_json::{Map, Value, json};

use super::record::{RequestRecord, ms};

/// Adds `requests`, one object each in the order in which they were sent, and `input_lens`, `output_lens`,
/// `ttfts`, `itls` (seconds), `start_times` (seconds from the start of the run) and `errors`, as
/// `--save-detailed` of vLLM has them. A request without an answer has zeros and its error.
pub(super) fn add(fields: &mut Map<String, Value>, records: &[RequestRecord]) {
    let mut records: Vec<&RequestRecord> = records.iter().collect();
    records.sort_by_key(|record| (record.sent, record.session, record.turn));
    let all =
        |value: &dyn Fn(&RequestRecord) -> Value| -> Value { records.iter().map(|record| value(record)).collect() };
    let answer = |record: &RequestRecord| record.outcome.as_ref().ok().cloned().unwrap_or_default();
    let seconds = |millis: f64| millis / 1e3;
    fields.insert("requests".into(), all(&request));
    fields.insert(
        "input_lens".into(),
        all(&|record| json!(answer(record).num_prompt_tokens.or(record.num_prompt_tokens).unwrap_or(0))),
    );
    fields.insert("output_lens".into(), all(&|record| json!(answer(record).num_tokens())));
    fields.insert("ttfts".into(), all(&|record| json!(record.latencies().map_or(0.0, |found| seconds(found.ttft_ms)))));
    fields.insert(
        "itls".into(),
        all(&|record| {
            let itl_ms = record.latencies().map(|found| found.itl_ms).unwrap_or_default();
            itl_ms.into_iter().map(seconds).collect()
        }),
    );
    fields.insert("start_times".into(), all(&|record| json!(record.sent.as_secs_f64())));
    fields.insert(
        "errors".into(),
        all(&|record| json!(record.outcome.as_ref().err().map_or_else(String::new, ToString::to_string))),
    );
}

fn request(record: &RequestRecord) -> Value {
    let mut request = json!({
        "session": record.session,
        "turn": record.turn,
        "scheduled_ms": ms(record.scheduled),
        "due_ms": ms(record.due),
        "sent_ms": ms(record.sent),
        "ended_ms": ms(record.ended),
    });
    match &record.outcome {
        Ok(answer) => {
            request["first_ms"] = ms(answer.first).into();
            request["last_ms"] = ms(answer.last).into();
            request["prompt_tokens"] = json!(answer.num_prompt_tokens.or(record.num_prompt_tokens));
            request["output_tokens"] = answer.num_tokens().into();
            request["cached_tokens"] = json!(answer.num_cached_tokens);
            request["is_right"] = json!(record.is_right);
            if let Some(phases) = answer.phases {
                request["phases"] = phases.named().into_iter().map(|(name, ms)| (name, json!(ms))).collect();
            }
        }
        Err(failure) => request["error"] = failure.kind().into(),
    }
    request
}
