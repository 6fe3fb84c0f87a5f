use super::*;

/// Little-endian pieces of a file.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(self, text: &str) -> Self {
        let mut bytes = self.u64(text.len() as u64);
        bytes.0.extend(text.as_bytes());
        bytes
    }

    fn raw(mut self, raw: &[u8]) -> Self {
        self.0.extend(raw);
        self
    }

    fn start(num_tensors: u64, num_metadata: u64) -> Self {
        Self::default().raw(b"GGUF").u32(3).u64(num_tensors).u64(num_metadata)
    }
}

/// A header of three entries and one tensor of 2 rows of 32 q8_0 values, and its data.
fn file() -> Vec<u8> {
    let bytes = Bytes::start(1, 3)
        .text("general.architecture")
        .u32(8)
        .text("llama")
        .text("llama.block_count")
        .u32(4)
        .u32(2)
        .text("tokenizer.ggml.tokens")
        .u32(9)
        .u32(8)
        .u64(2)
        .text("a")
        .text("bc")
        .text("w")
        .u32(2)
        .u64(32)
        .u64(2)
        .u32(8)
        .u64(0);
    let len = bytes.0.len().next_multiple_of(32);
    let mut bytes = bytes.0;
    bytes.resize(len + 2 * 34, 7);
    bytes
}

#[test]
fn metadata_and_tensors_are_found_where_they_are() {
    let bytes = file();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.text("general.architecture"), Some("llama"));
    assert_eq!(gguf.value("llama.block_count").and_then(Value::as_u64), Some(2));
    let tokens = gguf.value("tokenizer.ggml.tokens").and_then(Value::as_array).unwrap();
    let tokens: Vec<&str> = tokens.values().filter_map(|value| value.as_text()).collect();
    assert_eq!(tokens, ["a", "bc"]);
    let info = gguf.tensor("w").unwrap();
    assert_eq!((info.ty, &info.shape[..]), (GgmlType::Q8_0, &[2, 32][..]));
    let range = gguf.bytes_of("w", info, bytes.len()).unwrap().unwrap();
    assert_eq!(range, bytes.len() - 68..bytes.len());
    assert_eq!(Gguf::parse_metadata(&bytes).unwrap().text("general.architecture"), Some("llama"));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = file();
    for len in 0..bytes.len() {
        match Gguf::parse(&bytes[..len]) {
            Err(error) => assert_eq!(error, GgufError::Truncated { at: len }),
            Ok(gguf) => {
                let error = gguf.bytes_of("w", gguf.tensor("w").unwrap(), len).unwrap_err().to_string();
                assert!(error.contains("truncated or damaged"), "{error}");
            }
        }
    }
}

#[test]
fn no_changed_byte_makes_it_panic() {
    let bytes = file();
    let header_len = bytes.len() - 68;
    for at in 0..header_len {
        for value in [0, 1, 9, 0x7f, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] = value;
            let Ok(gguf) = Gguf::parse(&changed) else { continue };
            for (name, info) in gguf.tensors() {
                if let Ok(Some(range)) = gguf.bytes_of(name, info, changed.len()) {
                    assert!(range.end <= changed.len());
                }
            }
        }
    }
}

#[test]
fn impossible_claims_are_sentences() {
    let reason = |bytes: Bytes| Gguf::parse(&bytes.0).unwrap_err().to_string();
    assert_eq!(reason(Bytes::default().raw(b"GGML")), "it does not begin with \"GGUF\"");
    assert_eq!(reason(Bytes::default().raw(b"GGUF").u32(1)), "it is GGUF version 1, versions 2 and 3 are read");
    assert!(reason(Bytes::start(u64::MAX, 0)).contains("claims 18446744073709551615 tensors"));
    assert!(reason(Bytes::start(0, 1).u64(u64::MAX)).contains("impossible length"));
    assert!(reason(Bytes::start(0, 1).text("k").u32(77)).contains("unknown type 77"));
    assert!(reason(Bytes::start(0, 1).text("k").u32(9).u32(4).u64(u64::MAX)).contains("impossible length"));
    assert!(reason(Bytes::start(0, 1).text("k").u32(9).u32(9).u64(1)).contains("holds arrays"));
    assert!(reason(Bytes::start(0, 1).u64(1).raw(&[0xff])).contains("is not UTF-8"));
    let twice = Bytes::start(0, 2).text("k").u32(7).raw(&[1]).text("k").u32(7).raw(&[1]);
    assert_eq!(reason(twice), "key \"k\" is there twice");
    let dims = Bytes::start(1, 0).text("w").u32(5);
    assert_eq!(reason(dims), "tensor \"w\" has 5 dimensions, expected 1 to 4");
    let alignment = Bytes::start(0, 1).text("general.alignment").u32(4).u32(0);
    assert!(reason(alignment).contains("general.alignment"));
    // A billion strings in a file of a few bytes: nothing is reserved for them.
    let many = Bytes::start(0, 1).text("k").u32(9).u32(8).u64(100_000_000);
    assert!(matches!(Gguf::parse(&many.0), Err(GgufError::Truncated { .. })));
}

#[test]
fn tensors_beyond_the_file_or_beyond_arithmetic_are_refused() {
    let tensor = |dims: [u64; 2], ty: u32, offset: u64| {
        let bytes = Bytes::start(1, 0).text("w").u32(2).u64(dims[0]).u64(dims[1]).u32(ty).u64(offset).0;
        let gguf = Gguf::parse(&bytes).unwrap();
        gguf.bytes_of("w", gguf.tensor("w").unwrap(), 1000).map_err(|error| error.to_string())
    };
    assert!(tensor([32, 1], 8, 0).is_ok());
    assert!(tensor([33, 1], 8, 0).unwrap_err().contains("cannot be Q8_0, whose blocks have 32 values"));
    assert!(tensor([32, 1], 8, u64::MAX).unwrap_err().contains("truncated or damaged"));
    assert!(tensor([1 << 40, 1 << 40], 0, 0).is_err());
    assert_eq!(tensor([32, 1], 10, 0), Ok(None));
    assert_eq!((GgmlType::of(10).name(), GgmlType::of(99).name()), ("Q2_K".to_string(), "type 99".to_string()));
}
