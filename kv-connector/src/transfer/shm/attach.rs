//! The receiver's part: find the sender on this host, get its pool, map it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use common::wire::Registration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::mailbox::ATTACHED;
use super::memory::{MappedFile, own_user, receive_file};
use super::registrar::socket_name;
use crate::accounting::{Held, Kind, Ledger};

/// A peer's pool that can be read here.
pub(crate) struct Mapping {
    file: MappedFile,
    _held: Held,
}

/// A mapped pool, and the socket over which its owner says where extents lie in it.
pub(crate) struct Attached {
    pub(super) mapping: Mapping,
    pub(super) stream: UnixStream,
    /// What has come over it: the sender's word that it knows of the mapping, or nothing yet.
    pub(super) received: BytesMut,
}

/// A pool that cannot be read here, which is no fault: KV comes over quic.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("the peer is not on this host, or in another network namespace")]
    Elsewhere,
    #[error("the peer is user {theirs} on this host, this node is user {ours}")]
    OtherUser { theirs: u32, ours: u32 },
    #[error("the peer did not answer within {0:?}")]
    Silent(Duration),
    #[error("the peer's memory cannot be had: {0}")]
    Failed(#[from] io::Error),
}

impl Attached {
    /// Gets and maps what `registration` announces.
    ///
    /// # Errors
    /// [`AttachError`].
    pub(crate) async fn attach(
        registration: &Registration,
        deadline: Duration,
        ledger: &Arc<Ledger>,
    ) -> Result<Self, AttachError> {
        let until = Instant::now() + deadline;
        let mapped = tokio::time::timeout_at(until, map(registration)).await;
        let (file, mut stream) = mapped.unwrap_or(Err(AttachError::Silent(deadline)))?;
        // Once the sender may have heard this, it may send places instead of bytes: whatever becomes of the
        // answer, which only says that the first extent already comes this way, the mapping stays.
        let mut received = BytesMut::new();
        match tokio::time::timeout_at(until, agree(&mut stream)).await {
            Ok(Ok(word)) => received.extend_from_slice(&[word]),
            _ => tracing::debug!("the peer did not say that it knows of the mapping"),
        }
        let mapping = Mapping { file, _held: ledger.hold(Kind::Registration) };
        Ok(Self { mapping, stream, received })
    }
}

impl Mapping {
    pub(super) fn num_bytes(&self) -> u64 {
        self.file.len()
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        self.file.read(offset, into);
    }
}

async fn map(registration: &Registration) -> Result<(MappedFile, UnixStream), AttachError> {
    let connected = UnixStream::connect(socket_name(registration.socket)).await;
    let mut stream = connected.map_err(|_| AttachError::Elsewhere)?;
    let (theirs, ours) = (stream.peer_cred()?.uid(), own_user());
    if theirs != ours {
        return Err(AttachError::OtherUser { theirs, ours });
    }
    stream.write_all(&registration.token.to_le_bytes()).await?;
    let received = stream.async_io(Interest::READABLE, || receive_file(stream.as_fd())).await?;
    let file = MappedFile::new(&received, registration.num_bytes)?;
    Ok((file, stream))
}

async fn agree(stream: &mut UnixStream) -> io::Result<u8> {
    stream.write_all(&[ATTACHED]).await?;
    stream.read_u8().await
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::File;

    use common::ids::Role;
    use tokio::net::UnixListener;

    use crate::test_support::other_user::as_other_user;
    use crate::tls;
    use crate::transfer::shm::memory::{sealed_file, send_file};

    const DEADLINE: Duration = Duration::from_millis(200);

    /// What becomes of an attachment whose sender sends `file`, if there is one, and then `answers` or is gone.
    async fn attached(file: Option<File>, num_bytes: u64, answers: bool) -> Result<Attached, AttachError> {
        let registration = Registration { socket: tls::random(), token: 5, num_bytes };
        let listener = UnixListener::bind(socket_name(registration.socket)).unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_eq!(stream.read_u128_le().await.unwrap(), 5);
            match file {
                Some(file) => send_file(stream.as_fd(), file.as_fd()).unwrap(),
                None => stream.write_all(&[0; 4]).await.unwrap(),
            }
            if answers && stream.read_u8().await.is_ok() {
                stream.write_all(&[ATTACHED]).await.unwrap();
            }
        });
        let ledger = Ledger::new(Role::DecodeNode, "d0");
        let attached = Attached::attach(&registration, DEADLINE, &ledger).await;
        serving.await.unwrap();
        assert_eq!(ledger.snapshot().registrations, usize::from(attached.is_ok()));
        attached
    }

    #[tokio::test]
    async fn mapping_stays_once_the_sender_may_know_of_it() {
        for answers in [true, false] {
            let attached = attached(Some(sealed_file(8192, libc::F_SEAL_SHRINK)), 8192, answers).await.unwrap();
            let mapping = &attached.mapping;
            assert_eq!(mapping.num_bytes(), 8192);
            let mut bytes = [1; 16];
            mapping.read(8176, &mut bytes);
            assert_eq!(bytes, [0; 16]);
        }
    }

    #[tokio::test]
    async fn only_sealed_memory_of_the_announced_size_is_mapped() {
        let cases = [
            (None, 8192),
            (Some(sealed_file(8192, libc::F_SEAL_GROW)), 8192),
            (Some(sealed_file(8192, libc::F_SEAL_SHRINK)), 8193),
            (Some(sealed_file(8192, libc::F_SEAL_SHRINK)), 4096),
            (Some(sealed_file(0, libc::F_SEAL_SHRINK)), 0),
            (Some(File::open("/proc/self/exe").unwrap()), 4096),
            (Some(File::open("/dev/zero").unwrap()), 4096),
        ];
        for (index, (file, num_bytes)) in cases.into_iter().enumerate() {
            assert!(matches!(attached(file, num_bytes, true).await, Err(AttachError::Failed(_))), "case {index}");
        }
    }

    /// Its memory would be in the hands of whoever took the name of the sender's socket first.
    #[tokio::test]
    async fn memory_of_another_user_is_not_taken() {
        let registration = Registration { socket: tls::random(), token: 5, num_bytes: 8192 };
        let name = socket_name(registration.socket);
        // Who listens is who called `listen`.
        let Some(listener) = as_other_user(move || {
            use std::os::linux::net::SocketAddrExt as _;
            use std::os::unix::net::{SocketAddr, UnixListener};
            let addr = SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
            let listener = UnixListener::bind_addr(&addr).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        }) else {
            println!("SKIPPED: to be another user, this test must be run as root");
            return;
        };
        let listener = UnixListener::from_std(listener).unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            // All that would be needed, unless the other end has gone by then.
            let _ = send_file(stream.as_fd(), sealed_file(8192, libc::F_SEAL_SHRINK).as_fd());
            let _ = stream.write_all(&[ATTACHED]).await;
            let mut told = Vec::new();
            let _ = stream.read_to_end(&mut told).await;
            told
        });
        let ledger = Ledger::new(Role::DecodeNode, "d0");
        let attached = Attached::attach(&registration, Duration::from_secs(30), &ledger).await;
        let ours = own_user();
        assert!(
            matches!(attached, Err(AttachError::OtherUser { theirs: 65_534, ours: found }) if found == ours),
            "{:?}",
            attached.err()
        );
        assert_eq!(serving.await.unwrap(), [0; 0], "it was told a secret");
    }

    #[tokio::test]
    async fn silence_is_given_up_at_the_deadline() {
        let registration = Registration { socket: tls::random(), token: 5, num_bytes: 4096 };
        let ledger = Ledger::new(Role::DecodeNode, "d0");
        let elsewhere = Attached::attach(&registration, DEADLINE, &ledger).await;
        assert!(matches!(elsewhere, Err(AttachError::Elsewhere)));
        let _listener = UnixListener::bind(socket_name(registration.socket)).unwrap();
        let silent = Attached::attach(&registration, DEADLINE, &ledger).await;
        assert!(matches!(silent, Err(AttachError::Silent(DEADLINE))));
    }
}
