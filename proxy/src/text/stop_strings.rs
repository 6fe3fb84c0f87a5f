//! Ends an answer at a stop string, across token boundaries, and holds back what may become one.
//!
//! One automaton per stop string (Knuth, Morris, Pratt): its state is the length of the longest prefix
//! of the stop string that the text ends with. Held back is the longest of these prefixes, so the client
//! never sees a character of a stop string, and never waits for one that can no longer come.

/// Watches the text of one choice.
#[derive(Debug, Clone)]
pub struct StopStrings {
    automata: Vec<Automaton>,
    /// Text not given out yet: at most the longest stop string.
    held: String,
    /// Whether a stop string that ends the text is shown.
    is_shown: bool,
}

#[derive(Debug, Clone)]
struct Automaton {
    pattern: Box<[u8]>,
    /// `fallback[i]`: longest proper prefix of `pattern[..=i]` that is also its suffix.
    fallback: Box<[usize]>,
    state: usize,
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        let pattern: Box<[u8]> = pattern.as_bytes().into();
        let mut fallback = vec![0; pattern.len()];
        let mut len = 0;
        for i in 1..pattern.len() {
            while len > 0 && pattern[i] != pattern[len] {
                len = fallback[len - 1];
            }
            len += usize::from(pattern[i] == pattern[len]);
            fallback[i] = len;
        }
        Self { pattern, fallback: fallback.into(), state: 0 }
    }

    /// Takes one byte; true if the pattern ends with it.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.pattern[self.state] != byte {
            self.state = self.fallback[self.state - 1];
        }
        self.state += usize::from(self.pattern[self.state] == byte);
        self.state == self.pattern.len()
    }
}

/// What may be given out after some text came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// Text for the client.
    pub text: String,
    /// Whether a stop string ended the answer; what came behind it is gone.
    pub is_stopped: bool,
}

impl StopStrings {
    /// Watches for `stops`, none of them empty.
    pub fn new(stops: &[String], is_shown: bool) -> Self {
        let automata = stops.iter().filter(|s| !s.is_empty()).map(|s| Automaton::new(s)).collect();
        Self { automata, held: String::new(), is_shown }
    }

    /// Takes the next piece of text. With `can_stop` false (before `min_tokens`) everything passes and
    /// no stop string may begin in it.
    pub fn push(&mut self, piece: &str, can_stop: bool) -> Passed {
        if self.automata.is_empty() {
            return Passed { text: piece.to_string(), is_stopped: false };
        }
        if !can_stop {
            self.automata.iter_mut().for_each(|a| a.state = 0);
            let mut text = std::mem::take(&mut self.held);
            text.push_str(piece);
            return Passed { text, is_stopped: false };
        }
        let num_held = self.held.len();
        self.held.push_str(piece);
        for at in num_held..self.held.len() {
            let byte = self.held.as_bytes()[at];
            // Of several that end at the same byte the longest begins first.
            let mut longest = 0;
            for automaton in &mut self.automata {
                if automaton.step(byte) {
                    longest = longest.max(automaton.pattern.len());
                }
            }
            if longest > 0 {
                let end = if self.is_shown { at + 1 } else { at + 1 - longest };
                self.held.truncate(end);
                return Passed { text: std::mem::take(&mut self.held), is_stopped: true };
            }
        }
        let num_wanted = self.automata.iter().map(|a| a.state).max().unwrap_or(0);
        // A stop string's prefix may end inside a character: keep the whole character.
        let mut cut = self.held.len() - num_wanted;
        while !self.held.is_char_boundary(cut) {
            cut -= 1;
        }
        let rest = self.held.split_off(cut);
        Passed { text: std::mem::replace(&mut self.held, rest), is_stopped: false }
    }

    /// The answer ended otherwise: gives out what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut watch = StopStrings::new(&stops, false);
        let mut out = String::new();
        for piece in pieces {
            let passed = watch.push(piece, true);
            out.push_str(&passed.text);
            if passed.is_stopped {
                return (out, true);
            }
        }
        out.push_str(&watch.finish());
        (out, false)
    }

    #[test]
    fn stop_string_is_found_however_the_text_is_cut() {
        let text = "one two\n\nthree END four";
        for stop in ["\n\n", "END", "\nthree", "o\n", "four"] {
            let expected = &text[..text.find(stop).unwrap()];
            for size in 1..text.len() {
                let pieces: Vec<String> =
                    text.as_bytes().chunks(size).map(|c| String::from_utf8(c.to_vec()).unwrap()).collect();
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                assert_eq!(run(&[stop], &pieces), (expected.to_string(), true), "{stop:?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn what_looked_like_a_beginning_is_given_out_when_it_is_none() {
        let mut watch = StopStrings::new(&["abac".into()], false);
        assert_eq!(watch.push("xaba", true).text, "x");
        assert_eq!(watch.push("b", true).text, "ab");
        assert_eq!(watch.push("z", true).text, "abz");
        assert_eq!(watch.push("aba", true).text, "");
        assert_eq!(watch.finish(), "aba");
    }

    #[test]
    fn earliest_end_wins_and_the_longest_of_those_that_end_together() {
        assert_eq!(run(&["ced", "b"], &["abced"]), ("a".into(), true));
        assert_eq!(run(&["c", "abc"], &["xab", "c"]), ("x".into(), true));
    }

    #[test]
    fn held_text_is_cut_between_characters() {
        // "é" is C3 A9; the stop string begins with C3 AA ("ê"), so C3 alone is a prefix of it.
        let mut watch = StopStrings::new(&["ê!".into()], false);
        assert_eq!(watch.push("aé", true).text, "aé");
        assert_eq!(watch.push("ê", true).text, "");
        assert_eq!(watch.push("?", true).text, "ê?");
    }

    #[test]
    fn shown_stop_string_ends_the_text() {
        let mut watch = StopStrings::new(&["END".into()], true);
        assert_eq!(watch.push("a EN", true).text, "a ");
        assert_eq!(watch.push("D b", true), Passed { text: "END".into(), is_stopped: true });
    }

    #[test]
    fn before_min_tokens_nothing_stops() {
        let mut watch = StopStrings::new(&["ab".into()], false);
        assert_eq!(watch.push("ab a", false), Passed { text: "ab a".into(), is_stopped: false });
        assert_eq!(watch.push("b", true), Passed { text: "b".into(), is_stopped: false });
        assert!(watch.push("ab", true).is_stopped);
    }
}
