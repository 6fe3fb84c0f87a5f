//! KV that `transfer` and `control` move: shapes and messages on which both of their processes agree without telling
//! each other.

use std::time::Duration;

use common::content::{ChainRoot, ContentChain};
use common::ids::{Attempt, BlockId, ChoiceIndex, Epoch, Generation, NodeId, RequestId, Role};
use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
use common::sampling::SamplingParams;
use common::tokens::Token;
use common::wire::{Hello, Prefill};

pub(crate) const NUM_LAYERS: u32 = 4;
/// K and V of one token in one layer: 4 heads of 64 in bf16.
pub(crate) const TOKEN_BYTES: usize = 1024;
pub(crate) const BLOCK_SIZE: usize = 32;
/// A request is never waited for longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// KV of the first `num_layers` layers.
pub(crate) fn kv_spec(num_layers: u32) -> KvSpec {
    KvSpec::uniform(num_layers, 4, 64, KvDtype::Bf16, None)
}

/// Tokens whose KV over all layers is `mib` large.
pub(crate) fn num_tokens(mib: u32) -> usize {
    mib as usize * (1 << 20) / (NUM_LAYERS as usize * TOKEN_BYTES)
}

/// The other way round.
pub(crate) fn request_mib(num_tokens: usize) -> u32 {
    (num_tokens * NUM_LAYERS as usize * TOKEN_BYTES).div_ceil(1 << 20) as u32
}

pub(crate) fn num_blocks(num_tokens: usize) -> usize {
    num_tokens.div_ceil(BLOCK_SIZE)
}

pub(crate) fn blocks(num_tokens: usize) -> Vec<BlockId> {
    (0..num_blocks(num_tokens) as u32).map(BlockId).collect()
}

/// The hello of `node`, whose pool holds the KV of `num_tokens` tokens.
pub(crate) fn hello(node: NodeId, role: Role, num_tokens: usize) -> Hello {
    let model = ModelInfo {
        identity: ModelIdentity([7; 32]),
        numerics: NumericsId("bench".to_string()),
        representation: Representation("bf16".to_string()),
        kv_spec: kv_spec(NUM_LAYERS),
        vocab_size: 1 << 16,
        max_model_len: num_tokens as u32 + 1,
        exchange: Default::default(),
        granule_order: Default::default(),
        block_size: BLOCK_SIZE as u32,
        num_blocks: num_blocks(num_tokens) as u32,
    };
    Hello { node, role, epoch: Epoch(1), model: Some(model), bulk_port: None }
}

/// The tokens of every request; content does not matter to a transfer.
pub(crate) fn tokens(num_tokens: usize) -> Vec<Token> {
    (0..num_tokens as u32).map(|index| index % 50_000).collect()
}

pub(crate) fn chain(tokens: &[Token]) -> ContentChain {
    let mut chain = ContentChain::new(&ChainRoot::of_model(ModelIdentity([7; 32])));
    chain.extend(tokens);
    chain
}

/// Bytes of the KV of `num_tokens` tokens in `num_layers` layers: the credit for as many.
pub(crate) fn kv_bytes(num_tokens: usize, num_layers: u32) -> u64 {
    (num_tokens * TOKEN_BYTES) as u64 * u64::from(num_layers)
}

/// Asks for the KV of `tokens` in the first `num_layers` layers: nobody sends beyond the credit.
pub(crate) fn prefill(number: u64, tokens: &[Token], num_layers: u32) -> Prefill {
    Prefill {
        request: RequestId(u128::from(number)),
        attempt: Attempt(1),
        generation: Generation(number),
        tokens: tokens.to_vec().into(),
        prompt_len: tokens.len() as u32,
        choices: vec![ChoiceIndex(0)],
        params: SamplingParams::greedy(1),
        salt: Vec::new(),
        num_held_tokens: 0,
        credit_bytes: kv_bytes(tokens.len(), num_layers),
        deadline: DEADLINE,
        local_rest: None,
        prefix_peer: None,
    }
}
