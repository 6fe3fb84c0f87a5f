//! A link: one control connection to a peer that has said who it is.
//!
//! The connection is the lease. Something is sent over an idle one every half second, and a peer that is
//! silent for two seconds is gone, with every stream of the link.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::wire::{Hello, Open};
use quinn::{ConnectionError, VarInt};

use crate::accounting::{Held, Kind, Ledger};
use crate::socket::Traffic;
use crate::stream::{ControlReceiver, ControlSender, FrameBudget, SendError, StreamHold};
use crate::versions::NO_APPLICATION_PROTOCOL;

/// Error codes of a connection's end: no longer wanted, or its node is leaving; and the other end is not wanted.
pub(crate) const CLOSE_DONE: VarInt = VarInt::from_u32(0);
pub(crate) const CLOSE_REFUSED: VarInt = VarInt::from_u32(1);

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// Nothing was heard of the peer: its process is dead or frozen, or the network is cut.
    #[error("the peer has been silent for longer than the idle limit")]
    Silent,
    /// Closed on this side.
    #[error("it was closed on this side")]
    ClosedHere,
    /// Closed by the peer, which needs it no longer or is leaving.
    #[error("the peer closed it ({reason})")]
    ClosedByPeer {
        /// What it said.
        reason: String,
    },
    /// The peer does not want this node.
    #[error("the peer refused this node ({reason})")]
    RefusedByPeer {
        /// What it said.
        reason: String,
    },
    /// TLS refused one of the certificates.
    #[error("the certificates do not pass ({reason})")]
    NotTrusted {
        /// What TLS said.
        reason: String,
    },
    /// The peer offers no protocol that is spoken here.
    #[error("the other end speaks no version of this protocol that is spoken here")]
    NoCommonProtocol,
    /// Anything else: the peer restarted and forgot the connection, or broke the protocol.
    #[error("{reason}")]
    Broken {
        /// What QUIC said.
        reason: String,
    },
}

impl From<ConnectionError> for CloseReason {
    fn from(error: ConnectionError) -> Self {
        let is_tls = |code: quinn::TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
        let is_alpn = |code: quinn::TransportErrorCode| u64::from(code) == NO_APPLICATION_PROTOCOL;
        match error {
            ConnectionError::ConnectionClosed(close) if is_alpn(close.error_code) => CloseReason::NoCommonProtocol,
            ConnectionError::TransportError(error) if is_alpn(error.code) => CloseReason::NoCommonProtocol,
            ConnectionError::TimedOut => CloseReason::Silent,
            ConnectionError::LocallyClosed => CloseReason::ClosedHere,
            ConnectionError::ApplicationClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason).into_owned();
                if close.error_code == CLOSE_REFUSED {
                    CloseReason::RefusedByPeer { reason }
                } else {
                    CloseReason::ClosedByPeer { reason }
                }
            }
            ConnectionError::ConnectionClosed(close) if is_tls(close.error_code) => {
                CloseReason::NotTrusted { reason: format!("refused by the peer: {close}") }
            }
            ConnectionError::TransportError(error) if is_tls(error.code) => {
                CloseReason::NotTrusted { reason: error.to_string() }
            }
            ConnectionError::Reset => {
                CloseReason::Broken { reason: "the peer restarted and does not know the connection".to_string() }
            }
            other => CloseReason::Broken { reason: other.to_string() },
        }
    }
}

/// A stream that could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The connection is gone.
    #[error("the connection was lost: {0}")]
    ConnectionLost(CloseReason),
    /// The first message did not go out.
    #[error("the stream could not be opened: {0}")]
    Send(SendError),
}

/// A control connection. Cheap to clone; the connection closes when the last clone and the last stream
/// are gone.
#[derive(Clone)]
pub struct Link {
    inner: Arc<LinkInner>,
}

struct LinkInner {
    connection: quinn::Connection,
    version: u16,
    peer: Arc<Hello>,
    ledger: Arc<Ledger>,
    budget: FrameBudget,
    _held: Held,
}

impl Drop for LinkInner {
    fn drop(&mut self) {
        self.connection.close(CLOSE_DONE, b"no longer needed");
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let peer = self.peer();
        write!(f, "Link({} {} at {})", peer.role, peer.node, self.remote())
    }
}

impl Link {
    pub(crate) fn new(
        connection: quinn::Connection,
        version: u16,
        peer: Hello,
        ledger: Arc<Ledger>,
        budget: FrameBudget,
    ) -> Self {
        let held = ledger.hold(Kind::Connection(Traffic::Control));
        Self { inner: Arc::new(LinkInner { connection, version, peer: Arc::new(peer), ledger, budget, _held: held }) }
    }

    /// The version of the protocol that both ends speak here
    /// ([`PROTOCOL_VERSIONS`](common::wire::PROTOCOL_VERSIONS)).
    pub fn version(&self) -> u16 {
        self.inner.version
    }

    /// Who is at the other end, as it said in its hello and as its certificate confirms.
    pub fn peer(&self) -> &Hello {
        &self.inner.peer
    }

    pub(crate) fn shared_peer(&self) -> Arc<Hello> {
        self.inner.peer.clone()
    }

    /// Where it is.
    pub fn remote(&self) -> SocketAddr {
        self.inner.connection.remote_address()
    }

    /// Current estimate of the round trip.
    pub fn rtt(&self) -> Duration {
        self.inner.connection.rtt()
    }

    /// Opens a stream with its first message. Dropping the halves cancels what the stream stands for.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(&self, open: &Open) -> Result<(ControlSender, ControlReceiver), OpenError> {
        let connection = &self.inner.connection;
        let halves = connection.open_bi().await.map_err(|error| OpenError::ConnectionLost(error.into()))?;
        let (mut sender, receiver) = self.stream(halves);
        sender.send(open).await.map_err(|error| match error {
            SendError::ConnectionLost(reason) => OpenError::ConnectionLost(reason),
            other => OpenError::Send(other),
        })?;
        Ok((sender, receiver))
    }

    /// Resolves when the connection is gone, with the reason.
    pub async fn closed(&self) -> CloseReason {
        self.inner.connection.closed().await.into()
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.inner.connection.close_reason().is_some()
    }

    /// Closes the connection, and with it every stream, at both ends.
    pub fn close(&self) {
        self.inner.connection.close(CLOSE_DONE, b"closed");
    }

    pub(crate) fn stream(&self, halves: (quinn::SendStream, quinn::RecvStream)) -> (ControlSender, ControlReceiver) {
        let held = self.inner.ledger.hold(Kind::Stream(Traffic::Control));
        let hold = StreamHold::new(held, Some(self.clone()));
        let sender = ControlSender::new(halves.0, hold.clone());
        (sender, ControlReceiver::new(halves.1, self.inner.budget.clone(), hold))
    }
}
