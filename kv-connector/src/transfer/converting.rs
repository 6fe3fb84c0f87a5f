//! An extent's bytes between another pool's form and this one's.
//!
//! ```text
//! sender's pool    | granule | granule | granule |      one extent, as it lies there; the digest is over this
//! pieces           |----|---------|----------|---|      as they arrive
//! staged                     |----|                     begun, not whole yet
//! own blocks       [granule][granule][granule]          converted when whole
//! ```
//!
//! The receiver converts, so the sender ships its pool's bytes whoever asks, from where they lie, and one that reads
//! shared memory still reads each byte once.

use std::sync::Arc;

use common::kv_memory::GranuleConversion;

/// One extent that comes in another form than it is kept in.
///
/// Holds the last piece and less than a granule, and what was made of them: twice the bytes at most, where bf16 is
/// kept as f32.
pub(super) struct Converting {
    conversion: Arc<dyn GranuleConversion>,
    /// Arrived and not converted.
    staged: Vec<u8>,
    converted: Vec<u8>,
    num_granules: usize,
}

impl Converting {
    pub(super) fn new(conversion: Arc<dyn GranuleConversion>) -> Self {
        Self { conversion, staged: Vec::new(), converted: Vec::new(), num_granules: 0 }
    }

    /// Granules that were [taken](Self::take_granules).
    pub(super) fn num_granules(&self) -> usize {
        self.num_granules
    }

    /// Room for the next `num_bytes` that arrive, to be filled.
    pub(super) fn stage(&mut self, num_bytes: usize) -> &mut [u8] {
        let start = self.staged.len();
        self.staged.resize(start + num_bytes, 0);
        &mut self.staged[start..]
    }

    /// Whole granules of what was staged, as they are kept here: `granule_bytes` each.
    pub(super) fn take_granules(&mut self, granule_bytes: usize) -> &[u8] {
        let source_granule_bytes = self.conversion.source_granule_bytes();
        let num_granules = self.staged.len() / source_granule_bytes;
        let num_bytes = num_granules * source_granule_bytes;
        self.converted.resize(num_granules * granule_bytes, 0);
        self.conversion.convert(&self.staged[..num_bytes], &mut self.converted);
        self.staged.drain(..num_bytes);
        self.num_granules += num_granules;
        &self.converted
    }
}
