//! The scheduler against a model engine: a pool whose slots hold a hash of the whole prefix, so that
//! every computed token proves that the KV before it is its own.

mod parking;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::content::{ChainRoot, ContentChain, ContentKey};
use crate::model::ModelIdentity;
use crate::sampling::SamplingParams;
use crate::sequence::Work;
use crate::tokens::Token;

fn limits() -> SchedulerLimits {
    SchedulerLimits {
        block_size: 16,
        num_blocks: 32,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_num_prefill_tokens: 64,
        max_num_waiting: 100,
        max_model_len: 400,
        growth_blocks: 1,
        max_num_parked_blocks: 8,
        max_num_copied_blocks: 2,
        is_prefix_caching: true,
        eviction_policy: EvictionPolicy::default(),
    }
}

fn mix(prefix: u64, token: Token) -> u64 {
    let mut x = prefix ^ u64::from(token).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 32)
}

fn draw(prefix: u64, choice: ChoiceIndex) -> Token {
    (mix(prefix, 77 + choice.0) % 50) as Token
}

/// What a choice of a prompt generates, computed directly.
fn expected(prompt: &[Token], choice: ChoiceIndex, max_tokens: usize) -> Vec<Token> {
    let mut prefix = prompt.iter().fold(1, |p, t| mix(p, *t));
    (0..max_tokens)
        .map(|_| {
            let token = draw(prefix, choice);
            prefix = mix(prefix, token);
            token
        })
        .collect()
}

fn sampled(id: Token) -> SampledToken {
    SampledToken { id, logprob: 0.0, top_logprobs: Vec::new() }
}

/// A step in flight.
struct Launched {
    step: ScheduledStep,
    /// Tokens, block table and choices of each span as they were when it was scheduled: the scheduler may
    /// know better by now.
    known: Vec<(Vec<Token>, Vec<BlockId>, Vec<ChoiceIndex>)>,
    /// Once it is computed.
    drawn: Option<Vec<DrawnToken>>,
}

/// Executes scheduled steps on a pool of prefix hashes.
struct ModelEngine {
    scheduler: Scheduler,
    /// Steps in flight at most.
    depth: usize,
    num_parked_blocks_max: usize,
    launched: VecDeque<Launched>,
    num_launched: usize,
    /// What the newest computed step drew.
    newest: HashMap<SequenceId, Token>,
    /// `[num_blocks][block_size]`
    pool: Vec<Vec<u64>>,
    saved: HashMap<SequenceId, BTreeMap<usize, Vec<u64>>>,
    /// Tokens reported per group and choice.
    told: HashMap<(SequenceId, ChoiceIndex), Vec<Token>>,
    finished: Vec<SequenceId>,
    admitted: HashMap<SequenceId, (usize, Vec<BlockId>)>,
    first_tokens: HashMap<SequenceId, Vec<SampledToken>>,
    num_computed: usize,
    /// Tokens that arrived and were used, by group.
    num_passed: HashMap<SequenceId, usize>,
    /// What the block events amount to.
    known: HashMap<ContentKey, StoredBlock>,
}

impl ModelEngine {
    fn new(limits: SchedulerLimits) -> Self {
        let mut scheduler = Scheduler::new(limits);
        scheduler.note_block_events();
        Self {
            scheduler,
            depth: 1,
            num_parked_blocks_max: limits.max_num_parked_blocks,
            launched: VecDeque::new(),
            num_launched: 0,
            newest: HashMap::new(),
            pool: vec![vec![0; limits.block_size]; limits.num_blocks],
            saved: HashMap::new(),
            told: HashMap::new(),
            finished: Vec::new(),
            admitted: HashMap::new(),
            first_tokens: HashMap::new(),
            num_computed: 0,
            num_passed: HashMap::new(),
            known: HashMap::new(),
        }
    }

    fn take_in(&mut self, events: Vec<GroupEvent>) {
        for (group, event) in events {
            match event {
                SequenceEvent::Admitted { num_cached_tokens, blocks } => {
                    self.admitted.insert(group, (num_cached_tokens, blocks));
                }
                SequenceEvent::PrefixArrived { first_token, end_token } => {
                    assert!(first_token <= end_token);
                    *self.num_passed.entry(group).or_default() += end_token - first_token;
                }
                SequenceEvent::FirstTokens(tokens) => {
                    self.first_tokens.insert(group, tokens);
                }
                SequenceEvent::Token { choice, index, token, .. } => {
                    let told = self.told.entry((group, choice)).or_default();
                    assert_eq!(told.len(), index as usize, "tokens are told in order, once");
                    told.push(token.id);
                }
                SequenceEvent::Finished => self.finished.push(group),
            }
        }
        for (source, destination) in self.scheduler.take_copies() {
            self.pool[destination.0 as usize] = self.pool[source.0 as usize].clone();
        }
    }

    fn hear_of_blocks(&mut self) {
        for event in self.scheduler.take_block_events() {
            match event {
                BlockEvent::Stored(block) => assert_eq!(self.known.insert(block.key, block), None, "stored twice"),
                BlockEvent::Removed { medium: Medium::Pool, key } => {
                    assert!(self.known.remove(&key).is_some(), "removed and never stored");
                }
                BlockEvent::Cleared { medium: Medium::Pool } => self.known.clear(),
                elsewhere => panic!("{elsewhere:?}"),
            }
        }
    }

    /// The events told exactly what can be found, and under which parent and for which tokens.
    fn assert_blocks_are_told(&mut self, text: &[Token]) {
        self.hear_of_blocks();
        let block_size = self.scheduler.limits.block_size;
        let root = ChainRoot::of_model(ModelIdentity([0; 32]));
        let mut chain = ContentChain::new(&root);
        chain.extend(text);
        let found = self.scheduler.blocks.longest_prefix(chain.blocks(block_size)).len();
        let mut parent = None;
        let told = chain.blocks(block_size).enumerate().take_while(|(index, name)| {
            let Some(block) = self.known.get(&name.key) else { return false };
            assert_eq!(block.parent, parent.replace(name.key));
            assert_eq!(*block.tokens, text[index * block_size..][..block_size]);
            true
        });
        assert_eq!(told.count(), found);
        assert_eq!(self.known.len(), self.scheduler.block_counts().cached, "nothing is referenced any more");
    }

    /// Fills the pipe and takes in its oldest step; false if nothing could be computed or copied.
    fn step(&mut self) -> bool {
        let mut has_copied = false;
        while self.launched.len() < self.depth && !self.launched.back().is_some_and(|last| last.step.is_starved) {
            let (is_launched, copied) = self.launch_or_copy();
            has_copied |= copied;
            if !is_launched {
                break;
            }
        }
        self.complete() || has_copied
    }

    fn launch(&mut self) -> bool {
        self.launch_or_copy().0
    }

    /// Schedules a step and does at once what is to be done before it is computed. Whether anything is computed,
    /// and copied.
    fn launch_or_copy(&mut self) -> (bool, bool) {
        let before = self.scheduler.preemptions();
        let step = self.scheduler.schedule();
        let has_preempted = self.scheduler.preemptions().preempted > before.preempted;
        assert!(!has_preempted || self.launched.is_empty(), "preempted while a step was in flight");
        self.assert_in_flight_is_left_alone(&step);
        let num_copies_max = self.scheduler.limits.max_num_copied_blocks.max(1);
        let num_decodes = step.spans.iter().filter(|span| span.is_decode).count();
        assert!(step.saves.len() + step.restores.len() <= num_copies_max + num_decodes);
        assert!(step.restores.len() <= num_copies_max);
        for copy in &step.saves {
            let content = self.pool[copy.block.0 as usize].clone();
            let before = self.saved.entry(copy.sequence).or_default().insert(copy.index, content);
            assert_eq!(before, None, "block {} of {} is saved twice", copy.index, copy.sequence);
        }
        for block in &step.fresh_blocks {
            self.pool[block.0 as usize].fill(0);
        }
        for copy in &step.restores {
            self.pool[copy.block.0 as usize] = self.saved[&copy.sequence][&copy.index].clone();
        }
        for sequence in &step.restored {
            self.saved.remove(sequence).expect("a restored sequence was saved");
        }
        let num_saved: usize = self.saved.values().map(BTreeMap::len).sum();
        assert!(num_saved <= self.num_parked_blocks_max, "{num_saved} blocks are saved");
        self.take_in(step.events.clone());
        self.scheduler.check_integrity().unwrap();
        if step.spans.is_empty() {
            return (false, step.has_copies());
        }
        let budget = self.scheduler.limits.max_num_batched_tokens;
        // One granule of prompt goes in beside a full batch.
        assert!(step.spans.iter().map(|s| s.num_tokens).sum::<usize>() <= budget + 16);
        let known = step.spans.iter().map(|span| {
            let sequence = self.scheduler.sequence(span.sequence).unwrap();
            (sequence.tokens.clone(), sequence.blocks.clone(), sequence.choices.clone())
        });
        let known = known.collect();
        self.launched.push_back(Launched { step, known, drawn: None });
        self.num_launched += 1;
        if self.num_launched.is_multiple_of(3) {
            self.compute();
        }
        (true, false)
    }

    /// Lets in who awaits KV, between two steps.
    fn admit_awaiting(&mut self) {
        let admitted = self.scheduler.admit_awaiting();
        self.assert_in_flight_is_left_alone(&admitted);
        if !admitted.events.is_empty() {
            let num_available = self.scheduler.blocks.num_available();
            assert!(num_available >= self.scheduler.running.len(), "{num_available} blocks are left for who runs");
        }
        for block in &admitted.fresh_blocks {
            self.pool[block.0 as usize].fill(0);
        }
        self.take_in(admitted.events);
        self.scheduler.check_integrity().unwrap();
    }

    /// What the steps in flight write is not saved, what they name is not given to anybody else.
    fn assert_in_flight_is_left_alone(&self, step: &ScheduledStep) {
        let size = self.scheduler.limits.block_size;
        let mut named = HashSet::new();
        let mut written = HashSet::new();
        for launched in &self.launched {
            for (span, (_, blocks, _)) in launched.step.spans.iter().zip(&launched.known) {
                named.extend(blocks.iter().copied());
                let last = (span.first_token + span.num_tokens - 1) / size;
                written.extend(blocks[span.first_token / size..=last].iter().copied());
            }
        }
        assert!(step.saves.iter().all(|copy| !written.contains(&copy.block)));
        let given = step.fresh_blocks.iter().copied().chain(step.restores.iter().map(|copy| copy.block));
        assert!(given.into_iter().all(|block| !named.contains(&block)), "{step:?}");
    }

    /// Takes in the oldest step in flight.
    fn complete(&mut self) -> bool {
        self.compute();
        let Some(Launched { step, drawn, .. }) = self.launched.pop_front() else { return false };
        let events = self.scheduler.on_step_done(&step, drawn.expect("all steps are computed"));
        self.take_in(events);
        self.hear_of_blocks();
        self.scheduler.check_integrity().unwrap();
        true
    }

    /// Computes what was launched, with the block tables of then and the pool of now.
    fn compute(&mut self) {
        let size = self.scheduler.limits.block_size;
        for launched in self.launched.iter_mut().filter(|launched| launched.drawn.is_none()) {
            let mut drawn = Vec::new();
            for (span, (tokens, blocks, choices)) in launched.step.spans.iter().zip(&launched.known) {
                let mut prefix = 1;
                for position in 0..span.first_token + span.num_tokens {
                    prefix = mix(prefix, tokens.get(position).copied().unwrap_or_else(|| self.newest[&span.sequence]));
                    let slot = &mut self.pool[blocks[position / size].0 as usize][position % size];
                    if position < span.first_token {
                        assert_eq!(*slot, prefix, "{} reads KV that is not its own at {position}", span.sequence);
                    } else {
                        *slot = prefix;
                        self.num_computed += 1;
                    }
                }
                for choice in choices.iter().filter(|_| span.is_sampled) {
                    let token = sampled(draw(prefix, *choice));
                    drawn.push(DrawnToken { sequence: span.sequence, choice: *choice, token });
                }
            }
            self.newest = drawn.iter().map(|token| (token.sequence, token.token.id)).collect();
            launched.drawn = Some(drawn);
        }
    }

    fn run(&mut self) {
        for _ in 0..10_000 {
            if !self.step() {
                return;
            }
        }
        panic!("no end after 10,000 steps");
    }

    fn add(&mut self, prompt: &[Token], num_choices: u32, max_tokens: u32, work: Work) -> SequenceId {
        self.scheduler.add(new(prompt, num_choices, max_tokens, work)).unwrap()
    }

    /// Plays the transfer: writes the KV a prefill node would have sent.
    fn land(&mut self, group: SequenceId, num_tokens: usize) {
        let sequence = self.scheduler.sequence(group).unwrap();
        let size = self.scheduler.limits.block_size;
        let mut prefix = 1;
        for (position, token) in sequence.tokens[..num_tokens].iter().enumerate() {
            prefix = mix(prefix, *token);
            self.pool[sequence.blocks[position / size].0 as usize][position % size] = prefix;
        }
    }

    /// Plays the store: puts the KV of a granule where it belongs, if it is still wanted.
    fn arrive(&mut self, text: &[Token], blocks: &[BlockId], prefix: &ArrivingPrefix, granule: usize) -> bool {
        let (size, pool) = (self.scheduler.limits.block_size, &mut self.pool);
        prefix.place(granule, || {
            let mut hash = 1;
            for (position, token) in text[..(granule + 1) * 16].iter().enumerate() {
                hash = mix(hash, *token);
                if position >= granule * 16 {
                    pool[blocks[position / size].0 as usize][position % size] = hash;
                }
            }
        })
    }

    fn assert_told(&self, group: SequenceId, prompt: &[Token], num_choices: u32, max_tokens: usize) {
        for choice in (0..num_choices).map(ChoiceIndex) {
            assert_eq!(self.told[&(group, choice)], expected(prompt, choice, max_tokens), "{group} {choice:?}");
        }
    }

    fn assert_clean(&self) {
        assert!(self.scheduler.is_idle());
        let counts = self.scheduler.block_counts();
        assert_eq!(counts.referenced, 0);
        assert_eq!(counts.free + counts.cached, counts.total);
        assert_eq!(self.scheduler.num_parked_blocks, 0);
        assert!(self.saved.is_empty());
    }
}

fn new(prompt: &[Token], num_choices: u32, max_tokens: u32, work: Work) -> NewSequence {
    NewSequence {
        tokens: prompt.to_vec(),
        prompt_len: prompt.len(),
        choices: (0..num_choices).map(ChoiceIndex).collect(),
        params: Arc::new(SamplingParams::greedy(max_tokens)),
        root: ChainRoot::of_model(ModelIdentity([0; 32])),
        work,
    }
}

fn prompt(seed: u32, len: usize) -> Vec<Token> {
    (0..len as u32).map(|i| (seed * 31 + i * i) % 50).collect()
}

#[test]
fn long_prompt_is_computed_in_chunks_that_end_at_granules() {
    let mut engine = ModelEngine::new(limits());
    engine.add(&prompt(1, 150), 1, 1, Work::Generate);
    let lens: Vec<_> = std::iter::from_fn(|| {
        let step = engine.scheduler.schedule();
        let span = *step.spans.first()?;
        let tokens =
            span.is_sampled.then(|| DrawnToken { sequence: span.sequence, choice: ChoiceIndex(0), token: sampled(1) });
        engine.scheduler.on_step_done(&step, tokens.into_iter().collect());
        Some(span.num_tokens)
    })
    .collect();
    assert_eq!(lens, [64, 64, 22]);
}

#[test]
fn second_request_computes_only_behind_the_shared_prefix() {
    let mut engine = ModelEngine::new(limits());
    let text = prompt(3, 100);
    let first = engine.add(&text, 1, 3, Work::Generate);
    engine.run();
    let computed = engine.num_computed;
    let second = engine.add(&text, 1, 3, Work::Generate);
    engine.run();
    assert_eq!(engine.admitted[&second].0, 96);
    assert_eq!(engine.num_computed - computed, 4 + 2);
    engine.assert_told(first, &text, 1, 3);
    engine.assert_told(second, &text, 1, 3);
    engine.assert_clean();
}

#[test]
fn who_awaits_kv_is_let_in_while_a_step_is_in_flight_but_takes_no_block_of_who_runs() {
    let mut engine = ModelEngine::new(SchedulerLimits { num_blocks: 8, ..limits() });
    let first = engine.add(&prompt(1, 40), 1, 30, Work::Generate);
    assert!(engine.launch());
    // Four are left beside the first one's three and its window: three, and one for it to grow.
    let fitting = engine.add(&prompt(2, 32), 1, 1, Work::AwaitKv);
    let next = engine.add(&prompt(3, 8), 1, 1, Work::AwaitKv);
    engine.admit_awaiting();
    assert_eq!(engine.scheduler.block_counts().referenced, 7);
    assert!(engine.admitted.contains_key(&fitting) && !engine.admitted.contains_key(&next));
    engine.scheduler.cancel(fitting);
    engine.admit_awaiting();
    assert!(engine.admitted.contains_key(&next));
    engine.scheduler.cancel(next);
    // Somebody who computes is let in by a step, and whoever is behind waits for that.
    engine.add(&prompt(4, 8), 1, 1, Work::Generate);
    let behind = engine.add(&prompt(5, 8), 1, 1, Work::AwaitKv);
    engine.admit_awaiting();
    assert!(!engine.admitted.contains_key(&behind));
    engine.run();
    engine.assert_told(first, &prompt(1, 40), 1, 30);
    engine.scheduler.cancel(behind);
    engine.assert_clean();
}

#[test]
fn hit_never_covers_the_last_prompt_token() {
    let mut engine = ModelEngine::new(limits());
    let text = prompt(3, 96);
    engine.add(&text, 1, 1, Work::Generate);
    engine.run();
    let second = engine.add(&text, 1, 1, Work::Generate);
    engine.run();
    assert_eq!(engine.admitted[&second].0, 80);
}

#[test]
fn choices_share_the_prompt_and_part_after_it() {
    for len in [1, 15, 16, 17, 40] {
        let mut engine = ModelEngine::new(limits());
        let text = prompt(5, len);
        let group = engine.add(&text, 3, 40, Work::Generate);
        engine.run();
        engine.assert_told(group, &text, 3, 40);
        assert_eq!(engine.finished, [group]);
        assert_eq!(engine.num_computed, len + 3 * 39);
        engine.assert_clean();
    }
}

#[test]
fn prefill_only_holds_its_blocks_until_released() {
    let mut engine = ModelEngine::new(limits());
    let text = prompt(7, 40);
    let group = engine.add(&text, 2, 9, Work::PrefillOnly);
    engine.run();
    assert_eq!(engine.first_tokens[&group][1].id, expected(&text, ChoiceIndex(1), 1)[0]);
    assert_eq!(engine.scheduler.block_counts().referenced, 3);
    engine.scheduler.cancel(group);
    engine.assert_clean();
}

#[test]
fn prefill_behind_a_held_prefix_waits_with_its_blocks_and_computes_what_did_not_land() {
    let mut engine = ModelEngine::new(limits());
    let text = prompt(9, 60);
    let group = engine.add(&text, 1, 9, Work::PrefillBehind { num_held_tokens: 48 });
    engine.run();
    assert_eq!((engine.num_computed, engine.scheduler.block_counts().referenced), (0, 4), "it waits and holds");
    assert_eq!(engine.scheduler.num_running_prompt_tokens(), 0, "nobody waits for it");
    engine.land(group, 32);
    engine.scheduler.on_compute_locally(group, 32, None);
    assert_eq!(engine.scheduler.num_running_prompt_tokens(), 28);
    engine.run();
    assert_eq!(engine.num_computed, 28);
    assert_eq!(engine.first_tokens[&group][0].id, expected(&text, ChoiceIndex(0), 1)[0]);
    engine.scheduler.cancel(group);

    // What has landed is in the cache, so the next one has as much as the other node and does not wait.
    let group = engine.add(&text, 1, 9, Work::PrefillBehind { num_held_tokens: 48 });
    engine.run();
    assert_eq!(engine.num_computed, 28 + 12);
    assert_eq!(engine.first_tokens[&group][0].id, expected(&text, ChoiceIndex(0), 1)[0]);
    engine.scheduler.cancel(group);
    engine.assert_clean();
}

#[test]
fn sequence_that_awaits_kv_needs_no_steps_and_one_that_waits_or_runs_does() {
    let mut engine = ModelEngine::new(limits());
    let needs_steps = |engine: &ModelEngine| engine.scheduler.load(0).needs_steps();
    assert!(!needs_steps(&engine));
    engine.add(&prompt(1, 40), 1, 1, Work::AwaitKv);
    assert!(needs_steps(&engine), "it is to be admitted");
    engine.run();
    assert_eq!(engine.scheduler.load(0).num_queued_tokens, 0);
    assert!(!needs_steps(&engine), "its KV is computed elsewhere");
    engine.add(&prompt(2, 8), 1, 5, Work::Generate);
    assert!(engine.launch() && needs_steps(&engine), "another one runs");
    engine.run();
    assert!(!needs_steps(&engine));
}

#[test]
fn tokens_that_another_node_computes_are_not_queued_here() {
    let mut engine = ModelEngine::new(limits());
    let queued = |engine: &ModelEngine| engine.scheduler.load(0).num_queued_tokens;
    engine.add(&prompt(1, 40), 1, 1, Work::AwaitKv);
    assert_eq!(queued(&engine), 0);
    engine.add(&prompt(2, 48), 1, 1, Work::PrefillBehind { num_held_tokens: 32 });
    assert_eq!(queued(&engine), 16);
    engine.add(&prompt(3, 24), 1, 1, Work::PrefillOnly);
    assert_eq!(queued(&engine), 40);
}

#[test]
fn front_of_a_prompt_is_computed_while_its_rest_arrives() {
    let mut engine = ModelEngine::new(limits());
    let text = prompt(9, 150);
    let group = engine.add(&text, 1, 5, Work::AwaitKv);
    engine.run();
    let blocks = engine.admitted[&group].1.clone();
    let prefix = Arc::new(ArrivingPrefix::new(0, 144));
    engine.scheduler.on_compute_around(group, prefix.clone());
    engine.run();
    assert_eq!(engine.num_computed, 0, "there is no goal yet");
    prefix.raise_goal(32);
    assert_eq!(engine.scheduler.num_running_prompt_tokens(), 150 - 112);
    engine.run();
    assert_eq!((engine.num_computed, engine.scheduler.block_counts().referenced), (32, 11));
    for granule in [8, 7, 5, 4, 3, 2] {
        assert!(engine.arrive(&text, &blocks, &prefix, granule));
    }
    assert!(!engine.arrive(&text, &blocks, &prefix, 1), "it has been computed");
    assert_eq!(engine.scheduler.pin(PinId(1), engine.scheduler.sequences[&group].chain.clone().granules()).len(), 2);
    engine.scheduler.unpin(PinId(1));
    engine.run();
    engine.assert_told(group, &text, 1, 5);
    assert_eq!(engine.num_computed, 32 + 16 + 6 + 4, "the front, the hole, the end, and what was generated");
    assert_eq!(engine.num_passed[&group], 6 * 16);
    engine.assert_clean();
}

#[test]
fn step_in_flight_is_awaited_before_what_arrived_behind_it_is_used() {
    let mut engine = ModelEngine { depth: 2, ..ModelEngine::new(limits()) };
    let text = prompt(9, 70);
    let group = engine.add(&text, 1, 5, Work::AwaitKv);
    engine.run();
    let blocks = engine.admitted[&group].1.clone();
    let prefix = Arc::new(ArrivingPrefix::new(0, 64));
    engine.scheduler.on_compute_around(group, prefix.clone());
    prefix.raise_goal(16);
    assert!(engine.launch());
    for granule in [3, 2, 1] {
        assert!(engine.arrive(&text, &blocks, &prefix, granule));
    }
    assert!(!engine.launch());
    assert_eq!(engine.num_passed.get(&group), None);
    assert!(engine.complete());
    engine.run();
    assert_eq!(engine.num_passed[&group], 48);
    engine.assert_told(group, &text, 1, 5);
    engine.assert_clean();
}

#[test]
fn nothing_arrives_in_blocks_that_were_taken_away() {
    for is_cancelled in [false, true] {
        let mut engine = ModelEngine::new(SchedulerLimits { num_blocks: 8, ..limits() });
        let oldest = engine.add(&prompt(1, 30), 1, 60, Work::Generate);
        let text = prompt(2, 60);
        let group = engine.add(&text, 1, 5, Work::AwaitKv);
        engine.step();
        let blocks = engine.admitted[&group].1.clone();
        let prefix = Arc::new(ArrivingPrefix::new(0, 48));
        engine.scheduler.on_compute_around(group, prefix.clone());
        assert!(engine.arrive(&text, &blocks, &prefix, 2));
        if is_cancelled {
            engine.scheduler.cancel(group);
        } else {
            while engine.scheduler.preemptions().preempted == 0 {
                assert!(engine.step());
            }
        }
        assert!(!engine.arrive(&text, &blocks, &prefix, 1), "cancelled: {is_cancelled}");
        engine.run();
        engine.assert_told(oldest, &prompt(1, 30), 1, 60);
        if !is_cancelled {
            engine.assert_told(group, &text, 1, 5);
        }
        engine.assert_clean();
    }
}

#[test]
fn prefix_of_a_cancelled_group_is_closed() {
    let mut scheduler = Scheduler::new(limits());
    let group = scheduler.add(new(&prompt(1, 40), 1, 1, Work::AwaitKv)).unwrap();
    scheduler.schedule();
    scheduler.cancel(group);
    let prefix = Arc::new(ArrivingPrefix::new(0, 32));
    scheduler.on_compute_around(group, prefix.clone());
    assert!(!prefix.is_wanted(1));
}

#[test]
fn awaiting_sequence_joins_when_its_kv_is_complete() {
    let mut engine = ModelEngine::new(limits());
    let text = prompt(8, 40);
    let group = engine.add(&text, 2, 9, Work::AwaitKv);
    engine.run();
    assert!(engine.told.is_empty());
    engine.land(group, 40);
    let firsts: Vec<_> = (0..2).map(|c| sampled(expected(&text, ChoiceIndex(c), 1)[0])).collect();
    let events = engine.scheduler.on_kv_complete(group, firsts);
    engine.take_in(events);
    for c in 0..2 {
        engine.told.insert((group, ChoiceIndex(c)), expected(&text, ChoiceIndex(c), 1));
    }
    engine.run();
    engine.assert_told(group, &text, 2, 9);
    assert_eq!(engine.num_computed, 2 * 8, "no prompt token was computed here");
    engine.assert_clean();
}

#[test]
fn lost_transfer_is_computed_locally_from_what_arrived() {
    for is_first_delivered in [false, true] {
        let mut engine = ModelEngine::new(limits());
        let text = prompt(9, 50);
        let group = engine.add(&text, 2, 5, Work::AwaitKv);
        engine.run();
        engine.land(group, 32);
        let firsts: Vec<_> = (0..2).map(|c| sampled(expected(&text, ChoiceIndex(c), 1)[0])).collect();
        if is_first_delivered {
            for c in 0..2 {
                engine.told.insert((group, ChoiceIndex(c)), expected(&text, ChoiceIndex(c), 1));
            }
        }
        engine.scheduler.on_compute_locally(group, 32, is_first_delivered.then_some(firsts));
        engine.run();
        engine.assert_told(group, &text, 2, 5);
        assert_eq!(engine.num_computed, 18 + 2 * 4);
        engine.assert_clean();
    }
}

#[test]
fn oldest_sequence_is_never_preempted() {
    let mut engine = ModelEngine::new(SchedulerLimits { num_blocks: 8, max_num_parked_blocks: 0, ..limits() });
    let oldest = engine.add(&prompt(1, 30), 1, 60, Work::Generate);
    let younger = engine.add(&prompt(2, 30), 1, 60, Work::Generate);
    while engine.scheduler.preemptions().preempted == 0 {
        assert!(engine.step());
    }
    assert_eq!(engine.scheduler.sequence(oldest).unwrap().state, SequenceState::Computing);
    assert_eq!(engine.scheduler.sequence(younger).unwrap().state, SequenceState::Parked);
    engine.run();
    engine.assert_told(oldest, &prompt(1, 30), 1, 60);
    engine.assert_told(younger, &prompt(2, 30), 1, 60);
    engine.assert_clean();
}

#[test]
fn parked_kv_comes_back_without_recomputing() {
    let caching = false;
    let base = SchedulerLimits { num_blocks: 8, is_prefix_caching: caching, ..limits() };
    let mut engine = ModelEngine::new(SchedulerLimits { max_num_parked_blocks: 8, ..base });
    engine.add(&prompt(1, 30), 1, 60, Work::Generate);
    engine.add(&prompt(2, 30), 1, 60, Work::Generate);
    engine.run();
    assert!(engine.scheduler.preemptions().preempted > 0);
    assert_eq!(engine.num_computed, 2 * (30 + 59));
    engine.assert_clean();
}

#[test]
fn next_step_is_scheduled_before_the_last_one_is_known() {
    let mut engine = ModelEngine { depth: 2, ..ModelEngine::new(limits()) };
    let text = prompt(1, 20);
    let group = engine.add(&text, 1, 5, Work::Generate);
    assert!(engine.launch() && engine.launch());
    let ahead = engine.launched[1].step.spans[0];
    assert_eq!((ahead.first_token, ahead.num_tokens, ahead.is_sampled, ahead.is_decode), (20, 1, true, true));
    assert_eq!(engine.scheduler.sequence(group).unwrap().tokens.len(), 20, "token #1 is not known yet");
    engine.run();
    engine.assert_told(group, &text, 1, 5);
    assert_eq!(engine.num_computed, 24, "an end by length is foreseen");
    engine.assert_clean();
}

#[test]
fn what_depends_on_the_draw_waits_for_it() {
    for (num_choices, max_tokens, work) in [(1, 1, Work::Generate), (2, 5, Work::Generate), (1, 5, Work::PrefillOnly)] {
        let mut engine = ModelEngine { depth: 2, ..ModelEngine::new(limits()) };
        engine.add(&prompt(1, 20), num_choices, max_tokens, work);
        assert!(engine.launch());
        assert!(!engine.launch(), "{num_choices} choices of {max_tokens} tokens, {work:?}");
    }
}

#[test]
fn blocks_of_an_ended_sequence_stay_until_its_last_step_is_done() {
    let text = prompt(1, 20);
    let stop = expected(&text, ChoiceIndex(0), 1)[0];
    for is_cancelled in [false, true] {
        let mut engine = ModelEngine { depth: 2, ..ModelEngine::new(limits()) };
        let params = SamplingParams { stop_token_ids: vec![stop], ..SamplingParams::greedy(5) };
        let group = engine.scheduler.add(NewSequence { params: Arc::new(params), ..new(&text, 1, 5, Work::Generate) });
        assert!(engine.launch() && engine.launch());
        if is_cancelled {
            engine.scheduler.cancel(group.unwrap());
        }
        assert!(engine.complete());
        assert_eq!(engine.finished.len(), usize::from(!is_cancelled));
        assert!(engine.scheduler.block_counts().referenced > 0, "a step still computes with them");
        assert!(!engine.scheduler.is_idle());
        assert!(engine.complete());
        engine.assert_clean();
        assert_eq!(engine.told.values().flatten().count(), usize::from(!is_cancelled), "the draw ahead is dropped");
    }
}

#[test]
fn nothing_is_parked_while_a_step_is_in_flight() {
    let mut engine = ModelEngine { depth: 2, ..ModelEngine::new(SchedulerLimits { num_blocks: 8, ..limits() }) };
    let groups = [1, 2].map(|seed| engine.add(&prompt(seed, 30), 1, 60, Work::Generate));
    engine.run();
    assert!(engine.scheduler.preemptions().preempted > 0);
    engine.assert_told(groups[0], &prompt(1, 30), 1, 60);
    engine.assert_told(groups[1], &prompt(2, 30), 1, 60);
    engine.assert_clean();
}

#[test]
fn what_can_never_run_is_refused_when_added() {
    let mut scheduler = Scheduler::new(SchedulerLimits { num_blocks: 4, ..limits() });
    let too_long = scheduler.add(new(&prompt(1, 60), 1, 10, Work::Generate));
    assert!(matches!(too_long, Err(AddError::TooLong { .. })), "{too_long:?}");
    let too_many = scheduler.add(new(&prompt(1, 30), 3, 10, Work::Generate));
    assert!(matches!(too_many, Err(AddError::TooManyChoices { max_num_choices: 2, .. })), "{too_many:?}");
    assert_eq!(scheduler.add(new(&[], 1, 10, Work::Generate)), Err(AddError::Empty));
}

#[test]
fn queue_is_bounded() {
    let mut scheduler = Scheduler::new(SchedulerLimits { max_num_waiting: 2, ..limits() });
    for _ in 0..2 {
        scheduler.add(new(&[1], 1, 1, Work::Generate)).unwrap();
    }
    assert_eq!(scheduler.add(new(&[1], 1, 1, Work::Generate)), Err(AddError::Full { max_num_waiting: 2 }));
}

#[derive(Debug, Clone)]
struct Request {
    seed: u32,
    len: usize,
    num_choices: u32,
    max_tokens: u32,
    work: u8,
    cancel_after: Option<u8>,
    cancel_in: Option<SequenceState>,
    valid: usize,
    arrivals: Vec<u8>,
}

fn request() -> impl Strategy<Value = Request> {
    let cancel = prop::option::weighted(0.2, 0u8..20);
    let arrivals = prop::collection::vec(0u8..5, 0..20);
    let states = [SequenceState::Saving, SequenceState::Parked, SequenceState::Restoring];
    let cancel_in = prop::option::weighted(0.15, prop::sample::select(states.to_vec()));
    (0u32..3, 1usize..120, 1u32..4, 1u32..40, 0u8..5, (cancel, cancel_in), 0usize..8, arrivals).prop_map(
        |(seed, len, num_choices, max_tokens, work, (cancel_after, cancel_in), valid, arrivals)| Request {
            seed,
            len,
            num_choices,
            max_tokens,
            work,
            cancel_after,
            cancel_in,
            valid,
            arrivals,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn every_mix_of_requests_gives_the_expected_tokens_and_leaves_nothing(
        requests in prop::collection::vec(request(), 1..12),
        num_blocks in 14usize..40,
        block_size in prop::sample::select(vec![16usize, 32]),
        max_num_parked_blocks in prop::sample::select(vec![0usize, 3, 12, 100]),
        max_num_copied_blocks in prop::sample::select(vec![0usize, 1, 2, 5, 100]),
        is_prefix_caching in any::<bool>(),
        is_lru in any::<bool>(),
        budget in 24usize..100,
        (depth, admits_between_steps) in (1usize..=2, any::<bool>()),
        stop in prop::option::of(0u32..50),
    ) {
        let eviction_policy = if is_lru { EvictionPolicy::Lru } else { EvictionPolicy::ReuseRate };
        let limits = SchedulerLimits {
            block_size, num_blocks, max_num_parked_blocks, max_num_copied_blocks, is_prefix_caching, eviction_policy,
            max_num_batched_tokens: budget, max_num_prefill_tokens: budget / 2 + 8, ..limits()
        };
        let mut engine = ModelEngine { depth, ..ModelEngine::new(limits) };
        let mut live = Vec::new();
        for r in requests {
            let work = [Work::Generate, Work::PrefillOnly, Work::AwaitKv, Work::AwaitKv, Work::AwaitKv][usize::from(r.work)];
            let text = prompt(r.seed, r.len);
            let params = SamplingParams {
                stop_token_ids: stop.into_iter().collect(),
                ..SamplingParams::greedy(r.max_tokens)
            };
            let sequence = NewSequence { params: Arc::new(params), ..new(&text, r.num_choices, r.max_tokens, work) };
            let Ok(group) = engine.scheduler.add(sequence) else { continue };
            live.push((group, text, r, work));
        }
        let mut cancelled = std::collections::HashSet::new();
        let mut answered = std::collections::HashSet::new();
        let mut arriving = Vec::new();
        for round in 0u32..20_000 {
            for (group, text, r, work) in &live {
                let is_gone = cancelled.contains(group);
                let is_due = r.cancel_after.is_some_and(|after| u32::from(after) == round)
                    || r.cancel_in.is_some_and(|state| {
                        let members = engine.scheduler.groups.get(group).into_iter().flatten();
                        members.into_iter().any(|id| engine.scheduler.sequences[id].state == state)
                    });
                if is_due && !is_gone {
                    for parked in engine.scheduler.cancel(*group) {
                        engine.saved.remove(&parked);
                    }
                    cancelled.insert(*group);
                } else if *work == Work::PrefillOnly && engine.first_tokens.remove(group).is_some() {
                    engine.scheduler.cancel(*group);
                } else if *work == Work::AwaitKv && !is_gone && engine.admitted.contains_key(group) && answered.insert(*group) {
                    let held = engine.admitted[group].0;
                    let firsts: Vec<_> = (0..r.num_choices).map(|c| sampled(expected(text, ChoiceIndex(c), 1)[0])).collect();
                    if r.work == 2 {
                        engine.land(*group, text.len());
                        let events = engine.scheduler.on_kv_complete(*group, firsts);
                        for c in 0..r.num_choices {
                            engine.told.insert((*group, ChoiceIndex(c)), expected(text, ChoiceIndex(c), 1));
                        }
                        engine.take_in(events);
                    } else if r.work == 4 {
                        let end = (held + r.valid * 16).min((text.len() - 1) / 16 * 16);
                        let prefix = Arc::new(ArrivingPrefix::new(held, end));
                        engine.scheduler.on_compute_around(*group, prefix.clone());
                        let blocks = engine.admitted[group].1.clone();
                        arriving.push((*group, text, blocks, prefix.granules(), r.arrivals.iter(), prefix));
                    } else {
                        let valid = (held + r.valid * 16).min(text.len() / 16 * 16);
                        engine.land(*group, valid);
                        engine.scheduler.on_compute_locally(*group, valid, None);
                    }
                }
            }
            for (group, text, blocks, granules, arrivals, prefix) in &mut arriving {
                match arrivals.next() {
                    Some(0) => {}
                    Some(1) => prefix.raise_goal(prefix.num_claimed_tokens() + 32),
                    // It is missing.
                    Some(2) => {
                        granules.next();
                    }
                    Some(_) => {
                        let is_placed = granules.next().is_some_and(|next| engine.arrive(text, blocks, prefix, next));
                        prop_assert!(!(is_placed && cancelled.contains(group)));
                    }
                    None => prefix.finish(),
                }
            }
            if admits_between_steps {
                engine.admit_awaiting();
            }
            let is_busy = engine.step();
            if !is_busy && engine.scheduler.is_idle() {
                break;
            }
        }
        for (group, text, r, work) in &live {
            if *work != Work::PrefillOnly && !cancelled.contains(group) {
                for choice in (0..r.num_choices).map(ChoiceIndex) {
                    let mut text = expected(text, choice, r.max_tokens as usize);
                    if let Some(end) = text.iter().position(|token| Some(*token) == stop) {
                        text.truncate(end + 1);
                    }
                    assert_eq!(engine.told[&(*group, choice)], text, "{group} {choice:?}");
                }
            }
        }
        engine.assert_clean();
        for (_, text, ..) in &live {
            engine.assert_blocks_are_told(text);
        }
        engine.scheduler.clear_cache();
        engine.assert_blocks_are_told(&[]);
    }
}

#[test]
fn pinned_blocks_are_not_given_away_until_they_are_unpinned() {
    let mut engine = ModelEngine::new(SchedulerLimits { num_blocks: 4, ..limits() });
    let text = prompt(1, 40);
    engine.add(&text, 1, 1, Work::Generate);
    engine.run();
    let mut chain = crate::content::ContentChain::new(&new(&text, 1, 1, Work::Generate).root);
    chain.extend(&text);
    let scheduler = &mut engine.scheduler;
    let blocks = scheduler.pin(PinId(1), chain.granules());
    assert_eq!(blocks.len(), 2);
    assert_eq!(scheduler.pin(PinId(2), &chain.granules()[..1]), blocks[..1]);
    let forged = crate::content::ContentName { digest: crate::content::PrefixDigest([1; 32]), ..chain.granules()[0] };
    assert_eq!(scheduler.pin(PinId(3), &[forged]), []);
    assert_eq!(scheduler.block_counts().referenced, 2);
    scheduler.check_integrity().unwrap();
    // It needs all four.
    engine.add(&prompt(2, 40), 1, 1, Work::Generate);
    assert!(!engine.step());
    engine.scheduler.unpin(PinId(1));
    assert!(!engine.step(), "the other pin is still there, and one block is too few");
    assert_eq!(engine.scheduler.block_counts().referenced, 1);
    engine.scheduler.unpin(PinId(2));
    engine.scheduler.unpin(PinId(2));
    engine.run();
    engine.assert_clean();
}
