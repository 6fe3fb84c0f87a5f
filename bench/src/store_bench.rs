//! How fast entries go into a tier of the prefix-block store and come out checked: `tandem bench store`.
//!
//! Each round measures every tier and, beside it, what it stands on without us: a plain copy for host memory, one
//! file written and read in one piece for the disk, a Redis client's SET and GET for Redis. A share is a tier's
//! bandwidth over that of its baseline, from the same rounds. Entries are of one size and all different; what
//! goes in is copied and digested as when a node publishes it, what comes out is checked as a node checks it
//! (header and BLAKE3 digest); the baselines do neither.

use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use common::content::{ContentKey, ContentName, PrefixDigest};
use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
use futures::{StreamExt, stream};
use kv_connector::store::{
    BlockStore, DiskBackend, EntryFormat, HostBackend, RemoteBackend, Tier, TierBackend, TierKind,
};

use crate::serve::statistics::Samples;

/// Entries in progress at a time, as a node's loads have.
const NUM_CONCURRENT: usize = 16;
/// No answer takes so long.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What is measured.
#[derive(Debug, Clone, Args)]
pub struct StoreBenchArgs {
    /// KV of an entry, which is 16 tokens in all layers: 128 KiB for 27 million parameters, 2304 KiB for Qwen3-8B.
    #[arg(long, value_name = "KIB", value_delimiter = ',', default_value = "128,512,2304")]
    pub entry_kib: Vec<u32>,
    /// Entries of a round, together so many MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub round_mib: u32,
    /// Rounds; the median is printed.
    #[arg(long, value_name = "ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// A folder on the disk to measure. Default: no disk.
    #[arg(long, value_name = "FOLDER")]
    pub disk_path: Option<PathBuf>,
    /// redis://HOST:PORT/DB or fs:///FOLDER. Default: no shared storage.
    #[arg(long, value_name = "URL")]
    pub remote_url: Option<String>,
}

/// Bandwidths of all tiers and of what they stand on.
#[derive(Debug)]
pub struct StoreBench {
    rows: Vec<Row>,
    rounds: u32,
}

/// In bytes per second, a value for each round.
#[derive(Debug, Default)]
struct Bandwidths {
    put: Vec<f64>,
    get: Vec<f64>,
}

#[derive(Debug)]
struct Row {
    entry_kib: u32,
    place: String,
    ours: Bandwidths,
    baseline_name: &'static str,
    baseline: Bandwidths,
}

/// The entries of a round.
struct Load {
    format: EntryFormat,
    /// Names, and the KV of each as it lies in a pool.
    entries: Vec<(ContentName, Vec<u8>)>,
}

impl Load {
    fn new(entry_kib: u32, num_bytes: u64, round: u32) -> Self {
        let granule_bytes = entry_kib as usize * 1024;
        let model = ModelInfo {
            identity: ModelIdentity([1; 32]),
            numerics: NumericsId("bench".into()),
            representation: Representation("bench".into()),
            kv_spec: KvSpec::uniform(1, 1, 64, KvDtype::Bf16, None),
            vocab_size: 1,
            max_model_len: 1,
            exchange: Default::default(),
            granule_order: Default::default(),
            block_size: 16,
            num_blocks: 1,
        };
        let format = EntryFormat::new(&model, 1, granule_bytes);
        let count = (num_bytes / granule_bytes as u64).max(1) as u32;
        let entry = |number: u32| {
            let mut digest = [0; 32];
            digest[..4].copy_from_slice(&number.to_le_bytes());
            digest[4..8].copy_from_slice(&round.to_le_bytes());
            let key = ContentKey(u128::from(round) << 32 | u128::from(number));
            let name = ContentName { key, digest: PrefixDigest(digest) };
            // Bytes that no layer below can make smaller.
            let mut seed = blake3::Hasher::new();
            seed.update(&digest);
            let mut kv = vec![0; granule_bytes];
            seed.finalize_xof().fill(&mut kv);
            (name, kv)
        };
        Self { format, entries: (0..count).map(entry).collect() }
    }

    fn num_bytes(&self) -> usize {
        self.entries.len() * self.format.payload_bytes()
    }

    /// Bytes per second of making and putting all entries, then of getting all of them, checked.
    async fn measure(&self, backend: Arc<dyn TierBackend>, kind: TierKind) -> anyhow::Result<(f64, f64)> {
        let tier = Tier::new(kind, backend, self.format, TIMEOUT, &[]);
        let started_at = Instant::now();
        let puts = stream::iter(&self.entries).map(|(name, kv)| {
            let entry = self.format.encode(*name, |payload| payload.copy_from_slice(kv));
            tier.put(*name, entry)
        });
        let num_put = puts.buffer_unordered(NUM_CONCURRENT).filter(|is_put| std::future::ready(*is_put)).count().await;
        let put = self.num_bytes() as f64 / started_at.elapsed().as_secs_f64();
        anyhow::ensure!(
            num_put == self.entries.len(),
            "{} tier took {num_put} of {} entries",
            kind.as_str(),
            self.entries.len()
        );
        let started_at = Instant::now();
        let gets = stream::iter(&self.entries).map(|(name, _)| tier.get(*name));
        let num_got =
            gets.buffer_unordered(NUM_CONCURRENT).filter(|got| std::future::ready(got.is_some())).count().await;
        let get = self.num_bytes() as f64 / started_at.elapsed().as_secs_f64();
        anyhow::ensure!(
            num_got == self.entries.len(),
            "{} tier gave {num_got} of {} entries",
            kind.as_str(),
            self.entries.len()
        );
        tier.close().await;
        Ok((put, get))
    }
}

impl Bandwidths {
    fn add(&mut self, (put, get): (f64, f64)) {
        self.put.push(put);
        self.get.push(get);
    }
}

/// Measures every size in every round.
///
/// # Errors
/// If a tier cannot be had, or does not keep what it is given.
pub fn run(args: &StoreBenchArgs) -> anyhow::Result<StoreBench> {
    for kib in &args.entry_kib {
        anyhow::ensure!((1..=65_536).contains(kib), "--entry-kib has {kib}, expected 1 to 65536");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(measure(args))
}

async fn measure(args: &StoreBenchArgs) -> anyhow::Result<StoreBench> {
    let num_bytes = u64::from(args.round_mib) << 20;
    let mut rows = Vec::new();
    for entry_kib in args.entry_kib.iter().copied() {
        let row = |place: &str, baseline_name| Row {
            entry_kib,
            place: place.into(),
            ours: Bandwidths::default(),
            baseline_name,
            baseline: Bandwidths::default(),
        };
        let mut host = row("host", "memcpy, one thread");
        let mut disk = row("disk", "one file, synced");
        let mut remote = row(args.remote_url.as_deref().map_or("", scheme), "its client alone");
        for round in 0..args.rounds {
            eprintln!("entries of {entry_kib} KiB, round {} of {}", round + 1, args.rounds);
            let load = Load::new(entry_kib, num_bytes, round);
            // Twice the load: nothing is given up within a round.
            let backend = HostBackend::new(2 * load.num_bytes() + (1 << 20));
            host.ours.add(load.measure(Arc::new(backend), TierKind::Host).await?);
            host.baseline.add(memcpy(&load));
            if let Some(folder) = &args.disk_path {
                let folder = folder.join(format!("tandem-bench-store-{}", std::process::id()));
                let backend = DiskBackend::open(&folder, 4 * load.num_bytes() as u64, load.format.entry_bytes()).await;
                let measured = load.measure(Arc::new(backend?), TierKind::Disk).await;
                let baseline = one_file(&folder.join("baseline"), &load);
                std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
                disk.ours.add(measured?);
                disk.baseline.add(baseline?);
            }
            if let Some(url) = &args.remote_url {
                let backend = RemoteBackend::open(url, None, Some(Duration::from_secs(60)).filter(|_| is_redis(url)))?;
                remote.ours.add(load.measure(Arc::new(backend), TierKind::Remote).await?);
                if is_redis(url) {
                    remote.baseline.add(redis_alone(url, &load).await.context("measure Redis alone")?);
                }
            }
        }
        rows.extend([host, disk, remote].into_iter().filter(|row| !row.ours.put.is_empty()));
    }
    Ok(StoreBench { rows, rounds: args.rounds })
}

fn scheme(url: &str) -> &str {
    url.split_once("://").map_or(url, |(scheme, _)| scheme)
}

fn is_redis(url: &str) -> bool {
    scheme(url).starts_with("redis")
}

fn memcpy(load: &Load) -> (f64, f64) {
    let mut room = vec![0u8; load.num_bytes()];
    let mut copy = || {
        let started_at = Instant::now();
        for (part, (_, kv)) in room.chunks_exact_mut(load.format.payload_bytes()).zip(&load.entries) {
            part.copy_from_slice(kv);
        }
        std::hint::black_box(&mut room);
        load.num_bytes() as f64 / started_at.elapsed().as_secs_f64()
    };
    // The first touches the pages, as a put into fresh memory does.
    (copy(), copy())
}

fn one_file(path: &Path, load: &Load) -> anyhow::Result<(f64, f64)> {
    let rate = |started_at: Instant| load.num_bytes() as f64 / started_at.elapsed().as_secs_f64();
    let started_at = Instant::now();
    let mut file = std::fs::File::create(path)?;
    for (_, kv) in &load.entries {
        file.write_all(kv)?;
    }
    file.sync_data()?;
    let put = rate(started_at);
    let started_at = Instant::now();
    let mut file = std::fs::File::open(path)?;
    let mut part = vec![0; load.format.payload_bytes()];
    for _ in &load.entries {
        file.read_exact(&mut part)?;
        std::hint::black_box(&mut part);
    }
    Ok((put, rate(started_at)))
}

async fn redis_alone(url: &str, load: &Load) -> anyhow::Result<(f64, f64)> {
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(TIMEOUT));
    let connection = redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await?;
    let rate = |started_at: Instant| load.num_bytes() as f64 / started_at.elapsed().as_secs_f64();
    let key = |name: &ContentName| format!("tandem-bench-alone-{:032x}", name.key.0);
    let started_at = Instant::now();
    let sets = stream::iter(&load.entries).map(|(name, kv)| {
        let mut connection = connection.clone();
        async move {
            let mut set = redis::cmd("SET");
            set.arg(key(name)).arg(kv.as_slice()).arg("EX").arg(60);
            set.query_async::<()>(&mut connection).await
        }
    });
    for set in sets.buffer_unordered(NUM_CONCURRENT).collect::<Vec<_>>().await {
        set?;
    }
    let put = rate(started_at);
    let started_at = Instant::now();
    let gets = stream::iter(&load.entries).map(|(name, _)| {
        let mut connection = connection.clone();
        async move { redis::cmd("GET").arg(key(name)).query_async::<Bytes>(&mut connection).await }
    });
    for got in gets.buffer_unordered(NUM_CONCURRENT).collect::<Vec<_>>().await {
        anyhow::ensure!(got?.len() == load.format.payload_bytes(), "Redis gave something else back");
    }
    Ok((put, rate(started_at)))
}

fn median(values: &[f64]) -> Option<f64> {
    Some(Samples::new(values.to_vec())?.percentile(50.0))
}

impl fmt::Display for StoreBench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "GB/s, medians of {} rounds; share: of the baseline in the same round, median", self.rounds)?;
        write!(f, "{:<10}{:<8}{:>10}{:>10}{:>24}", "entry", "tier", "put", "get", "baseline")?;
        write!(f, "{:>10}{:>10}{:>12}{:>12}", "put", "get", "share put", "share get")?;
        for row in &self.rows {
            let gb = |values: &[f64]| median(values).map_or("none".into(), |value| format!("{:.3}", value / 1e9));
            let share = |ours: &[f64], baseline: &[f64]| {
                let shares: Vec<f64> = ours.iter().zip(baseline).map(|(ours, baseline)| ours / baseline).collect();
                median(&shares).map_or("none".into(), |share| format!("{share:.2}"))
            };
            let Row { entry_kib, place, ours, baseline_name, baseline } = row;
            write!(f, "\n{:<10}{place:<8}{:>10}{:>10}", format!("{entry_kib} KiB"), gb(&ours.put), gb(&ours.get))?;
            write!(f, "{baseline_name:>24}{:>10}{:>10}", gb(&baseline.put), gb(&baseline.get))?;
            write!(f, "{:>12}{:>12}", share(&ours.put, &baseline.put), share(&ours.get, &baseline.get))?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn host_disk_and_folder_are_measured_beside_their_baselines() {
        let folder = std::env::temp_dir().join(format!("tandem-store-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let args = StoreBenchArgs {
            entry_kib: vec![64],
            round_mib: 2,
            rounds: 1,
            disk_path: Some(folder.clone()),
            remote_url: Some(format!("fs://{}", folder.join("shared").display())),
        };
        let table = run(&args).unwrap().to_string();
        std::fs::remove_dir_all(&folder).unwrap();
        for place in ["host", "disk", "fs"] {
            let line = table
                .lines()
                .find(|line| line.split_whitespace().nth(2) == Some(place))
                .unwrap_or_else(|| panic!("{table}"));
            let put: f64 = line.split_whitespace().nth(3).unwrap().parse().unwrap();
            assert!(put > 0.0, "{line}");
        }
        let wrong = StoreBenchArgs { entry_kib: vec![0], ..args };
        assert!(run(&wrong).unwrap_err().to_string().contains("--entry-kib"));
    }
}
