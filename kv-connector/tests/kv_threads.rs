//! KV is moved on threads of its own: while these stand still, everything else goes on.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{Arc, Mutex, mpsc};

use common::ids::{BlockId, Epoch, Role};
use common::kv_memory::KvMemory;
use common::wire::{Open, PrefillEvent};
use kv_connector::transfer::{ExtentRequest, ExtentSends, ExtentSource, LandingEvent, LandingPlan};
use kv_connector::{Fabric, Link};
use support::{Cluster, Job, SOON, TestMemory, assert_nothing_left, kv_spec, node, prefill, soon};

/// A pool in which the first piece that is written or shown takes until it may go on.
struct Standing {
    inner: Arc<TestMemory>,
    stands: tokio::sync::mpsc::UnboundedSender<String>,
    may_go_on: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Standing {
    /// With it, the name of the thread once it stands, and the word to go on.
    fn over(inner: &Arc<TestMemory>) -> (Arc<Self>, tokio::sync::mpsc::UnboundedReceiver<String>, mpsc::Sender<()>) {
        let (stands, hear) = tokio::sync::mpsc::unbounded_channel();
        let (go_on, may_go_on) = mpsc::channel();
        let memory = Self { inner: inner.clone(), stands, may_go_on: Mutex::new(Some(may_go_on)) };
        (Arc::new(memory), hear, go_on)
    }

    fn stand(&self) {
        if let Some(may_go_on) = self.may_go_on.lock().unwrap().take() {
            self.stands.send(std::thread::current().name().unwrap_or_default().to_string()).unwrap();
            may_go_on.recv_timeout(SOON).expect("what is awaited here happens while KV stands still");
        }
    }
}

impl KvMemory for Standing {
    fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]) {
        self.stand();
        self.inner.write_at(layer, blocks, first_granule, byte_offset, bytes);
    }

    fn read_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize, out: &mut [u8]) {
        self.inner.read_granules(layer, blocks, first_granule, num_granules, out);
    }

    fn visit_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) {
        self.stand();
        self.inner.visit_granules(layer, blocks, first_granule, num_granules, visit);
    }

    fn granule_bytes(&self) -> usize {
        self.inner.granule_bytes()
    }

    fn num_layers(&self) -> usize {
        self.inner.num_layers()
    }
}

/// A request and its answer, over a link that has a bulk connection beside it.
async fn message_there_and_back(link: &Link, server: &Fabric) {
    let (_sender, mut receiver) = soon("open", link.open(&prefill(77))).await.unwrap();
    let mut stream = soon("accept", server.accept()).await.unwrap();
    assert!(matches!(stream.open, Open::Prefill(_)));
    let answer = PrefillEvent::Progress { num_steps: 1, num_computed_tokens: 2 };
    soon("answer", stream.sender.send(&answer)).await.unwrap();
    assert_eq!(soon("hear", receiver.recv::<PrefillEvent>()).await.unwrap(), Some(answer));
}

/// One thread for all but KV: were KV moved on it, nothing would go on while it stands.
#[tokio::test]
async fn messages_get_through_while_kv_stands_still_at_either_end() {
    let cluster = Cluster::new();
    let (p0, d0) = (cluster.start("p0", Role::PrefillNode), cluster.start("d0", Role::DecodeNode));
    let link = soon("dial", d0.dial(p0.local_addr(), Role::PrefillNode, None)).await.unwrap();
    let bulk = soon("bulk", d0.connect_bulk(&link, &d0.landing_zone())).await.unwrap();
    for stands_at_sender in [true, false] {
        let job = Job::new(1 + u128::from(stands_at_sender), 64, 0, 0);
        let (from, to) = (TestMemory::new(8), TestMemory::new(8));
        let extent = job.extent(0, 0, 64);
        from.write_at(0, &job.blocks, 0, 0, &job.payload(&extent));
        let (standing, mut stands, go_on) = Standing::over(if stands_at_sender { &from } else { &to });
        let (mut source_memory, mut memory): (Arc<dyn KvMemory>, Arc<dyn KvMemory>) = (from.clone(), to.clone());
        *(if stands_at_sender { &mut source_memory } else { &mut memory }) = standing;
        let (_landing, mut landed) = d0.landing_zone().open(LandingPlan { memory, ..job.plan(&to) });
        let source = ExtentSource {
            memory: source_memory,
            kv_spec: kv_spec(),
            blocks: job.blocks.clone().into(),
            chain: job.chain(),
            request: ExtentRequest {
                epoch: job.epoch,
                request: job.request,
                attempt: job.attempt,
                generation: job.generation,
            },
        };
        let mut sends = ExtentSends::default();
        let sender = p0.bulk_to(&node("d0"), Epoch(11)).unwrap();
        sender.begin(&mut sends, source.unsealed(&job.tokens, extent));

        assert_eq!(soon("KV stands", stands.recv()).await.unwrap(), "kv");
        message_there_and_back(&link, &p0).await;
        assert!(p0.bulk_to(&node("d0"), Epoch(11)).is_some() && p0.receives_from(&node("d0"), Epoch(11)));
        assert!(!bulk.is_closed() && !sender.is_closed());
        go_on.send(()).unwrap();

        let verified = soon("the extent lands", landed.recv()).await.unwrap();
        assert!(matches!(verified, LandingEvent::ExtentVerified { .. }), "{verified:?}");
        assert_eq!(soon("the send ends", sends.next_ended()).await, Some(true));
        assert!(job.holds(&to, &extent));
    }
    drop((bulk, link));
    assert_nothing_left([p0, d0]).await;
}
