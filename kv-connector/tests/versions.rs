//! Nodes of different releases: which version of the protocol they speak, and what they say without one.
#![allow(clippy::unwrap_used)]

mod support;

use common::ids::Role;
use kv_connector::{DialError, Fabric};
use support::{Cluster, assert_nothing_left, soon};

const N: u16 = 7;

fn speaking(cluster: &Cluster, name: &str, role: Role, versions: &[u16]) -> Fabric {
    let mut config = cluster.config(name, role);
    config.versions = versions.to_vec();
    Fabric::bind(config).unwrap()
}

#[tokio::test]
async fn both_ends_speak_the_newest_version_they_share() {
    for (dialler, accepter, expected) in [
        (&[N + 1, N][..], &[N][..], N),
        (&[N], &[N + 1, N], N),
        (&[N + 1, N], &[N, N - 1], N),
        (&[N, N - 1], &[N + 1, N], N),
        (&[N + 1, N], &[N + 1, N], N + 1),
    ] {
        let cluster = Cluster::new();
        let decode = speaking(&cluster, "d0", Role::DecodeNode, dialler);
        let prefill = speaking(&cluster, "p0", Role::PrefillNode, accepter);
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        assert_eq!(link.version(), expected, "{dialler:?} with {accepter:?}");
        let bulk = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
        let (sender, receiver) = link.open(&support::prefill(1)).await.unwrap();
        let stream = soon("accept", prefill.accept()).await.unwrap();
        assert_eq!(stream.link.version(), expected, "{dialler:?} with {accepter:?}");
        drop((sender, receiver, stream, link, bulk));
        assert_nothing_left([decode, prefill]).await;
    }
}

#[tokio::test]
async fn peer_without_a_common_version_is_refused_in_words_that_name_both() {
    let cluster = Cluster::new();
    let decode = speaking(&cluster, "d0", Role::DecodeNode, &[N - 1, N - 2]);
    let proxy = speaking(&cluster, "x0", Role::Proxy, &[N + 1, N]);
    let addr = decode.local_addr();
    let error = soon("dial", proxy.dial(addr, Role::DecodeNode, None)).await.unwrap_err();
    assert!(matches!(error, DialError::NoCommonVersion { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        format!(
            "{addr} cannot be talked to: no common protocol version: the dialling node speaks 8 and 7, the accepting \
             node 6 and 5: upgrade the older of the two"
        )
    );
    assert!(!error.is_worth_a_retry());
    assert_nothing_left([proxy, decode]).await;
}
