//! Requests of every kind, with prompts of every length, from a seed.

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

/// Tokens of `models/tiny` that are no special ones.
const ORDINARY_TOKENS: std::ops::Range<u32> = 5..512;

/// A request to `/v1/completions`.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// What it tries.
    pub(crate) name: String,
    /// The body.
    pub(crate) body: Value,
}

/// A random prompt.
pub(crate) fn prompt(rng: &mut StdRng, num_tokens: usize) -> Vec<u32> {
    (0..num_tokens).map(|_| rng.random_range(ORDINARY_TOKENS)).collect()
}

/// A greedy request that runs to its full length, with log probabilities.
pub(crate) fn greedy(prompt: &[u32], max_tokens: u32) -> Value {
    json!({"model": "models/tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "logprobs": 2})
}

/// The same with the fields of `more`.
pub(crate) fn with(mut body: Value, more: Value) -> Value {
    let (Value::Object(body_fields), Value::Object(more)) = (&mut body, more) else { panic!("two objects") };
    body_fields.extend(more);
    body
}

/// A request that samples.
pub(crate) fn sampled(rng: &mut StdRng, prompt: &[u32], max_tokens: u32) -> Value {
    let seed: u32 = rng.random();
    let temperature = [0.7, 1.0, 1.4][rng.random_range(0..3)];
    with(
        greedy(prompt, max_tokens),
        json!({"temperature": temperature, "top_p": 0.95, "top_k": 80, "min_p": 0.001, "seed": seed}),
    )
}

/// Requests that meet the edges of granules and blocks, long prompts over many chunks, every way to sample,
/// and prompts that begin like others.
pub(crate) fn corpus(rng: &mut StdRng) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, body: Value| cases.push(Case { name, body });
    for num_tokens in [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 500, 3000] {
        add(format!("greedy {num_tokens}"), greedy(&prompt(rng, num_tokens), 20));
    }
    for num_tokens in [1, 16, 40, 257, 1025] {
        let prompt = prompt(rng, num_tokens);
        add(format!("sampled {num_tokens}"), sampled(rng, &prompt, 24));
    }
    for _ in 0..4 {
        let num_tokens = rng.random_range(1..700);
        let prompt = prompt(rng, num_tokens);
        add(format!("random {num_tokens}"), sampled(rng, &prompt, 16));
    }
    for num_tokens in [1, 47, 333] {
        let prompt = prompt(rng, num_tokens);
        add(format!("three of {num_tokens}"), with(sampled(rng, &prompt, 20), json!({"n": 3})));
    }
    let long = prompt(rng, 90);
    let penalties = json!({"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4});
    add("penalties".into(), with(sampled(rng, &long, 40), penalties));
    let bias = json!({"logit_bias": {"77": 6.0, "78": -100}, "stop_token_ids": [99], "min_tokens": 5});
    add("biases".into(), with(sampled(rng, &long, 40), bias));
    add("one token".into(), greedy(&long, 1));
    let ends = json!({"ignore_eos": false, "logit_bias": {"3": 8.0}});
    add("may end early".into(), with(sampled(rng, &long, 60), ends));
    let mut shared = prompt(rng, 410);
    add("shared beginning".into(), greedy(&shared, 8));
    shared.truncate(400);
    shared.extend(prompt(rng, 60));
    add("beginning of another".into(), greedy(&shared, 8));
    shared.truncate(64);
    add("whole blocks of another".into(), greedy(&shared, 8));
    cases
}
