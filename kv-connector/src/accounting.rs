//! What is open and held, for the tests that assert zero, and for the metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::ids::Role;
use metrics::{Counter, Gauge, Label, Unit};

use crate::socket::Traffic;

/// What one fabric holds at a moment. Everything is zero once all requests and links have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FabricAccounting {
    /// Control streams with at least one half in use here.
    pub open_control_streams: usize,
    /// Extents being sent or received.
    pub open_bulk_streams: usize,
    /// Landings that are open.
    pub landings: usize,
    /// Connections, control and bulk, dialled and accepted.
    pub connections: usize,
    /// Payload bytes of extents that have begun to land and are neither verified nor refused.
    pub pinned_receive_bytes: usize,
    /// Registrations of shared memory: announced to a peer, or mapped from one.
    pub registrations: usize,
}

/// Counts shared by everything that belongs to one fabric.
pub(crate) struct Ledger {
    labels: Vec<Label>,
    control_streams: AtomicUsize,
    bulk_streams: AtomicUsize,
    landings: AtomicUsize,
    connections: AtomicUsize,
    receive_bytes: AtomicUsize,
    registrations: AtomicUsize,
    connections_gauge: [Gauge; 2],
    streams_gauge: [Gauge; 2],
    landings_gauge: Gauge,
    receive_bytes_gauge: Gauge,
    registrations_gauge: Gauge,
    extents_sent: [ExtentCounters; 4],
    extents_verified: [ExtentCounters; 4],
    converted_bytes: Counter,
}

/// How many extents went one way over one carrier, and what was in them.
struct ExtentCounters {
    extents: Counter,
    bytes: Counter,
}

impl ExtentCounters {
    fn count(&self, num_bytes: usize) {
        self.extents.increment(1);
        self.bytes.increment(num_bytes as u64);
    }
}

/// What KV travels over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    Quic,
    Shm,
    CudaIpc,
    Nixl,
}

impl Carrier {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Carrier::Quic => "quic",
            Carrier::Shm => "shm",
            Carrier::CudaIpc => "cuda-ipc",
            Carrier::Nixl => "nixl",
        }
    }
}

/// What a [`Held`] stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Connection(Traffic),
    Stream(Traffic),
    Landing,
    ReceiveBytes(usize),
    Registration,
}

/// One counted thing, from now until it is dropped.
pub(crate) struct Held {
    ledger: Arc<Ledger>,
    kind: Kind,
}

impl Ledger {
    pub(crate) fn new(role: Role, node: &str) -> Arc<Self> {
        describe();
        let labels = vec![Label::new("role", role.as_str()), Label::new("node", node.to_string())];
        let with = |key: &'static str, value: &'static str| {
            let mut labels = labels.clone();
            labels.push(Label::new(key, value));
            labels
        };
        let connections = |traffic: Traffic| metrics::gauge!(CONNECTIONS, with("traffic", traffic.as_str()));
        let streams = |traffic: Traffic| metrics::gauge!(STREAMS, with("traffic", traffic.as_str()));
        let extents = |direction: &'static str| {
            [Carrier::Quic, Carrier::Shm, Carrier::CudaIpc, Carrier::Nixl].map(|carrier| {
                let mut labels = with("direction", direction);
                labels.push(Label::new("transport", carrier.as_str()));
                ExtentCounters {
                    extents: metrics::counter!(EXTENTS, labels.clone()),
                    bytes: metrics::counter!(EXTENT_BYTES, labels),
                }
            })
        };
        Arc::new(Self {
            control_streams: AtomicUsize::new(0),
            bulk_streams: AtomicUsize::new(0),
            landings: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            receive_bytes: AtomicUsize::new(0),
            registrations: AtomicUsize::new(0),
            connections_gauge: [connections(Traffic::Control), connections(Traffic::Bulk)],
            streams_gauge: [streams(Traffic::Control), streams(Traffic::Bulk)],
            landings_gauge: metrics::gauge!(LANDINGS, labels.clone()),
            receive_bytes_gauge: metrics::gauge!(RECEIVE_BYTES, labels.clone()),
            registrations_gauge: metrics::gauge!(REGISTRATIONS, labels.clone()),
            extents_sent: extents("sent"),
            extents_verified: extents("verified"),
            converted_bytes: metrics::counter!(CONVERTED_BYTES, labels.clone()),
            labels,
        })
    }

    pub(crate) fn snapshot(&self) -> FabricAccounting {
        let now = |count: &AtomicUsize| count.load(Ordering::SeqCst);
        FabricAccounting {
            open_control_streams: now(&self.control_streams),
            open_bulk_streams: now(&self.bulk_streams),
            landings: now(&self.landings),
            connections: now(&self.connections),
            pinned_receive_bytes: now(&self.receive_bytes),
            registrations: now(&self.registrations),
        }
    }

    /// Counts something until the answer is dropped.
    pub(crate) fn hold(self: &Arc<Self>, kind: Kind) -> Held {
        let (count, gauge, amount) = self.place(kind);
        count.fetch_add(amount, Ordering::SeqCst);
        gauge.increment(amount as f64);
        Held { ledger: self.clone(), kind }
    }

    pub(crate) fn count_sent(&self, carrier: Carrier, num_bytes: usize) {
        self.extents_sent[carrier as usize].count(num_bytes);
    }

    pub(crate) fn count_verified(&self, carrier: Carrier, num_bytes: usize) {
        self.extents_verified[carrier as usize].count(num_bytes);
    }

    pub(crate) fn count_converted(&self, num_bytes: usize) {
        self.converted_bytes.increment(num_bytes as u64);
    }

    pub(crate) fn count_refused_extent(&self, reason: &'static str) {
        metrics::counter!(REFUSED_EXTENTS, self.with_reason(reason)).increment(1);
    }

    /// One went over another connection, since its own was lost.
    pub(crate) fn count_resent_extent(&self) {
        metrics::counter!(RESENT_EXTENTS, self.labels.clone()).increment(1);
    }

    pub(crate) fn count_refused_stream(&self, reason: &'static str) {
        metrics::counter!(REFUSED_STREAMS, self.with_reason(reason)).increment(1);
    }

    pub(crate) fn count_refused_connection(&self, reason: &'static str) {
        metrics::counter!(REFUSED_CONNECTIONS, self.with_reason(reason)).increment(1);
    }

    fn with_reason(&self, reason: &'static str) -> Vec<Label> {
        self.with(Label::new("reason", reason))
    }

    /// Who this is, and one label more.
    pub(crate) fn with(&self, label: Label) -> Vec<Label> {
        let mut labels = self.labels.clone();
        labels.push(label);
        labels
    }

    fn place(&self, kind: Kind) -> (&AtomicUsize, &Gauge, usize) {
        let index = |traffic: Traffic| usize::from(traffic == Traffic::Bulk);
        match kind {
            Kind::Connection(traffic) => (&self.connections, &self.connections_gauge[index(traffic)], 1),
            Kind::Stream(Traffic::Control) => (&self.control_streams, &self.streams_gauge[0], 1),
            Kind::Stream(Traffic::Bulk) => (&self.bulk_streams, &self.streams_gauge[1], 1),
            Kind::Landing => (&self.landings, &self.landings_gauge, 1),
            Kind::Registration => (&self.registrations, &self.registrations_gauge, 1),
            Kind::ReceiveBytes(num_bytes) => (&self.receive_bytes, &self.receive_bytes_gauge, num_bytes),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (count, gauge, amount) = self.ledger.place(self.kind);
        count.fetch_sub(amount, Ordering::SeqCst);
        gauge.decrement(amount as f64);
    }
}

const CONNECTIONS: &str = "tandem_fabric_connections";
const STREAMS: &str = "tandem_fabric_streams";
const LANDINGS: &str = "tandem_fabric_landings";
const RECEIVE_BYTES: &str = "tandem_fabric_receive_bytes";
const REGISTRATIONS: &str = "tandem_fabric_registrations";
const EXTENTS: &str = "tandem_fabric_extents_total";
const EXTENT_BYTES: &str = "tandem_fabric_extent_bytes_total";
const CONVERTED_BYTES: &str = "tandem_fabric_converted_bytes_total";
const REFUSED_EXTENTS: &str = "tandem_refused_extents_total";
const RESENT_EXTENTS: &str = "tandem_fabric_resent_extents_total";
const REFUSED_STREAMS: &str = "tandem_refused_streams_total";
const REFUSED_CONNECTIONS: &str = "tandem_refused_connections_total";

fn describe() {
    metrics::describe_gauge!(CONNECTIONS, Unit::Count, "QUIC connections that are open, by traffic");
    metrics::describe_gauge!(STREAMS, Unit::Count, "Streams that are open: requests (control), extents (bulk)");
    metrics::describe_gauge!(LANDINGS, Unit::Count, "Reservations that KV may land in");
    metrics::describe_gauge!(RECEIVE_BYTES, Unit::Bytes, "KV payload that has begun to arrive and is not proven yet");
    metrics::describe_gauge!(REGISTRATIONS, Unit::Count, "Shared memory announced to a peer, or mapped from one");
    metrics::describe_counter!(EXTENTS, Unit::Count, "Extents of KV sent or verified on arrival, by transport");
    metrics::describe_counter!(EXTENT_BYTES, Unit::Bytes, "KV payload sent or verified on arrival, by transport");
    metrics::describe_counter!(
        CONVERTED_BYTES,
        Unit::Bytes,
        "KV payload verified on arrival that is kept in another form"
    );
    metrics::describe_counter!(REFUSED_EXTENTS, Unit::Count, "Extents that were not taken, by reason");
    metrics::describe_counter!(
        RESENT_EXTENTS,
        Unit::Count,
        "Extents sent again over another bulk connection to their peer"
    );
    metrics::describe_counter!(REFUSED_STREAMS, Unit::Count, "Control streams that were not taken, by reason");
    metrics::describe_counter!(REFUSED_CONNECTIONS, Unit::Count, "Connections that were not taken, by reason");
}
