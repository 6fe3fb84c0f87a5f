//! Peers that have a certificate and do not keep to the protocol, and networks that do not keep peers.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::ids::Role;
use common::wire::{GenerateEvent, HelloReply, Open, PrefillEvent};
use kv_connector::transfer::{LandingEvent, RefusedExtent};
use kv_connector::{DialError, Fabric, FabricLimits, RecvError};
use quinn::{Connection, ReadError, RecvStream, SendStream};
use support::raw::{ALPN_BULK, ALPN_CONTROL, Raw, frame, greet, welcome};
use support::{Cluster, Job, LOOPBACK, TestMemory, assert_nothing_left, eventually, generate, hello, soon};

fn patient(cluster: &Cluster, name: &str, role: Role, deadline: Duration) -> Fabric {
    let mut config = cluster.config(name, role);
    config.limits = FabricLimits { hello_deadline: deadline, frame_deadline: deadline, ..FabricLimits::default() };
    Fabric::bind(config).unwrap()
}

/// A raw proxy that was welcomed by a decode node.
async fn raw_proxy(decode: &Fabric, cluster: &Cluster) -> Connection {
    let raw = Raw::new(cluster, "x9", Role::Proxy);
    let connection = raw.dial(decode.local_addr(), Role::DecodeNode, ALPN_CONTROL).await.unwrap();
    let reply = greet(&connection, hello("x9", Role::Proxy)).await;
    assert_eq!(reply, HelloReply::Welcome { hello: Box::new(decode.hello().clone()), registration: None });
    connection
}

async fn reset_code(stream: &mut RecvStream) -> u64 {
    match soon("a reset", stream.read_to_end(1 << 20)).await {
        Err(quinn::ReadToEndError::Read(ReadError::Reset(code))) => code.into_inner(),
        other => panic!("expected a reset, got {other:?}"),
    }
}

#[tokio::test]
async fn frame_over_the_limit_is_refused_at_its_length() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let connection = raw_proxy(&decode, &cluster).await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    assert_eq!(reset_code(&mut recv).await, 4);
    assert_eq!(soon("stop", send.stopped()).await.unwrap().map(quinn::VarInt::into_inner), Some(4));
    drop(connection);
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn garbage_frames_are_reset_and_the_link_goes_on() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let connection = raw_proxy(&decode, &cluster).await;
    let mut long = frame(&generate(1));
    long[0] += 1;
    long.push(0);
    let garbage: Vec<Vec<u8>> = vec![
        vec![0, 0, 0, 0],
        [&100u32.to_le_bytes()[..], &[0xff; 100]].concat(),
        // A generate with a byte behind it.
        long,
        // A message that claims 2^60 bytes inside a frame of 12.
        [&12u32.to_le_bytes()[..], &[2, 0, 0, 253], &(1u64 << 60).to_le_bytes()].concat(),
    ];
    let mut streams: Vec<(SendStream, RecvStream)> = Vec::new();
    for bytes in &garbage {
        let (mut send, recv) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        streams.push((send, recv));
    }
    for (_, recv) in &mut streams {
        assert_eq!(reset_code(recv).await, 4);
    }
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(&frame(&generate(7))).await.unwrap();
    let stream = soon("accept", decode.accept()).await.unwrap();
    assert_eq!(stream.open, generate(7));
    drop((stream, connection));
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn every_cut_of_a_frame_is_survived() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let connection = raw_proxy(&decode, &cluster).await;
    let bytes = frame(&generate(1));
    for len in 0..bytes.len() {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(&bytes[..len]).await.unwrap();
        send.finish().unwrap();
        assert_eq!(reset_code(&mut recv).await, 4, "cut after {len} bytes");
    }
    drop(connection);
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn frame_that_stops_midway_is_given_up() {
    let cluster = Cluster::new();
    let decode = patient(&cluster, "d0", Role::DecodeNode, Duration::from_millis(200));
    let connection = raw_proxy(&decode, &cluster).await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&frame(&generate(1))[..5]).await.unwrap();
    assert_eq!(reset_code(&mut recv).await, 4);
    drop((connection, send));
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn connection_without_a_hello_is_closed() {
    let cluster = Cluster::new();
    let decode = patient(&cluster, "d0", Role::DecodeNode, Duration::from_millis(200));
    let raw = Raw::new(&cluster, "x9", Role::Proxy);
    let connect = || raw.dial(decode.local_addr(), Role::DecodeNode, ALPN_CONTROL);
    let silent = connect().await.unwrap();
    assert!(soon("closed", silent.closed()).await.to_string().contains("no hello in time"));
    let hasty = connect().await.unwrap();
    let (mut send, _recv) = hasty.open_bi().await.unwrap();
    send.write_all(&frame(&generate(1))).await.unwrap();
    assert!(soon("closed", hasty.closed()).await.to_string().contains("a connection begins with a hello"));
    let babbling = connect().await.unwrap();
    let (mut send, _recv) = babbling.open_bi().await.unwrap();
    send.write_all(&[0xff; 64]).await.unwrap();
    assert!(soon("closed", babbling.closed()).await.to_string().contains("no hello"));
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn hello_with_another_name_than_the_certificate_is_refused_in_words() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let raw = Raw::new(&cluster, "x9", Role::Proxy);
    for (name, role) in [("x8", Role::Proxy), ("x9", Role::DecodeNode)] {
        let connection = raw.dial(decode.local_addr(), Role::DecodeNode, ALPN_CONTROL).await.unwrap();
        let reply = greet(&connection, hello(name, role)).await;
        let reason = format!(
            "the hello is from {role} \"{name}\", the certificate was issued to proxy \"x9\": start the node with its own certificate"
        );
        assert_eq!(reply, HelloReply::Refused { reason: reason.clone() });
        assert!(soon("closed", connection.closed()).await.to_string().contains(&reason));
    }
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn other_protocol_version_is_refused_by_the_handshake() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let raw = Raw::new(&cluster, "x9", Role::Proxy);
    for alpn in [&b"tandem/99"[..], ALPN_BULK] {
        let error = raw.dial(decode.local_addr(), Role::DecodeNode, alpn).await.unwrap_err().to_string();
        assert!(error.contains("peer doesn't support any known protocol"), "{error}");
    }
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn server_of_another_protocol_is_told_apart_from_one_of_another_version() {
    let cluster = Cluster::new();
    let endpoint = Raw::new(&cluster, "d9", Role::DecodeNode).listen(b"h3");
    let addr = endpoint.local_addr().unwrap();
    let serving = tokio::spawn(async move { endpoint.accept().await.unwrap().await.is_err() });
    let proxy = cluster.start("x0", Role::Proxy);
    let error = soon("dial", proxy.dial(addr, Role::DecodeNode, None)).await.unwrap_err();
    assert!(error.to_string().contains("speaks no version of this protocol (this node speaks 2 and 1)"), "{error}");
    assert!(soon("server", serving).await.unwrap());
    assert_nothing_left([proxy]).await;
}

#[tokio::test]
async fn dialler_without_a_common_version_that_says_nothing_readable_still_gets_the_sentence() {
    let cluster = Cluster::new();
    let decode = cluster.start("d0", Role::DecodeNode);
    let raw = Raw::new(&cluster, "x9", Role::Proxy);
    for list in [&[0xff; 8][..], &[b'1'; 100_000]] {
        let connection = raw.dial(decode.local_addr(), Role::DecodeNode, b"tandem/versions").await.unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        // The accepter may have closed before all of it was sent.
        let _ = send.write_all(list).await;
        let _ = send.finish();
        let closed = soon("closed", connection.closed()).await.to_string();
        assert!(closed.contains("speaks others, which it does not name, the accepting node 2 and 1"), "{closed}");
    }
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn answer_that_is_no_message_is_an_error_and_not_a_panic() {
    let cluster = Cluster::new();
    let raw = Raw::new(&cluster, "d9", Role::DecodeNode);
    let endpoint = raw.listen(ALPN_CONTROL);
    let addr = endpoint.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        welcome(&connection, hello("d9", Role::DecodeNode)).await;
        let (mut send, recv) = connection.accept_bi().await.unwrap();
        send.write_all(&[&3u32.to_le_bytes()[..], &[0xff; 3]].concat()).await.unwrap();
        let stopped = send.stopped().await.unwrap().map(quinn::VarInt::into_inner);
        (stopped, recv, connection)
    });
    let proxy = cluster.start("x0", Role::Proxy);
    let link = soon("dial", proxy.dial(addr, Role::DecodeNode, None)).await.unwrap();
    let (_sender, mut receiver) = link.open(&generate(1)).await.unwrap();
    let end = soon("event", receiver.recv::<GenerateEvent>()).await;
    assert!(matches!(end, Err(RecvError::Malformed(_))), "{end:?}");
    assert_eq!(soon("server", serving).await.unwrap().0, Some(4));
    drop((link, _sender, receiver));
    assert_nothing_left([proxy]).await;
}

#[tokio::test]
async fn garbage_on_bulk_streams_is_refused_and_counted_and_genuine_kv_still_lands() {
    let cluster = Cluster::new();
    let raw = Raw::new(&cluster, "p9", Role::PrefillNode);
    let (control, bulk) = (raw.listen(ALPN_CONTROL), raw.listen(ALPN_BULK));
    let mut own = hello("p9", Role::PrefillNode);
    own.bulk_port = Some(bulk.local_addr().unwrap().port());
    let addr = control.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let links = control.accept().await.unwrap().await.unwrap();
        welcome(&links, own.clone()).await;
        let connection = bulk.accept().await.unwrap().await.unwrap();
        welcome(&connection, own).await;
        (links, connection, control, bulk)
    });
    let mut config = cluster.config("d0", Role::DecodeNode);
    // Longer than the threads of KV, which go last, may be without a core on a machine that is full.
    config.limits = FabricLimits { extent_deadline: Duration::from_secs(1), ..FabricLimits::default() };
    let decode = Fabric::bind(config).unwrap();
    let link = soon("dial", decode.dial(addr, Role::PrefillNode, None)).await.unwrap();
    let zone = decode.landing_zone();
    let receiver = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
    let (_links, connection, _control, _bulk) = soon("server", serving).await.unwrap();

    let job = Job::new(1, 64, 0, 0);
    let memory = TestMemory::new(8);
    let (landing, mut events) = zone.open(job.plan(&memory));
    let (header, payload) = job.sealed(job.extent(0, 0, 64));
    let stopped = async |send: SendStream| soon("stop", send.stopped()).await.unwrap().map(quinn::VarInt::into_inner);
    // Not a header, half a header and silence.
    for bytes in [&[0x55; 200][..], &header.encode()[..40]] {
        let mut send = connection.open_uni().await.unwrap();
        send.write_all(bytes).await.unwrap();
        assert_eq!(stopped(send).await, Some(5));
    }
    // A header and half its payload, then silence: the range is free again for who can send it.
    let mut send = connection.open_uni().await.unwrap();
    send.write_all(&header.encode()).await.unwrap();
    send.write_all(&payload[..payload.len() / 2]).await.unwrap();
    assert_eq!(stopped(send).await, Some(5));
    let event = soon("event", events.recv()).await.unwrap();
    assert_eq!(event, LandingEvent::ExtentRefused { reason: RefusedExtent::Stalled });
    let mut send = connection.open_uni().await.unwrap();
    send.write_all(&header.encode()).await.unwrap();
    send.write_all(&payload).await.unwrap();
    send.finish().unwrap();
    assert!(matches!(soon("event", events.recv()).await.unwrap(), LandingEvent::ExtentVerified { .. }));
    eventually("the verified extent is not counted any more", || decode.accounting().pinned_receive_bytes == 0).await;
    // A connection that goes away under an extent.
    let (header, payload) = job.sealed(job.extent(1, 0, 64));
    let mut send = connection.open_uni().await.unwrap();
    send.write_all(&header.encode()).await.unwrap();
    send.write_all(&payload[..payload.len() / 2]).await.unwrap();
    eventually("it lands", || decode.accounting().pinned_receive_bytes > 0).await;
    connection.close(0u32.into(), b"gone");
    let event = soon("event", events.recv()).await.unwrap();
    assert_eq!(event, LandingEvent::ExtentRefused { reason: RefusedExtent::ConnectionLost });

    drop((landing, receiver, zone, link));
    assert_nothing_left([decode]).await;
}

/// Passes datagrams between one client and a server, up to a size, until it is cut.
struct Relay {
    addr: SocketAddr,
    is_cut: Arc<AtomicBool>,
    largest: Arc<AtomicUsize>,
}

impl Relay {
    async fn to(server: SocketAddr, num_bytes_max: usize) -> Self {
        let front = Arc::new(tokio::net::UdpSocket::bind(LOOPBACK).await.unwrap());
        let back = Arc::new(tokio::net::UdpSocket::bind(LOOPBACK).await.unwrap());
        let addr = front.local_addr().unwrap();
        let (is_cut, largest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = Arc::new(std::sync::Mutex::new(None));
        for is_forward in [true, false] {
            let (from, to) = if is_forward { (front.clone(), back.clone()) } else { (back.clone(), front.clone()) };
            let (client, is_cut, largest) = (client.clone(), is_cut.clone(), largest.clone());
            tokio::spawn(async move {
                let mut buffer = vec![0; 1 << 16];
                loop {
                    let (len, sender) = from.recv_from(&mut buffer).await.unwrap();
                    if is_forward {
                        *client.lock().unwrap() = Some(sender);
                    }
                    let target = if is_forward { Some(server) } else { *client.lock().unwrap() };
                    if is_cut.load(Ordering::SeqCst) || len > num_bytes_max {
                        continue;
                    }
                    largest.fetch_max(len, Ordering::SeqCst);
                    let _ = to.send_to(&buffer[..len], target.unwrap()).await;
                }
            });
        }
        Self { addr, is_cut, largest }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peer_that_falls_silent_is_gone_at_both_ends_within_the_idle_limit() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let relay = Relay::to(decode.local_addr(), 1 << 16).await;
    let link = soon("dial", proxy.dial(relay.addr, Role::DecodeNode, None)).await.unwrap();
    let (sender, mut receiver) = link.open(&generate(1)).await.unwrap();
    let mut stream = soon("accept", decode.accept()).await.unwrap();
    // Idle, and kept alive well beyond the idle limit.
    let early = tokio::time::timeout(Duration::from_millis(2600), link.closed()).await;
    assert!(early.is_err(), "an idle link was lost: {early:?}");

    let cut_at = Instant::now();
    relay.is_cut.store(true, Ordering::SeqCst);
    let ends = async { tokio::join!(receiver.recv::<GenerateEvent>(), stream.sender.stopped(), link.closed()) };
    let (received, (), reason) = soon("both ends", ends).await;
    let noticed_after = cut_at.elapsed();
    assert!(matches!(received, Err(RecvError::ConnectionLost(_))), "{received:?}");
    assert_eq!(reason.to_string(), "the peer has been silent for longer than the idle limit");
    assert!(noticed_after < Duration::from_millis(2900), "noticed after {noticed_after:?}");
    assert!(stream.receiver.recv::<PrefillEvent>().await.is_err());
    drop((sender, receiver, stream, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_pass_a_path_of_1300_byte_datagrams() {
    let cluster = Cluster::new();
    let (proxy, decode) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let relay = Relay::to(decode.local_addr(), 1300).await;
    let link = soon("dial", proxy.dial(relay.addr, Role::DecodeNode, None)).await.unwrap();
    let Open::Generate(mut long) = generate(1) else { unreachable!() };
    long.tokens = (0..100_000).collect::<Vec<u32>>().into();
    let open = Open::Generate(long);
    let halves = soon("open", link.open(&open)).await.unwrap();
    let stream = soon("accept", decode.accept()).await.unwrap();
    assert!(stream.open == open);
    assert!((1200..=1300).contains(&relay.largest.load(Ordering::SeqCst)));
    drop((halves, stream, link));
    assert_nothing_left([proxy, decode]).await;
}

#[tokio::test]
async fn node_that_leaves_in_mid_hello_is_dialled_again_and_one_that_refuses_is_not() {
    let cluster = Cluster::new();
    let raw = Raw::new(&cluster, "d9", Role::DecodeNode);
    let proxy = cluster.start("x0", Role::Proxy);
    for (code, words, is_refusal) in [(0u32, "the node is leaving", false), (1, "not on this shift", true)] {
        let endpoint = raw.listen(ALPN_CONTROL);
        let addr = endpoint.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let connection = endpoint.accept().await.unwrap().await.unwrap();
            let _hello = connection.accept_bi().await.unwrap();
            connection.close(code.into(), words.as_bytes());
            endpoint.wait_idle().await;
        });
        let error = soon("dial", proxy.dial(addr, Role::DecodeNode, None)).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(matches!(error, DialError::RefusedByPeer { .. }), is_refusal, "{error}");
        assert_eq!(error.is_worth_a_retry(), !is_refusal, "{error}");
        soon("server", serving).await.unwrap();
    }
    assert_nothing_left([proxy]).await;
}
