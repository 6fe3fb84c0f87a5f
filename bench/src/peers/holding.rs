//! What one connection of a row is made of.

use anyhow::Context;
use clap::ValueEnum;
use common::ids::Role;
use common::wire::{Directory, NodeStatus, Open, Watch};
use kv_connector::transfer::BulkReceiver;
use kv_connector::{ControlReceiver, ControlSender, Fabric, Link};

/// What is held of each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Holding {
    /// A control connection: what keeps a node reachable.
    Link,
    /// A control connection and the bulk connection beside it: what a decode node keeps of a prefill node.
    Pair,
    /// A control connection with the node's status every 250 ms: what a proxy keeps of each node.
    Watch,
}

impl Holding {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Holding::Link => "link",
            Holding::Pair => "pair",
            Holding::Watch => "watch",
        }
    }

    /// Who dials.
    pub(super) fn dialler(self) -> Role {
        match self {
            Holding::Link | Holding::Pair => Role::DecodeNode,
            Holding::Watch => Role::Proxy,
        }
    }

    /// Makes one connection to the node that `link` leads to.
    pub(super) async fn hold(self, fabric: &Fabric, link: Link) -> anyhow::Result<Held> {
        let (mut bulk, mut watch) = (None, None);
        match self {
            Holding::Link => {}
            Holding::Pair => bulk = Some(fabric.connect_bulk(&link, &fabric.landing_zone()).await?),
            Holding::Watch => {
                let (mut sender, mut receiver) = link.open(&Open::Watch(Watch {})).await?;
                sender.send(&Directory { prefill_nodes: Vec::new() }).await?;
                receiver.recv::<NodeStatus>().await?.context("the node ends the watch")?;
                watch = Some((sender, receiver));
            }
        }
        Ok(Held { link, bulk, watch })
    }
}

/// One connection.
pub(super) struct Held {
    link: Link,
    bulk: Option<BulkReceiver>,
    watch: Option<(ControlSender, ControlReceiver)>,
}

impl Held {
    /// Hears what the node tells; resolves when the connection is gone, with the reason.
    pub(super) async fn lost(self) -> String {
        let Self { link, bulk, watch } = self;
        let bulk_closed = async {
            match &bulk {
                Some(bulk) => bulk.closed().await,
                None => std::future::pending().await,
            }
        };
        let silent = async {
            let Some((_sender, mut receiver)) = watch else { return std::future::pending().await };
            loop {
                match receiver.recv::<NodeStatus>().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return "the node has ended the watch".to_string(),
                    Err(error) => return error.to_string(),
                }
            }
        };
        tokio::select! {
            reason = link.closed() => reason.to_string(),
            reason = bulk_closed => reason.to_string(),
            reason = silent => reason,
        }
    }
}
