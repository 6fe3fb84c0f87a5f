//! Token ids, and their packed form on the wire.

use bincode::{BorrowDecode, Decode, Encode, de::Decoder, enc::Encoder, error::DecodeError, error::EncodeError};

/// A token id of the model's vocabulary.
pub type Token = u32;

/// Tokens as they travel: four little-endian bytes each, so that 60,000 of them are one copy and their
/// size is known before they are read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackedTokens(pub Vec<Token>);

impl Encode for PackedTokens {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        let mut bytes = Vec::with_capacity(self.0.len() * 4);
        for token in &self.0 {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        bytes.encode(encoder)
    }
}

impl<Context> Decode<Context> for PackedTokens {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let bytes: Vec<u8> = Decode::decode(decoder)?;
        if !bytes.len().is_multiple_of(4) {
            return Err(DecodeError::OtherString(format!(
                "packed tokens have {} bytes, expected a multiple of 4",
                bytes.len()
            )));
        }
        let tokens = bytes.chunks_exact(4).map(|b| Token::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(Self(tokens))
    }
}

impl<'de, Context> BorrowDecode<'de, Context> for PackedTokens {
    fn borrow_decode<D: bincode::de::BorrowDecoder<'de, Context = Context>>(
        decoder: &mut D,
    ) -> Result<Self, DecodeError> {
        <Self as Decode<Context>>::decode(decoder)
    }
}

impl From<Vec<Token>> for PackedTokens {
    fn from(tokens: Vec<Token>) -> Self {
        Self(tokens)
    }
}
