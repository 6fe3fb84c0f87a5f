//! The end of the bulk connections to a peer, for whoever must not ask them.
//!
//! Their own answer takes their lock, which a thread of KV holds for as long as it encrypts and sends, and may hold
//! while it does not have the core: a message would wait for both.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

use crate::link::CloseReason;

/// Whether the last of them has ended, and why; known a moment behind its end.
#[derive(Default)]
pub(crate) struct BulkEnd {
    reason: OnceLock<CloseReason>,
    has_come: CancellationToken,
}

impl BulkEnd {
    /// It has come. The first reason is the one that counts.
    pub(crate) fn tell(&self, reason: CloseReason) {
        let _ = self.reason.set(reason);
        self.has_come.cancel();
    }

    /// Whether nothing can be sent or received any more.
    pub(crate) fn has_come(&self) -> bool {
        self.has_come.is_cancelled()
    }

    /// Why it has come, if it has.
    pub(crate) fn reason(&self) -> Option<CloseReason> {
        self.reason.get().cloned()
    }

    /// Resolves at the end, with the reason.
    pub(crate) async fn come(&self) -> CloseReason {
        self.has_come.cancelled().await;
        self.reason().expect("the reason is set before anybody is told")
    }
}
