//! The decode node's own numbers; the engine and the fabric keep theirs.

use common::timeline::NodeTimeline;
use metrics::{Counter, Gauge, Histogram, Label};

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
        let histogram = |name: &'static str, help: &'static str| {
            metrics::describe_histogram!(name, help);
            metrics::histogram!(name, labels.clone())
        };
        Self {
            requests: metrics::gauge!("tandem_decode_requests", labels.clone()),
            local_prefills: metrics::counter!("tandem_local_prefills_total", labels.clone()),
            transferred_bytes: metrics::counter!("tandem_kv_transferred_bytes_total", labels.clone()),
            queue: histogram("tandem_request_queue_seconds", "Time in queues, each role as it saw it"),
            prefill: histogram(
                "tandem_request_prefill_seconds",
                "Time in which the prompt was computed, each role as it saw it",
            ),
            transfer: histogram("tandem_kv_transfer_seconds", "From the first extent to the last one verified"),
            handover: histogram("tandem_kv_handover_seconds", "From token #1 to the sequence in the running batch"),
            first_gap: histogram(
                "tandem_first_token_gap_seconds",
                "Time between tokens #1 and #2, where a slow hand-over shows",
            ),
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
        metrics::counter!("tandem_prefill_candidates_lost_total", labels).increment(1);
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
