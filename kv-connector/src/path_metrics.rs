//! What the paths of KV to each peer are like, told while a bulk connection lasts.
//!
//! Datagram size and losses are the two things that make KV slow without anything being broken: a path that carries
//! 1,200 bytes where 9,000 were expected costs several times the CPU time, and one that loses packets slows Cubic down.
//!
//! Series are never forgotten, so only so many peers get some of their own; the others share those of [`OTHER`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::ids::NodeId;
use metrics::{Counter, Gauge, Label, Unit};
use quinn::{Connection, ConnectionStats};

use crate::accounting::Ledger;

/// How old what is told may be.
const PERIOD: Duration = Duration::from_secs(1);
/// Peers with a label of their own, of all that were ever connected.
const NUM_PEERS_MAX: usize = 256;
/// The label of all others.
const OTHER: &str = "other";

/// Connections of each peer that has series.
#[derive(Default)]
pub(crate) struct PeerPaths {
    num_connections: Mutex<HashMap<String, usize>>,
}

impl PeerPaths {
    /// Counts one more path to `peer`.
    pub(crate) fn begin(self: &Arc<Self>, ledger: &Ledger, peer: &NodeId) -> PathMetrics {
        describe();
        let label = self.count(peer.as_str());
        let labels = ledger.with(Label::new("peer", label.clone()));
        let counter = |name: &'static str| (metrics::counter!(name, labels.clone()), 0);
        let path = PathMetrics {
            num_sent: counter(SENT),
            num_lost: counter(LOST),
            num_congested: counter(CONGESTED),
            num_connections: metrics::gauge!(CONNECTIONS, labels.clone()),
            datagram_bytes: metrics::gauge!(DATAGRAM_BYTES, labels),
            paths: self.clone(),
            label,
        };
        path.num_connections.increment(1.0);
        path
    }

    /// One connection more; answers its label.
    fn count(&self, peer: &str) -> String {
        let mut connections = self.connections();
        let has_room = connections.len() < NUM_PEERS_MAX || connections.contains_key(peer);
        let label = if has_room { peer } else { OTHER }.to_string();
        *connections.entry(label.clone()).or_default() += 1;
        label
    }

    /// One connection less; `on_last` runs before another one can begin.
    fn uncount(&self, label: &str, on_last: impl FnOnce()) {
        let mut connections = self.connections();
        let num_left = connections.get_mut(label).expect("whoever ends was counted");
        *num_left -= 1;
        if *num_left == 0 {
            on_last();
        }
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // Valid after every statement.
        self.num_connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The metrics of one connection's path, and what was told of it before.
pub(crate) struct PathMetrics {
    num_connections: Gauge,
    datagram_bytes: Gauge,
    num_sent: (Counter, u64),
    num_lost: (Counter, u64),
    num_congested: (Counter, u64),
    paths: Arc<PeerPaths>,
    label: String,
}

impl PathMetrics {
    /// Tells of `connection` until it ends.
    pub(crate) async fn tell(mut self, connection: Connection) {
        loop {
            self.show(&connection.stats());
            if tokio::time::timeout(PERIOD, connection.closed()).await.is_ok() {
                break;
            }
        }
        self.show(&connection.stats());
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

impl Drop for PathMetrics {
    fn drop(&mut self) {
        self.num_connections.decrement(1.0);
        // No path any more.
        self.paths.uncount(&self.label, || self.datagram_bytes.set(0.0));
    }
}

const CONNECTIONS: &str = "tandem_fabric_peer_connections";
const DATAGRAM_BYTES: &str = "tandem_fabric_datagram_bytes";
const SENT: &str = "tandem_fabric_packets_total";
const LOST: &str = "tandem_fabric_lost_packets_total";
const CONGESTED: &str = "tandem_fabric_congestion_events_total";

fn describe() {
    metrics::describe_gauge!(CONNECTIONS, Unit::Count, "Bulk connections that are open, by peer");
    metrics::describe_gauge!(DATAGRAM_BYTES, Unit::Bytes, "Largest UDP payload of KV that the path to a peer carries");
    metrics::describe_counter!(SENT, Unit::Count, "QUIC packets sent on bulk connections, by peer");
    metrics::describe_counter!(LOST, Unit::Count, "QUIC packets sent on bulk connections and lost, by peer");
    metrics::describe_counter!(CONGESTED, Unit::Count, "Times that losses made a bulk connection slow down, by peer");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_gone_with_its_peers_last_connection() {
        let paths = PeerPaths::default();
        let is_last = |label: &str| {
            let mut is_last = false;
            paths.uncount(label, || is_last = true);
            is_last
        };
        for peer in ["p0", "p0", "p1"] {
            assert_eq!(paths.count(peer), peer);
        }
        assert!(is_last("p1") && !is_last("p0"));
        assert_eq!(paths.count("p0"), "p0");
        assert!(!is_last("p0") && is_last("p0"));
    }

    #[test]
    fn peers_beyond_the_bound_share_a_label_and_those_known_keep_theirs() {
        let paths = PeerPaths::default();
        for number in 0..NUM_PEERS_MAX {
            let peer = format!("p{number}");
            assert_eq!(paths.count(&peer), peer);
            paths.uncount(&peer, || ());
        }
        assert_eq!((paths.count("late"), paths.count("later")), (OTHER.to_string(), OTHER.to_string()));
        assert_eq!(paths.count("p0"), "p0");
        assert_eq!(paths.connections().len(), NUM_PEERS_MAX + 1);
    }
}
