//! How much KV may be on the way: the congestion controllers of bulk connections.
//!
//! quinn brings Cubic and BBR. A fixed window is for links that carry nothing else: the receiver's flow control
//! alone bounds what is on the way, and what is lost is sent again at the same speed.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use common::config::CongestionControl;
use quinn::congestion::{BbrConfig, Controller, ControllerFactory, CubicConfig};

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
        CongestionControl::Bbr => {
            let mut config = BbrConfig::default();
            config.initial_window(initial_window);
            Arc::new(config)
        }
        CongestionControl::Fixed => Arc::new(FixedWindow),
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
