use proptest::prelude::*;

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
    Deadline,
    WholeDeadline,
}

use Input::*;

const INPUTS: [Input; 12] = [
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
    Deadline,
    WholeDeadline,
];

fn limits() -> PrefillLimits {
    PrefillLimits { stall_timeout: SECOND, total_timeout: 60 * SECOND }
}

fn extent(layer: u16) -> ExtentId {
    ExtentId { group: 0, layer, plane_mask: 3, first_head: 0, num_heads: 2, first_token: 0, num_tokens: 16 }
}

/// A hand-over with a clock; each layer's extent is 100 bytes.
struct Driver {
    handover: PrefillHandover,
    now: Duration,
    num_layers: u16,
}

impl Driver {
    fn new(credit_bytes: u64) -> Self {
        let (handover, actions) = PrefillHandover::new(7, credit_bytes, limits(), Duration::ZERO);
        assert_eq!(actions, [PrefillAction::Send(PrefillEvent::Accepted { num_cached_tokens: 7 })]);
        Self { handover, now: Duration::ZERO, num_layers: 0 }
    }

    fn feed(&mut self, input: Input) -> Vec<PrefillAction> {
        let (now, handover) = (self.now, &mut self.handover);
        match input {
            Scheduled => {
                handover.on_scheduled();
                Vec::new()
            }
            Progress => handover.on_progress(3, 5),
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

fn words(actions: &[PrefillAction]) -> String {
    let word = |action: &PrefillAction| match action {
        PrefillAction::Send(PrefillEvent::Accepted { .. }) => "Accepted".into(),
        PrefillAction::Send(PrefillEvent::Progress { .. }) => "Progress".into(),
        PrefillAction::Send(PrefillEvent::FirstTokens { .. }) => "FirstTokens".into(),
        PrefillAction::Send(PrefillEvent::Sent { num_extents, num_bytes }) => {
            format!("Sent({num_extents} extents, {num_bytes} bytes)")
        }
        PrefillAction::Send(PrefillEvent::Failed(error)) => format!("Failed({error})"),
        PrefillAction::Send(PrefillEvent::Busy { .. }) => "Busy".into(),
        PrefillAction::SendExtent { extent, .. } => format!("SendExtent({})", extent.layer),
        PrefillAction::StopExtents => "StopExtents".into(),
        PrefillAction::Unpin => "Unpin".into(),
    };
    actions.iter().map(word).collect::<Vec<_>>().join(", ")
}

/// The whole table: every state, every input. A change here is a change of the protocol.
#[test]
fn transitions_match_the_committed_table() {
    let states: [(&str, &[Input]); 8] = [
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
            let mut driver = after(100, inputs);
            let before = driver.handover.state();
            let actions = driver.feed(input);
            let state = driver.handover.state();
            if state == before && actions.is_empty() {
                ignored.push(format!("{input:?}"));
            } else {
                let (input, state) = (format!("{input:?}"), format!("{state:?}"));
                let row = format!("  {input:<14} -> {state:<17} {}", words(&actions));
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
fn absurd_credit_does_not_overflow() {
    let mut driver = Driver::new(u64::MAX);
    driver.handover.on_credit(u64::MAX, SECOND);
    assert_eq!(words(&driver.handover.on_layer_written(extent(0), u64::MAX, SECOND)), "SendExtent(0)");
}

proptest! {
    #[test]
    fn any_order_of_events_unpins_once_and_only_when_nothing_is_in_flight(
        credit_bytes in 0u64..300,
        inputs in prop::collection::vec(prop::sample::select(&INPUTS[..]), 0..40),
    ) {
        let mut driver = Driver::new(credit_bytes);
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
                    }
                    PrefillAction::SendExtent { extent, .. } => {
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
