//! Loading into a pool of bytes, in paused time; who computes is played by the tests.

use std::sync::Mutex;
use std::time::Duration;

use common::content::{ChainRoot, ContentChain};
use common::handover::StoredPrefix;
use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};

use super::*;
use crate::store::{BlockStore, EntryFormat, Fault, FaultyBackend, HostBackend, Tier, TierKind};

const MS: Duration = Duration::from_millis(1);
const NUM_GRANULES: usize = 20;
const GRANULE_BYTES: usize = 32;
const LIMITS: LoadLimits = LoadLimits { window_bytes: 1, stall_timeout: Duration::from_secs(10) };

/// One layer; every byte that is written is counted.
#[derive(Default)]
struct Pool(Mutex<Vec<(usize, Vec<u8>)>>);

impl KvMemory for Pool {
    fn write_at(&self, _: u32, _: &[BlockId], first_granule: usize, _: usize, bytes: &[u8]) {
        self.0.lock().unwrap().push((first_granule, bytes.to_vec()));
    }

    fn read_granules(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &mut [u8]) {
        unreachable!("nothing is read here")
    }

    fn visit_granules(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &mut dyn FnMut(u64, &[u8])) {
        unreachable!("nothing is read here")
    }

    fn granule_bytes(&self) -> usize {
        GRANULE_BYTES
    }

    fn num_layers(&self) -> usize {
        1
    }
}

/// A store of one tier with 20 granules, 100 tokens per second expected of it, and 1000 computed.
struct Bench {
    store: TieredStore,
    backend: Arc<FaultyBackend>,
    granules: NamedTokens,
    pool: Arc<Pool>,
    is_speed_set: bool,
}

impl Bench {
    async fn new(is_speed_set: bool) -> Self {
        let model = ModelInfo {
            identity: ModelIdentity([1; 32]),
            numerics: NumericsId("test".into()),
            representation: Representation("test".into()),
            kv_spec: KvSpec::uniform(1, 1, 8, KvDtype::F32, None),
            vocab_size: 1,
            max_model_len: 1,
            exchange: Default::default(),
            granule_order: Default::default(),
            block_size: 16,
            num_blocks: 1,
        };
        let format = EntryFormat::new(&model, 1, GRANULE_BYTES);
        let mut chain = ContentChain::new(&ChainRoot::of_model(model.identity));
        let tokens = [7; NUM_GRANULES * GRANULE_TOKENS];
        chain.extend(&tokens);
        let backend = Arc::new(FaultyBackend::new(Arc::new(HostBackend::new(1 << 20))));
        let tier = Tier::new(TierKind::Host, backend.clone(), format, Duration::from_secs(3600), &[]);
        let store = TieredStore::new(vec![tier], format, 1 << 20, is_speed_set.then_some(1e6));
        let granules = NamedTokens::new(&chain, &tokens, usize::MAX);
        for (granule, name) in granules.names().iter().enumerate() {
            assert!(store.put(*name, format.encode(*name, |payload| payload.fill(granule as u8))).await);
        }
        Self { store, backend, granules, pool: Arc::default(), is_speed_set }
    }

    /// From granule 4 on, as `load` is expected to take.
    fn plan(&self, load: Duration, wake: Box<dyn Fn() + Send + Sync>) -> LoadPlan {
        let costs = PrefixCosts {
            num_tokens: 1000,
            num_cached_tokens: 64,
            num_held_tokens: 0,
            num_tokens_ahead: 0,
            prefill_tokens_per_second: 1000.0,
            kv_bytes_per_token: 2,
            fetch_bytes_per_second: None,
            round_trip: Duration::ZERO,
            local_rest: None,
            stored: Some(StoredPrefix { num_tokens: (NUM_GRANULES * GRANULE_TOKENS) as u32, load }),
            peer: None,
        };
        LoadPlan::new(&costs, Arc::new([]), self.pool.clone(), 16, wake)
    }

    async fn load(&self, plan: LoadPlan) -> Loaded {
        let lookup = self.store.look_up(self.granules.names()).await;
        let found = FoundPrefix { granules: self.granules.clone(), lookup };
        load(&self.store, &found, plan, LIMITS, CancellationToken::new()).await
    }

    /// Granules that were written, each with what it stands for.
    fn written(&self) -> Vec<usize> {
        let written = self.pool.0.lock().unwrap();
        assert!(written.iter().all(|(granule, bytes)| *bytes == [*granule as u8; GRANULE_BYTES]));
        written.iter().map(|(granule, _)| *granule).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn entries_are_placed_from_the_end_to_the_front() {
    let bench = Bench::new(false).await;
    let plan = bench.plan(Duration::ZERO, Box::new(|| {}));
    let prefix = plan.prefix.clone();
    let loaded = bench.load(plan).await;
    assert_eq!((loaded.end, loaded.num_tokens, loaded.num_computed_tokens), (LoadEnd::Complete, 256, 0));
    assert_eq!(bench.written(), (4..NUM_GRANULES).rev().collect::<Vec<_>>());
    assert_eq!((prefix.num_arrived_tokens(), prefix.num_expected_tokens()), (256, 0));
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_or_damaged_is_left_out_and_the_rest_loaded() {
    let bench = Bench::new(false).await;
    bench.store.remove(bench.granules.names()[18]).await;
    let loaded = bench.load(bench.plan(Duration::ZERO, Box::new(|| {}))).await;
    assert_eq!((loaded.end, loaded.num_tokens), (LoadEnd::Missing, 240));
    assert_eq!(bench.written(), [19].into_iter().chain((4..18).rev()).collect::<Vec<_>>());
    bench.backend.set(Fault::FlipBit(1100));
    let loaded = bench.load(bench.plan(Duration::ZERO, Box::new(|| {}))).await;
    assert_eq!((loaded.end, loaded.num_tokens), (LoadEnd::Missing, 0));
    assert_eq!(bench.written().len(), 15, "nothing that was damaged was written");
}

#[tokio::test(start_paused = true)]
async fn half_is_left_to_whoever_computes_as_fast() {
    for is_speed_set in [true, false] {
        let bench = Bench::new(is_speed_set).await;
        bench.backend.set(Fault::Slow(16 * MS));
        let plan = bench.plan(300 * MS, Box::new(|| {}));
        let prefix = plan.prefix.clone();
        let mut loading = Box::pin(bench.load(plan));
        // The goal stands when it first waits; what it allows is computed at once here.
        assert!(futures::poll!(&mut loading).is_pending());
        assert_eq!(prefix.num_expected_tokens(), 128, "speed set: {is_speed_set}");
    }
}

#[tokio::test(start_paused = true)]
async fn late_load_lets_more_be_computed_long_before_it_is_given_up() {
    for is_speed_set in [false, true] {
        let bench = Bench::new(is_speed_set).await;
        assert_eq!(bench.is_speed_set, is_speed_set);
        let started_at = Instant::now();
        let goals: Arc<Mutex<Vec<Duration>>> = Arc::default();
        let told = goals.clone();
        let plan = bench.plan(64 * MS, Box::new(move || told.lock().unwrap().push(started_at.elapsed())));
        let prefix = plan.prefix.clone();
        let lookup = bench.store.look_up(bench.granules.names()).await;
        bench.backend.set(Fault::Hang);
        let found = FoundPrefix { granules: bench.granules.clone(), lookup };
        let loading = load(&bench.store, &found, plan, LIMITS, CancellationToken::new());
        tokio::pin!(loading);
        let first = tokio::time::timeout(Duration::from_secs(1), &mut loading).await;
        assert!(first.is_err(), "it waits for the stall timeout");
        // The two were to meet after 52 ms: by then nothing had come, and all of it may be computed.
        let expected = if is_speed_set { 208 } else { 0 };
        assert_eq!(prefix.num_expected_tokens(), expected, "speed set: {is_speed_set}");
        let loaded = loading.await;
        assert_eq!((loaded.end, loaded.num_tokens), (LoadEnd::Stalled, 0));
        assert_eq!(prefix.num_expected_tokens(), 0);
        let goals = goals.lock().unwrap();
        assert_eq!(goals.last(), Some(&LIMITS.stall_timeout), "the engine hears of the end");
        assert_eq!(goals.iter().any(|at| !at.is_zero() && *at < 100 * MS), !is_speed_set, "{goals:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn slow_load_is_divided_by_the_speed_that_is_seen() {
    let bench = Bench::new(false).await;
    // 1600 tokens per second, where 4000 were expected: the two were to meet after 52 ms.
    bench.backend.set(Fault::Slow(10 * MS));
    let plan = bench.plan(64 * MS, Box::new(|| {}));
    let prefix = plan.prefix.clone();
    let mut loading = Box::pin(bench.load(plan));
    assert!(tokio::time::timeout(49 * MS, &mut loading).await.is_err());
    assert_eq!((bench.written().len(), prefix.num_expected_tokens()), (4, 256 - 48));
    assert!(tokio::time::timeout(8 * MS, &mut loading).await.is_err());
    // 80 of 256 tokens came in 52 ms. Of the 176 that are left, 1000 of 2538 parts are computed: four blocks.
    assert_eq!((bench.written(), prefix.num_expected_tokens()), (vec![19, 18, 17, 16, 15], 256 - 64));
    drop(loading);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(bench.written().len(), 5, "nothing is written once it is dropped");
}

#[tokio::test(start_paused = true)]
async fn load_ends_when_the_sequence_is_gone_or_the_rest_is_computed() {
    let bench = Bench::new(true).await;
    let plan = bench.plan(4 * MS, Box::new(|| {}));
    plan.prefix.close();
    assert_eq!(bench.load(plan).await.end, LoadEnd::Met);
    assert_eq!(bench.written(), Vec::<usize>::new());

    bench.backend.set(Fault::Hang);
    let plan = bench.plan(4 * MS, Box::new(|| {}));
    let met = CancellationToken::new();
    let found = FoundPrefix { granules: bench.granules.clone(), lookup: Lookup::default() };
    let loading = load(&bench.store, &found, plan, LIMITS, met.clone());
    tokio::pin!(loading);
    assert!(futures::poll!(&mut loading).is_pending());
    met.cancel();
    assert_eq!(loading.await.end, LoadEnd::Met);
}
