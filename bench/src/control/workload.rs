//! Shapes and messages that both processes agree on.

use std::time::Duration;

use common::content::{ChainRoot, ContentChain};
use common::ids::{Attempt, BlockId, ChoiceIndex, Epoch, Generation, NodeId, RequestId, Role};
use common::kv_spec::{KvDtype, KvSpec};
use common::model::{ModelIdentity, ModelInfo, NumericsId, Representation};
use common::sampling::SamplingParams;
use common::tokens::Token;
use common::wire::{Hello, Open, Prefill};

pub(super) const BLOCK_SIZE: usize = 64;
pub(super) const NUM_LAYERS: u32 = 4;
/// 4 heads of 64, K and V, bf16.
const TOKEN_BYTES: usize = 1024;
/// The request whose stream carries the questions.
pub(super) const QUESTIONS: RequestId = RequestId(0);
/// For what takes moments where nothing is wrong.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

pub(super) fn kv_spec() -> KvSpec {
    KvSpec::uniform(NUM_LAYERS, 4, 64, KvDtype::Bf16, None)
}

pub(super) fn num_tokens(mib: u32) -> usize {
    mib as usize * (1 << 20) / (NUM_LAYERS as usize * TOKEN_BYTES)
}

pub(super) fn blocks(num_tokens: usize) -> Vec<BlockId> {
    (0..num_tokens.div_ceil(BLOCK_SIZE) as u32).map(BlockId).collect()
}

pub(super) fn node(role: Role) -> NodeId {
    NodeId::new(role.as_str()).expect("a role's name is a node name")
}

pub(super) fn hello(role: Role, num_tokens: usize) -> Hello {
    let model = ModelInfo {
        identity: ModelIdentity([7; 32]),
        numerics: NumericsId("control-bench".to_string()),
        representation: Representation("bf16".to_string()),
        kv_spec: kv_spec(),
        vocab_size: 1 << 16,
        max_model_len: num_tokens as u32 + 1,
        exchange: Default::default(),
        granule_order: Default::default(),
        block_size: BLOCK_SIZE as u32,
        num_blocks: blocks(num_tokens).len() as u32,
    };
    Hello { node: node(role), role, epoch: Epoch(1), model: Some(model), bulk_port: None }
}

pub(super) fn tokens(num_tokens: usize) -> Vec<Token> {
    (0..num_tokens as u32).map(|index| index % 50_000).collect()
}

pub(super) fn chain(tokens: &[Token]) -> ContentChain {
    let mut chain = ContentChain::new(&ChainRoot::of_model(ModelIdentity([7; 32])));
    chain.extend(tokens);
    chain
}

/// Asks for the KV of `tokens`, or with none of them for answers.
pub(super) fn prefill(request: RequestId, tokens: &[Token]) -> Open {
    Open::Prefill(Box::new(Prefill {
        request,
        attempt: Attempt(1),
        generation: Generation(request.0 as u64),
        tokens: tokens.to_vec().into(),
        prompt_len: tokens.len() as u32,
        choices: vec![ChoiceIndex(0)],
        params: SamplingParams::greedy(1),
        salt: Vec::new(),
        num_held_tokens: 0,
        credit_bytes: u64::MAX,
        deadline: DEADLINE,
        local_rest: None,
        prefix_peer: None,
    }))
}
