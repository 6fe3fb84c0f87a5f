//! Block events over a real link: from nothing, behind the last one, and for a listener that is too slow.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashSet;
use std::sync::Arc;

use common::block_events::{BlockEvent, BlockSink, Medium, StoredBlock};
use common::content::ContentKey;
use common::ids::{Epoch, Role};
use common::wire::{BlockCursor, BlockNews, Open, WatchBlocks, blocks};
use kv_connector::block_feed::BlockFeed;
use kv_connector::membership::NodePresence;
use kv_connector::{ControlReceiver, ControlSender, Fabric, Link};
use support::{Cluster, assert_nothing_left, soon};

fn stored_in(medium: Medium, key: u128) -> BlockEvent {
    let parent = key.checked_sub(1).map(ContentKey);
    let tokens = vec![key as u32; 16].into();
    BlockEvent::Stored(StoredBlock { medium, key: ContentKey(key), parent, tokens })
}

fn removed_from(medium: Medium, key: u128) -> BlockEvent {
    BlockEvent::Removed { medium, key: ContentKey(key) }
}

fn stored(key: u128) -> BlockEvent {
    stored_in(Medium::Pool, key)
}

fn removed(key: u128) -> BlockEvent {
    removed_from(Medium::Pool, key)
}

/// A proxy and a prefill node whose feed remembers `num_removals_max` removals.
struct Pair {
    proxy: Fabric,
    node: Fabric,
    feed: Arc<BlockFeed>,
    link: Link,
}

impl Pair {
    async fn start(num_removals_max: usize) -> Self {
        let cluster = Cluster::new();
        let (proxy, node) = (cluster.start("x0", Role::Proxy), cluster.start("p0", Role::PrefillNode));
        let feed = Arc::new(BlockFeed::new(num_removals_max));
        let presence = NodePresence::new(Default::default).with_blocks(feed.clone());
        let accepting = node.clone();
        tokio::spawn(async move {
            while let Some(stream) = accepting.accept().await {
                let Open::WatchBlocks(watch) = stream.open else { panic!("{:?}", stream.open) };
                let (presence, epoch) = (presence.clone(), accepting.hello().epoch);
                tokio::spawn(async move { presence.serve_blocks(epoch, watch, stream.sender).await });
            }
        });
        let link = proxy.dial(node.local_addr(), Role::PrefillNode, None).await.unwrap();
        Self { proxy, node, feed, link }
    }

    async fn watch(&self, after: Option<BlockCursor>, with_tokens: bool) -> (ControlSender, ControlReceiver) {
        self.link.open(&Open::WatchBlocks(WatchBlocks { after, with_tokens })).await.unwrap()
    }
}

async fn news(receiver: &mut ControlReceiver) -> BlockNews {
    soon("news", receiver.recv()).await.unwrap().expect("the stream goes on")
}

#[tokio::test]
async fn proxy_that_was_away_goes_on_behind_the_last_event() {
    let pair = Pair::start(100).await;
    pair.feed.on_blocks(vec![stored(0), stored(1)]);
    let (sender, mut receiver) = pair.watch(None, false).await;
    let first = news(&mut receiver).await;
    assert!(first.is_restart && first.events.len() == 2);
    let blocks::BlockEvent::Stored { parent, num_tokens, tokens, .. } = &first.events[1] else { panic!("{first:?}") };
    assert_eq!((*parent, *num_tokens, tokens.0.len()), (Some(ContentKey(0)), 16, 0));
    pair.feed.on_blocks(vec![stored(2)]);
    let second = news(&mut receiver).await;
    assert_eq!((second.is_restart, second.events.len()), (false, 1));
    drop((sender, receiver));

    pair.feed.on_blocks(vec![removed(2), stored(3)]);
    let (_sender, mut receiver) = pair.watch(second.resume_at, true).await;
    let next = news(&mut receiver).await;
    assert!(!next.is_restart);
    assert_eq!(next.events[0], blocks::BlockEvent::of(&removed(2), true));
    let blocks::BlockEvent::Stored { tokens, .. } = &next.events[1] else { panic!("{next:?}") };
    assert_eq!(tokens.0, [3; 16], "tokens are there for who asks");
    drop((_sender, receiver));

    // What was heard of another life is worth nothing.
    let elsewhere = next.resume_at.map(|cursor| BlockCursor { epoch: Epoch(cursor.epoch.0 + 1), ..cursor });
    let (_sender, mut receiver) = pair.watch(elsewhere, false).await;
    let again = news(&mut receiver).await;
    assert!(again.is_restart && again.events.len() == 3, "{again:?}");
    drop((_sender, receiver, pair.link));
    assert_nothing_left([pair.proxy, pair.node]).await;
}

#[tokio::test]
async fn block_that_moves_to_a_tier_while_the_proxy_is_away_is_told_when_it_is_back() {
    let pair = Pair::start(100).await;
    let told =
        |events: &[BlockEvent]| -> Vec<_> { events.iter().map(|event| blocks::BlockEvent::of(event, false)).collect() };
    pair.feed.on_blocks(vec![stored(0), stored(1)]);
    let (sender, mut receiver) = pair.watch(None, false).await;
    let first = news(&mut receiver).await;
    drop((sender, receiver));

    // Copied into host memory, then evicted from the pool.
    let moved = [stored_in(Medium::Host, 1), removed(1)];
    pair.feed.on_blocks(moved.to_vec());
    let (sender, mut receiver) = pair.watch(first.resume_at, false).await;
    let next = news(&mut receiver).await;
    assert_eq!((next.is_restart, next.events), (false, told(&moved)));
    drop((sender, receiver));

    // Whoever knows nothing yet is told what is in either medium.
    let (sender, mut receiver) = pair.watch(None, false).await;
    let snapshot = news(&mut receiver).await;
    assert_eq!((snapshot.is_restart, snapshot.events), (true, told(&[stored(0), moved[0].clone()])));
    let gone = [removed_from(Medium::Host, 1)];
    pair.feed.on_blocks(gone.to_vec());
    assert_eq!(news(&mut receiver).await.events, told(&gone));
    drop((sender, receiver, pair.link));
    assert_nothing_left([pair.proxy, pair.node]).await;
}

#[tokio::test]
async fn slow_listener_holds_nobody_back_and_starts_over() {
    const NUM_BLOCKS: u128 = 50_000;
    let pair = Pair::start(100).await;
    let (_sender, mut receiver) = pair.watch(None, true).await;
    assert!(news(&mut receiver).await.is_restart);
    // Far more than a connection takes in unread: the appends end all the same.
    for key in 0..NUM_BLOCKS {
        pair.feed.on_blocks(vec![stored(key)]);
    }
    for key in 0..NUM_BLOCKS - 10 {
        pair.feed.on_blocks(vec![removed(key)]);
    }
    let (mut known, mut num_restarts, mut num_largest) = (HashSet::new(), 0, 0);
    while known.len() != 10 || !(NUM_BLOCKS - 10..NUM_BLOCKS).all(|key| known.contains(&ContentKey(key))) {
        let news = news(&mut receiver).await;
        num_largest = num_largest.max(news.events.len());
        if news.is_restart {
            known.clear();
            num_restarts += 1;
        }
        for event in news.events {
            match event {
                blocks::BlockEvent::Stored { key, .. } => drop(known.insert(key)),
                blocks::BlockEvent::Removed { key, .. } => drop(known.remove(&key)),
                blocks::BlockEvent::Cleared { .. } => known.clear(),
            }
        }
    }
    assert!(num_restarts > 0, "it was 50,000 removals behind a ring of 100");
    assert!(num_largest <= 1024, "a message of {num_largest} events");
    drop((_sender, receiver, pair.link));
    assert_nothing_left([pair.proxy, pair.node]).await;
}

#[tokio::test]
async fn node_without_a_feed_says_so_by_ending_the_stream() {
    let cluster = Cluster::new();
    let (proxy, node) = (cluster.start("x0", Role::Proxy), cluster.start("d0", Role::DecodeNode));
    let link = proxy.dial(node.local_addr(), Role::DecodeNode, None).await.unwrap();
    let (_sender, mut receiver) =
        link.open(&Open::WatchBlocks(WatchBlocks { after: None, with_tokens: false })).await.unwrap();
    let stream = soon("accept", node.accept()).await.unwrap();
    let Open::WatchBlocks(watch) = stream.open else { panic!("{:?}", stream.open) };
    NodePresence::new(Default::default).serve_blocks(node.hello().epoch, watch, stream.sender).await;
    assert_eq!(soon("end", receiver.recv::<BlockNews>()).await, Ok(None));
}
