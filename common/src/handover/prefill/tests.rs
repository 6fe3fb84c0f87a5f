use proptest::prelude::*;

use super::super::fetch::{FetchFailure, FetchFrom};
use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Everything that can happen to a hand-over.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Input {
    Scheduled,
    Progress,
    LayerWritten,
    FirstTokens,
    Credit,
    ExtentSent,
    ExtentStopped,
    Received,
    StreamLost,
    Failed,
    FetchExtent,
    FetchLastExtent,
    FetchRefused,
    FetchStopped,
    Deadline,
    WholeDeadline,
}

use Input::*;

const INPUTS: [Input; 16] = [
    Scheduled,
    Progress,
    LayerWritten,
    FirstTokens,
    Credit,
    ExtentSent,
    ExtentStopped,
    Received,
    StreamLost,
    Failed,
    FetchExtent,
    FetchLastExtent,
    FetchRefused,
    FetchStopped,
    Deadline,
    WholeDeadline,
];

fn limits() -> PrefillLimits {
    PrefillLimits { stall_timeout: SECOND, total_timeout: 60 * SECOND }
}

fn extent(layer: u16) -> ExtentId {
    ExtentId { group: 0, layer, plane_mask: 3, first_head: 0, num_heads: 2, first_token: 0, num_tokens: 16 }
}

/// A window of four of the fetched extents.
fn fetch_plan() -> FetchPlan {
    FetchPlan {
        from: FetchFrom::DecodeNode,
        first_token: 16,
        end_token: 96,
        credit_window_bytes: 400,
        stall_timeout: SECOND / 2,
        total_timeout: 2 * SECOND,
    }
}

/// A hand-over with a clock; each layer's extent is 100 bytes, of what is fetched 16 tokens.
struct Driver {
    handover: PrefillHandover,
    now: Duration,
    num_layers: u16,
    num_fetched_tokens: u32,
}

impl Driver {
    fn new(credit_bytes: u64) -> Self {
        let (handover, actions) = PrefillHandover::new(7, credit_bytes, limits(), Duration::ZERO);
        assert_eq!(actions, [PrefillAction::Send(PrefillEvent::Accepted { num_cached_tokens: 7 })]);
        Self { handover, now: Duration::ZERO, num_layers: 0, num_fetched_tokens: 0 }
    }

    fn fetching(credit_bytes: u64) -> Self {
        let (handover, actions) =
            PrefillHandover::new_fetching(16, fetch_plan(), credit_bytes, limits(), Duration::ZERO);
        assert_eq!(words(&actions), "Accepted, OpenFetch(16..96)");
        Self { handover, now: Duration::ZERO, num_layers: 0, num_fetched_tokens: 16 }
    }

    fn fetching_from_peer() -> Self {
        let plan = FetchPlan { from: FetchFrom::Peer, ..fetch_plan() };
        let (handover, _) = PrefillHandover::new_fetching(16, plan, 100, limits(), Duration::ZERO);
        Self { handover, ..Self::fetching(100) }
    }

    fn feed(&mut self, input: Input) -> Vec<PrefillAction> {
        let (now, handover) = (self.now, &mut self.handover);
        match input {
            Scheduled => {
                handover.on_scheduled();
                Vec::new()
            }
            Progress => handover.on_progress(3, 5),
            // The engine waits.
            LayerWritten if handover.state() == PrefillState::Fetching => Vec::new(),
            LayerWritten => {
                self.num_layers += 1;
                handover.on_layer_written(extent(self.num_layers - 1), 100, now)
            }
            FirstTokens => handover.on_first_tokens(vec![], NodeTimeline::default(), now),
            Credit => handover.on_credit(100, now),
            // The transport reports the end of what it was given, and of nothing else.
            ExtentSent | ExtentStopped if handover.num_in_flight == 0 => Vec::new(),
            ExtentSent => handover.on_extent_ended(true, now),
            ExtentStopped => handover.on_extent_ended(false, now),
            Received => handover.on_received(now),
            StreamLost => handover.on_stream_lost(),
            Failed => handover.on_failed(NodeError::Superseded),
            FetchExtent => {
                self.num_fetched_tokens = (self.num_fetched_tokens + 16).min(80);
                handover.on_fetched(60, self.num_fetched_tokens, false, now)
            }
            FetchLastExtent => handover.on_fetched(60, 96, true, now),
            FetchRefused => handover.on_fetch_failed(FetchFailure::ExtentRefused, now),
            FetchStopped => handover.on_fetch_failed(FetchFailure::Stopped, now),
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

fn after(credit_bytes: u64, inputs: &[Input]) -> Driver {
    let mut driver = Driver::new(credit_bytes);
    for &input in inputs {
        driver.feed(input);
    }
    driver
}

fn after_fetching(inputs: &[Input]) -> Driver {
    let mut driver = Driver::fetching(100);
    for &input in inputs {
        driver.feed(input);
    }
    driver
}

fn words(actions: &[PrefillAction]) -> String {
    let word = |action: &PrefillAction| match action {
        PrefillAction::Send(PrefillEvent::Accepted { .. }) => "Accepted".into(),
        PrefillAction::Send(PrefillEvent::Progress { .. }) => "Progress".into(),
        PrefillAction::Send(PrefillEvent::FirstTokens { .. }) => "FirstTokens".into(),
        PrefillAction::Send(PrefillEvent::Sent { num_extents, num_bytes }) => {
            format!("Sent({num_extents} extents, {num_bytes} bytes)")
        }
        PrefillAction::Send(PrefillEvent::Failed(error)) => format!("Failed({error})"),
        PrefillAction::Send(PrefillEvent::FetchCredit { bytes }) => format!("FetchCredit({bytes})"),
        PrefillAction::Send(event) => format!("{event:?}"),
        PrefillAction::SendToPeer(FetchPrefixControl::Credit { bytes }) => format!("PeerCredit({bytes})"),
        PrefillAction::OpenFetch(plan) => format!("OpenFetch({}..{})", plan.first_token, plan.end_token),
        PrefillAction::CloseFetch { num_valid_tokens, end } => format!("CloseFetch({end:?}, valid {num_valid_tokens})"),
        PrefillAction::Compute { num_valid_tokens } => format!("Compute(from {num_valid_tokens})"),
        PrefillAction::SendExtent { extent, .. } => format!("SendExtent({})", extent.layer),
        PrefillAction::StopExtents => "StopExtents".into(),
        PrefillAction::Unpin => "Unpin".into(),
    };
    actions.iter().map(word).collect::<Vec<_>>().join(", ")
}

/// The whole table: every state, every input. A change here is a change of the protocol.
#[test]
fn transitions_match_the_committed_table() {
    let states: [(&str, &[Input]); 11] = [
        ("Fetching", &[]),
        ("Fetching, two extents landed", &[FetchExtent, FetchExtent]),
        ("Fetching, given up", &[FetchExtent, FetchStopped]),
        ("Queued", &[]),
        ("Computing", &[Scheduled]),
        ("Computing, one in flight, one without credit", &[LayerWritten, LayerWritten]),
        ("Sending, one in flight", &[LayerWritten, FirstTokens]),
        ("Sending, one in flight, received", &[LayerWritten, FirstTokens, Received]),
        ("AwaitingReceived", &[LayerWritten, ExtentSent, FirstTokens]),
        ("Stopping", &[LayerWritten, StreamLost]),
        ("Done", &[StreamLost]),
    ];
    let mut table = String::new();
    for (name, inputs) in states {
        table += &format!("{name}\n");
        let mut ignored = Vec::new();
        for input in INPUTS {
            let fetches = name.starts_with("Fetching");
            let mut driver = if fetches { after_fetching(inputs) } else { after(100, inputs) };
            let before = driver.handover.state();
            let actions = driver.feed(input);
            let state = driver.handover.state();
            if state == before && actions.is_empty() {
                ignored.push(format!("{input:?}"));
            } else {
                let (input, state) = (format!("{input:?}"), format!("{state:?}"));
                let row = format!("  {input:<15} -> {state:<17} {}", words(&actions));
                table += &format!("{}\n", row.trim_end());
            }
        }
        table += &format!("  stays: {}\n\n", ignored.join(" "));
    }
    let is_as_committed = table.trim() == include_str!("transitions.txt").trim();
    assert!(is_as_committed, "the table is now:\n{table}");
}

#[test]
fn extents_leave_in_the_order_they_were_written() {
    let mut driver = after(100, &[LayerWritten, LayerWritten, LayerWritten, LayerWritten]);
    assert_eq!(words(&driver.handover.on_credit(200, SECOND)), "SendExtent(1), SendExtent(2)");
    assert_eq!(driver.handover.num_waiting_extents(), 1);
}

#[test]
fn extent_larger_than_the_window_is_not_stuck() {
    let mut driver = Driver::new(1);
    assert_eq!(words(&driver.feed(LayerWritten)), "SendExtent(0)");
    assert_eq!(words(&driver.feed(LayerWritten)), "", "the overdraft is paid back first");
    assert_eq!(words(&driver.feed(Credit)), "SendExtent(1)");
}

#[test]
fn received_that_overtakes_the_first_token_still_lets_it_out() {
    let mut driver = after(100, &[LayerWritten, ExtentSent]);
    assert_eq!(words(&driver.feed(Received)), "");
    assert_eq!(words(&driver.feed(FirstTokens)), "FirstTokens, Sent(1 extents, 100 bytes), Unpin");
}

#[test]
fn nothing_more_is_sent_to_a_node_that_has_received_everything() {
    let mut driver = after(0, &[LayerWritten, Received]);
    assert_eq!(words(&driver.feed(Credit)), "");
    assert_eq!(words(&driver.feed(LayerWritten)), "");
    assert_eq!(words(&driver.feed(FirstTokens)), "FirstTokens, Sent(0 extents, 0 bytes), Unpin");
}

#[test]
fn blocks_stay_pinned_until_the_last_transfer_has_stopped() {
    let mut driver = after(1000, &[LayerWritten, LayerWritten]);
    assert_eq!(words(&driver.feed(StreamLost)), "StopExtents");
    assert_eq!(words(&driver.feed(ExtentStopped)), "");
    assert_eq!(words(&driver.feed(ExtentSent)), "Unpin");
}

#[test]
fn dead_peer_does_not_strand_pinned_blocks() {
    for inputs in [&[LayerWritten, ExtentSent, LayerWritten][..], &[LayerWritten, ExtentSent, FirstTokens][..]] {
        let mut driver = after(100, inputs);
        assert_eq!(driver.handover.next_deadline(), Some(SECOND));
        assert!(words(&driver.feed(Deadline)).ends_with("Unpin"));
    }
}

#[test]
fn long_computation_is_no_stall_of_the_peer() {
    let mut driver = after(1000, &[LayerWritten, ExtentSent]);
    assert_eq!(driver.handover.next_deadline(), Some(60 * SECOND));
    driver.now = 30 * SECOND;
    driver.feed(LayerWritten);
    assert_eq!(driver.handover.next_deadline(), Some(31 * SECOND), "the wait begins with the extent");
}

#[test]
fn fetch_that_stands_still_or_takes_too_long_is_computed_from_where_it_came_to() {
    let mut driver = after_fetching(&[FetchExtent, FetchExtent]);
    assert_eq!(driver.handover.next_deadline(), Some(SECOND / 2));
    let given_up = "CloseFetch(Failed(Stalled), valid 48), FetchEnded, Compute(from 48)";
    assert_eq!(words(&driver.feed(Deadline)), given_up);
    assert_eq!(driver.handover.next_deadline(), Some(60 * SECOND));
    assert_eq!(words(&driver.feed(LayerWritten)), "SendExtent(0)", "the hand-over goes on as any other");

    let mut driver = Driver::fetching(100);
    for tenths in 1..20 {
        driver.now = SECOND / 10 * tenths;
        driver.feed(FetchExtent);
    }
    assert_eq!(driver.handover.next_deadline(), Some(2 * SECOND), "it moved all the time");
    assert_eq!(words(&driver.feed(Deadline)), "CloseFetch(Failed(TooSlow), valid 80), FetchEnded, Compute(from 80)");
}

#[test]
fn little_that_was_fetched_is_told_with_the_progress() {
    let mut driver = after_fetching(&[FetchExtent]);
    assert_eq!(words(&driver.feed(Progress)), "FetchCredit(60), Progress");
    assert_eq!(words(&driver.feed(Progress)), "Progress", "once");
    assert_eq!(words(&driver.feed(FetchExtent)), "", "less than a quarter of the window");
    assert_eq!(words(&driver.feed(FetchExtent)), "FetchCredit(120)");
}

#[test]
fn peer_gets_the_credit_and_the_decode_node_hears_of_the_progress_alone() {
    let mut driver = Driver::fetching_from_peer();
    assert_eq!(words(&driver.feed(FetchExtent)), "");
    assert_eq!(words(&driver.feed(FetchExtent)), "PeerCredit(120)");
    driver.handover.on_fetched(60, 16, false, SECOND / 4);
    assert_eq!(words(&driver.feed(Progress)), "PeerCredit(60), Progress");
    assert_eq!(words(&driver.feed(FetchStopped)), "CloseFetch(Failed(Stopped), valid 48), Compute(from 48)");
}

#[test]
fn claims_beyond_the_prefix_are_worth_no_more_than_it() {
    let mut driver = Driver::fetching(100);
    driver.handover.on_fetched(u64::MAX / 2, u32::MAX, false, SECOND / 4);
    assert_eq!(
        words(&driver.feed(FetchStopped)),
        "CloseFetch(Failed(Stopped), valid 96), FetchEnded, Compute(from 96)"
    );
}

#[test]
fn absurd_credit_does_not_overflow() {
    let mut driver = Driver::new(u64::MAX);
    driver.handover.on_credit(u64::MAX, SECOND);
    assert_eq!(words(&driver.handover.on_layer_written(extent(0), u64::MAX, SECOND)), "SendExtent(0)");
}

proptest! {
    #[test]
    fn any_order_of_events_unpins_once_and_only_when_nothing_is_in_flight(
        credit_bytes in 0u64..300,
        fetches in any::<bool>(),
        inputs in prop::collection::vec(prop::sample::select(&INPUTS[..]), 0..40),
    ) {
        let mut driver = if fetches { Driver::fetching(credit_bytes) } else { Driver::new(credit_bytes) };
        let mut is_landing_open = fetches;
        let mut is_unpinned = false;
        let mut num_first_tokens = 0;
        let mut next_layer = 0;
        let ending = [WholeDeadline].into_iter().chain([ExtentStopped; 40]);
        for input in inputs.into_iter().chain(ending) {
            for action in driver.feed(input) {
                prop_assert!(!is_unpinned, "{action:?} after the end");
                match action {
                    PrefillAction::Unpin => {
                        is_unpinned = true;
                        prop_assert_eq!(driver.handover.num_in_flight, 0);
                        prop_assert!(!is_landing_open);
                    }
                    PrefillAction::CloseFetch { .. } => {
                        prop_assert!(is_landing_open);
                        is_landing_open = false;
                    }
                    PrefillAction::Compute { .. } => prop_assert!(fetches && !is_landing_open),
                    PrefillAction::SendExtent { extent, .. } => {
                        prop_assert!(!is_landing_open);
                        prop_assert_eq!(extent.layer, next_layer);
                        next_layer += 1;
                    }
                    PrefillAction::Send(PrefillEvent::FirstTokens { .. }) => num_first_tokens += 1,
                    _ => {}
                }
            }
            prop_assert_eq!(is_unpinned, driver.handover.state() == PrefillState::Done);
        }
        prop_assert!(is_unpinned);
        prop_assert!(num_first_tokens <= 1);
    }
}
