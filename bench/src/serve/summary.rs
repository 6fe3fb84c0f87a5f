//! The figures of a run from the records of its requests. No clock, no I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use super::record::{Failure, Latencies, RequestRecord, ms};
use super::slo::{Metric, Objective};
use super::statistics::Samples;

/// A generator that was later than this at p99 did not send what it said.
const LAG_P99_MAX_MS: f64 = 10.0;

/// The figures.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Requests that were answered to the end.
    pub completed: usize,
    /// Requests that the generator left, as it was asked to: in no other figure.
    pub cancelled: usize,
    /// All others.
    pub failed: usize,
    /// Failures by kind: how many, and what the first said.
    pub errors: BTreeMap<String, (usize, String)>,
    /// From the start of the run until the last request ended.
    pub duration: Duration,
    /// Prompt tokens of answered requests.
    pub total_input_tokens: u64,
    /// Generated tokens of answered requests.
    pub total_output_tokens: u64,
    /// Of the prompt tokens, those whose KV was held; `None` if the endpoint never says.
    pub total_cached_tokens: Option<u64>,
    /// Answers that were checked, and those that were right.
    pub checked: Option<(usize, usize)>,
    /// Requests per second that met every objective, if there are any.
    pub request_goodput: Option<f64>,
    /// Share of the requests that met each objective, and all of them; failed ones met none.
    pub attainment: Vec<(Objective, f64)>,
    /// The same for all objectives together.
    pub slo_attainment: Option<f64>,
    /// The endpoint's own phases, where it tells them.
    pub phases: BTreeMap<&'static str, Samples>,
    /// By metric, in milliseconds, counted from the moment a request was sent; `None` without a sample.
    pub latencies: BTreeMap<Metric, Option<Samples>>,
    /// TTFT counted from the scheduled time.
    pub scheduled_ttft: Option<Samples>,
    /// E2E latency counted from the scheduled time.
    pub scheduled_e2el: Option<Samples>,
    /// How late the generator itself sent, all requests.
    pub schedule_lag: Option<Samples>,
    /// How long requests waited for a place under `--max-concurrency`, all requests.
    pub concurrency_wait: Option<Samples>,
    /// Answers whose tokens had to be spread over their events.
    pub num_itl_spread: usize,
}

impl Summary {
    /// The figures of `records`.
    pub fn new(records: &[RequestRecord], objectives: &[Objective]) -> Self {
        let mut errors: BTreeMap<String, (usize, String)> = BTreeMap::new();
        let is_cancelled = |record: &&RequestRecord| matches!(record.outcome, Err(Failure::Cancelled(_)));
        let cancelled = records.iter().filter(is_cancelled).count();
        let num_kept = records.len() - cancelled;
        for failure in records.iter().filter(|r| !is_cancelled(r)).filter_map(|record| record.outcome.as_ref().err()) {
            errors.entry(failure.kind()).or_insert_with(|| (0, failure.to_string())).0 += 1;
        }
        let answers = || records.iter().filter_map(|record| Some((record, record.outcome.as_ref().ok()?)));
        let answered: Vec<Latencies> = records.iter().filter_map(RequestRecord::latencies).collect();
        let duration = records.iter().map(|record| record.ended).max().unwrap_or_default();
        let of = |value: fn(&Latencies) -> f64| Samples::new(answered.iter().map(value).collect());
        let of_all =
            |value: fn(&RequestRecord) -> Duration| Samples::new(records.iter().map(|r| ms(value(r))).collect());
        let samples = |metric| match metric {
            Metric::Ttft => of(|found| found.ttft_ms),
            Metric::Tpot => Samples::new(answered.iter().filter_map(|found| found.tpot_ms).collect()),
            Metric::Itl => Samples::new(answered.iter().flat_map(|found| found.itl_ms.iter().copied()).collect()),
            Metric::E2el => of(|found| found.e2el_ms),
        };
        let share = |count: usize| if num_kept == 0 { 0.0 } else { count as f64 / num_kept as f64 };
        let num_met = |one: &Objective| answered.iter().filter(|found| one.is_met(found)).count();
        let is_right: Vec<bool> = records.iter().filter_map(|record| record.is_right).collect();
        let mut phases: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        for (name, ms) in answers().filter_map(|(_, answer)| answer.phases).flat_map(|phases| phases.named()) {
            phases.entry(name).or_default().push(ms);
        }
        let cached: Vec<u64> = answers().filter_map(|(_, answer)| answer.num_cached_tokens).collect();
        let num_good = answered.iter().filter(|found| objectives.iter().all(|one| one.is_met(found))).count();
        Self {
            completed: answered.len(),
            cancelled,
            failed: num_kept - answered.len(),
            errors,
            duration,
            total_input_tokens: answers().filter_map(|(r, a)| a.num_prompt_tokens.or(r.num_prompt_tokens)).sum(),
            total_output_tokens: answers().map(|(_, answer)| answer.num_tokens()).sum(),
            total_cached_tokens: (!cached.is_empty()).then(|| cached.iter().sum()),
            checked: (!is_right.is_empty()).then(|| (is_right.len(), is_right.iter().filter(|right| **right).count())),
            attainment: objectives.iter().map(|one| (*one, share(num_met(one)))).collect(),
            slo_attainment: (!objectives.is_empty()).then(|| share(num_good)),
            phases: phases.into_iter().filter_map(|(name, ms)| Some((name, Samples::new(ms)?))).collect(),
            request_goodput: (!objectives.is_empty()).then(|| per_second(num_good as f64, duration)),
            latencies: Metric::ALL.into_iter().map(|metric| (metric, samples(metric))).collect(),
            scheduled_ttft: of(|found| found.scheduled_ttft_ms),
            scheduled_e2el: of(|found| found.scheduled_e2el_ms),
            schedule_lag: of_all(RequestRecord::lag),
            concurrency_wait: of_all(|record| record.due.saturating_sub(record.scheduled)),
            num_itl_spread: answered.iter().filter(|found| !found.is_itl_exact).count(),
        }
    }

    /// Answered requests per second.
    pub fn request_throughput(&self) -> f64 {
        per_second(self.completed as f64, self.duration)
    }

    /// Generated tokens per second.
    pub fn output_throughput(&self) -> f64 {
        per_second(self.total_output_tokens as f64, self.duration)
    }

    /// Prompt and generated tokens per second.
    pub fn total_token_throughput(&self) -> f64 {
        per_second((self.total_input_tokens + self.total_output_tokens) as f64, self.duration)
    }

    /// What must be known before a figure is believed.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(p99) =
            self.schedule_lag.as_ref().map(|lag| lag.percentile(99.0)).filter(|p99| *p99 > LAG_P99_MAX_MS)
        {
            warnings.push(format!(
                "The generator fell behind: 1 % of the requests were sent {p99:.1} ms late or more. The load was \
                 not the one asked for; use a faster machine or a lower rate."
            ));
        }
        if self.num_itl_spread > 0 {
            warnings.push(format!(
                "{} of {} answers had events that do not tell how many tokens they bring: their ITL spreads the \
                 tokens evenly over the events.",
                self.num_itl_spread, self.completed
            ));
        }
        warnings
    }
}

fn per_second(count: f64, duration: Duration) -> f64 {
    if duration.is_zero() { 0.0 } else { count / duration.as_secs_f64() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::record::{Answer, Phases, TokenEvent};
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Scheduled and due at `from`, sent `lag` later, then a token at each of `tokens` after sending.
    fn answered(from: u64, lag: u64, tokens: &[u64]) -> RequestRecord {
        let sent = from + lag;
        let events: Vec<_> = tokens.iter().map(|ms| TokenEvent { at: at(sent + ms), num_tokens: None }).collect();
        let (first, last) = (events[0].at, events[events.len() - 1].at);
        let num_output_tokens = Some(tokens.len() as u64);
        let num_prompt_tokens = Some(11);
        let answer = Answer { first, last, events, num_prompt_tokens, num_output_tokens, ..Answer::default() };
        RequestRecord {
            scheduled: at(from),
            due: at(from),
            sent: at(sent),
            ended: last,
            session: 0,
            turn: 0,
            num_prompt_tokens: Some(10),
            is_right: None,
            outcome: Ok(answer),
        }
    }

    fn failed(failure: Failure) -> RequestRecord {
        RequestRecord { ended: at(2000), outcome: Err(failure), ..answered(0, 0, &[1]) }
    }

    fn run() -> Vec<RequestRecord> {
        vec![
            answered(0, 0, &[100, 110, 120]),
            answered(500, 2, &[200, 240, 300]),
            failed(Failure::Connection("refused".into())),
            failed(Failure::Connection("reset".into())),
            failed(Failure::Status { status: 503, message: "no node".into() }),
        ]
    }

    fn objectives(texts: &[&str]) -> Vec<Objective> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn totals_rates_and_distributions_are_exact() {
        let found = Summary::new(&run(), &[]);
        assert_eq!((found.completed, found.failed, found.duration), (2, 3, at(2000)));
        assert_eq!((found.total_input_tokens, found.total_output_tokens), (22, 6));
        assert_eq!(found.request_throughput(), 1.0);
        assert_eq!(found.output_throughput(), 3.0);
        assert_eq!(found.total_token_throughput(), 14.0);
        let samples = |metric: Metric| found.latencies[&metric].clone();
        assert_eq!(samples(Metric::Ttft), Samples::new(vec![100.0, 200.0]));
        assert_eq!(samples(Metric::Tpot), Samples::new(vec![10.0, 50.0]));
        assert_eq!(samples(Metric::Itl), Samples::new(vec![10.0, 10.0, 40.0, 60.0]));
        assert_eq!(samples(Metric::E2el), Samples::new(vec![120.0, 300.0]));
        assert_eq!(found.scheduled_ttft, Samples::new(vec![100.0, 202.0]));
        assert_eq!(found.scheduled_e2el, Samples::new(vec![120.0, 302.0]));
        assert!(found.warnings().is_empty(), "{:?}", found.warnings());
    }

    #[test]
    fn failures_are_counted_by_kind_with_the_first_told() {
        let errors = Summary::new(&run(), &[]).errors;
        assert_eq!(errors["connection"], (2, "no connection: refused".into()));
        assert_eq!(errors["status_503"].0, 1);
    }

    #[test]
    fn a_failed_request_misses_its_objective() {
        let goodput = |texts: &[&str]| Summary::new(&run(), &objectives(texts)).request_goodput;
        assert_eq!(goodput(&[]), None);
        // Five requests in two seconds, three of which failed.
        assert_eq!(goodput(&["e2el:100000"]), Some(1.0));
        assert_eq!(goodput(&["ttft:150"]), Some(0.5));
        assert_eq!(goodput(&["ttft:200", "itl:59"]), Some(0.5));
        assert_eq!(goodput(&["ttft:150", "tpot:9"]), Some(0.0));
        let found = Summary::new(&run(), &objectives(&["ttft:200", "itl:59"]));
        assert_eq!(found.attainment.iter().map(|(_, share)| *share).collect::<Vec<_>>(), [0.4, 0.2]);
        assert_eq!(found.slo_attainment, Some(0.2));
    }

    #[test]
    fn what_the_generator_left_is_in_no_figure_but_its_own() {
        let mut records = run();
        records.push(failed(Failure::Cancelled(3)));
        let (with, without) = (Summary::new(&records, &objectives(&["ttft:150"])), Summary::new(&run(), &[]));
        assert_eq!((with.completed, with.failed, with.cancelled), (2, 3, 1));
        assert_eq!((with.slo_attainment, with.errors), (Some(0.2), without.errors));
        assert_eq!(with.latencies, without.latencies);
    }

    #[test]
    fn right_answers_cached_tokens_and_phases_are_those_that_were_told() {
        let found = Summary::new(&run(), &[]);
        assert_eq!((found.checked, found.total_cached_tokens, found.phases.len()), (None, None, 0));
        let mut records = run();
        for (record, (is_right, cached)) in records.iter_mut().zip([(true, 16), (false, 32)]) {
            record.is_right = Some(is_right);
            let answer = record.outcome.as_mut().unwrap();
            answer.num_cached_tokens = Some(cached);
            answer.phases = Some(Phases { prefill_ms: cached as f64, ..Phases::default() });
        }
        let found = Summary::new(&records, &[]);
        assert_eq!((found.checked, found.total_cached_tokens), (Some((2, 1)), Some(48)));
        assert_eq!(Some(found.phases["prefill"].clone()), Samples::new(vec![16.0, 32.0]));
    }

    #[test]
    fn a_late_generator_says_so_and_a_wait_for_a_place_is_not_its_fault() {
        let late: Vec<_> = (0..10).map(|_| answered(0, 11, &[5])).collect();
        assert!(Summary::new(&late, &[]).warnings()[0].contains("fell behind"));
        let waited: Vec<_> = late.into_iter().map(|record| RequestRecord { due: at(11), ..record }).collect();
        let found = Summary::new(&waited, &[]);
        assert!(found.warnings().is_empty(), "{:?}", found.warnings());
        assert_eq!(found.concurrency_wait.unwrap().max(), 11.0);
        assert_eq!(found.schedule_lag.unwrap().max(), 0.0);
    }

    #[test]
    fn a_run_without_answers_has_no_latencies_and_no_infinities() {
        let found = Summary::new(&[], &objectives(&["ttft:1"]));
        assert_eq!((found.request_throughput(), found.request_goodput), (0.0, Some(0.0)));
        assert!(found.latencies.values().all(Option::is_none));
    }
}
