//! An extent's bytes on the host until they are worth a copy to a device.
//!
//! Bytes come in datagrams of 1.4 to 64 KiB, and a device takes them by a copy that is begun and awaited for each write,
//! 10 us or more whatever its size: with 1,450 bytes in each that alone would hold KV to 0.1 GB/s.

/// Of one extent. At most what is worth a copy and the piece that completed it, and no more than the extent has.
pub(super) struct Gathering {
    /// Without room before the first piece: an extent may come by another way.
    bytes: Vec<u8>,
    num_worth_a_copy: usize,
    num_payload_bytes: usize,
}

impl Gathering {
    /// For an extent of `num_payload_bytes`.
    pub(super) fn new(num_worth_a_copy: usize, num_payload_bytes: usize) -> Self {
        Self { bytes: Vec::new(), num_worth_a_copy, num_payload_bytes }
    }

    /// Room for the next `num_bytes` that arrive, to be filled.
    pub(super) fn room(&mut self, num_bytes: usize) -> &mut [u8] {
        let start = self.bytes.len();
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(self.num_payload_bytes.min(self.num_worth_a_copy + num_bytes));
        }
        self.bytes.resize(start + num_bytes, 0);
        &mut self.bytes[start..]
    }

    /// What has come together, if it is worth a copy or nothing else comes.
    pub(super) fn complete(&self, is_last: bool) -> Option<&[u8]> {
        (is_last || self.bytes.len() >= self.num_worth_a_copy).then_some(&self.bytes)
    }

    /// What was complete has been copied.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }
}
