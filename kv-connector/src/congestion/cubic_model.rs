//! Cubic as others have it, for tests of who shares a link with it. (quinn's cannot be fed without a connection.)

use std::time::Instant;

use super::link::Controlled;

/// RFC 9438. Sizes in bytes.
pub(super) struct Cubic {
    datagram_bytes: f64,
    window: f64,
    threshold: f64,
    window_before_loss: f64,
    /// What Reno would have.
    reno: f64,
    grows_since: Option<Instant>,
    cut_at: Option<Instant>,
}

impl Cubic {
    pub(super) fn new(datagram_bytes: u64) -> Self {
        Self {
            datagram_bytes: datagram_bytes as f64,
            window: 12_000.0,
            threshold: f64::MAX,
            window_before_loss: 0.0,
            reno: 0.0,
            grows_since: None,
            cut_at: None,
        }
    }
}

impl Controlled for Cubic {
    fn sent(&mut self, _now: Instant, _num_bytes: u64) {}

    fn acked(&mut self, now: Instant, sent_at: Instant, num_bytes: u64) {
        if self.cut_at.is_some_and(|cut_at| sent_at <= cut_at) {
            return;
        }
        let acked = num_bytes as f64;
        if self.window < self.threshold {
            self.window += acked;
            return;
        }
        let grows_since = *self.grows_since.get_or_insert(now);
        let seconds = (now - grows_since + (now - sent_at)).as_secs_f64();
        let back_after = (0.3 * self.window_before_loss / self.datagram_bytes / 0.4).cbrt();
        let target = 0.4 * (seconds - back_after).powi(3) * self.datagram_bytes + self.window_before_loss;
        self.reno += 3.0 * 0.3 / 1.7 * self.datagram_bytes * acked / self.window;
        self.window += (target.clamp(self.window, 1.5 * self.window) - self.window) * acked / self.window;
        self.window = self.window.max(self.reno);
    }

    fn end_acks(&mut self, _now: Instant, _in_flight_bytes: u64, _is_app_limited: bool) {}

    fn lost(&mut self, now: Instant, sent_at: Instant, _lost_bytes: u64) {
        if self.cut_at.is_some_and(|cut_at| sent_at <= cut_at) {
            return;
        }
        let is_less_than_before = self.window < self.window_before_loss;
        self.window_before_loss = if is_less_than_before { 0.85 * self.window } else { self.window };
        self.window = (0.7 * self.window).max(2.0 * self.datagram_bytes);
        (self.threshold, self.reno) = (self.window, self.window);
        (self.grows_since, self.cut_at) = (None, Some(now));
    }

    fn window(&self) -> u64 {
        self.window as u64
    }
}
