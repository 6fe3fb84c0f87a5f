//! How the next token is chosen, and when a sequence ends.
//!
//! Randomness is a function of (seed, choice, position) alone, and penalties are rebuilt from the
//! tokens: a node that takes over after a loss continues with the same tokens.

use bincode::{Decode, Encode};

use crate::tokens::Token;

/// Most alternatives a client may ask for per token (`top_logprobs`).
pub const LOGPROBS_MAX: u32 = 20;
/// Most entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Most `stop_token_ids`.
pub const STOP_TOKEN_IDS_MAX: usize = 128;

/// Sampling parameters of one request, validated at the proxy. The names are OpenAI's and vLLM's.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise the logits are divided by it.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many best tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this probable relative to the best; 0 keeps all.
    pub min_p: f32,
    /// Divides (multiplies) positive (negative) logits of tokens in prompt and output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once if present in the output; 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens; at most [`LOGIT_BIAS_MAX`].
    pub logit_bias: Vec<(Token, f32)>,
    /// Drawn by the proxy if the client gave none.
    pub seed: u64,
    /// Tokens that end the sequence: the model's EOS tokens (unless `ignore_eos`) and the client's.
    pub stop_token_ids: Vec<Token>,
    /// No stop token before this many generated tokens.
    pub min_tokens: u32,
    /// Generated tokens at most; at least 1.
    pub max_tokens: u32,
    /// `None`: no logprobs; `Some(k)`: that of the chosen token and of the `k` best.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// Greedy, `max_tokens` at most, ends at nothing else.
    pub fn greedy(max_tokens: u32) -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            max_tokens,
            logprobs: None,
        }
    }

    /// Checks what came over the wire: a node computes with nothing else.
    ///
    /// # Errors
    /// A sentence that names the parameter, its value and what was expected.
    pub fn check(&self, vocab_size: u32) -> Result<(), String> {
        let ranges = [
            ("temperature", self.temperature, 0.0, f32::MAX),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, f32::MAX),
            ("frequency_penalty", self.frequency_penalty, -f32::MAX, f32::MAX),
            ("presence_penalty", self.presence_penalty, -f32::MAX, f32::MAX),
        ];
        for (name, value, min, max) in ranges {
            // NaN is in no range.
            if !(min..=max).contains(&value) {
                return Err(format!("{name} is {value}, expected a number from {min} to {max}"));
            }
        }
        if self.max_tokens == 0 {
            return Err("max_tokens is 0, expected at least 1".to_string());
        }
        if self.logprobs.is_some_and(|count| count > LOGPROBS_MAX) {
            return Err(format!("more than {LOGPROBS_MAX} logprobs were asked for"));
        }
        if self.logit_bias.len() > LOGIT_BIAS_MAX || self.stop_token_ids.len() > STOP_TOKEN_IDS_MAX {
            let (num_biases, num_stops) = (self.logit_bias.len(), self.stop_token_ids.len());
            return Err(format!(
                "{num_biases} logit biases and {num_stops} stop tokens, expected at most {LOGIT_BIAS_MAX} and {STOP_TOKEN_IDS_MAX}"
            ));
        }
        if let Some((token, bias)) = self.logit_bias.iter().find(|(token, bias)| *token >= vocab_size || bias.is_nan())
        {
            return Err(format!(
                "the logit bias of token {token} is {bias}, expected a number and a token below {vocab_size}"
            ));
        }
        match self.stop_token_ids.iter().find(|token| **token >= vocab_size) {
            Some(token) => Err(format!("stop token {token} is not in the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    /// Whether any penalty needs the tokens so far.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Why a sequence with `num_generated` tokens, the last of them `token`, ends here, if it does.
    /// `num_tokens` counts prompt and generated tokens.
    pub fn finish_reason(
        &self,
        token: Token,
        num_generated: u32,
        num_tokens: u32,
        max_model_len: u32,
    ) -> Option<FinishReason> {
        if num_generated >= self.min_tokens.max(1) && self.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else if self.is_last_by_length(num_generated, num_tokens, max_model_len) {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Whether a sequence of these lengths ends whatever its last token is.
    pub fn is_last_by_length(&self, num_generated: u32, num_tokens: u32, max_model_len: u32) -> bool {
        num_generated >= self.max_tokens || num_tokens >= max_model_len
    }
}

/// Why a node stopped generating. Stop strings are the proxy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum FinishReason {
    /// This token ends the sequence; it is the last one reported and not shown as text.
    StopToken(Token),
    /// `max_tokens` or the model's length was reached.
    Length,
}

/// A generated token.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
pub struct SampledToken {
    /// Its id.
    pub id: Token,
    /// Natural logarithm of its probability under the model (before temperature and penalties); 0 if
    /// logprobs were not asked for.
    pub logprob: f32,
    /// The best alternatives, best first, ties by id.
    pub top_logprobs: Vec<(Token, f32)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_that_no_sampler_can_use_are_refused() {
        let good = SamplingParams::greedy(1);
        assert_eq!(good.check(10), Ok(()));
        let bad = [
            SamplingParams { temperature: f32::NAN, ..good.clone() },
            SamplingParams { temperature: -1.0, ..good.clone() },
            SamplingParams { temperature: f32::INFINITY, ..good.clone() },
            SamplingParams { top_p: 0.0, ..good.clone() },
            SamplingParams { min_p: 1.1, ..good.clone() },
            SamplingParams { repetition_penalty: 0.0, ..good.clone() },
            SamplingParams { presence_penalty: f32::NAN, ..good.clone() },
            SamplingParams { max_tokens: 0, ..good.clone() },
            SamplingParams { logprobs: Some(LOGPROBS_MAX + 1), ..good.clone() },
            SamplingParams { logit_bias: vec![(10, 0.0)], ..good.clone() },
            SamplingParams { logit_bias: vec![(1, f32::NAN)], ..good.clone() },
            SamplingParams { logit_bias: vec![(1, 0.0); LOGIT_BIAS_MAX + 1], ..good.clone() },
            SamplingParams { stop_token_ids: vec![10], ..good.clone() },
        ];
        for params in bad {
            assert!(params.check(10).is_err(), "{params:?}");
        }
    }

    #[test]
    fn stop_token_counts_only_after_min_tokens() {
        let params = SamplingParams { stop_token_ids: vec![2], min_tokens: 3, ..SamplingParams::greedy(5) };
        assert_eq!(params.finish_reason(2, 2, 10, 100), None);
        assert_eq!(params.finish_reason(2, 3, 11, 100), Some(FinishReason::StopToken(2)));
        assert_eq!(params.finish_reason(1, 5, 13, 100), Some(FinishReason::Length));
        assert_eq!(params.finish_reason(1, 1, 100, 100), Some(FinishReason::Length));
    }
}
