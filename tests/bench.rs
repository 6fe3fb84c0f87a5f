//! The benchmarks as a user runs them: small, for their shape and not for their figures.
#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn transfer_measures_every_transport() {
    let args = ["bench", "transfer", "--rounds", "1", "--request-mib", "4", "--num-single", "3", "--cores", "0"];
    let output = Command::new(env!("CARGO_BIN_EXE_tandem")).args(args).output().unwrap();
    let (table, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}{log}");
    assert!(table.starts_with("two processes, not pinned to cores"), "{table}");
    for row in ["quic, 64 KiB", "quic, 1024 KiB", "shm, 64 KiB", "shm, 1024 KiB", "TCP, blocking", "memcpy"] {
        let line = table.lines().find_map(|line| line.strip_prefix(row)).unwrap_or_else(|| panic!("no {row}: {table}"));
        let rate: f64 = line.split_whitespace().next().unwrap().parse().unwrap();
        assert!(rate > 0.0, "{row}: {line}");
    }
}

#[test]
fn peers_measures_idle_connections_of_every_kind_at_both_ends() {
    // So many that making them takes several of the clock's ticks, of 10 ms, at both ends.
    let args = ["bench", "peers", "--count", "60", "--seconds", "1"];
    let output = Command::new(env!("CARGO_BIN_EXE_tandem")).args(args).output().unwrap();
    let (table, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}{log}");
    assert!(table.starts_with("60 connections, idle for 1 s"), "{table}");
    for kind in ["link", "pair", "watch"] {
        for end in ["dials", "dialled"] {
            let is_it = |line: &&str| line.split_whitespace().take(2).eq([kind, end]);
            let line = table.lines().find(is_it).unwrap_or_else(|| panic!("no {kind} {end}: {table}"));
            let numbers: Vec<f64> = line.split_whitespace().skip(2).map(|cell| cell.parse().unwrap()).collect();
            let [resident_kib, dialling_cpu_ms, idle_cpu_us, idle_core_percent] = numbers[..] else { panic!("{line}") };
            assert!(resident_kib > 0.0 && dialling_cpu_ms > 0.0, "{line}");
            // The same in other units, rounded: 1 us/s is 0.1 % of a core for a thousand.
            assert!(idle_cpu_us >= 0.0 && (idle_core_percent - idle_cpu_us / 10.0).abs() < 0.02, "{line}");
        }
    }
}

#[test]
fn control_measures_messages_alone_and_beside_kv() {
    let args = ["bench", "control", "--questions", "20", "--rounds", "1", "--request-mib", "2"];
    let output = Command::new(env!("CARGO_BIN_EXE_tandem")).args(args).output().unwrap();
    let (table, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}{log}");
    for row in ["nothing beside it", "KV over quic", "KV over shm"] {
        let line = table.lines().find_map(|line| line.strip_prefix(row)).unwrap_or_else(|| panic!("no {row}: {table}"));
        let numbers: Vec<f64> = line.split_whitespace().take(4).map(|cell| cell.parse().unwrap()).collect();
        assert!(numbers.is_sorted() && numbers[0] > 0.0, "{row}: {line}");
    }
}

#[test]
fn extents_that_cannot_be_are_refused_in_words() {
    let cases = [
        (["--extent-tokens", "0"], "use a multiple of 16 up to 1024"),
        (["--extent-tokens", "17"], "use a multiple of 16 up to 1024"),
        (["--extent-tokens", "2048"], "use a multiple of 16 up to 1024"),
        (["--request-mib", "3"], "holds 768 tokens, less than an extent of 1024"),
    ];
    for (flags, reason) in cases {
        let args = [&["bench", "transfer"][..], &flags].concat();
        let output = Command::new(env!("CARGO_BIN_EXE_tandem")).args(args).output().unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(reason), "{said}");
    }
}
