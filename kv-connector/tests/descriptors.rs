//! Shared memory leaves no descriptor and no mapping behind. One test, since both are the whole process's.
#![allow(clippy::unwrap_used)]

mod support;

use common::ids::{Epoch, Role};
use kv_connector::Fabric;
use support::file_pool::{FilePool, scattered};
use support::{Cluster, Job, TestMemory, assert_nothing_left, eventually, node, soon};

/// Descriptors that are open, and mappings of the pool.
fn held() -> (usize, usize) {
    let num_open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (num_open, maps.lines().filter(|line| line.contains("memfd:test-pool")).count())
}

#[tokio::test]
async fn descriptors_and_mappings_are_given_back_with_the_connection() {
    let cluster = Cluster::new();
    let pool = FilePool::new(8);
    let before = held();
    for round in 0..3 {
        let mut config = cluster.config("p0", Role::PrefillNode);
        config.shared_pool = Some(pool.shared());
        let prefill = Fabric::bind(config).unwrap();
        let mut config = cluster.config("d0", Role::DecodeNode);
        config.is_reading_shared_pools = true;
        let decode = Fabric::bind(config).unwrap();
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let zone = decode.landing_zone();
        let mut connected = None;
        for _ in 0..5 {
            let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
            assert_eq!(bulk.transport_name(), "shm");
            let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
            let job = Job::new(1, 64, 0, 0);
            let source = pool.source(&job, scattered(0, job.blocks.len()));
            let memory = TestMemory::new(8);
            let (_landing, _events) = zone.open(job.plan(&memory));
            let (header, payload) = source.seal(&job.tokens, job.extent(0, 0, 64));
            soon("send", sender.send_extent(&header, payload)).await.unwrap();
            let now = held();
            let idle = connected.replace(now).unwrap_or(now);
            assert!(
                now.0 <= idle.0 + 1 && now.1 == before.1 + 1,
                "round {round}: {now:?}, at the first connection {idle:?}"
            );
            drop((bulk, sender));
            eventually("the registration ends", || prefill.accounting().registrations == 0).await;
            eventually("the mapping ends", || held().1 == before.1).await;
        }
        drop((zone, link));
        assert_nothing_left([prefill, decode]).await;
        eventually("everything is closed", || held() == before).await;
    }
}
