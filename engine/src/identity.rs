//! Which model this is: a digest of its weights and of everything that changes their KV.
//!
//! Computed from contents alone, so that two nodes agree whether they read one file or ten shards, from the
//! Hub's cache or from a copied folder. Hashing a large checkpoint takes a while, so the digest of the
//! weights is kept in a cache folder under the files' paths, sizes and times of change; a cache that cannot
//! be read or written only costs the time.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use common::model::ModelIdentity;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::spec::ModelSpec;

/// What the cache holds for one checkpoint.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct CachedDigest {
    files: Vec<FileStamp>,
    weights: String,
}

/// A file as it was when its digest was made.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct FileStamp {
    path: PathBuf,
    num_bytes: u64,
    modified_nanos: u128,
}

/// The identity of `checkpoint`, computed with weights and activations of type `dtype`. `cache` is a folder
/// that may be made and written, if any.
pub fn model_identity(checkpoint: &Checkpoint, spec: &ModelSpec, dtype: &str, cache: Option<&Path>) -> ModelIdentity {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"tandem model identity 1");
    let config = serde_json::to_vec(spec).expect("a model's shape is numbers, text and lists");
    hasher.update(&(config.len() as u64).to_le_bytes());
    hasher.update(&config);
    hasher.update(&(dtype.len() as u64).to_le_bytes());
    hasher.update(dtype.as_bytes());
    hasher.update(&weights_digest(checkpoint, cache));
    ModelIdentity(*hasher.finalize().as_bytes())
}

/// The user's cache folder: `$XDG_CACHE_HOME/tandem`, else `$HOME/.cache/tandem`.
pub fn cache_folder_from_env() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    base.is_absolute().then(|| base.join("tandem"))
}

fn weights_digest(checkpoint: &Checkpoint, cache: Option<&Path>) -> [u8; 32] {
    let stamps: Option<Vec<FileStamp>> = checkpoint.files().map(stamp).collect();
    let cache = cache.zip(stamps).map(|(folder, stamps)| {
        let paths = serde_json::to_vec(&stamps.iter().map(|stamp| &stamp.path).collect::<Vec<_>>());
        let name = blake3::hash(&paths.unwrap_or_default()).to_hex();
        (folder.join(format!("weights-{}.json", &name[..32])), stamps)
    });
    if let Some((path, stamps)) = &cache
        && let Some(digest) = cached(path, stamps)
    {
        return digest;
    }
    let digest = hash_tensors(checkpoint);
    if let Some((path, files)) = cache {
        let entry = CachedDigest { files, weights: blake3::Hash::from_bytes(digest).to_hex().to_string() };
        if let Err(reason) = keep(&path, &entry) {
            tracing::debug!(path = %path.display(), %reason, "the digest of the weights is not kept");
        }
    }
    digest
}

/// Digest over name, type, shape and content of every tensor, in the order of names.
fn hash_tensors(checkpoint: &Checkpoint) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for (name, dtype, shape, bytes) in checkpoint.sorted() {
        hasher.update(format!("{name}\0{dtype}\0{shape:?}\0{}\0", bytes.len()).as_bytes());
        hasher.update(bytes);
    }
    *hasher.finalize().as_bytes()
}

fn stamp(path: &Path) -> Option<FileStamp> {
    // Through the links of the Hub's cache: the blob is what counts.
    let path = path.canonicalize().ok()?;
    let metadata = fs::metadata(&path).ok()?;
    let modified_nanos = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
    Some(FileStamp { path, num_bytes: metadata.len(), modified_nanos })
}

fn cached(path: &Path, stamps: &[FileStamp]) -> Option<[u8; 32]> {
    let entry: CachedDigest = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let digest = blake3::Hash::from_hex(&entry.weights).ok()?;
    (entry.files == stamps).then_some(*digest.as_bytes())
}

/// Written beside and moved into place, so that a reader never sees half of it.
fn keep(path: &Path, entry: &CachedDigest) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&draft, serde_json::to_vec_pretty(entry)?)?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_folder::TestFolder;
    use safetensors::tensor::{Dtype, TensorView};

    fn write(folder: &TestFolder, name: &str, tensors: &[(&str, f32)]) {
        let bytes: Vec<(&str, [u8; 4])> = tensors.iter().map(|(name, x)| (*name, x.to_le_bytes())).collect();
        let views = bytes.iter().map(|(name, x)| (*name, TensorView::new(Dtype::F32, vec![1], x).unwrap()));
        folder.write(name, &safetensors::serialize(views, None).unwrap());
    }

    fn spec() -> ModelSpec {
        ModelSpec::read(Path::new("../tests/checkpoints/llama2-mha")).unwrap()
    }

    fn identity(folder: &TestFolder, cache: Option<&Path>) -> ModelIdentity {
        model_identity(&Checkpoint::open(folder.path()).unwrap(), &spec(), "float32", cache)
    }

    #[test]
    fn cutting_into_shards_changes_nothing_and_any_weight_does() {
        let (one, two, other) = (TestFolder::new("one"), TestFolder::new("two"), TestFolder::new("other"));
        write(&one, "model.safetensors", &[("a", 1.0), ("b", 2.0)]);
        write(&two, "x.safetensors", &[("b", 2.0)]);
        write(&two, "y.safetensors", &[("a", 1.0)]);
        two.write("model.safetensors.index.json", br#"{"weight_map": {"b": "x.safetensors", "a": "y.safetensors"}}"#);
        write(&other, "model.safetensors", &[("a", 1.0), ("b", 2.5)]);
        assert_eq!(identity(&one, None), identity(&two, None));
        assert_ne!(identity(&one, None), identity(&other, None));
    }

    #[test]
    fn configuration_and_dtype_are_part_of_it_and_end_tokens_are_not() {
        let folder = TestFolder::new("config");
        write(&folder, "model.safetensors", &[("a", 1.0)]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let base = model_identity(&checkpoint, &spec(), "float32", None);
        assert_ne!(base, model_identity(&checkpoint, &spec(), "bfloat16", None));
        let other = ModelSpec { rms_norm_eps: 1e-3, ..spec() };
        assert_ne!(base, model_identity(&checkpoint, &other, "float32", None));
        let other = ModelSpec { eos_token_ids: vec![9], ..spec() };
        assert_eq!(base, model_identity(&checkpoint, &other, "float32", None));
    }

    #[test]
    fn a_kept_digest_is_used_until_the_file_changes_and_never_needed() {
        let (folder, cache) = (TestFolder::new("kept"), TestFolder::new("cache"));
        write(&folder, "model.safetensors", &[("a", 1.0)]);
        let first = identity(&folder, Some(cache.path()));
        assert_eq!(first, identity(&folder, None));
        let entries: Vec<_> = fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(entries.len(), 1);
        // A planted digest shows that the cache is read.
        let mut entry: CachedDigest = serde_json::from_slice(&fs::read(&entries[0]).unwrap()).unwrap();
        entry.weights = "00".repeat(32);
        fs::write(&entries[0], serde_json::to_vec(&entry).unwrap()).unwrap();
        assert_ne!(first, identity(&folder, Some(cache.path())));
        write(&folder, "model.safetensors", &[("a", 3.0)]);
        assert_eq!(identity(&folder, Some(cache.path())), identity(&folder, None));
        fs::write(&entries[0], b"not json").unwrap();
        assert_eq!(identity(&folder, Some(cache.path())), identity(&folder, None));
        assert_eq!(identity(&folder, Some(Path::new("/proc/no/such/place"))), identity(&folder, None));
    }
}
