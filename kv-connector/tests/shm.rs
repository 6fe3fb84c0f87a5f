//! KV that the receiver reads in the sender's memory: who may, what is refused, and what is left when either
//! end goes away in the middle.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::ids::{BlockId, Epoch, Role};
use common::kv_memory::{GranuleConversion, KvMemory};
use common::wire::bulk::EXTENT_HEADER_BYTES;
use common::wire::runs::{NUM_RUNS_MAX, encode_runs};
use common::wire::{ExtentHeader, HelloReply, PoolRun, Registration};
use kv_connector::transfer::{
    BulkReceiver, BulkSender, ExtentSource, Landing, LandingEvent, LandingEvents, LandingPlan, LandingZone,
    RefusedExtent, SendExtentError,
};
use kv_connector::{CloseReason, Fabric, Link};
use quinn::Connection;
use support::file_pool::{FilePool, scattered};
use support::one_core::use_one_core;
use support::other_user::as_other_user;
use support::raw::{ALPN_BULK, ALPN_CONTROL, Raw, greet, welcome, welcome_with};
use support::values::Values;
use support::{Cluster, GRANULE_BYTES, Job, TestMemory, assert_nothing_left, eventually, hello, node, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

const NUM_BLOCKS: usize = 256;

/// A prefill node that shares its pool and a decode node that reads it.
struct Pair {
    prefill: Fabric,
    decode: Fabric,
    zone: LandingZone,
    bulk: BulkReceiver,
    sender: BulkSender,
    link: Link,
    pool: Arc<FilePool>,
}

impl Pair {
    async fn new() -> Self {
        Self::with(true, FilePool::new(NUM_BLOCKS)).await
    }

    async fn with(is_reading: bool, pool: Arc<FilePool>) -> Self {
        let cluster = Cluster::new();
        let mut config = cluster.config("p0", Role::PrefillNode);
        config.shared_pool = Some(pool.shared());
        let prefill = Fabric::bind(config).unwrap();
        let mut config = cluster.config("d0", Role::DecodeNode);
        config.is_reading_shared_pools = is_reading;
        let decode = Fabric::bind(config).unwrap();
        let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
        let zone = decode.landing_zone();
        let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
        let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
        Self { prefill, decode, zone, bulk, sender, link, pool }
    }

    async fn end(self) {
        let Self { prefill, decode, zone, bulk, sender, link, .. } = self;
        drop((zone, bulk, sender, link));
        assert_nothing_left([prefill, decode]).await;
    }
}

/// A job and its KV in the sender's pool.
fn sent_from(pool: &Arc<FilePool>, num_tokens: usize) -> (Job, ExtentSource) {
    let job = Job::new(1, num_tokens, 0, 0);
    let source = pool.source(&job, scattered(0, job.blocks.len()));
    (job, source)
}

fn refused(reason: RefusedExtent) -> LandingEvent {
    LandingEvent::ExtentRefused { reason }
}

async fn next(events: &mut LandingEvents) -> LandingEvent {
    soon("a landing event", events.recv()).await.unwrap()
}

#[tokio::test]
async fn one_end_without_shm_makes_it_quic_and_kv_arrives_all_the_same() {
    let unsealed = FilePool::sealed(NUM_BLOCKS, libc::F_SEAL_GROW);
    for (pair, name) in [
        (Pair::new().await, "shm"),
        (Pair::with(false, FilePool::new(NUM_BLOCKS)).await, "quic"),
        (Pair::with(true, unsealed).await, "quic"),
    ] {
        assert_eq!((pair.bulk.transport_name(), pair.sender.transport().name()), (name, name));
        let (job, source) = sent_from(&pair.pool, 100);
        let memory = TestMemory::new(NUM_BLOCKS);
        let (landing, _events) = pair.zone.open(job.plan(&memory));
        for extent in job.extents(48) {
            let (header, payload) = source.seal(&job.tokens, extent);
            soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
        }
        eventually("all has landed", || landing.is_complete()).await;
        assert!(job.extents(48).iter().all(|extent| job.holds(&memory, extent)));
        drop((landing, source));
        pair.end().await;
    }
}

/// A pool that keeps every other byte of a granule. Its blocks are in order.
struct Narrow(Mutex<Vec<Vec<u8>>>);

impl Narrow {
    const GRANULE_BYTES: usize = GRANULE_BYTES / 2;

    fn new(num_granules: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![vec![0xee; num_granules * Self::GRANULE_BYTES]; support::NUM_LAYERS])))
    }
}

impl GranuleConversion for Narrow {
    fn source_granule_bytes(&self) -> usize {
        GRANULE_BYTES
    }

    fn convert(&self, source: &[u8], out: &mut [u8]) {
        assert!(source.len().is_multiple_of(GRANULE_BYTES) && source.len() == out.len() * 2, "whole granules");
        out.iter_mut().zip(source.iter().step_by(2)).for_each(|(out, source)| *out = *source);
    }
}

impl KvMemory for Narrow {
    fn write_at(&self, layer: u32, _: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        let start = first_granule * Self::GRANULE_BYTES + byte_offset;
        self.0.lock().unwrap()[layer as usize][start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn read_granules(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &mut [u8]) {
        unreachable!("what is here is not what the digest speaks of");
    }

    fn visit_granules(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &mut dyn FnMut(u64, &[u8])) {
        unreachable!("what is here is not what the digest speaks of");
    }

    fn granule_bytes(&self) -> usize {
        Self::GRANULE_BYTES
    }

    fn num_layers(&self) -> usize {
        support::NUM_LAYERS
    }
}

#[tokio::test]
async fn granules_of_another_form_and_size_are_converted_on_their_way_over_either_transport() {
    for (pair, name) in [(Pair::new().await, "shm"), (Pair::with(false, FilePool::new(NUM_BLOCKS)).await, "quic")] {
        assert_eq!(pair.bulk.transport_name(), name);
        // More than what is converted at a time, and a tail.
        let (job, source) = sent_from(&pair.pool, 4000);
        let memory = Narrow::new(250);
        let plan =
            LandingPlan { memory: memory.clone(), conversion: Some(memory.clone()), ..job.plan(&TestMemory::new(1)) };
        let (landing, mut events) = pair.zone.open(plan);
        let damaged = job.extent(1, 0, 3008);
        let (header, payload) = source.seal(&job.tokens, damaged);
        pair.pool.damage(1, &source.blocks, 187);
        let _ = soon("send", pair.sender.send_extent(&header, payload)).await;
        assert_eq!(next(&mut events).await, refused(RefusedExtent::Corrupted));
        pair.pool.damage(1, &source.blocks, 187);
        for extent in job.extents(3008) {
            let (header, payload) = source.seal(&job.tokens, extent);
            soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
            match next(&mut events).await {
                LandingEvent::ExtentVerified { num_bytes, .. } => {
                    assert_eq!(num_bytes as usize, job.payload(&extent).len(), "as it travelled");
                }
                event => panic!("{event:?}"),
            }
        }
        assert!(landing.is_complete());
        for layer in 0..support::NUM_LAYERS {
            let sent = job.payload(&job.extent(layer as u16, 0, 4000));
            let expected: Vec<u8> = sent.iter().step_by(2).copied().collect();
            assert!(memory.0.lock().unwrap()[layer] == expected, "layer {layer} over {name}");
        }
        drop((landing, source));
        pair.end().await;
    }
}

#[tokio::test]
async fn sending_ends_when_the_receiver_has_verified() {
    let pair = Pair::new().await;
    let (job, source) = sent_from(&pair.pool, 1600);
    let memory = TestMemory::new(NUM_BLOCKS);
    let (landing, mut events) = pair.zone.open(job.plan(&memory));
    for extent in job.extents(1600) {
        let (header, payload) = source.seal(&job.tokens, extent);
        soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
        // No waiting: it is there.
        assert!(matches!(events.try_recv(), Some(LandingEvent::ExtentVerified { .. })));
        pair.pool.damage(u32::from(extent.layer), &source.blocks, 3);
        assert!(job.holds(&memory, &extent));
    }
    assert!(landing.is_complete());
    drop((landing, source));
    pair.end().await;
}

#[tokio::test]
async fn block_that_changes_between_digest_and_copy_is_refused_as_corrupted() {
    let pair = Pair::new().await;
    let (job, source) = sent_from(&pair.pool, 200);
    let memory = TestMemory::new(NUM_BLOCKS);
    let (landing, mut events) = pair.zone.open(job.plan(&memory));
    let (header, payload) = source.seal(&job.tokens, job.extent(1, 0, 200));
    for granule in [0, 5, 12] {
        pair.pool.damage(1, &source.blocks, granule);
        let sent = soon("send", pair.sender.send_extent(&header, payload.clone())).await;
        assert_eq!(sent, Err(SendExtentError::Refused));
        assert_eq!(next(&mut events).await, refused(RefusedExtent::Corrupted));
        pair.pool.damage(1, &source.blocks, granule);
    }
    soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    drop((landing, source));
    pair.end().await;
}

/// Lets as many pieces of an extent be written as it is told.
struct Gate {
    inner: Arc<TestMemory>,
    num_begun: AtomicUsize,
    num_let: (Mutex<usize>, Condvar),
}

impl Gate {
    fn new() -> Arc<Self> {
        let inner = TestMemory::new(NUM_BLOCKS);
        Arc::new(Self { inner, num_begun: AtomicUsize::new(0), num_let: Default::default() })
    }

    fn let_one(&self) {
        *self.num_let.0.lock().unwrap() += 1;
        self.num_let.1.notify_all();
    }

    /// Pieces that are written, or wait for it.
    fn num_begun(&self) -> usize {
        self.num_begun.load(Ordering::SeqCst)
    }
}

impl KvMemory for Gate {
    fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        self.num_begun.fetch_add(1, Ordering::SeqCst);
        let num_let = self.num_let.0.lock().unwrap();
        // With a limit: a runtime waits for its tasks, and a test that fails must end.
        let wait = || self.num_let.1.wait_timeout_while(num_let, support::SOON, |num_let| *num_let == 0).unwrap();
        // The connections live on meanwhile, whoever of the runtime's threads looks after them.
        let let_in = tokio::task::block_in_place(wait);
        let (mut num_let, _) = let_in;
        *num_let = num_let.saturating_sub(1);
        drop(num_let);
        self.inner.write_at(layer, blocks, first_granule, byte_offset, bytes);
    }

    fn read_granules(&self, layer: u32, blocks: &[BlockId], first: usize, num_granules: usize, out: &mut [u8]) {
        self.inner.read_granules(layer, blocks, first, num_granules, out);
    }

    fn visit_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) {
        self.inner.visit_granules(layer, blocks, first, num_granules, visit);
    }

    fn granule_bytes(&self) -> usize {
        GRANULE_BYTES
    }

    fn num_layers(&self) -> usize {
        support::NUM_LAYERS
    }
}

/// Slices of 64 granules.
const NUM_SLICES: usize = 8;

/// An extent whose copying has begun and waits in its first slice, which is copied and not written.
struct Midway {
    pair: Pair,
    job: Job,
    source: ExtentSource,
    gate: Arc<Gate>,
    landing: Landing,
    events: LandingEvents,
    sending: tokio::task::JoinHandle<Result<(), SendExtentError>>,
}

impl Midway {
    async fn new() -> Self {
        let pair = Pair::new().await;
        let (job, source) = sent_from(&pair.pool, NUM_SLICES * 1024);
        let gate = Gate::new();
        let plan = LandingPlan { memory: gate.clone(), ..job.plan(&TestMemory::new(1)) };
        let (landing, events) = pair.zone.open(plan);
        let (header, payload) = source.seal(&job.tokens, job.extent(2, 0, NUM_SLICES * 1024));
        let sender = pair.sender.clone();
        let sending = tokio::spawn(async move { sender.send_extent(&header, payload).await });
        eventually("the first slice is there", || gate.num_begun() == 1).await;
        assert!(pair.decode.accounting().pinned_receive_bytes > 0 && !sending.is_finished());
        Self { pair, job, source, gate, landing, events, sending }
    }
}

/// What is hashed is what was copied: no second look at the sender's memory decides, neither for nor against.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn block_that_changes_behind_the_copying_is_not_looked_at_again_and_one_before_it_is_noticed() {
    for (granule, is_noticed) in [(3, false), (NUM_SLICES * 64 - 3, true)] {
        let Midway { pair, job, source, gate, landing, mut events, sending } = Midway::new().await;
        pair.pool.damage(2, &source.blocks, granule);
        (0..NUM_SLICES).for_each(|_| gate.let_one());
        let sent = soon("the send ends", sending).await.unwrap();
        if is_noticed {
            assert_eq!(sent, Err(SendExtentError::Refused));
            assert_eq!(next(&mut events).await, refused(RefusedExtent::Corrupted));
        } else {
            assert_eq!(sent, Ok(()));
            assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
            assert!(job.holds(&gate.inner, &job.extent(2, 0, NUM_SLICES * 1024)));
        }
        drop((landing, source));
        pair.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sender_that_gives_up_midway_stops_the_copying() {
    let Midway { pair, gate, landing, mut events, sending, .. } = Midway::new().await;
    sending.abort();
    assert!(sending.await.unwrap_err().is_cancelled());
    // Its word is before this extent's in the socket.
    let other = Job::new(2, 16, 0, 60);
    let memory = TestMemory::new(NUM_BLOCKS);
    let (other_landing, _other_events) = pair.zone.open(other.plan(&memory));
    let source = pair.pool.source(&other, scattered(60, 1));
    let (header, payload) = source.seal(&other.tokens, other.extent(0, 0, 16));
    soon("send", pair.sender.send_extent(&header, payload)).await.unwrap();
    gate.let_one();
    assert_eq!(next(&mut events).await, refused(RefusedExtent::Reset));
    assert_eq!(gate.num_begun(), 1);
    drop((landing, other_landing, source));
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn landing_that_is_closed_midway_stops_the_copying() {
    let Midway { pair, gate, landing, mut events, sending, .. } = Midway::new().await;
    let closing = tokio::task::spawn_blocking(move || {
        landing.close();
        landing
    });
    eventually("the landing is forgotten", || pair.zone.num_landings() == 0).await;
    // It waits for the slice that is being written, and for another one at most if it came late.
    let mut num_let = 0;
    while !closing.is_finished() {
        assert!(num_let < NUM_SLICES - 1, "the copying goes on beside a landing that closes");
        gate.let_one();
        num_let += 1;
        eventually("it closes, or the next slice begins", || closing.is_finished() || gate.num_begun() > num_let).await;
    }
    let landing = closing.await.unwrap();
    assert_eq!(soon("the send ends", sending).await.unwrap(), Err(SendExtentError::Refused));
    assert_eq!(gate.num_begun(), num_let);
    assert!(events.try_recv().is_none());
    drop(landing);
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connection_that_is_lost_midway_stops_the_copying() {
    let Midway { pair, gate, landing, mut events, sending, .. } = Midway::new().await;
    let Pair { prefill, decode, zone, bulk, sender, link, .. } = pair;
    drop(bulk);
    assert!(matches!(soon("the send ends", sending).await.unwrap(), Err(SendExtentError::ConnectionLost(_))));
    eventually("the sender hears of it", || sender.is_closed()).await;
    // The slice that is being written, and others if the receiver is late to hear of it.
    let mut num_let = 0;
    while events.is_empty() {
        assert!(num_let < NUM_SLICES - 1, "the copying goes on without a connection");
        gate.let_one();
        num_let += 1;
        eventually("it stops, or the next slice begins", || !events.is_empty() || gate.num_begun() > num_let).await;
    }
    assert_eq!(next(&mut events).await, refused(RefusedExtent::ConnectionLost));
    assert_eq!(gate.num_begun(), num_let);
    drop((landing, zone, sender, link));
    assert_nothing_left([prefill, decode]).await;
}

/// A sender that holds a certificate, lets its pool be mapped, and says what it likes.
struct RawSender {
    decode: Fabric,
    receiver: BulkReceiver,
    zone: LandingZone,
    pool: Arc<FilePool>,
    socket: UnixStream,
    next_id: u64,
    _kept: (Link, Connection, Connection, [quinn::Endpoint; 2]),
}

fn socket_name(registration: &Registration) -> String {
    format!("\0tandem-kv-mailbox-{:032x}", registration.socket)
}

/// Where the socket was when it was closed as soon as the pool was handed over.
fn earlier_socket_name(registration: &Registration) -> String {
    format!("\0tandem-kv-{:032x}", registration.socket)
}

const EXTENT: u8 = 1;
const GIVE_UP: u8 = 2;

fn message(kind: u8, id: u64, num_bytes: u32, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &id.to_le_bytes(), &num_bytes.to_le_bytes(), body].concat()
}

impl RawSender {
    async fn new(name: &str) -> Self {
        Self::with(name, support::SOON).await
    }

    async fn with(name: &str, deadline: Duration) -> Self {
        let cluster = Cluster::new();
        let pool = FilePool::new(NUM_BLOCKS);
        let registration = Registration { socket: rand::random(), token: 5, num_bytes: pool.num_bytes() };
        let listener = UnixListener::bind(socket_name(&registration)).unwrap();
        let shared = pool.clone();
        let attaching = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            assert_eq!(socket.read_u128_le().await.unwrap(), 5);
            shared.send_over(&socket);
            assert_eq!(socket.read_u8().await.unwrap(), 1);
            socket.write_all(&[1]).await.unwrap();
            socket
        });
        let raw = Raw::new(&cluster, "p9", Role::PrefillNode);
        let (control, bulk) = (raw.listen(ALPN_CONTROL), raw.listen(ALPN_BULK));
        let mut own = hello("p9", Role::PrefillNode);
        own.bulk_port = Some(bulk.local_addr().unwrap().port());
        let addr = control.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let link = control.accept().await.unwrap().await.unwrap();
            welcome(&link, own.clone()).await;
            let connection = bulk.accept().await.unwrap().await.unwrap();
            welcome_with(&connection, own, Some(registration)).await;
            (link, connection, [control, bulk])
        });
        let mut config = cluster.config(&format!("d-{name}"), Role::DecodeNode);
        config.limits.extent_deadline = deadline;
        config.is_reading_shared_pools = true;
        let decode = Fabric::bind(config).unwrap();
        let link = soon("dial", decode.dial(addr, Role::PrefillNode, None)).await.unwrap();
        let zone = decode.landing_zone();
        let receiver = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
        assert_eq!(receiver.transport_name(), "shm");
        let (raw_link, connection, endpoints) = soon("server", serving).await.unwrap();
        let socket = soon("socket", attaching).await.unwrap();
        let _kept = (link, raw_link, connection, endpoints);
        Self { decode, receiver, zone, pool, socket, next_id: 0, _kept }
    }

    /// Sends these bytes as an extent, and says whether it was taken.
    async fn send(&mut self, body: &[u8]) -> bool {
        let id = self.next_id;
        self.next_id += 1;
        self.socket.write_all(&message(EXTENT, id, body.len() as u32, body)).await.unwrap();
        let mut answer = [0; 9];
        soon("an answer", self.socket.read_exact(&mut answer)).await.unwrap();
        assert_eq!(answer[..8], id.to_le_bytes());
        answer[8] == 1
    }

    async fn end(self) {
        let Self { decode, receiver, zone, socket, _kept, .. } = self;
        drop((receiver, zone, socket, _kept));
        assert_nothing_left([decode]).await;
    }
}

/// A prefill node that shares `pool`, a bulk connection to it, and what it announced there.
async fn registered(
    cluster: &Cluster,
    name: &str,
    pool: &Arc<FilePool>,
    attach_deadline: Duration,
) -> (Fabric, Connection, Registration) {
    let mut config = cluster.config(&format!("p-{name}"), Role::PrefillNode);
    config.shared_pool = Some(pool.shared());
    config.limits.attach_deadline = attach_deadline;
    let prefill = Fabric::bind(config).unwrap();
    let (connection, registration) = register(cluster, &prefill, "d9").await;
    (prefill, connection, registration)
}

async fn register(cluster: &Cluster, prefill: &Fabric, name: &str) -> (Connection, Registration) {
    let raw = Raw::new(cluster, name, Role::DecodeNode);
    let connection = raw.dial(prefill.bulk_addr().unwrap(), Role::PrefillNode, ALPN_BULK).await.unwrap();
    let HelloReply::Welcome { registration, .. } = greet(&connection, hello(name, Role::DecodeNode)).await else {
        panic!("it is not welcome")
    };
    (connection, registration.unwrap())
}

fn extent(header: &ExtentHeader, runs: &[PoolRun]) -> Vec<u8> {
    [&header.encode()[..], &encode_runs(runs)].concat()
}

#[tokio::test]
async fn places_that_cannot_be_the_payload_are_refused_and_counted() {
    let values = Values::install();
    let mut peer = RawSender::new("places").await;
    let (job, source) = sent_from(&peer.pool, 64);
    let memory = TestMemory::new(NUM_BLOCKS);
    let (landing, mut events) = peer.zone.open(job.plan(&memory));
    let (header, _) = source.seal(&job.tokens, job.extent(0, 0, 64));
    let (end, len) = (peer.pool.num_bytes(), header.num_payload_bytes);
    let run = |offset: u64, num_bytes: u32| PoolRun { offset, num_bytes };
    let count = EXTENT_HEADER_BYTES..EXTENT_HEADER_BYTES + 4;
    let mut many = extent(&header, &vec![run(0, 1); NUM_RUNS_MAX]);
    many[count.clone()].copy_from_slice(&(NUM_RUNS_MAX as u32 + 1).to_le_bytes());
    let mut all = extent(&header, &[run(0, len)]);
    all[count].copy_from_slice(&u32::MAX.to_le_bytes());
    let cases = [
        (extent(&header, &[run(end - 10, len)]), RefusedExtent::BadRuns),
        (extent(&header, &[run(u64::MAX - 10, len)]), RefusedExtent::BadRuns),
        (extent(&header, &[run(0, len - 10), run(end - 9, 10)]), RefusedExtent::BadRuns),
        (extent(&header, &[run(0, len / 2), run(u64::from(len) / 2 - 1, len / 2)]), RefusedExtent::BadRuns),
        (extent(&header, &[run(0, len), run(0, 0)]), RefusedExtent::BadRuns),
        (many, RefusedExtent::BadRuns),
        (all, RefusedExtent::BadRuns),
        ([extent(&header, &[run(0, len)]), vec![0]].concat(), RefusedExtent::BadRuns),
        (extent(&header, &[]), RefusedExtent::Truncated),
        (extent(&header, &[run(0, len - 1)]), RefusedExtent::Truncated),
        (extent(&header, &[run(0, len)])[..EXTENT_HEADER_BYTES + 9].to_vec(), RefusedExtent::Truncated),
        (extent(&header, &[run(0, len + 1)]), RefusedExtent::WrongSize),
        // Of the right length, and somebody else's.
        (extent(&header, &[run(end - u64::from(len), len)]), RefusedExtent::Corrupted),
    ];
    for (bytes, reason) in &cases {
        assert!(!peer.send(bytes).await);
        assert_eq!(next(&mut events).await, refused(*reason));
    }
    for reason in [RefusedExtent::BadRuns, RefusedExtent::Truncated, RefusedExtent::WrongSize, RefusedExtent::Corrupted]
    {
        let num_expected = cases.iter().filter(|(_, expected)| *expected == reason).count() as u64;
        let counted = values.count(&format!("tandem_refused_extents_total d-places {}", reason.as_str()));
        assert_eq!(counted, num_expected, "{reason:?}");
    }
    // Garbage instead of a header, less than one, and nothing; and the genuine extent is taken in spite of all that.
    for garbage in [&[0x55; 200][..], &[0x55; EXTENT_HEADER_BYTES - 1], &[]] {
        assert!(!peer.send(garbage).await);
    }
    assert_eq!(values.count("tandem_refused_extents_total d-places malformed"), 3);
    let genuine: Vec<PoolRun> = source.blocks.iter().map(|block| run(u64::from(block.0) * 2048, 2048)).collect();
    assert!(peer.send(&extent(&header, &genuine)).await);
    assert!(matches!(next(&mut events).await, LandingEvent::ExtentVerified { .. }));
    assert_eq!(values.count("tandem_fabric_extent_bytes_total d-places verified shm"), u64::from(len));
    drop((landing, source));
    peer.end().await;
}

#[tokio::test]
async fn what_is_no_message_ends_the_connection_and_nothing_is_left() {
    // What was begun is not answered while what follows it is read.
    use_one_core();
    let garbage = |bytes: &[u8]| bytes.to_vec();
    let many: Vec<u8> = (0..=256).flat_map(|id| message(EXTENT, id, 0, &[])).collect();
    let mut cases = vec![
        garbage(&[0x55; 13]),
        message(EXTENT, 0, u32::MAX, &[]),
        // One run more than there may be.
        message(EXTENT, 0, (EXTENT_HEADER_BYTES + 4 + (NUM_RUNS_MAX + 1) * 12) as u32, &[]),
        message(GIVE_UP, 0, 1, &[0]),
        // An id twice, and more than may be on the way.
        [message(EXTENT, 3, 0, &[]), message(EXTENT, 3, 0, &[])].concat(),
    ];
    // Answers are waiting for the end of a turn when it comes in the middle of closing the connection, or not.
    cases.extend(vec![many; 10]);
    for (index, bytes) in cases.into_iter().enumerate() {
        let mut peer = RawSender::new(&format!("garbage{index}")).await;
        // To give up what was never begun is no fault: it may have been answered.
        peer.socket.write_all(&message(GIVE_UP, 9, 0, &[])).await.unwrap();
        peer.socket.write_all(&bytes).await.unwrap();
        assert_eq!(soon("the connection ends", peer.receiver.closed()).await, CloseReason::ClosedHere, "case {index}");
        peer.end().await;
    }
}

/// More than the kernel keeps for a peer that does not read, and what a node may keep besides.
const NUM_UNREAD: usize = 20_000;

#[tokio::test]
async fn sender_that_reads_no_answers_ends_the_connection() {
    let values = Values::install();
    let mut peer = RawSender::new("unread").await;
    for id in 0..NUM_UNREAD as u64 {
        if peer.socket.write_all(&message(EXTENT, id, 0, &[])).await.is_err() {
            break;
        }
        // One after the other: never more on the way than may be.
        let is_answered = || {
            let num_refused = values.count("tandem_refused_extents_total d-unread malformed");
            num_refused == id + 1 || peer.receiver.is_closed()
        };
        eventually("it is refused", is_answered).await;
    }
    let closed = soon("answers are not kept for who does not read them", peer.receiver.closed()).await;
    assert_eq!(closed, CloseReason::ClosedHere);
    peer.end().await;
}

#[tokio::test]
async fn message_whose_rest_never_comes_ends_the_connection() {
    let mut peer = RawSender::with("stalling", Duration::from_millis(200)).await;
    peer.socket.write_all(&message(EXTENT, 0, 100, &[0; 99])).await.unwrap();
    assert_eq!(soon("the connection ends", peer.receiver.closed()).await, CloseReason::ClosedHere);
    peer.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sender_that_closes_the_socket_ends_the_connection_and_what_is_on_the_way() {
    let mut peer = RawSender::new("closing").await;
    let (job, source) = sent_from(&peer.pool, NUM_SLICES * 1024);
    let gate = Gate::new();
    let plan = LandingPlan { memory: gate.clone(), ..job.plan(&TestMemory::new(1)) };
    let (landing, mut events) = peer.zone.open(plan);
    let (header, _) = source.seal(&job.tokens, job.extent(0, 0, NUM_SLICES * 1024));
    let run = PoolRun { offset: 0, num_bytes: header.num_payload_bytes };
    let body = extent(&header, &[run]);
    peer.socket.write_all(&message(EXTENT, 0, body.len() as u32, &body)).await.unwrap();
    eventually("the first slice is there", || gate.num_begun() == 1).await;
    peer.socket.shutdown().await.unwrap();
    // Whoever closes it has told the copying before.
    assert_eq!(soon("the connection ends", peer.receiver.closed()).await, CloseReason::ClosedHere);
    gate.let_one();
    assert_eq!(next(&mut events).await, refused(RefusedExtent::ConnectionLost));
    assert_eq!(gate.num_begun(), 1);
    drop((landing, source));
    peer.end().await;
}

/// What the other end of the socket says to a token: nothing, or a byte that comes with the memory.
async fn show(registration: &Registration, token: u128) -> (UnixStream, Option<u8>) {
    let mut stream = UnixStream::connect(socket_name(registration)).await.unwrap();
    stream.write_all(&token.to_le_bytes()).await.unwrap();
    let answer = soon("an answer", stream.read_u8()).await.ok();
    (stream, answer)
}

#[tokio::test]
async fn token_works_once_and_for_as_long_as_its_connection() {
    let values = Values::install();
    let refused = |reason: &str| values.count(&format!("tandem_refused_connections_total p-tokens shm_{reason}"));
    let cluster = Cluster::new();
    let pool = FilePool::new(1);
    let (prefill, connection, first) = registered(&cluster, "tokens", &pool, Duration::from_millis(200)).await;
    let (other_connection, second) = register(&cluster, &prefill, "d8").await;
    assert_eq!((first.socket, first.num_bytes), (second.socket, pool.num_bytes()));
    assert_ne!(first.token, second.token);
    assert_eq!(prefill.accounting().registrations, 2);

    // Nor is anybody where an earlier version would look.
    assert!(UnixStream::connect(earlier_socket_name(&first)).await.is_err());

    assert_eq!(show(&first, first.token ^ 1).await.1, None);
    eventually("it is counted", || refused("token") == 1).await;
    let (kept, answer) = show(&first, first.token).await;
    assert_eq!(answer, Some(0));
    assert_eq!(show(&first, first.token).await.1, None, "a token was taken twice");
    eventually("it is counted", || refused("token") == 2).await;

    // The token of a connection that is gone.
    other_connection.close(0u32.into(), b"");
    eventually("it is forgotten", || prefill.accounting().registrations == 1).await;
    assert_eq!(show(&second, second.token).await.1, None);
    eventually("it is counted", || refused("token") == 3).await;

    // Who got the memory and never says that it is mapped does not make the sender use it.
    eventually("it is given up", || refused("stalled") == 1).await;
    assert_eq!(prefill.bulk_to(&node("d9"), Epoch(11)).unwrap().transport().name(), "quic");
    // Who says nothing at all.
    let silent = UnixStream::connect(socket_name(&first)).await.unwrap();
    eventually("it is given up", || refused("stalled") == 2).await;
    drop((silent, kept, connection));
    eventually("it is forgotten", || prefill.accounting().registrations == 0).await;
    assert_nothing_left([prefill]).await;
}

#[tokio::test]
async fn token_works_for_the_same_user_only() {
    let values = Values::install();
    let refused = |reason: &str| values.count(&format!("tandem_refused_connections_total p-users shm_{reason}"));
    let cluster = Cluster::new();
    let pool = FilePool::new(1);
    let (prefill, connection, registration) = registered(&cluster, "users", &pool, Duration::from_secs(30)).await;
    let shown = registration;
    let Some(stream) = as_other_user(move || {
        use std::os::linux::net::SocketAddrExt as _;
        let name = socket_name(&shown);
        let addr = std::os::unix::net::SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
        // Who connects is who called `connect`.
        let stream = std::os::unix::net::UnixStream::connect_addr(&addr).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }) else {
        println!("SKIPPED: to be another user, this test must be run as root");
        return;
    };
    let mut stream = UnixStream::from_std(stream).unwrap();
    // It may be closed before that.
    let _ = stream.write_all(&registration.token.to_le_bytes()).await;
    assert!(soon("the end", stream.read_u8()).await.is_err(), "another user got the pool");
    eventually("it is counted", || refused("user") == 1).await;
    assert_eq!((refused("token"), prefill.accounting().registrations), (0, 1));
    // Nor did it use the token up.
    let (kept, answer) = show(&registration, registration.token).await;
    assert_eq!(answer, Some(0));
    drop((kept, stream, connection));
    assert_nothing_left([prefill]).await;
}

/// A receiver that has mapped the sender's pool and says what it likes.
async fn raw_receiver(name: &str, pool: &Arc<FilePool>) -> (Fabric, Connection, UnixStream) {
    let (prefill, connection, registration) = registered(&Cluster::new(), name, pool, support::SOON).await;
    let (mut socket, answer) = show(&registration, registration.token).await;
    assert_eq!(answer, Some(0));
    socket.write_all(&[1]).await.unwrap();
    assert_eq!(soon("the sender's word", socket.read_u8()).await.unwrap(), 1);
    (prefill, connection, socket)
}

#[tokio::test]
async fn receiver_that_never_answers_is_sent_so_much_and_no_more_until_it_is_gone() {
    const NUM_ON_THE_WAY_MAX: usize = 256;
    let pool = FilePool::new(NUM_BLOCKS);
    let (job, source) = sent_from(&pool, 64);
    let (prefill, connection, mut socket) = raw_receiver("silent", &pool).await;
    let sender = prefill.bulk_to(&node("d9"), Epoch(11)).unwrap();
    assert_eq!(sender.transport().name(), "shm");
    let (header, payload) = source.seal(&job.tokens, job.extent(0, 0, 64));
    let mut sends = tokio::task::JoinSet::new();
    for _ in 0..=NUM_ON_THE_WAY_MAX {
        let (sender, payload) = (sender.clone(), payload.clone());
        sends.spawn(async move { sender.send_extent(&header, payload).await });
    }
    let mut head = [0; 13];
    for id in 0..NUM_ON_THE_WAY_MAX as u64 {
        soon("an extent", socket.read_exact(&mut head)).await.unwrap();
        let num_bytes = u32::from_le_bytes(*head.last_chunk().unwrap());
        assert_eq!(head[..], message(EXTENT, id, num_bytes, &[])[..]);
        soon("its places", socket.read_exact(&mut vec![0; num_bytes as usize])).await.unwrap();
    }
    assert_eq!(socket.try_read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    // One that is refused makes room for one.
    socket.write_all(&[&7u64.to_le_bytes()[..], &[0]].concat()).await.unwrap();
    assert_eq!(soon("a send ends", sends.join_next()).await.unwrap().unwrap(), Err(SendExtentError::Refused));
    soon("an extent", socket.read_exact(&mut head)).await.unwrap();
    assert_eq!(head[1..9], (NUM_ON_THE_WAY_MAX as u64).to_le_bytes());
    drop(socket);
    while let Some(sent) = soon("a send ends", sends.join_next()).await {
        assert!(matches!(sent.unwrap(), Err(SendExtentError::ConnectionLost(_))));
    }
    eventually("the sender hears of it", || sender.is_closed()).await;
    drop((source, payload, connection));
    assert_nothing_left([prefill]).await;
}

#[tokio::test]
async fn receiver_that_answers_what_it_has_not_read_ends_the_connection() {
    let pool = FilePool::new(NUM_BLOCKS);
    let (job, source) = sent_from(&pool, NUM_SLICES * 1024);
    let (prefill, connection, mut socket) = raw_receiver("unread", &pool).await;
    let sender = prefill.bulk_to(&node("d9"), Epoch(11)).unwrap();
    let (header, payload) = source.seal(&job.tokens, job.extent(0, 0, NUM_SLICES * 1024));
    let mut sent = Ok(());
    for id in 0..NUM_UNREAD as u64 {
        let mut sending = std::pin::pin!(sender.send_extent(&header, payload.clone()));
        // It is posted when it is first waited for.
        tokio::select! {
            biased;
            early = &mut sending => sent = early,
            () = std::future::ready(()) => {
                // Fails if the socket has ended, which the send says.
                let _ = socket.write_all(&[&id.to_le_bytes()[..], &[1]].concat()).await;
                sent = soon("the send ends", sending).await;
            }
        }
        if sent.is_err() {
            break;
        }
    }
    assert!(matches!(sent, Err(SendExtentError::ConnectionLost(_))), "places are kept for who does not read them");
    drop((source, payload, socket, connection));
    assert_nothing_left([prefill]).await;
}

#[tokio::test]
async fn answer_to_nothing_ends_the_connection() {
    let pool = FilePool::new(1);
    let (prefill, connection, mut socket) = raw_receiver("nonsense", &pool).await;
    socket.write_all(&[0; 9]).await.unwrap();
    soon("the connection ends", connection.closed()).await;
    assert_eq!(prefill.accounting().open_bulk_streams, 0);
    drop((socket, connection));
    assert_nothing_left([prefill]).await;
}

#[tokio::test]
async fn socket_that_is_elsewhere_makes_it_quic() {
    // What a node on another host sees, and one of a version that says something else over the socket: a registration
    // whose socket is not there.
    let registration = Registration { socket: rand::random(), token: 2, num_bytes: 1 << 40 };
    let earlier = UnixListener::bind(earlier_socket_name(&registration)).unwrap();
    let cluster = Cluster::new();
    let raw = Raw::new(&cluster, "p9", Role::PrefillNode);
    let (control, bulk) = (raw.listen(ALPN_CONTROL), raw.listen(ALPN_BULK));
    let mut own = hello("p9", Role::PrefillNode);
    own.bulk_port = Some(bulk.local_addr().unwrap().port());
    let addr = control.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let link = control.accept().await.unwrap().await.unwrap();
        welcome(&link, own.clone()).await;
        let connection = bulk.accept().await.unwrap().await.unwrap();
        welcome_with(&connection, own, Some(registration)).await;
        (link, connection, control, bulk)
    });
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.is_reading_shared_pools = true;
    let decode = Fabric::bind(config).unwrap();
    let link = soon("dial", decode.dial(addr, Role::PrefillNode, None)).await.unwrap();
    let receiver = soon("bulk", decode.connect_bulk(&link, &decode.landing_zone())).await.unwrap();
    assert_eq!((receiver.transport_name(), decode.accounting().registrations), ("quic", 0));
    drop((receiver, link, serving, earlier));
    assert_nothing_left([decode]).await;
}
