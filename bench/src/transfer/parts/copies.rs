//! What KV within one host takes at least: each end reads the bytes once, one of them writes them, and a notice goes
//! from one process to the other. Both fill their memory with the same, so that what the receiver copies is what the
//! sender hashes, without a mapping between them: the receiver reads from memory what `shm` may find in a cache that
//! the two cores share, so `shm` can be ahead of this where there is one.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use twox_hash::XxHash3_128;

use super::{PIECE_BYTES, noise, socket_in};
use crate::transfer::baseline::Asked;

/// Whoever looks, does so for this long before it sleeps.
const LOOKS: Duration = Duration::from_millis(2);

pub(in crate::transfer) struct Copies {
    socket: Looking,
    extent_bytes: usize,
    from: Vec<u8>,
    into: Vec<u8>,
}

/// A socket that is looked at without sleeping, if that is wanted.
struct Looking {
    stream: UnixStream,
    looks: bool,
}

impl Looking {
    fn new(stream: UnixStream, looks: bool) -> anyhow::Result<Self> {
        stream.set_nonblocking(looks).context("choose whether to sleep")?;
        Ok(Self { stream, looks })
    }

    /// All of `into`, which is sent at once.
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<()> {
        let began_at = Instant::now();
        while self.looks {
            match self.stream.read(into) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => return self.rest(&mut into[count..]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(_) if began_at.elapsed() > LOOKS => break,
                Err(_) => std::hint::spin_loop(),
            }
        }
        self.rest(into)
    }

    /// Sleeps where the other end is behind, also an end that looks.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if !self.looks {
            return self.stream.write_all(bytes);
        }
        self.stream.set_nonblocking(false)?;
        self.stream.write_all(bytes)?;
        self.stream.set_nonblocking(true)
    }

    fn rest(&mut self, into: &mut [u8]) -> std::io::Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        if !self.looks {
            return self.stream.read_exact(into);
        }
        self.stream.set_nonblocking(false)?;
        self.stream.read_exact(into)?;
        self.stream.set_nonblocking(true)
    }
}

impl Copies {
    pub(in crate::transfer) fn connect(
        dir: &Path,
        sender: u32,
        extent_bytes: usize,
        mib: u32,
        looks: bool,
    ) -> anyhow::Result<Self> {
        let mut stream = UnixStream::connect(socket_in(dir, sender)).context("connect to who shows copies")?;
        stream.write_all(&[u8::from(looks)]).context("say whether to sleep")?;
        let from = noise(mib);
        let into = vec![0; from.len()];
        Ok(Self { socket: Looking::new(stream, looks)?, extent_bytes, from, into })
    }
}

impl Asked for Copies {
    fn receive(&mut self, num_bytes: usize) -> anyhow::Result<Duration> {
        let started_at = Instant::now();
        let mut question = [0; 16];
        question[..8].copy_from_slice(&(num_bytes as u64).to_le_bytes());
        question[8..].copy_from_slice(&(self.extent_bytes as u64).to_le_bytes());
        self.socket.write(&question).context("ask for copies")?;
        let places = self.from[..num_bytes].chunks(self.extent_bytes);
        for (from, into) in places.zip(self.into.chunks_mut(self.extent_bytes)) {
            let mut digest = [0; 16];
            self.socket.read(&mut digest).context("hear of an extent")?;
            let mut hasher = XxHash3_128::new();
            for (from, into) in from.chunks(PIECE_BYTES).zip(into.chunks_mut(PIECE_BYTES)) {
                into.copy_from_slice(from);
                hasher.write(into);
            }
            ensure!(hasher.finish_128().to_le_bytes() == digest, "a copy is not what was hashed");
        }
        Ok(started_at.elapsed())
    }
}

/// Hashes what each question asks for, until the questions end.
pub(super) fn serve(mut stream: UnixStream, mib: u32) -> anyhow::Result<()> {
    let mut looks = [0];
    stream.read_exact(&mut looks).context("hear whether to sleep")?;
    let mut socket = Looking::new(stream, looks == [1])?;
    let pool = noise(mib);
    let mut question = [0; 16];
    while socket.read(&mut question).is_ok() {
        let [num_bytes, extent_bytes] =
            [0, 8].map(|at| u64::from_le_bytes(question[at..at + 8].try_into().expect("eight bytes")) as usize);
        for extent in pool.get(..num_bytes).context("more than there is")?.chunks(extent_bytes.max(1)) {
            let digest = XxHash3_128::oneshot(extent);
            socket.write(&digest.to_le_bytes()).context("tell of an extent")?;
        }
    }
    Ok(())
}
