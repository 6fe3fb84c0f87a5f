//! What follows a drawn token: the sequence ends, goes on, or forks into its choices.
//!
//! ```text
//! prompt, 3 choices        blocks: [p0 p1 tail s0 s1 s2]     s: reserved, one or more per choice
//!   choice 0  goes on in place      p0 p1 tail s..
//!   choice 1  forks                 p0 p1 (copy of tail into s) s..
//!   choice 2  forks                 p0 p1 (copy of tail into s) s..
//! ```
//! Full blocks are shared by reference; a partial last block is copied, since each choice writes its own
//! next token there.

use crate::ids::{ChoiceIndex, SequenceId};
use crate::sampling::SampledToken;
use crate::scheduler::{GroupEvent, Scheduler, SequenceEvent};
use crate::sequence::{InFlight, Sequence, SequenceState};

impl Scheduler {
    pub(super) fn on_drawn(&mut self, id: SequenceId, drawn: Vec<SampledToken>, events: &mut Vec<GroupEvent>) {
        let sequence = self.sequences.get_mut(&id).expect("a sampled sequence is known");
        debug_assert_eq!(drawn.len(), sequence.choices.len(), "one token per choice is drawn");
        if sequence.work.is_prefill_only() {
            events.push((sequence.group, SequenceEvent::FirstTokens(drawn)));
            sequence.become_state(SequenceState::Held);
            self.running.remove(&(sequence.arrival, id));
            return;
        }
        match sequence.delivered_first_tokens.take() {
            Some(delivered) => self.continue_with(id, delivered, false, events),
            None => self.continue_with(id, drawn, true, events),
        }
    }

    /// Appends one token per choice; choices that end are dropped, the others become sequences of their
    /// own. `is_told`: whether the tokens are still to be reported.
    pub(super) fn continue_with(
        &mut self,
        id: SequenceId,
        tokens: Vec<SampledToken>,
        is_told: bool,
        events: &mut Vec<GroupEvent>,
    ) {
        let sequence = self.sequences.get_mut(&id).expect("a continued sequence is known");
        let group = sequence.group;
        let index = sequence.num_generated_tokens() as u32;
        let num_tokens = sequence.tokens.len() as u32 + 1;
        let mut alive: Vec<(ChoiceIndex, u32)> = Vec::with_capacity(tokens.len());
        for (choice, token) in sequence.choices.clone().into_iter().zip(tokens) {
            let max_model_len = self.limits.max_model_len as u32;
            let finish = sequence.params.finish_reason(token.id, index + 1, num_tokens, max_model_len);
            if finish.is_none() {
                alive.push((choice, token.id));
            }
            if is_told {
                events.push((group, SequenceEvent::Token { choice, index, token, finish }));
            }
        }
        if alive.is_empty() {
            self.remove(id);
        } else {
            self.fork(id, &alive);
        }
        if self.groups.get(&group).is_some_and(Vec::is_empty) {
            self.groups.remove(&group);
            events.push((group, SequenceEvent::Finished));
        }
    }

    fn fork(&mut self, id: SequenceId, alive: &[(ChoiceIndex, u32)]) {
        let block_size = self.limits.block_size;
        let sequence = self.sequences.get_mut(&id).expect("a forking sequence is known");
        let (first, rest) = alive.split_first().expect("at least one choice goes on");
        let is_single = sequence.choices.len() == 1;
        sequence.choices = vec![first.0];
        let prompt_tokens = if rest.is_empty() { Vec::new() } else { sequence.tokens.clone() };
        sequence.tokens.push(first.1);
        if is_single {
            return;
        }
        let num_full = prompt_tokens.len() / block_size;
        let is_partial = prompt_tokens.len() % block_size != 0;
        let mut own = sequence.blocks.split_off(num_full.min(sequence.blocks.len()));
        let shared = sequence.blocks.clone();
        let tail = (is_partial && !own.is_empty() && !rest.is_empty()).then(|| own[0]);
        // The first choice keeps the tail and its share of the reservation, the others get the rest.
        let share = (own.len() - usize::from(is_partial).min(own.len())) / alive.len();
        let keep = if rest.is_empty() { own.len() } else { usize::from(is_partial).min(own.len()) + share };
        let mut spare = own.split_off(keep);
        sequence.blocks.extend(own);
        let mut children = Vec::with_capacity(rest.len());
        for (index, (choice, token)) in rest.iter().enumerate() {
            let num_own = if index + 1 == rest.len() { spare.len() } else { share.min(spare.len()) };
            let blocks: Vec<_> = spare.drain(..num_own).collect();
            children.push((*choice, *token, blocks));
        }
        for (choice, token, own) in children {
            self.blocks.acquire(&shared);
            if let (Some(tail), Some(copy)) = (tail, own.first()) {
                self.copies.push((tail, *copy));
            }
            self.add_child(id, choice, token, &prompt_tokens, [shared.clone(), own].concat());
        }
    }

    fn add_child(
        &mut self,
        parent: SequenceId,
        choice: ChoiceIndex,
        token: u32,
        prompt_tokens: &[u32],
        blocks: Vec<crate::ids::BlockId>,
    ) {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let parent = &self.sequences[&parent];
        let mut tokens = prompt_tokens.to_vec();
        tokens.push(token);
        let child = Sequence {
            id,
            group: parent.group,
            arrival: parent.arrival,
            tokens,
            prompt_len: parent.prompt_len,
            choices: vec![choice],
            params: parent.params.clone(),
            chain: parent.chain.clone(),
            work: parent.work,
            state: SequenceState::Computing,
            blocks,
            num_computed_tokens: prompt_tokens.len(),
            num_cached_tokens: parent.num_cached_tokens,
            num_published_blocks: parent.num_published_blocks,
            arriving: None,
            delivered_first_tokens: None,
            num_parked_tokens: 0,
            num_restored_blocks: 0,
            last_step: 0,
            in_flight: InFlight::default(),
        };
        self.running.insert((child.arrival, id));
        self.groups.get_mut(&child.group).expect("a running group is known").push(id);
        self.sequences.insert(id, child);
    }
}
