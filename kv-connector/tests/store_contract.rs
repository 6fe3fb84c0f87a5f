//! What every tier upholds, and several as one store: the same tests over host memory, a disk, a shared folder,
//! Redis, and the three of them together, well and with faults.
#![allow(clippy::unwrap_used)]

#[path = "support/entries.rs"]
mod entries;
#[path = "../../tests/support/redis.rs"]
mod redis;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::content::{ContentName, PrefixDigest};
use entries::{Folder, SECOND, entry, format, name, names};
use kv_connector::store::{
    BlockStore, DiskBackend, Entry, EntryFormat, EntryKey, Fault, FaultyBackend, HostBackend, RemoteBackend, Tier,
    TierBackend, TierKind, TieredStore,
};
use redis::Redis;

const MIB: u64 = 1 << 20;

/// A store under test, its backends from the fastest to the slowest, and what must outlive them.
struct Subject {
    what: &'static str,
    store: Arc<dyn BlockStore>,
    tiered: Option<Arc<TieredStore>>,
    faults: Vec<Arc<FaultyBackend>>,
    _folder: Folder,
    _redis: Option<Redis>,
}

impl Subject {
    /// What was put is where it belongs.
    async fn written(&self) {
        if let Some(tiered) = &self.tiered {
            tiered.written().await;
        }
    }

    fn set(&self, fault: Fault) {
        self.faults.iter().for_each(|faulty| faulty.set(fault));
    }
}

async fn backend(kind: TierKind, folder: &Folder, redis: Option<&Redis>) -> Arc<dyn TierBackend> {
    match kind {
        TierKind::Host => Arc::new(HostBackend::new(MIB as usize)),
        TierKind::Disk => Arc::new(DiskBackend::open(&folder.path("disk"), MIB, format().entry_bytes()).await.unwrap()),
        TierKind::Remote => {
            let url = redis.map_or_else(|| format!("fs://{}", folder.path("remote").display()), Redis::url);
            Arc::new(RemoteBackend::open(&url, None, None).unwrap())
        }
    }
}

async fn subject(what: &'static str, kinds: &[TierKind], with_redis: bool) -> Subject {
    let folder = Folder::new();
    let redis = with_redis.then(Redis::start);
    let (mut faults, mut tiers) = (Vec::new(), Vec::new());
    for kind in kinds {
        let faulty = Arc::new(FaultyBackend::new(backend(*kind, &folder, redis.as_ref()).await));
        faults.push(faulty.clone());
        tiers.push(Tier::new(*kind, faulty, format(), SECOND, &[]));
    }
    let (store, tiered): (Arc<dyn BlockStore>, _) = if let [tier] = &tiers[..] {
        (tier.clone(), None)
    } else {
        let tiered = Arc::new(TieredStore::new(tiers, format(), MIB, None));
        (tiered.clone(), Some(tiered))
    };
    Subject { what, store, tiered, faults, _folder: folder, _redis: redis }
}

async fn subjects() -> Vec<Subject> {
    use TierKind::{Disk, Host, Remote};
    vec![
        subject("host", &[Host], false).await,
        subject("disk", &[Disk], false).await,
        subject("folder", &[Remote], false).await,
        subject("redis", &[Remote], true).await,
        subject("host and disk", &[Host, Disk], false).await,
        subject("host, disk and folder", &[Host, Disk, Remote], false).await,
        subject("host and redis", &[Host, Remote], true).await,
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_is_got_and_the_rest_is_a_miss() {
    for subject in subjects().await {
        let (store, what) = (&subject.store, subject.what);
        assert_eq!(store.num_held(&names(1..5)).await, 0, "{what}");
        assert_eq!(store.get(name(1)).await, None, "{what}");
        for number in [1, 2, 4] {
            assert!(store.put(name(number), entry(number)).await, "{what}");
        }
        subject.written().await;
        assert_eq!(store.num_held(&names(1..5)).await, 2, "{what}: a gap ends a prefix");
        assert_eq!(store.num_held(&[]).await, 0, "{what}");
        for number in [1, 2, 4] {
            assert_eq!(store.get(name(number)).await, Some(entry(number)), "{what}");
        }
        assert_eq!(store.get(name(3)).await, None, "{what}");
        store.remove(name(1)).await;
        subject.written().await;
        assert_eq!(store.get(name(1)).await, None, "{what}");
        assert_eq!(store.num_held(&names(1..5)).await, 0, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prefix_is_found_whole() {
    for subject in subjects().await {
        for number in 1..=70 {
            assert!(subject.store.put(name(number), entry(number)).await, "{}", subject.what);
        }
        subject.written().await;
        assert_eq!(subject.store.num_held(&names(1..80)).await, 70, "{}", subject.what);
    }
}

/// Another prefix with the same key: at the entry itself, and at its parent, whose digest is in its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_collision_is_a_miss_and_removed() {
    for subject in subjects().await {
        let (store, what) = (&subject.store, subject.what);
        for number in [1, 2] {
            store.put(name(number), entry(number)).await;
        }
        subject.written().await;
        for number in [2, 1] {
            let forged = ContentName { digest: PrefixDigest([99; 32]), ..name(number) };
            assert_eq!(store.get(forged).await, None, "{what}: never somebody else's KV");
            assert_eq!(store.get(name(number)).await, None, "{what}: it has made room for either");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_a_miss_and_the_bad_entry_is_removed() {
    let faults = [
        Fault::FlipBit(7),
        Fault::FlipBit(8 * 60),
        Fault::FlipBit(8 * 500 + 3),
        Fault::Truncate(200),
        Fault::Truncate(0),
    ];
    for subject in subjects().await {
        let (store, what) = (&subject.store, subject.what);
        for (number, fault) in (1..).zip(faults) {
            store.put(name(number), entry(number)).await;
            subject.written().await;
            subject.set(fault);
            assert_eq!(store.get(name(number)).await, None, "{what}, {fault:?}");
            subject.set(Fault::None);
            assert_eq!(store.get(name(number)).await, None, "{what}, {fault:?}: it was removed");
            store.put(name(number), entry(number)).await;
            subject.written().await;
            assert_eq!(store.get(name(number)).await, Some(entry(number)), "{what}, {fault:?}: and can come again");
        }
    }
}

/// What other software, or another version, may have left there.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_bytes_under_a_key_are_a_miss_and_removed() {
    use TierKind::{Disk, Host, Remote};
    for (kind, with_redis) in [(Host, false), (Disk, false), (Remote, false), (Remote, true)] {
        let (folder, redis) = (Folder::new(), with_redis.then(Redis::start));
        let backend = backend(kind, &folder, redis.as_ref()).await;
        let tier = Tier::new(kind, backend.clone(), format(), SECOND, &[]);
        let other = EntryFormat::new(&entries::model("kv-f16"), 2, 300);
        let foreign: Vec<(&str, bytes::Bytes)> = vec![
            ("empty", bytes::Bytes::new()),
            ("text", bytes::Bytes::from_static(b"hello")),
            ("too long", vec![7; 100_000].into()),
            ("another representation", other.encode(name(1), |_| {}).bytes().clone()),
            ("another model or tenant", Entry::bytes(&entry(2)).clone()),
        ];
        for (what, bytes) in foreign {
            backend.put(key(1), bytes).await.unwrap();
            assert_eq!(tier.get(name(1)).await, None, "{kind:?} {with_redis}, {what}");
            assert!(!tier.is_down(), "{kind:?} {with_redis}, {what}: a bad entry is no bad tier");
            assert_eq!(backend.get(key(1), 10).await.unwrap(), None, "{kind:?} {with_redis}, {what}: removed");
        }
    }
}

fn key(number: u8) -> EntryKey {
    let tag = u128::from_be_bytes(format().tag()[..16].try_into().unwrap());
    EntryKey { content: name(number).key, tag }
}

/// A tier that fails or hangs costs one deadline; then it is left alone, and tried again in the background.
#[tokio::test(start_paused = true)]
async fn a_dead_tier_is_a_miss_once_within_its_deadline_and_then_at_once() {
    for fault in [Fault::Fail, Fault::Hang] {
        let backend = Arc::new(FaultyBackend::new(Arc::new(HostBackend::new(MIB as usize))));
        let tier = Tier::new(TierKind::Remote, backend.clone(), format(), SECOND, &[]);
        assert!(tier.put(name(1), entry(1)).await);
        backend.set(fault);
        let started_at = tokio::time::Instant::now();
        assert_eq!(tier.get(name(1)).await, None);
        assert!(started_at.elapsed() <= SECOND);
        assert!(tier.is_down());
        let then = tokio::time::Instant::now();
        assert_eq!(tier.get(name(1)).await, None);
        assert_eq!(tier.num_held(&names(1..3)).await, 0);
        assert!(!tier.put(name(2), entry(2)).await);
        assert_eq!(then.elapsed(), Duration::ZERO, "nobody waits for it a second time");
        backend.set(Fault::None);
        tokio::time::sleep(60 * SECOND).await;
        assert!(!tier.is_down());
        assert_eq!(tier.get(name(1)).await, Some(entry(1)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_tier_leaves_the_others_at_work() {
    let subject = subject("host, disk and folder", &[TierKind::Host, TierKind::Disk, TierKind::Remote], false).await;
    // One after the other, and they stay down.
    for lost in 0..2 {
        subject.faults[lost].set(Fault::Fail);
        let number = lost as u8;
        subject.store.put(name(number), entry(number)).await;
        subject.written().await;
        assert_eq!(subject.store.get(name(number)).await, Some(entry(number)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hit_of_a_slow_tier_is_kept_by_the_faster_ones() {
    let folder = Folder::new();
    let backends = [TierKind::Host, TierKind::Disk, TierKind::Remote];
    let mut tiers = Vec::new();
    for kind in backends {
        tiers.push(Tier::new(kind, backend(kind, &folder, None).await, format(), SECOND, &[]));
    }
    let store = TieredStore::new(tiers.clone(), format(), MIB, None);
    tiers[2].put(name(1), entry(1)).await;
    assert_eq!(store.get(name(1)).await, Some(entry(1)));
    store.written().await;
    for tier in &tiers[..2] {
        assert_eq!(tier.get(name(1)).await, Some(entry(1)), "{:?}", tier.kind());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_room_in_the_queue_is_dropped_and_nobody_waits() {
    let backend = Arc::new(FaultyBackend::new(Arc::new(HostBackend::new(MIB as usize))));
    backend.set(Fault::Hang);
    let tier = Tier::new(TierKind::Remote, backend.clone(), format(), 600 * SECOND, &[]);
    // Room for four entries of one KiB.
    let store = TieredStore::new(vec![tier.clone()], format(), 4096, None);
    let mut taken = Vec::new();
    for number in 0..8 {
        taken.push(store.put(name(number), entry(number)).await);
    }
    assert_eq!(taken, [true, true, true, true, false, false, false, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tiers_keep_within_their_budget() {
    let folder = Folder::new();
    let host = Arc::new(HostBackend::new(20_000));
    let disk = Arc::new(DiskBackend::open(&folder.path("disk"), MIB, format().entry_bytes()).await.unwrap());
    let backends: [(TierKind, Arc<dyn TierBackend>); 2] = [(TierKind::Host, host.clone()), (TierKind::Disk, disk)];
    for (kind, backend) in backends {
        let tier = Tier::new(kind, backend.clone(), format(), 10 * SECOND, &[]);
        for round in 0..4u8 {
            for number in 0..250 {
                let name = entries::name_of(round, number);
                tier.put(name, format().encode(name, |_| {})).await;
            }
        }
        assert!(backend.evicted_bytes().unwrap() > 0, "{kind:?}: a thousand entries exceed it");
        let newest = entries::name_of(3, 249);
        assert!(tier.get(newest).await.is_some(), "{kind:?}: the newest is there");
        assert!(tier.get(entries::name_of(0, 0)).await.is_none(), "{kind:?}: the oldest is not");
    }
    assert!(host.used_bytes().unwrap() <= 20_000);
    let num_bytes: u64 = files_below(&folder.path("disk")).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(num_bytes <= MIB, "{num_bytes}");
}

fn files_below(folder: &std::path::Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found
}

/// Large entries, all put at once: as many as the tier's writers would, and more.
#[tokio::test(flavor = "multi_thread")]
async fn disk_keeps_all_that_is_put_at_the_same_time() {
    const NUM_ENTRIES: usize = 24;
    let (folder, entry_bytes) = (Folder::new(), 6 << 20);
    let disk = DiskBackend::open(&folder.path("disk"), 512 * MIB, entry_bytes).await.unwrap();
    let key = |n: usize| EntryKey { content: common::content::ContentKey(n as u128), tag: 0 };
    let puts = (0..NUM_ENTRIES).map(|n| disk.put(key(n), vec![n as u8; entry_bytes].into()));
    futures::future::try_join_all(puts).await.unwrap();
    for n in 0..NUM_ENTRIES {
        let found = disk.get(key(n), entry_bytes).await.unwrap();
        assert_eq!(found.map(|bytes| (bytes.len(), bytes[0])), Some((entry_bytes, n as u8)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_read_again_after_a_restart_and_damage_in_its_files_is_a_miss() {
    let folder = Folder::new();
    let open = async || {
        let backend = DiskBackend::open(&folder.path("disk"), MIB, format().entry_bytes()).await.unwrap();
        Tier::new(TierKind::Disk, Arc::new(backend), format(), 10 * SECOND, &[])
    };
    let tier = open().await;
    for number in 0..20 {
        assert!(tier.put(name(number), entry(number)).await);
    }
    let in_use = DiskBackend::open(&folder.path("disk"), MIB, format().entry_bytes()).await.err().unwrap();
    assert!(in_use.to_string().contains("in use by another process"), "{in_use}");
    tier.close().await;
    drop(tier);
    let tier = open().await;
    for number in 0..20 {
        assert_eq!(tier.get(name(number)).await, Some(entry(number)));
    }
    tier.close().await;
    drop(tier);
    // Every byte of payload that there is changes.
    let payload = entry(5).payload()[..64].to_vec();
    let mut num_damaged = 0;
    for path in files_below(&folder.path("disk")) {
        let mut bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len().saturating_sub(64) {
            if bytes[at..at + 64] == payload {
                bytes[at + 10] ^= 1;
                num_damaged += 1;
            }
        }
        std::fs::write(&path, bytes).unwrap();
    }
    assert!(num_damaged > 0, "the payload is in the files as it is");
    let tier = open().await;
    assert_eq!(tier.get(name(5)).await, None);
    assert_eq!(tier.num_held(&names(5..6)).await, 0, "and is removed");
    assert_eq!(tier.get(name(6)).await, Some(entry(6)));
    tier.close().await;
    drop(tier);
    for path in files_below(&folder.path("disk")) {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    }
    let tier = open().await;
    for number in 0..20 {
        assert_eq!(tier.get(name(number)).await, None, "cut files");
    }
    assert!(tier.put(name(1), entry(1)).await);
    assert_eq!(tier.get(name(1)).await, Some(entry(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_noise_are_no_entries() {
    let folder = Folder::new();
    let tier = DiskBackend::open(&folder.path("disk"), MIB, format().entry_bytes()).await.unwrap();
    tier.close().await;
    drop(tier);
    let mut state = 1u32;
    for path in files_below(&folder.path("disk")) {
        let num_bytes = path.metadata().unwrap().len();
        let noise = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        std::fs::write(&path, (0..num_bytes).map(noise).collect::<Vec<u8>>()).unwrap();
    }
    let backend = DiskBackend::open(&folder.path("disk"), MIB, format().entry_bytes()).await.unwrap();
    let tier = Tier::new(TierKind::Disk, Arc::new(backend), format(), 10 * SECOND, &[]);
    assert_eq!(tier.get(name(1)).await, None);
    assert!(tier.put(name(1), entry(1)).await);
    assert_eq!(tier.get(name(1)).await, Some(entry(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_folder_is_swept_within_its_budget_oldest_first() {
    let folder = Folder::new();
    let url = format!("fs://{}", folder.path("remote").display());
    let backend = Arc::new(RemoteBackend::open(&url, Some(32 << 10), None).unwrap());
    let tier = Tier::new(TierKind::Remote, backend.clone(), format(), 10 * SECOND, &[]);
    for number in 0..200 {
        assert!(tier.put(name(number), entry(number)).await);
    }
    entries::until(|| backend.evicted_bytes().unwrap() > 0 && backend.used_bytes().unwrap() <= 32 << 10).await;
    let num_files = files_below(&folder.path("remote")).len();
    assert!(num_files < 200, "{num_files}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_forgets_entries_after_their_time() {
    let redis = Redis::start();
    let backend = Arc::new(RemoteBackend::open(&redis.url(), None, Some(600 * SECOND)).unwrap());
    let tier = Tier::new(TierKind::Remote, backend, format(), SECOND, &[]);
    assert!(tier.put(name(1), entry(1)).await);
    let ttl = redis.command(&format!("TTL tandem/{}", key(1).path()));
    let alternative = redis.command(&format!("TTL /tandem/{}", key(1).path()));
    let seconds = [ttl, alternative].iter().filter_map(|answer| answer.strip_prefix(':')?.parse::<i64>().ok()).max();
    assert!((1..=600).contains(&seconds.unwrap()), "{seconds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_comes_back_empty_is_filled_again() {
    let mut redis = Redis::start();
    let (url, port) = (redis.url(), redis.port());
    let tier =
        Tier::new(TierKind::Remote, Arc::new(RemoteBackend::open(&url, None, None).unwrap()), format(), SECOND, &[]);
    for number in 1..4 {
        assert!(tier.put(name(number), entry(number)).await);
    }
    redis.kill();
    assert_eq!(tier.get(name(1)).await, None);
    assert!(tier.is_down());
    let _redis = Redis::start_on(port).unwrap();
    entries::until(|| !tier.is_down()).await;
    assert_eq!(tier.num_held(&names(1..4)).await, 0, "what it had is not taken for granted");
    assert!(tier.put(name(1), entry(1)).await);
    assert_eq!(tier.get(name(1)).await, Some(entry(1)));
}
