//! The block events of one node, taken into the index.
//!
//! A stream beside the `Watch`, on the same link. When it ends, and when the link is lost and found again in the
//! same life of the node, it goes on behind the last event that was heard. Trouble here costs hints and nothing
//! else: the node is routed to as before.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::content::GRANULE_TOKENS;
use common::wire::{BlockNews, Open, WatchBlocks};
use kv_connector::Link;

use crate::index::{BlockIndex, IndexedNode};

/// Between two tries on one link.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a node whose blocks were not all taken in is looked at for whether there is room by now.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What a node has told so far; kept while it is being dialled again.
pub(super) struct BlockFollower {
    index: Arc<BlockIndex>,
    node: Option<Arc<Mutex<IndexedNode>>>,
}

impl Drop for BlockFollower {
    fn drop(&mut self) {
        // Not on a thread that serves requests, as in `forget`; without a runtime there are none.
        if let Some(node) = self.node.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(node));
        }
    }
}

/// Why a stream of events ended.
enum Ended {
    /// The node tells nothing of its blocks.
    NotTold,
    /// Left-out blocks may have room now.
    Incomplete,
    /// In words.
    Broken(String),
}

impl BlockFollower {
    pub(super) fn new(index: Arc<BlockIndex>) -> Self {
        Self { index, node: None }
    }

    /// Takes what the node told out of the index.
    pub(super) async fn forget(&mut self) {
        if let Some(node) = self.node.take() {
            // Looks through the whole index.
            let _ = tokio::task::spawn_blocking(move || drop(node)).await;
        }
    }

    /// Hears the node at the other end of `link` until dropped.
    pub(super) async fn follow(&mut self, link: &Link) -> Infallible {
        let hello = link.peer();
        let life = (hello.node.clone(), hello.epoch);
        if self.node.as_ref().is_some_and(|node| *lock(node).life() != life) {
            self.forget().await;
        }
        let block_size = hello.model.as_ref().map_or(GRANULE_TOKENS, |model| model.block_size as usize);
        let join = || Arc::new(Mutex::new(self.index.join(life, block_size / GRANULE_TOKENS)));
        let node = self.node.get_or_insert_with(join).clone();
        let mut is_told = false;
        while self.index.is_on() {
            match hear(link, &node).await {
                Ended::NotTold => break,
                Ended::Incomplete => {
                    tracing::info!(node = %hello.node, "the block index has room again: asks for what was left out");
                }
                Ended::Broken(reason) if !std::mem::replace(&mut is_told, true) => {
                    tracing::warn!(node = %hello.node, reason, "lost a node's block events; goes on behind the last one");
                }
                Ended::Broken(_) => {}
            }
            tokio::time::sleep(PAUSE).await;
        }
        std::future::pending().await
    }
}

async fn hear(link: &Link, node: &Arc<Mutex<IndexedNode>>) -> Ended {
    let is_incomplete = || lock(node).is_worth_relearning();
    let after = if is_incomplete() { None } else { lock(node).cursor() };
    let opened = link.open(&Open::WatchBlocks(WatchBlocks { after, with_tokens: false })).await;
    let (_sender, mut receiver) = match opened {
        Ok(halves) => halves,
        Err(error) => return Ended::Broken(error.to_string()),
    };
    loop {
        let news: BlockNews = match tokio::time::timeout(LOOK_AGAIN, receiver.recv()).await {
            Ok(Ok(Some(news))) => news,
            Ok(Ok(None)) => return Ended::NotTold,
            Ok(Err(error)) => return Ended::Broken(error.to_string()),
            Err(_) if is_incomplete() => return Ended::Incomplete,
            Err(_) => continue,
        };
        let applied = node.clone();
        // A large node's beginning takes a while, and the next message waits in the connection's window.
        if tokio::task::spawn_blocking(move || lock(&applied).apply(&news)).await.is_err() {
            return Ended::Broken("the proxy is leaving".into());
        }
        if is_incomplete() {
            return Ended::Incomplete;
        }
    }
}

fn lock(node: &Mutex<IndexedNode>) -> MutexGuard<'_, IndexedNode> {
    // After a panic the node's part may lack events: hints, which may be wrong.
    node.lock().unwrap_or_else(PoisonError::into_inner)
}
