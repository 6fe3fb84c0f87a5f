//! The end of a bulk connection, for whoever must not ask the connection.
//!
//! Its own answer takes its lock, which a thread of KV holds for as long as it encrypts and sends, and may hold while it
//! does not have the core: a message would wait for both.

use std::sync::{Arc, OnceLock};

use quinn::Connection;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::link::CloseReason;

/// Whether a connection has ended, and why; known a moment behind its end.
#[derive(Default)]
pub(crate) struct BulkEnd {
    reason: OnceLock<CloseReason>,
    has_come: CancellationToken,
}

impl BulkEnd {
    /// Of `connection`. To be called on the threads of KV.
    pub(crate) fn of(connection: &Connection, tasks: &TaskTracker) -> Arc<Self> {
        let end = Arc::new(Self::default());
        let (telling, connection) = (Telling(end.clone()), connection.clone());
        tasks.spawn(async move {
            let reason = connection.closed().await.into();
            // The first to set it.
            let _ = telling.0.reason.set(reason);
        });
        end
    }

    /// Whether nothing can be sent or received any more.
    pub(crate) fn has_come(&self) -> bool {
        self.has_come.is_cancelled()
    }

    /// Resolves at the end, with the reason.
    pub(crate) async fn come(&self) -> CloseReason {
        self.has_come.cancelled().await;
        self.reason.get().cloned().expect("the reason is set before anybody is told")
    }
}

/// Tells the end, which is also that of the threads which would have heard of it.
struct Telling(Arc<BulkEnd>);

impl Drop for Telling {
    fn drop(&mut self) {
        let _ = self.0.reason.set(CloseReason::ClosedHere);
        self.0.has_come.cancel();
    }
}
