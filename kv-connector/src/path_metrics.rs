//! What the paths of KV to each peer are like, told while a bulk connection lasts.
//!
//! Datagram size and losses are the two things that make KV slow without anything being broken: a path that carries
//! 1,200 bytes where 9,000 were expected costs several times the CPU time, and one that loses packets slows Cubic down.

use std::time::Duration;

use common::ids::NodeId;
use metrics::{Counter, Gauge, Label, Unit};
use quinn::{Connection, ConnectionStats};

use crate::accounting::Ledger;

/// How old what is told may be.
const PERIOD: Duration = Duration::from_secs(1);

/// The metrics of one connection's path, and what was told of it before.
pub(crate) struct PathMetrics {
    datagram_bytes: Gauge,
    num_sent: (Counter, u64),
    num_lost: (Counter, u64),
    num_congested: (Counter, u64),
}

impl PathMetrics {
    /// Of a path to `peer`.
    pub(crate) fn new(ledger: &Ledger, peer: &NodeId) -> Self {
        describe();
        let labels = ledger.with(Label::new("peer", peer.to_string()));
        let counter = |name: &'static str| (metrics::counter!(name, labels.clone()), 0);
        Self {
            num_sent: counter(SENT),
            num_lost: counter(LOST),
            num_congested: counter(CONGESTED),
            datagram_bytes: metrics::gauge!(DATAGRAM_BYTES, labels),
        }
    }

    /// Tells of `connection` until it ends.
    pub(crate) async fn tell(mut self, connection: Connection) {
        loop {
            self.show(&connection.stats());
            if tokio::time::timeout(PERIOD, connection.closed()).await.is_ok() {
                break;
            }
        }
        self.show(&connection.stats());
        // No path any more.
        self.datagram_bytes.set(0.0);
    }

    fn show(&mut self, stats: &ConnectionStats) {
        let path = &stats.path;
        self.datagram_bytes.set(f64::from(path.current_mtu));
        let now = [path.sent_packets, path.lost_packets, path.congestion_events];
        for ((counter, told), now) in
            [&mut self.num_sent, &mut self.num_lost, &mut self.num_congested].into_iter().zip(now)
        {
            // A packet that was counted as lost and arrives late is taken back.
            counter.increment(now.saturating_sub(*told));
            *told = now.max(*told);
        }
    }
}

const DATAGRAM_BYTES: &str = "tandem_fabric_datagram_bytes";
const SENT: &str = "tandem_fabric_packets_total";
const LOST: &str = "tandem_fabric_lost_packets_total";
const CONGESTED: &str = "tandem_fabric_congestion_events_total";

fn describe() {
    metrics::describe_gauge!(DATAGRAM_BYTES, Unit::Bytes, "Largest UDP payload of KV that the path to a peer carries");
    metrics::describe_counter!(SENT, Unit::Count, "QUIC packets sent on bulk connections, by peer");
    metrics::describe_counter!(LOST, Unit::Count, "QUIC packets sent on bulk connections and lost, by peer");
    metrics::describe_counter!(CONGESTED, Unit::Count, "Times that losses made a bulk connection slow down, by peer");
}
