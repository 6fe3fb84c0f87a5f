//! A node's presence: what it tells the proxies that watch it, and how it makes itself known to them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::config::HostPort;
use common::ids::{Epoch, Role};
use common::wire::{NodeLoad, NodeState, NodeStatus, Open, Peer, Register, WatchBlocks};
use tokio::sync::watch;

use crate::block_feed::BlockFeed;
use crate::redial::Redial;
use crate::{ControlSender, Fabric};

/// A watching proxy hears from a node at least this often.
const STATUS_INTERVAL: Duration = Duration::from_millis(250);
/// Longest pause between two tries to reach a proxy.
const REGISTER_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Longest wait for the address of a proxy's name.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// State and load of this node, as shown to whoever watches. Cheap to clone.
#[derive(Clone)]
pub struct NodePresence {
    state: Arc<watch::Sender<NodeState>>,
    load: Arc<dyn Fn() -> NodeLoad + Send + Sync>,
    blocks: Option<Arc<BlockFeed>>,
}

impl NodePresence {
    /// A ready node whose load is read from `load` when it is told.
    pub fn new(load: impl Fn() -> NodeLoad + Send + Sync + 'static) -> Self {
        Self { state: Arc::new(watch::Sender::new(NodeState::Ready)), load: Arc::new(load), blocks: None }
    }

    /// The same, telling also what happens to its blocks.
    pub fn with_blocks(self, blocks: Arc<BlockFeed>) -> Self {
        Self { blocks: Some(blocks), ..self }
    }

    /// From now on the node takes nothing new; whoever watches hears it at once.
    pub fn drain(&self) {
        self.state.send_replace(NodeState::Draining);
    }

    /// Whether [`drain`](Self::drain) was called.
    pub fn is_draining(&self) -> bool {
        *self.state.borrow() == NodeState::Draining
    }

    /// Tells one proxy what happens to the blocks of this node, in its life `epoch`; ends the stream if nothing
    /// is told of them here. Returns when the proxy no longer listens.
    pub async fn serve_blocks(&self, epoch: Epoch, watch: WatchBlocks, mut sender: ControlSender) {
        match &self.blocks {
            Some(blocks) => blocks.serve(epoch, watch, sender).await,
            None => sender.finish(),
        }
    }

    /// Tells one watching proxy: at once, on every change of state, and every 250 ms. Returns when it no
    /// longer listens.
    pub async fn serve_watch(&self, mut sender: ControlSender) {
        let mut state = self.state.subscribe();
        let mut interval = tokio::time::interval(STATUS_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = interval.tick() => {}
                Ok(()) = state.changed() => {}
            }
            let status = NodeStatus { state: *state.borrow_and_update(), load: (self.load)() };
            if sender.send(&status).await.is_err() {
                return;
            }
        }
    }
}

/// Keeps this node registered at a proxy that does not list it: the open stream is the registration. A name is looked up
/// for every attempt, since a proxy may come back with another address. Runs until its task is dropped.
pub async fn stay_registered(fabric: Fabric, proxy: HostPort, role: Role, control: SocketAddr) {
    let peer = Peer { node: fabric.hello().node.clone(), control };
    let open = Open::Register(Register { peer, role });
    let mut said = String::new();
    let mut redial = Redial::new(REGISTER_PAUSE_MAX);
    loop {
        let mut is_worth_a_retry = true;
        let dialled = match address_of(&proxy).await {
            Ok(address) => fabric.dial(address, Role::Proxy, None).await.map_err(|error| {
                is_worth_a_retry = error.is_worth_a_retry();
                error.to_string()
            }),
            Err(reason) => Err(reason),
        };
        match dialled {
            Ok(link) => match link.open(&open).await {
                Ok(_registration) => {
                    tracing::info!(%proxy, "registered at the proxy");
                    said.clear();
                    let registered_at = Instant::now();
                    let reason = link.closed().await;
                    tracing::warn!(%proxy, %reason, "lost the proxy");
                    // A proxy that lets go at once, again and again, is not reached.
                    if registered_at.elapsed() > REGISTER_PAUSE_MAX {
                        redial.on_reached();
                    }
                }
                Err(error) => tracing::warn!(%proxy, %error, "cannot register at the proxy"),
            },
            // Tried often, said once: a proxy that is not there yet, or one that refuses this node.
            Err(error) if error != said => {
                tracing::warn!(%proxy, %error, "cannot reach the proxy yet");
                said = error;
            }
            Err(_) => {}
        }
        tokio::time::sleep(redial.on_failed(Instant::now(), is_worth_a_retry, rand::random())).await;
    }
}

/// The first address of a host name.
async fn address_of(host: &HostPort) -> Result<SocketAddr, String> {
    let looking = tokio::net::lookup_host((host.host.as_str(), host.port));
    match tokio::time::timeout(LOOKUP_TIMEOUT, looking).await {
        Ok(Ok(mut found)) => found.next().ok_or_else(|| format!("{host} has no address")),
        Ok(Err(error)) => Err(format!("{host} cannot be looked up: {error}")),
        Err(_) => Err(format!("{host} cannot be looked up within {} s", LOOKUP_TIMEOUT.as_secs())),
    }
}
