//! A path between two nodes that carries datagrams of a limited size only, or loses some: between them on loopback, it
//! forwards what gets through and drops the rest.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use kv_connector::Fabric;

/// Where the far end seems to be.
const NEAR: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// What gets through.
#[derive(Default)]
struct Rule {
    size_max: AtomicUsize,
    /// One of so many is lost; 0: none.
    lost_every: AtomicUsize,
    num_seen: AtomicUsize,
    num_dropped: AtomicUsize,
}

impl Rule {
    fn carries(&self, num_bytes: usize) -> bool {
        let number = self.num_seen.fetch_add(1, Ordering::SeqCst);
        let lost_every = self.lost_every.load(Ordering::SeqCst);
        let is_lost = lost_every > 0 && number % lost_every == lost_every - 1;
        let carries = num_bytes <= self.size_max.load(Ordering::SeqCst) && !is_lost;
        self.num_dropped.fetch_add(usize::from(!carries), Ordering::SeqCst);
        carries
    }
}

/// The path; gone when this is dropped.
pub struct Relay {
    rule: Arc<Rule>,
    control: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Relay {
    /// In front of both ports of `fabric`, for one node that dials it.
    pub async fn before(fabric: &Fabric, size_max: usize) -> Self {
        let rule = Arc::new(Rule { size_max: size_max.into(), ..Rule::default() });
        let control = SocketAddr::from((NEAR, fabric.local_addr().port()));
        let mut tasks = JoinSet::new();
        for far in [fabric.local_addr(), fabric.bulk_addr().unwrap()] {
            let near = bind(SocketAddr::from((NEAR, far.port())));
            let onward = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
            onward.connect(far).await.unwrap();
            tasks.spawn(forward(near, onward, rule.clone()));
        }
        Self { rule, control, _tasks: tasks }
    }

    /// What is to be dialled.
    pub fn control(&self) -> SocketAddr {
        self.control
    }

    /// Carries up to `size_max` bytes from now on; with 0 nothing.
    pub fn carry(&self, size_max: usize) {
        self.rule.size_max.store(size_max, Ordering::SeqCst);
    }

    /// Loses one of so many datagrams from now on.
    pub fn lose_every(&self, num_datagrams: usize) {
        self.rule.lost_every.store(num_datagrams, Ordering::SeqCst);
    }

    pub fn num_dropped(&self) -> usize {
        self.rule.num_dropped.load(Ordering::SeqCst)
    }
}

fn bind(addr: SocketAddr) -> UdpSocket {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_recv_buffer_size(8 << 20).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&addr.into()).unwrap();
    UdpSocket::from_std(socket.into()).unwrap()
}

async fn forward(near: UdpSocket, onward: UdpSocket, rule: Arc<Rule>) {
    let (mut from_near, mut from_far) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut dialler = None;
    loop {
        // An error is that of an end that is gone, or of a datagram: a path does not tell.
        tokio::select! {
            Ok((len, addr)) = near.recv_from(&mut from_near) => {
                dialler = Some(addr);
                if rule.carries(len) {
                    let _ = onward.send(&from_near[..len]).await;
                }
            }
            Ok(len) = onward.recv(&mut from_far) => {
                if let Some(dialler) = dialler.filter(|_| rule.carries(len)) {
                    let _ = near.send_to(&from_far[..len], dialler).await;
                }
            }
            else => {}
        }
    }
}
