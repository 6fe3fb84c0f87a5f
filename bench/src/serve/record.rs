//! What one request did, as recorded times, and the latencies that follow from them. No clock, no I/O.
//!
//! All times count from the start of the run. `docs/bench.md` has the definitions in words.

use std::time::Duration;

/// A request and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestRecord {
    /// When the schedule sends it.
    pub scheduled: Duration,
    /// When it could be sent: as scheduled, or when `--max-concurrency` had a place, if that was later.
    pub due: Duration,
    /// When it was sent.
    pub sent: Duration,
    /// When its answer was complete, or it failed.
    pub ended: Duration,
    /// Which session it belongs to.
    pub session: usize,
    /// Which of its turns it is.
    pub turn: usize,
    /// Tokens of the prompt that was drawn; of a text, unknown here.
    pub num_prompt_tokens: Option<u64>,
    /// Whether the answer is the one that was expected, where that is known.
    pub is_right: Option<bool>,
    /// The answer.
    pub outcome: Result<Answer, Failure>,
}

/// A complete answer. `first` and `last` may be events without a token (an end with its reason).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// When the first event with a choice came.
    pub first: Duration,
    /// When the last event with a choice came.
    pub last: Duration,
    /// Events that brought tokens, in order.
    pub events: Vec<TokenEvent>,
    /// Tokens of the prompt, as the endpoint counted them.
    pub num_prompt_tokens: Option<u64>,
    /// Generated tokens, as the endpoint counted them.
    pub num_output_tokens: Option<u64>,
    /// Of the prompt's, those whose KV was held, as the endpoint counted them.
    pub num_cached_tokens: Option<u64>,
    /// What the endpoint says of its own phases (Tandem's `timelines`).
    pub phases: Option<Phases>,
    /// Its text, where somebody wants to know it.
    pub text: String,
}

/// Where the time of a request went at the endpoint, in milliseconds, by the endpoint's own clocks.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Phases {
    /// Until the first prompt token was scheduled.
    pub queue_ms: f64,
    /// From there to token #1.
    pub prefill_ms: f64,
    /// From the first KV byte received to the last one verified.
    pub transfer_ms: f64,
    /// From token #1 at the decode node to the sequence in the running batch.
    pub handover_ms: f64,
    /// From token #1 to token #2.
    pub first_gap_ms: f64,
}

impl Phases {
    /// Names and values, in the order in which they happen.
    pub fn named(&self) -> [(&'static str, f64); 5] {
        [
            ("queue", self.queue_ms),
            ("prefill", self.prefill_ms),
            ("transfer", self.transfer_ms),
            ("handover", self.handover_ms),
            ("first_gap", self.first_gap_ms),
        ]
    }
}

/// An event that brought tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenEvent {
    /// When it came.
    pub at: Duration,
    /// How many, where the event says it.
    pub num_tokens: Option<u64>,
}

/// Why a request has no complete answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    /// The endpoint refused.
    #[error("the endpoint answered {status}: {message}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// The beginning of its body.
        message: String,
    },
    /// No answer began.
    #[error("no connection: {0}")]
    Connection(String),
    /// `--request-timeout` passed.
    #[error("not answered within {0:?}")]
    Timeout(Duration),
    /// An answer began and did not come to its end.
    #[error("the answer broke off: {0}")]
    BrokenStream(String),
    /// The generator itself left, as `--cancel-fraction` wants it: nobody's fault.
    #[error("left after {0} tokens")]
    Cancelled(u64),
}

impl Failure {
    /// The name under which it is counted.
    pub fn kind(&self) -> String {
        match self {
            Self::Status { status, .. } => format!("status_{status}"),
            Self::Connection(_) => "connection".into(),
            Self::Timeout(_) => "timeout".into(),
            Self::BrokenStream(_) => "broken_stream".into(),
            Self::Cancelled(_) => "cancelled".into(),
        }
    }
}

/// Latencies of one answered request, in milliseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Latencies {
    /// From sending to the first event with a choice.
    pub ttft_ms: f64,
    /// From the schedule's time to the same.
    pub scheduled_ttft_ms: f64,
    /// Mean time per token behind the first; none of an answer with fewer than two.
    pub tpot_ms: Option<f64>,
    /// One per token behind the first.
    pub itl_ms: Vec<f64>,
    /// From sending to the last event with a choice.
    pub e2el_ms: f64,
    /// From the schedule's time to the same.
    pub scheduled_e2el_ms: f64,
    /// Whether events said how many tokens they bring, or their number alone tells it. Otherwise the tokens
    /// are spread evenly over the events.
    pub is_itl_exact: bool,
}

impl RequestRecord {
    /// How late the generator was.
    pub fn lag(&self) -> Duration {
        self.sent.saturating_sub(self.due)
    }

    /// The latencies, if it was answered.
    pub fn latencies(&self) -> Option<Latencies> {
        let answer = self.outcome.as_ref().ok()?;
        let since = |from: Duration, to: Duration| ms(to.saturating_sub(from));
        let num_behind_first = answer.num_tokens().saturating_sub(1);
        let generation = answer.last.saturating_sub(answer.first);
        let counts = answer.tokens_per_event();
        Some(Latencies {
            ttft_ms: since(self.sent, answer.first),
            scheduled_ttft_ms: since(self.scheduled, answer.first),
            tpot_ms: (num_behind_first > 0).then(|| ms(generation) / num_behind_first as f64),
            is_itl_exact: counts.iter().sum::<u64>() == answer.num_tokens()
                && (answer.says_tokens_per_event() || counts.iter().all(|count| *count == 1)),
            itl_ms: answer.itl_ms(&counts),
            e2el_ms: since(self.sent, answer.last),
            scheduled_e2el_ms: since(self.scheduled, answer.last),
        })
    }
}

impl Answer {
    /// Generated tokens: as the endpoint counted them, else by event.
    pub fn num_tokens(&self) -> u64 {
        self.num_output_tokens.unwrap_or_else(|| self.events.iter().map(|event| event.num_tokens.unwrap_or(1)).sum())
    }

    fn says_tokens_per_event(&self) -> bool {
        self.events.iter().all(|event| event.num_tokens.is_some())
    }

    /// How many tokens each event brought. Where only the total is known, the first brought one and the rest
    /// is spread evenly over the others, so an event may count as none.
    fn tokens_per_event(&self) -> Vec<u64> {
        if self.events.is_empty() {
            return Vec::new();
        }
        if self.says_tokens_per_event() {
            return self.events.iter().filter_map(|event| event.num_tokens).collect();
        }
        let num_gaps = self.events.len().saturating_sub(1) as u128;
        let num_behind_first = u128::from(self.num_tokens().saturating_sub(1));
        let up_to = |gap: u128| (gap * num_behind_first).checked_div(num_gaps).unwrap_or(0);
        let behind = (1..=num_gaps).map(|gap| up_to(gap) - up_to(gap - 1));
        let behind = behind.map(|count| u64::try_from(count).expect("at most the tokens of an answer"));
        std::iter::once(1).chain(behind).collect()
    }

    /// One time per token behind the first: an event's `k` tokens share the time since the event before
    /// that brought any, and what came together with the first token took no time.
    fn itl_ms(&self, counts: &[u64]) -> Vec<f64> {
        let mut times = Vec::new();
        let mut before: Option<Duration> = None;
        for (event, count) in self.events.iter().zip(counts).filter(|(_, count)| **count > 0) {
            let (gap, num) = match before {
                Some(before) => (ms(event.at.saturating_sub(before)), *count),
                None => (0.0, count - 1),
            };
            times.extend(std::iter::repeat_n(gap / *count as f64, usize::try_from(num).unwrap_or(usize::MAX)));
            before = Some(event.at);
        }
        times
    }
}

/// Milliseconds.
pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e6
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Scheduled at 90 ms, sent at 100 ms.
    fn record(answer: Answer) -> RequestRecord {
        RequestRecord {
            scheduled: at(90),
            due: at(95),
            sent: at(100),
            ended: answer.last,
            session: 0,
            turn: 0,
            num_prompt_tokens: Some(8),
            is_right: None,
            outcome: Ok(answer),
        }
    }

    fn answer(events: &[(u64, Option<u64>)], num_output_tokens: Option<u64>) -> Answer {
        let events: Vec<_> =
            events.iter().map(|(ms, num_tokens)| TokenEvent { at: at(*ms), num_tokens: *num_tokens }).collect();
        let (first, last) = (events[0].at, events[events.len() - 1].at);
        Answer { first, last, events, num_output_tokens, ..Answer::default() }
    }

    #[test]
    fn one_token_per_event_gives_plain_gaps() {
        let found = record(answer(&[(150, None), (160, None), (190, None)], Some(3)));
        assert_eq!(found.lag(), at(5));
        let expected = Latencies {
            ttft_ms: 50.0,
            scheduled_ttft_ms: 60.0,
            tpot_ms: Some(20.0),
            itl_ms: vec![10.0, 30.0],
            e2el_ms: 90.0,
            scheduled_e2el_ms: 100.0,
            is_itl_exact: true,
        };
        assert_eq!(found.latencies(), Some(expected));
    }

    #[test]
    fn tokens_that_came_together_share_the_time_since_the_event_before() {
        let told = record(answer(&[(150, Some(2)), (160, Some(1)), (190, Some(3))], Some(6))).latencies().unwrap();
        assert_eq!(told.itl_ms, [0.0, 10.0, 10.0, 10.0, 10.0]);
        assert!(told.is_itl_exact);
        assert_eq!(told.tpot_ms, Some(8.0));
        assert_eq!(told.itl_ms.iter().sum::<f64>(), told.e2el_ms - told.ttft_ms);
    }

    #[test]
    fn a_total_alone_is_spread_over_the_events() {
        let events = [(150, None), (160, None), (190, None)];
        let spread = record(answer(&events, Some(6))).latencies().unwrap();
        assert_eq!(spread.itl_ms, [5.0, 5.0, 10.0, 10.0, 10.0]);
        assert!(!spread.is_itl_exact);
        // An event more than tokens: two of the three are one.
        let fewer = record(answer(&events, Some(2))).latencies().unwrap();
        assert_eq!(fewer.itl_ms, [40.0]);
        assert!(!fewer.is_itl_exact);
    }

    #[test]
    fn without_usage_every_event_is_a_token() {
        let found = record(answer(&[(150, None), (170, None)], None)).latencies().unwrap();
        assert_eq!((found.itl_ms, found.tpot_ms, found.is_itl_exact), (vec![20.0], Some(20.0), true));
    }

    #[test]
    fn one_token_has_no_time_per_token() {
        let found = record(answer(&[(150, None)], Some(1))).latencies().unwrap();
        assert_eq!((found.tpot_ms, found.itl_ms, found.e2el_ms), (None, vec![], 50.0));
        // Nothing but an end: no token event at all.
        let none = Answer { first: at(110), last: at(110), ..Answer::default() };
        assert_eq!(record(none).latencies().unwrap().itl_ms, [0.0; 0]);
    }

    #[test]
    fn an_end_behind_the_last_token_counts_for_e2el_alone() {
        let mut ended = answer(&[(150, None), (160, None)], Some(2));
        ended.last = at(200);
        let found = record(ended).latencies().unwrap();
        assert_eq!((found.itl_ms, found.e2el_ms), (vec![10.0], 100.0));
    }

    #[test]
    fn a_failure_has_no_latencies_and_a_kind() {
        let kinds = [
            (Failure::Status { status: 429, message: "busy".into() }, "status_429"),
            (Failure::Connection("refused".into()), "connection"),
            (Failure::Timeout(at(5)), "timeout"),
            (Failure::BrokenStream("no [DONE]".into()), "broken_stream"),
            (Failure::Cancelled(3), "cancelled"),
        ];
        for (failure, kind) in kinds {
            assert_eq!(failure.kind(), kind);
            let failed = RequestRecord { outcome: Err(failure), ..record(Answer::default()) };
            assert_eq!(failed.latencies(), None);
        }
    }
}
