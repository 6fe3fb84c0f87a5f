//! A prefix that the decode node or the store holds and this node's pool lacks: which way is taken, and the fetch
//! as the shell sees it. What it means is the business of [`common::handover`].

use std::time::{Duration, Instant};

use common::handover::{FetchEnd, FetchPlan, PrefixChoice, PrefixCosts, StoredPrefix};
use common::ids::NodeId;
use common::wire::{Hello, Prefill, PrefillEvent};
use kv_connector::store::FoundPrefix;
use kv_connector::transfer::{ExtentSource, Landing, LandingEvent, LandingPlan};
use tokio::sync::mpsc;

use crate::node::Node;

/// The chosen way, and what a fetch or a load is to know.
pub(crate) struct Chosen {
    pub(crate) choice: PrefixChoice,
    pub(crate) fetch: FetchPlan,
    pub(crate) costs: PrefixCosts,
}

/// Chooses for a prompt that was admitted with `num_cached_tokens` found here. `None`: nothing is lacking, and
/// the engine computes already.
pub(crate) fn choose(
    node: &Node,
    peer: &Hello,
    prefill: &Prefill,
    stored: &FoundPrefix,
    num_cached_tokens: u32,
    round_trip: Duration,
) -> Option<Chosen> {
    let status = node.engine.status();
    let status = status.borrow();
    let can_fetch = node.fabric.receives_from(&peer.node, peer.epoch);
    let costs = PrefixCosts {
        num_tokens: prefill.tokens.0.len() as u32,
        num_cached_tokens,
        num_held_tokens: prefill.num_held_tokens,
        num_tokens_ahead: status.num_running_prompt_tokens,
        prefill_tokens_per_second: node.estimates.prefill_tokens_per_second(status.prefill_tokens_per_second),
        kv_bytes_per_token: node.engine.model().kv_spec.bytes_per_token(),
        fetch_bytes_per_second: can_fetch.then(|| node.estimates.fetch_bytes_per_second(&peer.node, Instant::now())),
        round_trip,
        local_rest: prefill.local_rest,
        stored: node.store.as_ref().map(|store| StoredPrefix {
            num_tokens: stored.num_tokens() as u32,
            load: store.expected_load(stored, num_cached_tokens as usize),
        }),
    };
    let choice = costs.choose()?;
    tracing::info!(
        choice = choice.as_str(),
        cached = num_cached_tokens,
        held = prefill.num_held_tokens,
        stored = stored.num_tokens(),
        recompute_ms = costs.recompute().as_secs_f64() * 1e3,
        fetch_ms = costs.fetch().map(|cost| cost.as_secs_f64() * 1e3),
        store_ms = costs.store().map(|cost| cost.as_secs_f64() * 1e3),
        local_ms = costs.local().map(|cost| cost.as_secs_f64() * 1e3),
        "a longer prefix is held elsewhere"
    );
    node.metrics.count_prefix_choice(choice);
    let stall_timeout = node.args.fetch_stall_timeout;
    let fetch = FetchPlan {
        first_token: num_cached_tokens,
        end_token: prefill.num_held_tokens,
        credit_window_bytes: node.args.fetch_credit_bytes,
        stall_timeout,
        total_timeout: costs.recompute_prefix().max(stall_timeout),
    };
    Some(Chosen { choice, fetch, costs })
}

/// A fetch that is under way: the landing of its extents, and what has come of it.
pub(crate) struct Fetching {
    landing: Landing,
    landed: mpsc::Receiver<LandingEvent>,
    started_at: Instant,
    num_bytes: u64,
}

impl Fetching {
    /// Opens the landing of `plan` in the blocks of `source`; the message asks the decode node for the KV.
    pub(crate) fn open(node: &Node, prefill: &Prefill, source: &ExtentSource, plan: FetchPlan) -> (Self, PrefillEvent) {
        let FetchPlan { first_token, end_token, credit_window_bytes, .. } = plan;
        let generation = node.next_generation();
        let plan = LandingPlan {
            request: prefill.request,
            attempt: prefill.attempt,
            generation,
            blocks: source.blocks.to_vec(),
            chain: source.chain.clone(),
            tokens: prefill.tokens.0.clone(),
            first_token: first_token as usize,
            num_tokens: end_token as usize,
            kv_spec: source.kv_spec.clone(),
            memory: source.memory.clone(),
        };
        let (landing, landed) = node.fabric.landing_zone().open(plan);
        let event = PrefillEvent::Fetch { generation, first_token, end_token, credit_bytes: credit_window_bytes };
        (Self { landing, landed, started_at: Instant::now(), num_bytes: 0 }, event)
    }

    /// What has landed next. Cancel-safe.
    pub(crate) async fn next(&mut self) -> LandingEvent {
        match self.landed.recv().await {
            Some(event) => {
                if let LandingEvent::ExtentVerified { num_bytes, .. } = &event {
                    self.num_bytes += num_bytes;
                }
                event
            }
            // The landing keeps its sender for as long as it is open.
            None => std::future::pending().await,
        }
    }

    /// Closes the landing: no byte is written into the blocks any more. Says how long it took.
    pub(crate) fn close(self, node: &Node, peer: &NodeId, num_tokens: u32, end: FetchEnd) -> Duration {
        self.landing.close();
        let (took, num_bytes) = (self.started_at.elapsed(), self.num_bytes);
        let millis = took.as_secs_f64() * 1e3;
        node.metrics.count_fetched(num_bytes);
        match end {
            FetchEnd::Complete => tracing::info!(num_tokens, num_bytes, millis, "prefix fetched"),
            FetchEnd::Abandoned => return took,
            FetchEnd::Failed(failure) => {
                tracing::warn!(num_tokens, num_bytes, millis, reason = %failure, "the rest of a prefix is computed");
                node.metrics.count_fetch_failed(failure.as_str());
            }
        }
        node.estimates.on_fetched(peer, num_bytes, took, end == FetchEnd::Complete, Instant::now());
        took
    }
}
