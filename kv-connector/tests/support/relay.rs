//! A path between two nodes that carries datagrams of a limited size only, or loses some, or whose parts break: between
//! them on loopback, it forwards what gets through and drops the rest.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

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
    /// Ways of bulk connections from this number on carry nothing, until they are mended.
    num_ways_whole: AtomicUsize,
}

impl Rule {
    /// Of the next connection's way, if it is broken from the first.
    fn fault_of_way(&self, number: usize) -> Option<WayFault> {
        let is_whole = number < self.num_ways_whole.load(Ordering::SeqCst);
        (!is_whole).then_some(WayFault { after_bytes: 0, size_max_to: 0, size_max_from: 0 })
    }

    fn carries(&self, num_bytes: usize) -> bool {
        let number = self.num_seen.fetch_add(1, Ordering::SeqCst);
        let lost_every = self.lost_every.load(Ordering::SeqCst);
        let is_lost = lost_every > 0 && number % lost_every == lost_every - 1;
        let carries = num_bytes <= self.size_max.load(Ordering::SeqCst) && !is_lost;
        self.num_dropped.fetch_add(usize::from(!carries), Ordering::SeqCst);
        carries
    }
}

/// What one connection's way has carried to the node that dialled it, and what it carries from some point on.
#[derive(Default)]
struct Way {
    num_bytes: usize,
    fault: Option<WayFault>,
}

/// A way that breaks.
#[derive(Debug, Clone, Copy)]
pub struct WayFault {
    /// It breaks when it has carried so many bytes more to the node that dialled.
    pub after_bytes: usize,
    /// Largest datagrams to that node, from then on.
    pub size_max_to: usize,
    /// Largest datagrams from that node, from then on.
    pub size_max_from: usize,
}

/// By the order in which they were dialled.
type Ways = Arc<Mutex<Vec<Way>>>;

/// Whether datagrams of that size get through to the dialler, or from it.
fn carries(ways: &Ways, number: usize, num_bytes: usize, is_to_dialler: bool) -> bool {
    let way = &mut ways.lock().unwrap()[number];
    let fault = way.fault.filter(|fault| way.num_bytes >= fault.after_bytes);
    let size_max =
        fault.map_or(usize::MAX, |fault| if is_to_dialler { fault.size_max_to } else { fault.size_max_from });
    let carries = num_bytes <= size_max;
    way.num_bytes += if carries && is_to_dialler { num_bytes } else { 0 };
    carries
}

/// The path; gone when this is dropped.
pub struct Relay {
    rule: Arc<Rule>,
    control: SocketAddr,
    bulk: Ways,
    _tasks: JoinSet<()>,
}

impl Relay {
    /// In front of both ports of `fabric`.
    pub async fn before(fabric: &Fabric, size_max: usize) -> Self {
        let rule = Rule { size_max: size_max.into(), num_ways_whole: usize::MAX.into(), ..Rule::default() };
        let rule = Arc::new(rule);
        let control = SocketAddr::from((NEAR, fabric.local_addr().port()));
        let mut tasks = JoinSet::new();
        let bulk = Ways::default();
        for (far, ways) in [(fabric.local_addr(), Ways::default()), (fabric.bulk_addr().unwrap(), bulk.clone())] {
            let near = bind(SocketAddr::from((NEAR, far.port())));
            tasks.spawn(forward(near.into(), far, rule.clone(), ways));
        }
        Self { rule, control, bulk, _tasks: tasks }
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

    /// Bytes that each bulk connection's way has carried to the node that dialled.
    pub fn bulk_bytes(&self) -> Vec<usize> {
        self.bulk.lock().unwrap().iter().map(|way| way.num_bytes).collect()
    }

    /// Ways of bulk connections that are dialled behind the first so many carry nothing, until they are mended.
    pub fn hold_ways_from(&self, number: usize) {
        self.rule.num_ways_whole.store(number, Ordering::SeqCst);
    }

    /// Lets the way of a bulk connection, by the order in which they were dialled, break as from now; or mends it.
    pub fn set_fault(&self, number: usize, fault: Option<WayFault>) {
        let way = &mut self.bulk.lock().unwrap()[number];
        way.fault = fault.map(|fault| WayFault { after_bytes: way.num_bytes + fault.after_bytes, ..fault });
    }
}

fn bind(addr: SocketAddr) -> UdpSocket {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_recv_buffer_size(8 << 20).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&addr.into()).unwrap();
    UdpSocket::from_std(socket.into()).unwrap()
}

/// Forwards for any number of diallers' sockets, each by a socket of its own.
async fn forward(near: Arc<UdpSocket>, far: SocketAddr, rule: Arc<Rule>, ways: Ways) {
    let mut onward: HashMap<SocketAddr, (usize, Arc<UdpSocket>)> = HashMap::new();
    let (mut buffer, mut tasks) = (vec![0; 1 << 16], JoinSet::new());
    loop {
        // An error is that of an end that is gone, or of a datagram: a path does not tell.
        let Ok((len, dialler)) = near.recv_from(&mut buffer).await else { continue };
        if !onward.contains_key(&dialler) {
            let socket = Arc::new(bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
            socket.connect(far).await.unwrap();
            let number = onward.len();
            ways.lock().unwrap().push(Way { num_bytes: 0, fault: rule.fault_of_way(number) });
            tasks.spawn(back((number, socket.clone()), (near.clone(), dialler), rule.clone(), ways.clone()));
            onward.insert(dialler, (number, socket));
        }
        let (number, socket) = &onward[&dialler];
        if carries(&ways, *number, len, false) && rule.carries(len) {
            let _ = socket.send(&buffer[..len]).await;
        }
    }
}

async fn back(
    (number, from): (usize, Arc<UdpSocket>),
    (near, dialler): (Arc<UdpSocket>, SocketAddr),
    rule: Arc<Rule>,
    ways: Ways,
) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let Ok(len) = from.recv(&mut buffer).await else { continue };
        if carries(&ways, number, len, true) && rule.carries(len) {
            let _ = near.send_to(&buffer[..len], dialler).await;
        }
    }
}
