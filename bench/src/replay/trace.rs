//! A trace in Mooncake's format: one JSON object per line, of which the content matters here.
//!
//! `hash_ids` names the blocks of a prompt, the partial last one too. The names are chained: two prompts that
//! share a block share all blocks before it, which is checked.

use std::collections::HashMap;
use std::io::BufRead;
use std::path::Path;

use anyhow::{Context, ensure};
use common::content::{ChainRoot, ContentChain, ContentName, GRANULE_TOKENS};
use common::model::ModelIdentity;
use common::tokens::Token;

/// Blocks of one prompt; Mooncake's longest has 246.
const NUM_BLOCKS_MAX: usize = 65_536;
/// Blocks of all prompts of a trace.
const NUM_BLOCKS_TOTAL_MAX: usize = 100_000_000;

/// The prompts, each as its blocks.
#[derive(Debug)]
pub struct Trace {
    /// Blocks by number, from 0 in the order of their first appearance.
    pub requests: Vec<Vec<u32>>,
    /// Different blocks.
    pub num_distinct: usize,
}

impl Trace {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read or is no such trace.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file = std::fs::File::open(path).with_context(|| format!("open the trace {}", path.display()))?;
        Self::parse(std::io::BufReader::new(file)).with_context(|| format!("read the trace {}", path.display()))
    }

    /// Parses lines.
    ///
    /// # Errors
    /// With the number of the line that is no request, or contradicts one before it.
    pub fn parse(lines: impl BufRead) -> anyhow::Result<Self> {
        let mut requests = Vec::new();
        // Number and predecessor of each hash.
        let mut known: HashMap<u64, (u32, Option<u32>)> = HashMap::new();
        let mut num_blocks_total = 0;
        for (number, line) in (1..).zip(lines.lines()) {
            let line = line?;
            if line.trim().is_empty() {
                continue;
            }
            let request: serde_json::Value = serde_json::from_str(&line).with_context(|| format!("line {number}"))?;
            let hashes = request["hash_ids"].as_array();
            let hashes = hashes.with_context(|| format!("line {number} has no list hash_ids"))?;
            num_blocks_total += hashes.len();
            ensure!(!hashes.is_empty(), "line {number} has an empty hash_ids, expected at least one block");
            ensure!(
                hashes.len() <= NUM_BLOCKS_MAX && num_blocks_total <= NUM_BLOCKS_TOTAL_MAX,
                "line {number} brings more blocks than are taken ({NUM_BLOCKS_MAX} per prompt, \
                 {NUM_BLOCKS_TOTAL_MAX} in all)"
            );
            let mut blocks = Vec::with_capacity(hashes.len());
            let mut parent = None;
            for hash in hashes {
                let hash = hash.as_u64();
                let hash = hash.with_context(|| format!("line {number} has a block that is no whole number"))?;
                let next = known.len() as u32;
                let (block, known_parent) = *known.entry(hash).or_insert((next, parent));
                ensure!(
                    known_parent == parent,
                    "line {number} has block {hash} behind another block than a line before it: the blocks of a \
                     trace must be chained"
                );
                parent = Some(block);
                blocks.push(block);
            }
            requests.push(blocks);
        }
        ensure!(!requests.is_empty(), "it has no request");
        Ok(Self { requests, num_distinct: known.len() })
    }

    /// Tokens that stand for one block: a granule, different for each block.
    pub fn tokens_of(block: u32) -> [Token; GRANULE_TOKENS] {
        [block; GRANULE_TOKENS]
    }

    /// Names of all blocks as a node would give them.
    pub fn names(&self) -> Vec<ContentName> {
        let mut names: Vec<Option<ContentName>> = vec![None; self.num_distinct];
        let root = ChainRoot::of_model(ModelIdentity([0; 32]));
        for request in &self.requests {
            if request.last().is_some_and(|block| names[*block as usize].is_some()) {
                continue;
            }
            let tokens: Vec<Token> = request.iter().flat_map(|block| Self::tokens_of(*block)).collect();
            let mut chain = ContentChain::new(&root);
            chain.extend(&tokens);
            for (block, name) in request.iter().zip(chain.granules()) {
                names[*block as usize] = Some(*name);
            }
        }
        names.into_iter().map(|name| name.expect("every block is in a request")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Trace> {
        Trace::parse(text.as_bytes())
    }

    #[test]
    fn blocks_are_numbered_as_they_appear() {
        let trace = parse("{\"hash_ids\": [9, 5]}\n\n{\"hash_ids\": [9, 7, 1]}\n").unwrap();
        assert_eq!(trace.requests, [vec![0, 1], vec![0, 2, 3]]);
        assert_eq!(trace.names().iter().collect::<std::collections::HashSet<_>>().len(), 4);
    }

    #[test]
    fn what_is_no_trace_is_a_sentence_with_its_line() {
        for (text, expected) in [
            ("", "no request"),
            ("{\"hash_ids\": [1]}\n{\"hash_ids\": []}", "line 2 has an empty"),
            ("{\"timestamp\": 1}", "line 1 has no list"),
            ("{\"hash_ids\": [-1]}", "no whole number"),
            ("{\"hash_ids\": [1, 2]}\n{\"hash_ids\": [3, 2]}", "line 2 has block 2 behind another"),
            ("{\"hash_ids\": [1, 1]}", "block 1 behind another"),
            ("nonsense", "line 1"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
