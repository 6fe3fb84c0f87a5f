//! What a node must say about itself when no request runs: nothing is held.

use std::collections::BTreeMap;

use super::metrics::Scrape;

/// Zero on every idle node.
const ZERO_GAUGES: [&str; 7] = [
    "tandem_kv_blocks_referenced",
    "tandem_kv_parked_bytes",
    "tandem_num_requests_running",
    "tandem_num_requests_waiting",
    "tandem_open_requests",
    "tandem_fabric_landings",
    "tandem_fabric_receive_bytes",
];

/// Blocks per node: all of a pool's are free, cached or referenced.
pub(crate) fn total_blocks(scrape: &Scrape) -> BTreeMap<String, f64> {
    let mut total = BTreeMap::new();
    for gauge in ["tandem_kv_blocks_free", "tandem_kv_blocks_cached", "tandem_kv_blocks_referenced"] {
        for (node, value) in scrape.by_node(gauge, &[]) {
            *total.entry(node).or_default() += value;
        }
    }
    total
}

/// What an idle process still holds; empty if nothing.
pub(crate) fn held(scrape: &Scrape, total: &BTreeMap<String, f64>) -> Vec<String> {
    let mut held = Vec::new();
    for gauge in ZERO_GAUGES {
        for (node, value) in scrape.by_node(gauge, &[]) {
            if value != 0.0 {
                held.push(format!("{node}: {gauge} is {value}"));
            }
        }
    }
    for (node, value) in scrape.by_node("tandem_fabric_streams", &[("traffic", "bulk")]) {
        if value != 0.0 {
            held.push(format!("{node}: {value} bulk streams are open"));
        }
    }
    let free = scrape.by_node("tandem_kv_blocks_free", &[]);
    let cached = scrape.by_node("tandem_kv_blocks_cached", &[]);
    for (node, total) in total {
        let (free, cached) = (free.get(node).copied().unwrap_or(-1.0), cached.get(node).copied().unwrap_or(-1.0));
        if free + cached != *total {
            held.push(format!("{node}: {free} free and {cached} cached blocks of {total}"));
        }
    }
    held
}

/// Control streams of an idle cluster whose proxy lists its nodes: the proxy watches each node and its blocks,
/// nothing else.
pub(crate) fn streams_beyond_watches(scrape: &Scrape) -> Vec<String> {
    let open = |role: &str| scrape.by_node("tandem_fabric_streams", &[("traffic", "control"), ("role", role)]);
    let watched: Vec<(String, f64)> = open("prefill-node").into_iter().chain(open("decode-node")).collect();
    let num_watches = 2.0 * watched.len() as f64;
    let expected = watched.into_iter().map(|(node, num)| (node, num, 2.0));
    let expected = expected.chain(open("proxy").into_iter().map(|(node, num)| (node, num, num_watches)));
    let is_wrong = expected.filter(|(_, num, expected)| num != expected);
    is_wrong.map(|(node, num, expected)| format!("{node}: {num} control streams, expected {expected}")).collect()
}
