//! A listener that accepts no more connections than it has places for, and the time in which a connection
//! must begin to speak, and go on reading.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

/// Bytes after which the HTTP version is known, and the version's own time limits hold.
const GREETING_BYTES: usize = 24;

/// Accepts while it has places; without one, connections wait in the system's queue.
pub struct BoundedListener<L> {
    inner: L,
    places: Arc<Semaphore>,
    greeting_timeout: Duration,
    stall_timeout: Duration,
}

impl<L> BoundedListener<L> {
    /// `num_max` connections of `inner` at a time. One that sends nothing for `greeting_timeout` is closed,
    /// and so is one that takes nothing of what is written for `stall_timeout`.
    pub fn new(inner: L, num_max: usize, greeting_timeout: Duration, stall_timeout: Duration) -> Self {
        Self { inner, places: Arc::new(Semaphore::new(num_max)), greeting_timeout, stall_timeout }
    }
}

impl<L: Listener> Listener for BoundedListener<L> {
    type Io = Placed<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let place = self.places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (io, addr) = self.inner.accept().await;
        let greeting = Some((Box::pin(tokio::time::sleep(self.greeting_timeout)), 0));
        let stall = Stall { timeout: self.stall_timeout, until: None };
        (Placed { io, greeting, stall, _place: place }, addr)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}

/// A connection that gives its place back when it is dropped.
pub struct Placed<T> {
    io: T,
    /// Until [`GREETING_BYTES`] came: when they must have come, and how many have.
    greeting: Option<(Pin<Box<Sleep>>, usize)>,
    stall: Stall,
    _place: OwnedSemaphorePermit,
}

/// How long a client has taken nothing. Its kernel may acknowledge probes for ever, so the system would not
/// end such a connection.
struct Stall {
    timeout: Duration,
    /// Since a write was pending: when it must have gone on.
    until: Option<Pin<Box<Sleep>>>,
}

impl Stall {
    /// `polled` of a write, or an error if writes have been pending for too long.
    fn watch<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.until = None;
            return polled;
        }
        let timeout = self.timeout;
        let until = self.until.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        until.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Placed<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let num_before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if let Some((until, num_read)) = &mut self.greeting {
            *num_read += buf.filled().len() - num_before;
            if *num_read >= GREETING_BYTES {
                self.greeting = None;
            } else if polled.is_pending() && until.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Placed<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.stall.watch(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.stall.watch(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_connection_that_takes_nothing_is_closed() {
        let inner = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = inner.local_addr().unwrap();
        let mut listener = BoundedListener::new(inner, 1, LONG, Duration::from_millis(10));
        let mut client = TcpStream::connect(addr).await.unwrap();
        let (mut stalled, _) = listener.accept().await;
        let mut num_written = 0;
        let fill = async {
            loop {
                match stalled.write(&[0; 1 << 16]).await {
                    Ok(num_bytes) => num_written += num_bytes,
                    Err(error) => return error,
                }
            }
        };
        let error = tokio::time::timeout(LONG / 6, fill).await.expect("a write is pending for ever");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // What it took before is all there.
        drop(stalled);
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.unwrap();
        assert_eq!(read.len(), num_written);
    }

    #[tokio::test]
    async fn next_connection_waits_for_a_place() {
        let inner = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = inner.local_addr().unwrap();
        let mut listener = BoundedListener::new(inner, 1, LONG, LONG);
        let _clients = (TcpStream::connect(addr).await.unwrap(), TcpStream::connect(addr).await.unwrap());
        let (first, _) = listener.accept().await;
        let mut second = Box::pin(listener.accept());
        assert!(futures::poll!(second.as_mut()).is_pending());
        drop(first);
        second.await;
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_closed() {
        let inner = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let mut client = TcpStream::connect(inner.local_addr().unwrap()).await.unwrap();
        let mut listener = BoundedListener::new(inner, 1, Duration::from_millis(10), LONG);
        let (mut silent, _) = listener.accept().await;
        client.write_all(b"GET").await.unwrap();
        let mut read = Vec::new();
        assert_eq!(silent.read_to_end(&mut read).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(read, b"GET");
    }
}
