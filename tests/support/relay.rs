//! A way to a server on loopback that lets so many bytes of its answers through, and the rest when it is opened.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

/// More than any test moves.
const OPEN_BYTES: usize = 1 << 40;
const PIECE_BYTES: usize = 1024;

/// Ends with the test, by its handle.
pub(crate) struct Relay {
    port: u16,
    /// Bytes that may still come from the server.
    left: Arc<Semaphore>,
    is_cut: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Relay {
    /// An open one.
    pub(crate) async fn to(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let left = Arc::new(Semaphore::new(OPEN_BYTES));
        let (is_cut, cut) = watch::channel(false);
        let allowed = left.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, server_port, allowed.clone(), cut.clone()));
            }
        });
        Self { port, left, is_cut, accepting }
    }

    /// Where it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// So many bytes more, then nothing.
    pub(crate) fn hold_after(&self, num_bytes: usize) {
        self.left.forget_permits(OPEN_BYTES);
        self.left.add_permits(num_bytes);
    }

    /// Ends every connection, with what it holds back, and takes no further one: as if the server's host was gone.
    #[allow(dead_code, reason = "each test file uses a part of it")]
    pub(crate) fn cut(&self) {
        self.accepting.abort();
        self.is_cut.send_replace(true);
    }

    /// Everything, from now on.
    pub(crate) fn open(&self) {
        self.left.add_permits(OPEN_BYTES - self.left.available_permits());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Until either end is gone.
async fn carry(client: TcpStream, server_port: u16, left: Arc<Semaphore>, mut cut: watch::Receiver<bool>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)).await else { return };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let answers = async {
        let mut piece = vec![0; PIECE_BYTES];
        while let Ok(num_bytes @ 1..) = from_server.read(&mut piece).await {
            left.acquire_many(num_bytes as u32).await.expect("nobody closes it").forget();
            if to_client.write_all(&piece[..num_bytes]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
        () = answers => {}
        _ = cut.wait_for(|is_cut| *is_cut) => {}
    }
}
