//! What every transport upholds, run over each of them, plain and with faults.
//!
//! An extent arrives whole and unchanged, or is refused, or never arrives. What counts as verified is
//! right byte for byte, what a landing reports is what was verified, nothing is written outside it or
//! after its end, and nothing is held when all is over.
//!
//! Every run prints its seed; `TANDEM_SEED=<seed> cargo test -p kv-connector --test transport_contract`
//! repeats one.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::content::GRANULE_TOKENS;
use common::ids::{Epoch, Role};
use common::wire::ExtentId;
use kv_connector::transfer::{FaultPlan, FaultyTransport, InjectedFaults, LandingEvent, LandingPlan, RefusedExtent};
use kv_connector::{BusyPolling, Fabric};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng, rngs::StdRng};
use support::device::OnDevice;
use support::file_pool::{FilePool, scattered};
use support::nixl::{self, library};
use support::{Cluster, GRANULE_BYTES, Job, NUM_LAYERS, SOON, TestMemory, assert_nothing_left, eventually, node, soon};

/// What a run saw.
#[derive(Debug, Default)]
struct Outcome {
    num_extents: usize,
    num_complete: usize,
    num_verified: usize,
    refused: Vec<RefusedExtent>,
    injected: InjectedFaults,
}

const NUM_JOBS: u32 = 6;
const BLOCKS_PER_JOB: u32 = 40;

/// The transports that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Quic {
        num_connections: u16,
    },
    Shm,
    CudaIpc,
    /// Between pools of either kind.
    Nixl {
        from_device: bool,
        to_device: bool,
    },
}

/// Those that can be had here.
fn all() -> impl Iterator<Item = Over> {
    let ends = [(false, false), (true, true), (true, false), (false, true)];
    let nixl = ends.map(|(from_device, to_device)| Over::Nixl { from_device, to_device });
    let nixl = nixl.into_iter().filter(|_| library().is_some());
    let quic = [1, 3].map(|num_connections| Over::Quic { num_connections });
    quic.into_iter().chain([Over::Shm, Over::CudaIpc]).chain(nixl)
}

impl Over {
    fn name(self) -> &'static str {
        match self {
            Over::Quic { .. } => "quic",
            Over::Shm => "shm",
            Over::CudaIpc => "cuda-ipc",
            Over::Nixl { .. } => "nixl",
        }
    }

    fn num_connections(self) -> u16 {
        match self {
            Over::Quic { num_connections } => num_connections,
            _ => 1,
        }
    }

    fn is_from_device(self) -> bool {
        matches!(self, Over::CudaIpc | Over::Nixl { from_device: true, .. })
    }

    fn is_to_device(self) -> bool {
        matches!(self, Over::CudaIpc | Over::Nixl { to_device: true, .. })
    }
}

/// With every other seed, so that each fault meets both.
fn busy_polling(seed: u64) -> Option<BusyPolling> {
    let time_max = Duration::from_micros(200);
    (seed % 2 == 1).then(|| BusyPolling { time_max, may_poll: Arc::new(|| true) })
}

/// Several hand-overs at a time from one prefill node to one decode node, extents in any order.
async fn run(over: Over, seed: u64, faults: Option<FaultPlan>) -> Outcome {
    println!("{over:?}, seed {seed}, {faults:?}");
    let mut rng = StdRng::seed_from_u64(seed);
    let cluster = Cluster::new();
    let injector: Arc<Mutex<Option<Arc<FaultyTransport>>>> = Arc::default();
    let mut config = cluster.config("p0", Role::PrefillNode);
    config.num_bulk_connections = over.num_connections();
    let pool = FilePool::new((NUM_JOBS * BLOCKS_PER_JOB) as usize);
    config.shared_pool = (over == Over::Shm).then(|| pool.shared());
    let exported = OnDevice::exported(&pool);
    config.device_pool = (over == Over::CudaIpc).then(|| exported.clone() as _);
    let nixl_of = |over: Over| library().filter(|_| over.name() == "nixl");
    let on_device = over.is_from_device().then_some(&exported);
    config.nixl = nixl_of(over).map(|library| nixl::of_sender(&library, &pool, on_device));
    config.busy_polling = busy_polling(seed);
    if let Some(plan) = faults {
        let injector = injector.clone();
        config.transport_layer = Some(Arc::new(move |inner| {
            let faulty = Arc::new(FaultyTransport::new(inner, plan));
            *injector.lock().unwrap() = Some(faulty.clone());
            faulty
        }));
    }
    config.limits.attach_deadline = SOON;
    let prefill = Fabric::bind(config).unwrap();
    let mut config = cluster.config("d0", Role::DecodeNode);
    config.num_bulk_connections = over.num_connections();
    config.limits.attach_deadline = SOON;
    config.is_reading_shared_pools = over == Over::Shm;
    let memory = TestMemory::new((NUM_JOBS * BLOCKS_PER_JOB) as usize);
    let own = OnDevice::new(&memory);
    config.device_pool = (over == Over::CudaIpc).then(|| own.clone() as _);
    let on_device = over.is_to_device().then_some(&own);
    config.nixl = nixl_of(over).map(|library| nixl::of_receiver(&library, &memory, on_device));
    config.busy_polling = busy_polling(seed);
    let decode = Fabric::bind(config).unwrap();
    let link = soon("dial", decode.dial(prefill.local_addr(), Role::PrefillNode, None)).await.unwrap();
    let zone = decode.landing_zone();
    let bulk = soon("bulk", decode.connect_bulk(&link, &zone)).await.unwrap();
    eventually("all connections", || bulk.num_connections() == usize::from(over.num_connections())).await;
    let sender = prefill.bulk_to(&node("d0"), Epoch(11)).unwrap();
    let name = over.name();
    assert_eq!(bulk.transport_name(), name);
    assert!([name, "faulty"].contains(&sender.transport().name()));

    let mut outcome = Outcome::default();
    let jobs: Vec<(Job, Vec<ExtentId>)> = (0..NUM_JOBS)
        .map(|index| {
            let num_tokens = rng.random_range(1..=1200);
            let num_held = rng.random_range(0..num_tokens) / GRANULE_TOKENS * GRANULE_TOKENS;
            let job = Job::new(u128::from(index) + 1, num_tokens, num_held, index * BLOCKS_PER_JOB);
            let extents = job.extents(GRANULE_TOKENS * rng.random_range(1..=40));
            outcome.num_extents += extents.len();
            (job, extents)
        })
        .collect();
    let plan = |job: &Job| match over.is_to_device() {
        true => LandingPlan { memory: own.clone(), ..job.plan(&memory) },
        false => job.plan(&memory),
    };
    let mut landings: Vec<_> = jobs.iter().map(|(job, _)| zone.open(plan(job))).collect();

    let sources: Vec<_> = jobs
        .iter()
        .enumerate()
        .map(|(index, (job, _))| {
            let mut source = pool.source(job, scattered(index as u32 * BLOCKS_PER_JOB, job.blocks.len()));
            if over.is_from_device() {
                source.memory = exported.clone();
            }
            source
        })
        .collect();
    let mut all: Vec<_> = jobs
        .iter()
        .zip(&sources)
        .flat_map(|((job, extents), source)| extents.iter().map(move |extent| (job, source, *extent)))
        .collect();
    all.shuffle(&mut rng);
    let mut sends = tokio::task::JoinSet::new();
    for (job, source, extent) in all {
        let ((header, payload), sender) = (source.seal(&job.tokens, extent), sender.clone());
        assert_eq!(header, job.sealed(extent).0);
        sends.spawn(async move { sender.send_extent(&header, payload).await.is_ok() });
    }
    // A receiver may refuse while its sender still writes, which is no failure of either.
    while let Some(sent) = soon("a send ends", sends.join_next()).await {
        sent.unwrap();
    }
    eventually("everything sent is settled", || {
        let now = decode.accounting();
        (now.open_bulk_streams, now.pinned_receive_bytes) == (0, 0)
    })
    .await;
    // The last streams may not have been accepted yet: a marker behind them on the same connection has been, once it
    // counts. Those that are sent at once go over different ones.
    let marker = Job::new(99, GRANULE_TOKENS, 0, 0);
    let elsewhere = TestMemory::new(1);
    for _ in 0..over.num_connections() {
        let (marked, mut marks) = zone.open(marker.plan(&elsewhere));
        soon("the marker", async {
            loop {
                let sealed = marker.extents(GRANULE_TOKENS).into_iter().map(|extent| marker.sealed(extent));
                let sends = sealed.map(async |(header, payload)| drop(sender.send_extent(&header, payload).await));
                futures::future::join_all(sends).await;
                let _ = tokio::time::timeout(Duration::from_millis(50), marks.recv()).await;
                if marked.is_complete() {
                    return;
                }
            }
        })
        .await;
    }
    eventually("everything is settled", || decode.accounting().open_bulk_streams == 0).await;

    for ((job, extents), (landing, events)) in jobs.iter().zip(&mut landings) {
        let mut verified = HashSet::new();
        let mut last = (job.num_held, false);
        while let Some(event) = events.try_recv() {
            match event {
                LandingEvent::ExtentVerified { extent, num_contiguous_tokens, is_complete, .. } => {
                    assert!(verified.insert(extent), "verified twice: {extent:?}");
                    assert!(job.holds(&memory, &extent), "verified and not what was sent: {extent:?}");
                    assert!(num_contiguous_tokens >= last.0 && is_complete >= last.1, "events out of order");
                    last = (num_contiguous_tokens, is_complete);
                }
                LandingEvent::ExtentRefused { reason } => outcome.refused.push(reason),
            }
        }
        assert_eq!((landing.num_contiguous_tokens(), landing.is_complete()), last);
        assert_eq!(landing.is_complete(), verified.len() == extents.len());
        let has_gap =
            |end: usize| extents.iter().any(|extent| (extent.first_token as usize) < end && !verified.contains(extent));
        assert!(!has_gap(last.0), "a gap below {} contiguous tokens", last.0);
        outcome.num_verified += verified.len();
        outcome.num_complete += usize::from(landing.is_complete());
    }
    assert_untouched(&memory, &jobs);
    outcome.injected = injector.lock().unwrap().as_ref().map(|faulty| faulty.injected()).unwrap_or_default();
    drop((landings, injector, bulk, sender, zone, link, sources));
    assert_nothing_left([prefill, decode]).await;
    println!("{over:?}, seed {seed}: {outcome:?}");
    outcome
}

/// Granules that no landing awaited still hold what they held.
fn assert_untouched(memory: &TestMemory, jobs: &[(Job, Vec<ExtentId>)]) {
    let num_awaited: usize =
        jobs.iter().map(|(job, _)| (job.tokens.len() - job.num_held).div_ceil(GRANULE_TOKENS)).sum();
    for layer in memory.bytes() {
        let num_granules = layer.len() / GRANULE_BYTES;
        let untouched = layer.chunks(GRANULE_BYTES).filter(|granule| granule.iter().all(|byte| *byte == 0xee)).count();
        assert!(untouched >= num_granules - num_awaited, "{untouched} of {num_granules} granules are untouched");
    }
    assert_eq!(memory.bytes().len(), NUM_LAYERS);
}

/// Fixed seeds, and one that is new in every run, over each transport; over NIXL's further pairings the new one alone.
fn seeds(num_fixed: u64) -> Vec<(Over, u64)> {
    let seeds: Vec<u64> = match std::env::var("TANDEM_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..num_fixed).chain([rand::random()]).collect(),
    };
    let of = |over: Over| {
        // NIXL takes a while to start, and what differs between its pairings has tests of its own.
        let num_seeds =
            if over.name() == "nixl" && (over.is_from_device() || over.is_to_device()) { 1 } else { seeds.len() };
        seeds.iter().rev().take(num_seeds).map(move |seed| (over, *seed)).collect::<Vec<_>>()
    };
    all().flat_map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_extent_is_delivered() {
    for (over, seed) in seeds(3) {
        let outcome = run(over, seed, None).await;
        assert_eq!(outcome.num_verified, outcome.num_extents, "{over:?}, seed {seed}");
        assert_eq!((outcome.num_complete, outcome.refused), (NUM_JOBS as usize, vec![]), "{over:?}, seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delay_and_duplication_change_nothing() {
    for (over, seed) in seeds(2) {
        let delay_max = Duration::from_millis(20);
        let plan = FaultPlan { seed, delay_max, duplication: 0.5, ..FaultPlan::default() };
        let outcome = run(over, seed, Some(plan)).await;
        assert!(outcome.injected.num_duplicated > 0, "{over:?}, seed {seed}");
        assert_eq!(outcome.num_verified, outcome.num_extents, "{over:?}, seed {seed}");
        assert_eq!((outcome.num_complete, outcome.refused), (NUM_JOBS as usize, vec![]), "{over:?}, seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_extent_is_missing_and_nothing_else() {
    for (over, seed) in seeds(2) {
        let outcome = run(over, seed, Some(FaultPlan { seed, loss: 0.2, ..FaultPlan::default() })).await;
        let injected = outcome.injected;
        assert!(outcome.refused.is_empty(), "{over:?}, seed {seed}");
        assert!(outcome.num_verified + injected.num_lost as usize >= outcome.num_extents, "{over:?}, seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupted_extent_is_refused_as_corrupted() {
    for (over, seed) in seeds(2) {
        let outcome = run(over, seed, Some(FaultPlan { seed, corruption: 0.2, ..FaultPlan::default() })).await;
        assert!(outcome.refused.iter().all(|reason| *reason == RefusedExtent::Corrupted), "{over:?}, seed {seed}");
        assert_eq!(outcome.num_verified + outcome.refused.len(), outcome.num_extents, "{over:?}, seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncated_extent_is_refused_as_truncated() {
    for (over, seed) in seeds(2) {
        let outcome = run(over, seed, Some(FaultPlan { seed, truncation: 0.2, ..FaultPlan::default() })).await;
        assert!(outcome.refused.iter().all(|reason| *reason == RefusedExtent::Truncated), "{over:?}, seed {seed}");
        assert_eq!(outcome.num_verified + outcome.refused.len(), outcome.num_extents, "{over:?}, seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extent_given_up_midway_is_not_verified() {
    for (over, seed) in seeds(2) {
        let outcome = run(over, seed, Some(FaultPlan { seed, reset: 0.2, ..FaultPlan::default() })).await;
        assert!(outcome.refused.iter().all(|reason| *reason == RefusedExtent::Reset), "{over:?}, seed {seed}");
        // Where the reset overtook the header, nobody could know whose extent it was.
        assert!(outcome.num_verified + outcome.refused.len() <= outcome.num_extents, "{over:?}, seed {seed}");
        assert!(
            outcome.num_verified + outcome.injected.num_reset as usize >= outcome.num_extents,
            "{over:?}, seed {seed}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_at_once_never_verifies_a_wrong_byte() {
    // A seed may give so few extents that no fault hits one; all seeds together do not.
    let (mut num_corrupted, mut num_verified) = (0, 0);
    for (over, seed) in seeds(4) {
        let plan = FaultPlan {
            seed,
            delay_max: Duration::from_millis(10),
            loss: 0.05,
            corruption: 0.1,
            truncation: 0.1,
            reset: 0.1,
            duplication: 0.2,
        };
        let outcome = run(over, seed, Some(plan)).await;
        num_corrupted += outcome.injected.num_corrupted;
        num_verified += outcome.num_verified;
    }
    assert!(num_corrupted > 0 && num_verified > 0, "{num_corrupted} corrupted, {num_verified} verified");
}

#[test]
fn same_seed_gives_the_same_faults() {
    struct Nowhere;
    impl kv_connector::transfer::Transport for Nowhere {
        fn name(&self) -> &'static str {
            "nowhere"
        }
        fn send<'a>(
            &'a self,
            _: &'a common::wire::ExtentHeader,
            _: kv_connector::transfer::Payload,
            _: kv_connector::transfer::ExtentEnd,
        ) -> kv_connector::transfer::SendFuture<'a> {
            Box::pin(async { Ok(()) })
        }
        fn is_closed(&self) -> bool {
            false
        }
    }
    let faults = |seed: u64| {
        let plan = FaultPlan { seed, loss: 0.2, corruption: 0.2, truncation: 0.2, reset: 0.2, ..FaultPlan::default() };
        let faulty = FaultyTransport::new(Arc::new(Nowhere), plan);
        let job = Job::new(1, 64, 0, 0);
        let (header, payload) = job.sealed(job.extent(0, 0, 64));
        for _ in 0..1000 {
            use kv_connector::transfer::{ExtentEnd, Transport as _};
            drop(faulty.send(&header, payload.clone().into(), ExtentEnd::Finished));
        }
        faulty.injected()
    };
    assert_eq!(faults(1), faults(1));
    assert_ne!(faults(1), faults(2));
    let InjectedFaults { num_lost, num_corrupted, num_truncated, num_reset, .. } = faults(3);
    for count in [num_lost, num_corrupted, num_truncated, num_reset] {
        assert!((150..250).contains(&count), "{count} of 1000 at a probability of 0.2");
    }
}
