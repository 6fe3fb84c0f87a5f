//! The decode node's own numbers; the engine and the fabric keep theirs.

use common::shared_metrics::{
    FIRST_TOKEN_GAP_SECONDS, KV_TRANSFERRED_BYTES, LOCAL_PREFILLS, OPEN_REQUESTS, REQUEST_HANDOVER_SECONDS,
    REQUEST_PREFILL_SECONDS, REQUEST_QUEUE_SECONDS, REQUEST_TRANSFER_SECONDS, SharedMetric,
};
use common::timeline::NodeTimeline;
use metrics::{Counter, Gauge, Histogram, Label};

const CANDIDATES_LOST: &str = "tandem_prefill_candidates_lost_total";

/// Handles, made once.
pub(crate) struct NodeMetrics {
    labels: Vec<Label>,
    requests: Gauge,
    local_prefills: Counter,
    transferred_bytes: Counter,
    queue: Histogram,
    prefill: Histogram,
    transfer: Histogram,
    handover: Histogram,
    first_gap: Histogram,
}

/// Counts a request while it lives.
pub(crate) struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

impl NodeMetrics {
    pub(crate) fn new(node: &str) -> Self {
        let labels = vec![Label::new("role", "decode-node"), Label::new("node", node.to_string())];
        let histogram = |metric: SharedMetric| {
            metrics::describe_histogram!(metric.name, metric.help);
            metrics::histogram!(metric.name, labels.clone())
        };
        let counter = |metric: SharedMetric| {
            metrics::describe_counter!(metric.name, metric.help);
            metrics::counter!(metric.name, labels.clone())
        };
        metrics::describe_gauge!(OPEN_REQUESTS.name, OPEN_REQUESTS.help);
        metrics::describe_counter!(CANDIDATES_LOST, "Prefill nodes that were asked and given up, by reason");
        Self {
            requests: metrics::gauge!(OPEN_REQUESTS.name, labels.clone()),
            local_prefills: counter(LOCAL_PREFILLS),
            transferred_bytes: counter(KV_TRANSFERRED_BYTES),
            queue: histogram(REQUEST_QUEUE_SECONDS),
            prefill: histogram(REQUEST_PREFILL_SECONDS),
            transfer: histogram(REQUEST_TRANSFER_SECONDS),
            handover: histogram(REQUEST_HANDOVER_SECONDS),
            first_gap: histogram(FIRST_TOKEN_GAP_SECONDS),
            labels,
        }
    }

    pub(crate) fn count_request(&self) -> Counted {
        self.requests.increment(1);
        Counted(self.requests.clone())
    }

    pub(crate) fn count_local_prefill(&self) {
        self.local_prefills.increment(1);
    }

    pub(crate) fn count_candidate_lost(&self, reason: &'static str) {
        let mut labels = self.labels.clone();
        labels.push(Label::from_static_parts("reason", reason));
        metrics::counter!(CANDIDATES_LOST, labels).increment(1);
    }

    pub(crate) fn observe(&self, timeline: &NodeTimeline) {
        self.queue.record(timeline.queue);
        self.prefill.record(timeline.prefill);
        // Without a second token there is no gap.
        if !timeline.first_gap.is_zero() {
            self.first_gap.record(timeline.first_gap);
        }
        if timeline.transferred_bytes > 0 {
            self.transferred_bytes.increment(timeline.transferred_bytes);
            self.transfer.record(timeline.transfer);
            self.handover.record(timeline.handover);
        }
    }
}
