//! How many hits a block is expected to bring for the room it takes, by what kind of block it is and how
//! long it has not been used.
//!
//! Blocks are put into classes. Of each class it is counted how many were used, and at what age they were
//! used again. From that, for a block of class `c` that has age `a`:
//!
//! ```text
//!                        P(used again before age t)
//! index(c, a)  =  max   ------------------------------       ages in blocks that came into the pool
//!                 t>a    E[time until then, at most t]
//! ```
//!
//! the best rate of hits per block and time that keeping it can have (a Gittins index: if blocks were used
//! again independently of each other, giving away the lowest would be the best one can do). Fresh blocks whose
//! kind returns after minutes, if at all, can so be worth less than blocks whose time has nearly come.
//!
//! The chance to be used again at an age is counted among the blocks that reached that age: younger ones have
//! not had it yet. Few requests stand behind many blocks, so a class that was seen little is drawn towards all
//! classes together.

use std::collections::VecDeque;

use super::reuse_rate::NUM_CLASSES;

/// Ages are told apart in steps of a factor of the square root of 2, from 1/32 of a pool to 11 pools.
pub(crate) const NUM_AGES: usize = 19;
/// The chances of all classes count as this many blocks of each.
const NUM_SHARED: f64 = 16.0;
/// Counts are halved when the uses reach this many pools, so that what is no longer true is forgotten.
const WINDOW_POOLS: usize = 64;
const WINDOW_MIN: usize = 1 << 17;

#[derive(Debug)]
pub(crate) struct Rates {
    num_uses: [f64; NUM_CLASSES],
    num_reuses: [[f64; NUM_AGES]; NUM_CLASSES],
    /// `num_uses` as it was, newest first, one for each time as long as the shortest age. As many as it takes
    /// to look back to the longest.
    num_uses_before: VecDeque<[f64; NUM_CLASSES]>,
    noted_at: u32,
    num_uses_total: usize,
    window: usize,
    /// Ages of class `i` end before `ages_end[i]`; the last has no end.
    ages_end: [u32; NUM_AGES],
}

impl Rates {
    pub(crate) fn new(num_blocks: usize) -> Self {
        let pool = num_blocks.max(1) as f64;
        let end = |age: usize| (pool / 32.0 * 2f64.powf(age as f64 / 2.0)).ceil().min(f64::from(u32::MAX / 2)) as u32;
        Self {
            num_uses: [0.0; NUM_CLASSES],
            num_reuses: [[0.0; NUM_AGES]; NUM_CLASSES],
            num_uses_before: VecDeque::new(),
            noted_at: 0,
            num_uses_total: 0,
            window: num_blocks.saturating_mul(WINDOW_POOLS).max(WINDOW_MIN),
            ages_end: std::array::from_fn(end),
        }
    }

    /// Which of the [`NUM_AGES`] an age is.
    pub(crate) fn age_step(&self, age: u32) -> usize {
        self.ages_end.partition_point(|end| *end <= age).min(NUM_AGES - 1)
    }

    /// The policy's clock, which wraps around, has come to `now`.
    pub(crate) fn on_time(&mut self, now: u32) {
        let num_kept = (self.age_begin(NUM_AGES - 1) / self.ages_end[0]) as usize + 1;
        let num_missing = (now.wrapping_sub(self.noted_at) / self.ages_end[0]) as usize;
        self.noted_at = self.noted_at.wrapping_add(num_missing as u32 * self.ages_end[0]);
        for _ in 0..num_missing.min(num_kept) {
            self.num_uses_before.push_front(self.num_uses);
        }
        self.num_uses_before.truncate(num_kept);
    }

    fn age_begin(&self, age: usize) -> u32 {
        if age == 0 { 0 } else { self.ages_end[age - 1] }
    }

    pub(crate) fn on_use(&mut self, class: u8) {
        self.num_uses[usize::from(class)] += 1.0;
        self.num_uses_total += 1;
        if self.num_uses_total >= self.window {
            self.num_uses_total /= 2;
            let counts = self.num_uses.iter_mut().chain(self.num_reuses.iter_mut().flatten());
            counts.chain(self.num_uses_before.iter_mut().flatten()).for_each(|count| *count /= 2.0);
        }
    }

    /// A block that had been put into `class` was used again at this age.
    pub(crate) fn on_reuse(&mut self, class: u8, age: u32) {
        let age = self.age_step(age);
        self.num_reuses[usize::from(class)][age] += 1.0;
    }

    /// `index[class * NUM_AGES + age]`; all equal before anything was learnt.
    pub(crate) fn index(&self) -> Vec<f64> {
        let reached: Vec<[f64; NUM_AGES]> = (0..NUM_CLASSES).map(|class| self.num_reached(class)).collect();
        let shared: [f64; NUM_AGES] = std::array::from_fn(|age| {
            let num_reuses: f64 = self.num_reuses.iter().map(|class| class[age]).sum();
            num_reuses / reached.iter().map(|class| class[age]).sum::<f64>().max(1.0)
        });
        let classes = self.num_reuses.iter().zip(&reached);
        classes
            .flat_map(|(reuses, reached)| {
                let chance = |age: usize| (reuses[age] + NUM_SHARED * shared[age]) / (reached[age] + NUM_SHARED);
                let chances: [f64; NUM_AGES] = std::array::from_fn(chance);
                (0..NUM_AGES).map(move |age| self.best_rate(&chances, age))
            })
            .collect()
    }

    /// Blocks of a class that were not used again before each age; never fewer than were used at it.
    fn num_reached(&self, class: usize) -> [f64; NUM_AGES] {
        let mut num_reused = 0.0;
        std::array::from_fn(|age| {
            let num_notes = (self.age_begin(age) / self.ages_end[0]) as usize;
            let num_uses = match num_notes {
                0 => self.num_uses[class],
                notes => self.num_uses_before.get(notes - 1).map_or(0.0, |before| before[class]),
            };
            let num_reuses = self.num_reuses[class][age];
            let reached = (num_uses - num_reused).max(num_reuses);
            num_reused += num_reuses;
            reached
        })
    }

    /// Over all times to keep a block from `age` on.
    fn best_rate(&self, chances: &[f64], age: usize) -> f64 {
        let (mut left, mut hits, mut time, mut best) = (1.0, 0.0, 0.0, 0.0f64);
        for (until, chance) in chances.iter().enumerate().skip(age) {
            let width = f64::from(self.ages_end[until].saturating_sub(self.age_begin(until)).max(1));
            hits += left * chance;
            time += left * width * (1.0 - chance / 2.0);
            left *= 1.0 - chance;
            best = best.max(hits / time);
            if left <= 0.0 {
                break;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_steps_from_a_part_of_the_pool_on() {
        let rates = Rates::new(3200);
        assert_eq!(rates.age_step(0), 0);
        assert_eq!(rates.age_step(99), 0);
        assert_eq!(rates.age_step(100), 1);
        assert_eq!(rates.age_step(199), 2);
        assert_eq!(rates.age_step(u32::MAX), NUM_AGES - 1);
        assert!(rates.ages_end.is_sorted());
    }

    #[test]
    fn a_block_whose_time_comes_is_worth_more_than_a_fresh_one_and_than_one_that_missed_it() {
        let mut rates = Rates::new(3200);
        for _ in 0..10_000 {
            rates.on_use(1);
            rates.on_use(2);
        }
        rates.on_time(100_000);
        for _ in 0..5_000 {
            rates.on_reuse(1, 1_000);
        }
        let index = rates.index();
        let of = |class: usize, age: u32| index[class * NUM_AGES + rates.age_step(age)];
        assert!(of(1, 1_000) > of(1, 0));
        assert!(of(1, 0) > of(1, 3_000));
        assert!(of(1, 0) > of(2, 0));
    }

    #[test]
    fn blocks_that_are_too_young_say_nothing_about_an_age() {
        let mut rates = Rates::new(3200);
        (0..100).for_each(|_| rates.on_use(1));
        rates.on_time(1_000);
        (0..900).for_each(|_| rates.on_use(1));
        (0..10).for_each(|_| rates.on_reuse(1, 50));
        let reached = rates.num_reached(1);
        assert_eq!(reached[0], 1_000.0);
        assert_eq!(reached[rates.age_step(900)], 90.0);
        assert_eq!(reached[rates.age_step(2_000)], 0.0);
    }

    #[test]
    fn nothing_learnt_is_no_preference() {
        let index = Rates::new(10).index();
        assert!(index.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn what_was_learnt_is_forgotten() {
        let mut rates = Rates::new(1);
        rates.on_use(1);
        rates.on_reuse(1, 0);
        for _ in 0..20 * WINDOW_MIN {
            rates.on_use(1);
        }
        assert!(rates.num_reuses[1][0] < 0.01);
        assert!(rates.num_uses[1] < WINDOW_MIN as f64 * 1.01);
    }
}
