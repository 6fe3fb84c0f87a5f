//! Values of GGUF's metadata, and the cursor that reads them.

use super::{GgufError, malformed};

/// A value of the metadata. Arrays stay as they lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned number.
    Unsigned(u64),
    /// Any signed number.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(&'a str),
    /// Many of one kind.
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// A number that is whole and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Unsigned(value) => Some(*value as f64),
            Self::Signed(value) => Some(*value as f64),
            Self::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// Text.
    pub fn as_text(&self) -> Option<&'a str> {
        match self {
            Self::Text(value) => Some(value),
            _ => None,
        }
    }

    /// Many values.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match self {
            Self::Array(array) => Some(*array),
            _ => None,
        }
    }
}

/// Values of one kind behind each other, checked to be whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    kind: u32,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One by one.
    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (mut cursor, kind) = (Cursor::new(self.bytes), self.kind);
        (0..self.len).map(move |_| cursor.value(kind).expect("the array was read once before"))
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Reads from the front, never beyond the end.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], GgufError> {
        let truncated = GgufError::Truncated { at: self.bytes.len() };
        let end = self.at.checked_add(len).ok_or(truncated.clone())?;
        let bytes = self.bytes.get(self.at..end).ok_or(truncated)?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        Ok(self.bytes(N)?.try_into().expect("as many bytes as were asked for"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, GgufError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, GgufError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, GgufError> {
        let len = self.u64()?;
        // A length that no header has is damage, not a file that goes on.
        let len = usize::try_from(len).ok().filter(|len| *len <= super::HEADER_BYTES_MAX);
        let len = len.ok_or_else(|| malformed(format!("a text at byte {} has an impossible length", self.at)))?;
        let at = self.at;
        std::str::from_utf8(self.bytes(len)?).map_err(|_| malformed(format!("the text at byte {at} is not UTF-8")))
    }

    pub(super) fn value(&mut self, kind: u32) -> Result<Value<'a>, GgufError> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array()?))),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()? != [0]),
            TEXT => Value::Text(self.text()?),
            ARRAY => Value::Array(self.array_value()?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(malformed(format!("the value at byte {} has the unknown type {other}", self.at))),
        })
    }

    fn array_value(&mut self) -> Result<Array<'a>, GgufError> {
        let (kind, len) = (self.u32()?, self.u64()?);
        let len = usize::try_from(len).ok().filter(|len| *len <= super::HEADER_BYTES_MAX);
        let len = len.ok_or_else(|| malformed(format!("an array at byte {} has an impossible length", self.at)))?;
        if kind == ARRAY {
            return Err(malformed(format!("the array at byte {} holds arrays, which are not read", self.at)));
        }
        let start = self.at;
        for _ in 0..len {
            self.value(kind)?; // every kind takes a byte at least, so this ends with the bytes
        }
        Ok(Array { kind, len, bytes: &self.bytes[start..self.at] })
    }
}
