//! The bytes behind each token, for the decoders whose output is a plain concatenation.

use common::tokens::Token;
use serde_json::Value;

/// How a tokenizer's decoder turns a token's spelling into bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    /// GPT-2's: every byte has a printable stand-in.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte.
    SentencePiece,
}

impl Spelling {
    /// The spelling of a decoder as `tokenizer.json` describes it; `None` if its output is not a plain
    /// concatenation of what each token means (WordPiece, CTC, custom replacements).
    pub fn of_decoder(decoder: &Value) -> Option<Self> {
        let kind = decoder.get("type")?.as_str()?;
        match kind {
            "ByteLevel" => Some(Self::ByteLevel),
            "Metaspace" => (decoder.get("replacement")?.as_str()? == "▁").then_some(Self::SentencePiece),
            "Sequence" => {
                let parts = decoder.get("decoders")?.as_array()?;
                if let [only] = parts.as_slice() {
                    return Self::of_decoder(only);
                }
                parts.iter().all(is_sentencepiece_part).then_some(Self::SentencePiece)
            }
            _ => None,
        }
    }

    fn push_bytes(self, spelling: &str, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = out.len();
                for c in spelling.chars() {
                    match byte_of_stand_in(c) {
                        Some(byte) => out.push(byte),
                        None => {
                            // An added token in plain letters: it means itself.
                            out.truncate(start);
                            out.extend_from_slice(spelling.as_bytes());
                            return;
                        }
                    }
                }
            }
            Self::SentencePiece => match byte_token(spelling) {
                Some(byte) => out.push(byte),
                None => out.extend_from_slice(spelling.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// The steps that SentencePiece decoders are made of. `Strip` takes the space in front of a text; an
/// answer continues a prompt, so there it is not applied.
fn is_sentencepiece_part(part: &Value) -> bool {
    match part.get("type").and_then(Value::as_str) {
        Some("Replace") => {
            part.pointer("/pattern/String").and_then(Value::as_str) == Some("▁")
                && part.get("content").and_then(Value::as_str) == Some(" ")
        }
        Some("ByteFallback" | "Fuse") => true,
        Some("Strip") => part.get("content").and_then(Value::as_str) == Some(" ") && part["stop"] == 0,
        Some("Metaspace") => part.get("replacement").and_then(Value::as_str) == Some("▁"),
        _ => false,
    }
}

/// `<0x0A>`
fn byte_token(spelling: &str) -> Option<u8> {
    let hex = spelling.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// GPT-2's table: bytes that print stand for themselves, the other 68 are numbered from U+0100.
fn byte_of_stand_in(c: char) -> Option<u8> {
    const fn prints(byte: u8) -> bool {
        matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
    }
    const OTHERS: [u8; 68] = {
        let (mut table, mut len, mut byte) = ([0; 68], 0, 0usize);
        while byte < 256 {
            if !prints(byte as u8) {
                table[len] = byte as u8;
                len += 1;
            }
            byte += 1;
        }
        table
    };
    match u32::from(c) {
        code @ 0..=255 => prints(code as u8).then_some(code as u8),
        code => OTHERS.get((code - 256) as usize).copied(),
    }
}

/// Bytes of every token of a vocabulary, in one piece of memory.
#[derive(Debug)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    /// Token `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
}

impl TokenBytes {
    /// Of tokens `0..vocab_size`, by their spelling; ids without one have no bytes.
    pub fn new(spelling: Spelling, vocab_size: u32, spelling_of: impl Fn(Token) -> Option<String>) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(vocab_size as usize));
        for id in 0..vocab_size {
            if let Some(text) = spelling_of(id) {
                spelling.push_bytes(&text, &mut bytes);
            }
            ends.push(bytes.len() as u32);
        }
        Self { bytes, ends }
    }

    /// The bytes of a token; empty beyond the vocabulary.
    pub fn of(&self, id: Token) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_byte_has_one_stand_in() {
        let mut seen = [false; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of_stand_in) {
                assert!(!std::mem::replace(&mut seen[byte as usize], true));
            }
        }
        assert!(seen.iter().all(|s| *s));
        assert_eq!(byte_of_stand_in('Ġ'), Some(b' '));
        assert_eq!(byte_of_stand_in('Ċ'), Some(b'\n'));
    }

    #[test]
    fn decoders_are_recognised_by_their_parts() {
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        assert_eq!(Spelling::of_decoder(&llama), Some(Spelling::SentencePiece));
        assert_eq!(Spelling::of_decoder(&json!({"type": "ByteLevel"})), Some(Spelling::ByteLevel));
        assert_eq!(Spelling::of_decoder(&json!({"type": "WordPiece"})), None);
        assert_eq!(Spelling::of_decoder(&Value::Null), None);
    }

    #[test]
    fn sentencepiece_spells_spaces_and_bytes() {
        let words = ["▁Hi", "<0xE4>", "<0x0A>", "<0xZZ>", "a▁b"];
        let table = TokenBytes::new(Spelling::SentencePiece, 6, |id| words.get(id as usize).map(|w| w.to_string()));
        let got: Vec<&[u8]> = (0..7).map(|id| table.of(id)).collect();
        assert_eq!(got, [&b" Hi"[..], &[0xE4], b"\n", b"<0xZZ>", b"a b", b"", b""]);
    }
}
