//! Least loaded first.

use std::cmp::Reverse;
use std::collections::HashSet;

use common::ids::NodeId;

use super::view::{ClusterView, NodeLife, NodeView};

/// The decode node for a request: fewest requests, then most available blocks. Nodes of equal rank take
/// turns by `turn`. `None` if there is none outside `excluded`.
pub fn pick_decode_node<'a>(view: &'a ClusterView, excluded: &HashSet<NodeLife>, turn: usize) -> Option<&'a NodeView> {
    let rank = |node: &NodeView| (node.num_requests(), Reverse(node.load.num_available_blocks));
    // Ranked once: other requests open and end while this one looks.
    let candidates = view.decode.iter().filter(|node| !excluded.contains(&node.life()));
    let candidates: Vec<_> = candidates.map(|node| (rank(node), node)).collect();
    let best = candidates.iter().map(|(rank, _)| *rank).min()?;
    let equals: Vec<&NodeView> =
        candidates.into_iter().filter(|(rank, _)| *rank == best).map(|(_, node)| node).collect();
    Some(equals[turn % equals.len()])
}

/// Prefill nodes to propose, best first: fewest queued tokens, then fewest requests; nodes of equal rank
/// take turns. None for a prompt of at most `local_max` tokens: its hand-over would cost more than it saves.
pub fn pick_prefill_nodes(
    view: &ClusterView,
    num_tokens: usize,
    local_max: usize,
    num_max: usize,
    turn: usize,
) -> Vec<NodeId> {
    if num_tokens <= local_max || view.prefill.is_empty() {
        return Vec::new();
    }
    let start = turn % view.prefill.len();
    let mut candidates: Vec<&NodeView> = view.prefill[start..].iter().chain(&view.prefill[..start]).collect();
    candidates.sort_by_cached_key(|node| (node.load.num_queued_tokens, node.num_requests()));
    candidates.into_iter().take(num_max).map(|node| node.node.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::ids::Epoch;
    use common::wire::NodeLoad;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    fn node(name: &str, num_running: u32, num_open: usize, num_available_blocks: u32, queued: u64) -> NodeView {
        let load = NodeLoad { num_running, num_available_blocks, num_queued_tokens: queued, ..NodeLoad::default() };
        NodeView {
            node: NodeId::new(name).unwrap(),
            epoch: Epoch(1),
            load,
            num_open: Arc::new(AtomicUsize::new(num_open)),
        }
    }

    fn name(picked: Option<&NodeView>) -> Option<&str> {
        picked.map(|node| node.node.as_str())
    }

    #[test]
    fn least_loaded_decode_node_is_picked_and_equals_take_turns() {
        let view = ClusterView {
            decode: vec![node("a", 3, 0, 9, 0), node("b", 1, 0, 4, 0), node("c", 1, 0, 7, 0), node("d", 1, 0, 7, 0)],
            ..ClusterView::default()
        };
        let none = HashSet::new();
        assert_eq!(name(pick_decode_node(&view, &none, 0)), Some("c"));
        assert_eq!(name(pick_decode_node(&view, &none, 1)), Some("d"));
        let excluded: HashSet<NodeLife> = ["b", "c", "d"].map(|n| (NodeId::new(n).unwrap(), Epoch(1))).into();
        assert_eq!(name(pick_decode_node(&view, &excluded, 0)), Some("a"));
        assert!(pick_decode_node(&ClusterView::default(), &none, 0).is_none());
    }

    #[test]
    fn a_burst_does_not_all_go_to_the_node_that_was_idle_a_moment_ago() {
        let view = ClusterView { decode: vec![node("a", 0, 5, 9, 0), node("b", 2, 2, 9, 0)], ..ClusterView::default() };
        assert_eq!(name(pick_decode_node(&view, &HashSet::new(), 0)), Some("b"));
    }

    #[test]
    fn prefill_nodes_are_proposed_by_their_queue_and_not_for_short_prompts() {
        let view = ClusterView {
            prefill: vec![node("a", 0, 0, 0, 900), node("b", 0, 0, 0, 10), node("c", 0, 0, 0, 10)],
            ..ClusterView::default()
        };
        let names = |num_tokens, num_max, turn| -> Vec<String> {
            let picked = pick_prefill_nodes(&view, num_tokens, 64, num_max, turn);
            picked.iter().map(|id| id.to_string()).collect()
        };
        assert_eq!(names(65, 2, 0), ["b", "c"]);
        assert_eq!(names(65, 3, 2), ["c", "b", "a"]);
        assert!(names(64, 2, 0).is_empty());
    }
}
