//! Attention's products of up to 16 rows with keys and values where they lie in the pool. What is read later is asked
//! for with each line that is read, since memory beyond the caches is slower than all else of them.

use std::arch::asm;
use std::mem::offset_of;

#[cfg(doc)]
use super::panel_shapes;
use super::{ROW_BYTES, TILE_ROWS};
use crate::numerics::TILE_STEPS;

/// Up to 16 queries, and four granules of keys.
pub(crate) struct KeyBlocks<'a> {
    /// `[block][rows][16]` pairs.
    pub(crate) q: *const u32,
    pub(crate) num_rows: usize,
    /// `[block][16][16]` pairs each.
    pub(crate) keys: &'a [*const u32; 4],
    /// One at least.
    pub(crate) num_blocks: usize,
    /// Rows so many bytes apart.
    pub(crate) scores: *mut f32,
    pub(crate) scores_row: usize,
    /// What is to come nearer meanwhile, as large as `keys`.
    pub(crate) ahead: &'a [*const u32; 4],
}

/// `scores = fold of blocks` for each query and key.
///
/// # Safety
/// Tiles are configured by [`panel_shapes`] of as many rows; the pointers but `ahead` are valid for what is said.
#[inline(always)]
pub(crate) unsafe fn fold_keys(blocks: &KeyBlocks<'_>) {
    debug_assert!(blocks.num_blocks > 0 && blocks.num_rows <= TILE_ROWS);
    macro_rules! lines {
        ($($line:literal)*) => {
            concat!($("prefetcht0 [{at} + ", $line, "]\n"),*)
        };
    }
    macro_rules! granule {
        ($sums:literal, $keys:literal, $index:literal) => {
            concat!(
                "mov {at}, [{keys} + ", $index, "]\n",
                "add {at}, {offset}\n",
                "tileloadd ", $keys, ", [{at} + {line}]\n",
                "tdpbf16ps ", $sums, ", tmm4, ", $keys, "\n",
                "mov {at}, [{ahead} + ", $index, "]\n",
                "add {at}, {offset}\n",
                lines!(0 64 128 192 256 320 384 448 512 576 640 704 768 832 896 960),
            )
        };
    }
    // SAFETY: reads and writes what the caller vouches for; prefetches of anything are allowed.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "xor {offset:e}, {offset:e}",
            "2:",
            "tileloadd tmm4, [{q} + {line}]",
            granule!("tmm0", "tmm6", 0),
            granule!("tmm1", "tmm7", 8),
            granule!("tmm2", "tmm6", 16),
            granule!("tmm3", "tmm7", 24),
            "add {q}, {q_block}",
            "add {offset}, 1024",
            "cmp {offset}, {end}",
            "jne 2b",
            "tilestored [{scores} + {row}], tmm0",
            "tilestored [{scores} + {row} + 64], tmm1",
            "tilestored [{scores} + {row} + 128], tmm2",
            "tilestored [{scores} + {row} + 192], tmm3",
            q = inout(reg) blocks.q => _,
            q_block = in(reg) blocks.num_rows * ROW_BYTES,
            keys = in(reg) blocks.keys,
            ahead = in(reg) blocks.ahead,
            offset = out(reg) _,
            at = out(reg) _,
            end = in(reg) blocks.num_blocks * 1024,
            scores = in(reg) blocks.scores,
            line = in(reg) ROW_BYTES,
            row = in(reg) blocks.scores_row,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// `[up to 4 vectors][16][16]` pairs.
#[repr(align(1024))]
pub(crate) struct BlockCopy(#[expect(dead_code, reason = "read by `asm!`")] [[u32; 16 * TILE_STEPS]; 4]);

impl Default for BlockCopy {
    fn default() -> Self {
        BlockCopy([[0; 16 * TILE_STEPS]; 4])
    }
}

/// Some blocks of 32 values, each of which lies in two granules, by the weights of up to 16 rows.
#[repr(C)]
pub(crate) struct ValueBlocks {
    /// Rows so many bytes apart, 16 pairs for each block.
    pub(crate) weights: *const u32,
    pub(crate) weights_row: usize,
    /// `[block][2]` granules of `[8 pairs][head]`, of whose rows of so many bytes these are multiplied, from so many
    /// on.
    pub(crate) values: *const *const u32,
    pub(crate) values_row: usize,
    pub(crate) first: usize,
    /// What is to come nearer meanwhile, of as many granules of so many bytes: the share of these features.
    pub(crate) ahead: *const *const u32,
    /// Room for the copy of a block.
    pub(crate) copy: *mut BlockCopy,
    /// Rows so many bytes apart.
    pub(crate) into: *mut f32,
    pub(crate) into_row: usize,
    /// One at least.
    pub(crate) num_blocks: usize,
}

/// `into = fold of blocks` for each row and `VECTORS` (2 or 4) times 16 features. A tile is loaded from rows that are
/// equally far apart, which those of two granules are not: they are copied, within the first-level cache.
///
/// # Safety
/// Tiles are configured by [`panel_shapes`]; the pointers but `ahead` are valid for what is said; the machine has
/// AVX-512.
#[inline(always)]
pub(crate) unsafe fn fold_values<const VECTORS: usize>(blocks: &ValueBlocks) {
    debug_assert!(blocks.num_blocks > 0);
    macro_rules! run {
        ($four:literal) => {
            // SAFETY: reads and writes what the caller vouches for; prefetches of anything are allowed.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    concat!($four, "tilezero tmm2"),
                    concat!($four, "tilezero tmm3"),
                    "2:",
                    "mov {to}, {copy}",
                    "3:",
                    "mov {from}, [{values}]",
                    "add {from}, {first}",
                    "mov {near}, [{ahead}]",
                    "lea {near}, [{near} + 8 * {first}]",
                    "add {values}, 8",
                    "add {ahead}, 8",
                    "4:",
                    "vmovups zmm0, [{from}]",
                    "vmovups zmm1, [{from} + 64]",
                    concat!($four, "vmovups zmm2, [{from} + 128]"),
                    concat!($four, "vmovups zmm3, [{from} + 192]"),
                    "vmovaps [{to}], zmm0",
                    "vmovaps [{to} + 1024], zmm1",
                    concat!($four, "vmovaps [{to} + 2048], zmm2"),
                    concat!($four, "vmovaps [{to} + 3072], zmm3"),
                    "prefetcht0 [{near}]",
                    "prefetcht0 [{near} + 64]",
                    concat!($four, "prefetcht0 [{near} + 128]"),
                    concat!($four, "prefetcht0 [{near} + 192]"),
                    "add {from}, [{blocks} + {values_row}]",
                    "add {near}, {share}",
                    "add {to}, 64",
                    // After 8 rows begins the other granule, after 16 the copy is whole.
                    "test {to:e}, 511",
                    "jnz 4b",
                    "test {to:e}, 1023",
                    "jnz 3b",
                    "tileloadd tmm4, [{weights} + {weights_row}]",
                    "tileloadd tmm6, [{copy} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{copy} + {line} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    concat!($four, "tileloadd tmm6, [{copy} + {line} + 2048]"),
                    concat!($four, "tdpbf16ps tmm2, tmm4, tmm6"),
                    concat!($four, "tileloadd tmm7, [{copy} + {line} + 3072]"),
                    concat!($four, "tdpbf16ps tmm3, tmm4, tmm7"),
                    "add {weights}, 64",
                    "dec {count}",
                    "jnz 2b",
                    "mov {from}, [{blocks} + {into}]",
                    "mov {near}, [{blocks} + {into_row}]",
                    "tilestored [{from} + {near}], tmm0",
                    "tilestored [{from} + {near} + 64], tmm1",
                    concat!($four, "tilestored [{from} + {near} + 128], tmm2"),
                    concat!($four, "tilestored [{from} + {near} + 192], tmm3"),
                    blocks = in(reg) blocks,
                    weights = inout(reg) blocks.weights => _,
                    weights_row = in(reg) blocks.weights_row,
                    values = inout(reg) blocks.values => _,
                    ahead = inout(reg) blocks.ahead => _,
                    first = in(reg) blocks.first,
                    copy = in(reg) blocks.copy,
                    count = inout(reg) blocks.num_blocks => _,
                    line = in(reg) ROW_BYTES,
                    from = out(reg) _,
                    to = out(reg) _,
                    near = out(reg) _,
                    share = const VECTORS * ROW_BYTES,
                    values_row = const offset_of!(ValueBlocks, values_row),
                    into = const offset_of!(ValueBlocks, into),
                    into_row = const offset_of!(ValueBlocks, into_row),
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        };
    }
    const { assert!(VECTORS == 2 || VECTORS == 4) };
    // What four vectors have more than two is a comment there.
    if VECTORS == 4 { run!("") } else { run!("# ") }
}
