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

/// Whether processes may have a network of their own here, with a TUN device in it.
fn can_emulate_links() -> bool {
    let namespace = Command::new("unshare").args(["--user", "--map-root-user", "--net", "ip", "link"]).output();
    let can = std::path::Path::new("/dev/net/tun").exists() && namespace.is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("NOT CHECKED: this machine lacks /dev/net/tun, unshare, ip, or the right to make network namespaces");
    }
    can
}

#[test]
fn over_an_emulated_link_nothing_is_faster_than_its_rate_and_both_protocols_meet_its_losses() {
    if !can_emulate_links() {
        return;
    }
    let link = ["--rtt", "2ms", "--loss", "0.01", "--rate", "200Mbit"];
    let load = ["--rounds", "2", "--request-mib", "2", "--num-single", "1", "--extent-tokens", "256", "--cores", "0"];
    let controllers = ["--transports", "quic,shm", "--congestion-control", "cubic,bbr,fixed"];
    let args = [&["bench", "transfer"][..], &link, &load, &controllers].concat();
    let output = Command::new(env!("CARGO_BIN_EXE_tandem")).args(args).output().unwrap();
    let (table, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}{log}");
    assert!(table.contains("a link of 2ms and 1 % loss, packets of 1500 bytes, 200 Mbit/s"), "{table}");
    for row in ["quic cubic, 256 KiB", "quic bbr, 256 KiB", "quic fixed, 256 KiB", "TLS over TCP", "TCP, blocking"] {
        let line = table.lines().find_map(|line| line.strip_prefix(row)).unwrap_or_else(|| panic!("no {row}: {table}"));
        let of_rate: f64 = line.split_whitespace().nth(3).unwrap().parse().unwrap();
        assert!(of_rate <= 1.0, "{row} was faster than the link: {table}");
    }
    assert!(!table.contains("shm"), "shared memory goes over no link: {table}");
    let told = table.lines().find(|line| line.contains("packets entered")).unwrap();
    let mut counts = told.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
    let (num_entered, num_lost) = (counts.next().unwrap(), counts.next().unwrap());
    // 16 MiB of payload at the least, with the first request of each row.
    assert!(num_entered > 10_000 && (num_entered / 300..num_entered / 40).contains(&num_lost), "{told}");
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
