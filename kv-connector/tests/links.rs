//! Links between two fabrics over loopback: who gets in, what streams carry, and how they end.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::ids::Role;
use common::wire::{GenerateEvent, Open, PrefillControl, PrefillEvent, Watch};
use kv_connector::{BindError, ClusterCa, DialError, Fabric, FabricLimits, RecvError, SendError};
use support::{Cluster, assert_nothing_left, eventually, generate, node, prefill, soon};

#[tokio::test]
async fn message_goes_there_and_back_over_a_stream() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = soon("dial", proxy.dial(decode.local_addr(), Role::DecodeNode, Some(&node("d0")))).await.unwrap();
    assert_eq!(link.peer(), decode.hello());
    let (mut sender, mut receiver) = link.open(&generate(1)).await.unwrap();

    let mut stream = soon("accept", decode.accept()).await.unwrap();
    assert_eq!(stream.open, generate(1));
    assert_eq!(*stream.peer, *proxy.hello());
    stream.sender.send(&GenerateEvent::Accepted).await.unwrap();
    stream.sender.finish();
    assert_eq!(soon("event", receiver.recv()).await.unwrap(), Some(GenerateEvent::Accepted));
    assert_eq!(soon("end", receiver.recv::<GenerateEvent>()).await.unwrap(), None);
    sender.finish();
    assert_eq!(soon("end", stream.receiver.recv::<PrefillControl>()).await.unwrap(), None);

    drop((sender, receiver, stream, link));
    assert_nothing_left([proxy, decode]).await;
}

/// More than a connection is allowed at first.
#[tokio::test]
async fn many_streams_are_open_at_a_time_and_the_limit_is_kept() {
    const NUM_STREAMS_MAX: u32 = 300;
    let cluster = Cluster::new();
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.limits.num_streams_max = NUM_STREAMS_MAX;
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), Fabric::bind(config).unwrap());
    let link = soon("dial", proxy.dial(decode.local_addr(), Role::DecodeNode, None)).await.unwrap();
    let (mut opened, mut accepted) = (Vec::new(), Vec::new());
    for request in 0..u128::from(NUM_STREAMS_MAX) {
        opened.push(soon("open", link.open(&generate(request))).await.unwrap());
        accepted.push(soon("accept", decode.accept()).await.unwrap());
    }
    let message = generate(u128::from(NUM_STREAMS_MAX));
    let another = {
        let mut opening = std::pin::pin!(link.open(&message));
        tokio::select! {
            biased;
            _ = &mut opening => panic!("a stream beyond the limit is open"),
            () = std::future::ready(()) => {}
        }
        accepted.truncate(200);
        opened.truncate(200);
        soon("open, when others have ended", opening).await.unwrap()
    };
    drop((opened, accepted, another, link));
    assert_nothing_left([proxy, decode]).await;
}

/// As a decode node does whose answers wait at a proxy for clients that are slow to read them.
#[tokio::test]
async fn streams_that_only_their_opener_still_holds_do_not_keep_others_from_being_opened() {
    const NUM_STREAMS: u128 = 500;
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = soon("dial", proxy.dial(decode.local_addr(), Role::DecodeNode, None)).await.unwrap();
    let mut opened = Vec::new();
    for request in 0..NUM_STREAMS {
        opened.push(soon("open", link.open(&generate(request))).await.unwrap());
        let mut stream = soon("accept", decode.accept()).await.unwrap();
        stream.sender.finish();
        soon("the end has arrived", stream.sender.stopped()).await;
    }
    eventually("the node holds none", || decode.accounting().open_control_streams == 0).await;
    assert_eq!(proxy.accounting().open_control_streams, NUM_STREAMS as usize);
    drop((opened, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn fabric_does_not_start_with_the_certificate_of_another_node() {
    let cluster = Cluster::new();
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.hello.node = node("d1");
    let error = Fabric::bind(config).err().unwrap();
    assert!(matches!(error, BindError::WrongIdentity { .. }));
    assert_eq!(
        error.to_string(),
        "this node is decode-node \"d1\", its certificate was issued to decode-node \"d0\": use the certificate of this node"
    );
}

#[tokio::test]
async fn address_in_use_is_a_sentence() {
    let cluster = Cluster::new();
    let first = cluster.start("d0", Role::DecodeNode);
    let mut config = cluster.config("d1", Role::DecodeNode);
    config.listen = first.local_addr();
    let error = Fabric::bind(config).err().unwrap().to_string();
    assert!(error.starts_with(&format!("cannot listen on UDP {}", first.local_addr())), "{error}");
    assert_nothing_left([first]).await;
}

#[tokio::test]
async fn node_of_another_cluster_is_refused_by_both_ends() {
    let decode = Cluster::new().start("d0", Role::DecodeNode);
    let proxy = Cluster::new().start("x0", Role::Proxy);
    let error = soon("dial", proxy.dial(decode.local_addr(), Role::DecodeNode, None)).await.unwrap_err();
    assert!(matches!(error, DialError::NotTrusted { .. }), "{error}");
    assert!(error.to_string().contains("is not a decode-node of this cluster"), "{error}");
    assert!(!error.is_worth_a_retry());
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn stranger_that_trusts_the_cluster_is_refused_by_it() {
    // It has the cluster's CA certificate, which is public, and a certificate of its own making.
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let dir = tempdir("stranger");
    other.ca.save(&dir.join("other")).unwrap();
    cluster.ca.save(&dir.join("cluster")).unwrap();
    let identity = other.ca.issue(Role::Proxy, &node("x0")).unwrap();
    identity.save(&dir.join("other")).unwrap();
    let loaded =
        kv_connector::Identity::load(&dir.join("cluster/ca.pem"), &dir.join("other/x0.pem"), &dir.join("other/x0.key"));
    let error = loaded.unwrap_err().to_string();
    assert!(error.contains("does not pass the authority in"), "{error}");
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn other_role_than_expected_is_refused_by_tls() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let error = soon("dial", proxy.dial(decode.local_addr(), Role::PrefillNode, None)).await.unwrap_err();
    assert!(matches!(error, DialError::NotTrusted { .. }), "{error}");
    assert!(error.to_string().contains("is not a prefill-node of this cluster"), "{error}");
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn other_node_than_expected_is_named() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let addr = decode.local_addr();
    let error = soon("dial", proxy.dial(addr, Role::DecodeNode, Some(&node("d1")))).await.unwrap_err();
    assert_eq!(error.to_string(), format!("node \"d0\" answers at {addr}, expected \"d1\": correct the list of nodes"));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn model_mismatch_is_refused_in_words_that_name_both() {
    let cluster = Cluster::new();
    let prefill = cluster.start("p0", Role::PrefillNode);
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.hello.model = Some(support::model(8));
    // The dialler would take anybody: the refusal comes from the other end.
    config.check = Arc::new(|_| Ok(()));
    let decode = Fabric::bind(config).unwrap();
    let error = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap_err();
    assert!(matches!(error, DialError::RefusedByPeer { .. }), "{error}");
    let words = "this node serves model 0707070707070707, the other end serves model 0808080808080808";
    assert!(error.to_string().contains(words), "{error}");
    assert_nothing_left([decode, prefill]).await;
}

#[tokio::test]
async fn dialler_refuses_too() {
    let cluster = Cluster::new();
    let mut config = cluster.config("p0", Role::PrefillNode);
    config.check = Arc::new(|_| Ok(()));
    let prefill = Fabric::bind(config).unwrap();
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.check = Arc::new(|peer| Err(format!("{} is not wanted", peer.node)));
    let decode = Fabric::bind(config).unwrap();
    let error = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap_err();
    assert_eq!(error, DialError::RefusedHere { addr: prefill.local_addr(), reason: "p0 is not wanted".into() });
    assert_nothing_left([decode, prefill]).await;
}

#[tokio::test]
async fn nobody_there_is_unreachable_within_the_idle_limit() {
    let cluster = Cluster::new();
    let proxy = cluster.start("x0", Role::Proxy);
    let silent = std::net::UdpSocket::bind(support::LOOPBACK).unwrap();
    let dialled = proxy.dial(silent.local_addr().unwrap(), Role::DecodeNode, None);
    let error = soon("dial", dialled).await.unwrap_err();
    assert!(matches!(error, DialError::Unreachable { .. }) && error.is_worth_a_retry(), "{error}");
    assert_nothing_left([proxy]).await;
}

#[tokio::test]
async fn dropped_stream_is_noticed_at_once_by_whoever_serves_it() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let halves = link.open(&generate(1)).await.unwrap();
    let mut stream = soon("accept", decode.accept()).await.unwrap();

    let dropped_at = Instant::now();
    drop(halves);
    soon("the server's sender", stream.sender.stopped()).await;
    let noticed_after = dropped_at.elapsed();
    let end = soon("the server's receiver", stream.receiver.recv::<PrefillControl>()).await;
    assert!(matches!(end, Err(RecvError::Reset { .. })), "{end:?}");
    // Milliseconds; the bound leaves room for a machine that is busy with other things.
    assert!(noticed_after < Duration::from_millis(500), "noticed after {noticed_after:?}");
    let sent = stream.sender.send(&GenerateEvent::Accepted).await;
    assert_eq!(sent, Err(SendError::Stopped { reason: "cancelled" }));
    assert!(!link.is_closed(), "a stream's end is not the link's");

    drop((stream, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn server_that_gives_up_resets_the_client() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let (sender, mut receiver) = link.open(&generate(1)).await.unwrap();
    let mut stream = soon("accept", decode.accept()).await.unwrap();
    stream.sender.send(&GenerateEvent::Accepted).await.unwrap();
    assert_eq!(soon("event", receiver.recv()).await.unwrap(), Some(GenerateEvent::Accepted));
    drop(stream);
    let end = soon("end", receiver.recv::<GenerateEvent>()).await;
    assert_eq!(end, Err(RecvError::Reset { reason: "cancelled" }));
    drop((sender, receiver, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn stream_that_the_role_may_not_open_is_refused() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    for open in [prefill(1), Open::Hello(proxy.hello().clone())] {
        let (_sender, mut receiver) = link.open(&open).await.unwrap();
        let end = soon("end", receiver.recv::<PrefillEvent>()).await;
        assert_eq!(end, Err(RecvError::Reset { reason: "this role may not open such a stream there" }));
    }
    // The link is none the worse.
    let watch = link.open(&Open::Watch(Watch {})).await.unwrap();
    assert_eq!(soon("accept", decode.accept()).await.unwrap().open, Open::Watch(Watch {}));
    drop((watch, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn interrupted_receive_and_interrupted_send_lose_nothing() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let (sender, mut receiver) = link.open(&generate(1)).await.unwrap();
    let mut stream = soon("accept", decode.accept()).await.unwrap();

    // A megabyte per message, so that the window fills and a send stays unfinished.
    let long = |index: u64| {
        PrefillEvent::Failed(common::wire::NodeError::Invalid { reason: format!("{index}{}", "x".repeat(1 << 20)) })
    };
    let mut num_sent = 0;
    while num_sent < 64 {
        let message = long(num_sent);
        let send = stream.sender.send(&message);
        num_sent += 1;
        if tokio::time::timeout(Duration::from_millis(20), send).await.is_err() {
            break;
        }
    }
    assert!(num_sent < 64, "a stream whose reader sleeps must hold its writer back");
    let reading = async {
        for index in 0..=num_sent {
            let event = loop {
                // Dropped again and again, mostly in the middle of a frame.
                let received = tokio::time::timeout(Duration::from_micros(200), receiver.recv::<PrefillEvent>());
                if let Ok(event) = received.await {
                    break event;
                }
            };
            assert_eq!(event.unwrap(), Some(long(index)));
        }
        assert_eq!(receiver.recv::<PrefillEvent>().await.unwrap(), None);
    };
    let writing = async {
        stream.sender.send(&long(num_sent)).await.unwrap();
        stream.sender.finish();
    };
    soon("all messages", async { tokio::join!(reading, writing) }).await;

    drop((sender, receiver, stream, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn thousand_streams_are_served_at_a_time() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let mut halves = Vec::new();
    for request in 0..1000 {
        halves.push(soon("open", link.open(&generate(request))).await.unwrap());
    }
    let mut streams = Vec::new();
    for _ in 0..1000 {
        streams.push(soon("accept", decode.accept()).await.unwrap());
    }
    assert_eq!(decode.accounting().open_control_streams, 1000);
    for stream in &mut streams {
        stream.sender.send(&GenerateEvent::Accepted).await.unwrap();
        stream.sender.finish();
    }
    for (_, receiver) in &mut halves {
        assert_eq!(soon("event", receiver.recv()).await.unwrap(), Some(GenerateEvent::Accepted));
    }
    drop((halves, streams, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn stream_beyond_the_queue_is_reset_and_the_others_are_served() {
    let cluster = Cluster::new();
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.limits = FabricLimits { num_waiting_streams_max: 2, ..FabricLimits::default() };
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), Fabric::bind(config).unwrap());
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let _first = link.open(&generate(1)).await.unwrap();
    let _second = link.open(&generate(2)).await.unwrap();
    eventually("two wait", || decode.accounting().open_control_streams == 2).await;
    let (sender, mut receiver) = link.open(&generate(3)).await.unwrap();
    // Which of the three is too many depends on the order of their tasks: exactly one is.
    let end = tokio::select! {
        end = soon("end", receiver.recv::<GenerateEvent>()) => Some(end),
        () = eventually("one is reset", || decode.accounting().open_control_streams == 2) => None,
    };
    if let Some(end) = end {
        assert_eq!(end, Err(RecvError::Reset { reason: "too many streams wait there" }));
    }
    drop((sender, receiver, _first, _second));
    while decode.accounting().open_control_streams > 0 {
        drop(soon("accept", decode.accept()).await);
    }
    drop(link);
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn peer_that_closes_is_noticed_at_once_with_its_streams() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let (sender, mut receiver) = link.open(&generate(1)).await.unwrap();
    let stream = soon("accept", decode.accept()).await.unwrap();
    decode.close().await;
    let reason = soon("the link", link.closed()).await;
    assert_eq!(reason.to_string(), "the peer closed it (the node is leaving)");
    let end = soon("the stream", receiver.recv::<GenerateEvent>()).await;
    assert!(matches!(end, Err(RecvError::ConnectionLost(_))), "{end:?}");
    assert!(soon("accept ends", decode.accept()).await.is_none());
    assert!(matches!(link.open(&generate(2)).await, Err(kv_connector::OpenError::ConnectionLost(_))));
    drop((sender, receiver, stream, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn link_closes_with_its_last_clone_and_stream() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let halves = link.open(&generate(1)).await.unwrap();
    let stream = soon("accept", decode.accept()).await.unwrap();
    let theirs = stream.link.clone();
    drop((link.clone(), link));
    assert!(!theirs.is_closed(), "an open stream keeps it");
    drop((halves, stream));
    assert_eq!(soon("closed", theirs.closed()).await.to_string(), "the peer closed it (no longer needed)");
    drop(theirs);
    eventually("no connection is left", || proxy.accounting().connections == 0 && decode.accounting().connections == 0)
        .await;
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused() {
    let cluster = Cluster::new();
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.limits = FabricLimits { num_connections_max: 1, ..FabricLimits::default() };
    let decode = Fabric::bind(config).unwrap();
    let proxies = [cluster.start("x0", Role::Proxy), cluster.start("x1", Role::Proxy)];
    let first = proxies[0].dial(decode.local_addr(), Role::DecodeNode, None).await.unwrap();
    let error = soon("dial", proxies[1].dial(decode.local_addr(), Role::DecodeNode, None)).await.unwrap_err();
    assert!(matches!(error, DialError::Unreachable { .. }), "{error}");
    drop(first);
    eventually("the place is free", || decode.accounting().connections == 0).await;
    let second = soon("again", async {
        loop {
            if let Ok(link) = proxies[1].dial(decode.local_addr(), Role::DecodeNode, None).await {
                return link;
            }
        }
    })
    .await;
    drop(second);
    let [x0, x1] = proxies;
    assert_nothing_left([x0, x1, decode]).await;
}

#[test]
fn authority_and_identity_survive_the_disk() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempdir("certs");
    let ca = ClusterCa::generate().unwrap();
    ca.save(&dir).unwrap();
    ca.issue(Role::DecodeNode, &node("d0")).unwrap().save(&dir).unwrap();
    // Another node's certificate, made later by the authority as read from disk.
    let again = ClusterCa::load(&dir).unwrap();
    again.issue(Role::PrefillNode, &node("p0")).unwrap().save(&dir).unwrap();
    for name in ["ca.key", "d0.key", "p0.key"] {
        assert_eq!(std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    let loaded = kv_connector::Identity::load_from_dir(&dir, &node("p0")).unwrap();
    assert_eq!((loaded.role(), loaded.node()), (Role::PrefillNode, &node("p0")));

    let load = |ca: &str, cert: &str, key: &str| {
        kv_connector::Identity::load(&dir.join(ca), &dir.join(cert), &dir.join(key)).unwrap_err().to_string()
    };
    let error = load("ca.pem", "d1.pem", "d1.key");
    assert!(error.starts_with(&format!("cannot read {}/d1.pem (No such file", dir.display())), "{error}");
    assert!(load("ca.pem", "d0.pem", "p0.key").contains("does not belong to certificate"));
    assert!(load("ca.pem", "d0.key", "d0.key").contains("does not hold a certificate in PEM form"));
    assert!(load("ca.pem", "d0.pem", "d0.pem").contains("does not hold a private key in PEM form"));
    assert!(load("ca.pem", "ca.pem", "ca.key").contains("expected one <role>.role.tandem"));
    assert!(ca.save(&dir).unwrap_err().to_string().contains("is there already"), "an authority is never overwritten");
    std::fs::remove_dir_all(dir).unwrap();
}

fn tempdir(name: &str) -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("tandem-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}
