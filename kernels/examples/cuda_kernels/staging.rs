//! KV between blocks of a pool and the host, as both ends of a transfer over a network move it: an extent's pieces in one
//! go, waited for; beside one piece of memory that is as large as a stage can make use of.

use std::time::Duration;

use kernels::cuda::limits::seconds_of;
use kernels::cuda::{DeviceError, Lane};

use super::decode::any_order;
use super::{BLOCK_SIZE, Bench, TIMINGS};

const WHOLE_BYTES: usize = 64 << 20;

pub(crate) fn measure(bench: &Bench) -> Result<(), DeviceError> {
    // K and V of a block in a layer.
    let piece_bytes = 2 * BLOCK_SIZE * bench.shapes.num_kv_heads * bench.shapes.head_dim * 2;
    let Some(pool) = bench.filled(11, WHOLE_BYTES)? else {
        println!("KV between device and host: {WHOLE_BYTES} bytes do not fit the memory");
        return Ok(());
    };
    let mut host = vec![0u8; WHOLE_BYTES];
    let order = any_order(WHOLE_BYTES / piece_bytes);
    let pieces: Vec<(usize, usize)> =
        order.iter().map(|number| (*number as usize * piece_bytes, piece_bytes)).collect();
    for direction in ["to the host", "to the device"] {
        let best = |extents: &[&[(usize, usize)]], host: &mut [u8]| {
            let time = Duration::from_millis(bench.args.millis);
            let mut extents = extents.iter().cycle();
            let mut next = || {
                let places = extents.next().expect("a cycle has no end");
                let num_bytes = places.iter().map(|(_, num_bytes)| num_bytes).sum();
                match direction {
                    "to the host" => pool.read_places(Lane::Transfer, places, &mut host[..num_bytes]),
                    _ => pool.write_places(Lane::Transfer, places, &host[..num_bytes]),
                }
            };
            (0..TIMINGS).try_fold(f64::INFINITY, |best, _| {
                Ok::<f64, DeviceError>(best.min(seconds_of(&bench.device, time, &mut next)?))
            })
        };
        let whole = WHOLE_BYTES as f64 / best(&[&[(0, WHOLE_BYTES)]], &mut host)?;
        println!("{:<54}{:>23.1} GB/s", format!("{WHOLE_BYTES} bytes in one piece {direction}"), whole / 1e9);
        for &kib in &bench.args.extent_kib {
            let num_pieces = ((kib << 10) / piece_bytes).clamp(1, pieces.len());
            let extents: Vec<&[(usize, usize)]> = pieces.chunks_exact(num_pieces).collect();
            let seconds = best(&extents, &mut host)?;
            let speed = (num_pieces * piece_bytes) as f64 / seconds;
            println!(
                "{:<54}{:>10.1} us{:>9.1} GB/s{:>7.1} % of one piece",
                format!("{num_pieces} pieces of {piece_bytes} bytes {direction}"),
                seconds * 1e6,
                speed / 1e9,
                100.0 * speed / whole
            );
        }
    }
    Ok(())
}
