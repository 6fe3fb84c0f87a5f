//! Nodes that announce themselves: the open stream is their place in the list.

use std::sync::Arc;

use common::config::HostPort;
use common::wire::{Open, Register};
use kv_connector::{Fabric, IncomingStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::follow::{Target, follow};
use super::members::Members;
use crate::index::BlockIndex;

/// Nodes registered at a time.
const REGISTERED_MAX: usize = 1024;

/// Accepts registrations until the fabric closes or `stop`.
pub async fn accept_registrations(
    fabric: Fabric,
    members: Arc<Members>,
    index: Arc<BlockIndex>,
    tasks: TaskTracker,
    stop: CancellationToken,
    is_allowed: bool,
) {
    let places = Arc::new(tokio::sync::Semaphore::new(REGISTERED_MAX));
    loop {
        let incoming = tokio::select! {
            incoming = fabric.accept() => incoming,
            () = stop.cancelled() => return,
        };
        let Some(incoming) = incoming else { return };
        let Open::Register(register) = &incoming.open else { continue };
        if !is_allowed {
            tracing::warn!(node = %register.peer.node, "refused a registration: --fabric-port is not set here");
            continue;
        }
        if register.peer.node != incoming.peer.node {
            tracing::warn!(node = %incoming.peer.node, claimed = %register.peer.node, "refused a registration under another name");
            continue;
        }
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(node = %register.peer.node, "refused a registration: {REGISTERED_MAX} nodes are registered");
            continue;
        };
        let target = target_of(register, incoming.remote.ip());
        tracing::info!(node = %register.peer.node, role = %register.role, address = %target.address, "node registered");
        let following = follow(fabric.clone(), members.clone(), index.clone(), target);
        let stop = stop.clone();
        tasks.spawn(async move {
            let node = incoming.peer.node.clone();
            tokio::select! {
                () = following => {}
                () = stop.cancelled() => {}
                () = lease_end(incoming) => tracing::info!(%node, "registration ended"),
            }
            drop(place);
        });
    }
}

/// Where to dial back. An unspecified address stands for the one the registration came from.
fn target_of(register: &Register, from: std::net::IpAddr) -> Target {
    let control = register.peer.control;
    let ip = if control.ip().is_unspecified() { from } else { control.ip() };
    let address = HostPort { host: ip.to_string(), port: control.port() };
    Target { role: register.role, address, node: Some(register.peer.node.clone()) }
}

/// Resolves when the node ends its stream or its connection is lost.
async fn lease_end(mut incoming: IncomingStream) {
    while let Ok(Some(_)) = incoming.receiver.recv::<Register>().await {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::ids::{NodeId, Role};
    use common::wire::Peer;

    #[test]
    fn unspecified_address_is_the_one_the_registration_came_from() {
        let register = |control: &str| Register {
            peer: Peer { node: NodeId::new("d0").unwrap(), control: control.parse().unwrap() },
            role: Role::DecodeNode,
        };
        let target = |control| target_of(&register(control), [10, 0, 0, 7].into()).address.to_string();
        assert_eq!(target("0.0.0.0:8101"), "10.0.0.7:8101");
        assert_eq!(target("10.0.0.9:8101"), "10.0.0.9:8101");
    }
}
