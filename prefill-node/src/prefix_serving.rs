//! A prefix that another prefill node fetches from here: the shell around [`PrefixServing`].
//!
//! It only reads what is in the pool: pinned for as long as it is sent, nothing is allocated, computed or waited for
//! but the peer's credit. A node that drains does it like any other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::content::{ChainRoot, ContentChain, GRANULE_TOKENS};
use common::handover::{PrefixServing, ServingAction, ServingLimits};
use common::wire::{ExtentId, FetchPrefix, FetchPrefixControl, FetchPrefixEvent, Hello};
use kv_connector::transfer::{ExtentRequest, ExtentSource, PrefixSends};
use kv_connector::{ControlReceiver, ControlSender};

use crate::node::Node;

/// Prefixes that are sent at a time. One more is refused at once, and computed by the node that asked.
pub(crate) const NUM_SERVED_MAX: usize = 16;

/// How serving one ask ended: the value of the metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Sent,
    NotHeld,
    Busy,
    /// Not all could be sent, or the peer stood still.
    Stopped,
    /// The peer has left.
    Gone,
    /// What no node of this cluster asks.
    Invalid,
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            End::Sent => "sent",
            End::NotHeld => "not_held",
            End::Busy => "busy",
            End::Stopped => "stopped",
            End::Gone => "gone",
            End::Invalid => "invalid",
        }
    }
}

/// Serves one `FetchPrefix` stream to its end.
pub(crate) async fn serve(
    node: Arc<Node>,
    peer: Arc<Hello>,
    ask: FetchPrefix,
    mut sender: ControlSender,
    receiver: ControlReceiver,
) {
    let end = send(&node, &peer, &ask, &mut sender, receiver).await;
    let num_tokens = ask.tokens.0.len();
    tracing::info!(peer = %peer.node, first_token = ask.first_token, num_tokens, end = end.as_str(), "a peer asked for a prefix");
    node.metrics.count_served(end.as_str());
    match end {
        End::Gone | End::Invalid => return,
        End::Busy => drop(sender.send(&FetchPrefixEvent::Busy).await),
        End::Stopped => drop(sender.send(&FetchPrefixEvent::Stopped).await),
        End::Sent | End::NotHeld => {}
    }
    sender.finish();
}

async fn send(
    node: &Node,
    peer: &Hello,
    ask: &FetchPrefix,
    sender: &mut ControlSender,
    mut receiver: ControlReceiver,
) -> End {
    let Ok(_place) = node.served.clone().try_acquire_owned() else { return End::Busy };
    if !is_sound(ask, node.engine.model().max_model_len) {
        return End::Invalid;
    }
    let Some(bulk) = node.fabric.bulk_to(&peer.node, peer.epoch) else { return End::Stopped };
    let root = ChainRoot { salt: ask.salt.clone(), ..ChainRoot::of_model(node.engine.model().identity) };
    let mut chain = ContentChain::new(&root);
    chain.extend(&ask.tokens.0);
    let pinned = node.engine.pin_prefix(chain.granules().to_vec()).await;
    let blocks: Arc<[_]> = pinned.as_ref().map_or(&[][..], |pinned| pinned.blocks()).into();
    let num_tokens = (blocks.len() * node.engine.pool().block_size()).min(ask.tokens.0.len());
    if sender.send(&FetchPrefixEvent::Held { num_tokens: num_tokens as u32 }).await.is_err() {
        return End::Gone;
    }
    if num_tokens <= ask.first_token as usize {
        return End::NotHeld;
    }
    let FetchPrefix { request, attempt, generation, .. } = *ask;
    let source = ExtentSource {
        memory: node.engine.pool().clone(),
        kv_spec: node.engine.model().kv_spec.clone(),
        blocks,
        chain,
        request: ExtentRequest { epoch: peer.epoch, request, attempt, generation },
    };
    let mut sends = PrefixSends::new(source, bulk);
    let extents = sends.extents(ask.first_token as usize..num_tokens);
    tracing::debug!(peer = %peer.node, num_tokens, "serves a prefix");
    let end = run(node, ask, extents, &mut sends, &mut receiver).await;
    // Nothing reads the blocks any more when they are unpinned.
    sends.stop().await;
    drop(pinned);
    end
}

async fn run(
    node: &Node,
    ask: &FetchPrefix,
    extents: Vec<(ExtentId, u64)>,
    sends: &mut PrefixSends,
    receiver: &mut ControlReceiver,
) -> End {
    let limits = ServingLimits { stall_timeout: node.args.transfer_stall_timeout, total_timeout: ask.deadline };
    let started_at = Instant::now();
    let mut machine = PrefixServing::new(extents, limits, Duration::ZERO);
    loop {
        // A deadline beyond what the clock can tell is none.
        let deadline = machine.next_deadline().and_then(|at| started_at.checked_add(at));
        let tick = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        let actions = tokio::select! {
            biased;
            control = receiver.recv::<FetchPrefixControl>() => match control {
                Ok(Some(FetchPrefixControl::Credit { bytes })) => machine.on_credit(bytes, started_at.elapsed()),
                // It has all, whatever is known of that here.
                Ok(None) => return End::Sent,
                Err(_) => return End::Gone,
            },
            is_sent = sends.next_ended() => machine.on_extent_ended(is_sent, started_at.elapsed()),
            () = tick => machine.on_tick(started_at.elapsed()),
        };
        for action in actions {
            match action {
                ServingAction::SendExtent { extent, num_bytes } => {
                    node.metrics.count_sent_to_peer(num_bytes);
                    sends.send(&ask.tokens.0, extent);
                }
                ServingAction::End { is_complete: true } => return End::Sent,
                ServingAction::End { is_complete: false } => return End::Stopped,
            }
        }
    }
}

/// Whole granules, fewer of them at the other end than are asked for, and no more than a sequence can have.
fn is_sound(ask: &FetchPrefix, max_model_len: u32) -> bool {
    let (num_tokens, first_token) = (ask.tokens.0.len(), ask.first_token as usize);
    let is_whole = num_tokens.is_multiple_of(GRANULE_TOKENS) && first_token.is_multiple_of(GRANULE_TOKENS);
    is_whole && first_token < num_tokens && num_tokens <= max_model_len as usize
}
