//! Threads for KV, apart from those that serve messages.
//!
//! Copying, hashing and encrypting keep a thread busy for as long as there is KV, and a message that comes meanwhile to
//! the same thread waits. So all of it runs here, in a runtime of its own whose threads go [last](crate::turns): bulk
//! endpoints and connections, extents as they are sealed, sent and taken in, sockets of mapped pools. The node's own
//! threads decide, and hear what came of it. They never ask a bulk connection anything
//! ([`BulkEnd`](crate::transfer::bulk_end::BulkEnd)): its lock may be held by a thread that does not have the core.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::config::KV_CONNECTIONS_MAX;
use futures::future::join_all;
use quinn::{AsyncTimer, AsyncUdpSocket, Endpoint, TokioRuntime};
use tokio::runtime::{Builder, Handle};
use tokio::sync::mpsc;

use crate::accounting::Ledger;
use crate::kv_time::KvTime;
use crate::{turn_end, turns};

/// KV of one connection is moved by one thread at a time; some cores serve several peers.
const NUM_THREADS_MAX: usize = 8;
/// Endpoints of one fabric: those that accept, and those that dial.
const NUM_ENDPOINTS_MAX: usize = 2 * KV_CONNECTIONS_MAX as usize;
/// At the end, for the last datagrams to leave.
const LINGER: Duration = Duration::from_secs(1);

fn num_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(NUM_THREADS_MAX)
}

/// The threads of one fabric. They end some time behind this: first the endpoints' peers are told.
pub(crate) struct KvThreads {
    handle: Handle,
    endpoints: mpsc::Sender<Endpoint>,
    /// That the others end with, until somebody takes it.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl KvThreads {
    /// As many as there are cores for this process, within a bound.
    pub(crate) fn start(ledger: &Arc<Ledger>) -> io::Result<Self> {
        let num_threads = num_threads();
        let mut builder = match num_threads {
            // The thread below is the one: nothing is handed from thread to thread.
            1 => Builder::new_current_thread(),
            _ => Builder::new_multi_thread(),
        };
        let time = KvTime::default();
        let counted = time.clone();
        let begin = move || {
            counted.add_this_thread();
            turns::step_behind();
        };
        let runtime = builder
            .worker_threads(num_threads)
            .enable_all()
            .thread_name("kv")
            .on_thread_start(begin.clone())
            .on_thread_park(turn_end::on_park)
            .build()?;
        let handle = runtime.handle().clone();
        handle.spawn(time.tell(ledger.clone()));
        let (endpoints, told) = mpsc::channel(NUM_ENDPOINTS_MAX);
        let thread = std::thread::Builder::new().name("kv".to_string()).spawn(move || {
            begin();
            runtime.block_on(until_idle(told));
        })?;
        Ok(Self { handle, endpoints, thread: Mutex::new(Some(thread)) })
    }

    /// To run something on them.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What ends when all of them have, the first time it is asked for.
    pub(crate) fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What has been closed on `endpoint` is said before the threads end.
    pub(crate) fn linger_for(&self, endpoint: &Endpoint) {
        // One too many would be one that lost a race to be the second, and has no connections.
        let _ = self.endpoints.try_send(endpoint.clone());
    }
}

/// Resolves once the threads' owner is gone, and everybody has been told.
async fn until_idle(mut told: mpsc::Receiver<Endpoint>) {
    let mut endpoints = Vec::new();
    while let Some(endpoint) = told.recv().await {
        endpoints.push(endpoint);
    }
    // Whoever has not been told by then learns it from the silence.
    let _ = tokio::time::timeout(LINGER, join_all(endpoints.iter().map(Endpoint::wait_idle))).await;
}

/// quinn on certain threads, wherever it is called from.
#[derive(Debug)]
pub(crate) struct QuicOn(pub(crate) Handle);

impl quinn::Runtime for QuicOn {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _entered = self.0.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _entered = self.0.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use common::ids::Role;

    use crate::turn_end::{AtTurnEnd, at_turn_end};

    struct Bell(std::sync::mpsc::Sender<()>);

    impl AtTurnEnd for Bell {
        fn on_turn_end(&self) {
            let _ = self.0.send(());
        }
    }

    #[test]
    fn what_waits_for_the_end_of_a_turn_is_done_by_a_thread_that_has_nothing_to_do_and_by_one_that_always_has() {
        let threads = KvThreads::start(&Ledger::new(Role::PrefillNode, "turns")).unwrap();
        let (sender, heard) = std::sync::mpsc::channel();
        for is_busy in [false, true, false, true] {
            let bell = Arc::new(Bell(sender.clone()));
            let task = threads.handle().spawn(async move {
                at_turn_end(bell);
                if is_busy {
                    loop {
                        turns::give_way();
                        tokio::task::yield_now().await;
                    }
                }
                std::future::pending::<()>().await;
            });
            heard.recv_timeout(Duration::from_secs(30)).expect("a turn ends");
            task.abort();
        }
    }

    #[test]
    fn thread_for_blocking_work_puts_nothing_off() {
        let threads = KvThreads::start(&Ledger::new(Role::PrefillNode, "turns")).unwrap();
        let (sender, heard) = std::sync::mpsc::channel();
        let is_told = threads.handle().spawn_blocking(move || {
            at_turn_end(Arc::new(Bell(sender)));
            heard.try_recv().is_ok()
        });
        assert!(threads.handle().block_on(is_told).unwrap());
    }
}
