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
//! Few requests stand behind many blocks, so the counts of a class are noisy: the distribution of ages is
//! drawn towards that of all classes together.

use super::reuse_rate::NUM_CLASSES;

/// Ages are told apart in steps of a factor of the square root of 2, from 1/32 of a pool to 11 pools.
pub(crate) const NUM_AGES: usize = 19;
/// A class needs about this many uses before its own distribution of ages counts as much as that of all.
const NUM_USES_TRUSTED: f64 = 1000.0;
/// The same for the share of its blocks that are used again.
const NUM_USES_SHARE: f64 = 16.0;
/// Counts are halved when they reach this many pools, so that what is no longer true is forgotten.
const WINDOW_POOLS: usize = 64;
const WINDOW_MIN: usize = 1 << 17;

#[derive(Debug)]
pub(crate) struct Rates {
    num_uses: Vec<f64>,
    /// `[NUM_CLASSES][NUM_AGES]`
    num_reuses: Vec<[f64; NUM_AGES]>,
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
            num_uses: vec![0.0; NUM_CLASSES],
            num_reuses: vec![[0.0; NUM_AGES]; NUM_CLASSES],
            num_uses_total: 0,
            window: num_blocks.saturating_mul(WINDOW_POOLS).max(WINDOW_MIN),
            ages_end: std::array::from_fn(end),
        }
    }

    /// Which of the [`NUM_AGES`] an age is.
    pub(crate) fn age_step(&self, age: u32) -> usize {
        self.ages_end.partition_point(|end| *end <= age).min(NUM_AGES - 1)
    }

    pub(crate) fn on_use(&mut self, class: u8) {
        self.num_uses[usize::from(class)] += 1.0;
        self.num_uses_total += 1;
        if self.num_uses_total >= self.window {
            self.num_uses_total /= 2;
            let counts = self.num_uses.iter_mut().chain(self.num_reuses.iter_mut().flatten());
            counts.for_each(|count| *count /= 2.0);
        }
    }

    /// A block that had been put into `class` was used again at this age.
    pub(crate) fn on_reuse(&mut self, class: u8, age: u32) {
        let age = self.age_step(age);
        self.num_reuses[usize::from(class)][age] += 1.0;
    }

    /// `index[class * NUM_AGES + age]`; all equal before anything was learnt.
    pub(crate) fn index(&self) -> Vec<f64> {
        let mut pooled = [0.0; NUM_AGES];
        for class in &self.num_reuses {
            pooled.iter_mut().zip(class).for_each(|(sum, num)| *sum += num);
        }
        let num_reuses: f64 = pooled.iter().sum();
        let share = num_reuses / self.num_uses.iter().sum::<f64>().max(1.0);
        pooled.iter_mut().for_each(|num| *num /= num_reuses.max(1.0));
        let classes = self.num_uses.iter().zip(&self.num_reuses);
        classes.flat_map(|(uses, reuses)| self.index_of_class(*uses, reuses, &pooled, share)).collect()
    }

    fn index_of_class(&self, uses: f64, reuses: &[f64; NUM_AGES], pooled: &[f64; NUM_AGES], share: f64) -> Vec<f64> {
        let own_share = (reuses.iter().sum::<f64>() + NUM_USES_SHARE * share) / (uses + NUM_USES_SHARE);
        let trust = uses / (uses + NUM_USES_TRUSTED);
        let reused: Vec<f64> = (0..NUM_AGES)
            .map(|age| trust * reuses[age] / uses.max(1.0) + (1.0 - trust) * own_share * pooled[age])
            .collect();
        let mut left = 1.0;
        let mut index = Vec::with_capacity(NUM_AGES);
        for age in 0..NUM_AGES {
            index.push(self.best_rate(&reused, age, left));
            left = (left - reused[age]).max(1e-9);
        }
        index
    }

    /// Over all times to keep a block from `age` on; `left`: the share of blocks that reach it.
    fn best_rate(&self, reused: &[f64], age: usize, mut left: f64) -> f64 {
        let (mut hits, mut time, mut best) = (0.0, 0.0, 0.0f64);
        for (until, num) in reused.iter().enumerate().skip(age) {
            let begin = if until == 0 { 0 } else { self.ages_end[until - 1] };
            let width = f64::from(self.ages_end[until].saturating_sub(begin).max(1));
            hits += num;
            time += width * (left - num / 2.0).max(1e-9);
            left = (left - num).max(0.0);
            best = best.max(hits / time);
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
