//! How a node comes by a prefix that it lacks itself and that the decode node, a peer or the store holds: the
//! cheapest of five ways, as expected times.
//!
//! ```text
//! tokens      0        cached       held, stored, peer's  end
//!             |---------|----------------|-----------------|
//! recompute             | ahead, then all of it computed   |
//! fetch, peer           |~ bytes, while ~| then the rest   |
//!                         those ahead compute
//! store                 |compute>|<~bytes| then the rest   |
//! local                                  | the decode node's own estimate
//! ```
//!
//! What a way costs behind the prompt (KV of the rest to the decode node) is left out: it overlaps with the
//! computation, and the local way alone is without it. Figures are measured or set by an operator; a wrong
//! one costs time, never a token.

use std::time::Duration;

use super::overlap::{Overlap, OverlapPace};

/// Another way than recomputing must cost at most this share of the best one before it: near ties move no
/// bytes and disturb no decode node.
const WORTH_IT: f64 = 0.8;

/// How fast a node is expected to compute prompts before it has computed one.
pub const UNMEASURED_PREFILL_TOKENS_PER_SECOND: f64 = 2000.0;
/// How fast KV is expected to come from a node before any has.
pub const UNMEASURED_FETCH_BYTES_PER_SECOND: f64 = 500e6;

/// What is known when a prompt is admitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefixCosts {
    /// Tokens of the prompt.
    pub num_tokens: u32,
    /// Leading tokens whose KV is here.
    pub num_cached_tokens: u32,
    /// Leading tokens whose KV the decode node holds.
    pub num_held_tokens: u32,
    /// Prompt tokens that are computed here before this prompt's.
    pub num_tokens_ahead: u64,
    /// How fast prompts are computed here.
    pub prefill_tokens_per_second: f64,
    /// KV of one token in all layers.
    pub kv_bytes_per_token: u64,
    /// How fast KV comes from the decode node; `None` if it cannot.
    pub fetch_bytes_per_second: Option<f64>,
    /// To the decode node and back.
    pub round_trip: Duration,
    /// What the rest behind its own prefix would cost the decode node, if it offers to compute it.
    pub local_rest: Option<Duration>,
    /// What the store holds, if this node has one that holds something.
    pub stored: Option<StoredPrefix>,
    /// What another prefill node is believed to hold, if one is.
    pub peer: Option<PeerPrefix>,
}

/// A prefix that the store holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StoredPrefix {
    /// Leading tokens whose KV is there.
    pub num_tokens: u32,
    /// What loading those that are not in the pool is expected to take.
    pub load: Duration,
}

/// A prefix that another prefill node is believed to hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PeerPrefix {
    /// Leading tokens whose KV is there.
    pub num_tokens: u32,
    /// How fast KV comes from there.
    pub bytes_per_second: f64,
    /// Until the first of it can come: asking, and a connection if there is none.
    pub asking: Duration,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrefixChoice {
    /// Compute everything behind the own prefix.
    Recompute,
    /// Load what the store holds, and compute the rest.
    Store,
    /// Have the decode node send what it holds, and compute the rest.
    Fetch,
    /// Have another prefill node send what it holds, and compute the rest.
    Peer,
    /// Leave the rest to the decode node.
    Local,
}

impl PrefixChoice {
    /// The value of the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            PrefixChoice::Recompute => "recompute",
            PrefixChoice::Store => "store",
            PrefixChoice::Fetch => "fetch",
            PrefixChoice::Peer => "peer",
            PrefixChoice::Local => "local",
        }
    }
}

impl PrefixCosts {
    /// Until token #1 if everything behind the own prefix is computed here.
    pub fn recompute(&self) -> Duration {
        self.compute(self.num_tokens_ahead) + self.compute(u64::from(self.num_tokens - self.num_cached_tokens))
    }

    /// Until token #1 if the decode node's prefix is fetched; those ahead are computed meanwhile.
    pub fn fetch(&self) -> Option<Duration> {
        self.transfer(self.num_held_tokens, self.fetch_bytes_per_second?, self.round_trip)
    }

    /// The same of the peer's prefix.
    pub fn peer(&self) -> Option<Duration> {
        let PeerPrefix { num_tokens, bytes_per_second, asking } = self.peer?;
        self.transfer(num_tokens, bytes_per_second, asking)
    }

    fn transfer(&self, num_tokens: u32, bytes_per_second: f64, asking: Duration) -> Option<Duration> {
        let num_lacking_tokens = num_tokens.checked_sub(self.num_cached_tokens).filter(|num| *num > 0)?;
        let num_bytes = u64::from(num_lacking_tokens) * self.kv_bytes_per_token;
        let transfer = time_for(num_bytes as f64, bytes_per_second).saturating_add(asking);
        let rest = self.compute(u64::from(self.num_tokens - num_tokens));
        Some(transfer.max(self.compute(self.num_tokens_ahead)).saturating_add(rest))
    }

    /// Until token #1 if what is stored is loaded; meanwhile those ahead are computed, then its front
    /// ([`super::overlap`]).
    pub fn store(&self) -> Option<Duration> {
        let stored = self.stored.filter(|stored| stored.num_tokens > self.num_cached_tokens)?;
        let rest = self.compute(u64::from(self.num_tokens - stored.num_tokens));
        let meet = self.overlap(1).meet;
        Some(meet.max(self.compute(self.num_tokens_ahead)).saturating_add(rest))
    }

    /// How what is stored is divided between loading and computing: nothing of it if nothing is stored.
    pub fn overlap(&self, block_size: usize) -> Overlap {
        let num_tokens = self.num_stored_tokens().saturating_sub(self.num_cached_tokens) as usize;
        let load = self.stored.map_or(Duration::ZERO, |stored| stored.load);
        // What takes no time is divided as if it took the least that can be told.
        let load_tokens_per_second = num_tokens as f64 / load.max(Duration::from_nanos(1)).as_secs_f64();
        let pace = OverlapPace { compute_tokens_per_second: self.prefill_tokens_per_second, load_tokens_per_second };
        pace.divide(num_tokens, self.compute(self.num_tokens_ahead), block_size)
    }

    /// Until token #1 if the decode node is told to go on alone.
    pub fn local(&self) -> Option<Duration> {
        if self.num_lacking_tokens() == 0 {
            return None;
        }
        Some(self.local_rest?.saturating_add(self.round_trip / 2))
    }

    /// The cheapest way. `None` if nobody holds anything that is lacking here.
    ///
    /// # Panics
    /// If more tokens are cached, held, stored or at the peer than there are.
    pub fn choose(&self) -> Option<PrefixChoice> {
        assert!(
            self.num_cached_tokens.max(self.num_elsewhere()) < self.num_tokens,
            "a hit never covers the last token"
        );
        if self.num_elsewhere() <= self.num_cached_tokens {
            return None;
        }
        let mut best = (PrefixChoice::Recompute, self.recompute());
        for (choice, cost) in [
            (PrefixChoice::Store, self.store()),
            (PrefixChoice::Fetch, self.fetch()),
            (PrefixChoice::Peer, self.peer()),
            (PrefixChoice::Local, self.local()),
        ] {
            if let Some(cost) = cost.filter(|cost| cost.as_secs_f64() <= best.1.as_secs_f64() * WORTH_IT) {
                best = (choice, cost);
            }
        }
        Some(best.0)
    }

    /// What computing the prefix itself would take: a fetch that is slower is not waited for.
    pub fn recompute_prefix(&self) -> Duration {
        self.compute(u64::from(self.num_lacking_tokens()))
    }

    /// The same of what the store has.
    pub fn recompute_stored(&self) -> Duration {
        self.compute(u64::from(self.num_stored_tokens().saturating_sub(self.num_cached_tokens)))
    }

    /// The same of what the peer has.
    pub fn recompute_peer(&self) -> Duration {
        self.compute(u64::from(self.num_peer_tokens().saturating_sub(self.num_cached_tokens)))
    }

    /// Leading tokens that anybody else holds.
    fn num_elsewhere(&self) -> u32 {
        self.num_held_tokens.max(self.num_stored_tokens()).max(self.num_peer_tokens())
    }

    fn num_peer_tokens(&self) -> u32 {
        self.peer.map_or(0, |peer| peer.num_tokens)
    }

    fn num_stored_tokens(&self) -> u32 {
        self.stored.map_or(0, |stored| stored.num_tokens)
    }

    fn num_lacking_tokens(&self) -> u32 {
        self.num_held_tokens.saturating_sub(self.num_cached_tokens)
    }

    fn compute(&self, num_tokens: u64) -> Duration {
        // Far below what overflows when a few are added, and longer than anybody waits.
        time_for(num_tokens as f64, self.prefill_tokens_per_second)
    }
}

/// At most a year; so long too if the speed is zero, or none.
pub(super) fn time_for(amount: f64, per_second: f64) -> Duration {
    const YEAR_SECONDS: f64 = 365.0 * 24.0 * 60.0 * 60.0;
    Duration::from_secs_f64(if per_second > 0.0 { (amount / per_second).min(YEAR_SECONDS) } else { YEAR_SECONDS })
}

/// What computing `num_tokens` behind `num_tokens_ahead` takes at this speed: a decode node's offer.
pub fn expected_prefill(num_tokens: u64, num_tokens_ahead: u64, tokens_per_second: f64) -> Duration {
    time_for(num_tokens.saturating_add(num_tokens_ahead) as f64, tokens_per_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// 1000 tokens, 100 of them cached, 900 held; recomputing takes 900 ms, the rest alone 100 ms.
    fn costs() -> PrefixCosts {
        PrefixCosts {
            num_tokens: 1000,
            num_cached_tokens: 100,
            num_held_tokens: 900,
            num_tokens_ahead: 0,
            prefill_tokens_per_second: 1000.0,
            kv_bytes_per_token: 1000,
            fetch_bytes_per_second: None,
            round_trip: Duration::ZERO,
            local_rest: None,
            stored: None,
            peer: None,
        }
    }

    fn fetching(bytes_per_second: f64) -> PrefixCosts {
        PrefixCosts { fetch_bytes_per_second: Some(bytes_per_second), ..costs() }
    }

    #[test]
    fn each_way_costs_what_the_drawing_says() {
        let costs = PrefixCosts { local_rest: Some(70 * MS), round_trip: 10 * MS, ..fetching(8e6) };
        assert_eq!(costs.recompute(), 900 * MS);
        assert_eq!(costs.fetch(), Some((100 + 10 + 100) * MS));
        assert_eq!(costs.local(), Some(75 * MS));
        assert_eq!(costs.recompute_prefix(), 800 * MS);
        let behind = PrefixCosts { num_tokens_ahead: 500, ..costs };
        assert_eq!(behind.recompute(), 1400 * MS);
        assert_eq!(behind.fetch(), Some(600 * MS), "the bytes come while those ahead are computed");
        assert_eq!(behind.local(), costs.local(), "its queue is not ours");
    }

    #[test]
    fn cheapest_is_chosen() {
        let choose = |fetch: Option<f64>, local: Option<u64>| {
            let local_rest = local.map(Duration::from_millis);
            PrefixCosts { fetch_bytes_per_second: fetch, local_rest, ..costs() }.choose()
        };
        assert_eq!(choose(None, None), Some(PrefixChoice::Recompute));
        assert_eq!(choose(Some(8e6), None), Some(PrefixChoice::Fetch));
        assert_eq!(choose(None, Some(100)), Some(PrefixChoice::Local));
        assert_eq!(choose(Some(8e6), Some(100)), Some(PrefixChoice::Local), "100 ms against 200");
        assert_eq!(choose(Some(8e6), Some(500)), Some(PrefixChoice::Fetch), "500 ms against 200");
        assert_eq!(choose(Some(1e6), Some(2000)), Some(PrefixChoice::Recompute), "900 ms against 900 and 2000");
    }

    #[test]
    fn what_is_stored_is_one_more_way() {
        let stored = |num_tokens, millis| Some(StoredPrefix { num_tokens, load: millis * MS });
        let costs = PrefixCosts { stored: stored(800, 50), ..costs() };
        // 700 tokens in 50 ms, of which 46 are computed in that time.
        assert_eq!(costs.overlap(1).num_computed_tokens, 46);
        assert_eq!(costs.overlap(16).num_computed_tokens, 32);
        assert_eq!(costs.store().map(|cost| cost.as_millis()), Some(46 + 200));
        assert_eq!(costs.recompute_stored(), 700 * MS);
        // As fast as computing: half of it each.
        let slow = PrefixCosts { stored: stored(800, 700), ..costs };
        assert_eq!((slow.store(), slow.choose()), (Some((350 + 200) * MS), Some(PrefixChoice::Store)));
        assert_eq!(PrefixCosts { num_tokens_ahead: 500, ..costs }.store(), Some((500 + 200) * MS));
        assert_eq!(costs.choose(), Some(PrefixChoice::Store));
        assert_eq!(PrefixCosts { stored: stored(800, 4000), ..costs }.choose(), Some(PrefixChoice::Recompute));
        let both = PrefixCosts { stored: stored(800, 60), ..fetching(8e6) };
        assert_eq!(both.choose(), Some(PrefixChoice::Fetch), "200 ms against 255");
        let near = PrefixCosts { stored: stored(880, 50), ..fetching(8e6) };
        assert_eq!(near.choose(), Some(PrefixChoice::Store), "167 ms, and no other node is disturbed");
        let alone = PrefixCosts { num_held_tokens: 0, local_rest: Some(MS), ..costs };
        assert_eq!(alone.choose(), Some(PrefixChoice::Store), "the decode node holds nothing, and is not asked");
        assert_eq!(PrefixCosts { stored: stored(100, 0), num_held_tokens: 0, ..costs }.choose(), None);
    }

    #[test]
    fn what_a_peer_holds_is_one_more_way() {
        let peer = |num_tokens, bytes_per_second| Some(PeerPrefix { num_tokens, bytes_per_second, asking: 10 * MS });
        let costs = PrefixCosts { num_held_tokens: 0, peer: peer(900, 8e6), ..costs() };
        assert_eq!(costs.peer(), Some((100 + 10 + 100) * MS));
        assert_eq!(costs.recompute_peer(), 800 * MS);
        assert_eq!(costs.choose(), Some(PrefixChoice::Peer));
        assert_eq!(PrefixCosts { num_tokens_ahead: 500, ..costs }.peer(), Some((500 + 100) * MS));
        assert_eq!(PrefixCosts { peer: peer(900, 1e6), ..costs }.choose(), Some(PrefixChoice::Recompute));
        let local = PrefixCosts { local_rest: Some(MS), ..costs };
        assert_eq!(local.choose(), Some(PrefixChoice::Peer), "the decode node holds nothing, and is not asked");
        let both = PrefixCosts { num_held_tokens: 900, fetch_bytes_per_second: Some(8e6), ..costs };
        assert_eq!(both.choose(), Some(PrefixChoice::Fetch), "a connection is there, and no third node is disturbed");
        let shorter = PrefixCosts { num_held_tokens: 500, ..both };
        assert_eq!(shorter.choose(), Some(PrefixChoice::Peer), "550 ms against 210");
        assert_eq!(PrefixCosts { peer: peer(100, 8e6), ..costs }.choose(), None, "it is cached here");
        assert_eq!(PrefixCosts { peer: peer(900, f64::NAN), ..costs }.choose(), Some(PrefixChoice::Recompute));
    }

    #[test]
    fn near_ties_stay_with_what_moves_fewer_bytes() {
        // 620 ms of transfer and 100 of compute are just 80 % of 900.
        assert_eq!(fetching(800e3 / 0.62).choose(), Some(PrefixChoice::Fetch));
        assert_eq!(fetching(800e3 / 0.63).choose(), Some(PrefixChoice::Recompute));
        let local = |millis| PrefixCosts { local_rest: Some(millis * MS), ..fetching(8e6) };
        assert_eq!(local(160).choose(), Some(PrefixChoice::Local));
        assert_eq!(local(161).choose(), Some(PrefixChoice::Fetch));
    }

    #[test]
    fn long_queue_here_speaks_for_the_decode_node() {
        let costs = PrefixCosts { local_rest: Some(1500 * MS), ..costs() };
        assert_eq!(costs.choose(), Some(PrefixChoice::Recompute));
        assert_eq!(PrefixCosts { num_tokens_ahead: 4000, ..costs }.choose(), Some(PrefixChoice::Local));
    }

    #[test]
    fn nothing_is_chosen_where_nothing_is_lacking() {
        let equal = PrefixCosts { num_cached_tokens: 900, local_rest: Some(Duration::ZERO), ..fetching(1e12) };
        assert_eq!(equal.choose(), None);
        assert_eq!(PrefixCosts { num_cached_tokens: 960, ..equal }.choose(), None);
    }

    #[test]
    fn absurd_figures_neither_panic_nor_win() {
        for absurd in [0.0, -1.0, f64::NAN, f64::NEG_INFINITY] {
            let slow = PrefixCosts { prefill_tokens_per_second: absurd, num_tokens_ahead: u64::MAX, ..costs() };
            assert_eq!(slow.choose(), Some(PrefixChoice::Recompute), "{absurd}");
            assert_eq!(fetching(absurd).choose(), Some(PrefixChoice::Recompute), "{absurd}");
            assert!(expected_prefill(u64::MAX, u64::MAX, absurd) > Duration::from_secs(1 << 20));
        }
        let local = PrefixCosts { local_rest: Some(Duration::MAX), round_trip: Duration::MAX, ..fetching(1e12) };
        assert_eq!(local.choose(), Some(PrefixChoice::Recompute));
    }
}
