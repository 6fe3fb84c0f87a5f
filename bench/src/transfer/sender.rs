//! The prefill node's part: a pool full of noise, sent to whoever asks.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use common::ids::{BlockId, Role};
use common::kv_memory::KvMemory;
use common::wire::{Open, Prefill, PrefillEvent};
use engine::pool::{KvPool, PoolMemory};
use kv_connector::certs::Identity;
use kv_connector::transfer::{BulkSender, ExtentRequest, ExtentSends, ExtentSource, SharedPool};
use kv_connector::{Fabric, FabricConfig, IncomingStream};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::{TransferSenderArgs, baseline, link, node, parts};
use crate::kv_workload as workload;

/// Says where it listens (one line: fabric, TCP), then serves until standard input ends. Of each request it says when it
/// turned to the first extent: nanoseconds of the system's clock.
pub(super) async fn serve(args: &TransferSenderArgs) -> anyhow::Result<()> {
    let identity = Identity::load_from_dir(&args.identity, &node("sender"))?;
    let listen = SocketAddr::from((args.address, 0));
    let hello = workload::hello(node("sender"), Role::PrefillNode, args.num_tokens);
    let memory = if args.is_shared { PoolMemory::Shareable } else { PoolMemory::Private };
    let num_blocks = workload::num_blocks(args.num_tokens);
    let pool = Arc::new(KvPool::with_memory(
        &workload::kv_spec(workload::NUM_LAYERS),
        workload::BLOCK_SIZE,
        num_blocks,
        memory,
    )?);
    fill(&pool, args.num_tokens);
    let mut config = FabricConfig::new(listen, identity, hello);
    config.bulk_listen = Some(listen);
    config.set_kv_quic(&args.kv_quic);
    if args.address == link::SENDER {
        link::be_patient(&mut config);
    }
    config.busy_polling = super::busy_polling(args.busy_poll);
    if let Some((file, num_bytes)) = pool.shared_file() {
        let file = Arc::new(file.try_clone_to_owned().context("duplicate the pool's descriptor")?);
        config.shared_pool = Some(SharedPool { memory: pool.clone(), file, num_bytes: num_bytes as u64 });
    }
    let fabric = Fabric::bind(config)?;
    let tcp = TcpListener::bind(listen).context("listen for the TCP baseline")?;
    println!("{} {}", fabric.local_addr(), tcp.local_addr().context("ask for the TCP port")?);
    std::io::stdout().flush().context("tell the receiver")?;
    let (tls, dir) = (baseline::tls_server(&args.identity)?, args.identity.clone());
    std::thread::spawn(move || serve_tcp(&tcp, &tls, &dir));
    parts::serve_copies(&args.identity, workload::request_mib(args.num_tokens))?;

    let ended = tokio::task::spawn_blocking(|| {
        // Until the other end of the pipe is gone.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
    });
    tokio::pin!(ended);
    // Copied for each request: one of few tokens is not to pay for many.
    let chains = [args.extent_tokens, args.num_tokens].map(|num_tokens| {
        let chain = workload::chain(&workload::tokens(num_tokens));
        (num_tokens, chain, Arc::<[BlockId]>::from(workload::blocks(num_tokens)))
    });
    loop {
        let stream = tokio::select! {
            _ = &mut ended => break,
            stream = fabric.accept() => stream,
        };
        let Some(IncomingStream { peer, open, mut sender, .. }) = stream else { break };
        let Open::Prefill(prefill) = open else { continue };
        let bulk = fabric.bulk_to(&peer.node, peer.epoch).context("the receiver has no bulk connection")?;
        let Prefill { request, attempt, generation, .. } = *prefill;
        let known = chains.iter().find(|(num_tokens, ..)| *num_tokens == prefill.tokens.0.len());
        let (_, chain, blocks) = known.context("the receiver asks for tokens that were not agreed on")?;
        let source = ExtentSource {
            memory: pool.clone(),
            kv_spec: workload::kv_spec(workload::NUM_LAYERS),
            blocks: blocks.clone(),
            chain: chain.clone(),
            request: ExtentRequest { epoch: peer.epoch, request, attempt, generation },
        };
        let (extent_tokens, window) = (args.extent_tokens, args.window);
        // The next request does not wait for the last acknowledgements of this one.
        tokio::spawn(async move {
            let (num_extents, num_bytes) = send_all(extent_tokens, window, &source, &bulk, &prefill).await;
            // A receiver that has gone has nobody to be told.
            if sender.send(&PrefillEvent::Sent { num_extents, num_bytes }).await.is_ok() {
                sender.finish();
            }
        });
    }
    fabric.close().await;
    Ok(())
}

/// Layer by layer as far as the credit goes, `window` extents at a time. What is refused or lost the receiver notices.
async fn send_all(
    extent_tokens: usize,
    window: usize,
    source: &ExtentSource,
    bulk: &BulkSender,
    prefill: &Prefill,
) -> (u32, u64) {
    let tokens = &prefill.tokens.0;
    let mut sends = ExtentSends::default();
    let (mut num_extents, mut num_bytes_sent) = (0, 0);
    let began_at = SystemTime::now();
    for layer in 0..workload::NUM_LAYERS {
        for first in (0..tokens.len()).step_by(extent_tokens) {
            let end = tokens.len().min(first + extent_tokens);
            for (extent, num_bytes) in source.extents(layer, first, end) {
                if num_bytes_sent + num_bytes > prefill.credit_bytes {
                    break;
                }
                if sends.len() == window {
                    sends.next_ended().await;
                }
                bulk.begin(&mut sends, source.unsealed(tokens, extent));
                if num_extents == 0 {
                    let since = began_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                    println!("{}", since.as_nanos());
                }
                num_extents += 1;
                num_bytes_sent += num_bytes;
            }
        }
    }
    while sends.next_ended().await.is_some() {}
    (num_extents, num_bytes_sent)
}

/// Noise: pages that exist, and nothing that compresses.
fn fill(pool: &KvPool, num_tokens: usize) {
    let blocks = workload::blocks(num_tokens);
    let mut noise = vec![0; pool.extent_bytes(workload::BLOCK_SIZE / 16)];
    let mut state = 1u64;
    for layer in 0..workload::NUM_LAYERS {
        for block in &blocks {
            for chunk in noise.chunks_exact_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                chunk.copy_from_slice(&state.to_le_bytes());
            }
            KvMemory::write_at(pool, layer, std::slice::from_ref(block), 0, 0, &noise);
        }
    }
}

/// Serves the baselines: connections that say first what they are.
fn serve_tcp(listener: &TcpListener, tls: &Arc<ServerConfig>, dir: &Path) {
    while let Ok((mut stream, _)) = listener.accept() {
        let (tls, dir) = (tls.clone(), dir.to_path_buf());
        std::thread::spawn(move || {
            let mut kind = [0];
            if stream.read_exact(&mut kind).is_err() {
                return;
            }
            match (kind, ServerConnection::new(tls)) {
                ([baseline::TLS], Ok(connection)) => answer(&mut StreamOwned::new(connection, stream), 1),
                ([baseline::BETWEEN_POOLS], _) => {
                    let mut mib = [0; 4];
                    if stream.read_exact(&mut mib).is_ok() {
                        answer(&mut stream, u32::from_le_bytes(mib));
                    }
                }
                ([kind @ (parts::DATAGRAMS | parts::STREAM)], _) => {
                    if let Err(error) = parts::serve(kind, stream, &dir) {
                        eprintln!("a baseline ended: {error:#}");
                    }
                }
                _ => answer(&mut stream, 1),
            }
        });
    }
}

/// Sends as many bytes as each 8-byte question asks for, out of `mib` MiB, over and over.
fn answer(stream: &mut (impl Read + Write), mib: u32) {
    let buffer = vec![0x5a; mib as usize * baseline::PIECE_BYTES];
    let mut question = [0; 8];
    while stream.read_exact(&mut question).is_ok() {
        let mut left = u64::from_le_bytes(question) as usize;
        while left > 0 {
            for piece in buffer.chunks(baseline::PIECE_BYTES) {
                let count = left.min(piece.len());
                if stream.write_all(&piece[..count]).is_err() {
                    return;
                }
                left -= count;
            }
        }
        if stream.flush().is_err() {
            return;
        }
    }
}
