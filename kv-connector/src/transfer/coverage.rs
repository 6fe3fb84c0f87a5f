//! Which granules of which layers have landed.

use std::ops::Range;

/// Two marks for each granule of each layer: claimed by an extent that is landing or has landed, and
/// verified. Granules and layers count from 0 within one landing.
#[derive(Debug)]
pub(crate) struct Coverage {
    num_granules: usize,
    layers: Vec<Layer>,
}

#[derive(Debug, Clone)]
struct Layer {
    claimed: Vec<u64>,
    verified: Vec<u64>,
    /// Granules verified without a gap from the first.
    num_contiguous: usize,
}

impl Coverage {
    pub(crate) fn new(num_layers: usize, num_granules: usize) -> Self {
        let words = vec![0; num_granules.div_ceil(64)];
        let layer = Layer { claimed: words.clone(), verified: words, num_contiguous: 0 };
        Self { num_granules, layers: vec![layer; num_layers] }
    }

    /// Reserves a range for one extent. False if any of it is claimed already.
    pub(crate) fn claim(&mut self, layer: usize, granules: Range<usize>) -> bool {
        let claimed = &mut self.layers[layer].claimed;
        if granules.clone().any(|granule| is_set(claimed, granule)) {
            return false;
        }
        granules.for_each(|granule| claimed[granule / 64] |= 1 << (granule % 64));
        true
    }

    /// Whether an extent has claimed any of it and has not landed.
    pub(crate) fn is_landing(&self, layer: usize, granules: Range<usize>) -> bool {
        let Layer { claimed, verified, .. } = &self.layers[layer];
        granules.into_iter().any(|granule| is_set(claimed, granule) && !is_set(verified, granule))
    }

    /// Whether all of it has landed.
    pub(crate) fn has_landed(&self, layer: usize, mut granules: Range<usize>) -> bool {
        granules.all(|granule| is_set(&self.layers[layer].verified, granule))
    }

    /// Gives back what an extent claimed and did not fill.
    pub(crate) fn release(&mut self, layer: usize, granules: Range<usize>) {
        let claimed = &mut self.layers[layer].claimed;
        granules.for_each(|granule| claimed[granule / 64] &= !(1 << (granule % 64)));
    }

    /// A claimed range is proven.
    pub(crate) fn verify(&mut self, layer: usize, granules: Range<usize>) {
        let num_granules = self.num_granules;
        let layer = &mut self.layers[layer];
        granules.for_each(|granule| layer.verified[granule / 64] |= 1 << (granule % 64));
        while layer.num_contiguous < num_granules && is_set(&layer.verified, layer.num_contiguous) {
            layer.num_contiguous += 1;
        }
    }

    /// Granules verified in every layer without a gap from the first.
    pub(crate) fn num_contiguous(&self) -> usize {
        self.layers.iter().map(|layer| layer.num_contiguous).min().unwrap_or(self.num_granules)
    }

    /// Whether every granule of every layer is verified.
    pub(crate) fn is_complete(&self) -> bool {
        self.num_contiguous() == self.num_granules
    }
}

fn is_set(words: &[u64], granule: usize) -> bool {
    words[granule / 64] >> (granule % 64) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_is_the_slowest_layer_up_to_its_first_gap() {
        let mut coverage = Coverage::new(2, 130);
        for (layer, range) in [(0, 0..130), (1, 65..130), (1, 0..64)] {
            assert!(coverage.claim(layer, range.clone()));
            coverage.verify(layer, range);
        }
        assert_eq!(coverage.num_contiguous(), 64);
        assert!(!coverage.is_complete());
        assert!(coverage.claim(1, 64..65));
        assert_eq!(coverage.num_contiguous(), 64);
        coverage.verify(1, 64..65);
        assert!(coverage.is_complete());
    }

    #[test]
    fn claimed_granule_cannot_be_claimed_again_until_it_is_released() {
        let mut coverage = Coverage::new(1, 8);
        assert!(coverage.claim(0, 2..5));
        assert!(!coverage.claim(0, 4..6));
        assert!(coverage.claim(0, 5..6), "a refused claim leaves no mark");
        coverage.release(0, 2..5);
        assert!(coverage.claim(0, 4..5));
    }

    #[test]
    fn range_is_landing_from_its_claim_to_its_verdict() {
        let mut coverage = Coverage::new(1, 8);
        let seen = |coverage: &Coverage| (coverage.is_landing(0, 0..4), coverage.has_landed(0, 0..4));
        assert_eq!(seen(&coverage), (false, false));
        assert!(coverage.claim(0, 1..3));
        assert_eq!(seen(&coverage), (true, false));
        coverage.verify(0, 1..3);
        assert_eq!(seen(&coverage), (false, false), "the rest of it is missing");
        assert!(coverage.has_landed(0, 1..3));
        assert!(coverage.claim(0, 3..5));
        assert_eq!(seen(&coverage), (true, false));
        coverage.release(0, 3..5);
        assert_eq!(seen(&coverage), (false, false));
    }

    #[test]
    fn nothing_to_cover_is_complete() {
        assert!(Coverage::new(3, 0).is_complete());
    }
}
