//! Who is calling, what a node is doing, and who else there is.

use std::net::SocketAddr;

use bincode::{Decode, Encode};

use crate::ids::{Epoch, NodeId, Role};
use crate::model::ModelInfo;

/// First message of a connection, from both ends.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Hello {
    /// The sender's name; must be the one in its certificate.
    pub node: NodeId,
    /// The sender's role; must be the one in its certificate.
    pub role: Role,
    /// The sender's life.
    pub epoch: Epoch,
    /// Its model; a proxy has none.
    pub model: Option<ModelInfo>,
    /// UDP port of its bulk listener; `None` if it has none (proxy, decode node).
    pub bulk_port: Option<u16>,
}

/// First message of a bulk connection from version 2 of the protocol on, where version 1 has a bare [`Hello`].
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct HelloBulk {
    /// Who is calling.
    pub hello: Hello,
    /// Which connections this one belongs to.
    pub group: BulkGroup,
}

/// The bulk connections between two nodes that carry KV as one: extents go over any of them, each over one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct BulkGroup {
    /// Names the group among those of one life of the dialler.
    pub id: u64,
    /// How many connections it is to have. Each end lets each of them have that part of its window.
    pub num_connections: u16,
    /// Whether this is a further connection of a group that is there; if not, it begins one, in place of any before it.
    pub joins: bool,
}

/// Answer to [`Hello`] and [`HelloBulk`].
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum HelloReply {
    /// Accepted.
    Welcome {
        /// Who answers.
        hello: Box<Hello>,
        /// Memory that KV can be read from, if the dialler runs on the same host; on bulk connections only.
        registration: Option<Registration>,
    },
    /// Refused, in words that name what was expected and found.
    Refused {
        /// The sentence for the operator.
        reason: String,
    },
}

/// Where a node's KV pool can be had by who shows the token, on the same host. Valid for the one connection
/// it was announced on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Registration {
    /// Names the UNIX socket, which only processes of the same host and network namespace can reach.
    pub socket: u128,
    /// Shown there, once.
    pub token: u128,
    /// Size of the memory.
    pub num_bytes: u64,
}

/// Asks a node for its status: at once, on every change of state, and every 250 ms.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Watch {}

/// Whether a node takes work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum NodeState {
    /// Takes requests.
    Ready,
    /// Finishes what it has and refuses what is new.
    Draining,
}

/// How busy a node is. Hints for routing; the node's own admission has the last word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct NodeLoad {
    /// Sequences in the running batch.
    pub num_running: u32,
    /// Sequences that wait for blocks or for their turn.
    pub num_waiting: u32,
    /// Tokens still to be computed here; not those whose KV is awaited from elsewhere.
    pub num_queued_tokens: u64,
    /// Blocks that a new sequence could take now: free, or cached and unreferenced.
    pub num_available_blocks: u32,
    /// All blocks.
    pub num_blocks: u32,
    /// Engine steps since the start; a value that stands still while there is work is a hang.
    pub num_steps: u64,
}

impl NodeLoad {
    /// Whether there is anything to compute or to admit. A sequence that awaits KV from elsewhere is neither.
    pub fn needs_steps(&self) -> bool {
        self.num_running > 0 || self.num_waiting > 0
    }
}

/// A node's state and load.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct NodeStatus {
    /// Whether it takes work.
    pub state: NodeState,
    /// How busy it is.
    pub load: NodeLoad,
}

/// A node and where it listens.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Peer {
    /// Its name.
    pub node: NodeId,
    /// Its control listener.
    pub control: SocketAddr,
}

/// The prefill nodes that a decode node may be told to use and a prefill node to fetch from, from the proxy;
/// replaces the one before. Requests name nodes by [`NodeId`] only, so an address never comes from a client.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Directory {
    /// Prefill nodes that are up.
    pub prefill_nodes: Vec<Peer>,
}

/// A node that was not listed at the proxy announces itself; the proxy dials it back.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Register {
    /// Name and address of its control listener. An unspecified IP stands for the address the
    /// registration came from.
    pub peer: Peer,
    /// Its role.
    pub role: Role,
}
