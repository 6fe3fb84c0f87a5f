//! How much KV may be on the way: the congestion controllers of bulk connections.
//!
//! Cubic is quinn's. BBR is our own ([`bbr`]): that of quinn takes the largest rate between any two acknowledgements for
//! the path's, and fills any queue. A fixed window is for links that carry nothing else: the receiver's flow control
//! alone bounds what is on the way, and what is lost is sent again at the same speed.

mod bbr;
#[cfg(test)]
mod cubic_model;
mod delivery;
#[cfg(test)]
mod link;
mod losses;
mod min_rtt;
mod windowed_max;

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use common::config::CongestionControl;
use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

use self::bbr::Bbr;

/// Ten datagrams of the size that every path carries: what RFC 9002 has a sender begin with.
const INITIAL_WINDOW_BYTES: u64 = 12_000;
/// Within one host there is nobody to be careful of.
const LOOPBACK_INITIAL_WINDOW_BYTES: u64 = 512 << 10;
/// quinn paces what has a window of up to `u32::MAX`, with a timer that wakes a millisecond late; beyond, it sends
/// what it has.
const UNPACED_WINDOW_BYTES: u64 = 1 << 32;

/// Makes the controllers of connections over which `chosen` decides.
pub(crate) fn factory(chosen: CongestionControl, is_loopback: bool) -> Arc<dyn ControllerFactory + Send + Sync> {
    let initial_window = if is_loopback { LOOPBACK_INITIAL_WINDOW_BYTES } else { INITIAL_WINDOW_BYTES };
    match chosen {
        CongestionControl::Cubic => {
            let mut config = CubicConfig::default();
            config.initial_window(initial_window);
            Arc::new(config)
        }
        CongestionControl::Bbr => Arc::new(BbrFactory { initial_window }),
        CongestionControl::Fixed => Arc::new(FixedWindow),
    }
}

/// Makes controllers of [`bbr`].
#[derive(Debug, Clone, Copy)]
struct BbrFactory {
    initial_window: u64,
}

impl ControllerFactory for BbrFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Bbr::new(now, self.initial_window, current_mtu.into()))
    }
}

impl Controller for Bbr {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        Bbr::on_sent(self, now, bytes);
    }

    fn on_ack(&mut self, _now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        Bbr::on_ack(self, sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest: Option<u64>) {
        Bbr::on_end_acks(self, now, in_flight, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.on_congestion(now, sent, lost_bytes, is_persistent);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.on_datagram_size(new_mtu.into());
    }

    fn window(&self) -> u64 {
        self.window_bytes()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window_bytes()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Leaves it to flow control.
#[derive(Debug, Clone, Copy)]
struct FixedWindow;

impl ControllerFactory for FixedWindow {
    fn build(self: Arc<Self>, _now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(*self)
    }
}

impl Controller for FixedWindow {
    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, _is_persistent: bool, _lost_bytes: u64) {}

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        UNPACED_WINDOW_BYTES
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(*self)
    }

    fn initial_window(&self) -> u64 {
        UNPACED_WINDOW_BYTES
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
