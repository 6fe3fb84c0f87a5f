//! A Hugging Face folder of numbers becomes one of 8-bit weights with a scale for each row and activations quantized as
//! they come (W8A8), as compressed-tensors writes it.
//!
//! Projections are quantized to the nearest, each row by its largest weight, without looking at any text: enough to
//! measure with, and coarser than what a calibrating tool makes of a trained model.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, View};
use serde_json::json;

use crate::checkpoint::{Checkpoint, CheckpointError, CheckpointTensor, FloatDtype};
use crate::spec::{ModelSpec, SpecError, read_object};

/// Why a folder did not become such a folder.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Its configuration.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// It is quantized already.
    #[error("{} has quantized weights: W8A8 is made of a folder of f32, f16 or bf16 weights", folder.display())]
    Quantized {
        /// Which folder.
        folder: PathBuf,
    },
    /// A weight is no number.
    #[error(
        "tensor {tensor} of {} has weights that are infinite or no numbers, for which there is no scale",
        folder.display()
    )]
    NotFinite {
        /// Which folder.
        folder: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// What is there would become a part of the model.
    #[error("{} is not empty: name a folder that is, or is not there yet", folder.display())]
    Occupied {
        /// Which folder.
        folder: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// Writes the model in `folder` to the folder `into`, which is empty or made: whatever describes the model, and all
/// weights in one file.
///
/// # Errors
/// [`WriteError`].
pub fn convert(folder: &Path, into: &Path) -> Result<(), WriteError> {
    ModelSpec::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    if !checkpoint.quantized_formats().is_empty() {
        return Err(WriteError::Quantized { folder: folder.to_path_buf() });
    }
    let tensors = tensors(folder, &checkpoint)?;
    let failed = |path: &Path, reason: String| WriteError::File { path: path.to_path_buf(), reason };
    fs::create_dir_all(into).map_err(|error| failed(into, error.to_string()))?;
    if fs::read_dir(into).map_err(|error| failed(into, error.to_string()))?.next().is_some() {
        return Err(WriteError::Occupied { folder: into.to_path_buf() });
    }
    let weights = into.join("model.safetensors");
    // Transformers reads no file that does not say so.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), &weights)
        .map_err(|error| failed(&weights, error.to_string()))?;
    // The library's file is its owner's alone.
    let permissions = checkpoint.files().next().and_then(|file| fs::metadata(file).ok()).map(|file| file.permissions());
    if let Some(permissions) = permissions {
        fs::set_permissions(&weights, permissions).map_err(|error| failed(&weights, error.to_string()))?;
    }
    copy_descriptions(folder, into)?;
    // Last: without it a folder is no model.
    let config_path = into.join("config.json");
    let mut config = read_object(&folder.join("config.json"))?;
    let eight_bits = |strategy: &str, is_dynamic: bool| {
        let mut kind = json!({"num_bits": 8, "type": "int", "symmetric": true});
        (kind["strategy"], kind["dynamic"]) = (strategy.into(), is_dynamic.into());
        kind
    };
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": eight_bits("channel", false),
            "input_activations": eight_bits("token", true),
        }},
    });
    fs::write(&config_path, format!("{config:#}\n")).map_err(|error| failed(&config_path, error.to_string()))
}

/// All tensors of numbers, projections as codes and scales. Whatever else a file holds no model of ours asks for.
fn tensors<'a>(folder: &Path, checkpoint: &'a Checkpoint) -> Result<Vec<(String, Written<'a>)>, WriteError> {
    let mut tensors = Vec::new();
    for (name, _, shape, _) in checkpoint.sorted() {
        let is_projection = name.ends_with("_proj.weight") && shape.len() == 2;
        if !is_projection && checkpoint.dtype_of(name).is_none() {
            continue;
        }
        let tensor = checkpoint.tensor(name, shape)?;
        if is_projection {
            if !tensor.to_f32().iter().all(|weight| weight.is_finite()) {
                return Err(WriteError::NotFinite { folder: folder.to_path_buf(), tensor: name.to_string() });
            }
            let (tensor, shape) = (checkpoint.tensor(name, shape)?, vec![shape[0], 1]);
            tensors.push((format!("{name}_scale"), Written { tensor, shape, part: Part::Scales }));
        }
        let part = if is_projection { Part::Codes } else { Part::Numbers };
        tensors.push((name.to_string(), Written { tensor, shape: shape.to_vec(), part }));
    }
    Ok(tensors)
}

/// Tokenizer, template and the like, by the ends of their names.
fn copy_descriptions(folder: &Path, into: &Path) -> Result<(), WriteError> {
    let failed =
        |path: &Path, error: std::io::Error| WriteError::File { path: path.to_path_buf(), reason: error.to_string() };
    for entry in fs::read_dir(folder).map_err(|error| failed(folder, error))? {
        let path = entry.map_err(|error| failed(folder, error))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_description = [".json", ".jinja", ".txt", ".model", ".tiktoken"].iter().any(|end| name.ends_with(end))
            && name != "config.json"
            && !name.ends_with(".index.json");
        if is_description && path.is_file() {
            fs::copy(&path, into.join(&*name)).map_err(|error| failed(&path, error))?;
        }
    }
    Ok(())
}

/// A tensor to be written, made when its turn comes.
struct Written<'a> {
    tensor: CheckpointTensor<'a>,
    shape: Vec<usize>,
    part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// As they lie in the file.
    Numbers,
    /// The 8-bit weights of a matrix.
    Codes,
    /// Their scales.
    Scales,
}

/// What the largest weight of a row is 127 of; zero for a row of zeros.
fn scale(row: &[f32]) -> f32 {
    row.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        match (self.part, self.tensor.stored().map(|(dtype, _)| dtype)) {
            (Part::Codes, _) => Dtype::I8,
            (Part::Scales, _) | (Part::Numbers, None | Some(FloatDtype::F32)) => Dtype::F32,
            (Part::Numbers, Some(FloatDtype::F16)) => Dtype::F16,
            (Part::Numbers, Some(FloatDtype::Bf16)) => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if let (Part::Numbers, Some((_, bytes))) = (self.part, self.tensor.stored()) {
            return bytes.into();
        }
        let values = self.tensor.to_f32();
        let rows = values.chunks((values.len() / self.shape.first().copied().unwrap_or(1).max(1)).max(1));
        let quantized = |row: &[f32]| {
            let scale = scale(row);
            // Zero over zero is NaN, of which the code is 0.
            row.iter().map(|x| (x / scale).round() as i8 as u8).collect::<Vec<u8>>()
        };
        let bytes: Vec<u8> = match self.part {
            Part::Numbers => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Part::Codes => rows.flat_map(quantized).collect(),
            Part::Scales => rows.flat_map(|row| scale(row).to_le_bytes()).collect(),
        };
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}
