//! A node's KV pool as the place that extents are read from and land in.

use crate::ids::BlockId;

/// Makes granules as another node's pool has them into granules of this one's.
///
/// What converts knows both pools; whoever moves bytes knows only that a granule becomes a granule.
pub trait GranuleConversion: Send + Sync {
    /// Bytes of one granule in one layer, all planes, in the other node's pool.
    fn source_granule_bytes(&self) -> usize;

    /// Converts whole granules, one behind the other, all of which `out` has exactly room for.
    fn convert(&self, source: &[u8], out: &mut [u8]);
}

/// The blocks of a pool, addressed by a sequence's own granules.
///
/// An extent's bytes are those of its granules in ascending order, one layer, all planes; what lies
/// inside a granule is the pool's business. `blocks` is the sequence's whole block table, `first_granule`
/// counts from the sequence's first token.
pub trait KvMemory: Send + Sync {
    /// Writes `bytes` at `byte_offset` of the extent that begins at `first_granule`.
    fn write_at(&self, layer: u32, blocks: &[BlockId], first_granule: usize, byte_offset: usize, bytes: &[u8]);

    /// Lets `fill` write `num_bytes` at `byte_offset` of the extent that begins at `first_granule`: it gets them
    /// where they lie, in ascending order, in as few pieces as there are, and may read back what it wrote.
    fn fill_at(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        byte_offset: usize,
        num_bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) {
        let mut bytes = vec![0; num_bytes];
        fill(&mut bytes);
        self.write_at(layer, blocks, first_granule, byte_offset, &bytes);
    }

    /// Where each write is a copy to a device, which is waited for: how many bytes are worth one, if that many come.
    /// `None` where bytes are written where they lie.
    fn gathered_bytes(&self) -> Option<usize> {
        None
    }

    /// Reads one granule in every layer, one layer behind the other; `out` has exactly
    /// `num_layers() * granule_bytes()` bytes.
    fn read_all_layers(&self, blocks: &[BlockId], granule: usize, out: &mut [u8]) {
        for (layer, out) in out.chunks_exact_mut(self.granule_bytes()).enumerate() {
            self.read_granules(layer as u32, blocks, granule, 1, out);
        }
    }

    /// Writes what [`read_all_layers`](Self::read_all_layers) gave, of a granule of any sequence.
    fn write_all_layers(&self, blocks: &[BlockId], granule: usize, bytes: &[u8]) {
        for (layer, bytes) in bytes.chunks_exact(self.granule_bytes()).enumerate() {
            self.write_at(layer as u32, blocks, granule, 0, bytes);
        }
    }

    /// Reads whole granules; `out` has exactly `num_granules * granule_bytes()` bytes.
    fn read_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize, out: &mut [u8]);

    /// Shows whole granules where they lie, in ascending order, in as few pieces as there are: `visit` gets
    /// each piece and where it begins, counted from the memory's first byte.
    fn visit_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    );

    /// As [`visit_granules`](Self::visit_granules), without their bytes: where each piece begins and its size.
    fn visit_places(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, usize),
    ) {
        let visit = &mut |offset, bytes: &[u8]| visit(offset, bytes.len());
        self.visit_granules(layer, blocks, first_granule, num_granules, visit);
    }

    /// XXH3 of 128 bits of whole granules, made where they lie; `None` where the host is to make it of the bytes.
    fn hash_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize) -> Option<u128> {
        let _ = (layer, blocks, first_granule, num_granules);
        None
    }

    /// The bytes at a place that [`visit_granules`](Self::visit_granules) has told, if this memory keeps them there for
    /// as long as it lives; else they are copied. Their blocks stay pinned and final while they are used.
    fn bytes_at(&self, offset: u64, num_bytes: usize) -> Option<&[u8]> {
        let _ = (offset, num_bytes);
        None
    }

    /// Bytes of one granule in one layer, all planes.
    fn granule_bytes(&self) -> usize;

    /// Layers of the model.
    fn num_layers(&self) -> usize;
}
