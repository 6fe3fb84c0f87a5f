//! The tensors of a model: a Hugging Face folder (one `model.safetensors`, or shards behind an index) or a GGUF
//! file. Whatever they are called and however they are stored there, they have Hugging Face's names and order of
//! rows here; quantized ones come as [`QuantizedWeights`].
//!
//! Files are mapped, never read whole. Everything that can be wrong with them is said in a sentence that
//! names the file, the tensor, what was expected and what was found; nothing in a file can make this panic.
//! The one exception is a file that another process truncates while it is mapped: the system then ends this
//! process, as it does for every program that maps files.
#![allow(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use common::gguf::{GgmlType, Gguf};
use half::{bf16, f16};
use kernels::QuantizedWeights;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::gguf::names::{self, InterleavedHeads};
use crate::gguf::{blocks, config, is_gguf};
use crate::spec::{self, ModelSpec, SpecError};
use crate::weights::Stacked;

/// Why a checkpoint cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Neither a single file nor an index.
    #[error(
        "{} has no weights: expected model.safetensors, or model.safetensors.index.json with the shards it names",
        folder.display()
    )]
    NoWeights {
        /// Which folder.
        folder: PathBuf,
    },
    /// The index is not what it should be.
    #[error("{} is not an index of shards: {reason}", path.display())]
    Index {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A shard that the index names is not there.
    #[error("{} names the shard {shard} for tensor {tensor}, but {} is missing: the download is incomplete", index.display(), path.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The shard's name.
        shard: String,
        /// A tensor in it.
        tensor: String,
        /// Where it should be.
        path: PathBuf,
    },
    /// The system would not read the file.
    #[error("{} cannot be read: {reason}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Not a safetensors file.
    #[error("{} is not a safetensors file: {reason}", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Not a GGUF file, or not a whole one.
    #[error("{} is not a GGUF file that can be read: {reason}", path.display())]
    Gguf {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Shorter or longer than its header says.
    #[error("{} has {found} bytes, its header describes {expected}: the file is truncated or damaged, download it again", path.display())]
    Size {
        /// Which file.
        path: PathBuf,
        /// Bytes there.
        found: u64,
        /// Bytes described.
        expected: u64,
    },
    /// The model needs a tensor that is not there.
    #[error("{} has no tensor {tensor}, expected {} of shape {shape:?}", path.display(), "f32, f16 or bf16")]
    MissingTensor {
        /// File or index.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("{}: tensor {tensor} has shape {found:?}, {implied_by} implies {expected:?}", path.display())]
    Shape {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
        /// `config.json`, or the metadata of a GGUF file.
        implied_by: &'static str,
    },
    /// A tensor has a type that is not read.
    #[error("{}: tensor {tensor} is {found}, supported are {supported}", path.display())]
    Dtype {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its type.
        found: String,
        /// What would do.
        supported: &'static str,
    },
    /// The index could not be read as JSON.
    #[error(transparent)]
    Json(#[from] SpecError),
}

/// An opened checkpoint.
pub struct Checkpoint {
    files: Vec<MappedFile>,
    tensors: HashMap<String, TensorPlace>,
    /// What errors about missing tensors name.
    source: PathBuf,
    /// The shape that a GGUF file states.
    gguf_spec: Option<ModelSpec>,
}

struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

struct TensorPlace {
    file: usize,
    stored: Stored,
    shape: Vec<usize>,
    bytes: Range<usize>,
    interleaved: Option<InterleavedHeads>,
}

/// How a file stores a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Safetensors(Dtype),
    Ggml(GgmlType),
}

impl Stored {
    fn float(self) -> Option<FloatDtype> {
        match self {
            Stored::Safetensors(Dtype::F32) | Stored::Ggml(GgmlType::F32) => Some(FloatDtype::F32),
            Stored::Safetensors(Dtype::F16) | Stored::Ggml(GgmlType::F16) => Some(FloatDtype::F16),
            Stored::Safetensors(Dtype::BF16) | Stored::Ggml(GgmlType::Bf16) => Some(FloatDtype::Bf16),
            _ => None,
        }
    }

    /// The format of quantized weights, as the numerics id names it; `None` for numbers.
    fn quantized(self) -> Option<String> {
        match self {
            Stored::Safetensors(Dtype::I8) => Some("w8a8".to_string()),
            Stored::Ggml(ty) if self.float().is_none() => Some(ty.name().to_lowercase()),
            _ => None,
        }
    }

    fn name(self) -> String {
        match self {
            Stored::Safetensors(dtype) => format!("{dtype:?}"),
            Stored::Ggml(ty) => ty.name(),
        }
    }

    fn supported(self) -> &'static str {
        match self {
            Stored::Safetensors(_) => "f32, f16 and bf16",
            Stored::Ggml(_) => "F32, F16, BF16, Q8_0, Q4_0, Q4_K and Q6_K",
        }
    }
}

impl Checkpoint {
    /// Maps the safetensors files of a folder, or a GGUF file, and checks that each is as long as its header says.
    ///
    /// # Errors
    /// [`CheckpointError`]: no weights, a bad index, a missing shard, an unreadable, malformed or truncated file.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        if is_gguf(folder) {
            return Self::open_gguf(folder);
        }
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        let (source, paths) = if index.exists() {
            let paths = shards(folder, &index)?;
            (index, paths)
        } else if single.exists() {
            (single.clone(), vec![single])
        } else {
            return Err(CheckpointError::NoWeights { folder: folder.to_path_buf() });
        };
        let mut checkpoint = Self { files: Vec::new(), tensors: HashMap::new(), source, gguf_spec: None };
        for path in paths {
            checkpoint.add_file(path)?;
        }
        Ok(checkpoint)
    }

    fn open_gguf(path: &Path) -> Result<Self, CheckpointError> {
        let map = map(path)?;
        let gguf_error =
            |error: common::gguf::GgufError| CheckpointError::Gguf { path: path.into(), reason: error.to_string() };
        let gguf = Gguf::parse(&map).map_err(gguf_error)?;
        let rope_factors = match gguf.tensor("rope_freqs.weight") {
            Some(info) => {
                let bytes = gguf.bytes_of("rope_freqs.weight", info, map.len()).map_err(gguf_error)?;
                let bytes = bytes.filter(|_| info.ty == GgmlType::F32).map_or(&[][..], |range| &map[range]);
                Some(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            None => None,
        };
        let spec = config::spec(path, &gguf, rope_factors)?;
        let interleaved = config::interleaved_heads(&spec);
        let mut tensors = HashMap::new();
        for (name, info) in gguf.tensors() {
            let Some(name) = names::to_hugging_face(name) else { continue };
            // Types that are not read are refused when such a tensor is asked for.
            let bytes = gguf.bytes_of(&name, info, map.len()).map_err(gguf_error)?.unwrap_or(0..0);
            let heads = interleaved.iter().find(|(part, _)| name.contains(part)).and_then(|(_, heads)| *heads);
            let place = TensorPlace {
                file: 0,
                stored: Stored::Ggml(info.ty),
                shape: info.shape.clone(),
                bytes,
                interleaved: heads.filter(|heads| heads.fits(info.shape[0])),
            };
            tensors.insert(name, place);
        }
        let files = vec![MappedFile { path: path.to_path_buf(), map }];
        Ok(Self { files, tensors, source: path.to_path_buf(), gguf_spec: Some(spec) })
    }

    /// The shape that the checkpoint itself states: a GGUF file does, a folder has a `config.json`.
    pub fn stated_spec(&self) -> Option<&ModelSpec> {
        self.gguf_spec.as_ref()
    }

    /// The formats of quantized tensors, for the numerics id; empty if there are none.
    pub fn quantized_formats(&self) -> BTreeSet<String> {
        self.tensors.values().filter_map(|place| place.stored.quantized()).collect()
    }

    fn add_file(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let map = map(&path)?;
        let malformed = |reason: String| CheckpointError::Malformed { path: path.clone(), reason };
        let found = map.len() as u64;
        let (header_len, metadata) = match SafeTensors::read_metadata(&map) {
            Ok(read) => read,
            Err(error) => {
                return Err(match described_size(&map) {
                    Some(expected) if expected != found => CheckpointError::Size { path, found, expected },
                    _ => malformed(format!("{error} (the file has {found} bytes)")),
                });
            }
        };
        let start = header_len + 8;
        for (name, info) in metadata.tensors() {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            let (stored, shape) = (Stored::Safetensors(info.dtype), info.shape.clone());
            let place = TensorPlace { file: self.files.len(), stored, shape, bytes, interleaved: None };
            self.tensors.insert(name, place);
        }
        self.files.push(MappedFile { path, map });
        Ok(())
    }

    /// The files, in the order they were opened.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The size of a tensor in its file, and the format if it is quantized; `None` if it is not there.
    pub(crate) fn size_of(&self, name: &str) -> Option<(u64, Option<String>)> {
        let place = self.tensors.get(name)?;
        Some((place.bytes.len() as u64, place.stored.quantized()))
    }

    /// The size in its files of what `matrices` are stacked of.
    pub(crate) fn num_bytes_of(&self, matrices: impl Iterator<Item = Stacked>) -> u64 {
        let tensors = matrices.flat_map(|matrix| matrix.parts);
        tensors.filter_map(|(name, _)| self.size_of(&name)).map(|(num_bytes, _)| num_bytes).sum()
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All tensors by name: (name, type, shape, bytes).
    pub(crate) fn sorted(&self) -> Vec<(&str, String, &[usize], &[u8])> {
        let mut all: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, place)| (name.as_str(), place.stored.name(), place.shape.as_slice(), self.bytes(place)))
            .collect();
        all.sort_by_key(|tensor| tensor.0);
        all
    }

    fn bytes(&self, place: &TensorPlace) -> &[u8] {
        // Offsets were checked against the header's size, and that against the file's.
        &self.files[place.file].map[place.bytes.clone()]
    }

    /// A tensor of exactly `shape`.
    ///
    /// # Errors
    /// It is missing, or has another shape, or a type that is not read.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<CheckpointTensor<'_>, CheckpointError> {
        // In errors, the name that is in the file.
        let shown = match self.gguf_spec {
            Some(_) => names::to_gguf(name).unwrap_or_else(|| name.to_string()),
            None => name.to_string(),
        };
        let place = self.tensors.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            path: self.source.clone(),
            tensor: shown.clone(),
            shape: shape.to_vec(),
        })?;
        let path = || self.files[place.file].path.clone();
        if place.shape != shape {
            return Err(CheckpointError::Shape {
                path: path(),
                tensor: shown,
                found: place.shape.clone(),
                expected: shape.to_vec(),
                implied_by: if self.gguf_spec.is_some() { "the metadata" } else { "config.json" },
            });
        }
        // One number has no shape.
        let rows = shape.first().copied().unwrap_or(1);
        let tensor = CheckpointTensor {
            stored: place.stored,
            bytes: self.bytes(place),
            rows,
            cols: shape.iter().skip(1).product(),
            interleaved: place.interleaved,
            row_scales: match place.stored {
                Stored::Safetensors(Dtype::I8) => self.row_scales(name, rows),
                _ => None,
            },
        };
        let is_read = match place.stored {
            Stored::Safetensors(Dtype::I8) => tensor.row_scales.is_some() && tensor.cols < 1 << 17,
            Stored::Safetensors(_) => place.stored.float().is_some(),
            Stored::Ggml(ty) => ty.block().is_some(),
        };
        if !is_read {
            let found = match place.stored {
                Stored::Safetensors(dtype) => format!("{dtype:?}").to_lowercase(),
                Stored::Ggml(ty) => ty.name(),
            };
            let supported = place.stored.supported();
            return Err(CheckpointError::Dtype { path: path(), tensor: shown, found, supported });
        }
        Ok(tensor)
    }

    /// The scales beside 8-bit weights, one for each row; `None` unless they are all there.
    fn row_scales(&self, name: &str, rows: usize) -> Option<Vec<f32>> {
        let place = self.tensors.get(&format!("{name}_scale"))?;
        let float = place.stored.float()?;
        let is_per_row = place.shape == [rows] || place.shape == [rows, 1];
        is_per_row.then(|| float.widen(self.bytes(place)))
    }

    /// The type of a tensor, if it is there and of a type that is read.
    pub fn dtype_of(&self, name: &str) -> Option<FloatDtype> {
        self.tensors.get(name)?.stored.float()
    }
}

/// Maps a file.
fn map(path: &Path) -> Result<Mmap, CheckpointError> {
    let unreadable =
        |error: std::io::Error| CheckpointError::Unreadable { path: path.to_path_buf(), reason: error.to_string() };
    let file = File::open(path).map_err(unreadable)?;
    // SAFETY: the map is only read. That the file is not cut while it is mapped is up to the operator, as
    // the module says; its content changing would change weights, not memory safety.
    unsafe { Mmap::map(&file) }.map_err(unreadable)
}

/// The types of numbers that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatDtype {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatDtype {
    /// Values as they lie, widened exactly.
    pub(crate) fn widen(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            FloatDtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            FloatDtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            FloatDtype::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        }
    }
}

/// A tensor as the file stores it.
pub struct CheckpointTensor<'a> {
    stored: Stored,
    bytes: &'a [u8],
    rows: usize,
    /// 1 for a vector.
    cols: usize,
    interleaved: Option<InterleavedHeads>,
    /// Of 8-bit weights with one scale per row.
    row_scales: Option<Vec<f32>>,
}

impl<'a> CheckpointTensor<'a> {
    /// Integers and scales; `None` if the file stores numbers.
    pub fn to_quantized(&self) -> Option<QuantizedWeights> {
        let (rows, cols) = (self.rows, self.cols);
        match (self.stored, &self.row_scales) {
            (Stored::Ggml(ty), _) => blocks::quantized(ty, self.bytes, rows, cols, |row| self.source_row(row)),
            (Stored::Safetensors(_), Some(scales)) => Some(QuantizedWeights {
                rows,
                cols,
                bits: 8,
                offset: 128,
                group: cols,
                block: cols,
                codes: self.bytes.iter().map(|q| q ^ 0x80).collect(), // i8 + 128
                scales: scales.clone(),
                group_scales: None,
                mins: None,
            }),
            (Stored::Safetensors(_), None) => None,
        }
    }

    /// Its size in the file, without scales that are a tensor of their own.
    pub fn num_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All values, widened exactly or dequantized.
    pub fn to_f32(&self) -> Vec<f32> {
        let Some(float) = self.stored.float() else {
            return self.to_quantized().expect("what is read is numbers or quantized").dequantize();
        };
        if self.interleaved.is_none() {
            return float.widen(self.bytes);
        }
        let row_bytes = self.bytes.len() / self.rows;
        let row = |row: usize| float.widen(&self.bytes[self.source_row(row) * row_bytes..][..row_bytes]);
        (0..self.rows).flat_map(row).collect()
    }

    /// The bytes of all values where they lie in the file, and their type; `None` if the file stores no numbers, or
    /// rows in another order.
    pub fn stored(&self) -> Option<(FloatDtype, &'a [u8])> {
        let dtype = self.stored.float().filter(|_| self.interleaved.is_none())?;
        Some((dtype, self.bytes))
    }

    fn source_row(&self, row: usize) -> usize {
        self.interleaved.map_or(row, |heads| heads.source_row(row, self.rows))
    }
}

/// How long the header of a file says that the file is, if it can be read that far.
fn described_size(map: &[u8]) -> Option<u64> {
    let (len, rest) = map.split_first_chunk()?;
    let len = u64::from_le_bytes(*len);
    let header: Value = serde_json::from_slice(rest.get(..usize::try_from(len).ok()?)?).ok()?;
    let ends = header.as_object()?.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
    ends.max().unwrap_or(0).checked_add(len)?.checked_add(8)
}

/// The distinct files an index names, in order of name.
fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let object = spec::read_object(index)?;
    let bad = |reason: &str| CheckpointError::Index { path: index.to_path_buf(), reason: reason.to_string() };
    let map = object.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("it has no `weight_map`"))?;
    let mut shards: Vec<(&str, &str)> = Vec::new();
    for (tensor, shard) in map {
        let shard = shard
            .as_str()
            .ok_or_else(|| bad(&format!("tensor {tensor} is mapped to {shard}, expected a file name")))?;
        if Path::new(shard).file_name().is_none_or(|name| name != shard) {
            return Err(bad(&format!("tensor {tensor} is mapped to {shard:?}, expected a file in the same folder")));
        }
        shards.push((shard, tensor));
    }
    shards.sort_unstable();
    shards.dedup_by_key(|(shard, _)| *shard);
    if shards.is_empty() {
        return Err(bad("it names no tensor"));
    }
    shards
        .into_iter()
        .map(|(shard, tensor)| {
            let path = folder.join(shard);
            if path.exists() {
                return Ok(path);
            }
            let (shard, tensor) = (shard.to_string(), tensor.to_string());
            Err(CheckpointError::MissingShard { index: index.to_path_buf(), shard, tensor, path })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_folder::TestFolder;
    use safetensors::tensor::TensorView;

    fn write(folder: &TestFolder, name: &str, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> PathBuf {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
        folder.write(name, &safetensors::serialize(views, None).unwrap())
    }

    fn ramp() -> Vec<u8> {
        [1.0f32, -2.5, 1e-3, 70_000.0].iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn values_of_every_type_are_widened_exactly() {
        let folder = TestFolder::new("dtypes");
        let halves: Vec<u8> = [1.0f32, -2.5].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let brains: Vec<u8> = [1.0f32, -2.5].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let single = [1.0f32, 1.003_906_3].iter().flat_map(|x| x.to_le_bytes()).collect();
        write(
            &folder,
            "model.safetensors",
            &[("h", Dtype::F16, &[2], halves), ("b", Dtype::BF16, &[2], brains), ("f", Dtype::F32, &[2], single)],
        );
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.tensor("h", &[2]).unwrap().to_f32(), [1.0, -2.5]);
        assert_eq!(checkpoint.tensor("b", &[2]).unwrap().to_f32(), [1.0, -2.5]);
        assert_eq!(checkpoint.tensor("f", &[2]).unwrap().to_f32(), [1.0, 1.003_906_3]);
    }

    #[test]
    fn missing_and_misshapen_tensors_are_named_with_both_shapes() {
        let folder = TestFolder::new("shapes");
        let path = write(&folder, "model.safetensors", &[("a.weight", Dtype::F32, &[2, 2], ramp())]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let error = |name: &str, shape: &[usize]| checkpoint.tensor(name, shape).err().unwrap().to_string();
        let path = path.display();
        assert_eq!(
            error("a.weight", &[4]),
            format!("{path}: tensor a.weight has shape [2, 2], config.json implies [4]")
        );
        assert_eq!(
            error("b.weight", &[4]),
            format!("{path} has no tensor b.weight, expected f32, f16 or bf16 of shape [4]")
        );
        write(&folder, "model.safetensors", &[("a.weight", Dtype::I32, &[2, 2], ramp())]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let error = checkpoint.tensor("a.weight", &[2, 2]).err().unwrap().to_string();
        assert_eq!(error, format!("{path}: tensor a.weight is i32, supported are f32, f16 and bf16"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let folder = TestFolder::new("truncated");
        let path = write(&folder, "model.safetensors", &[("a", Dtype::F32, &[4], ramp())]);
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            folder.write("model.safetensors", &bytes[..len]);
            let error = Checkpoint::open(folder.path()).err().expect("cut files are refused").to_string();
            assert!(error.starts_with(&path.display().to_string()), "{error}");
        }
        folder.write("model.safetensors", &bytes[..bytes.len() - 1]);
        let error = Checkpoint::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains(&format!("has {} bytes, its header describes {}", bytes.len() - 1, bytes.len())));
    }

    #[test]
    fn shards_are_found_through_the_index_and_missed_by_name() {
        let folder = TestFolder::new("shards");
        write(&folder, "one.safetensors", &[("a", Dtype::F32, &[4], ramp())]);
        write(&folder, "two.safetensors", &[("b", Dtype::F32, &[2, 2], ramp())]);
        folder.write(
            "model.safetensors.index.json",
            br#"{"weight_map": {"b": "two.safetensors", "a": "one.safetensors"}}"#,
        );
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.files().count(), 2);
        assert_eq!(checkpoint.tensor("b", &[2, 2]).unwrap().to_f32()[3], 70_000.0);
        folder.write("model.safetensors.index.json", br#"{"weight_map": {"b": "gone.safetensors"}}"#);
        let error = Checkpoint::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("names the shard gone.safetensors for tensor b"), "{error}");
        folder.write("model.safetensors.index.json", br#"{"weight_map": {"b": "../etc/passwd"}}"#);
        let error = Checkpoint::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("expected a file in the same folder"), "{error}");
    }

    #[test]
    fn an_empty_folder_says_what_was_looked_for() {
        let folder = TestFolder::new("empty");
        let error = Checkpoint::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("expected model.safetensors, or model.safetensors.index.json"), "{error}");
    }
}
