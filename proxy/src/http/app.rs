//! What all handlers share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

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
    /// Bytes that bodies on their way may still take.
    body_bytes: Arc<Semaphore>,
    num_open: Arc<watch::Sender<usize>>,
}

/// What is in use at one moment; all zero when nothing runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Accounting {
    /// Requests that hold a slot, those that still send their body too.
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
        let body_bytes = settings.body_bytes_max.saturating_mul(settings.num_requests_max.max(1));
        Self {
            slots: Arc::new(Semaphore::new(settings.num_requests_max.min(Semaphore::MAX_PERMITS))),
            body_bytes: Arc::new(Semaphore::new(body_bytes.min(Semaphore::MAX_PERMITS))),
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

    /// Requests that have a place: what they send is here.
    pub fn num_in_progress(&self) -> usize {
        self.settings.num_requests_max.min(Semaphore::MAX_PERMITS) - self.slots.available_permits()
    }

    /// Waits until no request holds a slot.
    pub async fn idle(&self) {
        // The sender is this one's own, so waiting cannot fail.
        let _ = self.num_open.subscribe().wait_for(|n| *n == 0).await;
    }

    /// Counts a generating request whose body is still to come. It gets its place with [`Slot::take_place`]:
    /// clients that send slowly, or never, must not keep those out that send at once.
    ///
    /// # Errors
    /// 503 while draining, 429 when every place is taken, before a body is read in vain.
    pub fn arrive(&self) -> Result<Slot, ApiError> {
        if self.is_draining() {
            let error = ApiError::new(ErrorKind::Unavailable, "the proxy is draining: ask another one");
            return Err(error.with_retry_after(RETRY_AFTER));
        }
        if self.slots.available_permits() == 0 {
            return Err(self.is_full());
        }
        self.num_open.send_modify(|n| *n += 1);
        Ok(Slot { num_open: self.num_open.clone(), metrics: self.metrics.clone(), status: CLIENT_LEFT, place: None })
    }

    fn is_full(&self) -> ApiError {
        let message = format!(
            "{} requests are in progress, which is the limit here: repeat the request after the time in Retry-After",
            self.settings.num_requests_max
        );
        ApiError::new(ErrorKind::Overloaded, message).with_retry_after(RETRY_AFTER)
    }

    /// Room for what requests send until they are read: as much as the largest bodies of all requests that
    /// may be in progress.
    pub fn body_room(&self) -> BodyRoom {
        BodyRoom::new(self.settings.body_bytes_max, self.body_bytes.clone())
    }
}

/// Status in the metrics of a request whose client left, as nginx counts it.
const CLIENT_LEFT: u16 = 499;

/// When a request that found no room here is worth repeating.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// An open request; counted and given back when dropped.
pub struct Slot {
    num_open: Arc<watch::Sender<usize>>,
    metrics: Arc<ProxyMetrics>,
    status: u16,
    place: Option<OwnedSemaphorePermit>,
}

impl Slot {
    /// Takes one of the places for requests in progress, for as long as this lives.
    ///
    /// # Errors
    /// 429 when every place is taken.
    pub fn take_place(&mut self, app: &App) -> Result<(), ApiError> {
        self.place = Some(app.slots.clone().try_acquire_owned().map_err(|_| app.is_full())?);
        Ok(())
    }

    /// How the request ended; without this, its client left.
    pub fn set_status(&mut self, status: u16) {
        self.status = status;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.num_open.send_modify(|n| *n -= 1);
        self.metrics.on_status(self.status);
    }
}

/// A slot that is given back when its request's time is over, even if nobody looks: a client that stopped
/// reading stops its stream, and the stream is all that could notice.
pub struct TimedSlot {
    slot: Arc<Mutex<Option<Slot>>>,
    _timer: AbortOnDropHandle<()>,
}

impl TimedSlot {
    /// `slot` until `deadline`, at which its request ends as timed out.
    pub fn new(slot: Slot, deadline: Instant) -> Self {
        let slot = Arc::new(Mutex::new(Some(slot)));
        let timed = slot.clone();
        let timer = async move {
            tokio::time::sleep_until(deadline).await;
            if let Some(mut slot) = lock(&timed).take() {
                slot.set_status(ErrorKind::Timeout.status().as_u16());
                tracing::warn!("the request's time limit passed before its client had read the answer");
            }
        };
        Self { slot, _timer: AbortOnDropHandle::new(tokio::spawn(timer.in_current_span())) }
    }

    /// How the request ended, unless its time had passed before.
    pub fn set_status(&self, status: u16) {
        if let Some(slot) = lock(&self.slot).as_mut() {
            slot.set_status(status);
        }
    }
}

/// A slot is whole at any time, so one that a panic left behind is used on.
fn lock(slot: &Mutex<Option<Slot>>) -> MutexGuard<'_, Option<Slot>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one body may take of the bytes that are set aside for all; given back when dropped.
pub struct BodyRoom {
    /// Largest body.
    pub bytes_max: usize,
    left: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
}

impl BodyRoom {
    /// Room for a body of at most `bytes_max` bytes, as long as `left` has permits for them.
    pub fn new(bytes_max: usize, left: Arc<Semaphore>) -> Self {
        Self { bytes_max, left, taken: None }
    }

    /// Room for `num_bytes` more.
    ///
    /// # Errors
    /// 429 if other bodies take all of it.
    pub fn take(&mut self, num_bytes: usize) -> Result<(), ApiError> {
        let permits = u32::try_from(num_bytes).ok().and_then(|n| self.left.clone().try_acquire_many_owned(n).ok());
        let Some(permits) = permits else {
            let message = "other requests' bodies take all the memory that is set aside for them: \
                           repeat the request after the time in Retry-After";
            return Err(ApiError::new(ErrorKind::Overloaded, message).with_retry_after(RETRY_AFTER));
        };
        match &mut self.taken {
            Some(taken) => taken.merge(permits),
            None => self.taken = Some(permits),
        }
        Ok(())
    }
}

/// The wall clock, for `created`.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
