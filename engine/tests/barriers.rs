//! A layer waits for all threads five times at most, however many rows a step has: behind q, k and v, attention, its
//! projection, gate and up, and down.
//!
//! One test alone: what is counted is the pool of the process.
#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::config::Dtype;
use engine::gguf::write::{GgufType, convert};
use engine::model::Model;
use engine::plan::Span;
use engine::runner::{KvSink, Runner};
use kernels::{Isa, WorkerPool};
use serde_json::{Value, json};
use steps::{TestSequence, load_on, plan, prompt, root, runner};

const BARRIERS_MAX: usize = 5;

/// One layer's end and the next one's beginning are between two reports.
const NUM_LAYERS: usize = 2;

/// Of `models/tiny`, whose tokenizer is used.
const VOCAB: usize = 512;

/// The numbers of a Llama.
struct Shape {
    name: &'static str,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    /// `None`: bf16.
    formats: &'static [Option<GgufType>],
}

const HEAD_DIM: usize = 64;

/// As the shapes of the benchmarks. Quantizing is slow where dependencies are not optimised, so it is half of M that is.
/// `Q4_K_M` has values of another format than queries and keys.
const SHAPES: [Shape; 3] = [
    Shape {
        name: "S",
        hidden: 512,
        heads: 8,
        kv_heads: 4,
        ffn: 1536,
        formats: &[None, Some(GgufType::Q8_0), Some(GgufType::Q4_K_M)],
    },
    Shape { name: "M", hidden: 2048, heads: 32, kv_heads: 8, ffn: 4096, formats: &[None] },
    Shape {
        name: "half of M",
        hidden: 1024,
        heads: 16,
        kv_heads: 4,
        ffn: 2048,
        formats: &[Some(GgufType::Q8_0), Some(GgufType::Q4_K_M)],
    },
];

impl Shape {
    /// A checkpoint of zeros, which take no room on the disk: no weight changes what is waited for.
    fn write(&self, folder: &Path) {
        let Self { hidden, heads, kv_heads, ffn, .. } = *self;
        let (q, kv) = (heads * HEAD_DIM, kv_heads * HEAD_DIM);
        let mut tensors: Vec<(String, Vec<usize>)> = vec![
            ("model.embed_tokens.weight".to_string(), vec![VOCAB, hidden]),
            ("model.norm.weight".to_string(), vec![hidden]),
            ("lm_head.weight".to_string(), vec![VOCAB, hidden]),
        ];
        for layer in 0..NUM_LAYERS {
            let of_layer = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![q, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, q]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![ffn, hidden]),
                ("mlp.up_proj", vec![ffn, hidden]),
                ("mlp.down_proj", vec![hidden, ffn]),
            ];
            tensors.extend(of_layer.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
        }
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let start = end;
            end += 2 * shape.iter().product::<usize>();
            header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
        }
        let header = Value::Object(header).to_string();
        let mut file = File::create(folder.join("model.safetensors")).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len((8 + header.len() + end) as u64).unwrap();

        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": HEAD_DIM,
            "intermediate_size": ffn,
            "vocab_size": VOCAB,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": false,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        });
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(root().join("models/tiny").join(name), folder.join(name)).unwrap();
        }
    }
}

/// A folder that goes with its files.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("tandem-barriers-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Scratch(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left in the system's folder for temporary files is the system's to clean.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What the pool had counted when each layer's KV was written.
#[derive(Default)]
struct Counts(Mutex<Vec<usize>>);

impl KvSink for Counts {
    fn on_layer_written(&self, layer: u32, _span: &Span) {
        let mut counts = self.0.lock().unwrap();
        if counts.len() == layer as usize {
            counts.push(WorkerPool::global().num_barriers());
        }
    }
}

/// Barriers between the KV of the first layer and that of the second in a step of `num_sequences`, each with these
/// tokens, of which the last `num_rows` are computed.
fn barriers_of_a_layer(model: &Arc<Model>, num_sequences: usize, num_tokens: usize, num_rows: usize) -> usize {
    let blocks_each = num_tokens.div_ceil(16) as u32;
    let mut runner = runner(model, 16, num_sequences * blocks_each as usize * 16);
    let mut sequences: Vec<TestSequence> = (0..num_sequences as u64)
        .map(|id| {
            let blocks = id as u32 * blocks_each..(id as u32 + 1) * blocks_each;
            let sequence = TestSequence::new(id, &prompt(num_tokens, VOCAB as u32, id), blocks);
            TestSequence { num_computed: num_tokens - num_rows, ..sequence }
        })
        .collect();
    let batch: Vec<(&mut TestSequence, usize)> = sequences.iter_mut().map(|sequence| (sequence, num_rows)).collect();
    let counts = Arc::new(Counts::default());
    let ticket = runner.submit(plan(&batch, 16, true), counts.clone());
    runner.wait(ticket).unwrap();
    let counts = counts.0.lock().unwrap();
    assert_eq!(counts.len(), NUM_LAYERS);
    counts[1] - counts[0]
}

#[test]
fn a_layer_has_five_barriers_at_most_whatever_the_batch() {
    for shape in SHAPES {
        let scratch = Scratch::new(&shape.name.replace(' ', "-"));
        shape.write(&scratch.0);
        for format in shape.formats {
            let path = format.map_or_else(
                || scratch.0.clone(),
                |ty| {
                    let file = scratch.0.join("model.gguf");
                    convert(&scratch.0, &file, ty).unwrap();
                    file
                },
            );
            let model = load_on(path.to_str().unwrap(), Dtype::Auto, Isa::detect());
            for (num_sequences, num_tokens, num_rows) in [(1, 600, 1), (8, 600, 1), (32, 600, 1), (1, 512, 512)] {
                let found = barriers_of_a_layer(&model, num_sequences, num_tokens, num_rows);
                assert!(
                    (1..=BARRIERS_MAX).contains(&found),
                    "{} {format:?}: {found} barriers with {num_sequences} times {num_rows} rows",
                    shape.name
                );
            }
        }
    }
}
