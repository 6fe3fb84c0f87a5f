//! One sequence: its tokens, its blocks, how far it has been computed, and what it waits for.

use std::sync::Arc;

use crate::content::{ChainRoot, ContentChain};
use crate::ids::{BlockId, ChoiceIndex, SequenceId};
use crate::sampling::{SampledToken, SamplingParams};
use crate::scheduler::ArrivingPrefix;
use crate::tokens::Token;

/// What a node is to do with a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Compute the prompt here and generate (colocated, or local prefill on a decode node).
    Generate,
    /// Compute the prompt, draw the first token of each choice, keep the blocks until released (prefill
    /// node).
    PrefillOnly,
    /// As [`PrefillOnly`](Self::PrefillOnly), but if fewer tokens than this are found in the cache, keep the
    /// blocks and wait to be told from where on to compute: KV that another node holds may land in them first.
    PrefillBehind {
        /// Leading tokens whose KV another node holds.
        num_held_tokens: usize,
    },
    /// Reserve the blocks, wait until their KV has landed, then generate (decode node).
    AwaitKv,
}

impl Work {
    /// Whether the sequence ends with its first tokens.
    pub fn is_prefill_only(self) -> bool {
        matches!(self, Work::PrefillOnly | Work::PrefillBehind { .. })
    }

    /// Whether a sequence that is admitted with this many tokens found in the cache waits for KV.
    pub fn awaits_kv(self, num_cached_tokens: usize) -> bool {
        match self {
            Work::Generate | Work::PrefillOnly => false,
            Work::PrefillBehind { num_held_tokens } => num_cached_tokens < num_held_tokens,
            Work::AwaitKv => true,
        }
    }
}

/// A sequence to be added.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Prompt and committed tokens. Not empty.
    pub tokens: Vec<Token>,
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Choices to draw behind `tokens`. Not empty, no duplicates.
    pub choices: Vec<ChoiceIndex>,
    /// How to choose and when to end.
    pub params: Arc<SamplingParams>,
    /// Where its content chain begins.
    pub root: ChainRoot,
    /// What to do.
    pub work: Work,
}

/// Where a sequence is.
///
/// ```text
///              admit (awaits KV)               kv complete
///  Waiting ──────────────────> AwaitingKv ─────────────────> Computing <── restored ── Restoring
///     │                            │ compute locally             ^  │ │                ^    │ preempt
///     │ admit (others)             └─────────────────────────────┘  │ │ preempt   admit│    v
///     └─────────────────────────────> Computing                     │ └─> Saving ──> Parked
///                                                                   v          saved
///                                            Held (PrefillOnly: first tokens drawn)
/// ```
/// A sequence of which nothing can be saved goes from Computing to Parked at once, and one of which nothing is to
/// be restored from there to Computing.
///
/// It leaves from any state by finishing or by being cancelled. Prefilling and decoding are the same
/// state: tokens that have no KV yet are computed, one or many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SequenceState {
    /// In the queue. Holds nothing.
    Waiting,
    /// Holds its reservation; KV is landing in it.
    AwaitingKv,
    /// In the running batch.
    Computing,
    /// Preempted. Holds the blocks whose content is still to be saved in host memory.
    Saving,
    /// Preempted. Holds no block of the pool.
    Parked,
    /// Holds its blocks again; saved content is written into them.
    Restoring,
    /// Computed; blocks are pinned until its KV has been taken.
    Held,
}

impl SequenceState {
    /// Whether a sequence may go from `self` to `next`.
    pub fn can_become(self, next: SequenceState) -> bool {
        use SequenceState::{AwaitingKv, Computing, Held, Parked, Restoring, Saving, Waiting};
        matches!(
            (self, next),
            (Waiting, AwaitingKv | Computing)
                | (AwaitingKv, Computing)
                | (Computing, Saving | Parked | Held)
                | (Saving, Parked)
                | (Parked, Restoring | Computing)
                | (Restoring, Parked | Computing)
        )
    }

    /// Whether blocks of the pool are held in this state.
    pub fn holds_blocks(self) -> bool {
        !matches!(self, SequenceState::Waiting | SequenceState::Parked)
    }
}

/// A sequence and its books.
#[derive(Debug)]
pub struct Sequence {
    /// Its name.
    pub id: SequenceId,
    /// The sequence it was added as; itself, or the parent it was forked from. Events carry this.
    pub group: SequenceId,
    /// Order of arrival; a fork has its parent's.
    pub arrival: u64,
    /// Prompt and generated tokens.
    pub tokens: Vec<Token>,
    /// How many are the prompt.
    pub prompt_len: usize,
    /// Choices to draw at the end of `tokens`: several until the fork, then one.
    pub choices: Vec<ChoiceIndex>,
    /// How to choose.
    pub params: Arc<SamplingParams>,
    /// Names of its full granules.
    pub chain: ContentChain,
    /// What to do with it.
    pub work: Work,
    /// Where it is.
    pub state: SequenceState,
    /// Block table; may reach beyond the tokens (reservation).
    pub blocks: Vec<BlockId>,
    /// Tokens whose KV is in the blocks.
    pub num_computed_tokens: usize,
    /// Tokens that were found in the cache when it was admitted first.
    pub num_cached_tokens: usize,
    /// Leading blocks that have been named.
    pub num_published_blocks: usize,
    /// What of the prompt arrives while it is computed.
    pub arriving: Option<Arc<ArrivingPrefix>>,
    /// First tokens that were drawn elsewhere and are already delivered; used instead of drawing.
    pub delivered_first_tokens: Option<Vec<SampledToken>>,
    /// Tokens whose KV is in host memory, or on its way there, since it was preempted.
    pub num_parked_tokens: usize,
    /// Leading blocks that have their content again, while it is being restored.
    pub num_restored_blocks: usize,
    /// Number of the last step it was scheduled in.
    pub last_step: u64,
    /// What the steps in flight will have done to it.
    pub in_flight: InFlight,
}

/// A sequence's part in the steps that are scheduled and whose outcome is not known yet.
///
/// ```text
/// tokens          t0 t1 t2 t3 | d0        d0: drawn by the step in flight, not known to the scheduler yet
/// KV              computed    |
/// step in flight           t3 -> d0
/// step ahead                    d0 -> d1  scheduled without knowing d0; the runner puts it in
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InFlight {
    /// Steps that compute tokens of it.
    pub num_steps: usize,
    /// Tokens whose KV they write.
    pub num_tokens: usize,
    /// Tokens they draw for it; several choices of one prompt count once.
    pub num_draws: usize,
}

impl Sequence {
    pub(crate) fn new(id: SequenceId, arrival: u64, new: NewSequence) -> Self {
        let mut chain = ContentChain::new(&new.root);
        chain.extend(&new.tokens);
        Self {
            id,
            group: id,
            arrival,
            tokens: new.tokens,
            prompt_len: new.prompt_len,
            choices: new.choices,
            params: new.params,
            chain,
            work: new.work,
            state: SequenceState::Waiting,
            blocks: Vec::new(),
            num_computed_tokens: 0,
            num_cached_tokens: 0,
            num_published_blocks: 0,
            arriving: None,
            delivered_first_tokens: None,
            num_parked_tokens: 0,
            num_restored_blocks: 0,
            last_step: 0,
            in_flight: InFlight::default(),
        }
    }

    /// Moves to `next`.
    ///
    /// # Panics
    /// If the diagram has no such arrow: a bug of the scheduler.
    pub(crate) fn become_state(&mut self, next: SequenceState) {
        assert!(self.state.can_become(next), "{} cannot go from {:?} to {next:?}", self.id, self.state);
        self.state = next;
    }

    /// Nothing is written into its blocks from elsewhere any more.
    pub(crate) fn stop_arriving(&mut self) {
        if let Some(prefix) = self.arriving.take() {
            prefix.close();
        }
    }

    /// Of the tokens without KV, those whose KV is expected to arrive.
    pub(crate) fn num_expected_tokens(&self) -> usize {
        self.arriving.as_ref().map_or(0, |prefix| prefix.num_expected_tokens())
    }

    /// Tokens without KV.
    pub fn num_uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    /// Tokens that are to be computed here, as far as is known: not those whose KV is awaited or arrives.
    pub fn num_tokens_to_compute(&self) -> usize {
        let num_awaited = match (self.state, self.work) {
            (SequenceState::Waiting | SequenceState::AwaitingKv, Work::AwaitKv) => self.tokens.len(),
            (SequenceState::Waiting | SequenceState::AwaitingKv, Work::PrefillBehind { num_held_tokens }) => {
                num_held_tokens.saturating_sub(self.num_computed_tokens)
            }
            _ => self.num_expected_tokens(),
        };
        self.num_uncomputed_tokens().saturating_sub(num_awaited)
    }

    /// Generated tokens, committed ones included.
    pub fn num_generated_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether only the newest token has no KV.
    pub fn is_decoding(&self) -> bool {
        self.num_uncomputed_tokens() == 1 && self.num_generated_tokens() > 0
    }

    /// Tokens once the steps in flight are done, of which the last [`InFlight::num_draws`] are not known yet.
    pub fn num_tokens_ahead(&self) -> usize {
        self.tokens.len() + self.in_flight.num_draws
    }

    /// Tokens whose KV is in the blocks once the steps in flight are done.
    pub fn num_computed_tokens_ahead(&self) -> usize {
        self.num_computed_tokens + self.in_flight.num_tokens
    }

    /// Whether only the newest token will have no KV once the steps in flight are done.
    pub fn is_decoding_ahead(&self) -> bool {
        let num_tokens = self.num_tokens_ahead();
        num_tokens - self.num_computed_tokens_ahead() == 1 && num_tokens > self.prompt_len
    }

    /// Whether the next step can be scheduled before it is known what the steps in flight draw for it.
    ///
    /// Not where the drawn tokens end the sequence by their number, decide into what it forks, or are
    /// replaced by others that were delivered already. A stop token cannot be foreseen: then the step
    /// ahead was for nothing.
    pub fn can_run_ahead(&self, max_model_len: usize) -> bool {
        if self.in_flight.num_draws == 0 {
            return true;
        }
        let num_tokens = self.num_tokens_ahead();
        let is_last = self.params.is_last_by_length(
            (num_tokens - self.prompt_len) as u32,
            num_tokens as u32,
            max_model_len as u32,
        );
        !self.work.is_prefill_only() && self.choices.len() == 1 && self.delivered_first_tokens.is_none() && !is_last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use SequenceState::{AwaitingKv, Computing, Held, Parked, Restoring, Saving, Waiting};

    #[test]
    fn transition_table_is_the_diagram() {
        let states = [Waiting, AwaitingKv, Computing, Saving, Parked, Restoring, Held];
        let allowed: Vec<_> = states
            .iter()
            .flat_map(|from| states.iter().filter(|to| from.can_become(**to)).map(|to| (*from, *to)))
            .collect();
        let expected = [
            (Waiting, AwaitingKv),
            (Waiting, Computing),
            (AwaitingKv, Computing),
            (Computing, Saving),
            (Computing, Parked),
            (Computing, Held),
            (Saving, Parked),
            (Parked, Computing),
            (Parked, Restoring),
            (Restoring, Computing),
            (Restoring, Parked),
        ];
        assert_eq!(allowed, expected);
    }
}
