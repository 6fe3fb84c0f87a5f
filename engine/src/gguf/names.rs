//! llama.cpp's names of tensors and Hugging Face's.

/// Heads whose rows llama.cpp has reordered in a tensor.
///
/// Its `llama` models rotate neighbouring features (2i, 2i + 1), Hugging Face's the halves (i, i + head_dim / 2).
/// To make the same angles meet the same features, its converter interleaves the rows of q and k:
///
/// ```text
/// Hugging Face   head h:  0 1 2 ... d/2-1 | d/2 ... d-1      row (h, half, i)
/// GGUF           head h:  0 d/2 1 d/2+1 ...                  row (h, i, half)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InterleavedHeads(pub(crate) usize);

impl InterleavedHeads {
    /// Where, of `num_rows`, Hugging Face's row `row` is.
    pub(crate) fn source_row(self, row: usize, num_rows: usize) -> usize {
        let head_dim = num_rows / self.0;
        let (head, feature) = (row / head_dim, row % head_dim);
        let (half, i) = (feature / (head_dim / 2), feature % (head_dim / 2));
        head * head_dim + 2 * i + half
    }

    /// Whether rows can be so interleaved.
    pub(crate) fn fits(self, num_rows: usize) -> bool {
        self.0 > 0 && num_rows.is_multiple_of(2 * self.0)
    }
}

/// (llama.cpp's, Hugging Face's) names of what a layer has.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

const MODEL: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Hugging Face's name of a tensor of a GGUF file; `None` if a decoder has no use for it.
pub(crate) fn to_hugging_face(name: &str) -> Option<String> {
    let (stem, kind) = split(name)?;
    if let Some(rest) = stem.strip_prefix("blk.") {
        let (layer, part) = rest.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let (_, theirs) = LAYER.iter().find(|(ours, _)| *ours == part)?;
        return Some(format!("model.layers.{layer}.{theirs}.{kind}"));
    }
    let (_, theirs) = MODEL.iter().find(|(ours, _)| *ours == stem)?;
    Some(format!("{theirs}.{kind}"))
}

/// llama.cpp's name of a tensor of a Hugging Face folder.
pub(crate) fn to_gguf(name: &str) -> Option<String> {
    let (stem, kind) = split(name)?;
    if let Some(rest) = stem.strip_prefix("model.layers.") {
        let (layer, part) = rest.split_once('.')?;
        let (ours, _) = LAYER.iter().find(|(_, theirs)| *theirs == part)?;
        return Some(format!("blk.{layer}.{ours}.{kind}"));
    }
    let (ours, _) = MODEL.iter().find(|(_, theirs)| *theirs == stem)?;
    Some(format!("{ours}.{kind}"))
}

fn split(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_there_and_back() {
        for name in ["blk.12.attn_q.weight", "blk.0.ffn_norm.weight", "blk.3.attn_k.bias", "output.weight"] {
            assert_eq!(to_gguf(&to_hugging_face(name).unwrap()).unwrap(), name);
        }
        assert_eq!(to_hugging_face("blk.1.attn_k_norm.weight").unwrap(), "model.layers.1.self_attn.k_norm.weight");
        for name in ["rope_freqs.weight", "blk.x.attn_q.weight", "blk.1.ffn_gate_exps.weight", "output", ""] {
            assert_eq!(to_hugging_face(name), None, "{name}");
        }
    }

    #[test]
    fn halves_of_a_head_are_interleaved_in_the_file() {
        let rows: Vec<usize> = (0..16).map(|row| InterleavedHeads(2).source_row(row, 16)).collect();
        assert_eq!(rows, [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
        assert!(InterleavedHeads(2).fits(16) && !InterleavedHeads(3).fits(16) && !InterleavedHeads(0).fits(16));
    }
}
