//! One node, for as long as it is in the list: dial, watch, lose, dial again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::config::HostPort;
use common::ids::{NodeId, Role};
use common::wire::{NodeState, NodeStatus, Open, Watch};
use kv_connector::{ControlReceiver, ControlSender, Fabric, Link};

use super::follow_blocks::BlockFollower;
use super::members::{Members, Refused};
use super::step_watch::StepWatch;
use crate::index::BlockIndex;

/// First and longest pause between two tries.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Pause after a node was refused: somebody must change something.
const PAUSE_REFUSED: Duration = Duration::from_secs(5);
/// A node tells its status every 250 ms; one that is silent for this long on a live connection is stuck.
const SILENT_AFTER: Duration = Duration::from_secs(5);

/// What a node told of its blocks is kept for this long once it is lost: it may be the network that is.
const REMEMBERED_FOR: Duration = Duration::from_secs(30);

/// A node to follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// What it must be.
    pub role: Role,
    /// Where it listens.
    pub address: HostPort,
    /// Who it must be, if it said so.
    pub node: Option<NodeId>,
}

/// Why a node is not followed at the moment.
#[derive(Debug, thiserror::Error)]
enum Interrupted {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("{0}")]
    NotReached(String),
    #[error("{0}")]
    Lost(String),
}

/// Follows a node until the task is dropped. Each kind of trouble is logged once, not at every try.
pub async fn follow(fabric: Fabric, members: Arc<Members>, index: Arc<BlockIndex>, target: Target) {
    let mut blocks = BlockFollower::new(index);
    let mut linked_last = Instant::now();
    let mut pause = PAUSE_MIN;
    let mut last_trouble = String::new();
    loop {
        let interrupted = follow_once(&fabric, &members, &mut blocks, &target).await;
        let trouble = interrupted.to_string();
        match &interrupted {
            Interrupted::Refused(_) if trouble != last_trouble => {
                tracing::error!(address = %target.address, role = %target.role, reason = trouble, "refused a node");
            }
            Interrupted::NotReached(_) if trouble != last_trouble => {
                tracing::warn!(address = %target.address, role = %target.role, reason = trouble, "cannot reach a node");
            }
            Interrupted::Lost(_) => {
                tracing::warn!(address = %target.address, role = %target.role, reason = trouble, "lost a node");
            }
            _ => {}
        }
        last_trouble = trouble;
        if let Interrupted::Lost(_) = interrupted {
            linked_last = Instant::now();
        } else if linked_last.elapsed() > REMEMBERED_FOR {
            blocks.forget().await;
        }
        pause = match interrupted {
            Interrupted::Refused(_) => PAUSE_REFUSED,
            Interrupted::Lost(_) => PAUSE_MIN,
            Interrupted::NotReached(_) => (pause * 2).min(PAUSE_MAX),
        };
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
    }
}

async fn follow_once(
    fabric: &Fabric,
    members: &Arc<Members>,
    blocks: &mut BlockFollower,
    target: &Target,
) -> Interrupted {
    let link = match dial(fabric, target).await {
        Ok(link) => link,
        Err(reason) => return Interrupted::NotReached(reason),
    };
    if let Err(refused) = members.check(link.peer()) {
        link.close();
        return refused.into();
    }
    let _member = Membership { members: members.clone(), link: link.clone() };
    let (sender, receiver) = match link.open(&Open::Watch(Watch {})).await {
        Ok(halves) => halves,
        Err(error) => return Interrupted::Lost(error.to_string()),
    };
    tokio::select! {
        interrupted = hear(members, &link, receiver) => interrupted,
        reason = tell(members, sender) => Interrupted::Lost(reason),
        reason = link.closed() => Interrupted::Lost(reason.to_string()),
        never = blocks.follow(&link) => match never {},
    }
}

/// Takes the node out when its link ends, however that happens.
struct Membership {
    members: Arc<Members>,
    link: Link,
}

impl Drop for Membership {
    fn drop(&mut self) {
        let hello = self.link.peer();
        self.members.on_gone(&(hello.node.clone(), hello.epoch));
        self.link.close();
    }
}

async fn dial(fabric: &Fabric, target: &Target) -> Result<Link, String> {
    let HostPort { host, port } = &target.address;
    let found = tokio::net::lookup_host((host.as_str(), *port)).await;
    let addresses: Vec<SocketAddr> = found.map_err(|e| format!("{host} cannot be resolved: {e}"))?.collect();
    let mut reason = format!("{host} has no address");
    for address in addresses {
        match fabric.dial(address, target.role, target.node.as_ref()).await {
            Ok(link) => return Ok(link),
            Err(error) => reason = error.to_string(),
        }
    }
    Err(reason)
}

/// The node's status, as it comes.
async fn hear(members: &Members, link: &Link, mut receiver: ControlReceiver) -> Interrupted {
    let mut steps = StepWatch::default();
    let mut last: Option<(NodeState, bool)> = None;
    loop {
        let status: NodeStatus = match tokio::time::timeout(SILENT_AFTER, receiver.recv()).await {
            Ok(Ok(Some(status))) => status,
            Ok(Ok(None)) => return Interrupted::Lost("it ended the watch: it is leaving".into()),
            Ok(Err(error)) => return Interrupted::Lost(error.to_string()),
            Err(_) => return Interrupted::Lost(format!("it has told no status for {SILENT_AFTER:?}")),
        };
        let is_stuck = steps.is_stuck(&status.load, Instant::now());
        let hello = link.peer();
        let state = status.state;
        if let Err(refused) = members.on_status(hello, link.remote(), Some(link), status, is_stuck) {
            return refused.into();
        }
        if last != Some((state, is_stuck)) {
            last = Some((state, is_stuck));
            tracing::info!(node = %hello.node, role = %hello.role, ?state, is_stuck, "node");
        }
        if is_stuck {
            // Ends its streams as well, so that its requests go on elsewhere.
            return Interrupted::Lost("its engine has work and makes no step".into());
        }
    }
}

/// The directory of prefill nodes, whenever it changes: to decode nodes that use them, and to prefill nodes that
/// fetch from each other.
async fn tell(members: &Members, mut sender: ControlSender) -> String {
    let mut directory = members.directory();
    loop {
        let current = directory.borrow_and_update().clone();
        if let Err(error) = sender.send(&current).await {
            return error.to_string();
        }
        if directory.changed().await.is_err() {
            return "the proxy is leaving".into();
        }
    }
}
