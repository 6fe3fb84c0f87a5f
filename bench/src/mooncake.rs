//! Rows of a trace in Mooncake's format: one JSON object a line, with when a request came, how long it was, and
//! which of its blocks were the same as another's.
//!
//! What becomes of a row is its reader's: [`replay`](crate::replay) counts its blocks,
//! [`serve`](crate::serve::workload::mooncake) makes a prompt of it.

use std::io::BufRead;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

/// Tokens that a hash of the published traces stands for.
pub const BLOCK_TOKENS: usize = 512;
/// A prompt of a trace is not longer.
const INPUT_LEN_MAX: u64 = 10_000_000;

/// One request of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRow {
    /// When it came, counted from the trace's beginning.
    pub timestamp: Duration,
    /// Tokens of its prompt.
    pub input_len: usize,
    /// Tokens that were generated.
    pub output_len: usize,
    /// Its blocks of [`BLOCK_TOKENS`] tokens, the partial last one included. A hash names a block and all before it.
    pub hash_ids: Vec<u64>,
}

/// The rows, each with the number of its line. Empty lines are passed over.
///
/// # Errors
/// An item is one if the line cannot be read or is no request; it names the line.
pub fn rows(lines: impl BufRead) -> impl Iterator<Item = anyhow::Result<(usize, TraceRow)>> {
    (1..).zip(lines.lines()).filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty())).map(
        |(number, line)| {
            let row = line.context("it cannot be read").and_then(|line| parse(&line));
            Ok((number, row.with_context(|| format!("line {number}"))?))
        },
    )
}

fn parse(line: &str) -> anyhow::Result<TraceRow> {
    let row: Value = serde_json::from_str(line).context("it is no JSON object")?;
    let number = |key: &str| row[key].as_u64().with_context(|| format!("{key} is {}, expected a number", row[key]));
    let hash_ids = row["hash_ids"].as_array().context("hash_ids is no list")?;
    let hash_ids: Option<Vec<u64>> = hash_ids.iter().map(Value::as_u64).collect();
    let (input_len, output_len) = (number("input_length")?, number("output_length")?);
    ensure!(
        (1..=INPUT_LEN_MAX).contains(&input_len) && (1..=INPUT_LEN_MAX).contains(&output_len),
        "input_length is {input_len} and output_length {output_len}, expected 1 to {INPUT_LEN_MAX}"
    );
    let row = TraceRow {
        timestamp: Duration::from_millis(number("timestamp")?.min(u64::from(u32::MAX))),
        input_len: input_len as usize,
        output_len: output_len as usize,
        hash_ids: hash_ids.context("hash_ids has something that is no whole number")?,
    };
    let expected = row.input_len.div_ceil(BLOCK_TOKENS);
    ensure!(
        row.hash_ids.len() == expected,
        "hash_ids has {} entries, expected {expected} for {input_len} tokens in blocks of {BLOCK_TOKENS}",
        row.hash_ids.len()
    );
    Ok(row)
}

/// A trace whose requests have these blocks.
#[cfg(test)]
pub(crate) fn trace_of(requests: &[Vec<u64>]) -> String {
    let row = |(number, hash_ids): (usize, &Vec<u64>)| {
        let input_len = hash_ids.len() * BLOCK_TOKENS;
        let timestamp = 1000 * number;
        format!(
            "{{\"timestamp\": {timestamp}, \"input_length\": {input_len}, \"output_length\": 1, \"hash_ids\": {hash_ids:?}}}\n"
        )
    };
    requests.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str = r#"{"timestamp": 3000, "input_length": 1030, "output_length": 50, "hash_ids": [0, 7, 8]}"#;

    #[test]
    fn rows_are_numbered_by_their_lines() {
        let found: Vec<_> = rows(format!("{ROW}\n\n{ROW}").as_bytes()).map(Result::unwrap).collect();
        let expected =
            TraceRow { timestamp: Duration::from_secs(3), input_len: 1030, output_len: 50, hash_ids: vec![0, 7, 8] };
        assert_eq!(found, [(1, expected.clone()), (3, expected)]);
        assert_eq!(rows(trace_of(&[vec![4, 2]]).as_bytes()).next().unwrap().unwrap().1.hash_ids, [4, 2]);
    }

    #[test]
    fn a_wrong_row_is_named_by_its_line() {
        for (row, expected) in [
            ("{", "no JSON"),
            (r#"{"timestamp": 0, "input_length": 5, "output_length": 1}"#, "hash_ids is no list"),
            (r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [-1]}"#, "no whole number"),
            (r#"{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}"#, "expected 1 to"),
            (r#"{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}"#, "expected 2"),
            (r#"{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": [1]}"#, "timestamp"),
        ] {
            let error = rows(format!("{ROW}\n{row}\n").as_bytes()).nth(1).unwrap().unwrap_err();
            let reason = format!("{error:#}");
            assert!(reason.contains("line 2") && reason.contains(expected), "{reason}");
        }
    }
}
