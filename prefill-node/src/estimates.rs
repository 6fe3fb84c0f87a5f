//! What this node expects of itself and of the way to each other node: from the settings, from what was
//! measured, or the stated figure before anything was.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::config::PrefillArgs;
use common::handover::prefix_choice::{UNMEASURED_FETCH_BYTES_PER_SECOND, UNMEASURED_PREFILL_TOKENS_PER_SECOND};
use common::ids::NodeId;
use common::rate::Rate;

/// An older figure says little of the present load, and forgetting it is how a node that failed once is asked
/// again.
const MEASURED_FOR: Duration = Duration::from_secs(60);

pub(crate) struct Estimates {
    set_fetch_bytes_per_second: Option<f64>,
    set_prefill_tokens_per_second: Option<f64>,
    fetches: Mutex<HashMap<NodeId, Measured>>,
}

#[derive(Clone, Copy)]
struct Measured {
    rate: Rate,
    at: Instant,
}

impl Estimates {
    pub(crate) fn new(args: &PrefillArgs) -> Self {
        Self {
            set_fetch_bytes_per_second: args.fetch_bytes_per_second.map(|bytes| bytes as f64),
            set_prefill_tokens_per_second: args.prefill_tokens_per_second.map(f64::from),
            fetches: Mutex::default(),
        }
    }

    /// How fast prompts are computed here, if the engine has measured `measured`.
    pub(crate) fn prefill_tokens_per_second(&self, measured: Option<f64>) -> f64 {
        self.set_prefill_tokens_per_second.or(measured).unwrap_or(UNMEASURED_PREFILL_TOKENS_PER_SECOND)
    }

    /// How fast KV comes from `node`.
    pub(crate) fn fetch_bytes_per_second(&self, node: &NodeId, now: Instant) -> f64 {
        let fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        let measured = fetches.get(node).filter(|measured| now < measured.at + MEASURED_FOR);
        let measured = measured.and_then(|measured| measured.rate.per_second());
        self.set_fetch_bytes_per_second.or(measured).unwrap_or(UNMEASURED_FETCH_BYTES_PER_SECOND)
    }

    /// A fetch of `num_bytes` from `node` was complete, or was given up behind them, which counts alone: what
    /// was fast before is not to be waited for again at once.
    pub(crate) fn on_fetched(&self, node: &NodeId, num_bytes: u64, took: Duration, is_complete: bool, now: Instant) {
        let mut fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        // As many as nodes of the cluster have sent KV within that time.
        fetches.retain(|_, measured| now < measured.at + MEASURED_FOR);
        let before = fetches.get(node).filter(|_| is_complete).map(|measured| measured.rate);
        let mut rate = before.unwrap_or_default();
        rate.observe(num_bytes as f64, took);
        fetches.insert(node.clone(), Measured { rate, at: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn estimates(fetch_bytes_per_second: Option<u64>, prefill_tokens_per_second: Option<u32>) -> Estimates {
        Estimates::new(&PrefillArgs {
            transfer_stall_timeout: SECOND,
            fetch_stall_timeout: SECOND,
            fetch_credit_bytes: 1,
            fetch_bytes_per_second,
            prefill_tokens_per_second,
        })
    }

    #[test]
    fn setting_wins_over_measurement_and_measurement_over_default() {
        let now = Instant::now();
        let (d0, d1) = (NodeId::new("d0").unwrap(), NodeId::new("d1").unwrap());
        for (set, expected) in [(Some(7), [7.0, 7.0]), (None, [100.0, UNMEASURED_FETCH_BYTES_PER_SECOND])] {
            let estimates = estimates(set, None);
            estimates.on_fetched(&d0, 100, SECOND, true, now);
            assert_eq!([&d0, &d1].map(|node| estimates.fetch_bytes_per_second(node, now)), expected);
        }
        assert_eq!(estimates(None, Some(5)).prefill_tokens_per_second(Some(9.0)), 5.0);
        assert_eq!(estimates(None, None).prefill_tokens_per_second(Some(9.0)), 9.0);
        assert_eq!(estimates(None, None).prefill_tokens_per_second(None), UNMEASURED_PREFILL_TOKENS_PER_SECOND);
    }

    #[test]
    fn failed_fetch_counts_alone_and_is_forgotten_after_a_while() {
        let (now, node) = (Instant::now(), NodeId::new("d0").unwrap());
        let estimates = estimates(None, None);
        estimates.on_fetched(&node, 1000, SECOND, true, now);
        estimates.on_fetched(&node, 0, 2 * SECOND, false, now);
        assert_eq!(estimates.fetch_bytes_per_second(&node, now), 0.0);
        assert_eq!(estimates.fetch_bytes_per_second(&node, now + MEASURED_FOR), UNMEASURED_FETCH_BYTES_PER_SECOND);
    }
}
