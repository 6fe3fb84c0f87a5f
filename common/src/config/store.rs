//! The prefix-block store of a node: which tiers, and their limits.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values::{parse_bytes, parse_bytes_above_zero, parse_duration_above_zero};
use super::{EngineArgs, InvalidSettings};

/// Entries larger than this may not wait to be written: the queue's room is counted in 32 bits.
const QUEUE_BYTES_MAX: u64 = 256 << 30;

/// Where KV is kept beyond the pool. Without a tier, nothing is.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Prefix-block store")]
pub struct StoreArgs {
    /// Host memory for KV that no longer fits the pool, such as 4GiB. 0: none.
    ///
    /// On a decode node, KV of preempted sequences is part of it (--parked-kv-bytes).
    ///
    /// On a CPU node the pool is host memory too, and a byte there saves a copy; this one pays where the disk or
    /// the shared storage is slow.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    pub store_host_bytes: u64,

    /// Folder on a local disk for KV that survives a restart of this node. Default: none.
    ///
    /// Each node makes a folder with its own name in it.
    #[arg(long, value_name = "FOLDER")]
    pub store_disk_path: Option<PathBuf>,

    /// Most that is kept there; the oldest part goes first.
    #[arg(long, value_name = "BYTES", default_value = "4GiB", value_parser = parse_bytes_above_zero)]
    pub store_disk_bytes: u64,

    /// Storage that all nodes share: fs:///folder, redis://host:port/db, s3://bucket/prefix?region=... Default: none.
    ///
    /// Whoever can write there is trusted by all who read it. A password is better given in
    /// TANDEM_STORE_REMOTE_URL; S3 takes its keys from the environment (AWS_...).
    #[arg(long, value_name = "URL", hide_env_values = true, hide_default_value = true)]
    pub store_remote_url: Option<String>,

    /// Most that is kept in a shared folder; what was written longest ago goes first. Default: no limit.
    ///
    /// Only for fs. Redis has maxmemory and maxmemory-policy for it, S3 a lifecycle rule.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes_above_zero)]
    pub store_remote_bytes: Option<u64>,

    /// How long Redis keeps an entry behind its last writing. Default: until Redis needs the room.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration_above_zero)]
    pub store_remote_ttl: Option<Duration>,

    /// Longest wait for one answer of the shared storage.
    ///
    /// Past it the storage is left alone, and tried again in the background.
    #[arg(long, value_name = "DURATION", default_value = "500ms", value_parser = parse_duration_above_zero)]
    pub store_remote_timeout: Duration,

    /// KV that may wait to be written, for the disk and the shared storage each. What exceeds it is dropped.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = parse_bytes_above_zero)]
    pub store_queue_bytes: u64,

    /// KV that may be on its way from the store into the pool for one request.
    #[arg(long, value_name = "BYTES", default_value = "32MiB", value_parser = parse_bytes_above_zero)]
    pub store_load_bytes: u64,

    /// How long KV that is loaded may stand still before the rest of it is computed.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration_above_zero)]
    pub store_load_stall_timeout: Duration,

    /// Expect KV to come from the store at this many bytes per second, instead of measuring it for each tier.
    ///
    /// Decides whether a prefix is loaded or computed. 0 never loads.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub store_bytes_per_second: Option<u64>,
}

impl StoreArgs {
    /// Whether there is a tier.
    pub fn has_tier(&self) -> bool {
        self.store_host_bytes > 0 || self.store_disk_path.is_some() || self.store_remote_url.is_some()
    }

    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] of a limit without its tier, or of a store that nothing could be found in.
    pub fn validate(&self, engine: &EngineArgs) -> Result<(), InvalidSettings> {
        let invalid = |sentence: String| Err(InvalidSettings(sentence));
        if self.has_tier() && !engine.has_prefix_caching() {
            return invalid(
                "the store needs --enable-prefix-caching, which names the KV it keeps: turn that on, or remove \
                 --store-host-bytes, --store-disk-path and --store-remote-url"
                    .to_string(),
            );
        }
        let without_url = [
            ("--store-remote-bytes", self.store_remote_bytes.is_some()),
            ("--store-remote-ttl", self.store_remote_ttl.is_some()),
        ];
        if let Some((flag, _)) = without_url.iter().find(|(_, is_given)| *is_given && self.store_remote_url.is_none()) {
            return invalid(format!("{flag} is given, but no --store-remote-url that it could be for"));
        }
        if self.store_queue_bytes > QUEUE_BYTES_MAX {
            return invalid(format!("--store-queue-bytes is {}, expected at most 256GiB", self.store_queue_bytes));
        }
        Ok(())
    }
}
