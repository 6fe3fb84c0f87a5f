//! Connections to prefill nodes: dialled on first use, a few kept while they live, shared by all requests.
//!
//! Decode nodes ask over them for prefills, prefill nodes for prefixes. Whom there is to dial comes from the
//! proxies' directories; a request names a node and never an address.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::ids::{Epoch, NodeId, Role};
use common::model::ModelInfo;
use common::wire::{Directory, Open};

use crate::transfer::{BulkReceiver, BulkSender};
use crate::{ControlReceiver, ControlSender, Fabric, Link, OpenError};

/// A live control connection to a prefill node, with the bulk connection that KV goes over, both ways.
#[derive(Clone)]
pub struct PeerLink {
    link: Link,
    bulk: Arc<BulkReceiver>,
}

impl PeerLink {
    /// Opens a stream with its first message.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(&self, open: &Open) -> Result<(ControlSender, ControlReceiver), OpenError> {
        self.link.open(open).await
    }

    /// For KV that the prefill node fetches from here.
    pub fn bulk_sender(&self) -> &BulkSender {
        self.bulk.sender()
    }

    /// The prefill node's life.
    pub fn epoch(&self) -> Epoch {
        self.link.peer().epoch
    }

    /// What the prefill node said of its model: how it keeps what comes from there.
    pub fn model(&self) -> Option<&ModelInfo> {
        self.link.peer().model.as_ref()
    }

    fn is_alive(&self) -> bool {
        !self.link.is_closed() && !self.bulk.is_closed()
    }
}

/// The prefill nodes this node has been told of. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    fabric: Fabric,
    num_warm_max: usize,
    slots: Arc<Mutex<HashMap<NodeId, Slot>>>,
    num_uses: Arc<AtomicU64>,
}

#[derive(Clone)]
struct Slot {
    address: SocketAddr,
    /// Number of its last use, over all slots.
    used: u64,
    /// One task dials, the others wait for it.
    link: Arc<tokio::sync::Mutex<Option<PeerLink>>>,
}

impl Slot {
    /// The link that is there; `None` also while one is being dialled.
    fn live_link(&self) -> Option<PeerLink> {
        self.link.try_lock().ok()?.clone().filter(PeerLink::is_alive)
    }
}

impl Peers {
    /// Nobody yet. Beyond `num_warm_max` connections the one that was used least recently is let go; whoever uses
    /// it keeps it until done.
    pub fn new(fabric: Fabric, num_warm_max: usize) -> Self {
        Self { fabric, num_warm_max, slots: Arc::default(), num_uses: Arc::default() }
    }

    /// Takes in what one proxy knows. Several proxies may know different parts, and a node that drains is in no
    /// directory and can still be asked for KV, so nodes are added and moved here and never removed.
    pub fn update(&self, directory: &Directory) {
        let mut slots = self.slots();
        for peer in directory.prefill_nodes.iter().filter(|peer| peer.node != self.fabric.hello().node) {
            let is_known = slots.get(&peer.node).is_some_and(|slot| slot.address == peer.control);
            if !is_known {
                tracing::info!(prefill_node = %peer.node, address = %peer.control, "learnt of a prefill node");
                let slot = Slot { address: peer.control, used: 0, link: Arc::default() };
                slots.insert(peer.node.clone(), slot);
            }
        }
    }

    /// Whether a directory has named this node. Never of the own one.
    pub fn knows(&self, node: &NodeId) -> bool {
        self.slots().contains_key(node)
    }

    /// Time to `node` and back, if a connection is there.
    pub fn round_trip(&self, node: &NodeId) -> Option<Duration> {
        let slot = self.slots().get(node).cloned()?;
        slot.live_link().map(|link| link.link.rtt())
    }

    /// What `node` said of its model, if a connection is there.
    pub fn model(&self, node: &NodeId) -> Option<ModelInfo> {
        let slot = self.slots().get(node).cloned()?;
        slot.live_link()?.model().cloned()
    }

    /// A live connection to `node`; `None` (and a line in the log) if there is none to be had.
    pub async fn link(&self, node: &NodeId) -> Option<PeerLink> {
        let Some(slot) = self.use_slot(node) else {
            tracing::warn!(prefill_node = %node, "the proxy named a prefill node that is not in its directory");
            return None;
        };
        let mut link = slot.link.lock().await;
        if let Some(link) = link.as_ref().filter(|link| link.is_alive()) {
            return Some(link.clone());
        }
        *link = None;
        self.make_room();
        *link = self.dial(node, slot.address).await;
        link.clone()
    }

    fn use_slot(&self, node: &NodeId) -> Option<Slot> {
        let mut slots = self.slots();
        let slot = slots.get_mut(node)?;
        slot.used = self.num_uses.fetch_add(1, Ordering::Relaxed) + 1;
        Some(slot.clone())
    }

    /// Lets connections go until one more is not too many.
    fn make_room(&self) {
        let slots = self.slots();
        let mut warm: Vec<&Slot> = slots.values().filter(|slot| slot.live_link().is_some()).collect();
        warm.sort_by_key(|slot| slot.used);
        let num_too_many = (warm.len() + 1).saturating_sub(self.num_warm_max);
        for slot in &warm[..num_too_many.min(warm.len())] {
            if let Ok(mut link) = slot.link.try_lock() {
                *link = None;
            }
        }
    }

    async fn dial(&self, node: &NodeId, address: SocketAddr) -> Option<PeerLink> {
        let link = match self.fabric.dial(address, Role::PrefillNode, Some(node)).await {
            Ok(link) => link,
            Err(error) => {
                tracing::warn!(prefill_node = %node, %address, %error, "cannot reach the prefill node");
                return None;
            }
        };
        match self.fabric.connect_bulk(&link, &self.fabric.landing_zone()).await {
            Ok(bulk) => {
                self.tell_conversion(&link);
                Some(PeerLink { link, bulk: Arc::new(bulk) })
            }
            Err(error) => {
                tracing::warn!(prefill_node = %node, %address, %error, "cannot open the bulk connection");
                None
            }
        }
    }

    /// Says once for each connection what is not the same at its two ends.
    fn tell_conversion(&self, link: &Link) {
        let (Some(ours), Some(theirs)) = (&self.fabric.hello().model, &link.peer().model) else { return };
        let form = |model: &ModelInfo| format!("{} in {}", model.representation, model.granule_order.as_str());
        if form(ours) != form(theirs) {
            let (ours, theirs) = (form(ours), form(theirs));
            tracing::info!(prefill_node = %link.peer().node, %ours, %theirs, "KV is converted as it arrives");
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<NodeId, Slot>> {
        // The map is valid after every statement.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
