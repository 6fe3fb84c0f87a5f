//! A runner without arithmetic: tokens and KV are hashes, time is a cost model.
//!
//! It has the interface, the pool and the sampling of a real runner, so routing, faults and scale are tested on real
//! processes, and KV of any model's size is moved at a GPU's speed. What it makes is as dependent as a model's: the KV
//! of a token depends on the token and on the KV before it *as read back from the pool*, and so does the next token.
//!
//! ```text
//! link(layer, p)    =  BLAKE3( seed, layer, p, token, link(layer, p - 1) read from the pool )       16 numbers
//! KV(layer, p)      =  the link, at the front of the first head of K and of V; behind it numbers made from it
//! logits(p)         =  BLAKE3( links of p, and KV as read from the pool, in every layer )
//! time of a step    =  max( step_time + context_time x tokens before its sequences,  token_time x its rows )
//! ```
//!
//! A small model reads all KV for each token that is drawn: one wrong, stale or missing byte and the text is another.
//! Of a large one that would take a GPU's bandwidth. So [`read_bytes_max`](SimOptions::read_bytes_max) bounds it: the
//! newest granule is read, and others in turn, another share of them for each token. What is read depends on the
//! position alone, so split and colocated text is the same. That a transfer brings the right bytes is for the digest
//! of each extent to say, here as with any model.
//!
//! The numbers are whole, -128 to 127, which f32 and bf16 both hold: a pool of either type and either order makes the
//! same tokens, also of KV that was converted on its way.

mod kv;
mod options;
mod worker;

use std::sync::Arc;

use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};

pub use self::options::SimOptions;
use self::worker::Worker;
use crate::plan::StepPlan;
use crate::pool::{KvPool, PoolError};
use crate::runner::{KvSink, Runner, StepError, StepOutput, Ticket};
use crate::step_thread::StepThread;

/// A simulated model, its pool, and the thread that pretends to compute.
pub struct SimRunner {
    info: ModelInfo,
    pool: Arc<KvPool>,
    thread: StepThread,
}

impl SimRunner {
    /// A runner with a pool of its own.
    ///
    /// # Errors
    /// [`PoolError`] if there can be no such pool.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn new(options: SimOptions) -> Result<Self, PoolError> {
        let kv_spec = options.kv_spec();
        let pool = Arc::new(KvPool::with_memory(&kv_spec, options.block_size, options.num_blocks, options.memory)?);
        let mut identity = blake3::Hasher::new();
        identity.update(b"tandem simulated model");
        identity.update(&options.seed.to_le_bytes());
        for number in [options.num_layers, options.num_kv_heads, options.head_dim, options.vocab_size] {
            identity.update(&number.to_le_bytes());
        }
        let numerics = NumericsId::new("sim-3", options.kv_dtype);
        let info = ModelInfo {
            identity: ModelIdentity(*identity.finalize().as_bytes()),
            representation: Representation::new(options.kv_dtype, &numerics, options.exchange),
            numerics,
            kv_spec,
            vocab_size: options.vocab_size,
            max_model_len: options.max_model_len,
            exchange: options.exchange,
            granule_order: options.granule_order,
            block_size: options.block_size as u32,
            num_blocks: options.num_blocks as u32,
        };
        let mut worker = Worker::new(options, pool.clone(), &info);
        let thread = StepThread::start(move |plan, sink| worker.step(plan, sink));
        Ok(Self { info, pool, thread: thread.expect("the system starts a thread at start-up") })
    }
}

impl Runner for SimRunner {
    fn model(&self) -> &ModelInfo {
        &self.info
    }

    fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    fn submit(&mut self, plan: StepPlan, sink: Arc<dyn KvSink>) -> Ticket {
        self.thread.submit(plan, sink)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<StepOutput, StepError> {
        self.thread.wait(ticket)
    }
}
