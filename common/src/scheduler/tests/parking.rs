//! Sequences that are saved in host memory a few blocks per step, and restored the same way.

use super::*;

/// A long sequence that has been preempted for an older one, with room for `num_parked` of its blocks.
fn preempted(num_parked: usize, num_copied: usize) -> (ModelEngine, [SequenceId; 2]) {
    let limits = SchedulerLimits {
        num_blocks: 16,
        max_num_parked_blocks: num_parked,
        max_num_copied_blocks: num_copied,
        is_prefix_caching: false,
        ..limits()
    };
    let mut engine = ModelEngine::new(limits);
    let older = engine.add(&prompt(1, 30), 1, 120, Work::Generate);
    let younger = engine.add(&prompt(2, 150), 1, 40, Work::Generate);
    while engine.scheduler.preemptions().preempted == 0 {
        assert!(engine.step());
    }
    (engine, [older, younger])
}

fn assert_both_said_what_they_say_alone(engine: &mut ModelEngine, [older, younger]: [SequenceId; 2]) {
    engine.run();
    engine.assert_told(older, &prompt(1, 30), 1, 120);
    engine.assert_told(younger, &prompt(2, 150), 1, 40);
    engine.assert_clean();
}

/// Steps until `is_over`, in each of which the oldest computes a token. How many there were.
fn steps_of_the_oldest(engine: &mut ModelEngine, oldest: SequenceId, is_over: impl Fn(&ModelEngine) -> bool) -> usize {
    let mut num_steps = 0;
    while !is_over(engine) {
        let num_told = engine.told[&(oldest, ChoiceIndex(0))].len();
        assert!(engine.step());
        assert_eq!(engine.told[&(oldest, ChoiceIndex(0))].len(), num_told + 1, "nothing holds it up");
        num_steps += 1;
    }
    num_steps
}

#[test]
fn others_compute_in_every_step_while_a_sequence_is_saved_and_restored() {
    let limits = SchedulerLimits {
        num_blocks: 20,
        max_num_parked_blocks: 20,
        max_num_copied_blocks: 1,
        is_prefix_caching: false,
        ..limits()
    };
    let mut engine = ModelEngine::new(limits);
    let texts = [(prompt(1, 30), 120), (prompt(2, 60), 40), (prompt(3, 150), 40)];
    let groups = texts.clone().map(|(text, max_tokens)| engine.add(&text, 1, max_tokens, Work::Generate));
    assert!(engine.step());
    let is = |state| {
        move |engine: &ModelEngine| engine.scheduler.sequence(groups[2]).is_some_and(|last| last.state == state)
    };
    steps_of_the_oldest(&mut engine, groups[0], is(SequenceState::Saving));
    let num_saving = steps_of_the_oldest(&mut engine, groups[0], is(SequenceState::Parked));
    // Until the second one has ended.
    steps_of_the_oldest(&mut engine, groups[0], is(SequenceState::Restoring));
    let num_restoring = steps_of_the_oldest(&mut engine, groups[0], is(SequenceState::Computing));
    assert!(num_saving >= 8 && num_restoring >= 8, "{num_saving} steps saved, {num_restoring} restored");
    engine.run();
    for ((text, max_tokens), group) in texts.iter().zip(groups) {
        engine.assert_told(group, text, 1, *max_tokens as usize);
    }
    let counts = engine.scheduler.preemptions();
    assert_eq!((counts.preempted, counts.parked, counts.restored, counts.recomputed), (1, 1, 1, 0));
    assert_eq!(engine.num_computed, 30 + 119 + 60 + 39 + 150 + 39, "nothing was computed twice");
    engine.assert_clean();
}

#[test]
fn sequence_cancelled_while_it_is_saved_or_restored_leaves_nothing() {
    for cancelled_in in [SequenceState::Saving, SequenceState::Restoring] {
        let (mut engine, [older, younger]) = preempted(16, 1);
        while engine.scheduler.sequence(younger).unwrap().state != cancelled_in {
            assert!(engine.step());
        }
        // In the middle of it.
        assert!(engine.step());
        assert_eq!(engine.scheduler.sequence(younger).unwrap().state, cancelled_in);
        assert!(!engine.saved[&younger].is_empty());
        assert_eq!(engine.scheduler.cancel(younger), [younger]);
        engine.saved.remove(&younger);
        engine.run();
        engine.assert_told(older, &prompt(1, 30), 1, 120);
        engine.assert_clean();
    }
}

#[test]
fn end_that_has_no_room_is_computed_again_behind_the_beginning_that_has() {
    for (num_parked, is_parked) in [(4, 1), (0, 0)] {
        let (mut engine, groups) = preempted(num_parked, 2);
        let num_known = engine.scheduler.sequence(groups[1]).unwrap().tokens.len();
        let counts = engine.scheduler.preemptions();
        assert_eq!((counts.parked, counts.recomputed), (is_parked, 1));
        assert_both_said_what_they_say_alone(&mut engine, groups);
        let counts = engine.scheduler.preemptions();
        assert_eq!((counts.preempted, counts.restored), (1, is_parked));
        let num_again = num_known - 1 - num_parked * 16;
        assert_eq!(engine.num_computed, 30 + 119 + 150 + 39 + num_again, "{num_parked} blocks were parked");
    }
}

#[test]
fn sequence_preempted_while_it_is_restored_is_not_saved_again() {
    let (mut engine, groups) = preempted(16, 1);
    let is = |engine: &ModelEngine, state| engine.scheduler.sequence(groups[1]).unwrap().state == state;
    while !is(&engine, SequenceState::Restoring) {
        assert!(engine.step());
    }
    assert!(engine.step());
    let num_saved = engine.saved[&groups[1]].len();
    // As a third one would that is older and grows.
    engine.scheduler.preempt(groups[1]);
    assert!(is(&engine, SequenceState::Parked));
    engine.scheduler.check_integrity().unwrap();
    assert_eq!(engine.saved[&groups[1]].len(), num_saved);
    let counts = engine.scheduler.preemptions();
    assert_eq!((counts.preempted, counts.parked, counts.restored), (2, 1, 0));
    assert_both_said_what_they_say_alone(&mut engine, groups);
    assert_eq!(engine.num_computed, 30 + 119 + 150 + 39, "nothing was computed twice");
}

#[test]
fn shared_blocks_are_not_saved_for_growth_that_they_make_no_room_for() {
    let limits = SchedulerLimits {
        num_blocks: 11,
        max_num_parked_blocks: 100,
        max_num_copied_blocks: 1,
        is_prefix_caching: false,
        ..limits()
    };
    let mut engine = ModelEngine::new(limits);
    // The choices share eight blocks, have one each, and all need the next one in the same step.
    let group = engine.add(&prompt(2, 128), 3, 40, Work::Generate);
    while engine.scheduler.preemptions().preempted == 0 {
        assert!(engine.step());
    }
    assert_eq!(engine.scheduler.preemptions().preempted, 2, "one block was not enough");
    let num_saved: usize = engine.saved.values().map(BTreeMap::len).sum();
    assert!(num_saved <= 2, "{num_saved} blocks were saved for one that was needed");
    engine.run();
    engine.assert_told(group, &prompt(2, 128), 3, 40);
    engine.assert_clean();
}

#[test]
fn new_sequences_wait_for_one_that_is_saved() {
    let (mut engine, groups) = preempted(16, 1);
    let newest = engine.add(&prompt(4, 10), 1, 1, Work::Generate);
    let has_blocks =
        |engine: &ModelEngine| engine.scheduler.sequence(groups[1]).unwrap().state == SequenceState::Restoring;
    while !has_blocks(&engine) {
        assert_eq!(engine.scheduler.sequence(newest).unwrap().state, SequenceState::Waiting);
        assert!(engine.step());
    }
    assert_both_said_what_they_say_alone(&mut engine, groups);
    engine.assert_told(newest, &prompt(4, 10), 1, 1);
}
