//! What the metrics of a test's process say.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

/// Keeps every value by `name{label=value,...}`, labels without role and node.
#[derive(Clone, Default)]
pub struct Values(Arc<Mutex<HashMap<String, Arc<AtomicU64>>>>);

impl Values {
    /// The recorder of this process; it has one.
    pub fn install() -> Self {
        static INSTALLED: LazyLock<Values> = LazyLock::new(|| {
            let values = Values::default();
            metrics::set_global_recorder(values.clone()).unwrap();
            values
        });
        INSTALLED.clone()
    }

    fn at(&self, key: &Key) -> Arc<AtomicU64> {
        let labels: HashMap<&str, &str> = key.labels().map(|label| (label.key(), label.value())).collect();
        assert!(labels.contains_key("role") && labels.contains_key("node"), "{key}");
        let own: Vec<String> =
            key.labels().filter(|label| label.key() != "role").map(|label| label.value().to_string()).collect();
        self.0.lock().unwrap().entry(format!("{} {}", key.name(), own.join(" "))).or_default().clone()
    }

    pub fn count(&self, name: &str) -> u64 {
        self.0.lock().unwrap().get(name).map_or(0, |value| value.load(Ordering::SeqCst))
    }

    pub fn gauge(&self, name: &str) -> f64 {
        f64::from_bits(self.count(name))
    }
}

impl Recorder for Values {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.at(key))
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.at(key))
    }
    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}
