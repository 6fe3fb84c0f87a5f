//! Metrics that more than one role exports: one name and one meaning each, told apart by the label `role`.
//!
//! `docs/metrics.md` lists every metric. One that a single role exports is named where it is counted.

/// A metric of several roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMetric {
    /// As exported.
    pub name: &'static str,
    /// Its `HELP` line, the same whichever role of a process says it first.
    pub help: &'static str,
}

/// Gauge.
pub const OPEN_REQUESTS: SharedMetric =
    SharedMetric { name: "tandem_open_requests", help: "Requests that are open here: with a place, queued ones too" };
/// Counter.
pub const LOCAL_PREFILLS: SharedMetric = SharedMetric {
    name: "tandem_local_prefills_total",
    help: "Prompts that a decode node computed itself, as the role counts them",
};
/// Counter, in bytes.
pub const KV_TRANSFERRED_BYTES: SharedMetric = SharedMetric {
    name: "tandem_kv_transferred_bytes_total",
    help: "KV sent (prefill node), received (decode node), received for answered requests (proxy)",
};
/// Histogram.
pub const REQUEST_QUEUE_SECONDS: SharedMetric =
    SharedMetric { name: "tandem_request_queue_seconds", help: "Time in queues, each role as it saw it" };
/// Histogram.
pub const REQUEST_PREFILL_SECONDS: SharedMetric = SharedMetric {
    name: "tandem_request_prefill_seconds",
    help: "Time in which the prompt was computed, each role as it saw it",
};
/// Histogram.
pub const REQUEST_TRANSFER_SECONDS: SharedMetric = SharedMetric {
    name: "tandem_request_transfer_seconds",
    help: "From a prompt's first extent to the last one verified at the decode node",
};
/// Histogram.
pub const REQUEST_HANDOVER_SECONDS: SharedMetric = SharedMetric {
    name: "tandem_request_handover_seconds",
    help: "From token #1 at the decode node to the sequence in its running batch",
};
/// Histogram.
pub const FIRST_TOKEN_GAP_SECONDS: SharedMetric = SharedMetric {
    name: "tandem_first_token_gap_seconds",
    help: "Time between tokens #1 and #2 of a choice, where a slow hand-over shows",
};
