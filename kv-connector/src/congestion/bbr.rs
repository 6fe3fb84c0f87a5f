//! BBR for bulk connections: as much on the way as the path was measured to carry, whatever single packets are lost.
//!
//! The model of draft-ietf-ccwg-bbr (version 3): the largest rate of deliveries over ten rounds, the smallest round
//! trip over ten seconds, and a bound on what is on the way once a round loses more than 2 %. The draft steers by
//! pacing, and lets the window only bound what is on the way. quinn paces by the window alone, at 1.25 windows a
//! smoothed round trip and with bursts of two milliseconds, so here the window does it all, and what differs follows
//! from that:
//!
//! - between probes the window is two of what the path holds at the measured rate, so a link's queue stands at up to
//!   one round trip. It has to be more than one: the round trip includes what both hosts take to wake up, and a window
//!   of exactly rate times the smallest round trip would measure a smaller rate each time;
//! - a larger rate is found without probing for it, since the window leaves room. Only a bound is probed upward;
//! - single losses change nothing, where the draft lets each take a little.
//!
//! ```text
//!                                                        +------------------no bound left--------+
//!                                                        v                                       |
//! Startup --full, or too much lost--> Drain --drained--> Cruise --bounded, and a probe is due--> Up
//!                                                        ^  |                                    |
//!                                                  seen  |  | due                                | too much lost
//!                                                        |  v                                    |
//!                                                        Down <----------------------------------+
//! ```
//!
//! Down empties the link's queue, to see the round trip without it. One connection alone cannot, where several share
//! the link: each would take the others' queue for the path. So one that sees the round trip shorten in the second
//! half of its own period joins in, and they soon do it together. (The draft has ProbeRTT, every five seconds for
//! 200 ms, which is longer than most transfers of KV.)

use std::time::{Duration, Instant};

use super::delivery::{Deliveries, Sample};
use super::losses::{Losses, TooMuch};
use super::min_rtt::MinRtt;
use super::windowed_max::WindowedMax;

/// Windows, in what the path holds. In Startup as much as the draft paces with: the rate doubles each round though the
/// round trip grows meanwhile.
const STARTUP_GAIN: f64 = 2.77;
const CRUISE_GAIN: f64 = 2.0;
const DRAIN_GAIN: f64 = 1.0;
const DOWN_GAIN: f64 = 0.5;
/// Of the bound, to leave others room and find out whether they take it.
const HEADROOM: f64 = 0.85;
/// Never below this share of what there was, for losses of one round: what Cubic does.
const BETA: f64 = 0.7;
/// Startup ends after so many rounds that were not that much faster than the last that was.
const NUM_FULL_ROUNDS: u32 = 3;
const GROWTH: f64 = 1.25;
/// To drain a queue takes a round trip; more only where the rate was overestimated.
const NUM_DRAIN_ROUNDS: u64 = 3;
/// Between probes beyond a bound, whichever is first. The draft's: Reno would win back what it gave up in as many
/// rounds as it has datagrams on the way, or in so many. So who was left little asks sooner than who has much.
const PROBE_ROUNDS: u64 = 62;
/// Not more often, but for up to [`PROBE_SPREAD`] rounds drawn anew in each: more loses more than the rest.
const PROBE_ROUNDS_MIN: u64 = 24;
const PROBE_SPREAD: u64 = 16;
const PROBE_PERIOD: Duration = Duration::from_secs(2);
/// How long the queue is kept empty, so that those who join in see it empty too.
const NUM_DOWN_ROUNDS: u64 = 2;
/// How long the queue may hide the round trip: this many of them, and no longer than that. To look costs one or two.
const DOWN_ROUND_TRIPS: u32 = 200;
const DOWN_PERIOD_MAX: Duration = Duration::from_secs(5);
/// The smallest round trip is that of the latest four to eight periods, or five to ten seconds. If others do not let
/// the queue go, it is part of the path.
const MIN_RTT_HALF_MAX: Duration = Duration::from_secs(5);
/// Both hosts need this to wake up, whatever the path needs. Without it loopback, of some 50 us, had an eighth of what
/// Cubic reaches.
const HOSTS_RTT: Duration = Duration::from_micros(500);
/// More than the gain says, for what is sent at once.
const BURST: Duration = Duration::from_micros(250);
const BURST_BYTES_MAX: f64 = 65_536.0;
const NUM_DATAGRAMS_MIN: u64 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Until the path is full for the first time.
    Startup,
    /// The queue that this built goes away.
    Drain { since_round: u64 },
    /// As fast as the path goes.
    Cruise { since_round: u64, since: Instant },
    /// More each round than the bound.
    Up { num_rounds: u32 },
    /// The queue is emptied, and kept so for some rounds. None until it is.
    Down { num_rounds: Option<u64> },
}

/// Decides how much may be on the way over one connection.
#[derive(Debug, Clone)]
pub(super) struct Bbr {
    phase: Phase,
    deliveries: Deliveries,
    losses: Losses,
    losses_count_since: Instant,
    /// Bytes per second.
    rates: WindowedMax,
    /// Bytes that acknowledgements brought beyond the rate.
    aggregated: WindowedMax,
    aggregated_since: Instant,
    aggregated_bytes: u64,
    min_rtt: MinRtt,
    /// Smoothed, of what is sent at full speed.
    usual_rtt: Duration,
    /// When a Down last ended, or there was a pause.
    down_at: Instant,
    /// Rounds in which the application had enough to send.
    round: u64,
    round_ends_at_bytes: u64,
    /// Most that was delivered in a round trip: of this round and of the last.
    volume_bytes: [u64; 2],
    /// The path was full with this rate, for so many rounds.
    full_rate: f64,
    num_full_rounds: u32,
    /// What the path was seen to take without losing much. None: everything so far.
    bound_bytes: Option<u64>,
    window_bytes: u64,
    initial_window_bytes: u64,
    datagram_bytes: u64,
}

impl Bbr {
    pub(super) fn new(now: Instant, initial_window_bytes: u64, datagram_bytes: u64) -> Self {
        Self {
            phase: Phase::Startup,
            deliveries: Deliveries::new(now),
            losses: Losses::default(),
            losses_count_since: now,
            rates: WindowedMax::default(),
            aggregated: WindowedMax::default(),
            aggregated_since: now,
            aggregated_bytes: 0,
            min_rtt: MinRtt::default(),
            usual_rtt: Duration::ZERO,
            down_at: now,
            round: 0,
            round_ends_at_bytes: 0,
            volume_bytes: [0; 2],
            full_rate: 0.0,
            num_full_rounds: 0,
            bound_bytes: None,
            window_bytes: initial_window_bytes,
            initial_window_bytes,
            datagram_bytes,
        }
    }

    pub(super) fn window_bytes(&self) -> u64 {
        self.window_bytes
    }

    pub(super) fn initial_window_bytes(&self) -> u64 {
        self.initial_window_bytes
    }

    pub(super) fn on_datagram_size(&mut self, datagram_bytes: u64) {
        self.datagram_bytes = datagram_bytes;
        self.window_bytes = self.window_bytes.max(self.window_bytes_min());
    }

    pub(super) fn on_sent(&mut self, now: Instant, num_bytes: u64) {
        self.deliveries.on_sent(now, num_bytes);
    }

    pub(super) fn on_ack(&mut self, sent_at: Instant, num_bytes: u64) {
        self.deliveries.on_ack(sent_at, num_bytes);
    }

    pub(super) fn on_end_acks(&mut self, now: Instant, in_flight_bytes: u64, is_app_limited: bool) {
        let Some(sample) = self.deliveries.on_end_acks(now, in_flight_bytes, is_app_limited) else { return };
        let is_round = sample.delivered_before_bytes >= self.round_ends_at_bytes;
        if is_round {
            self.round_ends_at_bytes = self.deliveries.delivered_bytes();
            self.volume_bytes = [0, self.volume_bytes[0]];
        }
        self.volume_bytes[0] = self.volume_bytes[0].max(sample.volume_bytes);
        self.update_rtt(now, &sample);
        self.update_rate(is_round, &sample);
        self.update_aggregation(now, &sample);
        self.losses.on_delivered(sample.newly_delivered_bytes);
        if is_round && let Some(too_much) = self.losses.end_round(self.datagram_bytes) {
            self.on_too_much(too_much);
            self.losses_count_since = now;
        }
        self.advance(now, in_flight_bytes, is_round, &sample);
        self.set_window(&sample);
    }

    /// Packets were lost, the newest sent at `sent_at`, or marked by a queue that is full: no bytes then.
    pub(super) fn on_congestion(&mut self, now: Instant, sent_at: Instant, lost_bytes: u64, is_persistent: bool) {
        if is_persistent {
            // Nothing came through for so long that whatever was known of the path may have changed.
            let initial_window_bytes = self.initial_window_bytes;
            *self = Self::new(now, initial_window_bytes, self.datagram_bytes);
            self.window_bytes = self.window_bytes_min();
            return;
        }
        self.deliveries.on_lost(lost_bytes);
        // What was sent before the window was cut says nothing of what is sent since.
        if sent_at >= self.losses_count_since {
            self.losses.on_lost(lost_bytes);
        }
    }

    fn update_rtt(&mut self, now: Instant, sample: &Sample) {
        self.min_rtt.update(now, sample.rtt, (4 * self.down_period()).min(MIN_RTT_HALF_MAX));
        if sample.is_after_idle {
            // The queue is as empty as it could be made.
            self.down_at = now;
        }
        if matches!(self.phase, Phase::Cruise { .. }) {
            let usual = if self.usual_rtt.is_zero() { sample.rtt } else { self.usual_rtt };
            self.usual_rtt = (15 * usual + sample.rtt) / 16;
        }
    }

    fn update_rate(&mut self, is_round: bool, sample: &Sample) {
        // What was sent with little on the way says nothing of the path, unless it was even faster.
        let is_limited = sample.is_app_limited || matches!(self.phase, Phase::Down { .. });
        if is_limited && sample.rate < self.rates.max() {
            return;
        }
        if is_round {
            self.round += 1;
        }
        self.rates.update(self.round, sample.rate);
        if self.phase == Phase::Startup && is_round && !sample.is_app_limited {
            if sample.rate >= self.full_rate * GROWTH {
                (self.full_rate, self.num_full_rounds) = (sample.rate, 0);
            } else {
                self.num_full_rounds += 1;
            }
        }
    }

    /// Acknowledgements that come seldom and for much at once need more on the way in between.
    fn update_aggregation(&mut self, now: Instant, sample: &Sample) {
        let elapsed = now.saturating_duration_since(self.aggregated_since);
        let mut expected = self.rates.max() * elapsed.as_secs_f64();
        if self.aggregated_bytes as f64 <= expected {
            (self.aggregated_bytes, self.aggregated_since, expected) = (0, now, 0.0);
        }
        self.aggregated_bytes += sample.newly_delivered_bytes;
        let extra = self.aggregated_bytes as f64 - expected;
        self.aggregated.update(self.round, extra.min(self.window_bytes as f64));
    }

    fn on_too_much(&mut self, too_much: TooMuch) {
        // What came through is what the path takes, queue included; marks come before it is full.
        let delivered = match too_much {
            TooMuch::Lost => self.volume_bytes[0].max(self.volume_bytes[1]),
            TooMuch::Marked => 0,
        };
        let least = (self.window_bytes as f64 * BETA) as u64;
        let bound = delivered.max(least).min(self.window_bytes);
        // What hosts need beside the path is no answer to losses.
        let bound = bound.max(self.held_for(1.0, self.min_rtt.get()));
        self.bound_bytes = Some(self.bound_bytes.map_or(bound, |old| old.min(bound)));
        match self.phase {
            Phase::Startup => self.phase = Phase::Drain { since_round: self.round },
            Phase::Up { .. } => self.phase = Phase::Down { num_rounds: None },
            Phase::Drain { .. } | Phase::Cruise { .. } | Phase::Down { .. } => {}
        }
    }

    fn advance(&mut self, now: Instant, in_flight_bytes: u64, is_round: bool, sample: &Sample) {
        let cruise = Phase::Cruise { since_round: self.round, since: now };
        match self.phase {
            Phase::Startup if self.num_full_rounds >= NUM_FULL_ROUNDS => {
                self.phase = Phase::Drain { since_round: self.round };
            }
            Phase::Drain { since_round } => {
                let is_drained = in_flight_bytes <= self.held_bytes(DRAIN_GAIN);
                if is_drained || self.round >= since_round + NUM_DRAIN_ROUNDS {
                    self.phase = cruise;
                }
            }
            Phase::Cruise { since_round, since } if is_round => {
                // Connections that began together do not probe together.
                let datagram_bytes = self.datagram_bytes.max(1);
                let num_rounds = (self.window_bytes / datagram_bytes).clamp(PROBE_ROUNDS_MIN, PROBE_ROUNDS)
                    - self.deliveries.delivered_bytes() / datagram_bytes % PROBE_SPREAD;
                let is_probe_due = self.round >= since_round + num_rounds || now.duration_since(since) >= PROBE_PERIOD;
                if self.bound_bytes.is_some() && is_probe_due {
                    self.phase = Phase::Up { num_rounds: 0 };
                }
            }
            Phase::Up { num_rounds } if is_round && !sample.is_app_limited => self.raise_bound(num_rounds, cruise),
            Phase::Down { num_rounds: None } if in_flight_bytes <= self.down_bytes() => {
                self.round_ends_at_bytes = self.deliveries.delivered_bytes();
                self.phase = Phase::Down { num_rounds: Some(0) };
            }
            Phase::Down { num_rounds: Some(num) } if is_round && num + 1 < NUM_DOWN_ROUNDS => {
                self.phase = Phase::Down { num_rounds: Some(num + 1) };
            }
            Phase::Down { num_rounds: Some(_) } if is_round => {
                self.down_at = now;
                self.phase = cruise;
            }
            _ => {}
        }
        if matches!(self.phase, Phase::Cruise { .. }) && self.is_down_due(now, sample.rtt) {
            self.phase = Phase::Down { num_rounds: None };
        }
    }

    /// It is time, or half of it has gone by and somebody else seems to be about it.
    fn is_down_due(&self, now: Instant, rtt: Duration) -> bool {
        let (min_rtt, period) = (self.min_rtt.get(), self.down_period());
        let elapsed = now.saturating_duration_since(self.down_at);
        elapsed >= period || (elapsed >= period / 2 && rtt < (min_rtt + self.usual_rtt) / 2)
    }

    fn down_period(&self) -> Duration {
        (self.round_trip() * DOWN_ROUND_TRIPS).min(DOWN_PERIOD_MAX)
    }

    /// Twice as many datagrams more each round, until the bound is none any more, and it is back to `cruise`.
    fn raise_bound(&mut self, num_rounds: u32, cruise: Phase) {
        let Some(bound) = self.bound_bytes else { return };
        let raised = bound + (self.datagram_bytes << num_rounds.min(16));
        if raised >= self.cruise_bytes() {
            // Nothing was lost, so there is no queue to empty. Whoever did would leave the link to those who do not,
            // and come back to a full one.
            self.bound_bytes = None;
            self.phase = cruise;
        } else {
            self.bound_bytes = Some(raised);
            self.phase = Phase::Up { num_rounds: num_rounds + 1 };
        }
    }

    fn set_window(&mut self, sample: &Sample) {
        let grown = self.window_bytes + sample.newly_delivered_bytes;
        let window = match self.phase {
            Phase::Startup => {
                // Never less: a rate seen of little says little.
                let has_room = self.window_bytes < self.held_bytes(STARTUP_GAIN) + self.aggregated.max() as u64;
                if has_room { grown } else { self.window_bytes }
            }
            Phase::Drain { .. } => grown.min(self.held_bytes(DRAIN_GAIN)),
            Phase::Cruise { .. } | Phase::Up { .. } => grown.min(self.cruise_bytes()),
            Phase::Down { .. } => grown.min(self.down_bytes()),
        };
        let share = if matches!(self.phase, Phase::Up { .. }) { 1.0 } else { HEADROOM };
        let bound = self.bound_bytes.map_or(u64::MAX, |bound| (bound as f64 * share) as u64);
        self.window_bytes = window.min(bound).max(self.window_bytes_min());
    }

    /// What both ends need to keep the path busy, if nothing is lost.
    fn cruise_bytes(&self) -> u64 {
        (self.held_bytes(CRUISE_GAIN) + self.aggregated.max() as u64).max(self.initial_window_bytes)
    }

    /// `gain` times what the path holds, and what is sent at once.
    fn held_bytes(&self, gain: f64) -> u64 {
        self.held_for(gain, self.round_trip())
    }

    fn held_for(&self, gain: f64, rtt: Duration) -> u64 {
        let rate = self.rates.max();
        let burst = (rate * BURST.as_secs_f64()).min(BURST_BYTES_MAX).max((2 * self.datagram_bytes) as f64);
        (gain * rate * rtt.as_secs_f64() + burst) as u64
    }

    fn round_trip(&self) -> Duration {
        self.min_rtt.get().max(HOSTS_RTT)
    }

    fn down_bytes(&self) -> u64 {
        ((DOWN_GAIN * self.rates.max() * self.min_rtt.get().as_secs_f64()) as u64).max(self.window_bytes_min())
    }

    fn window_bytes_min(&self) -> u64 {
        NUM_DATAGRAMS_MIN * self.datagram_bytes
    }
}

#[cfg(test)]
mod tests;
