//! A link without a clock, for the tests of controllers: rate, round trip, queue and losses by chance, and what a QUIC
//! sender and its peer do at its ends.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

/// Of a path without jumbo frames.
pub(super) const DATAGRAM_BYTES: u64 = 1_450;
/// What quinn's acknowledgements wait for at most, if no second datagram comes.
const ACK_DELAY: Duration = Duration::from_millis(25);
/// A packet is lost when one was acknowledged that was sent so many later.
const PACKET_THRESHOLD: u64 = 3;
/// A sender that hears nothing for so long sends one more.
const PROBE_TIMEOUT: Duration = Duration::from_millis(200);

/// Who decides how much may be on the way.
pub(super) trait Controlled {
    fn sent(&mut self, now: Instant, num_bytes: u64);
    fn acked(&mut self, now: Instant, sent_at: Instant, num_bytes: u64);
    fn end_acks(&mut self, now: Instant, in_flight_bytes: u64, is_app_limited: bool);
    fn lost(&mut self, now: Instant, sent_at: Instant, lost_bytes: u64);
    fn window(&self) -> u64;
}

impl Controlled for super::bbr::Bbr {
    fn sent(&mut self, now: Instant, num_bytes: u64) {
        self.on_sent(now, num_bytes);
    }

    fn acked(&mut self, _now: Instant, sent_at: Instant, num_bytes: u64) {
        self.on_ack(sent_at, num_bytes);
    }

    fn end_acks(&mut self, now: Instant, in_flight_bytes: u64, is_app_limited: bool) {
        self.on_end_acks(now, in_flight_bytes, is_app_limited);
    }

    fn lost(&mut self, now: Instant, sent_at: Instant, lost_bytes: u64) {
        self.on_congestion(now, sent_at, lost_bytes, false);
    }

    fn window(&self) -> u64 {
        self.window_bytes()
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct LinkConfig {
    pub(super) bits_per_second: f64,
    pub(super) rtt: Duration,
    pub(super) queue_bytes: u64,
    pub(super) loss: f64,
    /// Datagrams for one acknowledgement.
    pub(super) ack_every: usize,
    pub(super) datagram_bytes: u64,
}

impl LinkConfig {
    /// What the link holds besides its queue.
    pub(super) fn held_bytes(&self) -> f64 {
        self.bits_per_second / 8.0 * self.rtt.as_secs_f64()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The first packet of the queue has left.
    Served,
    /// A packet arrives.
    Arrives { flow: usize, number: u64 },
    /// The receiver acknowledges what it has not yet acknowledged.
    AckDue { flow: usize },
    /// An acknowledgement arrives.
    Acked { flow: usize, index: usize },
    /// The pacer may let more go.
    Paced { flow: usize },
    /// Nothing may have come since.
    ProbeDue { flow: usize, num_acked: u64 },
}

/// One sender, its peer, and what they did.
struct Flow {
    controller: Box<dyn Controlled>,
    /// Sent and neither acknowledged nor taken for lost, by number.
    on_the_way: BTreeMap<u64, Instant>,
    next_number: u64,
    /// What the application still has.
    to_send: u64,
    is_app_limited: bool,
    smoothed_rtt: Duration,
    /// Bytes that may go at once, and when that was right.
    tokens: f64,
    tokens_at: Duration,
    is_paced: bool,
    unacknowledged: Vec<u64>,
    num_acked: u64,
    /// A packet was, and the acknowledgement of the next will say so.
    is_marked: bool,
}

pub(super) struct Network {
    config: LinkConfig,
    began: Instant,
    now: Duration,
    /// With a number each, in the order of which they are taken at the same time.
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    num_events: u64,
    queue: VecDeque<(usize, u64)>,
    flows: Vec<Flow>,
    acks: Vec<Vec<u64>>,
    random: u64,
    mark_above_bytes: u64,
    num_entered: u64,
    num_overflown: u64,
    longest_queue: usize,
}

impl Network {
    pub(super) fn new(config: LinkConfig) -> Self {
        Self {
            config,
            began: Instant::now(),
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            num_events: 0,
            queue: VecDeque::new(),
            flows: Vec::new(),
            acks: Vec::new(),
            random: 0x9e37_79b9_7f4a_7c15,
            mark_above_bytes: u64::MAX,
            num_entered: 0,
            num_overflown: 0,
            longest_queue: 0,
        }
    }

    pub(super) fn now(&self) -> Instant {
        self.began + self.now
    }

    /// One sender more, with nothing to send yet.
    pub(super) fn add(&mut self, controller: Box<dyn Controlled>) -> usize {
        self.flows.push(Flow {
            controller,
            on_the_way: BTreeMap::new(),
            next_number: 0,
            to_send: 0,
            is_app_limited: true,
            smoothed_rtt: Duration::from_millis(333),
            tokens: (10 * self.config.datagram_bytes) as f64,
            tokens_at: self.now,
            is_paced: false,
            unacknowledged: Vec::new(),
            num_acked: 0,
            is_marked: false,
        });
        self.flows.len() - 1
    }

    /// Its application has so many datagrams more.
    pub(super) fn write(&mut self, flow: usize, num_datagrams: u64) {
        self.flows[flow].to_send += num_datagrams;
        self.send(flow);
    }

    pub(super) fn set_rate(&mut self, bits_per_second: f64) {
        self.config.bits_per_second = bits_per_second;
    }

    /// The queue marks what comes while it is longer than that (ECN).
    pub(super) fn mark_above(&mut self, num_bytes: u64) {
        self.mark_above_bytes = num_bytes;
    }

    pub(super) fn has_sent_all(&self, flow: usize) -> bool {
        self.flows[flow].to_send == 0 && self.flows[flow].on_the_way.is_empty()
    }

    /// Time goes on; answers for each flow the share of the rate that it delivered.
    pub(super) fn run(&mut self, period: Duration) -> Vec<f64> {
        let acked = |flows: &[Flow]| flows.iter().map(|flow| flow.num_acked).collect::<Vec<_>>();
        let (before, end) = (acked(&self.flows), self.now + period);
        (self.num_entered, self.num_overflown, self.longest_queue) = (0, 0, 0);
        while let Some(Reverse((at, ..))) = self.events.peek()
            && *at <= end
        {
            let Reverse((at, _, event)) = self.events.pop().expect("it was seen");
            self.now = at;
            self.on(event);
        }
        self.now = end;
        let most = self.config.bits_per_second / 8.0 * period.as_secs_f64();
        let num_bytes = |datagrams: u64| (datagrams * self.config.datagram_bytes) as f64;
        acked(&self.flows).iter().zip(before).map(|(acked, before)| num_bytes(acked - before) / most).collect()
    }

    /// Of the last run: the share of all datagrams that found the queue full.
    pub(super) fn overflown(&self) -> f64 {
        self.num_overflown as f64 / self.num_entered as f64
    }

    /// Of the last run.
    pub(super) fn longest_queue_bytes(&self) -> u64 {
        self.longest_queue as u64 * self.config.datagram_bytes
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Served => {
                let (flow, number) = self.queue.pop_front().expect("what is served was queued");
                self.after(self.config.rtt / 2, Event::Arrives { flow, number });
                if !self.queue.is_empty() {
                    self.serve();
                }
            }
            Event::Arrives { flow, number } => {
                self.flows[flow].unacknowledged.push(number);
                match self.flows[flow].unacknowledged.len() {
                    num if num >= self.config.ack_every => self.on(Event::AckDue { flow }),
                    1 => self.after(ACK_DELAY, Event::AckDue { flow }),
                    _ => {}
                }
            }
            Event::AckDue { flow } => {
                self.acks.push(std::mem::take(&mut self.flows[flow].unacknowledged));
                self.after(self.config.rtt / 2, Event::Acked { flow, index: self.acks.len() - 1 });
            }
            Event::Acked { flow, index } => {
                let acked = std::mem::take(&mut self.acks[index]);
                self.on_acked(flow, &acked);
                self.send(flow);
            }
            Event::Paced { flow } => {
                self.flows[flow].is_paced = false;
                self.send(flow);
            }
            Event::ProbeDue { flow, num_acked } => {
                if self.flows[flow].num_acked == num_acked && !self.flows[flow].on_the_way.is_empty() {
                    self.transmit(flow, 1);
                }
            }
        }
    }

    fn on_acked(&mut self, flow: usize, acked: &[u64]) {
        let (now, datagram_bytes) = (self.now(), self.config.datagram_bytes);
        let flow = &mut self.flows[flow];
        let (mut largest, mut newest) = (None, None);
        for number in acked {
            let Some(sent_at) = flow.on_the_way.remove(number) else { continue };
            flow.controller.acked(now, sent_at, datagram_bytes);
            flow.num_acked += 1;
            largest = largest.max(Some(*number));
            newest = newest.max(Some(sent_at));
        }
        let (Some(largest), Some(newest)) = (largest, newest) else { return };
        let is_first = flow.num_acked == acked.len() as u64;
        let rtt = now - newest;
        flow.smoothed_rtt = if is_first { rtt } else { (7 * flow.smoothed_rtt + rtt) / 8 };
        let in_flight_bytes = flow.on_the_way.len() as u64 * datagram_bytes;
        flow.controller.end_acks(now, in_flight_bytes, flow.is_app_limited);
        if std::mem::take(&mut flow.is_marked) {
            flow.controller.lost(now, newest, 0);
        }
        let kept = flow.on_the_way.split_off(&(largest + 1).saturating_sub(PACKET_THRESHOLD));
        let lost = std::mem::replace(&mut flow.on_the_way, kept);
        if let Some((_, sent_at)) = lost.last_key_value() {
            let num_lost = lost.len() as u64;
            flow.controller.lost(now, *sent_at, num_lost * datagram_bytes);
            flow.to_send = flow.to_send.saturating_add(num_lost);
        }
    }

    fn send(&mut self, flow: usize) {
        let sender = &mut self.flows[flow];
        let window = sender.controller.window();
        let num_allowed = (window / self.config.datagram_bytes).saturating_sub(sender.on_the_way.len() as u64);
        sender.is_app_limited = sender.to_send < num_allowed;
        let num_datagrams = num_allowed.min(sender.to_send);
        // quinn's pacer: 1.25 windows a round trip, in bursts of two milliseconds, of 10 to 256 datagrams.
        let rtt = sender.smoothed_rtt.as_secs_f64();
        let least = (10 * self.config.datagram_bytes) as f64;
        let most = (window as f64 * 0.002 / rtt).clamp(least, 25.6 * least);
        let elapsed = (self.now - sender.tokens_at).as_secs_f64();
        sender.tokens = (sender.tokens + 1.25 * window as f64 * elapsed / rtt).min(most);
        sender.tokens_at = self.now;
        let num_now = num_datagrams.min((sender.tokens / self.config.datagram_bytes as f64) as u64);
        sender.tokens -= (num_now * self.config.datagram_bytes) as f64;
        if num_now < num_datagrams && !std::mem::replace(&mut sender.is_paced, true) {
            let delay = (most - sender.tokens) / (1.25 * window as f64) * rtt;
            self.after(Duration::from_secs_f64(delay), Event::Paced { flow });
        }
        self.transmit(flow, num_now);
    }

    fn transmit(&mut self, flow: usize, num_datagrams: u64) {
        if num_datagrams == 0 {
            return;
        }
        let now = self.now();
        for _ in 0..num_datagrams {
            let number = self.flows[flow].next_number;
            self.flows[flow].next_number += 1;
            self.flows[flow].on_the_way.insert(number, now);
            self.enter(flow, number);
        }
        let sender = &mut self.flows[flow];
        sender.to_send = sender.to_send.saturating_sub(num_datagrams);
        sender.controller.sent(now, num_datagrams * self.config.datagram_bytes);
        let num_acked = sender.num_acked;
        self.after(PROBE_TIMEOUT, Event::ProbeDue { flow, num_acked });
    }

    fn enter(&mut self, flow: usize, number: u64) {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if ((self.random >> 40) as f64) < self.config.loss * f64::from(1 << 24) {
            return;
        }
        self.num_entered += 1;
        let queued_bytes = self.queue.len() as u64 * self.config.datagram_bytes;
        self.flows[flow].is_marked |= queued_bytes > self.mark_above_bytes;
        if queued_bytes >= self.config.queue_bytes {
            self.num_overflown += 1;
            return;
        }
        self.queue.push_back((flow, number));
        self.longest_queue = self.longest_queue.max(self.queue.len());
        if self.queue.len() == 1 {
            self.serve();
        }
    }

    fn serve(&mut self) {
        let num_bits = 8.0 * self.config.datagram_bytes as f64;
        self.after(Duration::from_secs_f64(num_bits / self.config.bits_per_second), Event::Served);
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.num_events += 1;
        self.events.push(Reverse((self.now + delay, self.num_events, event)));
    }
}
