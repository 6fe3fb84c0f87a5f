//! A trace in [Mooncake's format](crate::mooncake), of which only the content matters here.
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

use crate::mooncake::{TraceRow, rows};

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
        for row in rows(lines) {
            let (number, TraceRow { hash_ids, .. }) = row?;
            num_blocks_total += hash_ids.len();
            ensure!(
                num_blocks_total <= NUM_BLOCKS_TOTAL_MAX,
                "line {number} brings more blocks than are taken, which are {NUM_BLOCKS_TOTAL_MAX} in all"
            );
            let mut blocks = Vec::with_capacity(hash_ids.len());
            let mut parent = None;
            for hash in hash_ids {
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
    use crate::mooncake::trace_of;

    fn parse(text: &str) -> anyhow::Result<Trace> {
        Trace::parse(text.as_bytes())
    }

    #[test]
    fn blocks_are_numbered_as_they_appear() {
        let trace = parse(&trace_of(&[vec![9, 5], vec![9, 7, 1]])).unwrap();
        assert_eq!(trace.requests, [vec![0, 1], vec![0, 2, 3]]);
        assert_eq!(trace.names().iter().collect::<std::collections::HashSet<_>>().len(), 4);
    }

    #[test]
    fn what_is_no_trace_is_a_sentence_with_its_line() {
        for (text, expected) in [
            (String::new(), "no request"),
            (trace_of(&[vec![1], vec![]]), "line 2"),
            (trace_of(&[vec![1, 2], vec![3, 2]]), "line 2 has block 2 behind another"),
            (trace_of(&[vec![1, 1]]), "block 1 behind another"),
            ("nonsense".into(), "line 1"),
        ] {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
