//! What the proxy counts and measures, under its own names and under vLLM's.
//!
//! Durations of nodes come as spans in their timelines; durations of a request are the proxy's own, from
//! the request's last byte in. The recorder is one per process: [`install`] it once and hand its handle
//! to every role that serves `/metrics`.

use std::sync::OnceLock;
use std::time::Duration;

use common::block_events::Medium;
use common::ids::NodeId;
use common::shared_metrics::{
    FIRST_TOKEN_GAP_SECONDS, KV_TRANSFERRED_BYTES, LOCAL_PREFILLS, OPEN_REQUESTS, REQUEST_HANDOVER_SECONDS,
    REQUEST_PREFILL_SECONDS, REQUEST_QUEUE_SECONDS, REQUEST_TRANSFER_SECONDS,
};
use common::timeline::NodeTimeline;
use metrics::{Label, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
pub use metrics_exporter_prometheus::PrometheusHandle;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

use crate::openai::answers::Usage;

/// Upper bounds in seconds of everything measured in seconds, from a fast token to a long answer.
const SECONDS: [f64; 26] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5, 5.0, 10.0, 20.0, 60.0, 180.0, 600.0,
];
/// Upper bounds of token counts.
const TOKENS: [f64; 16] = [
    1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0, 131072.0,
    1048576.0,
];

/// The process's Prometheus recorder; the first call installs it.
///
/// # Errors
/// If the process has another recorder already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    static INSTALLING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = INSTALLING.lock();
    if let Some(handle) = HANDLE.get() {
        return Ok(handle.clone());
    }
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_tokens".into()), &TOKENS)?
        .install_recorder()?;
    describe();
    Ok(HANDLE.get_or_init(|| handle).clone())
}

/// The `HELP` lines of what the proxy writes. Names with `vllm:` mean what they mean there.
fn describe() {
    for shared in [
        FIRST_TOKEN_GAP_SECONDS,
        REQUEST_QUEUE_SECONDS,
        REQUEST_PREFILL_SECONDS,
        REQUEST_TRANSFER_SECONDS,
        REQUEST_HANDOVER_SECONDS,
    ] {
        describe_histogram!(shared.name, shared.help);
    }
    for shared in [LOCAL_PREFILLS, KV_TRANSFERRED_BYTES] {
        describe_counter!(shared.name, shared.help);
    }
    describe_gauge!(OPEN_REQUESTS.name, OPEN_REQUESTS.help);
    for (name, help) in [
        ("tandem_time_to_first_token_seconds", "From a request's last byte to its first token"),
        ("vllm:time_to_first_token_seconds", "From a request's last byte to its first token"),
        ("tandem_inter_token_latency_seconds", "Time between two tokens of a choice"),
        ("vllm:inter_token_latency_seconds", "Time between two tokens of a choice"),
        ("tandem_e2e_request_latency_seconds", "From a request's last byte to its last token"),
        ("vllm:e2e_request_latency_seconds", "From a request's last byte to its last token"),
        ("tandem_time_per_output_token_seconds", "Mean time per token behind the first, of one request"),
        ("vllm:time_per_output_token_seconds", "Mean time per token behind the first, of one request"),
        ("vllm:request_time_per_output_token_seconds", "Mean time per token behind the first, of one request"),
        ("vllm:request_queue_time_seconds", "Time in queues"),
        ("vllm:request_prefill_time_seconds", "Time in which the prompt was computed"),
        ("tandem_request_prompt_tokens", "Prompt tokens of one request"),
        ("vllm:request_prompt_tokens", "Prompt tokens of one request"),
        ("tandem_request_generation_tokens", "Generated tokens of one request"),
        ("vllm:request_generation_tokens", "Generated tokens of one request"),
    ] {
        describe_histogram!(name, help);
    }
    for (name, help) in [
        ("tandem_cached_prompt_tokens_total", "Prompt tokens of answered requests whose KV was there already"),
        ("tandem_prompt_tokens_total", "Prompt tokens of answered requests"),
        ("vllm:prompt_tokens_total", "Prompt tokens of answered requests"),
        ("tandem_generation_tokens_total", "Tokens of answered requests"),
        ("vllm:generation_tokens_total", "Tokens of answered requests"),
        ("vllm:request_success_total", "Choices that ended, by reason"),
        (
            "tandem_requests_total",
            "Requests for answers by HTTP status, and all that had no valid key; 499: the client left",
        ),
        ("tandem_node_losses_total", "Losses of a node under a request"),
        ("tandem_resumes_total", "Requests, or choices of them, that went on at another node"),
        ("tandem_block_index_events_total", "Block events of nodes that were taken in"),
        ("tandem_block_index_dropped_total", "Blocks of nodes that were left out of the index for want of room"),
        ("tandem_block_index_restarts_total", "Times that a node's blocks were learnt from nothing"),
        (
            "tandem_believed_cached_tokens_total",
            "Prompt tokens that the chosen node was believed to hold, in its pool or in a tier",
        ),
        ("tandem_prefix_peers_named_total", "Requests that were sent with the name of another holder of their prefix"),
        ("tandem_believed_cached_error_tokens_total", "Difference between the cached tokens believed and told"),
        ("tandem_busy_total", "Times that a node said it was full"),
    ] {
        describe_counter!(name, help);
    }
    for (name, help) in [
        ("tandem_block_index_blocks", "Blocks that are known to be held by some node"),
        ("vllm:num_requests_running", "Requests in progress at this proxy"),
        ("vllm:num_requests_waiting", "Requests that wait for their turn on decode nodes"),
        ("tandem_ready_nodes", "Nodes that can take requests"),
    ] {
        describe_gauge!(name, help);
    }
}

/// The proxy's counters and histograms with their labels.
#[derive(Debug, Clone)]
pub struct ProxyMetrics {
    labels: Vec<Label>,
}

/// What one answer's clock showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestClock {
    /// From the request's arrival to its first token.
    pub ttft: Option<Duration>,
    /// From its arrival to its end.
    pub e2e: Duration,
    /// Mean time per token behind the first of a choice.
    pub tpot: Option<Duration>,
}

impl ProxyMetrics {
    /// For the proxy called `node`, serving `model_name`.
    pub fn new(node: &NodeId, model_name: &str) -> Self {
        let labels = vec![
            Label::new("role", "proxy"),
            Label::new("node", node.to_string()),
            Label::new("model_name", model_name.to_string()),
        ];
        Self { labels }
    }

    fn with(&self, key: &'static str, value: String) -> Vec<Label> {
        let mut labels = self.labels.clone();
        labels.push(Label::new(key, value));
        labels
    }

    /// The first token of a request came.
    pub fn on_first_token(&self, ttft: Duration) {
        let seconds = ttft.as_secs_f64();
        histogram!("tandem_time_to_first_token_seconds", self.labels.clone()).record(seconds);
        histogram!("vllm:time_to_first_token_seconds", self.labels.clone()).record(seconds);
    }

    /// Another token of a choice came, `gap` behind the one before it. The gap between #1 and #2 is
    /// measured on its own as well: a slow hand-over would hide there.
    pub fn on_next_token(&self, gap: Duration, is_second: bool) {
        let seconds = gap.as_secs_f64();
        if is_second {
            histogram!(FIRST_TOKEN_GAP_SECONDS.name, self.labels.clone()).record(seconds);
        }
        histogram!("tandem_inter_token_latency_seconds", self.labels.clone()).record(seconds);
        histogram!("vllm:inter_token_latency_seconds", self.labels.clone()).record(seconds);
    }

    /// A request was answered completely.
    pub fn on_answered(&self, clock: RequestClock, timeline: &NodeTimeline, usage: Usage) {
        let record = |name: &'static str, span: Duration| {
            histogram!(name, self.labels.clone()).record(span.as_secs_f64());
        };
        record("tandem_e2e_request_latency_seconds", clock.e2e);
        record("vllm:e2e_request_latency_seconds", clock.e2e);
        if let Some(tpot) = clock.tpot {
            record("tandem_time_per_output_token_seconds", tpot);
            record("vllm:time_per_output_token_seconds", tpot);
            record("vllm:request_time_per_output_token_seconds", tpot);
        }
        record(REQUEST_QUEUE_SECONDS.name, timeline.queue);
        record(REQUEST_PREFILL_SECONDS.name, timeline.prefill);
        record("vllm:request_queue_time_seconds", timeline.queue);
        record("vllm:request_prefill_time_seconds", timeline.prefill);
        if timeline.is_local_prefill {
            counter!(LOCAL_PREFILLS.name, self.labels.clone()).increment(1);
        } else {
            record(REQUEST_TRANSFER_SECONDS.name, timeline.transfer);
            record(REQUEST_HANDOVER_SECONDS.name, timeline.handover);
        }
        counter!(KV_TRANSFERRED_BYTES.name, self.labels.clone()).increment(timeline.transferred_bytes);
        counter!("tandem_cached_prompt_tokens_total", self.labels.clone()).increment(usage.cached_tokens);
        for name in ["tandem_prompt_tokens_total", "vllm:prompt_tokens_total"] {
            counter!(name, self.labels.clone()).increment(usage.prompt_tokens);
        }
        for name in ["tandem_generation_tokens_total", "vllm:generation_tokens_total"] {
            counter!(name, self.labels.clone()).increment(usage.completion_tokens);
        }
        histogram!("tandem_request_prompt_tokens", self.labels.clone()).record(usage.prompt_tokens as f64);
        histogram!("vllm:request_prompt_tokens", self.labels.clone()).record(usage.prompt_tokens as f64);
        histogram!("tandem_request_generation_tokens", self.labels.clone()).record(usage.completion_tokens as f64);
        histogram!("vllm:request_generation_tokens", self.labels.clone()).record(usage.completion_tokens as f64);
    }

    /// A choice ended for this reason.
    pub fn on_finished(&self, finish_reason: &'static str) {
        let labels = self.with("finished_reason", finish_reason.to_string());
        counter!("vllm:request_success_total", labels).increment(1);
    }

    /// A request to the endpoint ended with this HTTP status (499: the client left).
    pub fn on_status(&self, status: u16) {
        counter!("tandem_requests_total", self.with("status", status.to_string())).increment(1);
    }

    /// A node was lost under a request.
    pub fn on_node_loss(&self, lost: &NodeId) {
        counter!("tandem_node_losses_total", self.with("lost_node", lost.to_string())).increment(1);
    }

    /// Blocks that the index knows.
    pub fn set_index_blocks(&self, num_blocks: usize) {
        gauge!("tandem_block_index_blocks", self.labels.clone()).set(num_blocks as f64);
    }

    /// The index took in events.
    pub fn on_index_events(&self, medium: Medium, num_events: u64) {
        counter!("tandem_block_index_events_total", self.with("medium", medium.as_str().into())).increment(num_events);
    }

    /// The index left blocks out.
    pub fn on_index_dropped(&self, num_blocks: u64) {
        counter!("tandem_block_index_dropped_total", self.labels.clone()).increment(num_blocks);
    }

    /// The index learns a node's blocks from nothing.
    pub fn on_index_restart(&self) {
        counter!("tandem_block_index_restarts_total", self.labels.clone()).increment(1);
    }

    /// A request goes to a node of `role` that is believed to hold so many of its tokens: in its pool, and behind
    /// those in a tier.
    pub fn on_routed(&self, role: &str, (num_pool_tokens, num_tier_tokens): (usize, usize)) {
        for (held_in, num_tokens) in [("pool", num_pool_tokens), ("tier", num_tier_tokens)] {
            let mut labels = self.with("node_role", role.into());
            labels.push(Label::new("held_in", held_in));
            counter!("tandem_believed_cached_tokens_total", labels).increment(num_tokens as u64);
        }
    }

    /// The prefill node of a request is told of another one that holds more of its prompt.
    pub fn on_prefix_peer_named(&self) {
        counter!("tandem_prefix_peers_named_total", self.labels.clone()).increment(1);
    }

    /// A node told how much of a prompt was cached, where so much was believed.
    pub fn on_cached_told(&self, num_believed: usize, num_told: usize) {
        let count = |direction: &str, num_tokens: usize| {
            counter!("tandem_believed_cached_error_tokens_total", self.with("direction", direction.into()))
                .increment(num_tokens as u64);
        };
        count("over", num_believed.saturating_sub(num_told));
        count("under", num_told.saturating_sub(num_believed));
    }

    /// A request, or a choice of it, goes on elsewhere.
    pub fn on_resume(&self) {
        counter!("tandem_resumes_total", self.labels.clone()).increment(1);
    }

    /// A node said `Busy`.
    pub fn on_busy(&self, busy: &NodeId) {
        counter!("tandem_busy_total", self.with("busy_node", busy.to_string())).increment(1);
    }

    /// Requests in progress here, and those that wait on decode nodes.
    pub fn set_running(&self, num_running: usize, num_waiting: u64) {
        for name in [OPEN_REQUESTS.name, "vllm:num_requests_running"] {
            gauge!(name, self.labels.clone()).set(num_running as f64);
        }
        gauge!("vllm:num_requests_waiting", self.labels.clone()).set(num_waiting as f64);
    }

    /// Nodes that are ready.
    pub fn set_nodes(&self, num_decode: usize, num_prefill: usize) {
        gauge!("tandem_ready_nodes", self.with("node_role", "decode-node".into())).set(num_decode as f64);
        gauge!("tandem_ready_nodes", self.with("node_role", "prefill-node".into())).set(num_prefill as f64);
    }
}
