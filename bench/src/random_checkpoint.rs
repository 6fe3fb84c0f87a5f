//! Checkpoints of random weights in the shapes that benchmarks use, `tandem model random`, and any checkpoint as a
//! GGUF file, `tandem model gguf`, or with 8-bit weights, `tandem model w8a8`.
//!
//! What such a model says is noise; how long it takes to say it is what a trained one of its shape takes. The
//! weights are a function of the seed. The tokenizer is that of `models/tiny` with names for the further tokens.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::gguf::write::{GgufType, convert};
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

const TOKENIZER: &str = include_str!("../../models/tiny/tokenizer.json");
const TOKENIZER_CONFIG: &str = include_str!("../../models/tiny/tokenizer_config.json");
const CHAT_TEMPLATE: &str = include_str!("../../models/tiny/chat_template.jinja");

/// Checkpoints for benchmarks.
#[derive(Debug, Parser)]
#[command(name = "model", version)]
pub struct ModelArgs {
    #[command(subcommand)]
    command: ModelCommand,
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Writes a Hugging Face folder of random bf16 weights.
    Random(RandomArgs),
    /// Writes the model of a Hugging Face folder as a GGUF file.
    Gguf(GgufArgs),
    /// Writes the model of a Hugging Face folder as one of 8-bit weights with a scale for each row (W8A8, as
    /// compressed-tensors has it).
    W8a8(W8a8Args),
}

#[derive(Debug, Args)]
struct W8a8Args {
    /// The Hugging Face folder.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// The folder to write; made if it is not there.
    #[arg(value_name = "INTO")]
    into: PathBuf,
}

#[derive(Debug, Args)]
struct GgufArgs {
    /// The Hugging Face folder.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// The file to write; its name ends in .gguf.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What matrices are stored as; norms stay f32.
    #[arg(long = "type", value_enum, default_value_t = TypeName::Q8_0)]
    ty: TypeName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TypeName {
    #[value(name = "bf16")]
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k_m")]
    Q4KM,
}

impl TypeName {
    fn ty(self) -> GgufType {
        match self {
            Self::Bf16 => GgufType::Bf16,
            Self::Q8_0 => GgufType::Q8_0,
            Self::Q4_0 => GgufType::Q4_0,
            Self::Q4KM => GgufType::Q4_K_M,
        }
    }
}

#[derive(Debug, Args)]
struct RandomArgs {
    /// Which shape: tiny (0.9 million parameters), s (28 million), m (1.1 billion); or 8b, 32b, 70b, whose KV is that
    /// of Llama 3.1 8B (128 KiB per token in bf16), Qwen3 32B (256 KiB) and Llama 3.1 70B (320 KiB).
    #[arg(value_enum)]
    shape: ShapeName,
    /// The folder; made if it is not there.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// The weights are a function of it.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Writes no weights: enough for --device sim and a proxy.
    #[arg(long)]
    no_weights: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ShapeName {
    Tiny,
    S,
    M,
    #[value(name = "8b")]
    B8,
    #[value(name = "32b")]
    B32,
    #[value(name = "70b")]
    B70,
}

/// The numbers of a Llama.
#[derive(Debug, Clone, Copy)]
struct Shape {
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn: usize,
    vocab: usize,
}

impl ShapeName {
    fn shape(self) -> Shape {
        let [hidden, layers, heads, kv_heads, head_dim, ffn, vocab] = match self {
            Self::Tiny => [128, 4, 4, 2, 32, 352, 512],
            Self::S => [512, 8, 8, 4, 64, 1408, 4096],
            Self::M => [2048, 16, 32, 8, 64, 8192, 32_000],
            Self::B8 => [4096, 32, 32, 8, 128, 14_336, 128_256],
            Self::B32 => [5120, 64, 64, 8, 128, 25_600, 151_936],
            Self::B70 => [8192, 80, 64, 8, 128, 28_672, 128_256],
        };
        Shape { hidden, layers, heads, kv_heads, head_dim, ffn, vocab }
    }
}

/// A tensor of the file; `rows` of one are a norm's weights, which are all 1.
struct Tensor {
    name: String,
    rows: usize,
    columns: usize,
}

impl Shape {
    fn tensors(&self) -> Vec<Tensor> {
        let Self { hidden, heads, kv_heads, head_dim, ffn, vocab, .. } = *self;
        let tensor = |name: String, rows: usize, columns: usize| Tensor { name, rows, columns };
        let mut tensors = vec![tensor("model.embed_tokens.weight".into(), vocab, hidden)];
        for layer in 0..self.layers {
            let of = |name: &str, rows: usize, columns: usize| {
                tensor(format!("model.layers.{layer}.{name}.weight"), rows, columns)
            };
            tensors.extend([
                of("input_layernorm", 1, hidden),
                of("self_attn.q_proj", heads * head_dim, hidden),
                of("self_attn.k_proj", kv_heads * head_dim, hidden),
                of("self_attn.v_proj", kv_heads * head_dim, hidden),
                of("self_attn.o_proj", hidden, heads * head_dim),
                of("post_attention_layernorm", 1, hidden),
                of("mlp.gate_proj", ffn, hidden),
                of("mlp.up_proj", ffn, hidden),
                of("mlp.down_proj", hidden, ffn),
            ]);
        }
        tensors.push(tensor("model.norm.weight".into(), 1, hidden));
        tensors.push(tensor("lm_head.weight".into(), vocab, hidden));
        tensors
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": false,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        })
    }
}

/// What was written.
#[derive(Debug)]
pub enum Written {
    /// Random weights.
    Random {
        /// Where.
        folder: PathBuf,
        /// How many.
        num_parameters: usize,
        /// Whether they were written.
        has_weights: bool,
    },
    /// A GGUF file, or the weights of a folder.
    File {
        /// Where.
        file: PathBuf,
        /// Its size.
        num_bytes: u64,
    },
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random { folder, num_parameters, has_weights } => {
                let millions = *num_parameters as f64 / 1e6;
                let what = if *has_weights { "has" } else { "has the shape, and nothing else, of" };
                write!(f, "{} {what} {millions:.1} million random bf16 parameters", folder.display())
            }
            Self::File { file, num_bytes } => {
                write!(f, "{} has {:.1} MB", file.display(), *num_bytes as f64 / 1e6)
            }
        }
    }
}

/// Runs `tandem model`.
///
/// # Errors
/// If the folder or the file cannot be written, or the model cannot be read.
pub fn run(args: &ModelArgs) -> anyhow::Result<Written> {
    match &args.command {
        ModelCommand::Random(RandomArgs { shape, folder, seed, no_weights }) => {
            write(shape.shape(), folder, (!no_weights).then_some(*seed))
                .with_context(|| format!("write the checkpoint {}", folder.display()))
        }
        ModelCommand::Gguf(GgufArgs { folder, file, ty }) => {
            anyhow::ensure!(engine::gguf::is_gguf(file), "{} does not end in .gguf", file.display());
            convert(folder, file, ty.ty()).with_context(|| format!("write {}", file.display()))?;
            written(file)
        }
        ModelCommand::W8a8(W8a8Args { folder, into }) => {
            engine::w8a8::convert(folder, into).with_context(|| format!("write {}", into.display()))?;
            written(&into.join("model.safetensors"))
        }
    }
}

fn written(file: &Path) -> anyhow::Result<Written> {
    let num_bytes = std::fs::metadata(file).context("look at what was written")?.len();
    Ok(Written::File { file: file.to_path_buf(), num_bytes })
}

/// Without a seed, without weights.
fn write(shape: Shape, folder: &Path, seed: Option<u64>) -> anyhow::Result<Written> {
    std::fs::create_dir_all(folder)?;
    let tensors = shape.tensors();
    if let Some(seed) = seed {
        write_weights(&folder.join("model.safetensors"), &tensors, seed)?;
    }
    let text = |value: &Value| format!("{value:#}\n");
    std::fs::write(folder.join("config.json"), text(&shape.config()))?;
    std::fs::write(folder.join("generation_config.json"), text(&json!({"bos_token_id": 0, "eos_token_id": [1]})))?;
    std::fs::write(folder.join("tokenizer.json"), text(&tokenizer(shape.vocab)?))?;
    std::fs::write(folder.join("tokenizer_config.json"), TOKENIZER_CONFIG)?;
    std::fs::write(folder.join("chat_template.jinja"), CHAT_TEMPLATE)?;
    let num_parameters = tensors.iter().map(|tensor| tensor.rows * tensor.columns).sum();
    Ok(Written::Random { folder: folder.to_path_buf(), num_parameters, has_weights: seed.is_some() })
}

/// The safetensors format: the header's length, the header, then the tensors behind each other.
fn write_weights(path: &Path, tensors: &[Tensor], seed: u64) -> anyhow::Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    for Tensor { name, rows, columns } in tensors {
        let end = offset + 2 * rows * columns;
        let shape = if *rows == 1 { json!([columns]) } else { json!([rows, columns]) };
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let first_byte = 8 + header.len() as u64;
    // The largest first: they are what others would be waited for at the end.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|number| std::cmp::Reverse(tensors[*number].num_bytes()));
    let next = AtomicUsize::new(0);
    let write_some = || -> std::io::Result<()> {
        while let Some(&number) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let offset: usize = tensors[..number].iter().map(Tensor::num_bytes).sum();
            let rng = StdRng::seed_from_u64(seed.rotate_left(32) ^ number as u64);
            tensors[number].write(&file, first_byte + offset as u64, rng)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(write_some)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("drawing numbers does not panic"))
    })?;
    Ok(())
}

/// Bytes that are written at a time, about.
const WRITE_BYTES: usize = 1 << 20;

impl Tensor {
    fn num_bytes(&self) -> usize {
        2 * self.rows * self.columns
    }

    /// Draws and writes it at `offset`. Each has a generator of its own, so the file does not depend on who is first.
    fn write(&self, file: &File, mut offset: u64, mut rng: StdRng) -> std::io::Result<()> {
        // Evenly drawn with the variance that keeps that of a projection's input.
        let bound = (3.0 / self.columns as f32).sqrt();
        let mut rows = Vec::with_capacity(WRITE_BYTES + 2 * self.columns);
        for row in 0..self.rows {
            for _ in 0..self.columns {
                let weight = if self.rows == 1 { 1.0 } else { rng.random_range(-bound..bound) };
                rows.extend_from_slice(&bf16::from_f32(weight).to_le_bytes());
            }
            if rows.len() >= WRITE_BYTES || row + 1 == self.rows {
                file.write_all_at(&rows, offset)?;
                offset += rows.len() as u64;
                rows.clear();
            }
        }
        Ok(())
    }
}

/// The tokenizer of `models/tiny` with `vocab` tokens: the further ones have names that no text is cut into.
fn tokenizer(vocab: usize) -> anyhow::Result<Value> {
    let mut tokenizer: Value = serde_json::from_str(TOKENIZER).context("read the tokenizer of models/tiny")?;
    let known =
        tokenizer["model"]["vocab"].as_object_mut().context("the tokenizer of models/tiny has no vocabulary")?;
    for id in known.len()..vocab {
        known.insert(format!("t{id}"), id.into());
    }
    Ok(tokenizer)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_parameters_they_are_said_to_have() {
        let millions = |shape: ShapeName| {
            let tensors = shape.shape().tensors();
            (tensors.iter().map(|tensor| tensor.rows * tensor.columns).sum::<usize>() as f64 / 1e5).round() / 10.0
        };
        assert_eq!([ShapeName::Tiny, ShapeName::S, ShapeName::M].map(millions), [0.9, 27.8, 1104.2]);
    }

    #[test]
    fn a_shape_without_weights_is_enough_to_simulate_it() {
        let folder = std::env::temp_dir().join(format!("tandem-shape-{}", std::process::id()));
        for (shape, kib) in [(ShapeName::B8, 128), (ShapeName::B32, 256), (ShapeName::B70, 320)] {
            write(shape.shape(), &folder, None).unwrap();
            assert!(!folder.join("model.safetensors").exists());
            let spec = engine::spec::ModelSpec::read(&folder).unwrap();
            assert_eq!(spec.kv_spec(common::kv_spec::KvDtype::Bf16).bytes_per_token(), kib << 10);
            let sim = engine::sim::SimOptions::of_checkpoint(&folder, None).unwrap();
            assert_eq!(sim.vocab_size as usize, spec.vocab_size);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_written_checkpoint_can_be_opened_and_is_that_of_its_seed() {
        let folder = std::env::temp_dir().join(format!("tandem-random-{}", std::process::id()));
        let written = |seed| {
            write(ShapeName::Tiny.shape(), &folder, Some(seed)).unwrap();
            std::fs::read(folder.join("model.safetensors")).unwrap()
        };
        let first = written(1);
        assert_eq!(first, written(1));
        assert_ne!(first, written(2));
        engine::spec::ModelSpec::read(&folder).unwrap();
        engine::checkpoint::Checkpoint::open(&folder).unwrap();
        assert_eq!(tokenizer(4096).unwrap()["model"]["vocab"].as_object().unwrap().len(), 4096);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_folder_becomes_a_gguf_file_of_each_type() {
        let folder = std::env::temp_dir().join(format!("tandem-random-gguf-{}", std::process::id()));
        write(ShapeName::Tiny.shape(), &folder, Some(1)).unwrap();
        let mut sizes = Vec::new();
        for ty in [TypeName::Bf16, TypeName::Q8_0, TypeName::Q4KM, TypeName::Q4_0] {
            let file = folder.join("model.gguf");
            let args = GgufArgs { folder: folder.clone(), file: file.clone(), ty };
            let Written::File { num_bytes, .. } = run(&ModelArgs { command: ModelCommand::Gguf(args) }).unwrap() else {
                panic!("a GGUF file was asked for");
            };
            sizes.push(num_bytes);
            let spec = engine::checkpoint::Checkpoint::open(&file).unwrap().stated_spec().unwrap().clone();
            let mut expected = engine::spec::ModelSpec::read(&folder).unwrap();
            // What a folder says of its types has no place in a GGUF file.
            (expected.stated_dtype, expected.eos_token_ids) = (spec.stated_dtype.clone(), spec.eos_token_ids.clone());
            assert_eq!(spec, expected);
        }
        // Rows of 128 and 352 are no whole blocks of 256: they have 8 bits in q4_k_m.
        assert!(sizes[0] > sizes[1] && sizes[1] == sizes[2] && sizes[2] > sizes[3], "{sizes:?}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
