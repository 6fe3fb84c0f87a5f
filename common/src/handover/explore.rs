//! Every run of a small cluster: two prefill nodes and two decode nodes, each with a pool of one and a
//! half prompts, and several requests, through every order of admissions, messages, extents, `Busy`
//! answers, losses, corruptions, deadlines and cancels. Where a decode node holds a prefix, the prefill node
//! takes each of the three ways: it fetches, computes again, or declines.
//!
//! A depth-first search over all states proves, for each scenario:
//!
//! - there is no cycle and no dead end but the one where every request has ended, so every run ends, and
//!   no state needs a fault or a deadline to go on;
//! - in every state each pool's free and held units add up, and who waits for memory holds none;
//! - a sequence joins only with all of its KV, and no extent lands in a closed landing;
//! - at the end no unit is held, no handover is alive, and nothing is on its way.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use super::*;
use crate::ids::{Generation, NodeId};
use crate::sampling::{SampledToken, SamplingParams};
use crate::timeline::NodeTimeline;
use crate::wire::{ExtentId, NodeError, PrefillControl, PrefillEvent};

/// Units of a pool, and of one prompt in it.
const POOL_UNITS: u32 = 3;
const PROMPT_UNITS: u32 = 2;
/// One extent: one granule of all layers.
const EXTENT_TOKENS: u32 = 16;
const EXTENT_BYTES: u64 = 100;
const STOP: u32 = 2;
const NOW: Duration = Duration::ZERO;

/// What is played, and how many faults of each kind may strike, at any moment.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    num_requests: usize,
    num_extents: u32,
    /// Of them, how many each decode node holds from the start.
    num_held: u32,
    /// Token #1 of the first request ends it.
    first_ends: bool,
    /// A prefill node lets a prompt that does not fit wait in its queue, instead of answering `Busy`.
    has_queue: bool,
    faults: Faults,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Faults {
    num_prefill_losses: u8,
    num_decode_losses: u8,
    num_cancels: u8,
    num_corruptions: u8,
    num_timeouts: u8,
}

#[derive(Debug, Clone)]
struct Course(DecodeHandover);

impl Hash for Course {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.0.course().hash(hasher);
    }
}

#[derive(Debug, Clone, Hash)]
enum Phase {
    /// In the decode node's queue, without a block.
    Waiting,
    Handover(Box<Course>),
    LocalPrefill,
    Running,
    Ended(Outcome),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Outcome {
    Finished,
    Cancelled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ToPrefill {
    Prefill,
    Credit(u64),
    Received,
    FetchStopped,
    Reset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ToDecode {
    Busy,
    Accepted,
    FirstTokens,
    Sent,
    Failed,
    Declined,
    Fetch,
    FetchCredit(u64),
    FetchEnded,
    /// The stream ended.
    End,
}

/// One ask: its stream in both directions, its extents on the way, and the prefill node's end.
#[derive(Debug, Clone, Hash)]
struct Ask {
    node: usize,
    next_extent: u32,
    to_prefill: VecDeque<ToPrefill>,
    to_decode: VecDeque<ToDecode>,
    extents: Vec<u32>,
    prefill: Option<PrefillHandover>,
    num_in_flight: u32,
    /// Held extents on the way to the prefill node.
    fetched: Vec<u32>,
    /// Bit `i`: held extent `i` was verified at the prefill node.
    fetch_landed: u32,
    /// The decode node's blocks are read for the prefill node.
    is_prefix_read: bool,
    is_fetch_landing_open: bool,
    /// The decode node reads the stream.
    is_read: bool,
    is_landing_open: bool,
}

#[derive(Debug, Clone, Hash)]
struct Request {
    node: usize,
    phase: Phase,
    /// Of all attempts; those of the present one begin at `first_ask`.
    asks: Vec<Ask>,
    first_ask: usize,
    /// Bit `i`: extent `i` was verified under the present ask, or lies in the held prefix.
    landed: u32,
    is_delivered: bool,
}

#[derive(Debug, Clone, Hash)]
struct World {
    requests: Vec<Request>,
    free_decode_units: [u32; 2],
    free_prefill_units: [u32; 2],
    is_decode_alive: [bool; 2],
    is_prefill_alive: [bool; 2],
    faults_left: Faults,
}

/// One thing that can happen.
#[derive(Debug, Clone, Copy)]
enum Step {
    Admit(usize),
    Link(usize),
    ToPrefill(usize, usize),
    /// As `ToPrefill`, for a `Prefill` whose prefix the prefill node lacks.
    Fetch(usize, usize),
    Decline(usize, usize),
    FetchedExtent(usize, usize),
    CorruptFetchedExtent(usize, usize),
    LoseFetchedExtent(usize, usize),
    ToDecode(usize, usize),
    Extent(usize, usize, usize),
    CorruptExtent(usize, usize, usize),
    Compute(usize, usize),
    ExtentEnded(usize, usize),
    FinishLocalPrefill(usize),
    Finish(usize),
    Cancel(usize),
    DecodeTimeout(usize),
    PrefillTimeout(usize, usize),
    LosePrefillNode(usize),
    LoseDecodeNode(usize),
}

impl Step {
    /// Faults may happen, and nothing may depend on one to go on.
    fn is_fault(self) -> bool {
        use Step::*;
        matches!(
            self,
            CorruptExtent(..)
                | CorruptFetchedExtent(..)
                | LoseFetchedExtent(..)
                | Cancel(_)
                | DecodeTimeout(_)
                | PrefillTimeout(..)
                | LosePrefillNode(_)
                | LoseDecodeNode(_)
        )
    }
}

impl World {
    fn new(scenario: &Scenario) -> Self {
        let request = |i: usize| Request {
            node: i % 2,
            phase: Phase::Waiting,
            asks: Vec::new(),
            first_ask: 0,
            landed: 0,
            is_delivered: false,
        };
        Self {
            requests: (0..scenario.num_requests).map(request).collect(),
            free_decode_units: [POOL_UNITS; 2],
            free_prefill_units: [POOL_UNITS; 2],
            is_decode_alive: [true; 2],
            is_prefill_alive: [true; 2],
            faults_left: scenario.faults,
        }
    }

    fn steps(&self, scenario: &Scenario) -> Vec<Step> {
        let mut steps = Vec::new();
        let faults = &self.faults_left;
        for (r, request) in self.requests.iter().enumerate() {
            match &request.phase {
                Phase::Waiting if self.free_decode_units[request.node] >= PROMPT_UNITS => steps.push(Step::Admit(r)),
                Phase::Handover(course) => {
                    if course.0.state() == DecodeState::Linking {
                        steps.push(Step::Link(r));
                    }
                    if faults.num_timeouts > 0 {
                        steps.push(Step::DecodeTimeout(r));
                    }
                }
                Phase::LocalPrefill => steps.push(Step::FinishLocalPrefill(r)),
                Phase::Running => steps.push(Step::Finish(r)),
                _ => {}
            }
            if faults.num_cancels > 0 && !matches!(request.phase, Phase::Ended(_)) {
                steps.push(Step::Cancel(r));
            }
            for (a, ask) in request.asks.iter().enumerate() {
                // Waiting in the queue is not having been read yet.
                let fits = self.free_prefill_units[ask.node] >= PROMPT_UNITS || !scenario.has_queue;
                if ask.to_prefill.front().is_some_and(|message| fits || *message != ToPrefill::Prefill) {
                    steps.push(Step::ToPrefill(r, a));
                    let is_admitted = ask.to_prefill.front() == Some(&ToPrefill::Prefill)
                        && self.free_prefill_units[ask.node] >= PROMPT_UNITS;
                    if is_admitted && scenario.num_held > 0 {
                        steps.extend([Step::Fetch(r, a), Step::Decline(r, a)]);
                    }
                }
                if !ask.fetched.is_empty() {
                    steps.push(Step::FetchedExtent(r, a));
                    if faults.num_corruptions > 0 && ask.is_fetch_landing_open {
                        steps.push(Step::CorruptFetchedExtent(r, a));
                    }
                    if faults.num_corruptions > 0 && ask.is_prefix_read {
                        steps.push(Step::LoseFetchedExtent(r, a));
                    }
                }
                if !ask.to_decode.is_empty() {
                    steps.push(Step::ToDecode(r, a));
                }
                for e in 0..ask.extents.len() {
                    steps.push(Step::Extent(r, a, e));
                    if faults.num_corruptions > 0 && ask.is_landing_open {
                        steps.push(Step::CorruptExtent(r, a, e));
                    }
                }
                if ask.num_in_flight > 0 {
                    steps.push(Step::ExtentEnded(r, a));
                }
                if let Some(prefill) = &ask.prefill {
                    if matches!(prefill.state(), PrefillState::Queued | PrefillState::Computing) {
                        steps.push(Step::Compute(r, a));
                    }
                    if faults.num_timeouts > 0 && prefill.next_deadline().is_some() {
                        steps.push(Step::PrefillTimeout(r, a));
                    }
                }
            }
        }
        for node in 0..2 {
            if faults.num_prefill_losses > 0 && self.is_prefill_alive[node] {
                steps.push(Step::LosePrefillNode(node));
            }
            if faults.num_decode_losses > 0 && self.is_decode_alive[node] {
                steps.push(Step::LoseDecodeNode(node));
            }
        }
        steps
    }

    fn take(&mut self, step: Step, scenario: &Scenario, seen: &mut BTreeSet<String>) {
        match step {
            Step::Admit(r) => {
                self.free_decode_units[self.requests[r].node] -= PROMPT_UNITS;
                let (handover, actions) = DecodeHandover::new(handover_of(scenario), decode_limits(), NOW);
                let request = &mut self.requests[r];
                request.phase = Phase::Handover(Box::new(Course(handover)));
                request.first_ask = request.asks.len();
                request.landed = (1 << scenario.num_held) - 1;
                request.is_delivered = false;
                self.do_decode(r, actions, scenario, seen);
            }
            Step::Link(r) => self.with_handover(r, scenario, seen, |handover, alive| {
                let node = handover.candidate().expect("a linking hand-over has a candidate").clone();
                if alive[index_of(&node)] { handover.on_link_ready(&node) } else { handover.on_link_failed(&node, NOW) }
            }),
            Step::ToPrefill(r, a) => {
                let message = self.requests[r].asks[a].to_prefill.pop_front().expect("the step was possible");
                self.receive_at_prefill(r, a, message, false, seen);
            }
            Step::Fetch(r, a) => {
                let message = self.requests[r].asks[a].to_prefill.pop_front().expect("the step was possible");
                self.receive_at_prefill(r, a, message, true, seen);
            }
            Step::Decline(r, a) => {
                let ask = &mut self.requests[r].asks[a];
                ask.to_prefill.pop_front();
                if ask.is_read {
                    ask.to_decode.extend([ToDecode::Declined, ToDecode::End]);
                }
            }
            Step::FetchedExtent(r, a) => {
                let ask = &mut self.requests[r].asks[a];
                let extent = ask.fetched.remove(0);
                if !ask.is_fetch_landing_open {
                    seen.insert("late fetched extent refused".into());
                    return;
                }
                ask.fetch_landed |= 1 << extent;
                let num_contiguous_tokens = ask.fetch_landed.trailing_ones() * EXTENT_TOKENS;
                let is_complete = ask.fetch_landed.count_ones() == scenario.num_held;
                let prefill = ask.prefill.as_mut().expect("an open landing has its blocks");
                let actions = prefill.on_fetched(EXTENT_BYTES, num_contiguous_tokens, is_complete, NOW);
                self.do_prefill(r, a, actions, seen);
            }
            Step::CorruptFetchedExtent(r, a) => {
                self.faults_left.num_corruptions -= 1;
                let ask = &mut self.requests[r].asks[a];
                ask.fetched.remove(0);
                let prefill = ask.prefill.as_mut().expect("an open landing has its blocks");
                let actions = prefill.on_fetch_failed(FetchFailure::ExtentRefused, NOW);
                self.do_prefill(r, a, actions, seen);
            }
            Step::LoseFetchedExtent(r, a) => {
                self.faults_left.num_corruptions -= 1;
                self.requests[r].asks[a].fetched.remove(0);
                let ask = AskIndex((a - self.requests[r].first_ask) as u32);
                self.with_handover(r, scenario, seen, |handover, _| handover.on_fetch_extent_lost(ask));
            }
            Step::ToDecode(r, a) => {
                let ask = &mut self.requests[r].asks[a];
                let message = ask.to_decode.pop_front().expect("the step was possible");
                if !ask.is_read {
                    return;
                }
                let ask = AskIndex((a - self.requests[r].first_ask) as u32);
                let event = match message {
                    ToDecode::Busy => PrefillEvent::Busy { retry_after: NOW },
                    ToDecode::Accepted => PrefillEvent::Accepted { num_cached_tokens: 0 },
                    ToDecode::FirstTokens => first_token(if r == 0 && scenario.first_ends { STOP } else { 7 }),
                    ToDecode::Sent => PrefillEvent::Sent { num_extents: 1, num_bytes: 1 },
                    ToDecode::Failed => PrefillEvent::Failed(NodeError::Draining),
                    ToDecode::Declined => PrefillEvent::Declined,
                    ToDecode::Fetch => PrefillEvent::Fetch {
                        generation: Generation(1),
                        first_token: 0,
                        end_token: scenario.num_held * EXTENT_TOKENS,
                        credit_bytes: EXTENT_BYTES,
                    },
                    ToDecode::FetchCredit(bytes) => PrefillEvent::FetchCredit { bytes },
                    ToDecode::FetchEnded => PrefillEvent::FetchEnded,
                    ToDecode::End => {
                        return self.with_handover(r, scenario, seen, |handover, _| handover.on_stream_lost(ask, NOW));
                    }
                };
                self.with_handover(r, scenario, seen, |handover, _| handover.on_event(ask, event, NOW));
            }
            Step::Extent(r, a, e) => {
                let request = &mut self.requests[r];
                let extent = request.asks[a].extents.remove(e);
                if !request.asks[a].is_landing_open {
                    seen.insert("late extent refused".into());
                    return;
                }
                assert!(a >= request.first_ask, "an extent of an older attempt found an open landing");
                request.landed |= 1 << extent;
                let ask = AskIndex((a - request.first_ask) as u32);
                let num_contiguous_tokens = request.landed.trailing_ones() * EXTENT_TOKENS;
                let is_complete = request.landed.count_ones() == scenario.num_extents;
                self.with_handover(r, scenario, seen, |handover, _| {
                    handover.on_extent_verified(ask, EXTENT_BYTES, num_contiguous_tokens, is_complete, NOW)
                });
            }
            Step::CorruptExtent(r, a, e) => {
                self.faults_left.num_corruptions -= 1;
                let request = &mut self.requests[r];
                request.asks[a].extents.remove(e);
                let ask = AskIndex((a - request.first_ask) as u32);
                self.with_handover(r, scenario, seen, |handover, _| handover.on_extent_refused(ask, NOW));
            }
            Step::Compute(r, a) => {
                let ask = &mut self.requests[r].asks[a];
                let prefill = ask.prefill.as_mut().expect("the step was possible");
                let actions = if ask.next_extent < scenario.num_extents {
                    ask.next_extent += 1;
                    prefill.on_layer_written(extent_id(ask.next_extent - 1), EXTENT_BYTES, NOW)
                } else {
                    prefill.on_first_tokens(Vec::new(), NodeTimeline::default(), NOW)
                };
                self.do_prefill(r, a, actions, seen);
            }
            Step::ExtentEnded(r, a) => {
                let ask = &mut self.requests[r].asks[a];
                ask.num_in_flight -= 1;
                let prefill = ask.prefill.as_mut().expect("blocks in flight are pinned");
                let actions = prefill.on_extent_ended(true, NOW);
                self.do_prefill(r, a, actions, seen);
            }
            Step::FinishLocalPrefill(r) => self.requests[r].phase = Phase::Running,
            Step::Finish(r) => self.end(r, Outcome::Finished, seen),
            Step::Cancel(r) => {
                self.faults_left.num_cancels -= 1;
                match &self.requests[r].phase {
                    Phase::Handover(_) => {
                        self.with_handover(r, scenario, seen, |handover, _| handover.on_cancel());
                        self.requests[r].phase = Phase::Ended(Outcome::Cancelled);
                    }
                    Phase::Waiting => self.requests[r].phase = Phase::Ended(Outcome::Cancelled),
                    _ => self.end(r, Outcome::Cancelled, seen),
                }
            }
            Step::DecodeTimeout(r) => {
                self.faults_left.num_timeouts -= 1;
                self.with_handover(r, scenario, seen, |handover, _| {
                    handover.on_tick(handover.next_deadline().expect("a living hand-over has a deadline"))
                });
            }
            Step::PrefillTimeout(r, a) => {
                self.faults_left.num_timeouts -= 1;
                let prefill = self.requests[r].asks[a].prefill.as_mut().expect("the step was possible");
                let actions = prefill.on_tick(prefill.next_deadline().expect("the step was possible"));
                self.do_prefill(r, a, actions, seen);
            }
            Step::LosePrefillNode(node) => {
                self.faults_left.num_prefill_losses -= 1;
                self.is_prefill_alive[node] = false;
                self.free_prefill_units[node] = POOL_UNITS;
                for ask in self.requests.iter_mut().flat_map(|request| &mut request.asks).filter(|ask| ask.node == node)
                {
                    ask.prefill = None;
                    ask.is_fetch_landing_open = false;
                    ask.fetched.clear();
                    ask.num_in_flight = 0;
                    ask.to_prefill.clear();
                    ask.to_decode.clear();
                    // What left the node before may still arrive.
                    if ask.is_read {
                        ask.to_decode.push_back(ToDecode::End);
                    }
                }
            }
            Step::LoseDecodeNode(node) => {
                self.faults_left.num_decode_losses -= 1;
                self.is_decode_alive[node] = false;
                self.free_decode_units[node] = POOL_UNITS;
                for request in self.requests.iter_mut().filter(|request| request.node == node) {
                    for ask in &mut request.asks {
                        ask.hang_up();
                        ask.is_landing_open = false;
                        ask.is_prefix_read = false;
                        ask.extents.clear();
                    }
                    if !matches!(request.phase, Phase::Ended(_)) {
                        // The proxy resumes it on the other node.
                        request.phase = Phase::Waiting;
                        request.node = 1 - node;
                        seen.insert("resumed".into());
                    }
                }
            }
        }
    }

    fn with_handover(
        &mut self,
        r: usize,
        scenario: &Scenario,
        seen: &mut BTreeSet<String>,
        event: impl FnOnce(&mut DecodeHandover, [bool; 2]) -> Vec<DecodeAction>,
    ) {
        let alive = self.is_prefill_alive;
        if let Phase::Handover(course) = &mut self.requests[r].phase {
            let actions = event(&mut course.0, alive);
            self.do_decode(r, actions, scenario, seen);
        }
    }

    fn do_decode(&mut self, r: usize, actions: Vec<DecodeAction>, scenario: &Scenario, seen: &mut BTreeSet<String>) {
        for action in actions {
            let request = &mut self.requests[r];
            let last_ask = request.asks.last_mut();
            match action {
                DecodeAction::Link { .. } => {}
                DecodeAction::Ask { candidate, num_held_tokens, .. } => {
                    let next_extent = num_held_tokens / EXTENT_TOKENS;
                    // What landed out of order behind the held prefix is asked for again.
                    request.landed = (1 << next_extent) - 1;
                    request.asks.push(Ask {
                        node: index_of(&candidate),
                        next_extent,
                        to_prefill: VecDeque::from([ToPrefill::Prefill]),
                        to_decode: VecDeque::new(),
                        extents: Vec::new(),
                        prefill: None,
                        num_in_flight: 0,
                        fetched: Vec::new(),
                        fetch_landed: 0,
                        is_prefix_read: false,
                        is_fetch_landing_open: false,
                        is_read: true,
                        is_landing_open: true,
                    });
                    // The node was lost between the link and the ask.
                    if !self.is_prefill_alive[index_of(&candidate)] {
                        let ask = request.asks.last_mut().expect("just pushed");
                        ask.to_prefill.clear();
                        ask.to_decode.push_back(ToDecode::End);
                    }
                }
                DecodeAction::Send(control) => {
                    let ask = last_ask.expect("a message goes to an open ask");
                    if self.is_prefill_alive[ask.node] {
                        ask.to_prefill.push_back(match control {
                            PrefillControl::Credit { bytes } => ToPrefill::Credit(bytes),
                            PrefillControl::Received => ToPrefill::Received,
                            PrefillControl::FetchStopped => ToPrefill::FetchStopped,
                        });
                    }
                }
                DecodeAction::OpenFetch { ask, first_token, end_token, .. } => {
                    last_ask.expect("a fetch belongs to an ask").is_prefix_read = true;
                    let held = first_token / EXTENT_TOKENS..end_token / EXTENT_TOKENS;
                    let extents = held.map(|extent| (extent_id(extent), EXTENT_BYTES)).collect();
                    self.with_handover(r, scenario, seen, |handover, _| handover.on_fetch_opened(ask, Some(extents)));
                }
                DecodeAction::SendExtent { extent, .. } => {
                    let ask = last_ask.expect("a fetch belongs to an ask");
                    assert!(ask.is_prefix_read, "a transfer reads blocks that may be anybody's");
                    if self.is_prefill_alive[ask.node] {
                        ask.fetched.push(extent.layer.into());
                    }
                }
                DecodeAction::StopFetch => {
                    let ask = last_ask.expect("a fetch belongs to an ask");
                    assert!(ask.is_prefix_read);
                    ask.is_prefix_read = false;
                    seen.insert("fetch stopped".into());
                }
                DecodeAction::DeliverFirstTokens { .. } => {
                    assert!(!request.is_delivered, "first tokens were delivered twice");
                    request.is_delivered = true;
                }
                DecodeAction::CloseLanding => last_ask.expect("a landing belongs to an ask").is_landing_open = false,
                DecodeAction::ResetStream => last_ask.expect("a stream belongs to an ask").hang_up(),
                DecodeAction::CandidateLost { loss, .. } => {
                    seen.insert(format!("lost: {}", loss.as_str()));
                }
                DecodeAction::Join => {
                    assert!(request.is_delivered && request.landed.count_ones() == scenario.num_extents);
                    let ask = last_ask.expect("a sequence joins with the KV of an ask");
                    ask.is_read = false;
                    ask.to_decode.clear();
                    request.phase = Phase::Running;
                    seen.insert("joined".into());
                }
                DecodeAction::PrefillLocally { num_valid_tokens, has_first_tokens } => {
                    assert!(num_valid_tokens < scenario.num_extents * EXTENT_TOKENS);
                    assert_eq!(has_first_tokens, request.is_delivered);
                    request.phase = Phase::LocalPrefill;
                    seen.insert("local prefill".into());
                }
                DecodeAction::Fail(_) => {
                    seen.insert("failed".into());
                }
                DecodeAction::Release { .. } => self.end(r, Outcome::Finished, seen),
            }
        }
    }

    /// The request gives its units back and ends.
    fn end(&mut self, r: usize, outcome: Outcome, seen: &mut BTreeSet<String>) {
        let request = &mut self.requests[r];
        assert!(request.asks.iter().all(|ask| !ask.is_prefix_read), "blocks were released under a transfer");
        self.free_decode_units[request.node] += PROMPT_UNITS;
        request.phase = Phase::Ended(outcome);
        seen.insert(format!("{outcome:?}"));
    }

    fn receive_at_prefill(
        &mut self,
        r: usize,
        a: usize,
        message: ToPrefill,
        fetches: bool,
        seen: &mut BTreeSet<String>,
    ) {
        let ask = &mut self.requests[r].asks[a];
        let actions = match (message, &mut ask.prefill) {
            (ToPrefill::Prefill, _) if self.free_prefill_units[ask.node] < PROMPT_UNITS => {
                seen.insert("busy".into());
                if ask.is_read {
                    ask.to_decode.extend([ToDecode::Busy, ToDecode::End]);
                }
                return;
            }
            (ToPrefill::Prefill, _) => {
                self.free_prefill_units[ask.node] -= PROMPT_UNITS;
                let limits = PrefillLimits { stall_timeout: Duration::from_secs(1), total_timeout: Duration::MAX };
                let plan = FetchPlan {
                    from: FetchFrom::DecodeNode,
                    first_token: 0,
                    end_token: ask.next_extent * EXTENT_TOKENS,
                    credit_window_bytes: EXTENT_BYTES,
                    stall_timeout: Duration::from_secs(1),
                    total_timeout: Duration::from_secs(2),
                };
                // A later candidate is told of what an earlier one has sent, too.
                let (prefill, actions) = if fetches && plan.end_token > 0 {
                    PrefillHandover::new_fetching(0, plan, EXTENT_BYTES, limits, NOW)
                } else {
                    PrefillHandover::new(0, EXTENT_BYTES, limits, NOW)
                };
                ask.prefill = Some(prefill);
                actions
            }
            (ToPrefill::FetchStopped, Some(prefill)) => prefill.on_fetch_failed(FetchFailure::Stopped, NOW),
            (ToPrefill::Credit(bytes), Some(prefill)) => prefill.on_credit(bytes, NOW),
            (ToPrefill::Received, Some(prefill)) => prefill.on_received(NOW),
            (ToPrefill::Reset, Some(prefill)) => prefill.on_stream_lost(),
            (_, None) => return,
        };
        self.do_prefill(r, a, actions, seen);
    }

    fn do_prefill(&mut self, r: usize, a: usize, actions: Vec<PrefillAction>, seen: &mut BTreeSet<String>) {
        let ask = &mut self.requests[r].asks[a];
        let send = |ask: &mut Ask, message| {
            if ask.is_read {
                ask.to_decode.push_back(message);
            }
        };
        for action in actions {
            match action {
                PrefillAction::Send(PrefillEvent::Accepted { .. }) => send(ask, ToDecode::Accepted),
                PrefillAction::Send(PrefillEvent::FirstTokens { .. }) => send(ask, ToDecode::FirstTokens),
                PrefillAction::Send(PrefillEvent::Sent { .. }) => send(ask, ToDecode::Sent),
                PrefillAction::Send(PrefillEvent::Failed(_)) => send(ask, ToDecode::Failed),
                PrefillAction::Send(PrefillEvent::FetchCredit { bytes }) => send(ask, ToDecode::FetchCredit(bytes)),
                PrefillAction::Send(PrefillEvent::FetchEnded) => send(ask, ToDecode::FetchEnded),
                PrefillAction::OpenFetch(_) => {
                    ask.is_fetch_landing_open = true;
                    send(ask, ToDecode::Fetch);
                }
                PrefillAction::CloseFetch { num_valid_tokens, end } => {
                    assert!(ask.is_fetch_landing_open);
                    assert_eq!(num_valid_tokens, ask.fetch_landed.trailing_ones() * EXTENT_TOKENS);
                    ask.is_fetch_landing_open = false;
                    seen.insert(format!("fetch: {end:?}"));
                }
                PrefillAction::Compute { .. } => assert!(!ask.is_fetch_landing_open),
                PrefillAction::Send(event) => panic!("{event:?} is not in this model"),
                PrefillAction::SendToPeer(control) => panic!("{control:?} is not in this model"),
                PrefillAction::SendExtent { extent, .. } => {
                    ask.num_in_flight += 1;
                    if ask.is_read || ask.is_landing_open {
                        ask.extents.push(extent.layer.into());
                    }
                }
                PrefillAction::StopExtents => {}
                PrefillAction::Unpin => {
                    assert_eq!(ask.num_in_flight, 0, "blocks were unpinned under a transfer");
                    assert!(!ask.is_fetch_landing_open, "blocks were unpinned under a landing");
                    send(ask, ToDecode::End);
                    ask.prefill = None;
                    self.free_prefill_units[ask.node] += PROMPT_UNITS;
                }
            }
        }
    }

    /// What must hold in every state.
    fn check(&self) {
        for node in 0..2 {
            let holds = |r: &&Request| !matches!(r.phase, Phase::Waiting | Phase::Ended(_)) && r.node == node;
            let num_holders = self.requests.iter().filter(holds).count() as u32;
            assert_eq!(self.free_decode_units[node] + num_holders * PROMPT_UNITS, POOL_UNITS);
            let asks = self.requests.iter().flat_map(|request| &request.asks);
            let num_holders = asks.filter(|ask| ask.node == node && ask.prefill.is_some()).count() as u32;
            assert_eq!(self.free_prefill_units[node] + num_holders * PROMPT_UNITS, POOL_UNITS);
        }
    }

    /// What must hold where nothing but a fault can happen any more.
    fn check_end(&self) {
        for request in &self.requests {
            assert!(matches!(request.phase, Phase::Ended(_)), "stuck: {self:#?}");
            let is_over = |ask: &Ask| {
                let is_open = ask.is_landing_open || ask.is_fetch_landing_open || ask.is_prefix_read;
                ask.prefill.is_none() && ask.fetched.is_empty() && !is_open
            };
            assert!(request.asks.iter().all(is_over), "left: {self:#?}");
        }
        assert_eq!((self.free_decode_units, self.free_prefill_units), ([POOL_UNITS; 2], [POOL_UNITS; 2]));
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

impl Ask {
    /// The decode node's end of the stream is gone: what it had not yet sent never arrives.
    fn hang_up(&mut self) {
        self.is_read = false;
        self.to_decode.clear();
        self.to_prefill.clear();
        if self.prefill.is_some() {
            self.to_prefill.push_back(ToPrefill::Reset);
        }
    }
}

fn index_of(node: &NodeId) -> usize {
    usize::from(node.as_str() == "p1")
}

fn extent_id(index: u32) -> ExtentId {
    let layer = index as u16;
    ExtentId { group: 0, layer, plane_mask: 3, first_head: 0, num_heads: 1, first_token: 0, num_tokens: EXTENT_TOKENS }
}

fn first_token(id: u32) -> PrefillEvent {
    let tokens = vec![SampledToken { id, logprob: 0.0, top_logprobs: Vec::new() }];
    PrefillEvent::FirstTokens { tokens, timeline: NodeTimeline::default() }
}

/// All requests prefer the same prefill node, which is where they get in each other's way.
fn handover_of(scenario: &Scenario) -> DecodeRequest {
    let num_tokens = scenario.num_extents * EXTENT_TOKENS;
    DecodeRequest {
        candidates: ["p0", "p1"].map(|name| NodeId::new(name).expect("a DNS label")).to_vec(),
        num_tokens,
        prompt_len: num_tokens,
        num_held_tokens: scenario.num_held * EXTENT_TOKENS,
        num_choices: 1,
        params: SamplingParams { stop_token_ids: vec![STOP], ..SamplingParams::greedy(5) },
        max_model_len: 1000,
    }
}

fn decode_limits() -> DecodeLimits {
    DecodeLimits {
        accept_timeout: Duration::from_secs(1),
        progress_timeout: Duration::from_secs(1),
        total_timeout: Duration::MAX,
        credit_window_bytes: EXTENT_BYTES,
        num_local_tokens_max: 0,
        num_offered_tokens_max: u32::MAX,
    }
}

/// Plays every run and returns how many states there are and what was seen on the way.
fn explore(scenario: Scenario) -> (usize, BTreeSet<String>) {
    let mut seen = BTreeSet::new();
    let first = World::new(&scenario);
    // Fingerprint to whether the state is on the present path.
    let mut known = HashMap::from([(first.fingerprint(), true)]);
    let mut path = vec![(first.fingerprint(), first.steps(&scenario), first)];
    while let Some((fingerprint, steps, world)) = path.last_mut() {
        let Some(step) = steps.pop() else {
            known.insert(*fingerprint, false);
            path.pop();
            continue;
        };
        let mut next = world.clone();
        next.take(step, &scenario, &mut seen);
        let fingerprint = next.fingerprint();
        match known.get(&fingerprint) {
            Some(true) => panic!("{step:?} leads back to a state on its own path: {next:#?}"),
            Some(false) => continue,
            None => {}
        }
        next.check();
        let steps = next.steps(&scenario);
        if steps.iter().all(|step| step.is_fault()) {
            next.check_end();
        }
        known.insert(fingerprint, true);
        path.push((fingerprint, steps, next));
    }
    (known.len(), seen)
}

fn assert_saw(seen: &BTreeSet<String>, expected: &[&str]) {
    for what in expected {
        assert!(seen.contains(*what), "never seen: {what}; seen: {seen:?}");
    }
}

#[test]
fn three_requests_without_faults_always_finish_and_need_no_deadline() {
    let scenario = Scenario {
        num_requests: 3,
        num_extents: 1,
        num_held: 0,
        first_ends: true,
        has_queue: false,
        faults: Faults::default(),
    };
    let (num_states, seen) = explore(scenario);
    println!("{num_states} states: {seen:?}");
    assert_saw(&seen, &["joined", "lost: busy", "local prefill", "Finished"]);
    assert!(!seen.contains("failed") && !seen.contains("lost: stream_lost"));
}

#[test]
fn three_requests_that_queue_for_one_prefill_node_always_finish_and_need_no_deadline() {
    let scenario = Scenario {
        num_requests: 3,
        num_extents: 1,
        num_held: 0,
        first_ends: false,
        has_queue: true,
        faults: Faults::default(),
    };
    let (num_states, seen) = explore(scenario);
    println!("{num_states} states: {seen:?}");
    assert_saw(&seen, &["joined", "Finished"]);
    assert!(!seen.contains("failed") && !seen.contains("local prefill"));
}

#[test]
fn two_requests_survive_the_loss_of_a_prefill_node_at_any_moment() {
    let faults = Faults { num_prefill_losses: 1, ..Faults::default() };
    let (num_states, seen) =
        explore(Scenario { num_requests: 2, num_extents: 1, num_held: 0, first_ends: false, has_queue: false, faults });
    println!("{num_states} states: {seen:?}");
    assert_saw(&seen, &["joined", "lost: busy", "lost: stream_lost", "lost: link_failed", "Finished"]);
    assert!(!seen.contains("failed"));
}

#[test]
fn two_requests_survive_the_loss_of_a_decode_node_at_any_moment() {
    let faults = Faults { num_decode_losses: 1, ..Faults::default() };
    let (num_states, seen) =
        explore(Scenario { num_requests: 2, num_extents: 1, num_held: 0, first_ends: false, has_queue: false, faults });
    println!("{num_states} states: {seen:?}");
    assert_saw(&seen, &["joined", "lost: busy", "resumed", "Finished"]);
    assert!(!seen.contains("failed"));
}

#[test]
fn cancel_corruption_and_deadline_at_any_moment_leave_nothing_behind() {
    let faults = Faults { num_cancels: 1, num_corruptions: 1, num_timeouts: 1, ..Faults::default() };
    let (num_states, seen) =
        explore(Scenario { num_requests: 1, num_extents: 2, num_held: 0, first_ends: false, has_queue: false, faults });
    println!("{num_states} states: {seen:?}");
    assert_saw(&seen, &["joined", "local prefill", "lost: extent_refused", "lost: no_progress", "late extent refused"]);
}

#[test]
fn one_request_survives_the_loss_of_both_prefill_nodes_and_a_decode_node() {
    let faults = Faults { num_prefill_losses: 2, num_decode_losses: 1, num_cancels: 1, ..Faults::default() };
    let (num_states, seen) =
        explore(Scenario { num_requests: 1, num_extents: 2, num_held: 0, first_ends: false, has_queue: false, faults });
    println!("{num_states} states: {seen:?}");
    assert_saw(&seen, &["joined", "local prefill", "resumed", "lost: stream_lost", "lost: link_failed", "Finished"]);
}

#[test]
fn three_requests_whose_prefix_is_fetched_computed_or_left_always_finish_and_need_no_deadline() {
    let scenario = Scenario {
        num_requests: 3,
        num_extents: 2,
        num_held: 1,
        first_ends: false,
        has_queue: true,
        faults: Faults::default(),
    };
    let (num_states, seen) = explore(scenario);
    println!("{num_states} states: {seen:?}");
    assert_saw(&seen, &["joined", "fetch: Complete", "local prefill", "Finished"]);
    assert!(!seen.contains("failed") && !seen.iter().any(|what| what.starts_with("lost") || what.contains("Failed")));
}

#[test]
fn two_requests_that_fetch_survive_the_loss_of_a_prefill_or_a_decode_node_at_any_moment() {
    for (num_prefill_losses, num_decode_losses) in [(1, 0), (0, 1)] {
        let faults = Faults { num_prefill_losses, num_decode_losses, ..Faults::default() };
        let scenario =
            Scenario { num_requests: 2, num_extents: 2, num_held: 1, first_ends: false, has_queue: false, faults };
        let (num_states, seen) = explore(scenario);
        println!("{num_states} states: {seen:?}");
        assert_saw(&seen, &["joined", "fetch: Complete", "fetch stopped", "lost: busy", "Finished"]);
        assert!(!seen.contains("failed"));
    }
}

#[test]
fn fetch_that_is_cancelled_corrupted_lost_or_late_at_any_moment_leaves_nothing_behind() {
    let faults = Faults { num_cancels: 1, num_corruptions: 1, num_timeouts: 1, ..Faults::default() };
    let scenario =
        Scenario { num_requests: 1, num_extents: 3, num_held: 2, first_ends: false, has_queue: false, faults };
    let (num_states, seen) = explore(scenario);
    println!("{num_states} states: {seen:?}");
    let ends = [
        "fetch: Complete",
        "fetch: Abandoned",
        "fetch: Failed(ExtentRefused)",
        "fetch: Failed(Stopped)",
        "fetch: Failed(Stalled)",
    ];
    assert_saw(&seen, &ends);
    assert_saw(&seen, &["joined", "local prefill", "late fetched extent refused"]);
}
