//! The further bulk connections to a peer: dialled beside the first, and again where one was lost.
//!
//! Nobody waits for them. KV goes over those that are there, and a peer that takes no more of them, or that a further
//! one does not reach, is served over fewer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::ids::{Epoch, NodeId, Role};
use common::wire::BulkGroup;
use futures::future::join_all;

use crate::accounting::Kind;
use crate::dial::{DialError, Dialled};
use crate::fabric::Shared;
use crate::link::CLOSE_DONE;
use crate::redial::Redial;
use crate::socket::Traffic;
use crate::transfer::LandingZone;
use crate::transfer::bulk::{self, PeerTransport};
use crate::transfer::stripes::Stripes;

/// Longest pause between two tries: KV goes over the others meanwhile.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A connection that is lost so soon was as good as none: dialling pauses as if it had failed.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// What is needed to dial one more. It does not keep the fabric alive.
pub(crate) struct Joins {
    pub(crate) shared: Arc<Shared>,
    pub(crate) stripes: Arc<Stripes>,
    pub(crate) addr: SocketAddr,
    pub(crate) role: Role,
    /// Who answers there: no other node, and no other life of it.
    pub(crate) life: (NodeId, Epoch),
    pub(crate) zone: LandingZone,
}

impl Joins {
    /// Keeps the group at the number that was asked for, until its last connection has ended.
    pub(crate) async fn keep(self) {
        let end = self.stripes.end().clone();
        tokio::select! {
            biased;
            _ = end.come() => {}
            () = self.dial_what_is_missing() => {}
        }
    }

    async fn dial_what_is_missing(&self) {
        let mut redial = Redial::new(PAUSE_MAX);
        loop {
            let dialled = join_all(self.stripes.free_slots().into_iter().map(|slot| self.join(slot))).await;
            let num_connections = self.stripes.num_open();
            let Some(error) = dialled.into_iter().find_map(Result::err) else {
                tracing::info!(peer = %self.life.0, num_connections, "KV of this node arrives over several connections");
                let since = Instant::now();
                self.stripes.one_is_lost().await;
                if since.elapsed() > SHORT_LIFE {
                    redial.on_reached();
                } else {
                    tokio::time::sleep(redial.on_failed(Instant::now(), true, rand::random())).await;
                }
                continue;
            };
            let is_news = !redial.has_failed();
            // A refusal too: a peer that has not noticed a loss yet counts the connection that is gone.
            let pause = redial.on_failed(Instant::now(), true, rand::random());
            if is_news {
                let num_wanted = self.stripes.group().num_connections;
                tracing::info!(
                    peer = %self.life.0, num_connections, num_wanted, %error,
                    "KV of this node arrives over fewer connections than this node asks for"
                );
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn join(&self, slot: usize) -> Result<(), DialError> {
        let (shared, stripes) = (&self.shared, &self.stripes);
        let group = BulkGroup { joins: true, ..*stripes.group() };
        let socket = shared.bulk_dialler(slot, self.addr)?;
        let Dialled { connection, peer, .. } = shared.connect(socket, self.addr, self.role, Some(group)).await?;
        if (&peer.node, peer.epoch) != (&self.life.0, self.life.1) {
            connection.close(CLOSE_DONE, b"another node, or another life of it, was expected here");
            return Err(DialError::Restarted { node: self.life.0.clone() });
        }
        let transport = PeerTransport::new(&connection, &shared.ledger, None);
        if let Err(reason) = stripes.add(Some(slot), transport, &shared.tasks) {
            connection.close(CLOSE_DONE, reason.as_bytes());
            return Err(DialError::RefusedHere { addr: self.addr, reason });
        }
        let held = shared.ledger.hold(Kind::Connection(Traffic::Bulk));
        shared.tell_path(&self.life.0, &connection);
        let context = Arc::new(shared.receive_context(&self.zone, &connection, stripes));
        shared.tasks.spawn(bulk::receive_until_the_end(context, held, shared.tasks.clone()));
        Ok(())
    }
}
