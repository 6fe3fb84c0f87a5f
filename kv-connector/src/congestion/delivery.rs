//! How fast a path delivers, seen from the end that sends.
//!
//! Acknowledgements come in batches, so the time between two of them says nothing. A sample therefore reaches from the
//! last delivery that was known when a packet left to the acknowledgement of that packet: a round trip at least. It
//! also takes no less time than it took to send what it covers, which bounds it when acknowledgements were held up and
//! come all at once. (Delivery rate sampling of draft-ietf-ccwg-bbr, section 4.1, in what quinn tells a controller:
//! packets are known by when they were sent.)

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// quinn tells of packets with nothing but acknowledgements, too, and never that they arrived. Less than this on the
/// way is nothing else.
const ACKNOWLEDGEMENTS_BYTES: u64 = 600;
/// Sends that are remembered, of more every second one: of a long and fast path there are as many on the way. An end
/// that only receives sends mostly acknowledgements, which clear nothing away.
const NUM_SENT_MAX: usize = 4096;

/// What was known when packets left.
#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Instant,
    /// Delivered until then, and when the last of it was acknowledged.
    delivered_bytes: u64,
    delivered_at: Instant,
    /// When the newest packet was sent that was acknowledged until then.
    acknowledged_sent_at: Instant,
    is_app_limited: bool,
    is_after_idle: bool,
}

/// What a batch of acknowledgements says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Bytes per second.
    pub(super) rate: f64,
    /// Delivered while the newest packet of the batch was on the way: what the path took in a round trip.
    pub(super) volume_bytes: u64,
    pub(super) rtt: Duration,
    /// Delivered by this batch.
    pub(super) newly_delivered_bytes: u64,
    /// Delivered when the newest packet of the batch was sent.
    pub(super) delivered_before_bytes: u64,
    /// There was less to send than the window allowed.
    pub(super) is_app_limited: bool,
    /// Nothing was on the way before the newest packet of the batch.
    pub(super) is_after_idle: bool,
}

/// Samples the rate of deliveries.
#[derive(Debug, Clone)]
pub(super) struct Deliveries {
    /// By time; what left at the same time is one entry.
    sent: VecDeque<Sent>,
    delivered_bytes: u64,
    delivered_at: Instant,
    acknowledged_sent_at: Instant,
    /// What is sent before more than this was delivered follows on a time when the application had nothing more.
    app_limited_until_bytes: Option<u64>,
    in_flight_bytes: u64,
    /// With when it was sent itself.
    newest_in_batch: Option<(Instant, Sent)>,
    newly_delivered_bytes: u64,
    /// Some that are on the way are not remembered: what was known just before stands for them.
    is_thinned: bool,
}

impl Deliveries {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sent: VecDeque::new(),
            delivered_bytes: 0,
            delivered_at: now,
            acknowledged_sent_at: now,
            app_limited_until_bytes: None,
            in_flight_bytes: 0,
            newest_in_batch: None,
            newly_delivered_bytes: 0,
            is_thinned: false,
        }
    }

    /// All that was delivered.
    pub(super) fn delivered_bytes(&self) -> u64 {
        self.delivered_bytes
    }

    pub(super) fn on_sent(&mut self, now: Instant, num_bytes: u64) {
        let is_after_idle = self.in_flight_bytes < ACKNOWLEDGEMENTS_BYTES;
        if is_after_idle {
            (self.delivered_at, self.acknowledged_sent_at) = (now, now);
        }
        self.in_flight_bytes += num_bytes;
        if self.sent.back().is_some_and(|last| last.at >= now) {
            return;
        }
        if self.sent.len() == NUM_SENT_MAX {
            let mut is_kept = false;
            self.sent.retain(|_| {
                is_kept = !is_kept;
                is_kept
            });
            self.is_thinned = true;
        }
        self.sent.push_back(Sent {
            at: now,
            delivered_bytes: self.delivered_bytes,
            delivered_at: self.delivered_at,
            acknowledged_sent_at: self.acknowledged_sent_at,
            is_app_limited: self.app_limited_until_bytes.is_some_and(|until| self.delivered_bytes <= until),
            is_after_idle,
        });
    }

    /// One packet of a batch was acknowledged, sent at `sent_at`.
    pub(super) fn on_ack(&mut self, sent_at: Instant, num_bytes: u64) {
        self.newly_delivered_bytes += num_bytes;
        // What is not found was sent before a newer packet that was acknowledged already, or is a probe of the path's
        // datagram size.
        let found = match self.sent.binary_search_by_key(&sent_at, |sent| sent.at) {
            Ok(index) => Some(index),
            Err(next) if self.is_thinned => next.checked_sub(1),
            Err(_) => None,
        };
        if let Some(index) = found
            && self.newest_in_batch.is_none_or(|(newest, _)| sent_at > newest)
        {
            self.newest_in_batch = Some((sent_at, self.sent[index]));
        }
    }

    /// The batch is complete. `is_app_limited`: all there was to send was sent before it came.
    pub(super) fn on_end_acks(&mut self, now: Instant, in_flight_bytes: u64, is_app_limited: bool) -> Option<Sample> {
        let newly_delivered_bytes = std::mem::take(&mut self.newly_delivered_bytes);
        self.in_flight_bytes = in_flight_bytes;
        if newly_delivered_bytes > 0 {
            self.delivered_bytes += newly_delivered_bytes;
            self.delivered_at = now;
        }
        if is_app_limited {
            self.app_limited_until_bytes = Some(self.delivered_bytes + in_flight_bytes);
        }
        let (newest_at, newest) = self.newest_in_batch.take()?;
        while self.sent.front().is_some_and(|sent| sent.at < newest.at) {
            self.sent.pop_front();
        }
        self.is_thinned &= self.sent.len() > 1;
        self.acknowledged_sent_at = self.acknowledged_sent_at.max(newest_at);
        let while_sent = newest_at.saturating_duration_since(newest.acknowledged_sent_at);
        let while_acknowledged = now.saturating_duration_since(newest.delivered_at);
        let interval = while_sent.max(while_acknowledged).max(Duration::from_micros(1));
        let volume_bytes = self.delivered_bytes - newest.delivered_bytes;
        Some(Sample {
            rate: volume_bytes as f64 / interval.as_secs_f64(),
            volume_bytes,
            rtt: now.saturating_duration_since(newest_at),
            newly_delivered_bytes,
            delivered_before_bytes: newest.delivered_bytes,
            is_app_limited: newest.is_app_limited,
            is_after_idle: newest.is_after_idle,
        })
    }

    /// So much is no longer on the way.
    pub(super) fn on_lost(&mut self, num_bytes: u64) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(num_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock in milliseconds, and packets of 1,000 bytes.
    struct Sender {
        began: Instant,
        deliveries: Deliveries,
        num_in_flight: u64,
    }

    impl Sender {
        fn new() -> Self {
            let began = Instant::now();
            Self { began, deliveries: Deliveries::new(began), num_in_flight: 0 }
        }

        fn at(&self, millis: u64) -> Instant {
            self.began + Duration::from_millis(millis)
        }

        fn send(&mut self, now: u64, num: u64) {
            self.deliveries.on_sent(self.at(now), num * 1000);
            self.num_in_flight += num;
        }

        /// What was sent at each time is acknowledged now.
        fn ack(&mut self, now: u64, sent: &[(u64, u64)], is_app_limited: bool) -> Option<Sample> {
            for (sent_at, num) in sent {
                (0..*num).for_each(|_| self.deliveries.on_ack(self.at(*sent_at), 1000));
                self.num_in_flight -= num;
            }
            self.deliveries.on_end_acks(self.at(now), self.num_in_flight * 1000, is_app_limited)
        }
    }

    #[test]
    fn batches_close_behind_one_another_do_not_look_fast() {
        let mut sender = Sender::new();
        (0..10).for_each(|now| sender.send(now, 1));
        // A packet each millisecond, acknowledged in two batches a millisecond apart.
        let first = sender.ack(20, &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)], false).unwrap();
        assert_eq!((first.volume_bytes, first.rtt), (5000, Duration::from_millis(16)));
        assert!((first.rate - 250_000.0).abs() < 1.0, "{}", first.rate);
        sender.send(20, 5);
        let second = sender.ack(21, &[(5, 1), (6, 1), (7, 1), (8, 1), (9, 1)], false).unwrap();
        assert!((second.rate - 10_000.0 / 0.021).abs() < 1.0, "{}", second.rate);
        // These left behind the first batch: the second, and their own, within a round trip and what sending took.
        let third = sender.ack(40, &[(20, 5)], false).unwrap();
        assert_eq!(third.volume_bytes, 10_000);
        assert!((third.rate - 500_000.0).abs() < 1.0, "{}", third.rate);
    }

    #[test]
    fn acknowledgements_held_up_do_not_look_fast_to_what_left_amidst_them() {
        let mut sender = Sender::new();
        (0..100).for_each(|now| sender.send(now, 1));
        sender.ack(110, &[(0, 1)], false).unwrap();
        sender.send(110, 1);
        sender.ack(111, &(1..100).map(|at| (at, 1)).collect::<Vec<_>>(), false).unwrap();
        let sample = sender.ack(120, &[(110, 1)], false).unwrap();
        assert_eq!(sample.volume_bytes, 100_000);
        assert!(sample.rate < 1_000_000.0, "{}", sample.rate);
    }

    #[test]
    fn what_is_sent_by_an_application_without_more_is_known_as_such() {
        let mut sender = Sender::new();
        sender.send(0, 2);
        let sample = sender.ack(10, &[(0, 1)], true).unwrap();
        assert!(!sample.is_app_limited && sample.is_after_idle);
        sender.send(11, 1);
        sender.ack(12, &[(0, 1)], false).unwrap();
        sender.send(13, 5);
        sender.ack(21, &[(11, 1)], false).unwrap();
        let sample = sender.ack(23, &[(13, 5)], false).unwrap();
        assert!(sample.is_app_limited && !sample.is_after_idle);
        // All that was on the way then has arrived.
        sender.send(1000, 5);
        let sample = sender.ack(1010, &[(1000, 5)], false).unwrap();
        assert!(!sample.is_app_limited && sample.is_after_idle);
        assert!((sample.rate - 500_000.0).abs() < 1.0, "a pause counts: {}", sample.rate);
    }

    #[test]
    fn end_that_only_acknowledges_remembers_so_much_and_is_idle() {
        let mut sender = Sender::new();
        for now in 0..10_000 {
            sender.deliveries.on_sent(sender.at(now), 40);
            if now % 100 == 99 {
                assert!(sender.ack(now, &[], true).is_none());
            }
        }
        assert!((NUM_SENT_MAX / 2..=NUM_SENT_MAX).contains(&sender.deliveries.sent.len()));
        sender.deliveries.on_sent(sender.at(10_000), 40);
        sender.send(10_001, 2);
        let sample = sender.ack(10_011, &[(10_001, 2)], false).unwrap();
        assert!(sample.is_after_idle && (sample.rate - 200_000.0).abs() < 1.0, "{}", sample.rate);
        assert_eq!(sender.deliveries.sent.len(), 1);
    }

    /// More sends on the way than are remembered, each acknowledged by itself.
    #[test]
    fn long_path_is_sampled_though_not_every_send_is_remembered() {
        let mut sender = Sender::new();
        let num_on_the_way = 3 * NUM_SENT_MAX as u64;
        let mut rates = Vec::new();
        for now in 0..4 * num_on_the_way {
            sender.send(now, 1);
            if let Some(sent_at) = now.checked_sub(num_on_the_way) {
                let sample = sender.ack(now, &[(sent_at, 1)], false).expect("every acknowledgement says something");
                assert_eq!(sample.rtt, Duration::from_millis(num_on_the_way));
                rates.push(sample.rate);
            }
            assert!(sender.deliveries.sent.len() <= NUM_SENT_MAX);
        }
        // A packet each millisecond, once all that is remembered is from behind the first round.
        for rate in &rates[2 * num_on_the_way as usize..] {
            assert!((rate / 1e6 - 1.0).abs() < 0.01, "{rate}");
        }
    }

    #[test]
    fn packets_that_are_not_known_are_delivered_without_a_sample() {
        let mut sender = Sender::new();
        sender.send(0, 3);
        sender.num_in_flight += 1;
        assert!(sender.ack(10, &[(5, 1)], false).is_none());
        assert_eq!(sender.deliveries.delivered_bytes(), 1000);
        assert_eq!(sender.ack(11, &[(0, 3)], false).unwrap().volume_bytes, 4000);
    }
}
