//! Connections to prefill nodes: dialled on first use, kept while they live, shared by all requests.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use common::ids::{Epoch, NodeId, Role};
use common::wire::{Directory, Open};
use kv_connector::transfer::{BulkReceiver, BulkSender, LandingZone};
use kv_connector::{ControlReceiver, ControlSender, Fabric, Link, OpenError};

/// A live control connection to a prefill node, with the bulk connection that KV goes over, both ways.
#[derive(Clone)]
pub(crate) struct PrefillLink {
    link: Link,
    bulk: Arc<BulkReceiver>,
}

impl PrefillLink {
    pub(crate) async fn open(&self, open: &Open) -> Result<(ControlSender, ControlReceiver), OpenError> {
        self.link.open(open).await
    }

    /// For KV that the prefill node fetches from here.
    pub(crate) fn bulk_sender(&self) -> &BulkSender {
        self.bulk.sender()
    }

    /// The prefill node's life.
    pub(crate) fn epoch(&self) -> Epoch {
        self.link.peer().epoch
    }

    fn is_alive(&self) -> bool {
        !self.link.is_closed() && !self.bulk.is_closed()
    }
}

/// The prefill nodes this node has been told of. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Peers {
    fabric: Fabric,
    landing_zone: LandingZone,
    slots: Arc<Mutex<HashMap<NodeId, Slot>>>,
}

#[derive(Clone)]
struct Slot {
    address: SocketAddr,
    /// One task dials, the others wait for it.
    link: Arc<tokio::sync::Mutex<Option<PrefillLink>>>,
}

impl Peers {
    pub(crate) fn new(fabric: Fabric, landing_zone: LandingZone) -> Self {
        Self { fabric, landing_zone, slots: Arc::default() }
    }

    /// Takes in what one proxy knows. Several proxies may know different parts, so nodes are added and
    /// moved here, and leave when they cannot be reached.
    pub(crate) fn update(&self, directory: &Directory) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        for peer in &directory.prefill_nodes {
            let is_known = slots.get(&peer.node).is_some_and(|slot| slot.address == peer.control);
            if !is_known {
                tracing::info!(prefill_node = %peer.node, address = %peer.control, "learnt of a prefill node");
                slots.insert(peer.node.clone(), Slot { address: peer.control, link: Arc::default() });
            }
        }
    }

    /// A live connection to `node`; `None` (and a line in the log) if there is none to be had.
    pub(crate) async fn link(&self, node: &NodeId) -> Option<PrefillLink> {
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned();
        let Some(slot) = slot else {
            tracing::warn!(prefill_node = %node, "the proxy named a prefill node that is not in its directory");
            return None;
        };
        let mut link = slot.link.lock().await;
        if let Some(link) = link.as_ref().filter(|link| link.is_alive()) {
            return Some(link.clone());
        }
        *link = self.dial(node, slot.address).await;
        link.clone()
    }

    async fn dial(&self, node: &NodeId, address: SocketAddr) -> Option<PrefillLink> {
        let link = match self.fabric.dial(address, Role::PrefillNode, Some(node)).await {
            Ok(link) => link,
            Err(error) => {
                tracing::warn!(prefill_node = %node, %address, %error, "cannot reach the prefill node");
                return None;
            }
        };
        match self.fabric.connect_bulk(&link, &self.landing_zone).await {
            Ok(bulk) => Some(PrefillLink { link, bulk: Arc::new(bulk) }),
            Err(error) => {
                tracing::warn!(prefill_node = %node, %address, %error, "cannot open the bulk connection");
                None
            }
        }
    }
}
