//! What is done to a node, and how it comes back: as after a restart by a supervisor, or a network that heals.

use super::Cluster;

/// What is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Blow {
    /// Its process is gone, and with it all that it had.
    Kill,
    /// Its process stands still, and its connections with it.
    Freeze,
}

impl Blow {
    /// Strikes the node called `name`.
    pub(crate) fn strike(self, cluster: &mut Cluster, name: &str) {
        let node = cluster.node(name);
        match self {
            Blow::Kill => node.process.kill(),
            Blow::Freeze => node.freeze(),
        }
    }

    /// The node is back.
    pub(crate) async fn repair(self, cluster: &mut Cluster, name: &str) {
        match self {
            Blow::Kill => cluster.restart(name).await,
            Blow::Freeze => cluster.node(name).thaw(),
        }
    }
}
