//! What has been committed of one answer.

use common::tokens::Token;

/// One of the `n` answers. A token is committed when its index is the next one; a token that a node sends
/// again, or that a superseded attempt sends late, is dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    committed: Vec<Token>,
    is_finished: bool,
}

impl Choice {
    /// Commits `token` if it is the next one of an unfinished answer.
    pub fn commit(&mut self, index: u32, token: Token, is_last: bool) -> bool {
        if self.is_finished || index as usize != self.committed.len() {
            return false;
        }
        self.committed.push(token);
        self.is_finished = is_last;
        true
    }

    /// Ends the answer where it is (a stop string).
    pub fn finish(&mut self) {
        self.is_finished = true;
    }

    /// Whether nothing more will be committed.
    pub fn is_finished(&self) -> bool {
        self.is_finished
    }

    /// The tokens so far.
    pub fn committed(&self) -> &[Token] {
        &self.committed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_next_token_is_committed() {
        let mut choice = Choice::default();
        assert!(choice.commit(0, 7, false));
        assert!(!choice.commit(0, 8, false), "a repeated token");
        assert!(!choice.commit(2, 8, false), "a gap");
        assert!(choice.commit(1, 8, true));
        assert!(!choice.commit(2, 9, false), "behind the last one");
        assert_eq!(choice.committed(), [7, 8]);
    }
}
