//! Connections to prefill nodes: dialled on first use, a few kept while they live, shared by all requests.
//!
//! Decode nodes ask over them for prefills, prefill nodes for prefixes. Whom there is to dial comes from the
//! proxies' directories; a request names a node and never an address.
//!
//! ```text
//! request 1   dials ───────────────────────── failed   in a task of its own: a request that ends does not end the try
//! request 2       waits for the same try ──── failed   who asks at the first try waits for it
//! request 3                                        none   a pause (`redial`): another node is turned to at once
//! request 4                                             dials ──────────── failed
//! request 5                                                 none              behind a failed try one request waits
//! ```

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::ids::{Epoch, NodeId, Role};
use common::model::ModelInfo;
use common::wire::{Directory, Open};
use tokio::sync::watch;

use crate::redial::Redial;
use crate::transfer::{BulkReceiver, BulkSender};
use crate::{ControlReceiver, ControlSender, DialError, Fabric, Link, OpenError};

/// Nodes that are known at a time; in a cluster whose nodes come and go under new names old ones would pile up.
const NUM_KNOWN_MAX: usize = 4096;

/// Longest pause between two tries to reach a node that does not answer. A try takes two seconds there, and one request
/// waits for it.
const PAUSE_MAX: Duration = Duration::from_secs(5);

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
    /// Number of its last use, or of when it was learnt of, over all slots.
    used: u64,
    contact: Arc<Mutex<Contact>>,
}

struct Contact {
    link: Option<PeerLink>,
    redial: Redial,
    /// The try that is under way: what it came to, or closed without that if it failed.
    dialling: Option<watch::Receiver<Option<PeerLink>>>,
}

/// What there is for a request that wants a link.
enum Found {
    Live(PeerLink),
    /// A try that may give one.
    Dialling(watch::Receiver<Option<PeerLink>>),
    /// A try is due, and this is where it tells.
    Due(watch::Sender<Option<PeerLink>>, watch::Receiver<Option<PeerLink>>),
    Nothing,
}

impl Contact {
    fn live_link(&self) -> Option<PeerLink> {
        self.link.clone().filter(PeerLink::is_alive)
    }

    fn is_dialling(&self) -> bool {
        self.dialling.as_ref().is_some_and(|dialling| dialling.has_changed().is_ok())
    }

    fn find(&mut self, now: Instant) -> Found {
        if let Some(link) = self.live_link() {
            return Found::Live(link);
        }
        self.link = None;
        if let Some(dialling) = self.dialling.clone().filter(|_| self.is_dialling()) {
            return if self.redial.has_failed() { Found::Nothing } else { Found::Dialling(dialling) };
        }
        if !self.redial.is_due(now) {
            return Found::Nothing;
        }
        let (done, dialling) = watch::channel(None);
        self.dialling = Some(dialling.clone());
        Found::Due(done, dialling)
    }
}

impl Slot {
    fn new(address: SocketAddr, used: u64) -> Self {
        let contact = Contact { link: None, redial: Redial::new(PAUSE_MAX), dialling: None };
        Self { address, used, contact: Arc::new(Mutex::new(contact)) }
    }

    /// The link that is there.
    fn live_link(&self) -> Option<PeerLink> {
        self.contact().live_link()
    }

    /// Held for moments, and never while the slots are asked for.
    fn contact(&self) -> MutexGuard<'_, Contact> {
        // Valid after every statement.
        self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peers {
    /// Nobody yet. Beyond `num_warm_max` connections the one that was used least recently is let go; whoever uses
    /// it keeps it until done.
    pub fn new(fabric: Fabric, num_warm_max: usize) -> Self {
        Self { fabric, num_warm_max, slots: Arc::default(), num_uses: Arc::default() }
    }

    /// Takes in what one proxy knows. Several proxies may know different parts, and a node that drains is in no
    /// directory and can still be asked for KV, so nodes are added and moved here; beyond a bound, the one that was
    /// not used for longest is forgotten.
    pub fn update(&self, directory: &Directory) {
        let mut slots = self.slots();
        for peer in directory.prefill_nodes.iter().filter(|peer| peer.node != self.fabric.hello().node) {
            match slots.get(&peer.node).filter(|slot| slot.address == peer.control) {
                // Who says that it is there has reached it.
                Some(slot) => {
                    let mut contact = slot.contact();
                    // A try that is under way says more: it is from here.
                    if !contact.is_dialling() {
                        contact.redial.on_reached();
                    }
                }
                None => {
                    tracing::info!(prefill_node = %peer.node, address = %peer.control, "learnt of a prefill node");
                    if slots.len() >= NUM_KNOWN_MAX && !slots.contains_key(&peer.node) {
                        forget_one(&mut slots);
                    }
                    slots.insert(peer.node.clone(), Slot::new(peer.control, self.next_use()));
                }
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

    /// A live connection to `node`; `None` (and a line in the log) if there is none to be had: at once where that was
    /// found a moment ago, or is being tried again for somebody else. Whoever stops waiting does not stop the try.
    pub async fn link(&self, node: &NodeId) -> Option<PeerLink> {
        let Some(slot) = self.use_slot(node) else {
            tracing::warn!(prefill_node = %node, "the proxy named a prefill node that is not in its directory");
            return None;
        };
        let found = slot.contact().find(Instant::now());
        let mut dialling = match found {
            Found::Live(link) => return Some(link),
            Found::Dialling(dialling) => dialling,
            Found::Due(done, dialling) => {
                self.fabric.shared.spawn(self.clone().try_to_reach(node.clone(), slot, done));
                dialling
            }
            Found::Nothing => {
                tracing::debug!(prefill_node = %node, "not waited for: it could not be reached a moment ago");
                return None;
            }
        };
        // Closed without a link if the try failed.
        dialling.wait_for(Option::is_some).await.ok()?.clone()
    }

    /// One try, bounded by the deadlines of dialling.
    async fn try_to_reach(self, node: NodeId, slot: Slot, done: watch::Sender<Option<PeerLink>>) {
        self.make_room();
        let dialled = self.dial(&node, slot.address).await;
        let mut contact = slot.contact();
        contact.dialling = None;
        match dialled {
            Ok(link) => {
                contact.redial.on_reached();
                contact.link = Some(link.clone());
                done.send_replace(Some(link));
            }
            Err(error) => {
                let pause = contact.redial.on_failed(Instant::now(), error.is_worth_a_retry(), rand::random());
                tracing::warn!(prefill_node = %node, address = %slot.address, %error, ?pause, "cannot reach the prefill node");
            }
        }
    }

    fn use_slot(&self, node: &NodeId) -> Option<Slot> {
        let mut slots = self.slots();
        let slot = slots.get_mut(node)?;
        slot.used = self.next_use();
        Some(slot.clone())
    }

    fn next_use(&self) -> u64 {
        self.num_uses.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Lets connections go until one more is not too many.
    fn make_room(&self) {
        let slots = self.slots();
        let mut warm: Vec<&Slot> = slots.values().filter(|slot| slot.live_link().is_some()).collect();
        warm.sort_by_key(|slot| slot.used);
        let num_too_many = (warm.len() + 1).saturating_sub(self.num_warm_max);
        for slot in &warm[..num_too_many.min(warm.len())] {
            slot.contact().link = None;
        }
    }

    async fn dial(&self, node: &NodeId, address: SocketAddr) -> Result<PeerLink, DialError> {
        match self.dial_life(node, address).await {
            // Its new life is there already.
            Err(DialError::Restarted { .. }) => self.dial_life(node, address).await,
            dialled => dialled,
        }
    }

    /// Both connections, to one life of the node.
    async fn dial_life(&self, node: &NodeId, address: SocketAddr) -> Result<PeerLink, DialError> {
        let link = self.fabric.dial(address, Role::PrefillNode, Some(node)).await?;
        let bulk = self.fabric.connect_bulk(&link, &self.fabric.landing_zone()).await?;
        self.tell_conversion(&link);
        Ok(PeerLink { link, bulk: Arc::new(bulk) })
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

/// Forgets the node without a connection that was not used for longest.
fn forget_one(slots: &mut HashMap<NodeId, Slot>) {
    let idle = slots.iter().filter(|(_, slot)| slot.live_link().is_none());
    if let Some(node) = idle.min_by_key(|(_, slot)| slot.used).map(|(node, _)| node.clone()) {
        slots.remove(&node);
    }
}
