//! The prefill node's own numbers; the engine and the fabric keep theirs.

use common::handover::PrefixChoice;
use common::shared_metrics::{
    KV_TRANSFERRED_BYTES, OPEN_REQUESTS, REQUEST_PREFILL_SECONDS, REQUEST_QUEUE_SECONDS, SharedMetric,
};
use common::timeline::NodeTimeline;
use metrics::{Counter, Gauge, Histogram, Label};

/// Handles, made once.
pub(crate) struct NodeMetrics {
    labels: Vec<Label>,
    requests: Gauge,
    sent_bytes: Counter,
    fetched_bytes: Counter,
    sent_to_peer_bytes: Counter,
    queue: Histogram,
    prefill: Histogram,
    fetch: Histogram,
}

/// Counts a hand-over while it lives.
pub(crate) struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

impl NodeMetrics {
    pub(crate) fn new(node: &str) -> Self {
        let labels = vec![Label::new("role", "prefill-node"), Label::new("node", node.to_string())];
        let histogram = |metric: SharedMetric| {
            metrics::describe_histogram!(metric.name, metric.help);
            metrics::histogram!(metric.name, labels.clone())
        };
        metrics::describe_gauge!(OPEN_REQUESTS.name, OPEN_REQUESTS.help);
        metrics::describe_counter!(KV_TRANSFERRED_BYTES.name, KV_TRANSFERRED_BYTES.help);
        metrics::describe_counter!(
            "tandem_prefix_choices_total",
            "What was done about a prefix that the decode node, the store or a peer holds and this node lacked"
        );
        metrics::describe_counter!(
            "tandem_prefix_fetches_failed_total",
            "Prefixes that were to be fetched and were computed, in part at least"
        );
        metrics::describe_counter!("tandem_kv_fetched_bytes_total", "KV that was fetched from other nodes");
        metrics::describe_counter!(
            "tandem_prefixes_served_total",
            "Prefixes that other prefill nodes asked this one for, by how that ended"
        );
        metrics::describe_counter!("tandem_peer_sent_bytes_total", "KV that was sent to other prefill nodes");
        metrics::describe_histogram!(
            "tandem_prefix_fetch_seconds",
            "From asking another node for its prefix to the last extent of it"
        );
        Self {
            requests: metrics::gauge!(OPEN_REQUESTS.name, labels.clone()),
            sent_bytes: metrics::counter!(KV_TRANSFERRED_BYTES.name, labels.clone()),
            fetched_bytes: metrics::counter!("tandem_kv_fetched_bytes_total", labels.clone()),
            sent_to_peer_bytes: metrics::counter!("tandem_peer_sent_bytes_total", labels.clone()),
            queue: histogram(REQUEST_QUEUE_SECONDS),
            prefill: histogram(REQUEST_PREFILL_SECONDS),
            fetch: metrics::histogram!("tandem_prefix_fetch_seconds", labels.clone()),
            labels,
        }
    }

    pub(crate) fn count_request(&self) -> Counted {
        self.requests.increment(1);
        Counted(self.requests.clone())
    }

    pub(crate) fn count_sent(&self, num_bytes: u64) {
        self.sent_bytes.increment(num_bytes);
    }

    pub(crate) fn count_fetched(&self, num_bytes: u64) {
        self.fetched_bytes.increment(num_bytes);
    }

    pub(crate) fn count_sent_to_peer(&self, num_bytes: u64) {
        self.sent_to_peer_bytes.increment(num_bytes);
    }

    pub(crate) fn count_served(&self, end: &'static str) {
        self.count("tandem_prefixes_served_total", "end", end);
    }

    pub(crate) fn count_prefix_choice(&self, choice: PrefixChoice) {
        self.count("tandem_prefix_choices_total", "choice", choice.as_str());
    }

    pub(crate) fn count_fetch_failed(&self, reason: &'static str) {
        self.count("tandem_prefix_fetches_failed_total", "reason", reason);
    }

    pub(crate) fn observe(&self, timeline: &NodeTimeline) {
        self.queue.record(timeline.queue);
        self.prefill.record(timeline.prefill);
        if timeline.num_fetched_tokens > 0 {
            self.fetch.record(timeline.fetch);
        }
    }

    fn count(&self, name: &'static str, label: &'static str, value: &'static str) {
        let mut labels = self.labels.clone();
        labels.push(Label::from_static_parts(label, value));
        metrics::counter!(name, labels).increment(1);
    }
}
