//! GGUF files and W8A8 folders are the models they were made of: same logits within the rounding of their weights,
//! same bits on every instruction set and in every batch, sentences for what is damaged.
#![allow(clippy::unwrap_used)]

#[path = "steps/mod.rs"]
mod steps;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::config::Dtype;
use engine::checkpoint::Checkpoint;
use engine::gguf::write::{GgufType, convert};
use engine::model::{LoadOptions, Model};
use engine::oracle::Oracle;
use engine::spec::ModelSpec;
use engine::w8a8;
use kernels::Isa;
use steps::{TestSequence, generate, kv_bytes, load, prompt, root, runner, step};

const TYPES: [GgufType; 4] = [GgufType::Bf16, GgufType::Q8_0, GgufType::Q4_0, GgufType::Q4_K_M];

/// A folder of the test's own.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tandem-gguf-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// The model of a folder below the repository's root as a GGUF file; one without a tokenizer gets a small one.
    fn gguf(&self, model: &str, ty: GgufType) -> PathBuf {
        let (source, copy) = (root().join(model), self.0.join("copy"));
        fs::create_dir_all(&copy).unwrap();
        for entry in fs::read_dir(source).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
            fs::copy(&entry, copy.join(entry.file_name().unwrap())).unwrap();
        }
        if !copy.join("tokenizer.json").exists() {
            let tokenizer = serde_json::json!({
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
                "decoder": {"type": "ByteLevel"}, "added_tokens": [],
            });
            fs::write(copy.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        }
        let path = self.0.join(format!("{ty:?}.gguf"));
        convert(&copy, &path, ty).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn load_path(path: &Path, dtype: Dtype, isa: Isa) -> Arc<Model> {
    let options = LoadOptions { dtype, isa, threads: Some(2), cache_folder: None };
    Arc::new(Model::load_with(path, options).unwrap())
}

/// The logarithms of probability of the likeliest `num_top` next tokens, by token.
fn top(model: &Arc<Model>, tokens: &[u32], num_top: usize) -> Vec<(u32, f32)> {
    let mut runner = runner(model, 16, 256);
    let mut sequence = TestSequence::new(1, tokens, 0..16).with_logprobs(num_top);
    let rows = tokens.len();
    let mut top = step(&mut runner, &mut [(&mut sequence, rows)]).remove(0).unwrap().top_logprobs;
    top.sort_by_key(|(token, _)| *token);
    top
}

/// Standard deviation.
fn spread(logits: &[f32]) -> f32 {
    let mean = logits.iter().sum::<f32>() / logits.len() as f32;
    (logits.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / logits.len() as f32).sqrt()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| logit - max - sum.ln()).collect()
}

/// Against the eager f32 reference over the same dequantized weights. What remains is the rounding of activations to
/// 8 bits: half a percent of a product, some 15 to 30 products behind each other, so two or three percent of the
/// logits' spread, and the worst of twenty a few times that. A scale in the wrong place is off by all of it.
#[test]
fn logits_are_those_of_the_dequantized_weights() {
    for model in ["tests/checkpoints/llama3-gqa", "tests/checkpoints/qwen3", "models/demo"] {
        let folder = Folder::new(&format!("logits-{}", model.replace('/', "-")));
        for ty in TYPES {
            let path = folder.gguf(model, ty);
            let loaded = load_path(&path, Dtype::Float32, Isa::detect());
            let tokens = prompt(40, loaded.spec().vocab_size as u32, 5);
            let checkpoint = Checkpoint::open(&path).unwrap();
            let oracle = Oracle::new(loaded.spec(), &checkpoint).logits(&tokens).unwrap();
            let expected = log_softmax(oracle.last().unwrap());
            let mut worst = 0.0f32;
            for (token, logprob) in top(&loaded, &tokens, 20) {
                worst = worst.max((logprob - expected[token as usize]).abs());
            }
            let spread = spread(oracle.last().unwrap());
            let bound = if ty == GgufType::Bf16 { 2e-3 } else { 0.15 * spread };
            assert!(worst < bound, "{model} {ty:?}: {worst}, logits spread by {spread}");
        }
    }
}

/// A bf16 file has the same numbers as the folder it was made of, q and k rows put back in order.
#[test]
fn a_bf16_file_gives_the_bits_of_its_folder() {
    for model in [
        "tests/checkpoints/llama3-gqa",
        "tests/checkpoints/llama-yarn",
        "tests/checkpoints/llama2-mha",
        "tests/checkpoints/qwen2-tied",
        "models/demo",
    ] {
        let folder = Folder::new(&format!("bits-{}", model.replace('/', "-")));
        let file = load_path(&folder.gguf(model, GgufType::Bf16), Dtype::Bfloat16, Isa::detect());
        let original = load(model, Dtype::Bfloat16);
        let tokens = prompt(50, original.spec().vocab_size as u32, 7);
        let logits = [&file, &original].map(|model| top(model, &tokens, 20));
        // Llama 3's scaling is a table of f32 factors there, YaRN's factor an f32: angles round in the last bit.
        if model.contains("llama3") || model.contains("yarn") {
            for (a, b) in logits[0].iter().zip(&logits[1]) {
                assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-2, "{model}: {a:?} {b:?}");
            }
        } else {
            assert_eq!(logits[0], logits[1], "{model}");
        }
    }
}

#[test]
fn quantized_tokens_and_kv_are_the_same_on_every_instruction_set_and_in_every_chunk() {
    let folder = Folder::new("isa");
    for ty in TYPES {
        let path = folder.gguf("models/demo", ty);
        let reference = load_path(&path, Dtype::Auto, Isa::detect());
        let tokens = prompt(60, reference.spec().vocab_size as u32, 3);
        let outcome = |model: &Arc<Model>, first_chunk: usize| {
            let mut runner = runner(model, 16, 256);
            let mut sequence = TestSequence::new(1, &tokens, 0..16);
            if first_chunk > 0 {
                step(&mut runner, &mut [(&mut sequence, first_chunk)]);
            }
            let drawn: Vec<u32> = generate(&mut runner, &mut sequence, 12).iter().map(|token| token.id).collect();
            (drawn, kv_bytes(&runner, &sequence))
        };
        let want = outcome(&reference, 0);
        assert_eq!(outcome(&reference, 17), want, "{ty:?} in two chunks");
        let others = Isa::available().iter().find(|isa| isa.order() != Isa::detect().order());
        let others = others.map(|&isa| (isa.order(), outcome(&load_path(&path, Dtype::Auto, isa), 0)));
        for &isa in Isa::available() {
            let want = others.as_ref().filter(|(order, _)| *order == isa.order()).map_or(&want, |(_, other)| other);
            assert_eq!(&outcome(&load_path(&path, Dtype::Auto, isa), 1), want, "{ty:?} {isa:?}");
        }
    }
}

#[test]
fn the_numerics_id_names_the_weights_and_identity_tells_formats_apart() {
    let folder = Folder::new("identity");
    let infos: Vec<_> = TYPES
        .iter()
        .map(|ty| load_path(&folder.gguf("models/demo", *ty), Dtype::Auto, Isa::detect()).info_for(16, 1))
        .collect();
    let numerics: Vec<&str> = infos.iter().map(|info| info.numerics.0.as_str()).collect();
    let family = Isa::detect().order().family();
    let of_weights = ["bf16", "bf16+q8_0", "bf16+q4_0"].map(|weights| format!("{family}/tp1/{weights}/kv-bf16"));
    assert_eq!(numerics[..3], of_weights);
    // In tiles q8_0 is multiplied as bf16, whatever the rest is; 4 bits are integers anywhere.
    for (ty, family) in [(GgufType::Q8_0, "cpu-tiles-2"), (GgufType::Q4_0, "cpu-fold-2")] {
        let path = folder.gguf("models/demo", ty);
        let numerics = |isa| load_path(&path, Dtype::Float32, isa).numerics().0;
        let weights = if ty == GgufType::Q8_0 { "f32+q8_0" } else { "f32+q4_0" };
        assert_eq!(numerics(Isa::PORTABLE_TILES), format!("{family}/tp1/{weights}/kv-f32"));
        assert_eq!(numerics(Isa::PORTABLE), format!("cpu-fold-2/tp1/{weights}/kv-f32"));
    }
    for (i, a) in infos.iter().enumerate() {
        // Rows of 128 are no blocks of 256: this model has the same weights in q4_k_m and in q8_0.
        let others =
            infos[i + 1..].iter().filter(|b| (&a.numerics, &b.numerics) != (&infos[1].numerics, &infos[3].numerics));
        others.for_each(|b| assert_ne!(a.identity, b.identity));
    }
    let folder_model = load("models/demo", Dtype::Bfloat16).info_for(16, 1);
    assert_ne!(folder_model.identity, infos[1].identity);
}

#[test]
fn a_damaged_file_is_a_sentence() {
    let folder = Folder::new("damaged");
    let path = folder.gguf("tests/checkpoints/llama3-gqa", GgufType::Q8_0);
    let whole = fs::read(&path).unwrap();
    let damaged = folder.0.join("damaged.gguf");
    let load = |bytes: &[u8]| {
        // As a new file: what has the old one mapped keeps its bytes.
        let _ = fs::remove_file(&damaged);
        fs::write(&damaged, bytes).unwrap();
        let options = LoadOptions { dtype: Dtype::Auto, isa: Isa::detect(), threads: Some(2), cache_folder: None };
        Model::load_with(&damaged, options)
    };
    for len in (0..whole.len()).step_by(whole.len() / 60).chain([whole.len() - 40]) {
        let error = load(&whole[..len]).unwrap_err().to_string();
        assert!(error.contains("damaged.gguf is not a GGUF file that can be read: "), "{error}");
    }
    // Any byte of the header may be anything: a model or a sentence, never a panic.
    let mut num_refused = 0;
    for at in (0..6000).step_by(41) {
        for value in [0xff, 0x41] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            num_refused += usize::from(load(&bytes).is_err());
        }
    }
    assert!(num_refused > 20, "{num_refused}");
    let error = load(b"not a GGUF file at all").unwrap_err().to_string();
    assert!(error.ends_with("it does not begin with \"GGUF\""), "{error}");
}

#[test]
fn what_a_file_lacks_is_named_in_its_own_words() {
    let folder = Folder::new("lacks");
    let path = folder.gguf("tests/checkpoints/llama3-gqa", GgufType::Q8_0);
    let whole = fs::read(&path).unwrap();
    let changed = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        let changed = folder.0.join("changed.gguf");
        let _ = fs::remove_file(&changed);
        fs::write(&changed, bytes).unwrap();
        let options = LoadOptions { dtype: Dtype::Auto, isa: Isa::detect(), threads: Some(2), cache_folder: None };
        Model::load_with(&changed, options).unwrap_err().to_string()
    };
    assert!(changed("blk.1.attn_q.weight", "blk.1.attn_z.weight").contains("has no tensor blk.1.attn_q.weight"));
    assert!(changed("llama.block_count", "llama.block_kount").contains("`llama.block_count` is missing"));
    assert!(changed("llama.attention.head_count", "llama.attention.head_kount").contains("head_count` is missing"));
    assert!(changed("\u{5}\0\0\0\0\0\0\0llama", "\u{5}\0\0\0\0\0\0\0gemma").contains("architecture gemma"));
}

/// A Llama whose rows are whole blocks of 256, of random weights.
fn wide(folder: &Folder) -> PathBuf {
    use safetensors::tensor::{Dtype, TensorView};
    let (hidden, ffn, vocab, path) = (256, 512, 64, folder.0.join("wide"));
    fs::create_dir_all(&path).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![vocab, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
        ("lm_head.weight".to_string(), vec![vocab, hidden]),
    ];
    for layer in 0..3 {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        add("input_layernorm", &[hidden]);
        add("post_attention_layernorm", &[hidden]);
        add("self_attn.q_proj", &[hidden, hidden]);
        add("self_attn.k_proj", &[hidden / 2, hidden]);
        add("self_attn.v_proj", &[hidden / 2, hidden]);
        add("self_attn.o_proj", &[hidden, hidden]);
        add("mlp.gate_proj", &[ffn, hidden]);
        add("mlp.up_proj", &[ffn, hidden]);
        add("mlp.down_proj", &[hidden, ffn]);
    }
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .enumerate()
        .map(|(number, (_, shape))| {
            let value = |i: usize| match shape.len() {
                1 => 1.0,
                _ => ((kernels::uniform(number as u64, 0, i as u32) - 0.5) * 0.2) as f32,
            };
            (0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect()
        })
        .collect();
    let views = shapes
        .iter()
        .zip(&bytes)
        .map(|((name, shape), bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    fs::write(path.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocab,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    });
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    path
}

/// The same file with tensors stored in another way.
fn stored_again(path: &Path, name: impl Fn(&str) -> bool, ty: candle_core::quantized::GgmlDType) -> PathBuf {
    use candle_core::Device;
    use candle_core::quantized::{QTensor, gguf_file};
    let mut file = fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let tensors: Vec<(&str, QTensor)> = names
        .into_iter()
        .map(|tensor| {
            let stored = content.tensor(&mut file, tensor, &Device::Cpu).unwrap();
            if !name(tensor) {
                return (tensor.as_str(), stored);
            }
            (tensor.as_str(), QTensor::quantize(&stored.dequantize(&Device::Cpu).unwrap(), ty).unwrap())
        })
        .collect();
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let again = path.with_extension("again.gguf");
    gguf_file::write(&mut fs::File::create(&again).unwrap(), &metadata, &tensors).unwrap();
    again
}

/// The two 4-bit formats have codes and groups of one size: they differ in offset, blocks and minima.
#[test]
fn a_file_may_have_queries_in_q4_0_and_keys_in_q4_k() {
    let folder = Folder::new("four-bits");
    let path = folder.gguf(wide(&folder).to_str().unwrap(), GgufType::Q4_K_M);
    let is_query = |name: &str| name.ends_with("attn_q.weight");
    let path = stored_again(&path, is_query, candle_core::quantized::GgmlDType::Q4_0);
    let model = load_path(&path, Dtype::Float32, Isa::detect());
    assert_eq!(model.info_for(16, 1).numerics.0, "cpu-fold-2/tp1/f32+q4_0+q4_k+q6_k/kv-f32");
    let tokens = prompt(40, 64, 5);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let oracle = Oracle::new(model.spec(), &checkpoint).logits(&tokens).unwrap();
    let bound = 0.15 * spread(oracle.last().unwrap());
    let expected = log_softmax(oracle.last().unwrap());
    for (token, logprob) in top(&model, &tokens, 20) {
        let error = (logprob - expected[token as usize]).abs();
        assert!(error < bound, "{token}: {error} of {bound}");
    }
}

/// Value projections of 6 bits beside query and key projections of 4: one fused matrix of two formats.
#[test]
fn a_q4_k_m_file_mixes_formats_in_one_matrix() {
    let folder = Folder::new("mixed");
    let path = folder.gguf(wide(&folder).to_str().unwrap(), GgufType::Q4_K_M);
    let model = load_path(&path, Dtype::Float32, Isa::detect());
    assert_eq!(model.info_for(16, 1).numerics.0, "cpu-fold-2/tp1/f32+q4_k+q6_k/kv-f32");
    let tokens = prompt(40, 64, 5);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let oracle = Oracle::new(model.spec(), &checkpoint).logits(&tokens).unwrap();
    let bound = 0.15 * spread(oracle.last().unwrap());
    let expected = log_softmax(oracle.last().unwrap());
    let want = top(&model, &tokens, 20);
    for (token, logprob) in &want {
        let error = (logprob - expected[*token as usize]).abs();
        assert!(error < bound, "{token}: {error} of {bound}");
    }
    for &isa in Isa::available() {
        assert_eq!(top(&load_path(&path, Dtype::Float32, isa), &tokens, 20), want, "{isa:?}");
    }
}

#[test]
fn what_w8a8_has_no_scale_for_is_refused_and_what_no_model_asks_for_is_left_out() {
    use safetensors::tensor::{Dtype, SafeTensors, TensorView};
    let (folder, demo) = (Folder::new("w8a8-odd"), root().join("models/demo"));
    let source = folder.0.join("source");
    fs::create_dir_all(&source).unwrap();
    fs::copy(demo.join("config.json"), source.join("config.json")).unwrap();
    let bytes = fs::read(demo.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    // A scalar, and one that no model asks for; a projection in f32 whose first weight is `weight`.
    let projection = tensors.names().into_iter().find(|name| name.ends_with("down_proj.weight")).unwrap();
    let write = |weight: f32| {
        let shape = tensors.tensor(projection).unwrap().shape().to_vec();
        let mut values = vec![0.0f32; shape.iter().product()];
        values[0] = weight;
        let values: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut views: Vec<(String, TensorView<'_>)> = tensors
            .iter()
            .filter(|(name, _)| *name != projection)
            .map(|(name, view)| (name.to_string(), view))
            .collect();
        views.push((projection.to_string(), TensorView::new(Dtype::F32, shape, &values).unwrap()));
        views.push(("some.scalar".into(), TensorView::new(Dtype::F32, vec![], &values[..4]).unwrap()));
        views.push(("some.mask".into(), TensorView::new(Dtype::U8, vec![4], &values[..4]).unwrap()));
        fs::write(source.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    };
    for weight in [f32::NAN, f32::INFINITY] {
        write(weight);
        let error = w8a8::convert(&source, &folder.0.join("refused")).unwrap_err().to_string();
        assert!(error.contains(projection) && error.contains("infinite or no numbers"), "{error}");
    }
    assert!(!folder.0.join("refused").exists());
    write(2.0);
    let into = folder.0.join("into");
    w8a8::convert(&source, &into).unwrap();
    let bytes = fs::read(into.join("model.safetensors")).unwrap();
    let written = SafeTensors::deserialize(&bytes).unwrap();
    assert!(written.tensor("some.mask").is_err() && written.tensor("some.scalar").unwrap().shape().is_empty());
    // The rows of zeros behind the first have zeros for scales and codes.
    let codes = written.tensor(projection).unwrap();
    assert_eq!((codes.dtype(), codes.data()[0], codes.data().iter().skip(1).max()), (Dtype::I8, 127, Some(&0)));
    let scales = written.tensor(&format!("{projection}_scale")).unwrap();
    assert_eq!(scales.data()[..8], [(2.0f32 / 127.0).to_le_bytes(), [0; 4]].concat());
}

#[test]
fn a_w8a8_folder_is_the_model_of_its_dequantized_weights() {
    let folder = Folder::new("w8a8");
    let path = folder.0.join("w8a8");
    w8a8::convert(&root().join("models/demo"), &path).unwrap();
    assert!(path.join("tokenizer.json").exists() && path.join("chat_template.jinja").exists());
    let again = w8a8::convert(&path, &folder.0.join("again")).unwrap_err().to_string();
    assert!(again.contains("has quantized weights"), "{again}");
    let over = w8a8::convert(&root().join("models/demo"), &path).unwrap_err().to_string();
    assert!(over.contains("is not empty: name a folder that is"), "{over}");
    let model = load_path(&path, Dtype::Float32, Isa::detect());
    assert_eq!(model.info_for(16, 1).numerics.0, "cpu-fold-2/tp1/f32+w8a8/kv-f32");
    let tokens = prompt(40, model.spec().vocab_size as u32, 5);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let oracle = Oracle::new(model.spec(), &checkpoint).logits(&tokens).unwrap();
    let expected = log_softmax(oracle.last().unwrap());
    for (token, logprob) in top(&model, &tokens, 20) {
        // One scale for a whole token is coarser than one for 32 values.
        assert!((logprob - expected[token as usize]).abs() < 0.4, "{token}: {logprob}");
    }
    let bits = |isa| top(&load_path(&path, Dtype::Auto, isa), &tokens, 20);
    for &isa in Isa::available() {
        assert_eq!(bits(isa), bits(isa.reference()), "{isa:?}");
    }
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4.into();
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    let error = ModelSpec::read(&path).unwrap_err().to_string();
    assert!(error.contains("expected compressed-tensors with 8-bit weights per channel"), "{error}");
}
