//! What this machine can do with the parts that a transfer is made of, and nothing of Tandem around them: the bounds
//! that its rows are held against.
//!
//! | row | what is in it | what is not |
//! |---|---|---|
//! | `copies` | the sender hashes where the bytes lie, the receiver copies and hashes, a notice for each extent | a pool, a header, a verdict, threads |
//! | `copies, awake` | the same with the smallest extents asked for, and neither end sleeps | |
//! | `UDP, AES` | both hash, AES-128-GCM, segmentation and receive offload, one system call for 64 KiB | loss, order, streams, congestion |
//! | `quinn alone` | one stream of a tuned connection, copied to where it belongs | digests, extents |
//!
//! One thread at each end. Everything comes out of memory as large as a request and goes into as much.

mod copies;
mod datagrams;
mod stream;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;

pub(super) use copies::Copies;
pub(super) use datagrams::Datagrams;
pub(super) use stream::Stream;

/// The first byte of a TCP connection: datagrams are asked for, of as many bytes, out of as many MiB, as the next two
/// numbers say.
pub(super) const DATAGRAMS: u8 = 3;
/// As [`DATAGRAMS`], over quinn.
pub(super) const STREAM: u8 = 4;

/// Bytes under one digest; what is asked for may end in fewer.
const EXTENT_BYTES: usize = 1 << 20;
/// Copied and hashed at a time.
const PIECE_BYTES: usize = 16 << 10;

/// Where the sender shows its copies; `dir` is known to both.
fn socket_in(dir: &Path, sender: u32) -> PathBuf {
    dir.join(format!("copies-{sender}"))
}

/// The same at both ends.
fn noise(mib: u32) -> Vec<u8> {
    let num_bytes = mib as usize * (1 << 20);
    let mut bytes = Vec::with_capacity(num_bytes);
    let mut state = 1u64;
    while bytes.len() < num_bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// Begins to ask for `kind` over `tcp`; both ends then say where their UDP port is.
fn ask_for(tcp: &mut TcpStream, kind: u8, datagram_bytes: u16, mib: u32) -> anyhow::Result<()> {
    tcp.write_all(&[kind]).context("say what is asked for")?;
    tcp.write_all(&u32::from(datagram_bytes).to_le_bytes()).context("say how large datagrams are")?;
    tcp.write_all(&mib.to_le_bytes()).context("say out of how much memory")
}

fn read_number(tcp: &mut TcpStream) -> anyhow::Result<u32> {
    let mut number = [0; 4];
    tcp.read_exact(&mut number).context("read a number")?;
    Ok(u32::from_le_bytes(number))
}

/// Tells the other end this one's port and hears its.
fn exchange_ports(tcp: &mut TcpStream, own: u16) -> anyhow::Result<u16> {
    tcp.write_all(&u32::from(own).to_le_bytes()).context("say which port")?;
    u16::try_from(read_number(tcp)?).context("the port of the other end")
}

/// Answers behind the first byte of a connection, until it ends. The certificate lies in `dir`.
pub(super) fn serve(kind: u8, mut tcp: TcpStream, dir: &Path) -> anyhow::Result<()> {
    let datagram_bytes = u16::try_from(read_number(&mut tcp)?).context("the size of datagrams")?;
    let mib = read_number(&mut tcp)?;
    match kind {
        DATAGRAMS => datagrams::serve(tcp, datagram_bytes, mib),
        _ => stream::serve(tcp, datagram_bytes, mib, dir),
    }
}

/// Shows copies to whoever connects in `dir`.
pub(super) fn serve_copies(dir: &Path, mib: u32) -> anyhow::Result<()> {
    let listener = UnixListener::bind(socket_in(dir, std::process::id())).context("listen for who copies")?;
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            // It ends with the one who asks.
            std::thread::spawn(move || {
                if let Err(error) = copies::serve(stream, mib) {
                    eprintln!("copies: {error:#}");
                }
            });
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::net::{Ipv4Addr, TcpListener};

    use crate::transfer::baseline::Asked;

    #[test]
    fn each_part_moves_what_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        serve_copies(dir.path(), 2).unwrap();
        for looks in [false, true] {
            let mut copies = Copies::connect(dir.path(), std::process::id(), 64 << 10, 2, looks).unwrap();
            for num_bytes in [64 << 10, 2 << 20] {
                copies.receive(num_bytes).unwrap();
            }
        }
        let ca = kv_connector::ClusterCa::generate().unwrap();
        let identity = ca.issue(common::ids::Role::PrefillNode, &common::ids::NodeId::new("sender").unwrap()).unwrap();
        identity.save(dir.path()).unwrap();
        std::fs::write(dir.path().join("ca.pem"), ca.certificate_pem()).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (addr, at) = (listener.local_addr().unwrap(), dir.path().to_path_buf());
        std::thread::spawn(move || {
            while let Ok((mut tcp, _)) = listener.accept() {
                let at = at.clone();
                std::thread::spawn(move || {
                    let mut kind = [0];
                    tcp.read_exact(&mut kind).unwrap();
                    serve(kind[0], tcp, &at)
                });
            }
        });
        for datagram_bytes in [1472, 8972, 65_507] {
            let mut datagrams = Datagrams::connect(addr, datagram_bytes, 2).unwrap();
            let mut stream = Stream::connect(addr, datagram_bytes, 2, dir.path()).unwrap();
            for num_bytes in [64 << 10, 2 << 20] {
                datagrams.receive(num_bytes).unwrap();
                stream.receive(num_bytes).unwrap();
            }
        }
    }
}
