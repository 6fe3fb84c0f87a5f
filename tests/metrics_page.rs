//! `docs/metrics.md` and what a running `tandem up` exports are the same list.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use support::process::ROOT;
use support::{Cluster, corpus};

/// A row of the page: `| name | type | unit | roles | meaning |`.
struct Row {
    kind: String,
    roles: BTreeSet<String>,
    /// Exported once something has happened that a single request does not bring about.
    is_on_event: bool,
}

fn page() -> BTreeMap<String, Row> {
    let page = std::fs::read_to_string(format!("{ROOT}/docs/metrics.md")).unwrap();
    let mut rows = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, kind, _unit, roles, meaning] = cells[..] else { panic!("not five columns: {line}") };
        let roles = roles.split(", ").map(str::to_string).collect();
        let row = Row { kind: kind.to_string(), roles, is_on_event: meaning.starts_with("On event.") };
        let name = name.trim_matches('`').to_string();
        assert!(rows.insert(name, row).is_none(), "twice: {line}");
    }
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_lists_what_is_exported_and_nothing_else() {
    let cluster = Cluster::up(&[]).await;
    cluster.api.complete(&corpus::greedy(&[7; 100], 5)).await;
    cluster.settle().await;
    let scrape = cluster.metrics().await;
    let (page, exported) = (page(), scrape.kinds());
    for (name, kind) in exported {
        assert!(name.starts_with("tandem_") || name.starts_with("vllm:"), "{name} has no prefix of ours or vLLM's");
        let row = page.get(name).unwrap_or_else(|| panic!("docs/metrics.md lacks `{name}` ({kind})"));
        assert_eq!(&row.kind, kind, "the type of {name}");
        let found: BTreeSet<String> = scrape.roles_of(name).into_iter().map(str::to_string).collect();
        assert!(found.is_subset(&row.roles), "{name} is exported by {found:?}");
        assert!(row.is_on_event || found == row.roles, "{name} is exported by {found:?} only");
    }
    for (name, row) in &page {
        assert!(row.is_on_event || exported.contains_key(name), "docs/metrics.md lists `{name}`, nobody exports it");
    }
    cluster.shut_down().await;
}
