//! A ratio of two set-ups over several rounds, with its confidence interval. No clock, no I/O.

use std::fmt;

use serde_json::{Value, json};

/// 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom (any table of it, such as
/// NIST's handbook, section 1.3.6.7.2); beyond the last the normal distribution's 1.96 is within 4 %.
const T_975: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// The geometric mean of ratios, and where it lies with 95 % confidence if their logarithms are normal.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// The geometric mean.
    pub mean: f64,
    /// Its 95 % confidence interval; `None` of a single round, which has no spread.
    pub interval: Option<(f64, f64)>,
}

impl Ratio {
    /// Of `values` to `bases`, round by round; `None` if one of them is not above zero.
    ///
    /// # Panics
    /// If there are not as many of the one as of the other.
    pub fn of_rounds(values: &[f64], bases: &[f64]) -> Option<Self> {
        assert_eq!(values.len(), bases.len(), "a round has both");
        let logs: Vec<f64> = values.iter().zip(bases).map(|(value, base)| (value / base).ln()).collect();
        if logs.is_empty() || logs.iter().any(|log| !log.is_finite()) {
            return None;
        }
        let count = logs.len() as f64;
        let mean = logs.iter().sum::<f64>() / count;
        let interval = (logs.len() > 1).then(|| {
            let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (count - 1.0);
            let t = T_975.get(logs.len() - 2).copied().unwrap_or(1.96);
            let half = t * (variance / count).sqrt();
            ((mean - half).exp(), (mean + half).exp())
        });
        Some(Self { mean: mean.exp(), interval })
    }

    /// `{"ratio", "low", "high"}`
    pub fn to_json(self) -> Value {
        json!({"ratio": self.mean, "low": self.interval.map(|(low, _)| low), "high": self.interval.map(|(_, high)| high)})
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}x", self.mean)?;
        match self.interval {
            Some((low, high)) => write!(f, " [{low:.3}, {high:.3}]"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_geometric_and_the_interval_students() {
        let ratio = Ratio::of_rounds(&[2.0, 8.0], &[1.0, 1.0]).unwrap();
        assert!((ratio.mean - 4.0).abs() < 1e-12);
        // ln 4 ± 12.706 * ln 2: the logarithms are ln 2 and ln 8, their deviation sqrt(2) ln 2.
        let (low, high) = ratio.interval.unwrap();
        let half = 12.706 * 2f64.ln();
        assert!((low.ln() - (4f64.ln() - half)).abs() < 1e-9 && (high.ln() - (4f64.ln() + half)).abs() < 1e-9);
        let same = Ratio::of_rounds(&[3.0; 40], &[2.0; 40]).unwrap();
        assert!(same.interval.is_some_and(|(low, high)| high - low < 1e-9));
        assert_eq!(same.to_string(), "1.500x [1.500, 1.500]");
    }

    #[test]
    fn one_round_has_no_interval_and_nothing_has_no_ratio() {
        assert_eq!(Ratio::of_rounds(&[3.0], &[2.0]), Some(Ratio { mean: 1.5, interval: None }));
        assert_eq!(Ratio::of_rounds(&[3.0, 0.0], &[2.0, 1.0]), None);
        assert_eq!(Ratio::of_rounds(&[3.0], &[0.0]), None);
        assert_eq!(Ratio::of_rounds(&[], &[]), None);
    }
}
