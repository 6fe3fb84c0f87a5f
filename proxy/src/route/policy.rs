//! Where a request costs least, in tokens: what waits there already, and what it lacks there.
//!
//! A prefix that a node holds is worth the tokens that need not be computed (prefill) or sent (decode), and no
//! more. So a popular prefix draws requests to the node that holds it until what waits there outweighs it; then
//! the next one goes elsewhere, which holds it from then on, too.
//!
//! What a node holds only in a tier has to be loaded: eight such tokens cost as much as one that is computed. So the
//! pool comes before a tier, and a tier long before nothing.

use std::cmp::Reverse;
use std::collections::HashSet;

use common::wire::PrefixPeer;

use super::held::HeldPrefixes;
use super::view::{ClusterView, NodeView, Stay};

/// Tokens that are loaded from a tier in the time in which one is computed. Measured for host memory, they are 17 to
/// 33 (`docs/performance.md`, prefixes by their source); fewer here, since a node may also find computing faster.
const TIER_TOKENS_PER_TOKEN: usize = 8;

/// A prompt to be placed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PromptDemand {
    /// Its length.
    pub num_tokens: usize,
    /// What nodes are believed to hold of it.
    pub held: HeldPrefixes,
}

impl PromptDemand {
    /// Leading tokens that the node is believed to hold, in its pool or in a tier. At least the last one is not: it
    /// is always computed.
    pub fn num_held_tokens(&self, node: &NodeView) -> usize {
        self.num_pool_tokens(node).max(self.without_last(self.held.num_tier_tokens(&node.life())))
    }

    /// Leading tokens that the node is believed to hold in its pool.
    pub fn num_pool_tokens(&self, node: &NodeView) -> usize {
        self.without_last(self.held.num_pool_tokens(&node.life()))
    }

    /// Leading tokens behind those of its pool that it is believed to hold in a tier.
    pub fn num_tier_tokens(&self, node: &NodeView) -> usize {
        self.num_held_tokens(node) - self.num_pool_tokens(node)
    }

    /// What the prompt costs there, in computed tokens: those that the node lacks, and a share of those that it
    /// has to load.
    pub fn num_missing_tokens(&self, node: &NodeView) -> usize {
        let num_computed_tokens = self.num_tokens - self.num_held_tokens(node);
        num_computed_tokens + self.num_tier_tokens(node).div_ceil(TIER_TOKENS_PER_TOKEN)
    }

    /// For nodes that do not look into their tiers.
    pub fn only_in_pools(&self) -> Self {
        Self { num_tokens: self.num_tokens, held: self.held.only_in_pools() }
    }

    fn without_last(&self, num_tokens: usize) -> usize {
        num_tokens.min(self.num_tokens.saturating_sub(1))
    }
}

/// The decode node for a request: the least of its requests, each weighing `request_weight_tokens`, and the
/// tokens whose KV it lacks; then most available blocks. Nodes of equal rank take turns by `turn`. `None` if
/// there is none outside `excluded`.
pub fn pick_decode_node<'a>(
    view: &'a ClusterView,
    excluded: &HashSet<Stay>,
    demand: &PromptDemand,
    request_weight_tokens: usize,
    turn: usize,
) -> Option<&'a NodeView> {
    let rank = |node: &NodeView| {
        let waiting = node.num_requests().saturating_mul(request_weight_tokens);
        (waiting.saturating_add(demand.num_missing_tokens(node)), Reverse(node.load.num_available_blocks))
    };
    // Ranked once: other requests open and end while this one looks.
    let candidates = view.decode.iter().filter(|node| !excluded.contains(&node.stay));
    let candidates: Vec<_> = candidates.map(|node| (rank(node), node)).collect();
    let best = candidates.iter().map(|(rank, _)| *rank).min()?;
    let equals: Vec<&NodeView> =
        candidates.into_iter().filter(|(rank, _)| *rank == best).map(|(_, node)| node).collect();
    Some(equals[turn % equals.len()])
}

/// Prefill nodes to propose, best first: fewest tokens until the prompt is computed, those queued and those
/// missing; then fewest requests; nodes of equal rank take turns. None for a prompt of at most `local_max`
/// tokens: its hand-over would cost more than it saves.
pub fn pick_prefill_nodes<'a>(
    view: &'a ClusterView,
    demand: &PromptDemand,
    local_max: usize,
    num_max: usize,
    turn: usize,
) -> Vec<&'a NodeView> {
    if demand.num_tokens <= local_max || view.prefill.is_empty() {
        return Vec::new();
    }
    let start = turn % view.prefill.len();
    let mut candidates: Vec<&NodeView> = view.prefill[start..].iter().chain(&view.prefill[..start]).collect();
    candidates.sort_by_cached_key(|node| {
        let num_until_computed = node.num_queued_tokens().saturating_add(demand.num_missing_tokens(node) as u64);
        (num_until_computed, node.num_requests())
    });
    candidates.truncate(num_max);
    candidates
}

/// The prefill node from which `candidate` may fetch what it lacks: the one whose pool, out of which alone peers are
/// served, holds the longest prefix, if that is longer than what the candidate holds anywhere and the decode node in
/// its pool; of equal ones the one with fewer requests. Nodes that drain count, too. `None` without a candidate: a
/// prefix that a decode node lacks is prefilled as any other.
pub fn pick_prefix_peer(
    view: &ClusterView,
    demand: &PromptDemand,
    candidate: Option<&NodeView>,
    decode_node: &NodeView,
) -> Option<PrefixPeer> {
    let candidate = candidate?;
    let num_held_tokens = demand.num_held_tokens(candidate).max(demand.num_pool_tokens(decode_node));
    let others = view.prefill.iter().chain(&view.draining_prefill).filter(|node| node.node != candidate.node);
    let holders = others.map(|node| (demand.num_pool_tokens(node), node)).filter(|(num, _)| *num > num_held_tokens);
    let (num_tokens, node) = holders.max_by_key(|(num, node)| (*num, Reverse(node.num_requests())))?;
    Some(PrefixPeer { node: node.node.clone(), num_tokens: num_tokens as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::ids::{Epoch, NodeId};
    use common::wire::NodeLoad;
    use std::sync::Arc;

    use crate::route::{OthersWork, OwnWork};

    const WEIGHT: usize = 256;

    /// One that told of so much, whoever's it is, and at which this proxy has `num_open` requests.
    fn node(name: &str, num_running: u32, num_open: u64, num_available_blocks: u32, queued: u64) -> NodeView {
        let load = NodeLoad { num_running, num_available_blocks, num_queued_tokens: queued, ..NodeLoad::default() };
        let own = OwnWork::default();
        own.requests.add(num_open);
        let others = OthersWork::of(&load, &own);
        let stay = Stay(u64::from(name.as_bytes()[0]));
        NodeView { node: NodeId::new(name).unwrap(), epoch: Epoch(1), stay, load, others, own: Arc::new(own) }
    }

    fn name(picked: Option<&NodeView>) -> Option<&str> {
        picked.map(|node| node.node.as_str())
    }

    /// A prompt of which these nodes hold so many granules.
    fn demand(num_tokens: usize, held: &[(&str, usize)]) -> PromptDemand {
        let mut prefixes = HeldPrefixes::default();
        for (node, num_granules) in held {
            prefixes.add(&(NodeId::new(*node).unwrap(), Epoch(1)), *num_granules);
        }
        PromptDemand { num_tokens, held: prefixes }
    }

    /// The same with what these nodes hold in tiers.
    fn with_tiers(mut demand: PromptDemand, held: &[(&str, usize)]) -> PromptDemand {
        for (node, num_granules) in held {
            demand.held.add_in_tiers(&(NodeId::new(*node).unwrap(), Epoch(1)), *num_granules);
        }
        demand
    }

    fn pick<'a>(view: &'a ClusterView, demand: &PromptDemand, turn: usize) -> Option<&'a str> {
        name(pick_decode_node(view, &HashSet::new(), demand, WEIGHT, turn))
    }

    #[test]
    fn least_loaded_decode_node_is_picked_and_equals_take_turns() {
        let view = ClusterView {
            decode: vec![node("a", 3, 0, 9, 0), node("b", 1, 0, 4, 0), node("c", 1, 0, 7, 0), node("d", 1, 0, 7, 0)],
            ..ClusterView::default()
        };
        let demand = demand(1000, &[]);
        assert_eq!(pick(&view, &demand, 0), Some("c"));
        assert_eq!(pick(&view, &demand, 1), Some("d"));
        let excluded: HashSet<Stay> = view.decode[1..].iter().map(|node| node.stay).collect();
        assert_eq!(name(pick_decode_node(&view, &excluded, &demand, WEIGHT, 0)), Some("a"));
        assert!(pick(&ClusterView::default(), &demand, 0).is_none());
    }

    #[test]
    fn a_burst_does_not_all_go_to_the_node_that_was_idle_a_moment_ago() {
        let view = ClusterView { decode: vec![node("a", 0, 5, 9, 0), node("b", 2, 2, 9, 0)], ..ClusterView::default() };
        assert_eq!(pick(&view, &demand(9, &[]), 0), Some("b"));
    }

    #[test]
    fn requests_of_this_proxy_that_are_over_outweigh_no_prefix() {
        let held = demand(100, &[("a", 2)]);
        let view = ClusterView { decode: vec![node("a", 1, 1, 9, 0), node("b", 0, 0, 9, 0)], ..ClusterView::default() };
        assert_eq!(pick(&view, &held, 0), Some("b"));
        // The node has not told of it yet.
        view.decode[0].own.requests.subtract(1);
        assert_eq!(pick(&view, &held, 1), Some("a"));
    }

    #[test]
    fn decode_node_with_the_prefix_is_picked_until_its_requests_outweigh_it() {
        let held = demand(2000, &[("a", 64)]); // 1,024 tokens: four requests
        for (num_more, expected) in [(0, "a"), (3, "a"), (5, "b")] {
            let decode = vec![node("a", num_more, 0, 9, 0), node("b", 0, 0, 9, 0)];
            let view = ClusterView { decode, ..ClusterView::default() };
            assert_eq!(pick(&view, &held, 0), Some(expected), "{num_more} requests more");
        }
    }

    #[test]
    fn prefill_nodes_are_proposed_by_their_queue_and_not_for_short_prompts() {
        let view = ClusterView {
            prefill: vec![node("a", 0, 0, 0, 900), node("b", 0, 0, 0, 10), node("c", 0, 0, 0, 10)],
            ..ClusterView::default()
        };
        let names = |num_tokens, num_max, turn| -> Vec<&str> {
            let picked = pick_prefill_nodes(&view, &demand(num_tokens, &[]), 64, num_max, turn);
            picked.into_iter().map(|node| node.node.as_str()).collect()
        };
        assert_eq!(names(65, 2, 0), ["b", "c"]);
        assert_eq!(names(65, 3, 2), ["c", "b", "a"]);
        assert!(names(64, 2, 0).is_empty());
    }

    #[test]
    fn prefill_node_with_the_prefix_is_worth_as_long_a_queue_as_it_saves() {
        let held = demand(2000, &[("a", 64)]);
        for (queued, expected) in [(0, "a"), (1000, "a"), (1100, "b")] {
            let prefill = vec![node("b", 0, 0, 0, 0), node("a", 0, 0, 0, queued)];
            let view = ClusterView { prefill, ..ClusterView::default() };
            assert_eq!(pick_prefill_nodes(&view, &held, 64, 1, 0)[0].node.as_str(), expected, "{queued} queued");
        }
    }

    #[test]
    fn longest_prefix_elsewhere_is_named_if_it_is_longer_than_what_is_there() {
        let held = demand(2000, &[("a", 64), ("b", 10), ("c", 64), ("d", 20)]);
        let decode = vec![node("d", 0, 0, 9, 0), node("e", 0, 0, 9, 0)];
        let prefill = vec![node("a", 3, 0, 0, 0), node("b", 0, 0, 0, 0)];
        let mut view =
            ClusterView { prefill, decode, draining_prefill: vec![node("c", 1, 0, 0, 0)], ..ClusterView::default() };
        let pick = |view: &ClusterView, demand: &PromptDemand, candidate: Option<usize>, decode: usize| {
            let candidate = candidate.map(|index| &view.prefill[index]);
            let peer = pick_prefix_peer(view, demand, candidate, &view.decode[decode]);
            peer.map(|peer| (peer.node.to_string(), peer.num_tokens))
        };
        assert_eq!(pick(&view, &held, Some(1), 0), Some(("c".to_string(), 1024)), "it drains, and has fewer requests");
        view.draining_prefill.clear();
        assert_eq!(pick(&view, &held, Some(1), 0), Some(("a".to_string(), 1024)));
        assert_eq!(pick(&view, &held, Some(0), 0), None, "the candidate has the longest itself");
        assert_eq!(pick(&view, &held, None, 0), None, "nobody would fetch it");
        let at_decode = demand(2000, &[("a", 20), ("d", 20)]);
        assert_eq!(pick(&view, &at_decode, Some(1), 0), None, "the decode node has as much");
        assert_eq!(pick(&view, &at_decode, Some(1), 1), Some(("a".to_string(), 320)));
        assert_eq!(pick(&view, &demand(2000, &[]), Some(1), 1), None);
    }

    #[test]
    fn prefix_in_the_pool_comes_before_one_in_a_tier_and_that_before_none() {
        // 1,024 of 2,000 tokens: in a tier they cost 128.
        let held = with_tiers(demand(2000, &[("a", 64)]), &[("b", 64)]);
        for (queued_at, expected) in [([0, 0, 0], "a"), ([129, 0, 0], "b"), ([127, 0, 0], "a"), ([9999, 897, 0], "c")] {
            let nodes = ["a", "b", "c"].into_iter().zip(queued_at);
            let prefill: Vec<_> = nodes.map(|(name, queued)| node(name, 0, 0, 0, queued)).collect();
            let view = ClusterView { prefill, ..ClusterView::default() };
            let picked = pick_prefill_nodes(&view, &held, 64, 1, 2)[0];
            assert_eq!(picked.node.as_str(), expected, "{queued_at:?} tokens queued");
        }
    }

    #[test]
    fn pool_and_tier_of_one_node_count_once() {
        let missing = |held: &PromptDemand| held.num_missing_tokens(&node("a", 0, 0, 0, 0));
        assert_eq!(missing(&with_tiers(demand(2000, &[("a", 64)]), &[("a", 64)])), 976);
        assert_eq!(missing(&with_tiers(demand(2000, &[("a", 32)]), &[("a", 64)])), 976 + 64);
        assert_eq!(missing(&with_tiers(demand(2000, &[("a", 64)]), &[("a", 32)])), 976);
        // The last token is computed wherever the rest is.
        assert_eq!(missing(&with_tiers(demand(32, &[]), &[("a", 2)])), 1 + 4);
    }

    #[test]
    fn node_that_holds_a_prefix_only_in_a_tier_is_nobodys_prefix_peer() {
        let view = ClusterView {
            prefill: vec![node("a", 0, 0, 0, 0), node("b", 0, 0, 0, 0)],
            decode: vec![node("d", 0, 0, 9, 0)],
            draining_prefill: vec![node("c", 0, 0, 0, 0)],
            ..ClusterView::default()
        };
        let peer = |held: &PromptDemand| {
            let peer = pick_prefix_peer(&view, held, Some(&view.prefill[1]), &view.decode[0]);
            peer.map(|peer| (peer.node.to_string(), peer.num_tokens))
        };
        assert_eq!(peer(&with_tiers(demand(2000, &[]), &[("a", 64), ("c", 64)])), None);
        assert_eq!(peer(&with_tiers(demand(2000, &[("a", 8)]), &[("a", 64)])), Some(("a".to_string(), 128)));
        // Who has it in a tier of its own loads it.
        assert_eq!(peer(&with_tiers(demand(2000, &[("a", 64)]), &[("b", 64)])), None);
        // A decode node sends from its pool alone.
        assert!(peer(&with_tiers(demand(2000, &[("a", 64)]), &[("d", 64)])).is_some());
    }

    #[test]
    fn popular_prefix_spreads_over_the_nodes_in_a_burst_that_no_status_shows_yet() {
        // 1,024 of 1,100 tokens are held by `a`; nobody's status changes meanwhile.
        let held = demand(1100, &[("a", 64)]);
        let prefill = vec![node("a", 0, 0, 0, 0), node("b", 0, 0, 0, 0), node("c", 0, 0, 0, 0)];
        let decode = vec![node("a", 0, 0, 9, 0), node("b", 0, 0, 9, 0), node("c", 0, 0, 9, 0)];
        let view = ClusterView { prefill, decode, ..ClusterView::default() };
        let (mut num_prefills, mut num_decodes) = ([0; 3], [0; 3]);
        let position = |nodes: &[NodeView], of: &NodeView| nodes.iter().position(|n| n.node == of.node).unwrap();
        for turn in 0..60 {
            let picked = pick_prefill_nodes(&view, &held, 64, 1, turn)[0];
            num_prefills[position(&view.prefill, picked)] += 1;
            picked.own.tokens.add(held.num_missing_tokens(picked) as u64);
            let picked = pick_decode_node(&view, &HashSet::new(), &held, WEIGHT, turn).unwrap();
            num_decodes[position(&view.decode, picked)] += 1;
            picked.own.requests.add(1);
        }
        // The others get as much work as the holder, which serves more requests with it.
        let work: Vec<u64> = view.prefill.iter().map(NodeView::num_queued_tokens).collect();
        assert!(work.iter().max().unwrap() - work.iter().min().unwrap() <= 1100, "{work:?}");
        assert!(num_prefills[0] > num_prefills[1] && num_prefills[1] > 0, "{num_prefills:?}");
        let most = num_decodes.iter().max().unwrap() - num_decodes.iter().min().unwrap();
        assert!(most <= 5, "a prefix of four requests' weight shifts no more: {num_decodes:?}");
    }
}
