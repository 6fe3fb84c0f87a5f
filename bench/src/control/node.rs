//! The prefill node's part: answers questions, sends KV to whoever asks.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use common::ids::{RequestId, Role};
use common::wire::{Open, Prefill, PrefillControl, PrefillEvent};
use engine::pool::{KvPool, PoolMemory};
use kv_connector::certs::Identity;
use kv_connector::transfer::{BulkSender, ExtentRequest, ExtentSends, ExtentSource, SharedPool};
use kv_connector::{ControlReceiver, ControlSender, Fabric, FabricConfig};

use super::{ControlNodeArgs, QUESTIONS, node_of};
use crate::kv_workload as workload;

/// Extents on the way at once.
const NUM_EXTENTS_AT_ONCE: usize = 16;

/// Says where it listens, then serves until standard input ends.
pub(super) async fn serve(args: &ControlNodeArgs) -> anyhow::Result<()> {
    let num_tokens = workload::num_tokens(args.request_mib);
    let role = Role::PrefillNode;
    let identity = Identity::load_from_dir(&args.identity, &node_of(role))?;
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let memory = if args.is_shared { PoolMemory::Shareable } else { PoolMemory::Private };
    let blocks = workload::blocks(num_tokens);
    let pool = Arc::new(KvPool::with_memory(
        &workload::kv_spec(workload::NUM_LAYERS),
        workload::BLOCK_SIZE,
        blocks.len(),
        memory,
    )?);
    // Pages that exist.
    let block = vec![0x5a; pool.block_bytes()];
    blocks.iter().for_each(|id| pool.write_block(*id, &block));
    let mut config = FabricConfig::new(loopback, identity, workload::hello(node_of(role), role, num_tokens));
    config.bulk_listen = Some(loopback);
    if let Some((file, num_bytes)) = pool.shared_file() {
        let file = Arc::new(file.try_clone_to_owned().context("duplicate the pool's descriptor")?);
        config.shared_pool = Some(SharedPool { memory: pool.clone(), file, num_bytes: num_bytes as u64 });
    }
    let fabric = Fabric::bind(config)?;
    println!("{}", fabric.local_addr());
    std::io::stdout().flush().context("tell the process that measures")?;

    let ended = tokio::task::spawn_blocking(|| {
        // Until the other end of the pipe is gone.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
    });
    tokio::pin!(ended);
    let chain = workload::chain(&workload::tokens(num_tokens));
    loop {
        let stream = tokio::select! {
            _ = &mut ended => break,
            stream = fabric.accept() => stream,
        };
        let Some(stream) = stream else { break };
        let Open::Prefill(prefill) = stream.open else { continue };
        if prefill.request == RequestId(QUESTIONS.into()) {
            tokio::spawn(answer(stream.sender, stream.receiver));
            continue;
        }
        let peer = stream.peer;
        let bulk = fabric.bulk_to(&peer.node, peer.epoch).context("the other end has no bulk connection")?;
        let Prefill { request, attempt, generation, .. } = *prefill;
        let source = ExtentSource {
            memory: pool.clone(),
            kv_spec: workload::kv_spec(workload::NUM_LAYERS),
            blocks: workload::blocks(num_tokens).into(),
            chain: chain.clone(),
            request: ExtentRequest { epoch: peer.epoch, request, attempt, generation },
        };
        let lease = (stream.sender, stream.receiver);
        tokio::spawn(async move {
            send_all(&source, &bulk, &prefill).await;
            drop(lease);
        });
    }
    fabric.close().await;
    Ok(())
}

/// Every question has its answer at once.
async fn answer(mut sender: ControlSender, mut receiver: ControlReceiver) {
    while let Ok(Some(PrefillControl::Credit { .. })) = receiver.recv().await {
        let answer = PrefillEvent::Progress { num_steps: 0, num_computed_tokens: 0 };
        if sender.send(&answer).await.is_err() {
            return;
        }
    }
}

/// Layer by layer. What is refused or lost the other end notices.
async fn send_all(source: &ExtentSource, bulk: &BulkSender, prefill: &Prefill) {
    let tokens = &prefill.tokens.0;
    let mut sends = ExtentSends::default();
    for layer in 0..workload::NUM_LAYERS {
        for (extent, _) in source.extents(layer, 0, tokens.len()) {
            if sends.len() == NUM_EXTENTS_AT_ONCE {
                sends.next_ended().await;
            }
            bulk.begin(&mut sends, source.unsealed(tokens, extent));
        }
    }
    while sends.next_ended().await.is_some() {}
}
