//! One `Generate` of a request: waiting to be sent, or open on a node.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use common::timeline::NodeTimeline;
use common::wire::GenerateEvent;
use futures::Stream;
use tokio::time::Instant;

use super::nodes::{GenerateStream, NodeLost};
use crate::route::{NodeLife, OwnWork, Stay};

/// One `Generate` that is open on a node.
pub(super) struct Leg {
    pub(super) life: NodeLife,
    pub(super) stay: Stay,
    pub(super) choices: Vec<usize>,
    pub(super) events: GenerateStream,
    /// What the node said of the time up to token #1.
    pub(super) started: Option<NodeTimeline>,
    /// Prompt tokens that the nodes it went to were believed to hold.
    pub(super) num_believed_tokens: usize,
    /// Whether a third node was named that holds more of it.
    pub(super) has_prefix_peer: bool,
    /// Until the prompt is computed.
    pub(super) sent: Option<SentTokens>,
    pub(super) _open: OpenStream,
}

/// One that is to be opened.
pub(super) struct WaitingLeg {
    pub(super) choices: Vec<usize>,
    pub(super) not_before: Instant,
}

/// Counts an open stream, at its node and in all.
pub(super) struct OpenStream {
    at_node: Arc<OwnWork>,
    in_all: Arc<AtomicUsize>,
}

impl OpenStream {
    pub(super) fn new(at_node: Arc<OwnWork>, in_all: Arc<AtomicUsize>) -> Self {
        at_node.requests.add(1);
        in_all.fetch_add(1, Ordering::Relaxed);
        Self { at_node, in_all }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.at_node.requests.subtract(1);
        self.in_all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts prompt tokens that were sent to a prefill node to be computed.
pub(super) struct SentTokens {
    at_node: Arc<OwnWork>,
    num_tokens: u64,
}

impl SentTokens {
    pub(super) fn new(at_node: Arc<OwnWork>, num_tokens: u64) -> Self {
        at_node.tokens.add(num_tokens);
        Self { at_node, num_tokens }
    }
}

impl Drop for SentTokens {
    fn drop(&mut self) {
        self.at_node.tokens.subtract(self.num_tokens);
    }
}

/// The next event of whichever leg has one, looked for from leg `first` on, so that none is starved;
/// waits for ever if there is no leg.
pub(super) async fn next_event(legs: &mut [Leg], first: usize) -> (usize, Option<Result<GenerateEvent, NodeLost>>) {
    std::future::poll_fn(|cx| {
        let num_legs = legs.len();
        for i in (0..num_legs).map(|i| (first + i) % num_legs) {
            if let Poll::Ready(event) = Pin::new(&mut legs[i].events).poll_next(cx) {
                return Poll::Ready((i, event));
            }
        }
        Poll::Pending
    })
    .await
}
