//! Asking another prefill node for a prefix: whom, and until its extents may come.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use common::content::GRANULE_TOKENS;
use common::handover::{FetchFailure, FetchPlan, PeerPrefix};
use common::ids::NodeId;
use common::wire::{FetchPrefix, FetchPrefixControl, FetchPrefixEvent, Open, Prefill, PrefixPeer};
use engine::conversion::conversion_from_peer;
use kv_connector::transfer::{Landing, LandingEvent, LandingEvents, LandingPlan};
use kv_connector::{ControlReceiver, ControlSender};

use crate::node::Node;

/// Connections to peers that are kept; each has a share of the receive memory.
pub(crate) const NUM_WARM_PEERS_MAX: usize = 8;
/// Round trips until the first extent can come: the ask, and its first credit.
const ROUND_TRIPS_TO_ASK: u32 = 2;
/// The same with two connections that are not there yet, each a handshake and a hello.
const ROUND_TRIPS_TO_DIAL_AND_ASK: u32 = 6;

/// The peer that may be asked for the beginning of this prompt: the hint, as far as it makes sense here.
pub(crate) fn usable(node: &Node, prefill: &Prefill) -> Option<PrefixPeer> {
    let PrefixPeer { node: peer, num_tokens } = prefill.prefix_peer.as_ref()?;
    // A hit never covers the last token.
    let num_tokens = (*num_tokens as usize).min(prefill.tokens.0.len() - 1) / GRANULE_TOKENS * GRANULE_TOKENS;
    let is_known = num_tokens > 0 && node.peers.knows(peer);
    is_known.then(|| PrefixPeer { node: peer.clone(), num_tokens: num_tokens as u32 })
}

/// What its prefix would cost. A peer that was not dialled yet is taken to be as far away as the decode node.
pub(crate) fn expected(node: &Node, peer: &PrefixPeer, bytes_per_second: f64, to_decode_node: Duration) -> PeerPrefix {
    let asking = match node.peers.round_trip(&peer.node) {
        Some(round_trip) => round_trip.saturating_mul(ROUND_TRIPS_TO_ASK),
        None => to_decode_node.saturating_mul(ROUND_TRIPS_TO_DIAL_AND_ASK),
    };
    PeerPrefix { num_tokens: peer.num_tokens, bytes_per_second, asking }
}

/// The stream to a peer that sends, and where its extents land. Dropping it ends both.
pub(crate) struct PeerStream {
    pub(crate) landing: Landing,
    pub(crate) landed: LandingEvents,
    control: ControlSender,
    events: ControlReceiver,
    has_all_left: bool,
}

pub(crate) type Asking = Pin<Box<dyn Future<Output = Result<PeerStream, FetchFailure>> + Send>>;

/// Asks for the tokens of `plan`; resolves when extents may land in the blocks that `landing` names, shortened to
/// what the peer holds. It waits as long as it is polled.
pub(crate) fn ask(node: &Node, peer: &NodeId, prefill: &Prefill, plan: FetchPlan, landing: LandingPlan) -> Asking {
    let (peers, zone, peer) = (node.peers.clone(), node.fabric.landing_zone(), peer.clone());
    let model = node.engine.model().clone();
    let fetch = FetchPrefix {
        request: prefill.request,
        attempt: prefill.attempt,
        generation: landing.generation,
        tokens: landing.tokens[..plan.end_token as usize].to_vec().into(),
        first_token: plan.first_token,
        salt: prefill.salt.clone(),
        deadline: plan.total_timeout,
    };
    Box::pin(async move {
        let link = peers.link(&peer).await.ok_or(FetchFailure::Unreachable)?;
        let conversion = conversion_from_peer(link.model(), &model).map_err(|error| {
            tracing::warn!(%peer, %error, "KV of a peer cannot be kept here");
            FetchFailure::Unreachable
        })?;
        let opened = link.open(&Open::FetchPrefix(Box::new(fetch))).await;
        let (mut control, mut events) = opened.map_err(|_| FetchFailure::Unreachable)?;
        let num_tokens = match events.recv::<FetchPrefixEvent>().await {
            Ok(Some(FetchPrefixEvent::Held { num_tokens })) => num_tokens.min(plan.end_token),
            Ok(Some(FetchPrefixEvent::Busy)) => return Err(FetchFailure::Busy),
            Ok(Some(FetchPrefixEvent::Stopped) | None) | Err(_) => return Err(FetchFailure::Stopped),
        };
        if num_tokens <= plan.first_token {
            return Err(FetchFailure::NotHeld);
        }
        // In place before the first credit, so that no extent is early.
        let (landing, landed) = zone.open(LandingPlan { num_tokens: num_tokens as usize, conversion, ..landing });
        let credit = FetchPrefixControl::Credit { bytes: plan.credit_window_bytes };
        control.send(&credit).await.map_err(|_| FetchFailure::Stopped)?;
        Ok(PeerStream { landing, landed, control, events, has_all_left: false })
    })
}

impl PeerStream {
    /// A peer that is gone shows up when its stream is read.
    pub(crate) async fn send(&mut self, control: FetchPrefixControl) {
        let _ = self.control.send(&control).await;
    }

    /// What has landed, or why no more will. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<LandingEvent, FetchFailure> {
        loop {
            tokio::select! {
                biased;
                // The landing keeps its sender for as long as it is open.
                Some(event) = self.landed.recv() => return Ok(event),
                said = self.events.recv::<FetchPrefixEvent>(), if !self.has_all_left => match said {
                    // The last extent may still be on its way.
                    Ok(None) => self.has_all_left = true,
                    Ok(Some(_)) | Err(_) => return Err(FetchFailure::Stopped),
                },
                else => std::future::pending().await,
            }
        }
    }

    /// Ends the stream without cancelling it: all is here.
    pub(crate) fn finish(&mut self) {
        self.control.finish();
    }
}
