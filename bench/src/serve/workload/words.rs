//! Tokens as words, for endpoints that take text alone. The words are no language: what matters is that the
//! same tokens are the same text and others are other text, so prefixes are shared as they were drawn. How many
//! tokens the endpoint makes of a word is its tokenizer's business.

const CONSONANTS: [char; 16] = ['b', 'd', 'f', 'g', 'h', 'j', 'k', 'l', 'm', 'n', 'p', 'r', 's', 't', 'v', 'z'];
const VOWELS: [char; 4] = ['a', 'e', 'i', 'o'];

/// A word per token, separated by spaces. Syllables are digits of base 64, so no two tokens share a word.
pub fn of_tokens(tokens: &[u32]) -> String {
    let mut text = String::with_capacity(5 * tokens.len());
    for (index, token) in tokens.iter().enumerate() {
        if index > 0 {
            text.push(' ');
        }
        let mut rest = *token;
        loop {
            text.push(CONSONANTS[(rest % 16) as usize]);
            text.push(VOWELS[(rest / 16 % 4) as usize]);
            rest /= 64;
            if rest == 0 {
                break;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_token_has_a_word_of_its_own() {
        assert_eq!(of_tokens(&[0, 1, 16, 63, 64, 65]), "ba da be zo bada dada");
        let words: HashSet<String> = (0..10_000).map(|token| of_tokens(&[token])).collect();
        assert_eq!(words.len(), 10_000);
        assert_eq!(of_tokens(&[u32::MAX]).len(), 12);
    }
}
