//! The receiver's part: find the sender on this host, get its pool, map it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use common::wire::Registration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::memory::{MappedFile, own_user, receive_file};
use super::registrar::{ATTACHED, socket_name};
use crate::accounting::{Held, Kind, Ledger};

/// A peer's pool that can be read here.
pub(crate) struct Mapping {
    file: MappedFile,
    _held: Held,
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

impl Mapping {
    /// Gets and maps what `registration` announces.
    ///
    /// # Errors
    /// [`AttachError`].
    pub(crate) async fn attach(
        registration: &Registration,
        deadline: Duration,
        ledger: &Arc<Ledger>,
    ) -> Result<Self, AttachError> {
        let attached = tokio::time::timeout(deadline, attach(registration)).await;
        let file = attached.unwrap_or(Err(AttachError::Silent(deadline)))?;
        Ok(Self { file, _held: ledger.hold(Kind::Registration) })
    }

    pub(super) fn num_bytes(&self) -> u64 {
        self.file.len()
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        self.file.read(offset, into);
    }
}

async fn attach(registration: &Registration) -> Result<MappedFile, AttachError> {
    let connected = UnixStream::connect(socket_name(registration.socket)).await;
    let mut stream = connected.map_err(|_| AttachError::Elsewhere)?;
    let (theirs, ours) = (stream.peer_cred()?.uid(), own_user());
    if theirs != ours {
        return Err(AttachError::OtherUser { theirs, ours });
    }
    stream.write_all(&registration.token.to_le_bytes()).await?;
    let received = stream.async_io(Interest::READABLE, || receive_file(stream.as_fd())).await?;
    let file = MappedFile::new(&received, registration.num_bytes)?;
    stream.write_all(&[ATTACHED]).await?;
    // Behind the answer, the first extent already comes this way.
    let mut answer = [0];
    stream.read_exact(&mut answer).await?;
    Ok(file)
}
