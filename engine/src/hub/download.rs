//! One repository listing, one file: asked for, resumed, checked, linked into its snapshot.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, ETAG, HeaderMap, HeaderValue, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Response, StatusCode};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::settings::HubSettings;
use super::{HubError, cache_error, make_parent};

/// Tries of one file, each going on where the one before stopped.
const TRIES_MAX: u32 = 5;
/// Bytes of a repository listing at most.
const LISTING_BYTES_MAX: usize = 16 << 20;
/// Redirects within the server followed for a file's metadata.
const REDIRECTS_MAX: usize = 5;

/// As wide as the terminal: a fixed width wraps, and a wrapped bar is drawn anew on every line.
const BAR: &str = "{msg:32!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";

/// Asks one server.
pub(super) struct Client {
    endpoint: String,
    /// Follows redirects, to other hosts without the token.
    follows: reqwest::Client,
    /// Shows redirects: their headers describe the file.
    stays: reqwest::Client,
}

/// What is in a repository at a commit.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// A file of a repository at a commit.
pub(super) struct RemoteFile<'a> {
    pub(super) id: &'a str,
    pub(super) commit: &'a str,
    pub(super) name: &'a str,
}

/// What the server announces of a file.
struct FileFacts {
    /// Name of the blob: SHA-256 of large files, git's SHA-1 of small ones.
    etag: String,
    num_bytes: u64,
}

impl Client {
    pub(super) fn new(settings: &HubSettings) -> Result<Self, HubError> {
        // Whoever installed a provider before is welcome; all of Tandem installs this one.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut headers = HeaderMap::new();
        if let Some(token) = &settings.token
            && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {token}"))
        {
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = |policy: Policy| {
            let mut builder = reqwest::Client::builder()
                .user_agent(concat!("tandem/", env!("CARGO_PKG_VERSION")))
                .default_headers(headers.clone())
                .connect_timeout(Duration::from_secs(10))
                .read_timeout(Duration::from_secs(60))
                .redirect(policy);
            if ["http://127.0.0.1", "http://localhost", "http://[::1]"].iter().any(|l| settings.endpoint.starts_with(l))
            {
                builder = builder.no_proxy();
            }
            let unreachable =
                |error: reqwest::Error| HubError::Unreachable { url: settings.endpoint.clone(), reason: chain(&error) };
            builder.build().map_err(unreachable)
        };
        Ok(Self {
            endpoint: settings.endpoint.clone(),
            follows: client(Policy::limited(10))?,
            stays: client(Policy::none())?,
        })
    }

    /// The commit a revision is at, and its files.
    pub(super) async fn listing(&self, id: &str, revision: &str) -> Result<Listing, HubError> {
        let url = format!("{}/api/models/{id}/revision/{}", self.endpoint, revision.replace('/', "%2F"));
        let response = self.follows.get(&url).send().await.map_err(|error| unreachable(&url, &error))?;
        match response.status() {
            StatusCode::OK => {}
            status if is_refusal(status) => return Err(self.not_found(id, revision, status)),
            status => return Err(HubError::Unreachable { url, reason: format!("HTTP {status}") }),
        }
        let bytes = bounded_body(&url, response).await?;
        let bad = |reason: &str| HubError::BadAnswer { url: url.clone(), reason: reason.to_string() };
        let value: Value = serde_json::from_slice(&bytes).map_err(|_| bad("it is not JSON"))?;
        let commit = value.get("sha").and_then(Value::as_str).filter(|sha| is_file_name(sha));
        let files = value.get("siblings").and_then(Value::as_array).ok_or_else(|| bad("it has no `siblings`"))?;
        let names = files.iter().filter_map(|file| file.get("rfilename")?.as_str().map(str::to_string));
        let commit = commit.ok_or_else(|| bad("it has no `sha`"))?.to_string();
        Ok(Listing { commit, files: names.collect() })
    }

    fn not_found(&self, id: &str, revision: &str, status: StatusCode) -> HubError {
        let (id, revision, endpoint) = (id.to_string(), revision.to_string(), self.endpoint.clone());
        HubError::NotFound { id, revision, endpoint, status: status.as_u16() }
    }

    /// Makes `link` lead to the file's content, downloading it into `folder`'s blobs unless it is there.
    /// Returns `link`.
    pub(super) async fn fetch(&self, file: &RemoteFile<'_>, folder: &Path, link: &Path) -> Result<PathBuf, HubError> {
        if link.exists() {
            return Ok(link.to_path_buf());
        }
        let url = format!("{}/{}/resolve/{}/{}", self.endpoint, file.id, file.commit, file.name);
        let facts = self.facts(&url, file).await?;
        let blob = folder.join("blobs").join(&facts.etag);
        make_parent(&blob)?;
        make_parent(link)?;
        // Several processes of one machine may start with the same id: one downloads, the others wait.
        let lock = lock_file(lock_path(folder, &facts.etag)).await?;
        if !blob.exists() {
            self.download(&url, &facts, &blob, file.name).await?;
        }
        if !link.exists() {
            link_to(&facts.etag, &blob, link)?;
        }
        drop(lock);
        Ok(link.to_path_buf())
    }

    /// Asks for a file's digest and size. Large files are redirected to a storage host, and the answer that
    /// redirects is the one that describes them.
    async fn facts(&self, url: &str, file: &RemoteFile<'_>) -> Result<FileFacts, HubError> {
        let bad = |reason: &str| HubError::BadAnswer { url: url.to_string(), reason: reason.to_string() };
        let mut at = url.to_string();
        for _ in 0..REDIRECTS_MAX {
            let response = self.stays.head(&at).send().await.map_err(|error| unreachable(&at, &error))?;
            let headers = response.headers();
            let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
            let etag = text("x-linked-etag").or_else(|| text(ETAG.as_str()).filter(|_| response.status().is_success()));
            if let Some(etag) = etag {
                let etag = etag.trim_start_matches("W/").trim_matches('"');
                let size = text("x-linked-size").or_else(|| text(CONTENT_LENGTH.as_str()));
                let num_bytes = size.and_then(|size| size.parse().ok()).ok_or_else(|| bad("it states no size"))?;
                if !is_file_name(etag) {
                    return Err(bad(&format!("its etag {etag:?} is not a digest")));
                }
                return Ok(FileFacts { etag: etag.to_string(), num_bytes });
            }
            let location = text(LOCATION.as_str()).filter(|_| response.status().is_redirection());
            match location {
                // A repository that was renamed.
                Some(path) if path.starts_with('/') => at = format!("{}{path}", self.endpoint),
                _ if is_refusal(response.status()) => {
                    // A gated repository shows its files and does not give them.
                    return Err(self.not_found(file.id, file.commit, response.status()));
                }
                _ => {
                    let reason = format!("HTTP {}, without an etag", response.status());
                    return Err(HubError::Unreachable { url: at, reason });
                }
            }
        }
        Err(bad("it redirects without end"))
    }

    async fn download(&self, url: &str, facts: &FileFacts, blob: &Path, name: &str) -> Result<(), HubError> {
        let partial = blob.with_extension("incomplete");
        let bar = ProgressBar::new(facts.num_bytes).with_message(name.to_string());
        let style = ProgressStyle::with_template(BAR);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        if bar.is_hidden() {
            // No terminal: a line for the log instead of a bar.
            tracing::info!(file = name, bytes = facts.num_bytes, "downloading");
        }
        let outcome = self.download_in_tries(url, facts, &partial, &bar).await;
        // Also behind an error, or half a bar would stand above its sentence.
        bar.finish_and_clear();
        outcome?;
        if let Err(error) = check(url, facts, &partial).await {
            // Nothing of it can be trusted; the next try begins anew.
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
        fs::rename(&partial, blob).map_err(|error| cache_error(blob, &error))
    }

    async fn download_in_tries(
        &self,
        url: &str,
        facts: &FileFacts,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), HubError> {
        let mut tries = 0;
        loop {
            match self.download_rest(url, facts, partial, bar).await {
                Err(error @ HubError::Unreachable { .. }) if tries + 1 < TRIES_MAX => {
                    // A line written over a bar leaves half of it standing.
                    bar.suspend(|| tracing::warn!(%error, "the download stopped, going on with it"));
                    // At once, then after 1, 2 and 4 seconds.
                    let wait = Duration::from_secs(if tries == 0 { 0 } else { 1 << (tries - 1) });
                    tokio::time::sleep(wait).await;
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Appends what is missing to the partial file.
    async fn download_rest(
        &self,
        url: &str,
        facts: &FileFacts,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<(), HubError> {
        let cache_error = |error: std::io::Error| cache_error(partial, &error);
        let mut file = OpenOptions::new().create(true).append(true).open(partial).map_err(cache_error)?;
        let mut num_have = file.metadata().map_err(cache_error)?.len();
        if num_have > facts.num_bytes {
            file.set_len(0).map_err(cache_error)?;
            num_have = 0;
        }
        if num_have == facts.num_bytes {
            return Ok(());
        }
        let mut request = self.follows.get(url);
        if num_have > 0 {
            request = request.header(RANGE, format!("bytes={num_have}-"));
        }
        let mut response = request.send().await.map_err(|error| unreachable(url, &error))?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::OK => {
                // The server sends all of it.
                file.set_len(0).map_err(cache_error)?;
                num_have = 0;
            }
            status => return Err(HubError::Unreachable { url: url.to_string(), reason: format!("HTTP {status}") }),
        }
        bar.set_position(num_have);
        // What was there already is no speed.
        bar.reset_eta();
        while let Some(bytes) = response.chunk().await.map_err(|error| unreachable(url, &error))? {
            num_have += bytes.len() as u64;
            if num_have > facts.num_bytes {
                break; // `check` says what is wrong
            }
            file.write_all(&bytes).map_err(cache_error)?;
            bar.set_position(num_have);
        }
        if num_have < facts.num_bytes {
            let reason = format!("it ended after {num_have} of {} bytes", facts.num_bytes);
            return Err(HubError::Unreachable { url: url.to_string(), reason });
        }
        file.sync_all().map_err(cache_error)
    }
}

/// Size, and SHA-256 where the etag is one.
async fn check(url: &str, facts: &FileFacts, path: &Path) -> Result<(), HubError> {
    let damaged =
        |what, found: String, expected: String| HubError::Damaged { url: url.to_string(), what, found, expected };
    let found = fs::metadata(path).map_err(|error| cache_error(path, &error))?.len();
    if found != facts.num_bytes {
        return Err(damaged("bytes", found.to_string(), facts.num_bytes.to_string()));
    }
    let is_sha256 = facts.etag.len() == 64 && facts.etag.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_sha256 {
        return Ok(());
    }
    let owned = path.to_path_buf();
    let digest = tokio::task::spawn_blocking(move || sha256(&owned)).await;
    let digest = digest.map_err(|error| cache_error(path, &std::io::Error::other(error)))?;
    let digest = digest.map_err(|error| cache_error(path, &error))?;
    if digest != facts.etag.to_ascii_lowercase() {
        return Err(damaged("SHA-256", digest, facts.etag.clone()));
    }
    Ok(())
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hasher.update(&buffer[..count]);
    }
}

/// Where `huggingface_hub` locks a blob, so that it and Tandem wait for each other.
fn lock_path(folder: &Path, etag: &str) -> PathBuf {
    let name = folder.file_name().unwrap_or_default();
    folder.with_file_name(".locks").join(name).join(format!("{etag}.lock"))
}

/// Whether asking again is of no use without another name or token.
fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::NOT_FOUND | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::GONE)
}

async fn lock_file(path: PathBuf) -> Result<File, HubError> {
    make_parent(&path)?;
    let failed = path.clone();
    let lock = move || {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
        file.lock()?;
        Ok(file)
    };
    let outcome = tokio::task::spawn_blocking(lock).await.map_err(std::io::Error::other);
    outcome.and_then(|file| file).map_err(|error| cache_error(&failed, &error))
}

/// Links as `huggingface_hub` does, relative, so that a cache can be moved.
fn link_to(etag: &str, blob: &Path, link: &Path) -> Result<(), HubError> {
    #[cfg(unix)]
    let outcome = {
        let _ = blob;
        let _ = fs::remove_file(link); // one that led nowhere
        std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), link)
    };
    #[cfg(not(unix))]
    let outcome = {
        let _ = etag;
        fs::copy(blob, link).map(|_| ())
    };
    outcome.map_err(|error| cache_error(link, &error))
}

fn is_file_name(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

async fn bounded_body(url: &str, mut response: Response) -> Result<Vec<u8>, HubError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| unreachable(url, &error))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > LISTING_BYTES_MAX {
            let reason = format!("it is longer than {LISTING_BYTES_MAX} bytes");
            return Err(HubError::BadAnswer { url: url.to_string(), reason });
        }
    }
    Ok(bytes)
}

fn unreachable(url: &str, error: &reqwest::Error) -> HubError {
    HubError::Unreachable { url: url.to_string(), reason: chain(error) }
}

/// The innermost cause: the outer ones only repeat the address.
fn chain(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
