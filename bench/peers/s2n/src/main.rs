//! One end of a transfer over s2n-quic, which `bench/peers/fabrics.py` starts; `fabric_end.py` says what both ends do.
//!
//! ```text
//! s2n-peer owner MIB MTU        s2n-peer reader MIB MTU
//! ```
//!
//! As `tandem bench transfer` moves KV: an extent is a unidirectional stream, 16 of them are on the way at once, both
//! windows are 16 MiB, and each end has one thread. What is sent is referred to and not copied. There is no digest.

use std::cell::RefCell;
use std::io::BufRead;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use s2n_quic::client::Connect;
use s2n_quic::provider::io;
use s2n_quic::provider::limits::Limits;
use s2n_quic::{Client, Connection, Server};
use serde_json::{Value, json};
use tokio::task::{JoinSet, LocalSet};

const WINDOW_BYTES: u64 = 16 << 20;
const NUM_EXTENTS_AT_ONCE: usize = 16;
const NAME: &str = "owner.test";
const LOOPBACK: &str = "127.0.0.1:0";

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().collect();
    let [_, role, mib, mtu] = &words[..] else { bail!("usage: s2n-peer owner|reader MIB MTU") };
    let (num_bytes, mtu) = (mib.parse::<usize>()? << 20, mtu.parse()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = LocalSet::new();
    match role.as_str() {
        "owner" => tasks.block_on(&runtime, owner(num_bytes, mtu)),
        "reader" => tasks.block_on(&runtime, reader(num_bytes, mtu)),
        other => bail!("{other} is neither owner nor reader"),
    }
}

fn limits() -> anyhow::Result<Limits> {
    Ok(Limits::new()
        .with_data_window(WINDOW_BYTES)?
        .with_unidirectional_data_window(WINDOW_BYTES)?
        .with_max_open_remote_unidirectional_streams(256)?
        .with_max_open_local_unidirectional_streams(256)?
        .with_max_send_buffer_size(WINDOW_BYTES as u32)?
        .with_max_idle_timeout(Duration::from_secs(3600))?)
}

fn socket(mtu: u16) -> anyhow::Result<io::tokio::Provider> {
    let address: SocketAddr = LOOPBACK.parse()?;
    let io = io::tokio::Builder::default().with_receive_address(address)?.with_max_mtu(mtu)?;
    Ok(io.with_recv_buffer_size(8 << 20)?.with_send_buffer_size(8 << 20)?.build()?)
}

/// The same at both ends.
fn noise(num_bytes: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut bytes = Vec::with_capacity(num_bytes);
    while bytes.len() < num_bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

fn say(line: &Value) {
    println!("{line}");
}

/// Sends to one reader, as it asks, until standard input ends.
async fn owner(num_bytes: usize, mtu: u16) -> anyhow::Result<()> {
    let certified = rcgen::generate_simple_self_signed(vec![NAME.to_string()])?;
    let (certificate, key) = (certified.cert.pem(), certified.signing_key.serialize_pem());
    let tls = (certificate.as_str(), key.as_str());
    let mut server = Server::builder().with_tls(tls)?.with_io(socket(mtu)?)?.with_limits(limits()?)?.start()?;
    say(&json!({"address": server.local_addr()?.to_string(), "certificate": certificate, "pid": std::process::id()}));
    let payload = Bytes::from(noise(num_bytes));
    let serving = async {
        let connection = server.accept().await.context("the reader did not come")?;
        serve(connection, &payload).await
    };
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().lines().count());
    tokio::select! {
        served = serving => served,
        _ = ended => Ok(()),
    }
}

async fn serve(mut connection: Connection, payload: &Bytes) -> anyhow::Result<()> {
    let mut questions = connection.accept_bidirectional_stream().await?.context("the reader asks for nothing")?;
    let handle = connection.handle();
    while let Some(question) = questions.receive().await? {
        let extent_bytes = u64::from_le_bytes(question[..].try_into().context("a question is 8 bytes")?) as usize;
        let mut sends = JoinSet::new();
        for first in (0..payload.len()).step_by(extent_bytes) {
            if sends.len() == NUM_EXTENTS_AT_ONCE {
                sends.join_next().await;
            }
            let extent = payload.slice(first..payload.len().min(first + extent_bytes));
            let mut handle = handle.clone();
            sends.spawn_local(async move {
                let mut stream = handle.open_send_stream().await?;
                stream.send(Bytes::copy_from_slice(&(first as u64).to_le_bytes())).await?;
                stream.send(extent).await?;
                stream.close().await
            });
        }
        while let Some(sent) = sends.join_next().await {
            sent??;
        }
    }
    Ok(())
}

/// Asks for everything at each line of standard input, and says how long it took.
async fn reader(num_bytes: usize, mtu: u16) -> anyhow::Result<()> {
    let mut lines = std::io::stdin().lock().lines();
    let owner: Value = serde_json::from_str(&lines.next().context("nobody says where the owner is")??)?;
    let text = |field: &str| owner[field].as_str().context("what the owner said");
    let client = Client::builder().with_tls(text("certificate")?)?.with_io(socket(mtu)?)?;
    let client = client.with_limits(limits()?)?.start()?;
    let address: SocketAddr = text("address")?.parse()?;
    let mut connection = client.connect(Connect::new(address).with_server_name(NAME)).await?;
    let mut questions = connection.open_bidirectional_stream().await?;
    let owner_pid = owner["pid"].as_u64().context("the owner's process")?;
    say(&json!({"is_ready": true}));

    let (expected, memory) = (noise(num_bytes), Rc::new(RefCell::new(vec![0; num_bytes])));
    for line in lines {
        let extent_bytes: usize = line?.trim().parse()?;
        memory.borrow_mut().fill(0);
        let cpu = (cpu_seconds(owner_pid)?, cpu_seconds(u64::from(std::process::id()))?);
        let started_at = Instant::now();
        questions.send(Bytes::copy_from_slice(&(extent_bytes as u64).to_le_bytes())).await?;
        let mut landings = JoinSet::new();
        for _ in 0..num_bytes.div_ceil(extent_bytes) {
            let stream = connection.accept_receive_stream().await?.context("the owner is gone")?;
            landings.spawn_local(land(stream, memory.clone()));
        }
        while let Some(landed) = landings.join_next().await {
            landed??;
        }
        let seconds = started_at.elapsed().as_secs_f64();
        let owner_cpu = cpu_seconds(owner_pid)? - cpu.0;
        let reader_cpu = cpu_seconds(u64::from(std::process::id()))? - cpu.1;
        ensure!(*memory.borrow() == expected, "other bytes arrived than were sent");
        say(&json!({"seconds": seconds, "owner_cpu_seconds": owner_cpu, "reader_cpu_seconds": reader_cpu}));
    }
    Ok(())
}

/// Copies an extent to where it belongs: its first 8 bytes say where.
async fn land(mut stream: s2n_quic::stream::ReceiveStream, memory: Rc<RefCell<Vec<u8>>>) -> anyhow::Result<()> {
    let (mut head, mut at) = (Vec::with_capacity(8), None);
    while let Some(mut chunk) = stream.receive().await? {
        if at.is_none() {
            let count = chunk.len().min(8 - head.len());
            head.extend_from_slice(&chunk.split_to(count));
            if let Ok(first) = <[u8; 8]>::try_from(&head[..]) {
                at = Some(u64::from_le_bytes(first) as usize);
            }
        }
        if let Some(first) = &mut at {
            let end = *first + chunk.len();
            memory.borrow_mut().get_mut(*first..end).context("an extent lies outside")?.copy_from_slice(&chunk);
            *first = end;
        }
    }
    Ok(())
}

/// Of all threads of a process.
fn cpu_seconds(pid: u64) -> anyhow::Result<f64> {
    let mut nanos = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let schedstat = std::fs::read_to_string(task?.path().join("schedstat"))?;
        nanos += schedstat.split_whitespace().next().context("schedstat has fields")?.parse::<u64>()?;
    }
    Ok(nanos as f64 / 1e9)
}
