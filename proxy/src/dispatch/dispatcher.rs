//! What outlives a request: the nodes, the retry budget, the quarantine.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::ids::RequestId;
use common::sampling::{FinishReason, SampledToken, SamplingParams};
use common::timeline::NodeTimeline;
use common::tokens::Token;
use tokio::time::Instant;

use super::nodes::Nodes;
use super::quarantine::Quarantine;
use super::retry_budget::RetryBudget;
use super::story::Dispatch;
use crate::metrics::ProxyMetrics;
use crate::openai::{ApiError, ErrorKind};

/// What can be set.
#[derive(Debug, Clone, PartialEq)]
pub struct DispatchSettings {
    /// Prompts up to this length are prefilled by the decode node.
    pub local_prefill_max_tokens: usize,
    /// Prefill nodes proposed per request.
    pub num_prefill_candidates: usize,
    /// Node losses that a request survives.
    pub max_losses: usize,
    /// Resumes per served request that the proxy allows itself.
    pub retry_share: f64,
    /// How long a request that has tokens already waits for a node to go on with.
    pub patience: Duration,
    /// What one request more on a decode node weighs against prompt tokens that another one holds.
    pub request_weight_tokens: usize,
}

/// The proxy's part that outlives requests.
pub struct Dispatcher {
    pub(super) nodes: Arc<dyn Nodes>,
    pub(super) settings: DispatchSettings,
    pub(super) budget: Mutex<RetryBudget>,
    pub(super) quarantine: Mutex<Quarantine>,
    pub(super) metrics: Arc<ProxyMetrics>,
    pub(super) turn: AtomicUsize,
    pub(super) num_streams: Arc<AtomicUsize>,
}

/// One prompt to answer.
#[derive(Debug, Clone, PartialEq)]
pub struct DispatchRequest {
    /// Its id.
    pub id: RequestId,
    /// Its tokens, at least one.
    pub prompt: Vec<Token>,
    /// How to choose tokens.
    pub params: SamplingParams,
    /// How many answers.
    pub n: u32,
    /// Tenant salt.
    pub salt: Vec<u8>,
    /// When it is given up.
    pub deadline: Instant,
}

/// What happens, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum DispatchEvent {
    /// A node took it on.
    Accepted,
    /// A token was committed.
    Token {
        /// Of which answer.
        choice: usize,
        /// The token.
        token: SampledToken,
        /// Set with the last one of the answer.
        finish: Option<FinishReason>,
    },
    /// All answers are complete.
    Done {
        /// Where the time went, as the nodes saw it.
        timeline: NodeTimeline,
    },
}

impl Dispatcher {
    /// Over these nodes.
    pub fn new(nodes: Arc<dyn Nodes>, settings: DispatchSettings, metrics: Arc<ProxyMetrics>) -> Self {
        let budget = RetryBudget::new(settings.retry_share, std::time::Instant::now());
        Self {
            nodes,
            settings,
            budget: Mutex::new(budget),
            quarantine: Mutex::default(),
            metrics,
            turn: AtomicUsize::new(0),
            num_streams: Arc::default(),
        }
    }

    /// The nodes.
    pub fn nodes(&self) -> &Arc<dyn Nodes> {
        &self.nodes
    }

    /// Streams open to nodes.
    pub fn num_streams(&self) -> usize {
        self.num_streams.load(Ordering::Relaxed)
    }

    /// Begins a request; nothing is sent before [`Dispatch::next`].
    ///
    /// # Errors
    /// If the prompt is quarantined.
    pub fn begin(self: &Arc<Self>, request: DispatchRequest) -> Result<Dispatch, ApiError> {
        let quarantine = lock(&self.quarantine);
        let fingerprint = quarantine.fingerprint(&request.prompt);
        if let Some(left) = quarantine.remaining(fingerprint, Instant::now().into_std()) {
            let message = format!(
                "this prompt failed on several nodes a short while ago and is refused for another {} s, so that it \
                 cannot take more of them with it",
                left.as_secs() + 1
            );
            return Err(ApiError::new(ErrorKind::Quarantined, message));
        }
        drop(quarantine);
        lock(&self.budget).on_request();
        Ok(Dispatch::new(self.clone(), fingerprint, request))
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Both tables are valid after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
