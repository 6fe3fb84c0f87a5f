//! Graphs: what was launched once, to be launched again as a whole.
//!
//! A graph keeps the addresses it was recorded with. What lies there may change between two launches; the memory itself
//! must be the one that was there when it was recorded. Both devices hold a graph to that: they know what memory they
//! have given ([`Allocations`]) and which of it a graph names ([`Named`]), and refuse to launch one that names memory
//! which was given back, whoever has the address by now.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::device::{Device, DeviceError};

/// Launches, products and changes of memory, recorded by [`Device::begin_capture`](super::Device::begin_capture) and
/// [`end_capture`](super::Device::end_capture).
pub trait Graph: Send + Sync {
    /// Does all of it on [`Lane::Compute`](super::Lane::Compute), behind what is there.
    ///
    /// # Errors
    /// What the device says; that memory was given back which the graph names.
    fn launch(&self) -> Result<(), DeviceError>;

    /// How many launches, products and changes of memory it is.
    fn num_nodes(&self) -> usize;
}

/// A graph that the current thread records. Dropped without [`end`](Self::end), by a panic say, it ends the recording
/// and forgets what was recorded: a device of which a thread records for ever takes no memory back from it.
pub struct Recording<'a> {
    device: &'a Arc<dyn Device>,
    is_open: bool,
}

impl<'a> Recording<'a> {
    /// From here on, what this thread launches is recorded: [`Device::begin_capture`].
    ///
    /// # Errors
    /// What the device says; that this thread is recording already.
    pub fn begin(device: &'a Arc<dyn Device>) -> Result<Self, DeviceError> {
        device.begin_capture()?;
        Ok(Self { device, is_open: true })
    }

    /// What was recorded.
    ///
    /// # Errors
    /// What the device says.
    pub fn end(mut self) -> Result<Box<dyn Graph>, DeviceError> {
        self.is_open = false;
        self.device.clone().end_capture()
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if self.is_open {
            // What was recorded is of no use; if it cannot even be made a graph, it has ended all the same.
            let _ = self.device.clone().end_capture();
        }
    }
}

/// The memory that a device has given.
#[derive(Debug, Default)]
pub(super) struct Allocations {
    /// By first address: size in bytes, and a number that no other has or had.
    given: BTreeMap<u64, (usize, u64)>,
    num_given: u64,
    num_taken_back: u64,
    num_bytes: usize,
}

impl Allocations {
    #[cfg_attr(not(feature = "fibres"), allow(dead_code, reason = "a GPU's driver counts for itself"))]
    pub(super) fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    pub(super) fn on_given(&mut self, address: u64, num_bytes: usize) {
        self.num_given += 1;
        self.num_bytes += num_bytes;
        self.given.insert(address, (num_bytes, self.num_given));
    }

    pub(super) fn on_taken_back(&mut self, address: u64) {
        self.num_taken_back += 1;
        if let Some((num_bytes, _)) = self.given.remove(&address) {
            self.num_bytes -= num_bytes;
        }
    }

    /// First address and number of the memory that `address` is in.
    fn holding(&self, address: u64) -> Option<(u64, u64)> {
        let (start, (num_bytes, number)) = self.given.range(..=address).next_back()?;
        (address - start < *num_bytes as u64).then_some((*start, *number))
    }
}

/// The memory that a graph names.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Numbers by first address.
    memory: BTreeMap<u64, u64>,
    /// How much memory had been given back when all of it was last seen to be there.
    checked_at: AtomicU64,
}

impl Named {
    /// Adds the memory that `address`, if it is not null, is in.
    ///
    /// # Errors
    /// That there is none.
    pub(super) fn add(&mut self, address: u64, given: &Allocations) -> Result<(), DeviceError> {
        if address == 0 {
            return Ok(());
        }
        let Some((start, number)) = given.holding(address) else {
            let reason = format!("{address:#x} is in no memory that it has given");
            return Err(DeviceError::Refused { asked: "record a launch".to_string(), reason });
        };
        self.memory.insert(start, number);
        *self.checked_at.get_mut() = given.num_taken_back;
        Ok(())
    }

    /// Whether all of it is still there. Costs something only when memory was given back since the last time.
    ///
    /// # Errors
    /// That it is not.
    pub(super) fn check(&self, given: &Allocations) -> Result<(), DeviceError> {
        if self.checked_at.load(Ordering::Relaxed) == given.num_taken_back {
            return Ok(());
        }
        let stale = self.memory.iter().find(|(start, number)| given.holding(**start) != Some((**start, **number)));
        if let Some((start, _)) = stale {
            let reason = format!("memory at {start:#x}, which it names, was given back since it was recorded");
            return Err(DeviceError::Refused { asked: "launch a graph".to_string(), reason });
        }
        self.checked_at.store(given.num_taken_back, Ordering::Relaxed);
        Ok(())
    }
}

/// What cannot be in a graph: a copy between the host and the device takes what is there at that time.
pub(super) fn not_recordable(what: &str) -> DeviceError {
    let reason = "it would take what is on the host now, every time the graph is launched".to_string();
    DeviceError::Refused { asked: format!("record {what}"), reason }
}

/// A mistake in the order of [`begin_capture`](super::Device::begin_capture) and its end.
pub(super) fn out_of_order(asked: &str, reason: &str) -> DeviceError {
    DeviceError::Refused { asked: asked.to_string(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_given_back_is_noticed_also_if_it_was_given_again() {
        let mut given = Allocations::default();
        given.on_given(4096, 100);
        given.on_given(8192, 100);
        let mut named = Named::default();
        named.add(0, &given).unwrap();
        named.add(4096 + 99, &given).unwrap();
        for outside in [4095, 4096 + 100, 8192 + 100] {
            let said = named.add(outside, &given).unwrap_err().to_string();
            assert!(said.ends_with("is in no memory that it has given"), "{said}");
        }
        // Memory that it does not name.
        given.on_taken_back(8192);
        assert_eq!((named.check(&given), given.num_bytes()), (Ok(()), 100));
        given.on_taken_back(4096);
        let stale = |given: &Allocations| named.check(given).unwrap_err().to_string();
        assert!(stale(&given).contains("memory at 0x1000, which it names, was given back"));
        given.on_given(4096, 100);
        assert!(stale(&given).contains("0x1000"));
    }
}
