//! Memory of a device that processes of one host let each other read.
//!
//! Whoever has the memory [exports](Buffer::export) a handle, which is good for any number of other processes; who
//! [opens](PeerMemory::open) it reads, and writes to memory of its own only. What it reads may change meanwhile, so
//! what it has copied is worth what a digest of the copy says.
//!
//! **Order at the end.** Readers drop their mapping before the memory is given back. By the driver's documents the other
//! order is undefined (`cuIpcOpenMemHandle`, `cuMemFree`), also, as far as they say, where the other process has ended;
//! nothing here can enforce it. A node that shuts down ends its connections, at whose end readers drop what they
//! opened, before it gives its pool back; it does not wait to hear that they have. On the host device a mapping
//! outlives everything.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::device::{Buffer, Device, DeviceError, Lane};

/// Bytes that a copy takes from one place to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the memory they are copied from.
    pub from: usize,
    /// Offset in the memory they are copied to.
    pub to: usize,
    /// How many.
    pub num_bytes: usize,
}

/// Another process's memory.
pub struct PeerMemory {
    device: Arc<dyn Device>,
    address: u64,
    num_bytes: usize,
}

impl PeerMemory {
    /// What [`Buffer::export`] of another process has made `handle` of: memory of `num_bytes`.
    ///
    /// # Errors
    /// What the driver says: the memory is another host's, or of a device that this one cannot reach.
    pub fn open(device: &Arc<dyn Device>, handle: &[u8], num_bytes: usize) -> Result<Self, DeviceError> {
        let address = device.open_export(handle, num_bytes)?;
        Ok(Self { device: device.clone(), address, num_bytes })
    }

    /// Size in bytes.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Copies pieces into `to`, a buffer of the device that the memory was opened on; done when the call returns.
    /// Panics beyond the end of either.
    ///
    /// # Errors
    /// What the driver says.
    pub fn copy_to(&self, to: &Buffer, pieces: &[Piece]) -> Result<(), DeviceError> {
        let addresses: Vec<(u64, u64, usize)> = pieces
            .iter()
            .map(|piece| (self.at(piece.from, piece.num_bytes), to.at(piece.to, piece.num_bytes), piece.num_bytes))
            .collect();
        // SAFETY: in bounds by `at`; the two are different memory; that nobody else uses the bytes of `to` is the
        // users' agreement, as with `Buffer::write`.
        unsafe { self.device.copy_all_within(Lane::Transfer, &addresses) }
    }

    /// Copies what is at `offset` to `into`. Panics beyond the end.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        let from = self.at(offset, into.len());
        // SAFETY: in bounds by `at`. The other process may write there: any bytes are bytes.
        unsafe { self.device.copy_out(Lane::Transfer, &[(from, into.len())], into) }
    }

    fn at(&self, offset: usize, num_bytes: usize) -> u64 {
        assert!(
            offset <= self.num_bytes && num_bytes <= self.num_bytes - offset,
            "bytes {offset}..+{num_bytes} lie outside a peer's memory of {}",
            self.num_bytes
        );
        self.address + offset as u64
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        // SAFETY: opened in `open`; every copy from it has ended when its call returned.
        unsafe { self.device.close_export(self.address) }
    }
}

impl Buffer {
    /// As [`new`](Self::new), in memory that other processes of the host can be let read.
    ///
    /// # Errors
    /// What the driver says.
    pub fn shared(device: &Arc<dyn Device>, num_bytes: usize) -> Result<Self, DeviceError> {
        let address = device.alloc_shared(num_bytes.max(1))?;
        Ok(Self::from_alloc(device, address, num_bytes))
    }

    /// Where it begins, for a library that registers memory with a network. What others read or write there is no part of
    /// any order here.
    pub fn address(&self) -> u64 {
        self.at(0, self.num_bytes())
    }

    /// Copies pieces of another buffer of the device, one wait for all, passing by what computes; done when the call
    /// returns. Panics beyond the end of either.
    ///
    /// # Errors
    /// What the driver says.
    pub fn copy_pieces_from(&self, from: &Buffer, pieces: &[Piece]) -> Result<(), DeviceError> {
        assert!(!std::ptr::eq(self, from), "pieces are copied between two buffers");
        let addresses: Vec<(u64, u64, usize)> = pieces
            .iter()
            .map(|piece| (from.at(piece.from, piece.num_bytes), self.at(piece.to, piece.num_bytes), piece.num_bytes))
            .collect();
        // SAFETY: in bounds by `at`; the two are different memory; that nobody else uses the bytes written is the users'
        // agreement, as with `Buffer::write`.
        unsafe { self.device().copy_all_within(Lane::Transfer, &addresses) }
    }

    /// A handle of all of it for other processes of this host, if it was made [`shared`](Self::shared).
    ///
    /// # Errors
    /// What the driver says.
    pub fn export(&self) -> Result<Vec<u8>, DeviceError> {
        self.device().export(self.at(0, self.num_bytes()))
    }
}
