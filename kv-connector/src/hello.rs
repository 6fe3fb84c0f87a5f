//! The first stream of every connection: each end says who it is, and is held to its certificate.
//!
//! ```text
//! dialler   Open::Hello(hello) | Open::HelloBulk(hello, group) ->  names = certificate? role allowed? check
//!           names = certificate? expected node? check  <--  Welcome { hello, registration } | Refused { reason }
//! ```

use std::sync::Arc;

use common::ids::Role;
use common::wire::{BulkGroup, Hello, HelloBulk, HelloReply, Open, Registration};
use quinn::Connection;
use rustls::pki_types::CertificateDer;

use crate::accounting::{Kind, Ledger};
use crate::certs::CertNames;
use crate::link::{CLOSE_DONE, CLOSE_REFUSED, CloseReason};
use crate::socket::Traffic;
use crate::stream::{ControlReceiver, ControlSender, FrameBudget, RecvError, StreamHold};

/// Decides whether to work with a peer; the text of a refusal goes to both operators.
pub type HelloCheck = Arc<dyn Fn(&Hello) -> Result<(), String> + Send + Sync>;

/// Takes every peer whose model, if both have one, may exchange KV with ours.
pub fn compatible_models(ours: &Hello) -> HelloCheck {
    let model = ours.model.clone();
    Arc::new(move |peer: &Hello| match (&model, &peer.model) {
        (Some(ours), Some(theirs)) => ours.check_compatible(theirs).map_err(|mismatch| mismatch.to_string()),
        _ => Ok(()),
    })
}

/// Why an exchange did not end in a welcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HelloFailure {
    /// We do not want the peer.
    RefusedHere(String),
    /// The peer does not want us.
    RefusedByPeer(String),
    /// The connection ended.
    Lost(CloseReason),
    /// The peer does not speak the protocol.
    Broken(String),
    /// There is no room for the peer now.
    Full(String),
}

/// Why a peer is not welcome.
pub(crate) enum Unwelcome {
    /// Whoever it is, or what it wants: somebody must change something first.
    Refused(String),
    /// There is no room now. It is told as the end of the connection, which dialling again may mend.
    Full(String),
}

impl From<String> for Unwelcome {
    fn from(reason: String) -> Self {
        Unwelcome::Refused(reason)
    }
}

/// What is needed to exchange hellos.
pub(crate) struct Greeter<'a> {
    pub(crate) ours: &'a Hello,
    pub(crate) check: &'a HelloCheck,
    pub(crate) traffic: Traffic,
    pub(crate) ledger: &'a Arc<Ledger>,
    pub(crate) budget: &'a FrameBudget,
}

impl Greeter<'_> {
    /// The dialler's part: who answers, and the memory it lets read on the same host.
    pub(crate) async fn greet(
        &self,
        connection: &Connection,
        group: Option<BulkGroup>,
    ) -> Result<(Hello, Option<Registration>), HelloFailure> {
        let halves = connection.open_bi().await.map_err(|error| HelloFailure::Lost(error.into()))?;
        let (mut sender, mut receiver) = self.stream(halves);
        let hello = match group {
            Some(group) => Open::HelloBulk(Box::new(HelloBulk { hello: self.ours.clone(), group })),
            None => Open::Hello(self.ours.clone()),
        };
        sender.send(&hello).await.map_err(|error| lost(connection, error.to_string()))?;
        sender.finish();
        match receive(connection, &mut receiver).await? {
            HelloReply::Refused { reason } => Err(HelloFailure::RefusedByPeer(reason)),
            HelloReply::Welcome { hello: peer, registration } => {
                let verdict = self.judge(connection, &peer);
                verdict
                    .inspect_err(|reason| connection.close(CLOSE_REFUSED, reason.as_bytes()))
                    .map_err(HelloFailure::RefusedHere)?;
                Ok((*peer, registration))
            }
        }
    }

    /// The accepter's part. `register` runs before the peer is told that it is welcome, and of what it returns: memory
    /// it may read, or why it is not. A bulk connection whose dialler names no group is alone.
    pub(crate) async fn welcome(
        &self,
        connection: &Connection,
        register: impl FnOnce(&Hello, BulkGroup) -> Result<Option<Registration>, Unwelcome>,
    ) -> Result<Hello, HelloFailure> {
        let halves = connection.accept_bi().await.map_err(|error| HelloFailure::Lost(error.into()))?;
        let (mut sender, mut receiver) = self.stream(halves);
        let (peer, group) = match receive(connection, &mut receiver).await? {
            Open::Hello(peer) => (peer, BulkGroup { id: 0, num_connections: 1, joins: false }),
            Open::HelloBulk(hello) if self.traffic == Traffic::Bulk => (hello.hello, hello.group),
            _ => {
                let reason = "a connection begins with a hello".to_string();
                connection.close(CLOSE_REFUSED, reason.as_bytes());
                return Err(HelloFailure::Broken(reason));
            }
        };
        let judged = self.judge(connection, &peer).map_err(Unwelcome::from);
        let (reply, verdict) = match judged.and_then(|()| register(&peer, group)) {
            Ok(registration) => (HelloReply::Welcome { registration, hello: Box::new(self.ours.clone()) }, Ok(())),
            Err(Unwelcome::Refused(reason)) => (HelloReply::Refused { reason: reason.clone() }, Err(reason)),
            Err(Unwelcome::Full(reason)) => {
                connection.close(CLOSE_DONE, reason.as_bytes());
                return Err(HelloFailure::Full(reason));
            }
        };
        sender.send(&reply).await.map_err(|error| lost(connection, error.to_string()))?;
        sender.finish();
        if let Err(reason) = verdict {
            // Closing at once could overtake the sentence.
            sender.stopped().await;
            connection.close(CLOSE_REFUSED, reason.as_bytes());
            return Err(HelloFailure::RefusedHere(reason));
        }
        Ok(peer)
    }

    fn stream(&self, halves: (quinn::SendStream, quinn::RecvStream)) -> (ControlSender, ControlReceiver) {
        let hold = StreamHold::new(self.ledger.hold(Kind::Stream(Traffic::Control)), None);
        let sender = ControlSender::new(halves.0, hold.clone());
        (sender, ControlReceiver::new(halves.1, self.budget.clone(), hold))
    }

    fn judge(&self, connection: &Connection, peer: &Hello) -> Result<(), String> {
        let names = peer_names(connection)?;
        if (names.role, &names.node) != (peer.role, &peer.node) {
            return Err(format!(
                "the hello is from {} \"{}\", the certificate was issued to {} \"{}\": start the node with its own certificate",
                peer.role, peer.node, names.role, names.node
            ));
        }
        if self.traffic == Traffic::Bulk && (peer.role == Role::Proxy || self.ours.role == Role::Proxy) {
            return Err("KV is exchanged between nodes, never with a proxy".to_string());
        }
        (self.check)(peer)
    }
}

fn peer_names(connection: &Connection) -> Result<CertNames, String> {
    let identity = connection.peer_identity().ok_or("the peer shows no certificate")?;
    let chain =
        identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| "the peer's identity is no certificate")?;
    let own = chain.first().ok_or("the peer shows no certificate")?;
    CertNames::of(own, "the peer's certificate").map_err(|error| error.to_string())
}

async fn receive<M: common::wire::Message>(
    connection: &Connection,
    receiver: &mut ControlReceiver,
) -> Result<M, HelloFailure> {
    match receiver.recv().await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(HelloFailure::Broken("the stream of the hello ended without one".to_string())),
        Err(RecvError::ConnectionLost(reason)) => Err(HelloFailure::Lost(reason)),
        Err(error) => Err(lost(connection, error.to_string())),
    }
}

/// A stream that fails with its connection fails for the connection's reason.
fn lost(connection: &Connection, otherwise: String) -> HelloFailure {
    match connection.close_reason() {
        Some(reason) => HelloFailure::Lost(reason.into()),
        None => HelloFailure::Broken(otherwise),
    }
}
