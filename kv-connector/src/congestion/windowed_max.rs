//! The largest value of the latest rounds.

/// Rounds over which a value counts.
const NUM_ROUNDS: u64 = 10;

/// Largest of the values of the [`NUM_ROUNDS`] latest rounds. Each is kept until it is too old or a larger one comes.
#[derive(Debug, Clone, Default)]
pub(super) struct WindowedMax {
    /// From the largest to the latest: rounds rise, values fall. At most one for each round.
    by_round: std::collections::VecDeque<(u64, f64)>,
}

impl WindowedMax {
    pub(super) fn update(&mut self, round: u64, value: f64) {
        while self.by_round.back().is_some_and(|(_, smaller)| *smaller <= value) {
            self.by_round.pop_back();
        }
        if self.by_round.back().is_none_or(|(last, _)| *last < round) {
            self.by_round.push_back((round, value));
        }
        while self.by_round.front().is_some_and(|(old, _)| old + NUM_ROUNDS <= round) {
            self.by_round.pop_front();
        }
    }

    pub(super) fn max(&self) -> f64 {
        self.by_round.front().map_or(0.0, |(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_value_counts_for_ten_rounds() {
        let mut window = WindowedMax::default();
        assert_eq!(window.max(), 0.0);
        for (round, value, max) in [(1, 5.0, 5.0), (1, 7.0, 7.0), (1, 6.0, 7.0), (3, 4.0, 7.0), (10, 3.0, 7.0)] {
            window.update(round, value);
            assert_eq!(window.max(), max, "round {round}");
        }
        window.update(11, 2.0);
        assert_eq!(window.max(), 4.0);
        window.update(12, 9.0);
        assert_eq!(window.max(), 9.0);
        window.update(40, 1.0);
        assert_eq!(window.max(), 1.0);
    }
}
