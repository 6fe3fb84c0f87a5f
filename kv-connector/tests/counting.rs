//! What the metrics say of a fabric. One test, since a recorder is the whole process's.
#![allow(clippy::unwrap_used)]

mod support;

use common::ids::{Attempt, Epoch, Role};
use kv_connector::transfer::LandingEvent;
use support::values::Values;
use support::{Cluster, Job, TestMemory, assert_nothing_left, eventually, node, prefill, soon};

#[tokio::test]
async fn connections_bytes_and_refusals_are_counted() {
    let values = Values::install();
    let cluster = Cluster::new();
    let (p0, d0) = (cluster.start("p0", Role::PrefillNode), cluster.start("d0", Role::DecodeNode));
    let x0 = cluster.start("x0", Role::Proxy);
    let link = soon("dial", d0.dial(p0.local_addr(), Role::PrefillNode, None)).await.unwrap();
    let zone = d0.landing_zone();
    let bulk = soon("bulk", d0.connect_bulk(&link, &zone)).await.unwrap();
    assert_eq!(values.gauge("tandem_fabric_connections d0 control"), 1.0);
    assert_eq!(values.gauge("tandem_fabric_connections d0 bulk"), 1.0);

    for (here, there) in [("p0", "d0"), ("d0", "p0")] {
        let size_is_found = || values.gauge(&format!("tandem_fabric_datagram_bytes {here} {there}")) == 65_507.0;
        eventually("the size of the path is told", size_is_found).await;
        assert!(values.count(&format!("tandem_fabric_packets_total {here} {there}")) > 0);
    }

    let job = Job::new(1, 64, 0, 0);
    let memory = TestMemory::new(8);
    let (landing, mut events) = zone.open(job.plan(&memory));
    assert_eq!(values.gauge("tandem_fabric_landings d0"), 1.0);
    let sender = p0.bulk_to(&node("d0"), Epoch(11)).unwrap();
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    let late = Job { attempt: Attempt(0), ..job.clone() };
    for (header, payload) in [
        (header, vec![0; payload.len()].into()),
        (header, payload.clone()),
        late.sealed(job.extent(0, 0, 64)),
        (header, payload.clone()),
    ] {
        let _ = soon("send", sender.send_extent(&header, payload)).await;
        eventually("it is settled", || {
            let counts =
                ["corrupted", "stale", "duplicate"].map(|reason| format!("tandem_refused_extents_total d0 {reason}"));
            let settled: u64 = counts.iter().map(|name| values.count(name)).sum();
            let verified = values.count("tandem_fabric_extent_bytes_total d0 verified quic") / payload_bytes(&job);
            settled + verified == values.count("tandem_fabric_extent_bytes_total p0 sent quic") / payload_bytes(&job)
        })
        .await;
    }
    assert!(matches!(events.recv().await, Some(LandingEvent::ExtentRefused { .. })));
    for reason in ["corrupted", "stale", "duplicate"] {
        assert_eq!(values.count(&format!("tandem_refused_extents_total d0 {reason}")), 1, "{reason}");
    }
    assert_eq!(values.count("tandem_fabric_extent_bytes_total d0 verified quic"), payload.len() as u64);
    assert_eq!(values.count("tandem_fabric_extents_total d0 verified quic"), 1);
    assert_eq!(values.count("tandem_fabric_extents_total p0 sent quic"), 4);

    let proxy_link = soon("dial", x0.dial(p0.local_addr(), Role::PrefillNode, None)).await.unwrap();
    let halves = proxy_link.open(&prefill(1)).await.unwrap();
    eventually("it is refused", || values.count("tandem_refused_streams_total p0 not_allowed") == 1).await;
    let stranger = Cluster::new().start("x1", Role::Proxy);
    soon("refused", stranger.dial(p0.local_addr(), Role::PrefillNode, None)).await.unwrap_err();
    eventually("it is counted", || values.count("tandem_refused_connections_total p0 hello") == 1).await;

    drop((landing, bulk, sender, zone, link, halves, proxy_link));
    assert_nothing_left([p0, d0, x0, stranger]).await;
    for name in
        ["connections d0 control", "connections d0 bulk", "streams d0 control", "streams d0 bulk", "landings d0"]
    {
        assert_eq!(values.gauge(&format!("tandem_fabric_{name}")), 0.0, "{name}");
    }
    assert_eq!(values.gauge("tandem_fabric_datagram_bytes d0 p0"), 0.0, "there is no path any more");
}

fn payload_bytes(job: &Job) -> u64 {
    job.payload(&job.extent(0, 0, 64)).len() as u64
}
