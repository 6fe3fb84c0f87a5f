use proptest::prelude::*;

use super::*;
use crate::sampling::FinishReason;

const SECOND: Duration = Duration::from_secs(1);

/// Everything that can happen to a hand-over.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Input {
    LinkReady,
    LinkFailed,
    Busy,
    Accepted,
    Progress,
    FirstTokens,
    FirstTokensThatEndAll,
    TooFewFirstTokens,
    Sent,
    Failed,
    Superseded,
    Extent,
    LastExtent,
    RefusedExtent,
    StreamLost,
    StaleLoss,
    Cancel,
    Deadline,
    WholeDeadline,
}

use Input::*;

const INPUTS: [Input; 19] = [
    LinkReady,
    LinkFailed,
    Busy,
    Accepted,
    Progress,
    FirstTokens,
    FirstTokensThatEndAll,
    TooFewFirstTokens,
    Sent,
    Failed,
    Superseded,
    Extent,
    LastExtent,
    RefusedExtent,
    StreamLost,
    StaleLoss,
    Cancel,
    Deadline,
    WholeDeadline,
];

const STOP: u32 = 2;

fn limits() -> DecodeLimits {
    DecodeLimits {
        accept_timeout: SECOND,
        progress_timeout: 2 * SECOND,
        total_timeout: 60 * SECOND,
        credit_window_bytes: 400,
        num_local_tokens_max: 0,
    }
}

fn request(num_candidates: usize) -> DecodeRequest {
    DecodeRequest {
        candidates: (0..num_candidates).map(|i| NodeId::new(format!("p{i}")).unwrap()).collect(),
        num_tokens: 100,
        prompt_len: 100,
        num_held_tokens: 0,
        num_choices: 2,
        params: SamplingParams { stop_token_ids: vec![STOP], ..SamplingParams::greedy(9) },
        max_model_len: 1000,
    }
}

fn token(id: u32) -> SampledToken {
    SampledToken { id, logprob: 0.0, top_logprobs: vec![] }
}

fn first_tokens(ids: &[u32]) -> PrefillEvent {
    let tokens = ids.iter().map(|&id| token(id)).collect();
    PrefillEvent::FirstTokens { tokens, timeline: NodeTimeline::default() }
}

/// A hand-over with a clock and a landing that grows by 40 tokens with each extent.
struct Driver {
    handover: DecodeHandover,
    now: Duration,
    landed: u32,
}

impl Driver {
    fn new(request: DecodeRequest, limits: DecodeLimits) -> (Self, Vec<DecodeAction>) {
        let (handover, actions) = DecodeHandover::new(request, limits, Duration::ZERO);
        (Self { handover, now: Duration::ZERO, landed: 0 }, actions)
    }

    fn feed(&mut self, input: Input) -> Vec<DecodeAction> {
        let (now, handover) = (self.now, &mut self.handover);
        let ask = handover.ask().unwrap_or(AskIndex(0));
        let candidate = handover.candidate().cloned().unwrap_or_else(|| NodeId::new("p0").unwrap());
        match input {
            LinkReady => handover.on_link_ready(&candidate),
            LinkFailed => handover.on_link_failed(&candidate, now),
            Busy => handover.on_event(ask, PrefillEvent::Busy { retry_after: SECOND }, now),
            Accepted => handover.on_event(ask, PrefillEvent::Accepted { num_cached_tokens: 0 }, now),
            Progress => {
                let (num_steps, num_computed_tokens) = (handover.num_steps + 1, 0);
                handover.on_event(ask, PrefillEvent::Progress { num_steps, num_computed_tokens }, now)
            }
            FirstTokens => handover.on_event(ask, first_tokens(&[STOP, 8]), now),
            FirstTokensThatEndAll => handover.on_event(ask, first_tokens(&[STOP, STOP]), now),
            TooFewFirstTokens => handover.on_event(ask, first_tokens(&[7]), now),
            Sent => handover.on_event(ask, PrefillEvent::Sent { num_extents: 1, num_bytes: 1 }, now),
            Failed => handover.on_event(ask, PrefillEvent::Failed(NodeError::Draining), now),
            Superseded => handover.on_event(ask, PrefillEvent::Failed(NodeError::Superseded), now),
            Extent => {
                self.landed = (self.landed + 40).min(99);
                handover.on_extent_verified(ask, 60, self.landed, false, now)
            }
            LastExtent => handover.on_extent_verified(ask, 60, 100, true, now),
            RefusedExtent => handover.on_extent_refused(ask, now),
            StreamLost => handover.on_stream_lost(ask, now),
            StaleLoss => handover.on_stream_lost(AskIndex(ask.0.wrapping_sub(1)), now),
            Cancel => handover.on_cancel(),
            Deadline => {
                self.now = handover.next_deadline().unwrap_or(now);
                handover.on_tick(self.now)
            }
            WholeDeadline => {
                self.now = now.max(60 * SECOND);
                handover.on_tick(self.now)
            }
        }
    }
}

fn after(inputs: &[Input]) -> Driver {
    let (mut driver, _) = Driver::new(request(2), limits());
    for &input in inputs {
        driver.feed(input);
    }
    driver
}

fn words(actions: &[DecodeAction]) -> String {
    let word = |action: &DecodeAction| match action {
        DecodeAction::Link { candidate } => format!("Link({candidate})"),
        DecodeAction::Ask { candidate, ask, num_held_tokens, .. } => {
            format!("Ask({candidate}, #{}, holds {num_held_tokens})", ask.0)
        }
        DecodeAction::Send(PrefillControl::Credit { bytes }) => format!("Credit({bytes})"),
        DecodeAction::Send(PrefillControl::Received) => "Received".into(),
        DecodeAction::DeliverFirstTokens { .. } => "DeliverFirstTokens".into(),
        DecodeAction::CloseLanding => "CloseLanding".into(),
        DecodeAction::ResetStream => "ResetStream".into(),
        DecodeAction::CandidateLost { candidate, loss } => format!("CandidateLost({candidate}, {})", loss.as_str()),
        DecodeAction::Join => "Join".into(),
        DecodeAction::PrefillLocally { num_valid_tokens, .. } => format!("PrefillLocally(from {num_valid_tokens})"),
        DecodeAction::Fail(_) => "Fail".into(),
        DecodeAction::Release { num_valid_tokens } => format!("Release(valid {num_valid_tokens})"),
    };
    actions.iter().map(word).collect::<Vec<_>>().join(", ")
}

/// The whole table: every state, every input. A change here is a change of the protocol.
#[test]
fn transitions_match_the_committed_table() {
    let states: [(&str, &[Input]); 8] = [
        ("Linking", &[]),
        ("Asked", &[LinkReady]),
        ("Landing", &[LinkReady, Accepted, Extent]),
        ("Landing with #1", &[LinkReady, Accepted, Extent, FirstTokens]),
        ("AwaitingToken", &[LinkReady, Accepted, LastExtent]),
        ("Joined", &[LinkReady, Accepted, FirstTokens, LastExtent]),
        ("Local", &[LinkFailed, LinkFailed]),
        ("Released", &[Cancel]),
    ];
    let mut table = String::new();
    for (name, inputs) in states {
        table += &format!("{name}\n");
        let mut ignored = Vec::new();
        for input in INPUTS {
            let mut driver = after(inputs);
            let before = driver.handover.state();
            let actions = driver.feed(input);
            let state = driver.handover.state();
            if state == before && actions.is_empty() {
                ignored.push(format!("{input:?}"));
            } else {
                let (input, state) = (format!("{input:?}"), format!("{state:?}"));
                let row = format!("  {input:<22} -> {state:<14} {}", words(&actions));
                table += &format!("{}\n", row.trim_end());
            }
        }
        table += &format!("  stays: {}\n\n", ignored.join(" "));
    }
    let is_as_committed = table.trim() == include_str!("transitions.txt").trim();
    assert!(is_as_committed, "the table is now:\n{table}");
}

#[test]
fn no_candidate_means_local_prefill() {
    let (driver, actions) = Driver::new(request(0), limits());
    assert_eq!(actions, [DecodeAction::PrefillLocally { num_valid_tokens: 0, has_first_tokens: false }]);
    assert_eq!(driver.handover.state(), DecodeState::Local);
    assert_eq!(driver.handover.next_deadline(), None);
}

#[test]
fn busy_everywhere_means_local_prefill() {
    let mut driver = after(&[LinkReady, Busy, LinkReady]);
    let actions = driver.feed(Busy);
    assert_eq!(words(&actions[2..]), "CandidateLost(p1, busy), PrefillLocally(from 0)");
}

#[test]
fn candidate_named_twice_is_asked_once() {
    let mut twice = request(1);
    twice.candidates = vec![twice.candidates[0].clone(), twice.candidates[0].clone()];
    let (mut driver, _) = Driver::new(twice, limits());
    assert!(words(&driver.feed(LinkFailed)).ends_with("PrefillLocally(from 0)"));
}

#[test]
fn next_candidate_is_told_of_the_verified_tokens_in_whole_granules() {
    let mut driver = after(&[LinkReady, Accepted, Extent, StreamLost]);
    assert_eq!(words(&driver.feed(LinkReady)), "Ask(p1, #1, holds 32)");
}

#[test]
fn held_tokens_never_cover_the_last_one() {
    let (mut driver, _) = Driver::new(DecodeRequest { num_tokens: 64, num_held_tokens: 64, ..request(1) }, limits());
    assert_eq!(words(&driver.feed(LinkReady)), "Ask(p0, #0, holds 48)");
}

#[test]
fn small_rest_is_prefilled_locally() {
    let few = DecodeLimits { num_local_tokens_max: 60, ..limits() };
    let (mut driver, _) = Driver::new(request(2), few);
    driver.feed(LinkReady);
    driver.feed(Extent);
    assert!(words(&driver.feed(StreamLost)).ends_with("CandidateLost(p0, stream_lost), PrefillLocally(from 40)"));
}

#[test]
fn first_tokens_of_a_later_candidate_are_dropped() {
    let mut driver = after(&[LinkReady, Accepted, FirstTokens, StreamLost, LinkReady, Accepted]);
    assert_eq!(driver.feed(FirstTokensThatEndAll), []);
    assert_eq!(words(&driver.feed(LastExtent)), "CloseLanding, Received, Join");
}

#[test]
fn local_prefill_knows_that_the_first_tokens_are_out() {
    let mut driver = after(&[LinkReady, Accepted, Extent, FirstTokens, StreamLost]);
    let actions = driver.feed(LinkFailed);
    let expected = DecodeAction::PrefillLocally { num_valid_tokens: 40, has_first_tokens: true };
    assert_eq!(actions.last(), Some(&expected));
}

#[test]
fn complete_kv_without_a_first_token_is_finished_locally_from_the_last_token() {
    let mut driver = after(&[LinkReady, Accepted, LastExtent]);
    assert_eq!(words(&driver.feed(StreamLost)), "ResetStream, CandidateLost(p0, stream_lost), PrefillLocally(from 99)");
}

#[test]
fn choice_that_ends_with_its_first_token_says_why() {
    let mut driver = after(&[LinkReady, Accepted]);
    let actions = driver.feed(FirstTokens);
    let DecodeAction::DeliverFirstTokens { finish, .. } = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(finish, &[Some(FinishReason::StopToken(STOP)), None]);
}

#[test]
fn resumed_request_counts_its_committed_tokens() {
    let resumed = DecodeRequest { prompt_len: 92, ..request(1) };
    let (mut driver, _) = Driver::new(resumed, limits());
    driver.feed(LinkReady);
    driver.feed(Accepted);
    let actions = driver.feed(FirstTokens);
    let DecodeAction::DeliverFirstTokens { finish, .. } = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(finish, &[Some(FinishReason::StopToken(STOP)), Some(FinishReason::Length)], "9 of 9 tokens");
}

#[test]
fn steps_are_progress_until_the_first_token_and_extents_after_it() {
    let mut driver = after(&[LinkReady, Accepted]);
    driver.now = SECOND;
    driver.feed(Progress);
    assert_eq!(driver.handover.next_deadline(), Some(3 * SECOND));
    driver.feed(FirstTokens);
    driver.now = 2 * SECOND;
    driver.feed(Progress);
    assert_eq!(driver.handover.next_deadline(), Some(3 * SECOND), "steps of other prompts are no excuse");
    driver.feed(Extent);
    assert_eq!(driver.handover.next_deadline(), Some(4 * SECOND));
}

#[test]
fn prompt_may_wait_in_the_queue_of_an_engine_that_moves() {
    let mut driver = after(&[LinkReady]);
    driver.now = SECOND / 2;
    driver.feed(Progress);
    assert_eq!(driver.handover.state(), DecodeState::Asked);
    assert_eq!(driver.handover.next_deadline(), Some(SECOND * 3 / 2));
    assert_eq!(words(&driver.feed(Deadline)), "ResetStream, CloseLanding, CandidateLost(p0, not_accepted), Link(p1)");
}

#[test]
fn steps_of_a_later_candidate_are_progress_though_the_first_token_is_out() {
    let mut driver = after(&[LinkReady, Accepted, FirstTokens, StreamLost, LinkReady, Accepted]);
    driver.now = SECOND;
    driver.feed(Progress);
    assert_eq!(driver.handover.next_deadline(), Some(3 * SECOND));
}

#[test]
fn step_counter_that_stands_still_is_no_progress() {
    let mut driver = after(&[LinkReady, Accepted, Progress]);
    driver.now = SECOND;
    let event = PrefillEvent::Progress { num_steps: 1, num_computed_tokens: 0 };
    driver.handover.on_event(AskIndex(0), event, SECOND);
    assert_eq!(driver.handover.next_deadline(), Some(2 * SECOND));
}

#[test]
fn every_verified_byte_comes_back_as_credit_until_the_last_extent() {
    let mut driver = after(&[LinkReady]);
    assert_eq!(words(&driver.feed(Extent)), "", "less than a quarter of the window");
    assert_eq!(words(&driver.feed(Extent)), "Credit(120)");
    assert_eq!(words(&driver.feed(Extent)), "");
    assert_eq!(words(&driver.feed(LastExtent)), "CloseLanding, Received");
}

#[test]
fn tick_before_the_deadline_does_nothing() {
    let mut driver = after(&[LinkReady]);
    assert_eq!(driver.handover.on_tick(SECOND - Duration::from_nanos(1)), []);
}

/// What must hold for any order of events, checked on the actions alone.
#[derive(Default)]
struct Rules {
    num_deliveries: u32,
    has_ended: bool,
    is_landing_open: bool,
    is_stream_open: bool,
    failed: bool,
}

impl Rules {
    fn check(&mut self, action: &DecodeAction) {
        assert!(!self.has_ended, "{action:?} after the end");
        assert!(!self.failed || matches!(action, DecodeAction::Release { .. }), "only Release follows Fail");
        match action {
            DecodeAction::Link { .. } => assert!(!self.is_landing_open && !self.is_stream_open),
            DecodeAction::Ask { num_held_tokens, .. } => {
                assert!(!self.is_landing_open && !self.is_stream_open);
                assert!(num_held_tokens % 16 == 0 && *num_held_tokens < 100);
                (self.is_landing_open, self.is_stream_open) = (true, true);
            }
            DecodeAction::Send(_) => assert!(self.is_stream_open),
            DecodeAction::DeliverFirstTokens { .. } => self.num_deliveries += 1,
            DecodeAction::CloseLanding => {
                assert!(self.is_landing_open);
                self.is_landing_open = false;
            }
            DecodeAction::ResetStream => {
                assert!(self.is_stream_open);
                self.is_stream_open = false;
            }
            DecodeAction::CandidateLost { .. } => assert!(!self.is_landing_open && !self.is_stream_open),
            DecodeAction::Fail(_) => self.failed = true,
            DecodeAction::Join => {
                assert!(!self.is_landing_open && self.is_stream_open && self.num_deliveries == 1);
                self.has_ended = true;
            }
            DecodeAction::PrefillLocally { has_first_tokens, .. } => {
                assert!(!self.is_landing_open && !self.is_stream_open);
                assert_eq!(*has_first_tokens, self.num_deliveries == 1);
                self.has_ended = true;
            }
            DecodeAction::Release { .. } => {
                assert!(!self.is_landing_open && !self.is_stream_open);
                self.has_ended = true;
            }
        }
        assert!(self.num_deliveries <= 1, "first tokens were delivered twice");
    }
}

proptest! {
    #[test]
    fn any_order_of_events_delivers_once_and_ends_once(
        num_candidates in 0usize..4,
        inputs in prop::collection::vec(prop::sample::select(&INPUTS[..]), 0..40),
    ) {
        let (mut driver, actions) = Driver::new(request(num_candidates), limits());
        let mut rules = Rules::default();
        actions.iter().for_each(|action| rules.check(action));
        for input in inputs {
            for action in driver.feed(input) {
                rules.check(&action);
            }
            prop_assert_eq!(rules.has_ended, driver.handover.state().is_terminal());
            prop_assert_eq!(rules.has_ended, driver.handover.next_deadline().is_none());
        }
        // Time alone ends it, and frees everything.
        for action in driver.feed(WholeDeadline) {
            rules.check(&action);
        }
        prop_assert!(rules.has_ended);
    }
}
