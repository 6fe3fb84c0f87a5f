//! Digests of KV where it lies, as both ends of a transfer make them: an extent's pieces are told, hashed, waited for.

use std::time::Duration;

use kernels::cuda::limits::seconds_of;
use kernels::cuda::ops;
use kernels::cuda::{Buffer, DeviceError};

use super::decode::any_order;
use super::{BLOCK_SIZE, Bench, TIMINGS};

pub(crate) fn measure(bench: &Bench) -> Result<(), DeviceError> {
    // K or V of a block in a layer.
    let piece_bytes = BLOCK_SIZE * bench.shapes.num_kv_heads * bench.shapes.head_dim * 2;
    let scratch = Buffer::new(&bench.device, ops::DIGEST_BYTES)?;
    for &kib in &bench.args.extent_kib {
        let num_pieces = ((kib << 10) / piece_bytes).clamp(1, ops::DIGEST_PIECES_MAX);
        let num_bytes = num_pieces * piece_bytes;
        let num_extents = bench.num_to_rotate(num_bytes);
        let what = format!("digest of {num_pieces} pieces of {piece_bytes} bytes");
        let Some(pool) = bench.filled(10, num_extents * num_bytes)? else {
            println!("{what:<54} does not fit the memory");
            continue;
        };
        let order = any_order(num_extents * num_pieces);
        let pieces: Vec<(usize, usize)> =
            order.iter().map(|number| (*number as usize * piece_bytes, piece_bytes)).collect();
        let mut extents = pieces.chunks_exact(num_pieces).cycle();
        let (time, mut best) = (Duration::from_millis(bench.args.millis), f64::INFINITY);
        for _ in 0..TIMINGS {
            let next = || ops::digest(&pool, extents.next().expect("a cycle has no end"), &scratch).map(drop);
            best = best.min(seconds_of(&bench.device, time, next)?);
        }
        bench.say_bytes(&what, best, num_bytes);
    }
    Ok(())
}
