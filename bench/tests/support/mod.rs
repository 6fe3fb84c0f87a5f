//! An endpoint that does what a script says.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Barrier;

/// What the endpoint does next with a request.
#[derive(Clone)]
pub(crate) enum Step {
    /// Lets time pass: the delay that is to be measured.
    Delay(Duration),
    /// Waits until this many requests have come as far.
    Meet(Arc<Barrier>),
    /// Is one less in progress.
    Leave(Arc<AtomicUsize>),
    /// Writes.
    Write(String),
    /// Keeps the connection and says nothing more.
    Hang,
}

/// A request as it came.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) request_id: String,
    pub(crate) body: Value,
}

/// A listening endpoint. Every answer ends with its connection.
pub(crate) struct ScriptedEndpoint {
    pub(crate) base_url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// The head of a streamed answer.
pub(crate) fn head() -> Step {
    Step::Write("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n".into())
}

/// One token.
pub(crate) fn token() -> Step {
    Step::Write("data: {\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":null}],\"usage\":null}\n\n".into())
}

/// Usage and end.
pub(crate) fn end(num_tokens: usize) -> Step {
    Step::Write(format!(
        "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":16,\"completion_tokens\":{num_tokens}}}}}\n\ndata: [DONE]\n\n"
    ))
}

impl ScriptedEndpoint {
    /// Does `script(request)` with each request.
    pub(crate) async fn start(script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}", listener.local_addr().unwrap());
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (script, all) = (Arc::new(script), seen.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, all) = (script.clone(), all.clone());
                tokio::spawn(async move {
                    let mut stream = stream;
                    let request = read_request(&mut stream).await;
                    all.lock().unwrap().push(request.clone());
                    for step in script(&request) {
                        perform(step, &mut stream).await;
                    }
                });
            }
        });
        Self { base_url, seen }
    }

    /// All requests so far, by their id.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        let mut seen = self.seen.lock().unwrap().clone();
        seen.sort_by(|one, other| one.request_id.cmp(&other.request_id));
        seen
    }
}

async fn perform(step: Step, stream: &mut TcpStream) {
    match step {
        Step::Delay(delay) => tokio::time::sleep_until(tokio::time::Instant::now() + delay).await,
        Step::Meet(barrier) => {
            barrier.wait().await;
        }
        Step::Leave(in_progress) => {
            in_progress.fetch_sub(1, Ordering::SeqCst);
        }
        // The client may have left.
        Step::Write(text) => drop(stream.write_all(text.as_bytes()).await),
        Step::Hang => std::future::pending().await,
    }
}

async fn read_request(stream: &mut TcpStream) -> Seen {
    let mut bytes = Vec::new();
    let mut rest = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let header = |name: &str| {
                let lines = head.lines().filter_map(|line| line.split_once(": "));
                lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_string()).next()
            };
            if body.len() == header("content-length").unwrap().parse::<usize>().unwrap() {
                return Seen { request_id: header("x-request-id").unwrap(), body: serde_json::from_str(body).unwrap() };
            }
        }
        let num_read = stream.read(&mut rest).await.unwrap();
        assert_ne!(num_read, 0, "the client left within its request");
        bytes.extend_from_slice(&rest[..num_read]);
    }
}
