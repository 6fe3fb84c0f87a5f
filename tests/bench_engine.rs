//! `tandem bench engine` as a user runs it: small, for its shape and not for its figures.
#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn sharing_measures_both_engines_alone_in_one_process_and_in_two() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny");
    let load = ["--prompt-len", "64", "--batch", "2", "--context", "16", "--num-tokens", "500", "--rounds", "2"];
    let args = [&["bench", "engine", "--sharing", "--model", model, "--threads", "2"][..], &load].concat();
    let output = Command::new(env!("CARGO_BIN_EXE_tandem")).args(args).output().unwrap();
    let (table, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}{log}");
    assert!(table.contains("2 threads, prefill 64 beside decode batch 2, context 16"), "{table}");
    for arm in ["alone", "one process", "two processes"] {
        for figure in ["prefill, tok/s", "decode, tok/s", "gap p50, ms", "gap p99, ms"] {
            let start = format!("{arm:<16}{figure:<16}");
            let line = table.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("{table}"));
            let words: Vec<&str> = line.split_whitespace().collect();
            assert!(words[0].parse::<f64>().unwrap() >= 0.0, "{line}");
            assert_eq!(words.len() > 1, arm != "alone", "ratios are to each alone: {table}");
        }
    }
}
