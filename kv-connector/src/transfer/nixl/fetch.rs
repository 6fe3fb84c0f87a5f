//! One extent on its way through a staging.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::device_pool::MemoryPlace;
use common::wire::PoolRun;

use super::Peer;
use super::library::Request;
use super::staging::Staging;
use crate::transfer::Arriving;
use crate::transfer::pull::PullError;

/// A peer that lets a read wait so long is taken for dead, as one that is silent on a connection.
const READ_DEADLINE: Duration = Duration::from_secs(2);
/// For so long a read is asked for its end without a pause, then every [`PAUSE`].
const SPIN_TIME: Duration = Duration::from_micros(100);
const PAUSE: Duration = Duration::from_micros(50);

/// Reads runs of `peer`'s pool, and while one half of the staging is read into puts the other into the blocks.
pub(super) fn fetch(peer: &Arc<Peer>, runs: &[PoolRun], arriving: &mut Arriving) -> Result<(), PullError> {
    let mut fetch = Fetch::new(peer)?;
    let lots = lots(runs, fetch.staging().half_bytes());
    for (index, lot) in lots.iter().enumerate() {
        if index == 0 {
            fetch.begin(index, lot)?;
        }
        fetch.wait()?;
        if let Some(next) = lots.get(index + 1) {
            fetch.begin(index + 1, next)?;
        }
        let num_bytes = lot.iter().map(|run| run.num_bytes as usize).sum();
        if let Err(refused) = fetch.staging().deliver(index, num_bytes, &peer.inner.pool, arriving) {
            // That nobody wants it any more is not the peer's; that a read of it does not end is.
            fetch.wait()?;
            return Err(refused);
        }
    }
    Ok(())
}

/// Runs in order, cut into lots of at most `bytes_max`.
fn lots(runs: &[PoolRun], bytes_max: usize) -> Vec<Vec<PoolRun>> {
    let (mut lots, mut lot, mut room) = (Vec::new(), Vec::new(), bytes_max);
    for run in runs {
        let (mut offset, end) = (run.offset, run.end());
        while offset < end {
            let num_bytes = room.min((end - offset) as usize);
            lot.push(PoolRun { offset, num_bytes: num_bytes as u32 });
            offset += num_bytes as u64;
            room -= num_bytes;
            if room == 0 {
                lots.push(std::mem::take(&mut lot));
                room = bytes_max;
            }
        }
    }
    if !lot.is_empty() {
        lots.push(lot);
    }
    lots
}

/// A staging in use.
struct Fetch<'a> {
    peer: &'a Arc<Peer>,
    /// Until it is lost.
    staging: Option<Staging>,
    reading: Option<Request>,
}

impl<'a> Fetch<'a> {
    fn new(peer: &'a Arc<Peer>) -> Result<Self, PullError> {
        let staging = peer.inner.take_staging()?;
        Ok(Self { peer, staging: Some(staging), reading: None })
    }

    fn staging(&self) -> &Staging {
        self.staging.as_ref().expect("whoever loses it goes no further")
    }

    /// Begins to read a lot into the half of `index`. Nothing else is being read.
    fn begin(&mut self, index: usize, lot: &[PoolRun]) -> Result<(), PullError> {
        let (inner, pool, into) = (&self.peer.inner, self.peer.pool, self.staging().half(index));
        let place = |run: &PoolRun| MemoryPlace {
            address: pool.address + run.offset,
            num_bytes: u64::from(run.num_bytes),
            gpu: pool.gpu,
        };
        let pieces: Vec<MemoryPlace> = lot.iter().map(place).collect();
        assert!(self.reading.is_none() && pieces.iter().map(|piece| piece.num_bytes).sum::<u64>() <= into.num_bytes);
        inner.enter().map_err(PullError::Failed)?;
        let request = inner.agent.prepare(&self.peer.name, &pieces, into).map_err(PullError::Failed)?;
        // SAFETY: half a staging is registered, large enough, and delivered from only behind `wait`, by its only owner.
        match unsafe { inner.agent.post(&request) } {
            Ok(()) => self.reading = Some(request),
            // It stays the library's, as what some of it may be writing to stays.
            Err(reason) => return Err(self.lose(None, reason)),
        }
        Ok(())
    }

    /// Waits for what was begun.
    fn wait(&mut self) -> Result<(), PullError> {
        let Some(request) = self.reading.take() else { return Ok(()) };
        let agent = &self.peer.inner.agent;
        let began = Instant::now();
        loop {
            match agent.has_ended(&request) {
                Ok(false) if began.elapsed() > READ_DEADLINE => {
                    return Err(self.lose(Some(request), format!("a read did not end within {READ_DEADLINE:?}")));
                }
                Ok(false) if began.elapsed() > SPIN_TIME => std::thread::sleep(PAUSE),
                Ok(false) => std::thread::yield_now(),
                Ok(true) => {
                    agent.release(request);
                    return Ok(());
                }
                Err(reason) => return Err(self.lose(None, reason)),
            }
        }
    }

    fn lose(&mut self, request: Option<Request>, reason: String) -> PullError {
        let staging = self.staging.take().expect("it is lost once");
        self.peer.inner.on_lost(staging, request, self.peer.clone());
        PullError::Failed(reason)
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        // Whatever it says, nobody wants the bytes.
        let _ = self.wait();
        if let Some(staging) = self.staging.take() {
            self.peer.inner.give_back(staging);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES_MAX: usize = 512 << 10;

    #[test]
    fn lots_hold_all_bytes_in_order_and_none_is_too_large() {
        let run = |offset: u64, num_bytes: usize| PoolRun { offset, num_bytes: num_bytes as u32 };
        for runs in [
            vec![],
            vec![run(7, 1)],
            vec![run(0, BYTES_MAX)],
            vec![run(64, BYTES_MAX - 1), run(1 << 30, 2)],
            vec![run(0, 3 * BYTES_MAX + 5), run(1 << 40, BYTES_MAX), run(9, 10)],
        ] {
            let lots = lots(&runs, BYTES_MAX);
            let size = |lot: &Vec<PoolRun>| lot.iter().map(|run| run.num_bytes as usize).sum::<usize>();
            assert!(lots.iter().all(|lot| (1..=BYTES_MAX).contains(&size(lot))));
            let every = |runs: &[PoolRun]| -> Vec<u64> {
                let ends = runs.iter().flat_map(|run| [run.offset, run.end()]).collect::<Vec<_>>();
                // Neighbours joined: where one ends and the next begins at the same place.
                let mut joined: Vec<u64> = Vec::new();
                for pair in ends.chunks(2) {
                    if joined.last() == Some(&pair[0]) {
                        joined.pop();
                    } else {
                        joined.push(pair[0]);
                    }
                    joined.push(pair[1]);
                }
                joined
            };
            assert_eq!(every(&lots.concat()), every(&runs));
        }
    }
}
