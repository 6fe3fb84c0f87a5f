//! Entries, names and folders for tests of the store.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::content::{ContentKey, ContentName, PrefixDigest};
use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
use kv_connector::store::{Entry, EntryFormat};

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Some model whose KV is represented like this.
pub(crate) fn model(representation: &str) -> ModelInfo {
    ModelInfo {
        identity: ModelIdentity([1; 32]),
        numerics: NumericsId("test".to_string()),
        representation: Representation(representation.to_string()),
        kv_spec: KvSpec::uniform(2, 1, 8, KvDtype::F32, None),
        vocab_size: 1,
        max_model_len: 1,
        exchange: Default::default(),
        granule_order: Default::default(),
        block_size: 16,
        num_blocks: 1,
    }
}

/// Two layers of 300 bytes.
pub(crate) fn format() -> EntryFormat {
    EntryFormat::new(&model("kv-f32"), 2, 300)
}

pub(crate) fn name_of(round: u8, number: u8) -> ContentName {
    let mut digest = [number; 32];
    digest[0] = round;
    ContentName { key: ContentKey(u128::from(round) << 8 | u128::from(number)), digest: PrefixDigest(digest) }
}

pub(crate) fn name(number: u8) -> ContentName {
    name_of(0, number)
}

pub(crate) fn names(numbers: std::ops::Range<u8>) -> Vec<ContentName> {
    numbers.map(name).collect()
}

/// The entry of `name(number)`, unlike all others.
pub(crate) fn entry(number: u8) -> Entry {
    let fill =
        |payload: &mut [u8]| payload.iter_mut().enumerate().for_each(|(i, byte)| *byte = number ^ (i % 251) as u8);
    format().encode(name(number), fill)
}

/// A folder that is removed with it.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("store-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is left to `cargo clean`.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Waits for a fact that nothing announces, for half a minute.
pub(crate) async fn until(is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(30 * SECOND, waiting).await.expect("it did not come true");
}
