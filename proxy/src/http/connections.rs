//! A listener that accepts no more connections than it has places for, and the time in which a connection
//! must begin to speak.

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
}

impl<L> BoundedListener<L> {
    /// `num_max` connections of `inner` at a time; one that sends nothing for `greeting_timeout` is closed.
    pub fn new(inner: L, num_max: usize, greeting_timeout: Duration) -> Self {
        Self { inner, places: Arc::new(Semaphore::new(num_max)), greeting_timeout }
    }
}

impl<L: Listener> Listener for BoundedListener<L> {
    type Io = Placed<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let place = self.places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (io, addr) = self.inner.accept().await;
        let greeting = Some((Box::pin(tokio::time::sleep(self.greeting_timeout)), 0));
        (Placed { io, greeting, _place: place }, addr)
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
    _place: OwnedSemaphorePermit,
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
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
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

    #[tokio::test]
    async fn next_connection_waits_for_a_place() {
        let inner = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = inner.local_addr().unwrap();
        let mut listener = BoundedListener::new(inner, 1, Duration::from_secs(60));
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
        let mut listener = BoundedListener::new(inner, 1, Duration::from_millis(10));
        let (mut silent, _) = listener.accept().await;
        client.write_all(b"GET").await.unwrap();
        let mut read = Vec::new();
        assert_eq!(silent.read_to_end(&mut read).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(read, b"GET");
    }
}
