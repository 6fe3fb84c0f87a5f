//! Hub ids: a model named `org/name` becomes a folder in the standard cache of the Hugging Face Hub.
//!
//! The layout is that of `huggingface_hub`, so what either has downloaded the other finds:
//!
//! ```text
//! $HF_HUB_CACHE/models--org--name/
//!   refs/main                      commit the branch was at
//!   blobs/<etag>                   contents; <etag>.incomplete while they arrive
//!   snapshots/<commit>/<file>  ->  ../../blobs/<etag>
//! ```
//!
//! 1. [`resolve`]: folder, cached snapshot or download.
//! 2. [`settings`]: where the cache is, which server, which token.
//! 3. `download`: one file, resumed where it stopped, its size and digest checked.

mod download;
pub mod settings;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use self::download::{Client, RemoteFile};
pub use self::settings::HubSettings;
use crate::gguf::is_gguf;

/// Files of a model besides its weights; only the first must be there.
const FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Why a model name did not become a folder.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a folder nor something that could be a Hub id.
    #[error("{name:?} is neither a folder here nor a Hub id of the form org/name or org/name@revision")]
    NotAnId {
        /// What was given.
        name: String,
    },
    /// A folder of something else.
    #[error(
        "{name} is no checkpoint: it has neither config.json nor tokenizer.json; give a folder in Hugging Face's layout, a GGUF file, or a Hub id"
    )]
    NoCheckpoint {
        /// What was given.
        name: String,
    },
    /// A GGUF file that is not there.
    #[error("{name} is not a file here: give the path of a GGUF file, a folder in Hugging Face's layout, or a Hub id")]
    NoGguf {
        /// What was given.
        name: String,
    },
    /// Neither a folder nor a repository on the Hub.
    #[error(
        "{id} is neither a folder here nor a model at {endpoint} that this token may read (HTTP {status} for revision {revision}): check the name, or set HF_TOKEN if it is private or gated"
    )]
    NotFound {
        /// Repository.
        id: String,
        /// Revision.
        revision: String,
        /// Server.
        endpoint: String,
        /// What the server said.
        status: u16,
    },
    /// The server is not to be asked, and the cache does not have it.
    #[error("{id} at revision {revision} is not complete in {}, and HF_HUB_OFFLINE is set: unset it, or give a folder", cache.display())]
    Offline {
        /// Repository.
        id: String,
        /// Revision.
        revision: String,
        /// The cache.
        cache: PathBuf,
    },
    /// No network, wrong address, or a server that fails.
    #[error("{url} cannot be fetched: {reason}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The server's answer is not that of a Hub.
    #[error("{url} gave an answer that a Hub does not give: {reason}")]
    BadAnswer {
        /// What was asked for.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The repository has no weights that can be read.
    #[error("{id} has no {SINGLE} and no {INDEX}: only safetensors are read")]
    NoWeights {
        /// Repository.
        id: String,
    },
    /// A file arrived, but it is not the one that was announced.
    #[error("{url} arrived with {what} {found}, expected {expected}: it was removed, try again")]
    Damaged {
        /// Which file.
        url: String,
        /// Size or digest.
        what: &'static str,
        /// Of what arrived.
        found: String,
        /// As announced.
        expected: String,
    },
    /// The cache cannot be written.
    #[error("the Hub cache at {} cannot be written: {reason}; set HF_HOME to a folder that can", path.display())]
    Cache {
        /// Where.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// A repository and the revision wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HubId {
    id: String,
    revision: String,
}

impl HubId {
    fn parse(name: &str, revision: Option<&str>) -> Option<Self> {
        let (id, at) = name.split_once('@').map_or((name, None), |(id, at)| (id, Some(at)));
        let is_name = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.contains("..")
                && !part.starts_with(['.', '-'])
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let revision = revision.or(at).unwrap_or("main");
        // Revisions may have slashes (`refs/pr/1`); they become paths below `refs/`.
        let is_valid =
            (1..=2).contains(&id.split('/').count()) && id.split('/').all(is_name) && revision.split('/').all(is_name);
        is_valid.then(|| Self { id: id.to_string(), revision: revision.to_string() })
    }

    /// Its folder in the cache.
    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.id.replace('/', "--")))
    }

    /// The snapshot that the cache has for the revision, if it is complete.
    fn cached(&self, cache: &Path) -> Option<PathBuf> {
        let folder = self.folder(cache);
        let noted = fs::read_to_string(folder.join("refs").join(&self.revision)).ok();
        let commit = noted.map_or(self.revision.clone(), |commit| commit.trim().to_string());
        let snapshot = folder.join("snapshots").join(commit);
        is_complete(&snapshot).then_some(snapshot)
    }

    /// Whether the revision is a commit, which never changes.
    fn is_commit(&self) -> bool {
        self.revision.len() == 40 && self.revision.bytes().all(|b| b.is_ascii_hexdigit())
    }
}

/// Whether a snapshot has a configuration, a tokenizer and all weights.
fn is_complete(snapshot: &Path) -> bool {
    let has = |file: &str| snapshot.join(file).exists();
    let has_weights = match fs::read(snapshot.join(INDEX)) {
        Ok(index) => shards(&index).is_some_and(|shards| shards.iter().all(|shard| has(shard))),
        Err(_) => has(SINGLE),
    };
    has("config.json") && has("tokenizer.json") && has_weights
}

/// The shards an index names; `None` if it is not an index or names anything but files beside it.
fn shards(index: &[u8]) -> Option<Vec<String>> {
    let index: Value = serde_json::from_slice(index).ok()?;
    let map = index.get("weight_map")?.as_object()?;
    let mut shards: Vec<String> =
        map.values().map(|shard| shard.as_str().map(str::to_string)).collect::<Option<_>>()?;
    shards.sort_unstable();
    shards.dedup();
    let is_plain = |shard: &String| Path::new(shard).file_name().is_some_and(|name| name == shard.as_str());
    (!shards.is_empty() && shards.iter().all(is_plain)).then_some(shards)
}

/// The folder of a model: `name` itself if it is one (or a GGUF file), else a snapshot of the Hub id `name`, downloaded if
/// need be. `revision` (commit, tag or branch) goes before one given as `org/name@revision`.
///
/// # Errors
/// [`HubError`], a sentence with what to do.
pub async fn resolve(name: &str, revision: Option<&str>, settings: &HubSettings) -> Result<PathBuf, HubError> {
    if Path::new(name).is_dir() {
        // A proxy needs no more than the tokenizer, which says itself what it lacks.
        let is_checkpoint = ["config.json", "tokenizer.json"].iter().any(|file| Path::new(name).join(file).exists());
        return if is_checkpoint { Ok(name.into()) } else { Err(HubError::NoCheckpoint { name: name.to_string() }) };
    }
    // `org/name.gguf` would pass as a Hub id.
    if is_gguf(Path::new(name)) {
        let is_file = Path::new(name).is_file();
        return if is_file { Ok(PathBuf::from(name)) } else { Err(HubError::NoGguf { name: name.to_string() }) };
    }
    let id = HubId::parse(name, revision).ok_or_else(|| HubError::NotAnId { name: name.to_string() })?;
    let cached = id.cached(&settings.cache);
    if let Some(snapshot) = &cached
        && (settings.is_offline || id.is_commit())
    {
        return Ok(snapshot.clone());
    }
    if settings.is_offline {
        return Err(HubError::Offline { id: id.id, revision: id.revision, cache: settings.cache.clone() });
    }
    match download_snapshot(&id, settings).await {
        Err(HubError::Unreachable { url, reason }) => match cached {
            // Without a network, what is here is better than nothing; it may be older than the branch.
            Some(snapshot) => {
                tracing::warn!(url, reason, snapshot = %snapshot.display(), "the Hub is not reachable, its cache is used");
                Ok(snapshot)
            }
            None => {
                let reason = format!("{reason}, and no complete copy is cached");
                Err(HubError::Unreachable { url, reason })
            }
        },
        outcome => outcome,
    }
}

/// [`resolve`] with the settings of the environment.
///
/// # Errors
/// As [`resolve`].
pub async fn resolve_from_env(name: &str, revision: Option<&str>) -> Result<PathBuf, HubError> {
    resolve(name, revision, &HubSettings::from_env()).await
}

async fn download_snapshot(id: &HubId, settings: &HubSettings) -> Result<PathBuf, HubError> {
    let client = Client::new(settings)?;
    let listing = client.listing(&id.id, &id.revision).await?;
    let folder = id.folder(&settings.cache);
    let snapshot = folder.join("snapshots").join(&listing.commit);
    let fetch = async |name: &str| {
        let file = RemoteFile { id: &id.id, commit: &listing.commit, name };
        client.fetch(&file, &folder, &snapshot.join(name)).await
    };
    tracing::info!(id = id.id, revision = id.revision, commit = listing.commit, cache = %settings.cache.display(), "taking the model from the Hub or its cache");
    let has = |name: &str| listing.files.iter().any(|file| file == name);
    for name in FILES.into_iter().filter(|name| has(name)) {
        fetch(name).await?;
    }
    if has(INDEX) {
        let path = fetch(INDEX).await?;
        let index = fs::read(&path).map_err(|error| cache_error(&path, &error))?;
        let bad = || HubError::BadAnswer {
            url: format!("{}/{}/{INDEX}", settings.endpoint, id.id),
            reason: "it names no shards beside it".to_string(),
        };
        for shard in shards(&index).ok_or_else(bad)? {
            fetch(&shard).await?;
        }
    } else if has(SINGLE) {
        fetch(SINGLE).await?;
    } else {
        return Err(HubError::NoWeights { id: id.id.clone() });
    }
    // Noted last: a reference leads to a complete snapshot.
    if !id.is_commit() {
        let note = folder.join("refs").join(&id.revision);
        write_new(&note, listing.commit.as_bytes())?;
    }
    Ok(snapshot)
}

fn cache_error(path: &Path, error: &std::io::Error) -> HubError {
    HubError::Cache { path: path.to_path_buf(), reason: error.to_string() }
}

fn make_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|error| cache_error(parent, &error))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    make_parent(path)?;
    let draft = path.with_extension(format!("tmp-{}", std::process::id()));
    fs::write(&draft, bytes).and_then(|()| fs::rename(&draft, path)).map_err(|error| cache_error(path, &error))
}

#[cfg(test)]
mod tests;
