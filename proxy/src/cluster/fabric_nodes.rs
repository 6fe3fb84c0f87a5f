//! The cluster over the fabric.

use std::sync::Arc;

use common::content::ContentKey;
use common::wire::{Generate, GenerateEvent, Open};
use futures::StreamExt;
use kv_connector::{ControlReceiver, ControlSender, Fabric, Link};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::follow::{Target, follow};
use super::members::Members;
use super::registration::accept_registrations;
use crate::dispatch::{GenerateStream, NodeLost, Nodes};
use crate::index::BlockIndex;
use crate::route::{ClusterView, HeldPrefixes, NodeView};

/// The nodes that the proxy knows, and the tasks that follow them. They end when it is dropped.
pub struct Cluster {
    members: Arc<Members>,
    index: Arc<BlockIndex>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Cluster {
    /// Follows `targets`, and nodes that register if they may.
    pub fn start(
        fabric: Fabric,
        members: Arc<Members>,
        index: Arc<BlockIndex>,
        targets: Vec<Target>,
        may_register: bool,
    ) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        for target in targets {
            let following = follow(fabric.clone(), members.clone(), index.clone(), target);
            let stop = stop.clone();
            tasks.spawn(async move { stop.run_until_cancelled(following).await });
        }
        let accepting =
            accept_registrations(fabric, members.clone(), index.clone(), tasks.clone(), stop.clone(), may_register);
        tasks.spawn(accepting);
        Self { members, index, stop, tasks }
    }

    /// The table of nodes.
    pub fn members(&self) -> &Arc<Members> {
        &self.members
    }

    /// Lets go of all nodes.
    pub async fn shut_down(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Nodes for Cluster {
    fn view(&self) -> Arc<ClusterView> {
        self.members.view()
    }

    fn held_prefixes(&self, keys: &dyn Fn() -> Vec<ContentKey>) -> HeldPrefixes {
        if self.index.num_blocks() == 0 {
            return HeldPrefixes::default();
        }
        self.index.held_prefixes(&keys())
    }

    fn generate(&self, node: &NodeView, request: Generate) -> GenerateStream {
        let stage = match self.members.link(&node.life()) {
            Some(link) => Stage::Unopened(link, Box::new(request)),
            None => Stage::Gone,
        };
        futures::stream::unfold(stage, |stage| async move {
            let (event, stage) = stage.next().await?;
            Some((event, stage))
        })
        .boxed()
    }
}

/// A stream to a decode node. Dropping its halves resets it.
enum Stage {
    Gone,
    Unopened(Link, Box<Generate>),
    Open(ControlSender, ControlReceiver),
    Ended,
}

impl Stage {
    async fn next(self) -> Option<(Result<GenerateEvent, NodeLost>, Stage)> {
        let (mut sender, mut receiver) = match self {
            Stage::Ended => return None,
            Stage::Gone => return Some((Err(NodeLost::Unreachable("it has just left".into())), Stage::Ended)),
            Stage::Unopened(link, request) => match link.open(&Open::Generate(request)).await {
                Ok(halves) => halves,
                Err(error) => return Some((Err(NodeLost::Unreachable(error.to_string())), Stage::Ended)),
            },
            Stage::Open(sender, receiver) => (sender, receiver),
        };
        match receiver.recv::<GenerateEvent>().await {
            Ok(Some(event)) => {
                let is_last =
                    matches!(event, GenerateEvent::Done { .. } | GenerateEvent::Busy { .. } | GenerateEvent::Failed(_));
                if is_last {
                    sender.finish();
                    return Some((Ok(event), Stage::Ended));
                }
                Some((Ok(event), Stage::Open(sender, receiver)))
            }
            Ok(None) => None,
            Err(error) => Some((Err(NodeLost::Lost(error.to_string())), Stage::Ended)),
        }
    }
}
