//! What a transfer is held against: blocking TCP between the same two processes, and a copy within one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context;

/// One blocking TCP connection over loopback, without encryption or digest.
pub(super) struct Tcp {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Tcp {
    pub(super) fn connect(addr: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(addr).context("connect for the TCP baseline")?;
        stream.set_nodelay(true).context("turn Nagle's algorithm off")?;
        Ok(Self { stream, buffer: vec![0; 1 << 20] })
    }

    /// Asks for `num_bytes` and reads them, over and over into the same 1 MiB.
    pub(super) fn receive(&mut self, num_bytes: usize) -> anyhow::Result<Duration> {
        let started_at = Instant::now();
        self.stream.write_all(&(num_bytes as u64).to_le_bytes()).context("ask for bytes over TCP")?;
        let mut left = num_bytes;
        while left > 0 {
            let count = left.min(self.buffer.len());
            self.stream.read_exact(&mut self.buffer[..count]).context("read over TCP")?;
            left -= count;
        }
        Ok(started_at.elapsed())
    }
}

/// A plain copy of `num_bytes` on one thread, from memory that is larger than the caches.
pub(super) struct Memcpy {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Memcpy {
    pub(super) fn new(num_bytes: usize) -> Self {
        Self { from: vec![0xa5; num_bytes], into: vec![0; num_bytes] }
    }

    pub(super) fn copy(&mut self) -> Duration {
        let started_at = Instant::now();
        self.into.copy_from_slice(&self.from);
        std::hint::black_box(&self.into);
        started_at.elapsed()
    }
}
