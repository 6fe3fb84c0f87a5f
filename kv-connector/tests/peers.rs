//! Connections to prefill nodes: dialled on first use, shared, kept while they are few, found again after a restart.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use common::ids::{Epoch, Role};
use common::wire::{Directory, Peer};
use futures::FutureExt;
use futures::future::join_all;
use kv_connector::Fabric;
use kv_connector::peers::{PeerLink, Peers};
use support::{Cluster, SOON, assert_nothing_left, eventually, node, prefill, soon};

/// A control and a bulk connection.
const PAIR: usize = 2;

fn tell(peers: &Peers, nodes: &[(&str, SocketAddr)]) {
    let peer = |(name, control): &(&str, SocketAddr)| Peer { node: node(name), control: *control };
    peers.update(&Directory { prefill_nodes: nodes.iter().map(peer).collect() });
}

async fn link(peers: &Peers, name: &str) -> Option<PeerLink> {
    soon("a link or none", peers.link(&node(name))).await
}

async fn holds(fabric: &Fabric, num_connections: usize) {
    let what = format!("{} has {num_connections} connections", fabric.hello().node);
    eventually(&what, || fabric.accounting().connections == num_connections).await;
}

/// The link to a node once it is to this life of it.
async fn link_to_life(peers: &Peers, name: &str, epoch: Epoch) -> PeerLink {
    let trying = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        loop {
            ticks.tick().await;
            if let Some(link) = peers.link(&node(name)).await.filter(|link| link.epoch() == epoch) {
                return link;
            }
        }
    };
    tokio::time::timeout(SOON, trying).await.unwrap_or_else(|_| panic!("no link to {name} in its life {epoch:?}"))
}

#[tokio::test]
async fn nobody_is_dialled_before_the_first_use_and_all_who_ask_share_one_connection() {
    let cluster = Cluster::new();
    let (p0, decode) = (cluster.start("p0", Role::PrefillNode), cluster.start("d0", Role::DecodeNode));
    let peers = Peers::new(decode.clone(), 8);
    assert!(link(&peers, "p0").await.is_none(), "a node that no directory has named");
    tell(&peers, &[("p0", p0.local_addr()), ("p1", p0.local_addr())]);
    assert!(peers.knows(&node("p0")) && !peers.knows(&node("p2")));
    assert_eq!((decode.accounting().connections, peers.round_trip(&node("p0"))), (0, None));
    assert!(peers.model(&node("p0")).is_none());

    let links = join_all((0..8).map(|_| link(&peers, "p0"))).await;
    assert!(links.iter().all(Option::is_some));
    assert_eq!(decode.accounting().connections, PAIR);
    assert!(peers.round_trip(&node("p0")).is_some());
    assert_eq!(peers.model(&node("p0")), p0.hello().model);
    holds(&p0, PAIR).await;
    drop((links, peers));
    assert_nothing_left([decode, p0]).await;
}

#[tokio::test]
async fn connection_used_least_recently_is_let_go_and_whoever_uses_it_keeps_it() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let [p0, p1, p2] = ["p0", "p1", "p2"].map(|name| cluster.start(name, Role::PrefillNode));
    let peers = Peers::new(decode.clone(), 2);
    tell(&peers, &[("p0", p0.local_addr()), ("p1", p1.local_addr()), ("p2", p2.local_addr())]);
    for name in ["p0", "p1", "p0", "p2"] {
        assert!(link(&peers, name).await.is_some());
    }
    holds(&p1, 0).await;
    holds(&p0, PAIR).await;
    holds(&p2, PAIR).await;

    let used = link(&peers, "p2").await.unwrap();
    for name in ["p0", "p1"] {
        assert!(link(&peers, name).await.is_some());
    }
    let (sender, _receiver) = soon("a stream", used.open(&prefill(1))).await.unwrap();
    assert!(soon("the stream", p2.accept()).await.is_some(), "it was let go, and still serves who holds it");
    drop((sender, _receiver, used));
    holds(&p2, 0).await;
    drop(peers);
    assert_nothing_left([decode, p0, p1, p2]).await;
}

#[tokio::test]
async fn node_that_restarted_or_moved_is_found_in_its_new_life() {
    let cluster = Cluster::new();
    let (first, decode) = (cluster.start("p0", Role::PrefillNode), cluster.start("d0", Role::DecodeNode));
    let address = first.local_addr();
    let peers = Peers::new(decode.clone(), 8);
    tell(&peers, &[("p0", address)]);
    assert_eq!(link(&peers, "p0").await.unwrap().epoch(), Epoch(11));

    soon("the first life ends", first.close()).await;
    drop(first);
    let start = |listen, epoch| {
        let mut config = cluster.config("p0", Role::PrefillNode);
        (config.listen, config.hello.epoch) = (listen, epoch);
        Fabric::bind(config)
    };
    // The first life's socket is closed by a task of its own.
    let mut second = start(address, Epoch(12));
    eventually("the address is free", || {
        if second.is_err() {
            second = start(address, Epoch(12));
        }
        second.is_ok()
    })
    .await;
    let second = second.unwrap();
    link_to_life(&peers, "p0", Epoch(12)).await;

    let third = start(support::LOOPBACK, Epoch(13)).unwrap();
    tell(&peers, &[("p0", third.local_addr())]);
    assert_eq!(link(&peers, "p0").await.unwrap().epoch(), Epoch(13), "the second life is not asked any more");
    holds(&second, 0).await;
    drop(peers);
    assert_nothing_left([decode, second, third]).await;
}

#[tokio::test]
async fn nodes_that_came_and_went_are_forgotten_beyond_a_bound_and_those_in_use_are_not() {
    let cluster = Cluster::new();
    let (p0, decode) = (cluster.start("p0", Role::PrefillNode), cluster.start("d0", Role::DecodeNode));
    let peers = Peers::new(decode.clone(), 8);
    tell(&peers, &[("p0", p0.local_addr()), ("gone", p0.local_addr())]);
    assert!(link(&peers, "p0").await.is_some());
    for number in 0..4095 {
        tell(&peers, &[(&format!("other-{number}"), p0.local_addr())]);
    }
    assert!(!peers.knows(&node("gone")), "the oldest without a connection");
    assert!(peers.knows(&node("p0")) && peers.knows(&node("other-0")) && peers.knows(&node("other-4094")));
    assert_eq!(link(&peers, "p0").await.unwrap().epoch(), Epoch(11));
    drop(peers);
    assert_nothing_left([decode, p0]).await;
}

#[tokio::test]
async fn node_that_refused_is_not_dialled_for_every_request() {
    let cluster = Cluster::new();
    let mut config = cluster.config("p0", Role::PrefillNode);
    config.hello.model = Some(support::model(8));
    let refusing = Fabric::bind(config).unwrap();
    let mut config = cluster.config("p0", Role::PrefillNode);
    config.hello.epoch = Epoch(12);
    let willing = Fabric::bind(config).unwrap();
    let decode = cluster.start("d0", Role::DecodeNode);
    let peers = Peers::new(decode.clone(), 8);
    tell(&peers, &[("p0", refusing.local_addr())]);
    assert!(link(&peers, "p0").await.is_none());
    // Without a single await: the pause behind a refusal is seconds.
    assert!(matches!(peers.link(&node("p0")).now_or_never(), Some(None)));
    tell(&peers, &[("p0", refusing.local_addr())]);
    assert!(peers.link(&node("p0")).now_or_never().is_none(), "a proxy that sees it is a reason to try now");
    tell(&peers, &[("p0", willing.local_addr())]);
    assert_eq!(link(&peers, "p0").await.unwrap().epoch(), Epoch(12), "another address is another try");
    drop(peers);
    assert_nothing_left([decode, refusing, willing]).await;
}

#[tokio::test]
async fn node_that_never_answers_is_waited_for_by_one_request_at_a_time() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let silent = std::net::UdpSocket::bind(support::LOOPBACK).unwrap();
    let peers = Peers::new(decode.clone(), 8);
    tell(&peers, &[("p0", silent.local_addr().unwrap())]);
    let now = || peers.link(&node("p0")).now_or_never();
    assert!(now().is_none() && now().is_none(), "the first try is waited for");
    // Everybody who waited has been cancelled, and the failure is known all the same.
    eventually("the first try fails", || matches!(now(), Some(None))).await;
    eventually("it is tried again", || now().is_none()).await;
    // Without an await the try cannot have ended.
    assert!(matches!(now(), Some(None)), "somebody else's try is not waited for");
    drop(peers);
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn request_that_is_cancelled_in_mid_dial_leaves_the_link_to_the_others() {
    let cluster = Cluster::new();
    let (p0, decode) = (cluster.start("p0", Role::PrefillNode), cluster.start("d0", Role::DecodeNode));
    let peers = Peers::new(decode.clone(), 8);
    tell(&peers, &[("p0", p0.local_addr())]);
    assert!(peers.link(&node("p0")).now_or_never().is_none(), "dialling takes time");
    eventually("the link is there though nobody waits", || peers.round_trip(&node("p0")).is_some()).await;
    assert!(matches!(peers.link(&node("p0")).now_or_never(), Some(Some(_))));
    holds(&p0, PAIR).await;
    drop(peers);
    assert_nothing_left([decode, p0]).await;
}
