//! The least that KV between hosts takes: read and hashed, encrypted, through two sockets, decrypted, written and
//! hashed. What is on the way is bounded by answers of the receiver; what is lost is an error.

use std::io::{IoSliceMut, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use twox_hash::XxHash3_128;

use super::{DATAGRAMS, EXTENT_BYTES, PIECE_BYTES, ask_for, exchange_ports, noise};
use crate::transfer::baseline::Asked;

/// Of a datagram, in front: its number, and the digest of its extent.
const HEAD_BYTES: usize = 8 + 16;
const TAG_BYTES: usize = 16;
/// Most bytes of one send.
const SEND_BYTES_MAX: usize = 65_507;
/// Most datagrams of one send.
const NUM_SEGMENTS_MAX: usize = 64;
/// On the way, in payload.
const WINDOW_BYTES: usize = 1 << 20;
/// Answered at a time.
const ANSWERED_BYTES: usize = WINDOW_BYTES / 4;
const SOCKET_BYTES: usize = 8 << 20;
/// What does not come until then was lost.
const PATIENCE: Duration = Duration::from_secs(5);

/// One end.
struct End {
    socket: UdpSocket,
    state: UdpSocketState,
    key: LessSafeKey,
    /// Of the next datagram.
    number: u64,
}

impl End {
    fn bind(ip: IpAddr) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((ip, 0)).context("bind a UDP socket")?;
        let state = UdpSocketState::new((&socket).into()).context("prepare a UDP socket")?;
        // Less than asked for is slower, not wrong.
        let _ = state.set_recv_buffer_size((&socket).into(), SOCKET_BYTES);
        let _ = state.set_send_buffer_size((&socket).into(), SOCKET_BYTES);
        socket.set_nonblocking(false).context("have a UDP socket sleep")?;
        socket.set_read_timeout(Some(PATIENCE)).context("bound the wait of a UDP socket")?;
        let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).ok().context("make a key")?;
        Ok(Self { socket, state, key: LessSafeKey::new(key), number: 0 })
    }

    fn nonce(number: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&number.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    /// Puts a datagram behind those in `sealed`.
    fn seal(&mut self, digest: u128, payload: &[u8], sealed: &mut Vec<u8>) -> anyhow::Result<()> {
        let at = sealed.len();
        sealed.extend_from_slice(&self.number.to_le_bytes());
        sealed.extend_from_slice(&digest.to_le_bytes());
        sealed.extend_from_slice(payload);
        let (head, payload) = sealed[at..].split_at_mut(HEAD_BYTES);
        let tag = self.key.seal_in_place_separate_tag(Self::nonce(self.number), Aad::from(&*head), payload);
        sealed.extend_from_slice(tag.ok().context("encrypt")?.as_ref());
        self.number += 1;
        Ok(())
    }

    /// The digest of a datagram's extent, and its payload.
    fn open<'a>(&mut self, datagram: &'a mut [u8]) -> anyhow::Result<(u128, &'a [u8])> {
        ensure!(datagram.len() > HEAD_BYTES + TAG_BYTES, "a datagram that is too short");
        let (head, sealed) = datagram.split_at_mut(HEAD_BYTES);
        let (number, digest) = head.split_at(8);
        let number = u64::from_le_bytes(number.try_into().context("a number has eight bytes")?);
        let digest = u128::from_le_bytes(digest.try_into().context("a digest has sixteen bytes")?);
        ensure!(number == self.number, "datagram {} was lost: {number} came", self.number);
        self.number += 1;
        let payload = self.key.open_in_place(Self::nonce(number), Aad::from(&*head), sealed);
        Ok((digest, payload.ok().context("decrypt")?))
    }
}

pub(in crate::transfer) struct Datagrams {
    end: End,
    peer: SocketAddr,
    tcp: TcpStream,
    into: Vec<u8>,
}

impl Datagrams {
    pub(in crate::transfer) fn connect(addr: SocketAddr, datagram_bytes: u16, mib: u32) -> anyhow::Result<Self> {
        let mut tcp = TcpStream::connect(addr).context("connect to who sends datagrams")?;
        tcp.set_nodelay(true).context("turn Nagle's algorithm off")?;
        ask_for(&mut tcp, DATAGRAMS, datagram_bytes, mib)?;
        let end = End::bind(tcp.local_addr()?.ip())?;
        let port = exchange_ports(&mut tcp, end.socket.local_addr()?.port())?;
        let peer = SocketAddr::new(addr.ip(), port);
        Ok(Self { end, peer, tcp, into: vec![0; mib as usize * (1 << 20)] })
    }
}

impl Asked for Datagrams {
    fn receive(&mut self, num_bytes: usize) -> anyhow::Result<Duration> {
        let Self { end, peer, tcp, into } = self;
        let started_at = Instant::now();
        tcp.write_all(&(num_bytes as u64).to_le_bytes()).context("ask for datagrams")?;
        let mut buffer = vec![0; 1 << 16];
        let (mut at, mut num_answered) = (0, 0);
        let mut hasher = XxHash3_128::new();
        while at < num_bytes {
            let mut meta = [RecvMeta::default()];
            let received = end.state.recv((&end.socket).into(), &mut [IoSliceMut::new(&mut buffer)], &mut meta);
            received.context("wait for a datagram")?;
            let [RecvMeta { len, stride, .. }] = meta;
            for datagram in buffer[..len].chunks_mut(stride.max(1)) {
                let (digest, payload) = end.open(datagram)?;
                let Some(place) = into.get_mut(at..at + payload.len()) else { bail!("more came than was asked for") };
                for (into, from) in place.chunks_mut(PIECE_BYTES).zip(payload.chunks(PIECE_BYTES)) {
                    into.copy_from_slice(from);
                    hasher.write(into);
                }
                at += payload.len();
                if at.is_multiple_of(EXTENT_BYTES) || at == num_bytes {
                    ensure!(hasher.finish_128() == digest, "what came is not what was hashed");
                    hasher = XxHash3_128::new();
                }
            }
            while num_answered < at / ANSWERED_BYTES {
                end.socket.send_to(&[1], *peer).context("answer")?;
                num_answered += 1;
            }
        }
        Ok(started_at.elapsed())
    }
}

/// Sends as many bytes as each 8-byte question asks for, until the questions end.
pub(super) fn serve(mut tcp: TcpStream, datagram_bytes: u16, mib: u32) -> anyhow::Result<()> {
    let mut end = End::bind(tcp.local_addr()?.ip())?;
    let port = exchange_ports(&mut tcp, end.socket.local_addr()?.port())?;
    let destination = SocketAddr::new(tcp.peer_addr()?.ip(), port);
    let pool = noise(mib);
    let mut question = [0; 8];
    while tcp.read_exact(&mut question).is_ok() {
        let asked = pool.get(..u64::from_le_bytes(question) as usize).context("more than there is")?;
        send(&mut end, destination, usize::from(datagram_bytes), asked)?;
    }
    Ok(())
}

fn send(end: &mut End, destination: SocketAddr, datagram_bytes: usize, asked: &[u8]) -> anyhow::Result<()> {
    let payload_bytes = datagram_bytes - HEAD_BYTES - TAG_BYTES;
    let num_segments = (SEND_BYTES_MAX / datagram_bytes).min(NUM_SEGMENTS_MAX);
    let mut sealed = Vec::with_capacity(1 << 16);
    let (mut num_sent, mut num_answered) = (0, 0);
    for extent in asked.chunks(EXTENT_BYTES) {
        let digest = XxHash3_128::oneshot(extent);
        for batch in extent.chunks(num_segments * payload_bytes) {
            sealed.clear();
            for payload in batch.chunks(payload_bytes) {
                end.seal(digest, payload, &mut sealed)?;
            }
            let segment_size = (sealed.len() > datagram_bytes).then_some(datagram_bytes);
            let transmit = Transmit { destination, ecn: None, contents: &sealed, segment_size, src_ip: None };
            end.state.try_send((&end.socket).into(), &transmit).context("send datagrams")?;
            num_sent += batch.len();
            while num_sent > num_answered * ANSWERED_BYTES + WINDOW_BYTES {
                end.socket.recv(&mut [0]).context("wait for an answer")?;
                num_answered += 1;
            }
        }
    }
    while num_answered < num_sent / ANSWERED_BYTES {
        end.socket.recv(&mut [0]).context("wait for the last answers")?;
        num_answered += 1;
    }
    Ok(())
}
