//! One direction of a link: what becomes of a packet, decided when it enters.
//!
//! ```text
//! enters ──> lost by chance? ──> queue (bytes bounded) ──> wire (bytes per second) ──> half a round trip ──> leaves
//! ```
//!
//! No clock and no socket: `now` comes in, the moment at which the packet is to leave goes out.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What a direction does to packets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PathShape {
    /// From the wire to the far end.
    pub(super) delay: Duration,
    /// Share of packets that is lost whatever is on the way.
    pub(super) loss: f64,
    /// Of the wire; without it, it takes no time and there is no queue.
    pub(super) bytes_per_second: Option<f64>,
    /// Bytes that may wait for the wire. A packet that does not fit is dropped, as at the port of a switch.
    pub(super) queue_bytes_max: u64,
}

/// What has become of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It leaves at that moment, never before one that entered earlier.
    Leaves(Instant),
    /// Lost by chance.
    Lost,
    /// The queue was full.
    QueueFull,
}

/// One direction.
pub(super) struct Path {
    shape: PathShape,
    chance: StdRng,
    /// When the wire has sent everything that has entered.
    is_free_at: Option<Instant>,
}

impl Path {
    /// Losses are those of `seed`, packet by packet.
    pub(super) fn new(shape: PathShape, seed: u64) -> Self {
        Self { shape, chance: StdRng::seed_from_u64(seed), is_free_at: None }
    }

    /// A packet of `num_bytes` enters.
    pub(super) fn enter(&mut self, now: Instant, num_bytes: usize) -> Fate {
        if self.chance.random_bool(self.shape.loss) {
            return Fate::Lost;
        }
        let Some(bytes_per_second) = self.shape.bytes_per_second else {
            return Fate::Leaves(now + self.shape.delay);
        };
        let begins_at = self.is_free_at.map_or(now, |free| free.max(now));
        let queued_bytes = begins_at.duration_since(now).as_secs_f64() * bytes_per_second;
        if queued_bytes as u64 + num_bytes as u64 > self.shape.queue_bytes_max {
            return Fate::QueueFull;
        }
        let sent_at = begins_at + Duration::from_secs_f64(num_bytes as f64 / bytes_per_second);
        self.is_free_at = Some(sent_at);
        Fate::Leaves(sent_at + self.shape.delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: PathShape =
        PathShape { delay: Duration::from_millis(5), loss: 0.0, bytes_per_second: Some(1e6), queue_bytes_max: 10_000 };

    fn leaves_behind(path: &mut Path, start: Instant, at: Duration, num_bytes: usize) -> Option<Duration> {
        match path.enter(start + at, num_bytes) {
            Fate::Leaves(at) => Some(at - start),
            Fate::Lost | Fate::QueueFull => None,
        }
    }

    #[test]
    fn packets_leave_one_after_another_at_the_rate_of_the_wire_and_half_a_round_trip_later() {
        let (start, mut path) = (Instant::now(), Path::new(CLEAN, 1));
        let ms = Duration::from_millis;
        assert_eq!(leaves_behind(&mut path, start, ms(0), 1000), Some(ms(6)));
        assert_eq!(leaves_behind(&mut path, start, ms(0), 2000), Some(ms(8)));
        assert_eq!(leaves_behind(&mut path, start, ms(1), 1000), Some(ms(9)));
        // Nobody has sent for a while: what was not used is gone.
        assert_eq!(leaves_behind(&mut path, start, ms(100), 1000), Some(ms(106)));
    }

    #[test]
    fn what_does_not_fit_the_queue_is_dropped_and_takes_no_time_of_the_wire() {
        let (start, mut path) = (Instant::now(), Path::new(CLEAN, 1));
        for _ in 0..10 {
            assert!(matches!(path.enter(start, 1000), Fate::Leaves(_)));
        }
        assert_eq!(path.enter(start, 1), Fate::QueueFull);
        let at = Duration::from_millis(1);
        assert_eq!(leaves_behind(&mut path, start, at, 1000), Some(Duration::from_millis(16)));
    }

    #[test]
    fn without_a_rate_a_packet_is_only_late() {
        let (start, mut path) = (Instant::now(), Path::new(PathShape { bytes_per_second: None, ..CLEAN }, 1));
        for _ in 0..100 {
            assert_eq!(leaves_behind(&mut path, start, Duration::ZERO, 65_000), Some(CLEAN.delay));
        }
    }

    #[test]
    fn as_many_are_lost_as_was_asked_for_and_the_same_ones_for_the_same_seed() {
        let start = Instant::now();
        let lost = |seed| {
            let mut path = Path::new(PathShape { loss: 0.01, bytes_per_second: None, ..CLEAN }, seed);
            (0..100_000).filter(|_| path.enter(start, 1500) == Fate::Lost).collect::<Vec<_>>()
        };
        assert!((800..1200).contains(&lost(1).len()), "{}", lost(1).len());
        assert_eq!(lost(1), lost(1));
        assert_ne!(lost(1), lost(2));
        let mut none = Path::new(CLEAN, 1);
        assert!((0..5).all(|_| none.enter(start, 1000) != Fate::Lost));
    }
}
