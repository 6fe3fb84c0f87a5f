//! What is asked: sessions of one turn or more, drawn from a seed or read from a file before the run. No clock.
//!
//! 1. [`random`]: random prompts, alone or behind shared prefixes.
//! 2. [`mooncake`]: traces of lengths and block hashes, in the format that Mooncake publishes.
//! 3. [`conversations`]: ShareGPT files. [`tasks`]: questions with the answers they must get.
//! 4. [`words`]: tokens as words, for endpoints that take text alone.

pub mod conversations;
pub mod mooncake;
pub mod random;
pub mod tasks;
pub mod words;

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

pub use mooncake::MooncakeTrace;
pub use random::RandomPrompts;

/// A file of a workload is not read beyond this.
const FILE_BYTES_MAX: u64 = 4 << 30;

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or another that the endpoint knows.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// As part of a body.
    pub fn to_json(&self) -> Value {
        json!({"role": self.role, "content": self.content})
    }
}

/// What a turn puts before the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A whole prompt as token ids.
    Tokens(Vec<u32>),
    /// Messages behind those of the turns before and their answers.
    Messages(Vec<Message>),
}

/// One request of a session.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// What is asked.
    pub prompt: Prompt,
    /// Tokens to generate.
    pub max_tokens: usize,
    /// What the answer must be, white space at its ends apart, where that is known.
    pub expected: Option<String>,
}

/// Turns that follow each other: a turn is sent when the one before has its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// At least one.
    pub turns: Vec<Turn>,
}

impl Session {
    /// A session of one turn whose answer is not checked.
    pub fn of_tokens(tokens: Vec<u32>, max_tokens: usize) -> Self {
        Self { turns: vec![Turn { prompt: Prompt::Tokens(tokens), max_tokens, expected: None }] }
    }
}

/// Which of the requests, so that warm-ups leave no prefix in a cache that a measured prompt could hit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Phase {
    /// Before the run.
    Warmup,
    /// Part of the figures.
    Measured,
}

/// The sessions of a run. Warm-ups are always random prompts.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Drawn prompts.
    pub random: RandomPrompts,
    /// What a file says instead, for the measured part.
    pub from_file: Option<FromFile>,
}

/// Sessions that come from a file.
#[derive(Debug, Clone)]
pub enum FromFile {
    /// A trace: its prompts are made of its hashes.
    Trace(MooncakeTrace),
    /// Texts.
    Sessions(Vec<Session>),
}

impl Workload {
    /// Session `index`, always the same.
    ///
    /// # Panics
    /// If the file has fewer.
    pub fn session(&self, phase: Phase, index: usize) -> Session {
        match (&self.from_file, phase) {
            (Some(FromFile::Trace(trace)), Phase::Measured) => trace.session(index),
            (Some(FromFile::Sessions(sessions)), Phase::Measured) => sessions[index].clone(),
            _ => self.random.session(phase, index),
        }
    }

    /// Sessions that there are; `None`: as many as are asked for.
    pub fn num_sessions(&self) -> Option<usize> {
        Some(match self.from_file.as_ref()? {
            FromFile::Trace(trace) => trace.num_rows(),
            FromFile::Sessions(sessions) => sessions.len(),
        })
    }

    /// When the trace's requests arrived, where it is one.
    pub fn trace_times(&self) -> Option<Vec<Duration>> {
        match self.from_file.as_ref()? {
            FromFile::Trace(trace) => Some(trace.times()),
            FromFile::Sessions(_) => None,
        }
    }
}

/// A workload's file as text.
///
/// # Errors
/// If it cannot be read, or is larger than a workload can be.
pub(super) fn read(path: &Path) -> anyhow::Result<String> {
    let about = || format!("read --dataset-path {}", path.display());
    let num_bytes = std::fs::metadata(path).with_context(about)?.len();
    anyhow::ensure!(num_bytes <= FILE_BYTES_MAX, "{} has {num_bytes} bytes, expected at most 4 GiB", path.display());
    std::fs::read_to_string(path).with_context(about)
}
