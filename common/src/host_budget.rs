//! One budget of host memory for two uses: KV of preempted sequences, which nothing else has, and the host tier
//! of the prefix-block store, whose entries can be computed again.
//!
//! What is parked takes its room from the tier, and gives it back. The tier says how it makes room; before any
//! byte is parked, it has. How much may be parked at all is the scheduler's bound, never above the budget.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Makes a tier keep at most this many bytes, before it returns.
type Resize = Box<dyn Fn(u64) + Send>;

/// See the module.
#[derive(Default)]
pub struct HostBudget {
    bytes_max: u64,
    shares: Mutex<Shares>,
}

#[derive(Default)]
struct Shares {
    parked_bytes: u64,
    resize_tier: Option<Resize>,
}

impl HostBudget {
    /// A budget of `bytes_max` bytes; 0 if there is no tier that what is parked could share it with.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, shares: Mutex::default() }
    }

    /// All of it.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Bytes that parked KV holds.
    pub fn parked_bytes(&self) -> u64 {
        self.shares().parked_bytes
    }

    /// From now on `resize` is called with the bytes that are left for the tier, at once and on every change.
    pub fn share_with(&self, resize: impl Fn(u64) + Send + 'static) {
        let mut shares = self.shares();
        resize(self.bytes_max.saturating_sub(shares.parked_bytes));
        shares.resize_tier = Some(Box::new(resize));
    }

    /// Parked KV holds this many bytes from now on. When it returns, the tier has made room.
    pub fn park(&self, num_bytes: u64) {
        let mut shares = self.shares();
        if shares.parked_bytes != num_bytes {
            shares.parked_bytes = num_bytes;
            if let Some(resize) = &shares.resize_tier {
                resize(self.bytes_max.saturating_sub(num_bytes));
            }
        }
    }

    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for HostBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parked_bytes = self.parked_bytes();
        f.debug_struct("HostBudget").field("bytes_max", &self.bytes_max).field("parked_bytes", &parked_bytes).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn tier_has_what_is_not_parked() {
        let budget = HostBudget::new(100);
        budget.park(30);
        let left = Arc::new(AtomicU64::new(0));
        let tier = left.clone();
        budget.share_with(move |num_bytes| tier.store(num_bytes, Ordering::Relaxed));
        assert_eq!(left.load(Ordering::Relaxed), 70, "what was parked before the tier was there counts");
        for (parked, expected) in [(80, 20), (100, 0), (0, 100)] {
            budget.park(parked);
            assert_eq!((budget.parked_bytes(), left.load(Ordering::Relaxed)), (parked, expected));
        }
    }
}
