//! The GGUF container, version 2 and 3: metadata and a table of tensors, read from bytes that nobody vouches for.
//!
//! ```text
//! "GGUF" version | number of tensors, of metadata | metadata: key, type, value ... |
//! tensors: name, dimensions, type, offset ... | padding | data
//! ```
//!
//! [`Gguf::parse`] borrows from the bytes and copies nothing but the names' table, so what it allocates is
//! bounded by what it was given. It reads a file's beginning as well as a whole file: a reader that wants the
//! metadata alone (the proxy, for the tokenizer) needs no tensor. Whatever is wrong is a [`GgufError`].
//!
//! It does not know what keys mean: that is read by the engine (shapes) and by the proxy (tokenizer).

mod value;

use std::collections::HashMap;
use std::ops::Range;

use value::Cursor;
pub use value::{Array, Value};

/// The header at most: 512 MiB, many times that of the largest vocabulary.
pub const HEADER_BYTES_MAX: usize = 512 << 20;

/// Entries of metadata at most.
const NUM_METADATA_MAX: u64 = 1 << 16;

/// Tensors at most.
const NUM_TENSORS_MAX: u64 = 1 << 20;

/// Why bytes are not a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// Another kind of file.
    #[error("it does not begin with \"GGUF\"")]
    NotGguf,
    /// A version that is not read.
    #[error("it is GGUF version {found}, versions 2 and 3 are read")]
    Version {
        /// What it says.
        found: u32,
    },
    /// The bytes end before the header does: more bytes may help.
    #[error("it ends in the middle of its header, at byte {at}")]
    Truncated {
        /// How many bytes there were.
        at: usize,
    },
    /// Something that cannot be.
    #[error("{reason}")]
    Malformed {
        /// What.
        reason: String,
    },
}

pub(crate) fn malformed(reason: String) -> GgufError {
    GgufError::Malformed { reason }
}

/// Types of tensors, by ggml's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // ggml's names
pub enum GgmlType {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 4 bits, an f16 scale for 32.
    Q4_0,
    /// 8 bits, an f16 scale for 32.
    Q8_0,
    /// 4 bits, scales and minima for 32 in blocks of 256.
    Q4_K,
    /// 6 bits, scales for 16 in blocks of 256.
    Q6_K,
    /// One that is not read, by its number.
    Other(u32),
}

impl GgmlType {
    /// By its number in the file.
    pub fn of(number: u32) -> Self {
        match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            14 => Self::Q6_K,
            30 => Self::Bf16,
            other => Self::Other(other),
        }
    }

    /// Its name, as llama.cpp prints it.
    pub fn name(self) -> String {
        let name = match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 => "Q8_0",
            Self::Q4_K => "Q4_K",
            Self::Q6_K => "Q6_K",
            Self::Other(number) => {
                let names = [
                    (3, "Q4_1"),
                    (6, "Q5_0"),
                    (7, "Q5_1"),
                    (10, "Q2_K"),
                    (11, "Q3_K"),
                    (13, "Q5_K"),
                    (16, "IQ2_XXS"),
                    (17, "IQ2_XS"),
                    (18, "IQ3_XXS"),
                    (19, "IQ1_S"),
                    (20, "IQ4_NL"),
                    (21, "IQ3_S"),
                    (22, "IQ2_S"),
                    (23, "IQ4_XS"),
                    (34, "TQ1_0"),
                    (35, "TQ2_0"),
                    (39, "MXFP4"),
                ];
                return names
                    .iter()
                    .find(|(n, _)| *n == number)
                    .map_or(format!("type {number}"), |(_, name)| (*name).to_string());
            }
        };
        name.to_string()
    }

    /// (values, bytes) of a block; `None` if the type is not read.
    pub fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::F32 => Some((1, 4)),
            Self::F16 | Self::Bf16 => Some((1, 2)),
            Self::Q4_0 => Some((32, 18)),
            Self::Q8_0 => Some((32, 34)),
            Self::Q4_K => Some((256, 144)),
            Self::Q6_K => Some((256, 210)),
            Self::Other(_) => None,
        }
    }
}

/// A tensor as the table describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// How its values are stored.
    pub ty: GgmlType,
    /// Outermost dimension first: `[rows, cols]`, the reverse of the file's order.
    pub shape: Vec<usize>,
    /// Where in the data its bytes begin.
    offset: u64,
}

impl TensorInfo {
    /// Its bytes; `None` if the type is not read, a row is not whole blocks, or no computer has as many.
    fn num_bytes(&self) -> Option<usize> {
        let (values, bytes) = self.ty.block()?;
        let cols = *self.shape.last()?;
        let elements = self.shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
        cols.is_multiple_of(values).then_some(elements / values)?.checked_mul(bytes)
    }
}

/// A parsed header.
#[derive(Debug)]
pub struct Gguf<'a> {
    metadata: HashMap<&'a str, Value<'a>>,
    tensors: HashMap<&'a str, TensorInfo>,
    data_start: usize,
}

impl<'a> Gguf<'a> {
    /// Reads the metadata at the beginning of a file, and no tensors.
    ///
    /// # Errors
    /// [`GgufError`]; [`GgufError::Truncated`] if `bytes` end too early.
    pub fn parse_metadata(bytes: &'a [u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(bytes);
        let (_, metadata) = read_metadata(&mut cursor)?;
        Ok(Self { metadata, tensors: HashMap::new(), data_start: cursor.at() })
    }

    /// Reads the header of a file.
    ///
    /// # Errors
    /// [`GgufError`]; [`GgufError::Truncated`] if `bytes` end too early.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(bytes);
        let (num_tensors, metadata) = read_metadata(&mut cursor)?;
        let mut tensors = HashMap::new();
        for _ in 0..num_tensors {
            let name = cursor.text()?;
            let num_dims = cursor.u32()?;
            if !(1..=4).contains(&num_dims) {
                return Err(malformed(format!("tensor {name:?} has {num_dims} dimensions, expected 1 to 4")));
            }
            let mut shape = Vec::new();
            for _ in 0..num_dims {
                let dim = cursor.u64()?;
                let dim = usize::try_from(dim).ok().filter(|dim| *dim > 0);
                shape.insert(0, dim.ok_or_else(|| malformed(format!("tensor {name:?} has an impossible dimension")))?);
            }
            let info = TensorInfo { ty: GgmlType::of(cursor.u32()?), shape, offset: cursor.u64()? };
            if tensors.insert(name, info).is_some() {
                return Err(malformed(format!("tensor {name:?} is there twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(value) => value
                .as_u64()
                .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
                .ok_or_else(|| malformed("general.alignment is not a power of two up to 1048576".to_string()))?,
        };
        let data_start = cursor.at().next_multiple_of(alignment as usize);
        Ok(Self { metadata, tensors, data_start })
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value<'a>> {
        self.metadata.get(key)
    }

    /// The value of a key, if it is text.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.value(key)?.as_text()
    }

    /// The tensors, in no order.
    pub fn tensors(&self) -> impl Iterator<Item = (&'a str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (*name, info))
    }

    /// A tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Where in a file of `file_len` bytes a tensor's bytes are; `None` for a type that is not read.
    ///
    /// # Errors
    /// The tensor's rows are not whole blocks, or its bytes are not all in the file.
    pub fn bytes_of(&self, name: &str, info: &TensorInfo, file_len: usize) -> Result<Option<Range<usize>>, GgufError> {
        let Some((values, _)) = info.ty.block() else { return Ok(None) };
        let shape = &info.shape;
        let num_bytes = info.num_bytes().ok_or_else(|| {
            let ty = info.ty.name();
            malformed(format!("tensor {name:?} of shape {shape:?} cannot be {ty}, whose blocks have {values} values"))
        })?;
        let start = usize::try_from(info.offset).ok().and_then(|offset| self.data_start.checked_add(offset));
        let end = start.and_then(|start| start.checked_add(num_bytes)).filter(|end| *end <= file_len);
        match start.zip(end) {
            Some((start, end)) => Ok(Some(start..end)),
            None => Err(malformed(format!(
                "tensor {name:?} needs {num_bytes} bytes from {} of the data on, the file has {file_len} in all: it is truncated or damaged, download it again",
                info.offset
            ))),
        }
    }
}

/// Number of tensors, and the metadata.
fn read_metadata<'a>(cursor: &mut Cursor<'a>) -> Result<(u64, HashMap<&'a str, Value<'a>>), GgufError> {
    if cursor.bytes(4)? != b"GGUF" {
        return Err(GgufError::NotGguf);
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version { found: version });
    }
    let (num_tensors, num_metadata) = (cursor.u64()?, cursor.u64()?);
    if num_tensors > NUM_TENSORS_MAX || num_metadata > NUM_METADATA_MAX {
        return Err(malformed(format!(
            "it claims {num_tensors} tensors and {num_metadata} entries of metadata, at most {NUM_TENSORS_MAX} and {NUM_METADATA_MAX} are read"
        )));
    }
    let mut metadata = HashMap::new();
    for _ in 0..num_metadata {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind)?;
        if metadata.insert(key, value).is_some() {
            return Err(malformed(format!("key {key:?} is there twice")));
        }
    }
    Ok((num_tensors, metadata))
}

#[cfg(test)]
mod tests;
