//! What a device can do at most, measured: speeds are held against it, in the same minute.
//!
//! Memory: a copy within the device, of which bytes read and bytes written both count; its source and its destination
//! are larger than any cache. Arithmetic: a square product of bf16 matrices by the device's library. Neither is the
//! number of a data sheet, which no program reaches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;

use super::device::{Buffer, Device, DeviceError, Lane};
use super::ops::{Multiply, library_matmul};

/// How much a measurement of a [`DeviceProbe`] is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeSizes {
    /// Bytes that are copied: as many are read, and as many written.
    pub copy_bytes: usize,
    /// Rows, columns and what is summed over of the product.
    pub product: usize,
}

/// Memory that limits are measured with.
pub struct DeviceProbe {
    sizes: ProbeSizes,
    from: Buffer,
    to: Buffer,
    /// Both operands and the result, where the device has a product of many rows.
    product: Option<[Buffer; 3]>,
}

/// Launches of one timing take about so long: enough that what the first waits for does not count.
const TIMED: Duration = Duration::from_millis(30);

/// Launches of one timing at most.
const LAUNCHES_MAX: u32 = 10_000;

impl DeviceProbe {
    /// Takes the memory for both.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(device: &Arc<dyn Device>, sizes: ProbeSizes) -> Result<Self, DeviceError> {
        let ProbeSizes { copy_bytes, product: side } = sizes;
        let [from, to] = [Buffer::new(device, copy_bytes)?, Buffer::new(device, copy_bytes)?];
        // Memory that was never written may be somewhere else than in memory.
        from.zero(Lane::Compute, 0, copy_bytes)?;
        let product = match device.has_product() {
            true => Some([
                uniform_bf16(device, 1, side * side)?,
                uniform_bf16(device, 2, side * side)?,
                Buffer::new(device, side * side * 4)?,
            ]),
            false => None,
        };
        Ok(Self { sizes, from, to, product })
    }

    /// What is measured.
    pub fn sizes(&self) -> ProbeSizes {
        self.sizes
    }

    /// Bytes read and written per second by a copy within the device.
    ///
    /// # Errors
    /// What the device says.
    pub fn copied_bytes_per_second(&self) -> Result<f64, DeviceError> {
        let num_bytes = self.sizes.copy_bytes;
        let copy = || self.to.copy_from(Lane::Compute, 0, &self.from, 0, num_bytes);
        Ok(2.0 * num_bytes as f64 / seconds_of(self.from.device(), TIMED, copy)?)
    }

    /// Operations, two for each multiply-add, per second of a product of bf16 by the library; `None` where there is none.
    ///
    /// # Errors
    /// What the device or its library says.
    pub fn product_ops_per_second(&self) -> Result<Option<f64>, DeviceError> {
        let Some([x, w, out]) = &self.product else { return Ok(None) };
        let side = self.sizes.product;
        let multiply = Multiply { x, w, bias: None, out, m: side, n: side, k: side, add: false };
        let seconds = seconds_of(self.from.device(), TIMED, || library_matmul(&multiply))?;
        Ok(Some(2.0 * (side as f64).powi(3) / seconds))
    }
}

/// Seconds of one of many launches that follow one another for about `time`; one more goes before and does not count.
///
/// # Errors
/// What the device says.
pub fn seconds_of(
    device: &Arc<dyn Device>,
    time: Duration,
    mut launch: impl FnMut() -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    let mut timed = |count: u32| {
        let started_at = Instant::now();
        (0..count).try_for_each(|_| launch())?;
        device.record()?.wait()?;
        Ok(started_at.elapsed().as_secs_f64())
    };
    timed(1)?;
    let count = (time.as_secs_f64() / timed(1)?).ceil().clamp(1.0, f64::from(LAUNCHES_MAX)) as u32;
    Ok(timed(count)? / f64::from(count))
}

/// `count` bf16 values between -1 and 1.
///
/// # Errors
/// What the device says.
pub fn uniform_bf16(device: &Arc<dyn Device>, seed: u64, count: usize) -> Result<Buffer, DeviceError> {
    // A few random values again and again: drawing as many as there are would take longer than what is measured.
    let some: Vec<bf16> = (0..65_521).map(|i| bf16::from_f64(2.0 * crate::uniform(seed, 0, i) - 1.0)).collect();
    let all: Vec<bf16> = some.iter().copied().cycle().take(count).collect();
    Buffer::of(device, &all)
}

#[cfg(all(test, feature = "fibres"))]
mod tests {
    use super::*;
    use crate::cuda::FibreDevice;

    #[test]
    fn a_probe_multiplies_what_it_says_and_both_limits_are_speeds() {
        let device: Arc<dyn Device> = Arc::new(FibreDevice::new());
        let probe = DeviceProbe::new(&device, ProbeSizes { copy_bytes: 4096, product: 16 }).unwrap();
        assert!(probe.copied_bytes_per_second().unwrap() > 0.0);
        assert!(probe.product_ops_per_second().unwrap().is_some_and(|speed| speed > 0.0));
        let mut copied = vec![1; 4096];
        probe.to.read(Lane::Transfer, 0, &mut copied).unwrap();
        assert!(copied.iter().all(|byte| *byte == 0), "all of the source was copied");
        let read = |buffer: &Buffer| {
            let mut bytes = vec![0; 512];
            buffer.read(Lane::Transfer, 0, &mut bytes).unwrap();
            bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect::<Vec<f32>>()
        };
        let [x, w, out] = probe.product.as_ref().unwrap();
        let (x, w) = (read(x), read(w));
        let mut found = vec![0; 16 * 16 * 4];
        out.read(Lane::Transfer, 0, &mut found).unwrap();
        let last = found.as_chunks::<4>().0.last().map(|b| f32::from_le_bytes(*b)).unwrap();
        let expected: f32 = (0..16).map(|i| x[15 * 16 + i] * w[15 * 16 + i]).sum();
        assert!((last - expected).abs() < 1e-3, "{last} and {expected}");
    }
}
