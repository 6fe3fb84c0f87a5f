//! The store's numbers, by tier.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Label};

use super::load::Loaded;
use super::tier::TierKind;

const REFUSED: &str = "tandem_store_refused_total";
const DROPPED: &str = "tandem_store_dropped_total";
const FAILED: &str = "tandem_store_failed_operations_total";

/// Handles of one tier, made once.
pub(super) struct TierMetrics {
    labels: Vec<Label>,
    hits: Counter,
    misses: Counter,
    read_bytes: Counter,
    written: Counter,
    written_bytes: Counter,
    evicted_bytes: Counter,
    used_bytes: Gauge,
    queue_bytes: Gauge,
    get_seconds: Histogram,
    put_seconds: Histogram,
}

impl TierMetrics {
    pub(super) fn new(kind: TierKind, labels: &[Label]) -> Self {
        let mut labels = labels.to_vec();
        labels.push(Label::from_static_parts("tier", kind.as_str()));
        let counter = |name: &'static str, help: &'static str| {
            metrics::describe_counter!(name, help);
            metrics::counter!(name, labels.clone())
        };
        let gauge = |name: &'static str, help: &'static str| {
            metrics::describe_gauge!(name, help);
            metrics::gauge!(name, labels.clone())
        };
        let histogram = |name: &'static str, help: &'static str| {
            metrics::describe_histogram!(name, help);
            metrics::histogram!(name, labels.clone())
        };
        metrics::describe_counter!(REFUSED, "Stored entries that were not what their name says, and were removed");
        metrics::describe_counter!(DROPPED, "Entries that a tier was to keep and does not");
        metrics::describe_counter!(FAILED, "Operations that failed or took too long; the tier is left alone then");
        Self {
            hits: counter("tandem_store_hits_total", "Entries that were found and used"),
            misses: counter("tandem_store_misses_total", "Entries that were asked for and not there"),
            read_bytes: counter("tandem_store_read_bytes_total", "Entries that were found, in bytes"),
            written: counter("tandem_store_written_total", "Entries that were written"),
            written_bytes: counter("tandem_store_written_bytes_total", "Entries that were written, in bytes"),
            evicted_bytes: counter("tandem_store_evicted_bytes_total", "What was given up for other entries"),
            used_bytes: gauge("tandem_store_used_bytes", "What the tier keeps"),
            queue_bytes: gauge("tandem_store_queue_bytes", "Entries that wait to be written"),
            get_seconds: histogram("tandem_store_get_seconds", "From asking for an entry to having checked it"),
            put_seconds: histogram("tandem_store_put_seconds", "Writing one entry"),
            labels,
        }
    }

    pub(super) fn count_hit(&self, num_bytes: usize, took: Duration) {
        self.hits.increment(1);
        self.read_bytes.increment(num_bytes as u64);
        self.get_seconds.record(took);
    }

    pub(super) fn count_miss(&self) {
        self.misses.increment(1);
    }

    pub(super) fn count_put(&self, num_bytes: usize, took: Duration) {
        self.written.increment(1);
        self.written_bytes.increment(num_bytes as u64);
        self.put_seconds.record(took);
    }

    pub(super) fn count_refused(&self, reason: &'static str) {
        self.count(REFUSED, "reason", reason);
    }

    pub(super) fn count_dropped(&self, reason: &'static str) {
        self.count(DROPPED, "reason", reason);
    }

    pub(super) fn count_failed(&self, operation: &'static str) {
        self.count(FAILED, "operation", operation);
    }

    pub(super) fn show_usage(&self, used: Option<u64>, evicted: Option<u64>) {
        if let Some(used) = used {
            self.used_bytes.set(used as f64);
        }
        if let Some(evicted) = evicted {
            self.evicted_bytes.absolute(evicted);
        }
    }

    pub(super) fn on_queued(&self, num_bytes: usize) {
        self.queue_bytes.increment(num_bytes as f64);
    }

    pub(super) fn on_unqueued(&self, num_bytes: usize) {
        self.queue_bytes.decrement(num_bytes as f64);
    }

    fn count(&self, name: &'static str, label: &'static str, value: &'static str) {
        let mut labels = self.labels.clone();
        labels.push(Label::from_static_parts(label, value));
        metrics::counter!(name, labels).increment(1);
    }
}

/// Handles of a node's use of its store.
pub(super) struct UseMetrics {
    labels: Vec<Label>,
    loaded_tokens: Counter,
    overlapped_tokens: Counter,
    load_seconds: Histogram,
    pub(super) dropped_publications: Counter,
    pub(super) publications: Gauge,
}

impl UseMetrics {
    pub(super) fn new(labels: Vec<Label>) -> Self {
        metrics::describe_counter!(
            "tandem_store_loads_total",
            "Prefixes that were loaded into the pool, by how it ended"
        );
        metrics::describe_counter!("tandem_store_loaded_tokens_total", "Prompt tokens whose KV came from the store");
        metrics::describe_counter!(
            "tandem_store_overlapped_tokens_total",
            "Stored prompt tokens that were computed while others of their prefix were loaded"
        );
        metrics::describe_histogram!("tandem_store_load_seconds", "Loading one prefix into the pool");
        metrics::describe_counter!(
            "tandem_store_dropped_publications_total",
            "Sequences whose KV was not offered to the store, which was busy with others"
        );
        metrics::describe_gauge!("tandem_store_publications", "Sequences whose KV waits to be offered to the store");
        Self {
            loaded_tokens: metrics::counter!("tandem_store_loaded_tokens_total", labels.clone()),
            overlapped_tokens: metrics::counter!("tandem_store_overlapped_tokens_total", labels.clone()),
            load_seconds: metrics::histogram!("tandem_store_load_seconds", labels.clone()),
            dropped_publications: metrics::counter!("tandem_store_dropped_publications_total", labels.clone()),
            publications: metrics::gauge!("tandem_store_publications", labels.clone()),
            labels,
        }
    }

    pub(super) fn count_load(&self, loaded: &Loaded) {
        let mut labels = self.labels.clone();
        labels.push(Label::from_static_parts("end", loaded.end.as_str()));
        metrics::counter!("tandem_store_loads_total", labels).increment(1);
        self.loaded_tokens.increment(loaded.num_tokens as u64);
        self.overlapped_tokens.increment(loaded.num_computed_tokens as u64);
        self.load_seconds.record(loaded.took);
    }
}
