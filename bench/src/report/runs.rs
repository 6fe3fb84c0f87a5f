//! Results as they are drawn. No I/O.

use anyhow::Context;
use serde_json::Value;

/// One run of `bench serve`, by itself or as part of a comparison or a sweep.
#[derive(Debug, Clone)]
pub struct Run {
    /// Runs of one label are one colour.
    pub label: String,
    /// What `bench serve` wrote.
    pub result: Value,
}

/// A request of a detailed result; times in milliseconds from the start of the run.
#[derive(Debug, Clone, PartialEq)]
pub struct DrawnRequest {
    /// When it was meant to be sent.
    pub scheduled: f64,
    /// When it was sent.
    pub sent: f64,
    /// When it ended, in whatever way.
    pub ended: f64,
    /// The first and the last event of its answer, if it has one.
    pub answer: Option<(f64, f64)>,
    /// Generated tokens.
    pub num_output_tokens: f64,
    /// What the endpoint says of its queue, prefill and hand-over.
    pub phases: Option<[f64; 3]>,
}

impl DrawnRequest {
    /// TTFT and mean time per token behind the first, if it has more than one token.
    pub fn ttft_and_tpot(&self) -> Option<(f64, f64)> {
        let (first, last) = self.answer?;
        let num_behind_first = self.num_output_tokens - 1.0;
        (num_behind_first >= 1.0).then(|| (first - self.sent, (last - first) / num_behind_first))
    }
}

/// The runs of a file; `name` is their label unless the file says another.
///
/// # Errors
/// If it is no result of `serve`, `compare` or `sweep`.
pub fn parse(text: &str, name: &str) -> anyhow::Result<Vec<Run>> {
    let result: Value = serde_json::from_str(text).context("it is no JSON")?;
    if let (Some(setups), Some(rounds)) = (result["setups"].as_array(), result["rounds"].as_array()) {
        let runs = rounds.iter().flat_map(|round| {
            let results = round.as_array().into_iter().flatten();
            setups
                .iter()
                .zip(results)
                .filter_map(|(name, result)| Some(Run { label: name.as_str()?.to_string(), result: result.clone() }))
        });
        return Ok(runs.collect());
    }
    let is_run = result["completed"].is_number() && result["duration"].is_number();
    anyhow::ensure!(is_run, "it has no \"completed\" and \"duration\", as results of bench serve have");
    let label = result["label"].as_str().unwrap_or(name).to_string();
    Ok(vec![Run { label, result }])
}

impl Run {
    /// A figure by its key.
    pub fn figure(&self, key: &str) -> Option<f64> {
        self.result[key].as_f64().filter(|value| value.is_finite())
    }

    /// TTFT of every answered request, in milliseconds; empty of a result without detail.
    pub fn ttfts_ms(&self) -> Vec<f64> {
        self.requests().iter().filter_map(|one| Some(one.answer?.0 - one.sent)).collect()
    }

    /// End-to-end latency of every answered request, in milliseconds.
    pub fn e2els_ms(&self) -> Vec<f64> {
        self.requests().iter().filter_map(|one| Some(one.answer?.1 - one.sent)).collect()
    }

    /// Every time between tokens, in milliseconds.
    pub fn itls_ms(&self) -> Vec<f64> {
        let answers = self.result["itls"].as_array().into_iter().flatten();
        answers.flat_map(|itls| itls.as_array().into_iter().flatten()).filter_map(|s| Some(s.as_f64()? * 1e3)).collect()
    }

    /// Every request; empty of a result without detail.
    pub fn requests(&self) -> Vec<DrawnRequest> {
        let requests = self.result["requests"].as_array().into_iter().flatten();
        let request = |one: &Value| {
            let ms = |key: &str| one[key].as_f64();
            let phases = &one["phases"];
            let phase = |key: &str| phases[key].as_f64();
            Some(DrawnRequest {
                scheduled: ms("scheduled_ms")?,
                sent: ms("sent_ms")?,
                ended: ms("ended_ms")?,
                answer: ms("first_ms").zip(ms("last_ms")),
                num_output_tokens: ms("output_tokens").unwrap_or(0.0),
                phases: phase("queue")
                    .zip(phase("prefill"))
                    .zip(phase("handover"))
                    .map(|((queue, prefill), handover)| [queue, prefill, handover]),
            })
        };
        requests.filter_map(request).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const DETAILED: &str = r#"{"completed": 1, "duration": 2.0, "mean_ttft_ms": 40.0, "itls": [[0.01, 0.03], []],
        "requests": [
            {"scheduled_ms": 0.0, "sent_ms": 1.0, "ended_ms": 90.0, "first_ms": 41.0, "last_ms": 81.0, "output_tokens": 3,
             "phases": {"queue": 1.0, "prefill": 30.0, "handover": 2.0}},
            {"scheduled_ms": 5.0, "sent_ms": 5.0, "ended_ms": 9.0, "error": "connection"}]}"#;

    #[test]
    fn a_result_is_one_run_and_a_comparison_many() {
        let runs = parse(DETAILED, "mine").unwrap();
        assert_eq!((runs.len(), runs[0].label.as_str(), runs[0].figure("mean_ttft_ms")), (1, "mine", Some(40.0)));
        assert_eq!(
            (runs[0].ttfts_ms(), runs[0].e2els_ms(), runs[0].itls_ms()),
            (vec![40.0], vec![80.0], vec![10.0, 30.0])
        );
        let requests = runs[0].requests();
        assert_eq!(requests[0].ttft_and_tpot(), Some((40.0, 20.0)));
        assert_eq!((requests[0].phases, requests[1].answer), (Some([1.0, 30.0, 2.0]), None));
        let comparison =
            format!(r#"{{"setups": ["a", "b"], "rounds": [[{DETAILED}, {DETAILED}], [{DETAILED}, null]]}}"#);
        let labels: Vec<String> = parse(&comparison, "x").unwrap().into_iter().map(|run| run.label).collect();
        assert_eq!(labels, ["a", "b", "a", "b"]);
    }

    #[test]
    fn what_is_no_result_is_said() {
        for (text, expected) in [("", "no JSON"), ("{}", "completed"), ("[1]", "completed")] {
            assert!(format!("{:#}", parse(text, "x").unwrap_err()).contains(expected));
        }
    }
}
