//! A transport that fails on purpose, the same way for the same seed.
//!
//! What it changes is a copy: a pool's own blocks are never damaged. So a corrupted extent goes as bytes,
//! whatever the transport inside; every other fault takes the transport's own way.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use common::wire::ExtentHeader;

use crate::transfer::{ExtentEnd, Payload, SendFuture, Transport, TransportLayer};

/// How often each fault happens, as a probability per extent. At most one of loss, corruption, truncation
/// and reset hits an extent; delay and duplication come on top.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct FaultPlan {
    /// Decides which extents are hit, in the order they are sent.
    pub seed: u64,
    /// Each extent is held back for up to this long.
    pub delay_max: Duration,
    /// It never arrives, and the sender does not learn of it.
    pub loss: f64,
    /// One bit of the payload is flipped, in a copy that goes as bytes.
    pub corruption: f64,
    /// It ends early, as if that were its end.
    pub truncation: f64,
    /// It is given up midway.
    pub reset: f64,
    /// It is sent twice.
    pub duplication: f64,
}

/// How many extents each fault has hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InjectedFaults {
    /// Extents that were to be sent.
    pub num_extents: u64,
    /// Never sent.
    pub num_lost: u64,
    /// Sent with a flipped bit.
    pub num_corrupted: u64,
    /// Ended early.
    pub num_truncated: u64,
    /// Given up midway.
    pub num_reset: u64,
    /// Sent twice.
    pub num_duplicated: u64,
}

/// Another transport, with faults.
pub struct FaultyTransport {
    inner: Arc<dyn Transport>,
    plan: FaultPlan,
    state: Mutex<(Draws, InjectedFaults)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Loss,
    Corruption { bit: usize },
    Truncation { num_bytes: usize },
    Reset { num_bytes: usize },
}

impl FaultyTransport {
    /// Puts `plan` around `inner`.
    pub fn new(inner: Arc<dyn Transport>, plan: FaultPlan) -> Self {
        Self { inner, plan, state: Mutex::new((Draws(plan.seed), InjectedFaults::default())) }
    }

    /// For [`FabricConfig::transport_layer`](crate::FabricConfig::transport_layer).
    pub fn layer(plan: FaultPlan) -> TransportLayer {
        Arc::new(move |inner| Arc::new(Self::new(inner, plan)))
    }

    /// What was done so far.
    pub fn injected(&self) -> InjectedFaults {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn draw(&self, num_bytes: usize) -> (Fault, bool, Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (draws, injected) = &mut *state;
        // Always the same number of draws, so that one fault's probability does not shift the others.
        let (which, place, twice, delay) = (draws.unit(), draws.next(), draws.unit(), draws.unit());
        let cut = (place % (num_bytes as u64).max(1)) as usize;
        injected.num_extents += 1;
        let plan = &self.plan;
        let mut below = which;
        let mut hits = |probability: f64| {
            let is_hit = below >= 0.0 && below < probability;
            below -= probability;
            is_hit
        };
        let fault = if hits(plan.loss) {
            injected.num_lost += 1;
            Fault::Loss
        } else if hits(plan.corruption) && num_bytes > 0 {
            injected.num_corrupted += 1;
            Fault::Corruption { bit: (place % (num_bytes as u64 * 8)) as usize }
        } else if hits(plan.truncation) {
            injected.num_truncated += 1;
            Fault::Truncation { num_bytes: cut }
        } else if hits(plan.reset) {
            injected.num_reset += 1;
            Fault::Reset { num_bytes: cut }
        } else {
            Fault::None
        };
        let is_duplicated = fault == Fault::None && twice < plan.duplication;
        injected.num_duplicated += u64::from(is_duplicated);
        (fault, is_duplicated, plan.delay_max.mul_f64(delay))
    }
}

impl Transport for FaultyTransport {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn send<'a>(&'a self, header: &'a ExtentHeader, payload: Payload, end: ExtentEnd) -> SendFuture<'a> {
        let (fault, is_duplicated, delay) = self.draw(payload.len());
        Box::pin(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            match fault {
                Fault::None if is_duplicated => {
                    self.inner.send(header, payload.clone(), end).await?;
                    self.inner.send(header, payload, end).await
                }
                Fault::None => self.inner.send(header, payload, end).await,
                Fault::Loss => Ok(()),
                Fault::Corruption { bit } => {
                    let mut bad = BytesMut::from(payload.into_bytes());
                    bad[bit / 8] ^= 1 << (bit % 8);
                    self.inner.send(header, bad.freeze().into(), end).await
                }
                Fault::Truncation { num_bytes } => self.inner.send(header, payload.cut(num_bytes), end).await,
                Fault::Reset { num_bytes } => self.inner.send(header, payload.cut(num_bytes), ExtentEnd::Reset).await,
            }
        })
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }

    fn datagram_bytes(&self) -> Option<u16> {
        self.inner.datagram_bytes()
    }
}

/// SplitMix64: a seed gives the same faults on every machine and in every version.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
