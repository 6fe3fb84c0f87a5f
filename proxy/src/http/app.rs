//! What all handlers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::dispatch::Dispatcher;
use crate::metrics::ProxyMetrics;
use crate::openai::{ApiError, ErrorKind};
use crate::text::ModelText;

/// What can be set of the HTTP side.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpSettings {
    /// Names clients may give as `model`, the first one is shown; never empty.
    pub model_names: Vec<String>,
    /// Keys clients must send; empty: none is asked.
    pub api_keys: Vec<String>,
    /// Origins whose web pages may call; `*`: all, empty: none.
    pub allowed_origins: Vec<String>,
    /// Largest body.
    pub body_bytes_max: usize,
    /// Requests in progress at most.
    pub num_requests_max: usize,
    /// Time for one request.
    pub request_timeout: Duration,
    /// Seed of requests that give none; `None`: drawn for each.
    pub seed: Option<u64>,
}

/// The endpoint's state.
pub struct App {
    /// The model's text side.
    pub text: Arc<ModelText>,
    /// The way to the nodes.
    pub dispatcher: Arc<Dispatcher>,
    /// Settings.
    pub settings: HttpSettings,
    /// Counters.
    pub metrics: Arc<ProxyMetrics>,
    /// Where they are rendered.
    pub prometheus: PrometheusHandle,
    /// Cancelled when running requests are cut off.
    pub abort: CancellationToken,
    /// Seconds since 1970 at the start.
    pub created: u64,
    is_draining: AtomicBool,
    slots: Arc<Semaphore>,
    num_open: Arc<watch::Sender<usize>>,
}

/// What is in use at one moment; all zero when nothing runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Accounting {
    /// Requests that hold a slot.
    pub num_open_requests: usize,
    /// Streams open to nodes.
    pub num_open_streams: usize,
}

impl App {
    /// A new endpoint without requests.
    pub fn new(
        text: Arc<ModelText>,
        dispatcher: Arc<Dispatcher>,
        settings: HttpSettings,
        metrics: Arc<ProxyMetrics>,
        prometheus: PrometheusHandle,
    ) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(settings.num_requests_max.min(Semaphore::MAX_PERMITS))),
            text,
            dispatcher,
            settings,
            metrics,
            prometheus,
            abort: CancellationToken::new(),
            created: unix_seconds(),
            is_draining: AtomicBool::new(false),
            num_open: Arc::new(watch::Sender::new(0)),
        }
    }

    /// From now on new requests are refused with 503.
    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Whether new requests are refused.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// What is in use.
    pub fn accounting(&self) -> Accounting {
        Accounting { num_open_requests: *self.num_open.borrow(), num_open_streams: self.dispatcher.num_streams() }
    }

    /// Waits until no request holds a slot.
    pub async fn idle(&self) {
        // The sender is this one's own, so waiting cannot fail.
        let _ = self.num_open.subscribe().wait_for(|n| *n == 0).await;
    }

    /// Takes a slot for a generating request.
    ///
    /// # Errors
    /// 503 while draining, 429 when every slot is taken.
    pub fn admit(&self) -> Result<Slot, ApiError> {
        if self.is_draining() {
            let error = ApiError::new(ErrorKind::Unavailable, "the proxy is draining: ask another one");
            return Err(error.with_retry_after(Duration::from_secs(1)));
        }
        let permit = self.slots.clone().try_acquire_owned().map_err(|_| {
            let message = format!(
                "{} requests are in progress, which is the limit here: repeat the request after the time in Retry-After",
                self.settings.num_requests_max
            );
            ApiError::new(ErrorKind::Overloaded, message).with_retry_after(Duration::from_secs(1))
        })?;
        self.num_open.send_modify(|n| *n += 1);
        let status = Arc::new(AtomicU16::new(CLIENT_LEFT));
        Ok(Slot { num_open: self.num_open.clone(), metrics: self.metrics.clone(), status, _permit: permit })
    }
}

/// Status in the metrics of a request whose client left, as nginx counts it.
const CLIENT_LEFT: u16 = 499;

/// A request in progress; counted and given back when dropped.
pub struct Slot {
    num_open: Arc<watch::Sender<usize>>,
    metrics: Arc<ProxyMetrics>,
    status: Arc<AtomicU16>,
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    /// How the request ended; without this, its client left.
    pub fn set_status(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.num_open.send_modify(|n| *n -= 1);
        self.metrics.on_status(self.status.load(Ordering::Relaxed));
    }
}

/// The wall clock, for `created`.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
