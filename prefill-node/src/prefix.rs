//! A prefix that the decode node, the store or a peer holds and this node's pool lacks: which way is taken, and the
//! fetch as the shell sees it. What it means is the business of [`common::handover`].

use std::time::{Duration, Instant};

use common::handover::{FetchEnd, FetchFailure, FetchFrom, FetchPlan, PrefixChoice, PrefixCosts, StoredPrefix};
use common::ids::NodeId;
use common::model::ModelInfo;
use common::wire::{FetchPrefixControl, Hello, Prefill, PrefillEvent, PrefixPeer};
use engine::conversion::conversion_from_peer;
use kv_connector::store::FoundPrefix;
use kv_connector::transfer::{ExtentSource, Landing, LandingEvent, LandingEvents, LandingPlan};

use crate::node::Node;
use crate::peer::{self, Asking, PeerStream};

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
    decode_node: &Hello,
    prefill: &Prefill,
    stored: &FoundPrefix,
    peer: Option<&PrefixPeer>,
    num_cached_tokens: u32,
    round_trip: Duration,
) -> Option<Chosen> {
    let status = node.engine.status();
    let status = status.borrow();
    let is_kept_here = conversion_from_peer(decode_node.model.as_ref(), node.engine.model()).is_ok();
    let can_fetch = is_kept_here && node.fabric.receives_from(&decode_node.node, decode_node.epoch);
    // As fast as what arrives becomes KV of this pool: who keeps it in a wider type sends more bytes for a token.
    let bytes_per_second = |from: &NodeId, theirs: Option<&ModelInfo>| {
        let per_token = |model: &ModelInfo| model.kv_spec.bytes_per_token() as f64;
        let ours = node.engine.model();
        let speed = node.estimates.fetch_bytes_per_second(from, Instant::now());
        speed * per_token(ours) / per_token(theirs.unwrap_or(ours)).max(1.0)
    };
    let peer_speed = |peer: &NodeId| bytes_per_second(peer, node.peers.model(peer).as_ref());
    let costs = PrefixCosts {
        num_tokens: prefill.tokens.0.len() as u32,
        num_cached_tokens,
        num_held_tokens: prefill.num_held_tokens,
        num_tokens_ahead: status.num_running_prompt_tokens,
        prefill_tokens_per_second: node.estimates.prefill_tokens_per_second(status.prefill_tokens_per_second),
        kv_bytes_per_token: node.engine.model().kv_spec.bytes_per_token(),
        fetch_bytes_per_second: can_fetch.then(|| bytes_per_second(&decode_node.node, decode_node.model.as_ref())),
        round_trip,
        local_rest: prefill.local_rest,
        stored: node.store.as_ref().map(|store| StoredPrefix {
            num_tokens: stored.num_tokens() as u32,
            load: store.expected_load(stored, num_cached_tokens as usize),
        }),
        peer: peer.map(|peer| peer::expected(node, peer, peer_speed(&peer.node), round_trip)),
    };
    let choice = costs.choose()?;
    tracing::info!(
        choice = choice.as_str(),
        cached = num_cached_tokens,
        held = prefill.num_held_tokens,
        stored = stored.num_tokens(),
        peer = peer.map(|peer| peer.node.as_str()),
        peer_held = peer.map(|peer| peer.num_tokens),
        recompute_ms = costs.recompute().as_secs_f64() * 1e3,
        fetch_ms = costs.fetch().map(|cost| cost.as_secs_f64() * 1e3),
        store_ms = costs.store().map(|cost| cost.as_secs_f64() * 1e3),
        peer_ms = costs.peer().map(|cost| cost.as_secs_f64() * 1e3),
        local_ms = costs.local().map(|cost| cost.as_secs_f64() * 1e3),
        "a longer prefix is held elsewhere"
    );
    node.metrics.count_prefix_choice(choice);
    let stall_timeout = node.args.fetch_stall_timeout;
    let (from, end_token, worth) = match (choice, peer) {
        (PrefixChoice::Peer, Some(peer)) => (FetchFrom::Peer, peer.num_tokens, costs.recompute_peer()),
        _ => (FetchFrom::DecodeNode, prefill.num_held_tokens, costs.recompute_prefix()),
    };
    let fetch = FetchPlan {
        from,
        first_token: num_cached_tokens,
        end_token,
        credit_window_bytes: node.args.fetch_credit_bytes,
        stall_timeout,
        total_timeout: worth.max(stall_timeout),
    };
    Some(Chosen { choice, fetch, costs })
}

/// A fetch that is under way: the landing of its extents, and what has come of it.
pub(crate) struct Fetching {
    stage: Stage,
    /// Who sends.
    from: NodeId,
    started_at: Instant,
    landing_at: Instant,
    num_bytes: u64,
    /// Tokens that have come, in each layer anew.
    num_layer_tokens: u64,
}

enum Stage {
    /// The decode node sends; its hand-over's stream says the rest.
    FromDecodeNode { landing: Landing, landed: LandingEvents },
    /// A peer has not answered yet.
    Asking(Asking),
    /// A peer sends.
    FromPeer(Box<PeerStream>),
    /// A peer will not send.
    Refused,
}

impl Fetching {
    /// Opens the landing of `plan` in the blocks of `source`, or asks a peer first; the message asks the decode node
    /// for the KV.
    pub(crate) fn open(
        node: &Node,
        decode_node: &Hello,
        prefill: &Prefill,
        source: &ExtentSource,
        plan: FetchPlan,
    ) -> (Self, Option<PrefillEvent>) {
        let FetchPlan { from, first_token, end_token, credit_window_bytes, .. } = plan;
        let generation = node.next_generation();
        let landing = LandingPlan {
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
            conversion: None,
        };
        let (stage, from, event) = match from {
            FetchFrom::DecodeNode => match conversion_from_peer(decode_node.model.as_ref(), node.engine.model()) {
                Ok(conversion) => {
                    let (landing, landed) = node.fabric.landing_zone().open(LandingPlan { conversion, ..landing });
                    let event =
                        PrefillEvent::Fetch { generation, first_token, end_token, credit_bytes: credit_window_bytes };
                    (Stage::FromDecodeNode { landing, landed }, &decode_node.node, Some(event))
                }
                // Not chosen then.
                Err(error) => {
                    tracing::warn!(decode_node = %decode_node.node, %error, "KV of a decode node cannot be kept here");
                    let failed = std::future::ready(Err(FetchFailure::Stopped));
                    (Stage::Asking(Box::pin(failed)), &decode_node.node, None)
                }
            },
            FetchFrom::Peer => {
                let hint = prefill.prefix_peer.as_ref().expect("a peer is fetched from where a hint named one");
                (Stage::Asking(peer::ask(node, &hint.node, prefill, plan, landing)), &hint.node, None)
            }
        };
        let now = Instant::now();
        let from = from.clone();
        (Self { stage, from, started_at: now, landing_at: now, num_bytes: 0, num_layer_tokens: 0 }, event)
    }

    /// What has landed next, or why a peer sends nothing more. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<LandingEvent, FetchFailure> {
        loop {
            let event = match &mut self.stage {
                Stage::FromDecodeNode { landed, .. } => match landed.recv().await {
                    Some(event) => event,
                    // The landing keeps its sender for as long as it is open.
                    None => std::future::pending().await,
                },
                Stage::Asking(asking) => match asking.await {
                    Ok(stream) => {
                        self.stage = Stage::FromPeer(Box::new(stream));
                        self.landing_at = Instant::now();
                        continue;
                    }
                    Err(failure) => {
                        self.stage = Stage::Refused;
                        return Err(failure);
                    }
                },
                Stage::FromPeer(stream) => stream.next().await?,
                Stage::Refused => std::future::pending().await,
            };
            if let LandingEvent::ExtentVerified { num_bytes, extent, .. } = &event {
                self.num_bytes += num_bytes;
                self.num_layer_tokens += u64::from(extent.num_tokens);
            }
            return Ok(event);
        }
    }

    /// Tells the peer.
    pub(crate) async fn send(&mut self, control: FetchPrefixControl) {
        if let Stage::FromPeer(stream) = &mut self.stage {
            stream.send(control).await;
        }
    }

    /// KV that has come, all layers of a token counted as one: what moves while nothing is computed.
    pub(crate) fn num_tokens(&self, num_layers: u32) -> u32 {
        u32::try_from(self.num_layer_tokens / u64::from(num_layers.max(1))).unwrap_or(u32::MAX)
    }

    /// Closes the landing: no byte is written into the blocks any more. Says how long it took.
    pub(crate) fn close(self, node: &Node, num_tokens: u32, end: FetchEnd) -> Duration {
        match self.stage {
            Stage::FromDecodeNode { landing, .. } => landing.close(),
            Stage::FromPeer(mut stream) => {
                stream.landing.close();
                if end == FetchEnd::Complete {
                    stream.finish();
                }
            }
            Stage::Asking(_) | Stage::Refused => {}
        }
        let (took, num_bytes) = (self.started_at.elapsed(), self.num_bytes);
        let (from, millis) = (&self.from, took.as_secs_f64() * 1e3);
        node.metrics.count_fetched(num_bytes);
        match end {
            FetchEnd::Complete => tracing::info!(%from, num_tokens, num_bytes, millis, "prefix fetched"),
            FetchEnd::Abandoned => return took,
            FetchEnd::Failed(failure) => {
                tracing::warn!(%from, num_tokens, num_bytes, millis, reason = %failure, "the rest of a prefix is computed");
                node.metrics.count_fetch_failed(failure.as_str());
                if matches!(failure, FetchFailure::NotHeld | FetchFailure::Busy) {
                    // An answer, and none about how fast KV comes from there.
                    return took;
                }
            }
        }
        let landing = self.landing_at.elapsed();
        node.estimates.on_fetched(from, num_bytes, landing, end == FetchEnd::Complete, Instant::now());
        took
    }
}
