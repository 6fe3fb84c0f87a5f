//! The sender's part: registrations of its pool, and the socket where who shows one gets it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::kv_memory::KvMemory;
use common::wire::Registration;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::mailbox::ATTACHED;
use super::memory::{own_user, send_file};
use crate::accounting::{Held, Kind, Ledger};
use crate::busy_poll::Activity;
use crate::tls;
use crate::transfer::bulk::PeerTransport;

/// Attachments in progress; one more is refused, and its receiver stays with quic.
const NUM_ATTACHING_MAX: usize = 64;
/// Rest before the next try, when the system has no descriptor left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A pool that peers on the same host may read.
#[derive(Clone)]
pub struct SharedPool {
    /// The pool.
    pub memory: Arc<dyn KvMemory>,
    /// A memory file, sealed against shrinking, that holds the pool's bytes: what
    /// [`KvMemory::visit_granules`] shows at an offset is what the file has there.
    pub file: Arc<OwnedFd>,
    /// Its size.
    pub num_bytes: u64,
}

/// Hands a pool to those whom bulk connections told of it.
pub(crate) struct Registrar {
    pool: SharedPool,
    socket: u128,
    /// By token; gone once it was shown, or its connection has ended.
    open: Mutex<HashMap<u128, Arc<PeerTransport>>>,
    ledger: Arc<Ledger>,
    activity: Option<Arc<Activity>>,
    closing: CancellationToken,
}

/// A registration that is valid until this is dropped.
pub(crate) struct OpenRegistration {
    registrar: Arc<Registrar>,
    token: u128,
    _held: Held,
}

/// The socket's address in the abstract namespace, which is a network namespace's own and leaves nothing
/// behind. A peer names a number, so that it can have nobody connect to any other socket. The rest of the name stands
/// for what is said over the socket: an end that says it in another way finds nobody there, and stays with quic.
pub(super) fn socket_name(socket: u128) -> String {
    format!("\0tandem-kv-mailbox-{socket:032x}")
}

/// Why a descriptor was not handed out, as a label of `tandem_refused_connections_total`.
enum RefusedAttach {
    OtherUser,
    UnknownToken,
    Broken(io::Error),
}

impl From<io::Error> for RefusedAttach {
    fn from(error: io::Error) -> Self {
        RefusedAttach::Broken(error)
    }
}

impl Registrar {
    /// Binds the socket; [`serve`](Self::serve) answers on it.
    pub(crate) fn bind(
        pool: SharedPool,
        ledger: Arc<Ledger>,
        activity: Option<Arc<Activity>>,
    ) -> io::Result<(Arc<Self>, UnixListener)> {
        let socket = tls::random();
        let listener = UnixListener::bind(socket_name(socket))?;
        let (open, closing) = (Mutex::default(), CancellationToken::new());
        let registrar = Self { pool, socket, open, ledger, activity, closing };
        Ok((Arc::new(registrar), listener))
    }

    pub(crate) fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.pool.memory
    }

    /// A registration for one bulk connection.
    pub(crate) fn register(self: &Arc<Self>, transport: Arc<PeerTransport>) -> (Registration, OpenRegistration) {
        let token = tls::random();
        self.open().insert(token, transport);
        let open = OpenRegistration { registrar: self.clone(), token, _held: self.ledger.hold(Kind::Registration) };
        (Registration { socket: self.socket, token, num_bytes: self.pool.num_bytes }, open)
    }

    /// Hands the pool out until [`close`](Self::close).
    pub(crate) async fn serve(self: Arc<Self>, listener: UnixListener, deadline: Duration, tasks: TaskTracker) {
        let places = Arc::new(Semaphore::new(NUM_ATTACHING_MAX));
        while let Some(accepted) = self.closing.run_until_cancelled(listener.accept()).await {
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept whoever asks for shared memory");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                self.ledger.count_refused_connection("shm_too_many");
                continue;
            };
            let (registrar, hearing) = (self.clone(), tasks.clone());
            tasks.spawn(async move {
                let handing = tokio::time::timeout(deadline, registrar.hand_out(stream, &hearing));
                let refused = match registrar.closing.run_until_cancelled(handing).await {
                    Some(Ok(Err(RefusedAttach::OtherUser))) => Some("shm_user"),
                    Some(Ok(Err(RefusedAttach::UnknownToken))) => Some("shm_token"),
                    Some(Ok(Err(RefusedAttach::Broken(error)))) => {
                        tracing::debug!(%error, "whoever asked for shared memory went away");
                        Some("shm_broken")
                    }
                    Some(Err(_)) => Some("shm_stalled"),
                    Some(Ok(Ok(()))) | None => None,
                };
                if let Some(reason) = refused {
                    registrar.ledger.count_refused_connection(reason);
                }
                drop(place);
            });
        }
    }

    /// No more is handed out.
    pub(crate) fn close(&self) {
        self.closing.cancel();
    }

    async fn hand_out(&self, mut stream: UnixStream, tasks: &TaskTracker) -> Result<(), RefusedAttach> {
        let user = stream.peer_cred()?.uid();
        if user != own_user() {
            tracing::warn!(user, "refused shared memory to another user of this host");
            return Err(RefusedAttach::OtherUser);
        }
        let mut token = [0; 16];
        stream.read_exact(&mut token).await?;
        let registered = self.open().remove(&u128::from_le_bytes(token));
        let transport = registered.ok_or(RefusedAttach::UnknownToken)?;
        let file = self.pool.file.as_fd();
        stream.async_io(Interest::WRITABLE, || send_file(stream.as_fd(), file)).await?;
        let mut answer = [0];
        stream.read_exact(&mut answer).await?;
        if answer != [ATTACHED] {
            return Err(io::Error::other("it does not say that the pool is mapped").into());
        }
        // From here on extents go this way: whoever hears the word below finds it so.
        let outbox = transport.on_attached(stream, self.activity.as_ref());
        outbox.say_attached();
        tasks.spawn(outbox.run());
        Ok(())
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u128, Arc<PeerTransport>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OpenRegistration {
    fn drop(&mut self) {
        self.registrar.open().remove(&self.token);
    }
}
