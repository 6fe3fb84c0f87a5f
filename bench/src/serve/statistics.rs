//! Mean, median, standard deviation and percentiles of samples, as NumPy (and so vLLM) computes them.

/// A sorted set of samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// `None` without samples: no figure is better than a zero that nobody measured.
    pub fn new(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        (!samples.is_empty()).then_some(Self(samples))
    }

    /// How many there are, at least one.
    #[allow(clippy::len_without_is_empty)] // There is no empty one.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The arithmetic mean.
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// The standard deviation of the samples themselves (divided by their number, not by one less).
    pub fn std(&self) -> f64 {
        let mean = self.mean();
        (self.0.iter().map(|sample| (sample - mean).powi(2)).sum::<f64>() / self.0.len() as f64).sqrt()
    }

    /// The value below which `percent` (0 to 100) of the samples lie, linear between neighbours.
    pub fn percentile(&self, percent: f64) -> f64 {
        let position = (percent / 100.0).clamp(0.0, 1.0) * (self.0.len() - 1) as f64;
        let (low, high) = (self.0[position.floor() as usize], self.0[position.ceil() as usize]);
        low + (high - low) * position.fract()
    }

    /// The largest sample.
    pub fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_numpy() {
        // np.mean, np.std, np.percentile of [4, 1, 3, 2].
        let samples = Samples::new(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(samples.mean(), 2.5);
        assert_eq!(samples.std(), 1.25f64.sqrt());
        assert_eq!(samples.percentile(50.0), 2.5);
        assert_eq!(samples.percentile(25.0), 1.75);
        assert!((samples.percentile(99.0) - 3.97).abs() < 1e-12);
        assert_eq!((samples.percentile(0.0), samples.percentile(100.0), samples.max()), (1.0, 4.0, 4.0));
    }

    #[test]
    fn one_sample_is_every_percentile_and_none_is_no_figure() {
        let one = Samples::new(vec![7.0]).unwrap();
        assert_eq!((one.percentile(1.0), one.percentile(99.0), one.std()), (7.0, 7.0, 0.0));
        assert_eq!(Samples::new(vec![]), None);
    }
}
