use proptest::prelude::*;

use super::*;
use crate::ids::Generation;
use crate::sampling::FinishReason;
use crate::wire::ExtentId;

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
    Declined,
    Fetch,
    FetchBeyond,
    FetchCredit,
    FetchEnded,
    FetchExtentLost,
    Cancel,
    Deadline,
    WholeDeadline,
}

use Input::*;

const INPUTS: [Input; 25] = [
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
    Declined,
    Fetch,
    FetchBeyond,
    FetchCredit,
    FetchEnded,
    FetchExtentLost,
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
        num_offered_tokens_max: 0,
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
            Declined => handover.on_event(ask, PrefillEvent::Declined, now),
            Fetch => {
                // The shell opens what is asked for.
                let mut actions = handover.on_event(ask, fetch(0, handover.num_announced_tokens), now);
                if matches!(actions.last(), Some(DecodeAction::OpenFetch { .. })) {
                    let extents = (0..3).map(|layer| (held_extent(layer), 100)).collect();
                    actions.extend(handover.on_fetch_opened(ask, Some(extents)));
                }
                actions
            }
            FetchBeyond => handover.on_event(ask, fetch(0, handover.num_announced_tokens + 16), now),
            FetchCredit => handover.on_event(ask, PrefillEvent::FetchCredit { bytes: 100 }, now),
            FetchEnded => handover.on_event(ask, PrefillEvent::FetchEnded, now),
            FetchExtentLost => handover.on_fetch_extent_lost(ask),
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

/// Credit for one and a half extents.
fn fetch(first_token: u32, end_token: u32) -> PrefillEvent {
    PrefillEvent::Fetch { generation: Generation(3), first_token, end_token, credit_bytes: 150 }
}

fn held_extent(layer: u16) -> ExtentId {
    ExtentId { group: 0, layer, plane_mask: 3, first_head: 0, num_heads: 2, first_token: 0, num_tokens: 48 }
}

fn after(inputs: &[Input]) -> Driver {
    after_with(request(2), limits(), inputs)
}

/// 48 of 100 tokens are held, and the rest is offered.
fn after_holding(inputs: &[Input]) -> Driver {
    let limits = DecodeLimits { num_offered_tokens_max: 60, ..limits() };
    after_with(DecodeRequest { num_held_tokens: 48, ..request(2) }, limits, inputs)
}

fn after_with(request: DecodeRequest, limits: DecodeLimits, inputs: &[Input]) -> Driver {
    let (mut driver, _) = Driver::new(request, limits);
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
        DecodeAction::Send(control) => format!("{control:?}"),
        DecodeAction::OpenFetch { first_token, end_token, .. } => format!("OpenFetch({first_token}..{end_token})"),
        DecodeAction::SendExtent { extent, .. } => format!("SendExtent({})", extent.layer),
        DecodeAction::StopFetch => "StopFetch".into(),
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
    let states: [(&str, &[Input]); 12] = [
        ("Linking", &[]),
        ("Asked", &[LinkReady]),
        ("Landing", &[LinkReady, Accepted, Extent]),
        ("Landing with #1", &[LinkReady, Accepted, Extent, FirstTokens]),
        ("AwaitingToken", &[LinkReady, Accepted, LastExtent]),
        ("Holding, Asked with an offer", &[LinkReady]),
        ("Holding, Landing", &[LinkReady, Accepted]),
        ("Holding, Landing, sends the held prefix", &[LinkReady, Accepted, Fetch]),
        ("Holding, Landing, has sent it", &[LinkReady, Accepted, Fetch, FetchEnded]),
        ("Joined", &[LinkReady, Accepted, FirstTokens, LastExtent]),
        ("Local", &[LinkFailed, LinkFailed]),
        ("Released", &[Cancel]),
    ];
    let mut table = String::new();
    for (name, inputs) in states {
        table += &format!("{name}\n");
        let mut ignored = Vec::new();
        for input in INPUTS {
            let mut driver = if name.starts_with("Holding") { after_holding(inputs) } else { after(inputs) };
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
fn candidate_that_declines_is_no_loss_and_may_only_where_it_was_offered() {
    let mut driver = after_holding(&[LinkReady]);
    assert_eq!(words(&driver.feed(Declined)), "ResetStream, CloseLanding, PrefillLocally(from 48)");
    let mut driver = after_with(DecodeRequest { num_held_tokens: 32, ..request(2) }, limits(), &[LinkReady]);
    assert!(words(&driver.feed(Declined)).contains("CandidateLost(p0, protocol), Link(p1)"));
}

#[test]
fn rest_is_offered_up_to_the_limit() {
    for (num_held_tokens, is_offered) in [(32, false), (48, true), (96, true)] {
        let limits = DecodeLimits { num_offered_tokens_max: 52, ..limits() };
        let (mut driver, _) = Driver::new(DecodeRequest { num_held_tokens, ..request(1) }, limits);
        let actions = driver.feed(LinkReady);
        let DecodeAction::Ask { is_local_offered, .. } = &actions[0] else { panic!("{actions:?}") };
        assert_eq!(*is_local_offered, is_offered, "{num_held_tokens} of 100 held");
    }
}

#[test]
fn prefix_leaves_as_credit_allows_and_credit_is_progress() {
    let mut driver = after_holding(&[LinkReady, Accepted]);
    assert_eq!(words(&driver.feed(Fetch)), "OpenFetch(0..48), SendExtent(0), SendExtent(1)");
    driver.now = SECOND;
    assert_eq!(words(&driver.feed(FetchCredit)), "SendExtent(2)");
    assert_eq!(driver.handover.next_deadline(), Some(3 * SECOND));
    driver.now = 2 * SECOND;
    assert_eq!(words(&driver.feed(FetchEnded)), "StopFetch");
    assert_eq!(driver.handover.next_deadline(), Some(4 * SECOND));
}

#[test]
fn prefix_that_cannot_be_sent_is_not_waited_for() {
    let mut driver = after_holding(&[LinkReady, Accepted]);
    let ask = driver.handover.ask().unwrap();
    driver.handover.on_event(ask, fetch(0, 48), SECOND);
    assert_eq!(words(&driver.handover.on_fetch_opened(ask, None)), "StopFetch, FetchStopped");
    assert_eq!(words(&driver.feed(FetchCredit)), "", "it was on its way");
    assert_eq!(words(&driver.feed(FetchEnded)), "");
}

#[test]
fn candidate_that_waits_for_what_is_sent_here_is_given_up_after_the_fetch_only() {
    let mut driver = after_holding(&[LinkReady, Accepted, Fetch]);
    assert_eq!(words(&driver.feed(Deadline)), "StopFetch, FetchStopped");
    assert_eq!(driver.handover.next_deadline(), Some(4 * SECOND));
    assert_eq!(words(&driver.feed(Deadline)), "ResetStream, CloseLanding, CandidateLost(p0, no_progress), Link(p1)");
}

#[test]
fn only_what_was_announced_is_sent_and_only_once() {
    for (first, end) in [(0, 64), (48, 48), (32, 16), (8, 48), (0, 40), (0, u32::MAX)] {
        let mut driver = after_holding(&[LinkReady, Accepted]);
        let ask = driver.handover.ask().unwrap();
        let actions = driver.handover.on_event(ask, fetch(first, end), SECOND);
        assert!(words(&actions).contains("CandidateLost(p0, protocol)"), "{first}..{end}: {}", words(&actions));
    }
    let mut driver = after_holding(&[LinkReady, Accepted, Fetch, FetchEnded]);
    assert!(words(&driver.feed(Fetch)).contains("CandidateLost(p0, protocol)"));
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
    is_prefix_read: bool,
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
            DecodeAction::OpenFetch { end_token, .. } => {
                assert!(self.is_stream_open && !self.is_prefix_read && *end_token < 100);
                self.is_prefix_read = true;
            }
            DecodeAction::SendExtent { .. } => assert!(self.is_prefix_read),
            DecodeAction::StopFetch => {
                assert!(self.is_prefix_read);
                self.is_prefix_read = false;
            }
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
        assert!(!self.has_ended || !self.is_prefix_read, "the blocks are read by a transfer");
        assert!(self.num_deliveries <= 1, "first tokens were delivered twice");
    }
}

proptest! {
    #[test]
    fn any_order_of_events_delivers_once_and_ends_once(
        num_candidates in 0usize..4,
        num_held_tokens in 0u32..100,
        inputs in prop::collection::vec(prop::sample::select(&INPUTS[..]), 0..40),
    ) {
        let request = DecodeRequest { num_held_tokens, ..request(num_candidates) };
        let limits = DecodeLimits { num_offered_tokens_max: 50, ..limits() };
        let (mut driver, actions) = Driver::new(request, limits);
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
