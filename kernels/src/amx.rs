//! Tiles of the processor: registers of up to 16 rows of 64 bytes, and the one instruction that multiplies two of them.
//!
//! ```text
//! a  [rows][16 pairs]      some rows of the left side, 32 k of them     16 quads of bytes, 64 k, for integers
//! b  [16 pairs][16]        32 k of 16 columns, as panels and the KV pool have them
//! c  [rows][16]            f32, or 32-bit integers
//! ```
//!
//! `tdpbf16ps` has an order of its own, which is `fold_block` of [`numerics`](crate::numerics): whether a machine's is
//! that one is tried once, before the machine is said to have tiles. Sums of integers are exact in any order.
//!
//! Rust has no stable intrinsics for tiles. Every loop is one `asm!` block that leaves nothing in a tile for another
//! block, so the compiler need not know what is in them.
#![allow(unsafe_code)]

mod in_place;

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::marker::PhantomData;
use std::mem::offset_of;

use crate::numerics::{TILE_STEPS, bf16_pair, fold_block};
use crate::packed_matrix::PANEL;
use crate::simd::Values;

pub(crate) use in_place::{BlockCopy, KeyBlocks, ValueBlocks, fold_keys, fold_values};

/// Rows of a tile at most, and columns.
pub(crate) const TILE_ROWS: usize = 16;

/// Bytes of a row of a tile at most.
const ROW_BYTES: usize = 64;

/// Whether the processor has tiles of bf16 and of bytes, and the system keeps them when it takes a thread off a core.
pub(crate) fn is_there() -> bool {
    const LEAF_FEATURES: u32 = 7;
    // amx-bf16, amx-tile, amx-int8
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    // Their configuration and their data.
    const STATES: u64 = 1 << 17 | 1 << 18;
    const OSXSAVE: u32 = 1 << 27;

    if __cpuid(0).eax < LEAF_FEATURES || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    #[target_feature(enable = "xsave")]
    fn enabled_states() -> u64 {
        // SAFETY: register 0 exists wherever the instruction does.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: the system has turned the instruction on (OSXSAVE).
    let states = unsafe { enabled_states() };
    __cpuid_count(LEAF_FEATURES, 0).edx & FEATURES == FEATURES && states & STATES == STATES
}

/// Whether tiles that are there can be used: permitted, and with products in the specified order.
///
/// # Errors
/// Why not.
pub(crate) fn permit() -> Result<(), &'static str> {
    if !is_permitted() {
        return Err("the system does not let this process use them");
    }
    // SAFETY: they are there, and the system has permitted their use.
    if unsafe { product_is_the_fold_of_blocks(64) } { Ok(()) } else { Err("their products add up in another order") }
}

/// Asks the system for room to keep tiles of this process: once, for all its threads.
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: an integer call, which changes nothing but what the process may do.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// The shapes of the eight tiles of this thread, until it is dropped.
pub(crate) struct Configured {
    /// They are this thread's.
    thread: PhantomData<*const ()>,
}

impl Configured {
    /// `shapes[i]` is rows and bytes of a row of tile i.
    ///
    /// # Safety
    /// The machine has tiles. No other configuration of this thread is alive.
    pub(crate) unsafe fn new(shapes: [(usize, usize); 8]) -> Configured {
        /// As the processor reads it.
        #[repr(C, align(64))]
        struct Palette {
            number: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut palette = Palette { number: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, row_bytes)) in shapes.into_iter().enumerate() {
            assert!((1..=TILE_ROWS).contains(&rows) && (4..=ROW_BYTES).contains(&row_bytes), "a tile of {shapes:?}");
            (palette.rows[i], palette.row_bytes[i]) = (rows as u8, row_bytes as u16);
        }
        // SAFETY: 64 bytes in the order of palette 1, with shapes that it allows.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const palette, options(nostack, preserves_flags)) };
        Configured { thread: PhantomData }
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // A thread without tiles is cheaper to take off its core.
        // SAFETY: the machine has tiles, since this exists.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// A configuration that follows the number of rows, which few tiles of a product differ in.
pub(crate) struct ConfiguredByRows {
    shapes: fn(usize) -> [(usize, usize); 8],
    configured: Option<(usize, Configured)>,
}

impl ConfiguredByRows {
    /// Of no rows yet.
    pub(crate) fn new(shapes: fn(usize) -> [(usize, usize); 8]) -> ConfiguredByRows {
        ConfiguredByRows { shapes, configured: None }
    }

    /// From now on tiles have the shapes for so many rows.
    ///
    /// # Safety
    /// As of [`Configured::new`].
    pub(crate) unsafe fn set(&mut self, num_rows: usize) {
        if self.configured.as_ref().is_none_or(|(rows, _)| *rows != num_rows) {
            drop(self.configured.take());
            // SAFETY: as required of the caller; the one before is gone.
            self.configured = Some((num_rows, unsafe { Configured::new((self.shapes)(num_rows)) }));
        }
    }
}

/// Shapes for [`multiply_panel`], [`fold_blocks`], [`fold_keys`] and [`fold_values`] with so many rows, up to 32; up to
/// 16 are so many of all sums.
pub(crate) fn panel_shapes(num_rows: usize) -> [(usize, usize); 8] {
    let first = (num_rows.min(TILE_ROWS), ROW_BYTES);
    let second = if num_rows > TILE_ROWS { (num_rows - TILE_ROWS, ROW_BYTES) } else { first };
    let b = (TILE_STEPS, ROW_BYTES);
    [first, first, second, second, first, second, b, b]
}

/// Some blocks of 32 k of up to 32 rows with the 32 columns of a panel; of 64 k where these are bytes.
#[repr(C)]
pub(crate) struct PanelBlocks {
    /// `[block][rows][16]` pairs, or quads of signed bytes.
    pub(crate) a: *const u32,
    /// `[block][16][32]` pairs, or quads of unsigned bytes.
    pub(crate) b: *const u32,
    /// `[rows][32]`, f32 or integers: where sums come from.
    pub(crate) sums: *const u32,
    /// Where they go: rows of 32, so many bytes apart.
    pub(crate) into: *mut u32,
    pub(crate) into_row: usize,
    pub(crate) num_rows: usize,
    pub(crate) num_blocks: usize,
    /// Whether these are the first blocks, before which sums are zero whatever lies there.
    pub(crate) is_first: bool,
    /// What is to come nearer meanwhile, and how many lines of it with each block.
    pub(crate) ahead: *const u32,
    pub(crate) lines_ahead: usize,
}

/// `sums += fold of blocks` for each row and column, of pairs of bf16 or of bytes.
///
/// # Safety
/// Tiles are configured by [`panel_shapes`] of as many rows; the pointers but `ahead` are valid for what is said.
#[inline(always)]
pub(crate) unsafe fn multiply_panel<const BYTES: bool>(blocks: &PanelBlocks) {
    debug_assert!(blocks.num_blocks > 0 && (1..=2 * TILE_ROWS).contains(&blocks.num_rows));
    let flags = u32::from(blocks.is_first) | u32::from(blocks.num_rows > TILE_ROWS) << 1;
    macro_rules! run {
        ($multiply:literal) => {
            // SAFETY: reads and writes what the caller vouches for; prefetches of anything are allowed.
            unsafe {
                asm!(
                    "test {flags:e}, 1",
                    "jnz 3f",
                    "tileloadd tmm0, [{sums} + {panel_row}]",
                    "tileloadd tmm1, [{sums} + {panel_row} + 64]",
                    "test {flags:e}, 2",
                    "jz 2f",
                    "lea {more}, [{sums} + 2048]",
                    "tileloadd tmm2, [{more} + {panel_row}]",
                    "tileloadd tmm3, [{more} + {panel_row} + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm6, [{b} + {panel_row}]",
                    "tileloadd tmm4, [{a} + {a_row}]",
                    concat!($multiply, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{b} + {panel_row} + 64]",
                    concat!($multiply, " tmm1, tmm4, tmm7"),
                    "test {flags:e}, 2",
                    "jz 4f",
                    "tileloadd tmm5, [{a} + {a_row} + 1024]",
                    concat!($multiply, " tmm2, tmm5, tmm6"),
                    concat!($multiply, " tmm3, tmm5, tmm7"),
                    "4:",
                    "mov {lines}, [{blocks} + {lines_ahead}]",
                    "test {lines}, {lines}",
                    "jz 6f",
                    "5:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "dec {lines}",
                    "jnz 5b",
                    "6:",
                    "add {a}, {a_block}",
                    "add {b}, 2048",
                    "dec {count}",
                    "jnz 2b",
                    "mov {sums}, [{blocks} + {into}]",
                    "mov {panel_row}, [{blocks} + {into_row}]",
                    "tilestored [{sums} + {panel_row}], tmm0",
                    "tilestored [{sums} + {panel_row} + 64], tmm1",
                    "test {flags:e}, 2",
                    "jz 7f",
                    "mov {more}, {panel_row}",
                    "shl {more}, 4",
                    "add {more}, {sums}",
                    "tilestored [{more} + {panel_row}], tmm2",
                    "tilestored [{more} + {panel_row} + 64], tmm3",
                    "7:",
                    flags = in(reg) flags,
                    a = inout(reg) blocks.a => _,
                    b = inout(reg) blocks.b => _,
                    ahead = inout(reg) blocks.ahead => _,
                    count = inout(reg) blocks.num_blocks => _,
                    sums = inout(reg) blocks.sums => _,
                    more = out(reg) _,
                    lines = out(reg) _,
                    blocks = in(reg) blocks,
                    lines_ahead = const offset_of!(PanelBlocks, lines_ahead),
                    into = const offset_of!(PanelBlocks, into),
                    into_row = const offset_of!(PanelBlocks, into_row),
                    // Rows of a panel and of its sums are equally long.
                    panel_row = inout(reg) PANEL * 4 => _,
                    a_row = in(reg) ROW_BYTES,
                    a_block = in(reg) blocks.num_rows * ROW_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        };
    }
    if BYTES { run!("tdpbsud") } else { run!("tdpbf16ps") }
}

/// Shapes for [`dot_group`] with so many rows, up to 16, and so many k, up to 32.
pub(crate) fn group_shapes(num_rows: usize, num_k: usize) -> [(usize, usize); 8] {
    let (a, b, c) = ((num_rows, num_k), (num_k / 4, ROW_BYTES), (num_rows, ROW_BYTES));
    [c, c, c, c, a, a, b, b]
}

/// Bytes from row to row of the left side of [`dot_group`].
pub(crate) const GROUP_ROW_BYTES: usize = 32;

/// `dots` `[rows][32]` = products of some k of rows with the 32 columns of a panel: `a` `[rows][32]`, of which as many
/// are read as there are k, `b` `[quads][32][4]`, signed bytes both.
///
/// # Safety
/// Tiles are configured by [`group_shapes`]; the pointers are valid for what is said.
#[inline(always)]
pub(crate) unsafe fn dot_group(a: *const u8, b: *const u8, dots: *mut i32) {
    // SAFETY: reads and writes what the caller vouches for.
    unsafe {
        asm!(
            "tileloadd tmm4, [{a} + {a_row}]",
            "tileloadd tmm6, [{b} + {panel_row}]",
            "tilezero tmm0",
            "tdpbssd tmm0, tmm4, tmm6",
            "tilestored [{dots} + {panel_row}], tmm0",
            "tileloadd tmm7, [{b} + {panel_row} + 64]",
            "tilezero tmm1",
            "tdpbssd tmm1, tmm4, tmm7",
            "tilestored [{dots} + {panel_row} + 64], tmm1",
            a = in(reg) a,
            b = in(reg) b,
            dots = in(reg) dots,
            a_row = in(reg) GROUP_ROW_BYTES,
            // Rows of a panel and of its sums are equally long.
            panel_row = in(reg) PANEL * 4,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}

/// Some blocks of 32 k of up to 32 rows with two times 16 columns, which lie anywhere.
#[repr(C)]
pub(crate) struct Blocks {
    /// Rows of 16 pairs, so many bytes apart, and so many to the next block.
    pub(crate) a: *const u32,
    pub(crate) a_row: usize,
    pub(crate) a_block: usize,
    /// 16 rows of 16 pairs for each 16 columns, likewise.
    pub(crate) b: [*const u32; 2],
    pub(crate) b_row: usize,
    pub(crate) b_block: usize,
    /// Rows of 32, so many bytes apart.
    pub(crate) into: *mut f32,
    pub(crate) into_row: usize,
    /// One at least.
    pub(crate) num_blocks: usize,
    /// Whether there are more than 16 rows.
    pub(crate) is_two: bool,
}

/// `into = fold of blocks` for each row and column.
///
/// # Safety
/// Tiles are configured by [`panel_shapes`]; the pointers are valid for as many rows, for 16 more where there are two
/// tiles of them.
#[inline(always)]
pub(crate) unsafe fn fold_blocks(blocks: &Blocks) {
    debug_assert!(blocks.num_blocks > 0);
    // SAFETY: reads and writes what the caller vouches for.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{b0} + {b_row}]",
            "tileloadd tmm4, [{a} + {a_row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {b_row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "test {is_two:e}, {is_two:e}",
            "jz 3f",
            "tileloadd tmm5, [{more} + {a_row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {more}, [{blocks} + {a_block}]",
            "3:",
            "add {a}, [{blocks} + {a_block}]",
            "add {b0}, [{blocks} + {b_block}]",
            "add {b1}, [{blocks} + {b_block}]",
            "dec {count}",
            "jnz 2b",
            "tilestored [{into} + {into_row}], tmm0",
            "tilestored [{into} + {into_row} + 64], tmm1",
            "test {is_two:e}, {is_two:e}",
            "jz 4f",
            "mov {more}, {into_row}",
            "shl {more}, 4",
            "add {into}, {more}",
            "tilestored [{into} + {into_row}], tmm2",
            "tilestored [{into} + {into_row} + 64], tmm3",
            "4:",
            blocks = in(reg) blocks,
            a = inout(reg) blocks.a => _,
            more = inout(reg) blocks.a.wrapping_byte_add(TILE_ROWS * blocks.a_row) => _,
            a_row = in(reg) blocks.a_row,
            b0 = inout(reg) blocks.b[0] => _,
            b1 = inout(reg) blocks.b[1] => _,
            b_row = in(reg) blocks.b_row,
            into = inout(reg) blocks.into => _,
            into_row = in(reg) blocks.into_row,
            count = inout(reg) blocks.num_blocks => _,
            is_two = in(reg) u32::from(blocks.is_two),
            a_block = const offset_of!(Blocks, a_block),
            b_block = const offset_of!(Blocks, b_block),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Products of tiles in registers, `rounds` times four of them; of bf16 pairs, or of bytes.
///
/// # Safety
/// The machine has tiles.
pub(crate) unsafe fn multiply_in_registers(rounds: usize, is_int8: bool) {
    // SAFETY: as required of the caller.
    let _tiles = unsafe { Configured::new([(TILE_ROWS, ROW_BYTES); 8]) };
    macro_rules! run {
        ($multiply:literal) => {
            // SAFETY: no memory is touched.
            unsafe {
                asm!(
                    "2:",
                    concat!($multiply, " tmm0, tmm4, tmm6"),
                    concat!($multiply, " tmm1, tmm4, tmm7"),
                    concat!($multiply, " tmm2, tmm5, tmm6"),
                    concat!($multiply, " tmm3, tmm5, tmm7"),
                    "dec {count}",
                    "jnz 2b",
                    count = inout(reg) rounds.max(1) => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nomem, nostack),
                );
            }
        };
    }
    // Tiles are zero when they have just been configured.
    if is_int8 { run!("tdpbusd") } else { run!("tdpbf16ps") }
}

/// Whether `tdpbf16ps` of this machine is [`fold_block`], tried on enough values to tell it from every other order.
///
/// # Safety
/// The machine has tiles of bf16.
pub(crate) unsafe fn product_is_the_fold_of_blocks(rounds: u64) -> bool {
    let mut values = Values(1);
    for round in 0..rounds {
        // Near 1, where the order shows in the rounding, and over the whole range of operands.
        let range = if round % 2 == 0 { 6 } else { 50 };
        let mut pairs = || bf16_pair(values.next(range), values.next(range));
        let a: [[u32; TILE_STEPS]; TILE_ROWS] = std::array::from_fn(|_| std::array::from_fn(|_| pairs()));
        let b: [[u32; PANEL]; TILE_STEPS] = std::array::from_fn(|_| std::array::from_fn(|_| pairs()));
        let mut sums = [[0.0f32; PANEL]; TILE_ROWS];
        let into = sums.as_flattened_mut().as_mut_ptr().cast();
        let blocks = PanelBlocks {
            a: a.as_flattened().as_ptr(),
            b: b.as_flattened().as_ptr(),
            sums: into,
            into,
            into_row: PANEL * 4,
            num_rows: TILE_ROWS,
            num_blocks: 1,
            is_first: true,
            ahead: std::ptr::null(),
            lines_ahead: 0,
        };
        // SAFETY: as required of the caller; one block of 16 rows, twice: what a fold has reached is a sum.
        unsafe {
            let _tiles = Configured::new(panel_shapes(TILE_ROWS));
            multiply_panel::<false>(&blocks);
            multiply_panel::<false>(&PanelBlocks { is_first: false, ..blocks });
        }
        for (a, sums) in a.iter().zip(&sums) {
            for (column, sum) in sums.iter().enumerate() {
                let steps = || a.iter().copied().zip(b.iter().map(|step| step[column]));
                let want = fold_block(fold_block(0.0, steps()), steps());
                if want.to_bits() != sum.to_bits() {
                    return false;
                }
            }
        }
    }
    true
}
