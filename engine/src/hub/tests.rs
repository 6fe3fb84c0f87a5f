use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;
use crate::test_folder::TestFolder;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A Hub on a thread: a repository `org/name` with some files. Large ones are redirected.
struct TestHub {
    endpoint: String,
    log: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone, Default)]
struct TestRepo {
    files: HashMap<String, Vec<u8>>,
    /// The first answers with this file's content stop after so many bytes.
    cut: Option<(String, usize)>,
    /// This file's content is not what its etag says.
    damaged: Option<String>,
    token: Option<String>,
    /// Shows its files and does not give them.
    is_gated: bool,
}

impl TestHub {
    fn start(repo: TestRepo) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (shared, cut) = (log.clone(), Arc::new(Mutex::new(repo.cut.clone())));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (repo, log, cut) = (repo.clone(), shared.clone(), cut.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &repo, &log, &cut));
            }
        });
        Self { endpoint, log }
    }

    fn settings(&self, cache: &TestFolder) -> HubSettings {
        let cache = cache.path().to_path_buf();
        HubSettings { cache, endpoint: self.endpoint.clone(), token: None, is_offline: false }
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

/// One request per connection.
fn serve(stream: TcpStream, repo: &TestRepo, log: &Mutex<Vec<String>>, cut: &Mutex<Option<(String, usize)>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_string());
    }
    let header = |name: &str| {
        let found = lines.iter().find_map(|line| line.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
        found.map(|(_, value)| value.to_string())
    };
    let mut words = lines[0].split(' ');
    let (method, path) = (words.next().unwrap().to_string(), words.next().unwrap().to_string());
    let range = header("range");
    log.lock().unwrap().push(format!("{method} {path}{}", range.as_ref().map_or(String::new(), |r| format!(" {r}"))));
    let mut stream = stream;
    let mut answer = |status: &str, headers: &str, body: &[u8], num_sent: usize| {
        let _ =
            write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        if method == "GET" {
            let _ = stream.write_all(&body[..num_sent.min(body.len())]);
        }
    };
    if repo.token.as_ref().is_some_and(|token| header("authorization") != Some(format!("Bearer {token}"))) {
        return answer("401 Unauthorized", "", b"", 0);
    }
    if path == "/api/models/org/name/revision/main" {
        let siblings: Vec<_> = repo.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return answer("200 OK", "", body.as_bytes(), usize::MAX);
    }
    let (prefix, blob_prefix) = (format!("/org/name/resolve/{COMMIT}/"), "/storage/");
    let is_large = |name: &str| name.ends_with(".safetensors");
    if repo.is_gated {
        return answer("403 Forbidden", "", b"", 0);
    }
    if let Some(name) = path.strip_prefix(&prefix)
        && let Some(content) = repo.files.get(name)
    {
        if is_large(name) {
            let sha: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
            let headers = format!(
                "location: {blob_prefix}{name}\r\nx-linked-etag: \"{sha}\"\r\nx-linked-size: {}\r\n",
                content.len()
            );
            return answer("302 Found", &headers, b"", 0);
        }
        return answer("200 OK", &format!("etag: \"git-{}\"\r\n", name.replace('.', "-")), content, usize::MAX);
    }
    if let Some(name) = path.strip_prefix(blob_prefix)
        && let Some(content) = repo.files.get(name)
    {
        let mut content = content.clone();
        if repo.damaged.as_deref() == Some(name) {
            content[0] ^= 1;
        }
        let num_sent = match cut.lock().unwrap().take_if(|(cut, _)| cut == name) {
            Some((_, num_bytes)) => num_bytes,
            None => usize::MAX,
        };
        let first = range.map_or(0, |range| range["bytes=".len()..range.len() - 1].parse::<usize>().unwrap());
        let status = if first > 0 { "206 Partial Content" } else { "200 OK" };
        return answer(status, "", &content[first..], num_sent);
    }
    answer("404 Not Found", "", b"", 0);
}

fn repo() -> TestRepo {
    let weights: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let files = [
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"[]".to_vec()),
        ("README.md", b"not wanted".to_vec()),
        ("model.safetensors.index.json", index.to_vec()),
        ("model-1.safetensors", weights.clone()),
        ("model-2.safetensors", weights[..50_000].to_vec()),
    ];
    TestRepo { files: files.into_iter().map(|(name, bytes)| (name.to_string(), bytes)).collect(), ..Default::default() }
}

#[tokio::test]
async fn a_snapshot_is_downloaded_once_in_the_standard_layout() {
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(repo()));
    let settings = hub.settings(&cache);
    let snapshot = resolve("org/name", None, &settings).await.unwrap();
    assert_eq!(snapshot, cache.path().join("models--org--name/snapshots").join(COMMIT));
    assert_eq!(fs::read(snapshot.join("model-1.safetensors")).unwrap(), repo().files["model-1.safetensors"]);
    assert!(!snapshot.join("README.md").exists());
    let link = fs::read_link(snapshot.join("config.json")).unwrap();
    assert_eq!(link, Path::new("../../blobs/git-config-json"));
    assert_eq!(fs::read_to_string(cache.path().join("models--org--name/refs/main")).unwrap(), COMMIT);
    hub.requests();
    // Again: the branch is looked up, nothing else is asked.
    assert_eq!(resolve("org/name@main", None, &settings).await.unwrap(), snapshot);
    assert_eq!(hub.requests(), ["GET /api/models/org/name/revision/main"]);
    // A commit never changes, and offline nobody is asked.
    assert_eq!(resolve("org/name", Some(COMMIT), &settings).await.unwrap(), snapshot);
    let offline = HubSettings { is_offline: true, ..settings };
    assert_eq!(resolve("org/name", None, &offline).await.unwrap(), snapshot);
    assert!(hub.requests().is_empty());
}

#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_stopped() {
    let cut = Some(("model-1.safetensors".to_string(), 40_000));
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(TestRepo { cut, ..repo() }));
    let snapshot = resolve("org/name", None, &hub.settings(&cache)).await.unwrap();
    assert_eq!(fs::read(snapshot.join("model-1.safetensors")).unwrap(), repo().files["model-1.safetensors"]);
    let requests = hub.requests();
    assert!(requests.contains(&"GET /storage/model-1.safetensors bytes=40000-".to_string()), "{requests:?}");
}

#[tokio::test]
async fn damaged_content_is_refused_and_removed() {
    let damaged = Some("model-2.safetensors".to_string());
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(TestRepo { damaged, ..repo() }));
    let error = resolve("org/name", None, &hub.settings(&cache)).await.unwrap_err();
    assert!(matches!(&error, HubError::Damaged { what: "SHA-256", .. }), "{error}");
    let names = fs::read_dir(cache.path().join("models--org--name/blobs")).unwrap();
    let names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.ends_with("incomplete")), "{names:?}");
    assert!(!cache.path().join("models--org--name/refs/main").exists());
}

#[tokio::test]
async fn a_token_opens_what_is_closed_without_it() {
    let token = Some("secret".to_string());
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(TestRepo { token: token.clone(), ..repo() }));
    let settings = hub.settings(&cache);
    let error = resolve("org/name", None, &settings).await.unwrap_err().to_string();
    assert!(error.contains("HTTP 401") && error.contains("HF_TOKEN"), "{error}");
    let settings = HubSettings { token, ..settings };
    assert!(resolve("org/name", None, &settings).await.is_ok());
    assert!(!format!("{settings:?}").contains("secret"));
}

#[tokio::test]
async fn a_gated_model_asks_for_a_token() {
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(TestRepo { is_gated: true, ..repo() }));
    let error = resolve("org/name", None, &hub.settings(&cache)).await.unwrap_err().to_string();
    assert!(error.contains("HTTP 403") && error.contains("HF_TOKEN"), "{error}");
}

#[tokio::test]
async fn two_at_once_download_each_file_once() {
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(repo()));
    let settings = hub.settings(&cache);
    let (one, two) = tokio::join!(resolve("org/name", None, &settings), resolve("org/name", None, &settings));
    assert_eq!(one.unwrap(), two.unwrap());
    let requests = hub.requests();
    let num_downloads = requests.iter().filter(|request| request.starts_with("GET /storage/model-1")).count();
    assert_eq!(num_downloads, 1, "{requests:?}");
}

#[tokio::test]
async fn what_cannot_be_had_is_said_in_a_sentence() {
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(repo()));
    let settings = hub.settings(&cache);
    let error = resolve("org/other", None, &settings).await.unwrap_err().to_string();
    assert!(error.starts_with("org/other is neither a folder here nor a model at http://127.0.0.1:"), "{error}");
    let error = resolve("../no/such/folder", None, &settings).await.unwrap_err();
    assert!(matches!(error, HubError::NotAnId { .. }));
    let existing = cache.path().join("model.GGUF");
    fs::write(&existing, "GGUF").unwrap();
    assert_eq!(resolve(existing.to_str().unwrap(), None, &settings).await.unwrap(), existing);
    for name in ["org/name.gguf", "model.gguf", "/no/such/folder/model.gguf"] {
        let error = resolve(name, None, &settings).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("{name} is not a file here: give the path of a GGUF file")), "{error}");
    }
    let offline = HubSettings { is_offline: true, ..settings.clone() };
    let error = resolve("org/name", None, &offline).await.unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    let mut bare = repo();
    bare.files.retain(|name, _| !name.contains("safetensors"));
    let hub = TestHub::start(bare);
    let error = resolve("org/name", None, &hub.settings(&cache)).await.unwrap_err();
    assert!(matches!(error, HubError::NoWeights { .. }));
}

#[tokio::test]
async fn a_cached_snapshot_serves_when_the_server_is_gone() {
    let (cache, hub) = (TestFolder::new("hub"), TestHub::start(repo()));
    let snapshot = resolve("org/name", None, &hub.settings(&cache)).await.unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let settings = HubSettings { endpoint: format!("http://{gone}"), ..hub.settings(&cache) };
    assert_eq!(resolve("org/name", None, &settings).await.unwrap(), snapshot);
    let error = resolve("org/else", None, &settings).await.unwrap_err().to_string();
    assert!(error.ends_with("and no complete copy is cached"), "{error}");
}

#[test]
fn settings_follow_the_environment_of_the_hub() {
    let settings = |pairs: &[(&str, &str)]| {
        let map: HashMap<String, String> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        HubSettings::from_lookup(|name| map.get(name).cloned())
    };
    let home = settings(&[("HOME", "/nowhere/me")]);
    assert_eq!(home.cache, Path::new("/nowhere/me/.cache/huggingface/hub"));
    assert_eq!((home.endpoint.as_str(), home.token, home.is_offline), ("https://huggingface.co", None, false));
    let all = settings(&[
        ("HOME", "/nowhere/me"),
        ("HF_HOME", "/nowhere/hf"),
        ("HF_ENDPOINT", "https://mirror/"),
        ("HF_TOKEN", " t "),
        ("HF_HUB_OFFLINE", "1"),
    ]);
    assert_eq!(all.cache, Path::new("/nowhere/hf/hub"));
    assert_eq!((all.endpoint.as_str(), all.token.as_deref(), all.is_offline), ("https://mirror", Some("t"), true));
    assert_eq!(settings(&[("HF_HUB_CACHE", "/nowhere/c"), ("HF_HOME", "/h")]).cache, Path::new("/nowhere/c"));
}

#[test]
fn ids_have_one_slash_at_most_and_no_tricks() {
    let id = |name: &str| HubId::parse(name, None);
    assert_eq!(id("org/name@v1").unwrap().revision, "v1");
    assert_eq!(HubId::parse("org/name@v1", Some("v2")).unwrap().revision, "v2");
    assert_eq!(id("gpt2").unwrap().folder(Path::new("c")), Path::new("c/models--gpt2"));
    for bad in ["", "a/b/c", "../x", "a/..", "a/b@../../x", "a b", "/abs", ".hidden/x", "a//b"] {
        assert_eq!(id(bad), None, "{bad}");
    }
    assert_eq!(shards(br#"{"weight_map": {"a": "../x"}}"#), None);
}
