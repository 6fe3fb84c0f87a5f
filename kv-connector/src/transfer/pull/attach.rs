//! How a receiver comes to read its sender's pool: both ends' part.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use common::device_pool::ExportedPool;
use quinn::{Connection, RecvStream, SendStream};
use tokio::time::Instant;

use super::{PulledPool, Puller};
/// Said by the receiver when it has opened the pool, and answered by the sender when it knows.
const ATTACHED: u8 = 1;
/// A sentence on the wire.
const SENTENCE_BYTES_MAX: usize = 512;
/// A sender waits so many times as long as a receiver, whose time began earlier and who alone can say that the pool is
/// open: it hears of every one that was opened in time.
const SENDER_PATIENCE: u32 = 2;

/// A pool that cannot be read here, which is no fault: KV comes over another transport.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("{0}")]
    Refused(String),
    #[error("the peer's pool cannot be opened: {0}")]
    Unopened(String),
    #[error("the peer did not answer within {0:?}")]
    Silent(Duration),
    #[error("the peer did not answer as this version does ({0})")]
    Broken(String),
    #[error("fetches out of the peer's pool have failed before in its present life")]
    HasFailed,
}

/// Names the running kernel: containers of one host have the same.
fn this_host() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok(id.to_be_bytes())
}

/// The receiver's part: asks for the peer's pool and opens it. Where it fails, the sender has not
/// heard that the pool is open, and never will.
pub(crate) async fn attach(
    connection: &Connection,
    puller: &Arc<Puller>,
    deadline: Duration,
) -> Result<Arc<dyn PulledPool>, AttachError> {
    let until = Instant::now() + deadline;
    let opened = tokio::time::timeout_at(until, open(connection, puller)).await;
    let (peer, mut answer) = opened.unwrap_or(Err(AttachError::Silent(deadline)))?;
    // Once the sender may have heard that the pool is open, it may send places instead of bytes: whatever becomes of the
    // answer, which only says that the first extent already comes this way, the pool stays open.
    if !matches!(tokio::time::timeout_at(until, answer.read_exact(&mut [0])).await, Ok(Ok(()))) {
        tracing::debug!("the peer did not say that it knows of the open pool");
    }
    Ok(peer)
}

/// Up to telling the sender that its pool is open: with it, the stream on which it answers. Dropped before, it has told
/// nothing.
async fn open(connection: &Connection, puller: &Arc<Puller>) -> Result<(Arc<dyn PulledPool>, RecvStream), AttachError> {
    let broken = |error: &dyn std::fmt::Display| AttachError::Broken(error.to_string());
    let (mut sender, mut receiver) = connection.open_bi().await.map_err(|error| broken(&error))?;
    let host = this_host().map_err(|error| AttachError::Refused(format!("this host has no name: {error}")))?;
    sender.write_all(&[&puller.method().question()[..], &host].concat()).await.map_err(|error| broken(&error))?;
    let mut head = [0; 11];
    receiver.read_exact(&mut head).await.map_err(|error| broken(&error))?;
    let [is_exported, size @ .., low, high] = head;
    let mut rest = vec![0; usize::from(u16::from_le_bytes([low, high]))];
    let is_exported = is_exported == 1;
    let num_bytes_max = if is_exported { puller.method().handle_bytes_max() } else { SENTENCE_BYTES_MAX };
    if rest.len() > num_bytes_max {
        return Err(broken(&format!("an answer of {} bytes", rest.len())));
    }
    receiver.read_exact(&mut rest).await.map_err(|error| broken(&error))?;
    if !is_exported {
        return Err(AttachError::Refused(String::from_utf8_lossy(&rest).into_owned()));
    }
    let exported = ExportedPool { handle: rest, num_bytes: u64::from_le_bytes(size) };
    let puller = puller.clone();
    let opened = tokio::task::spawn_blocking(move || puller.method().open_peer(&exported)).await;
    let opened = opened.map_err(|error| broken(&error))?.map_err(AttachError::Unopened)?;
    // Fails if the sender no longer listens: then it sends bytes.
    sender.write_all(&[ATTACHED]).await.map_err(|error| broken(&error))?;
    Ok((opened, receiver))
}

/// The sender's part: answers whoever is at the other end of a bulk connection, until that ends. `deadline` is a
/// receiver's.
pub(crate) async fn serve(
    connection: Connection,
    pullers: Vec<Arc<Puller>>,
    on_attached: impl Fn(&Arc<Puller>) + Send,
    deadline: Duration,
) {
    while let Ok((sender, receiver)) = connection.accept_bi().await {
        let answered = answer(sender, receiver, &pullers, &on_attached);
        match tokio::time::timeout(SENDER_PATIENCE * deadline, answered).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "whoever asked for the pool went away"),
            Err(_) => tracing::debug!("whoever asked for the pool fell silent"),
        }
    }
}

async fn answer(
    mut sender: SendStream,
    mut receiver: RecvStream,
    pullers: &[Arc<Puller>],
    on_attached: &(impl Fn(&Arc<Puller>) + Send),
) -> io::Result<()> {
    let mut asked = [0; 20];
    receiver.read_exact(&mut asked).await.map_err(io::Error::other)?;
    let puller = pullers.iter().find(|puller| asked[..4] == puller.method().question());
    let exported = match puller {
        None => Err("the peer does not offer it: its --kv-transports does not list it, its pool is in another kind of memory, it \
                     cannot, as its log says, or it is of another build"
            .to_string()),
        Some(puller) if puller.method().is_within_host() && asked[4..] != this_host()? => {
            Err("the peer is on another host".to_string())
        }
        Some(puller) => {
            let puller = puller.clone();
            let exported = tokio::task::spawn_blocking(move || puller.exported().cloned().map_err(String::clone)).await;
            exported.map_err(io::Error::other)?.map_err(|reason| format!("the peer cannot export its pool: {reason}"))
        }
    };
    let answer = match &exported {
        Ok(ExportedPool { handle, num_bytes }) => framed(1, *num_bytes, handle),
        Err(reason) => framed(0, 0, &reason.as_bytes()[..reason.len().min(SENTENCE_BYTES_MAX)]),
    };
    sender.write_all(&answer).await?;
    let mut attached = [0];
    if let Some(puller) = puller.filter(|_| exported.is_ok())
        && receiver.read_exact(&mut attached).await.is_ok()
        && attached == [ATTACHED]
    {
        on_attached(puller);
        sender.write_all(&[ATTACHED]).await?;
    }
    Ok(())
}

fn framed(is_exported: u8, num_bytes: u64, rest: &[u8]) -> Vec<u8> {
    let len = u16::try_from(rest.len()).expect("handles and sentences are short");
    [&[is_exported][..], &num_bytes.to_le_bytes(), &len.to_le_bytes(), rest].concat()
}
