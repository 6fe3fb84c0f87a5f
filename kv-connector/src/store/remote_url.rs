//! Where the shared tier is, as an operator writes it.
//!
//! ```text
//! fs:///mnt/shared/tandem                              a folder that all nodes see
//! redis://:password@host:6379/0?root=tandem            Redis or Valkey
//! s3://bucket/prefix?region=eu-central-1&endpoint=...  S3, or what speaks it; keys from the environment (AWS_...)
//! ```

use std::path::PathBuf;
use std::time::Duration;

use opendal::Operator;
use opendal::services::{Fs, Redis, S3};
use url::Url;

/// A URL that names no storage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--store-remote-url: {0}")]
pub struct BadRemoteUrl(pub String);

/// Storage that all nodes share.
#[derive(Debug)]
pub(super) struct RemoteStorage {
    pub(super) operator: Operator,
    /// Without credentials, for logs.
    pub(super) shown: String,
    /// Whether a budget can be kept by looking at what is there.
    pub(super) can_list: bool,
}

/// Understands a URL; nothing is connected yet.
pub(super) fn open(url: &str, ttl: Option<Duration>) -> Result<RemoteStorage, BadRemoteUrl> {
    let parsed = Url::parse(url).map_err(|error| {
        BadRemoteUrl(format!("this is no URL ({error}): expected one such as fs:///mnt/shared or redis://host:6379/0"))
    })?;
    let scheme = parsed.scheme();
    if ttl.is_some() && scheme != "redis" {
        return Err(BadRemoteUrl(format!(
            "--store-remote-ttl is for Redis; give {scheme} a rule of its own (S3: a lifecycle rule, fs: \
             --store-remote-bytes)"
        )));
    }
    match scheme {
        "fs" => folder(&parsed),
        "redis" => redis(&parsed, ttl),
        "s3" => s3(&parsed),
        "rediss" => Err(BadRemoteUrl("Redis over TLS is not built in: use redis:// through a TLS tunnel".to_string())),
        other => Err(BadRemoteUrl(format!("\"{other}\" is not known: expected fs, redis or s3"))),
    }
}

fn folder(url: &Url) -> Result<RemoteStorage, BadRemoteUrl> {
    check_query(url, &[])?;
    let path = url.to_file_path_like().filter(|path| path.is_absolute() && path.parent().is_some());
    let path = path.ok_or_else(|| {
        BadRemoteUrl(format!("\"{url}\" names no folder: expected an absolute path, as in fs:///mnt/shared"))
    })?;
    let root = path.to_string_lossy().into_owned();
    // Written beside and renamed: nobody reads a half.
    let writing = path.join(".writing").to_string_lossy().into_owned();
    let operator = built(Operator::new(Fs::default().root(&root).atomic_write_dir(&writing)))?;
    Ok(RemoteStorage { operator, shown: url.to_string(), can_list: true })
}

fn redis(url: &Url, ttl: Option<Duration>) -> Result<RemoteStorage, BadRemoteUrl> {
    let query = check_query(url, &["root"])?;
    let host = url.host_str().filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| BadRemoteUrl("redis:// names no host: redis://host:6379/0".to_string()))?;
    let endpoint = format!("redis://{host}:{}", url.port().unwrap_or(6379));
    let root = query.get("root").map_or("/tandem", String::as_str);
    let mut builder = Redis::default().root(root).endpoint(&endpoint);
    let db = url.path().trim_matches('/');
    if !db.is_empty() {
        let number = db.parse().map_err(|_| BadRemoteUrl(format!("\"{db}\" is no number of a Redis database")))?;
        builder = builder.db(number);
    }
    builder = builder.username(&decoded(url.username())).password(&decoded(url.password().unwrap_or_default()));
    if let Some(ttl) = ttl {
        builder = builder.default_ttl(ttl);
    }
    Ok(RemoteStorage { operator: built(Operator::new(builder))?, shown: without_credentials(url), can_list: false })
}

fn s3(url: &Url) -> Result<RemoteStorage, BadRemoteUrl> {
    let query = check_query(url, &["region", "endpoint"])?;
    let bucket = url.host_str().filter(|bucket| !bucket.is_empty());
    let bucket = bucket.ok_or_else(|| BadRemoteUrl("s3:// names no bucket: s3://bucket/prefix".to_string()))?;
    let mut builder = S3::default().bucket(bucket).root(url.path());
    if let Some(region) = query.get("region") {
        builder = builder.region(region);
    }
    if let Some(endpoint) = query.get("endpoint") {
        builder = builder.endpoint(endpoint);
    }
    // Storage over HTTP has no client without it. TLS is the provider's that the process has installed.
    opendal::install_default();
    Ok(RemoteStorage { operator: built(Operator::new(builder))?, shown: without_credentials(url), can_list: false })
}

fn built(operator: opendal::Result<Operator>) -> Result<Operator, BadRemoteUrl> {
    operator.map_err(|error| BadRemoteUrl(error.to_string()))
}

fn check_query(url: &Url, known: &[&str]) -> Result<std::collections::HashMap<String, String>, BadRemoteUrl> {
    let query: std::collections::HashMap<String, String> = url.query_pairs().into_owned().collect();
    match query.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => {
            Err(BadRemoteUrl(format!("{}:// has no setting \"{key}\": expected one of {known:?}", url.scheme())))
        }
        None => Ok(query),
    }
}

/// Without its percent signs. In a form a plus stands for a space, in a password for itself.
fn decoded(text: &str) -> String {
    url::form_urlencoded::parse(format!("x={}", text.replace('+', "%2B")).as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

fn without_credentials(url: &Url) -> String {
    let mut shown = url.clone();
    // Fails only where there can be none.
    let _ = shown.set_username("").and_then(|()| shown.set_password(None));
    shown.to_string()
}

/// `Url::to_file_path` wants the scheme `file`.
trait FilePathLike {
    fn to_file_path_like(&self) -> Option<PathBuf>;
}

impl FilePathLike for Url {
    fn to_file_path_like(&self) -> Option<PathBuf> {
        if self.host_str().is_some_and(|host| !host.is_empty()) {
            return None;
        }
        Url::parse(&format!("file://{}", self.path())).ok()?.to_file_path().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> String {
        open(url, None).unwrap_err().to_string()
    }

    #[test]
    fn each_kind_of_storage_is_understood() {
        for (url, shown, can_list) in [
            ("fs:///tmp/tandem%20x", "fs:///tmp/tandem%20x", true),
            ("redis://:secret@127.0.0.1:7000/3?root=a", "redis://127.0.0.1:7000/3?root=a", false),
            ("s3://bucket/some/prefix?region=eu-central-1", "s3://bucket/some/prefix?region=eu-central-1", false),
        ] {
            let storage = open(url, None).unwrap();
            assert_eq!((storage.shown.as_str(), storage.can_list), (shown, can_list), "{url}");
        }
        assert!(open("redis://localhost", Some(Duration::from_secs(60))).is_ok());
        assert_eq!(decoded("p%40ss+word"), "p@ss+word");
    }

    #[test]
    fn what_is_no_storage_is_refused_in_words() {
        assert!(refused("/mnt/shared").contains("this is no URL"));
        assert!(refused("fs://host/path").contains("absolute path"));
        assert!(refused("fs:///").contains("names no folder"));
        assert!(refused("ftp://host").contains("\"ftp\" is not known"));
        assert!(refused("rediss://host").contains("TLS"));
        assert!(refused("redis://host/x").contains("\"x\" is no number"));
        assert!(refused("redis://host/0?roof=a").contains("no setting \"roof\""));
        let ttl = open("fs:///tmp/tandem", Some(Duration::from_secs(1))).unwrap_err().to_string();
        assert!(ttl.contains("--store-remote-ttl is for Redis"), "{ttl}");
    }
}
