//! A plan as the device wants it: all arrays in one copy, made once per step and read by every layer.
//!
//! Rows of attention are sorted by kernel: tiles of up to 64 rows of a sequence on tensor cores, single rows split
//! over their keys, or row by row where the device has no kernel on tensor cores. A row gets the same bits from the first two, so
//! which one it goes through is a matter of speed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernels::cuda::ops::{AttentionKernels, PART_TOKENS, PREFILL_ROWS, Part};
use kernels::cuda::{Buffer, Device, Lane};

use super::done;
use crate::plan::{Span, StepPlan};

/// A span of more rows goes to the prefill kernel: from there on loading keys once for many rows is worth more
/// than splitting them over many blocks of threads.
pub(crate) const DECODE_ROWS_MAX: usize = 4;

/// Marks a token that the step before this one drew, see embed.cu.
const DRAWN: u32 = 1 << 31;

/// Entries of one array: where it begins, in bytes, and how many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Array {
    offset: usize,
    pub(crate) len: usize,
}

impl Array {
    pub(crate) fn of(self, buffer: &Buffer) -> Part<'_> {
        Part::new(buffer, self.offset)
    }
}

/// Arrays of a step as words, one after the other at multiples of 16 bytes.
#[derive(Debug, Default)]
pub(crate) struct Words(Vec<u32>);

impl Words {
    /// Appends an array of entries of `N` words.
    pub(crate) fn push<const N: usize>(&mut self, entries: impl IntoIterator<Item = [u32; N]>) -> Array {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let start = self.0.len();
        entries.into_iter().for_each(|entry| self.0.extend(entry));
        Array { offset: start * 4, len: (self.0.len() - start) / N.max(1) }
    }

    /// Copies all of them to `to`, in the order of the launches.
    pub(crate) fn upload<'a>(&mut self, device: &Arc<dyn Device>, to: &'a mut Growing) -> &'a Buffer {
        self.0.push(0); // arrays without entries have an address too
        let bytes = kernels::cuda::device::as_bytes(&self.0);
        let buffer = to.at_least(device, bytes.len());
        done(buffer.write(Lane::Compute, 0, bytes));
        buffer
    }
}

/// Device memory that is used again by every step and grows to what one needed.
#[derive(Debug, Default)]
pub(crate) struct Growing(Option<Buffer>);

impl Growing {
    /// At least `num_bytes`, with anything in it if it had to grow.
    pub(crate) fn at_least(&mut self, device: &Arc<dyn Device>, num_bytes: usize) -> &Buffer {
        if self.0.as_ref().is_none_or(|buffer| buffer.num_bytes() < num_bytes) {
            self.0 = None; // first, so that both are never there at once
            self.0 = Some(done(Buffer::new(device, num_bytes.next_power_of_two())));
        }
        self.0.as_ref().expect("just made")
    }

    /// What is there.
    pub(crate) fn get(&self) -> &Buffer {
        self.0.as_ref().expect("it was asked for with a size before")
    }
}

/// What steps use one after the other. Used by the thread that launches; on the device the order of launches keeps
/// them apart.
#[derive(Debug, Default)]
pub(crate) struct StepMemory {
    inputs: Mutex<Growing>,
    partials: Mutex<Growing>,
    rows: Mutex<Growing>,
    samples: Mutex<Growing>,
    logits: Mutex<Growing>,
}

fn lock(of: &Mutex<Growing>) -> MutexGuard<'_, Growing> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StepMemory {
    /// Arrays of the step.
    pub(crate) fn inputs(&self) -> MutexGuard<'_, Growing> {
        lock(&self.inputs)
    }

    /// Between the two kernels of decode attention.
    pub(crate) fn partials(&self) -> MutexGuard<'_, Growing> {
        lock(&self.partials)
    }

    /// Rows to be gathered.
    pub(crate) fn rows(&self) -> MutexGuard<'_, Growing> {
        lock(&self.rows)
    }

    /// Arrays of the sampler.
    pub(crate) fn samples(&self) -> MutexGuard<'_, Growing> {
        lock(&self.samples)
    }

    /// Logits with copies of rows that requests change.
    pub(crate) fn logits(&self) -> MutexGuard<'_, Growing> {
        lock(&self.logits)
    }
}

/// Where a step's arrays lie in its inputs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct StepArrays {
    /// One behind the largest position.
    pub(crate) num_positions: usize,
    pub(crate) ids: Array,
    pub(crate) positions: Array,
    pub(crate) slots: Array,
    pub(crate) block_tables: Array,
    /// (first row, rows, first position, start of the block table)
    pub(crate) tiles: Array,
    /// (row, position, start of the block table)
    pub(crate) plain_rows: Array,
    /// One per window that the model's layers have.
    pub(crate) decode: Vec<DecodeArrays>,
}

/// Single rows and their parts, as one window sees them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DecodeArrays {
    pub(crate) window: Option<u32>,
    /// (row, position, start of the block table, part)
    pub(crate) units: Array,
    /// (row, first unit, how many)
    pub(crate) rows: Array,
}

/// First position that a query at `position` sees.
fn first_visible(window: Option<u32>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
}

impl StepArrays {
    /// Lays out `plan` for what kernels there are and a model whose layers have these `windows`.
    pub(crate) fn of(plan: &StepPlan, kernels: AttentionKernels, windows: &[Option<u32>], words: &mut Words) -> Self {
        let mut ids = plan.tokens.clone();
        for from in &plan.from_slots {
            ids[from.row] = DRAWN | from.slot as u32;
        }
        let one = |values: &[u32]| values.iter().map(|value| [*value]).collect::<Vec<_>>();
        let is_plain = |_: &&Span| !kernels.has_decode;
        let is_tiled = |span: &&Span| kernels.has_prefill && span.num_rows > DECODE_ROWS_MAX;
        let spans = || plan.spans.iter();
        let decoded: Vec<[u32; 3]> =
            spans().filter(|span| !is_plain(span) && !is_tiled(span)).flat_map(single_rows).collect();
        let mut distinct: Vec<Option<u32>> = Vec::new();
        for window in windows {
            if !distinct.contains(window) {
                distinct.push(*window);
            }
        }
        Self {
            num_positions: plan.positions.iter().max().map_or(0, |last| *last as usize + 1),
            ids: words.push(one(&ids)),
            positions: words.push(one(&plan.positions)),
            slots: words.push(one(&plan.slots)),
            block_tables: words.push(one(&plan.block_tables)),
            tiles: words.push(spans().filter(is_tiled).flat_map(tiles)),
            plain_rows: words.push(spans().filter(is_plain).flat_map(single_rows)),
            decode: distinct.iter().map(|window| DecodeArrays::of(&decoded, *window, words)).collect(),
        }
    }
}

fn single_rows(span: &Span) -> impl Iterator<Item = [u32; 3]> + '_ {
    let table = span.block_table.start as u32;
    (0..span.num_rows).map(move |i| [(span.first_row + i) as u32, (span.first_position + i) as u32, table])
}

fn tiles(span: &Span) -> impl Iterator<Item = [u32; 4]> + '_ {
    (0..span.num_rows).step_by(PREFILL_ROWS).map(|first| {
        let num_rows = PREFILL_ROWS.min(span.num_rows - first);
        [span.first_row + first, num_rows, span.first_position + first, span.block_table.start].map(|n| n as u32)
    })
}

impl DecodeArrays {
    fn of(rows: &[[u32; 3]], window: Option<u32>, words: &mut Words) -> Self {
        let (mut units, mut ranges) = (Vec::new(), Vec::new());
        for &[row, position, table] in rows {
            let first_unit = units.len() as u32;
            let first_part = first_visible(window, position as usize) / PART_TOKENS;
            let last_part = position as usize / PART_TOKENS;
            units.extend((first_part..=last_part).map(|part| [row, position, table, part as u32]));
            ranges.push([row, first_unit, units.len() as u32 - first_unit]);
        }
        Self { window, units: words.push(units), rows: words.push(ranges) }
    }
}

#[cfg(test)]
mod tests {
    use common::ids::SequenceId;
    use kernels::KvDtype;

    use super::*;
    use crate::plan::FromSlot;

    fn kernels(head_dim: usize) -> AttentionKernels {
        AttentionKernels::of(KvDtype::Bf16, head_dim, 227 << 10)
    }

    /// A chunk of 70 rows at position 500, a row at 1,000 whose token is not known.
    fn plan() -> StepPlan {
        let span = |id, first_row, num_rows, first_position, block_table| Span {
            sequence: SequenceId(id),
            first_row,
            num_rows,
            first_position,
            block_table,
            is_reported: false,
        };
        StepPlan {
            tokens: (0..71).collect(),
            from_slots: vec![FromSlot { row: 70, slot: 3 }],
            positions: (500..570).chain([1000]).collect(),
            slots: (0..71).collect(),
            spans: vec![span(1, 0, 70, 500, 0..36), span(2, 70, 1, 1000, 36..99)],
            block_tables: (0..99).collect(),
            ..StepPlan::default()
        }
    }

    fn entries<const N: usize>(words: &Words, array: Array) -> Vec<[u32; N]> {
        let (entries, _) = words.0[array.offset / 4..].as_chunks::<N>();
        entries[..array.len].to_vec()
    }

    #[test]
    fn rows_are_sorted_by_kernel_and_split_at_fixed_positions() {
        let mut words = Words::default();
        let arrays = StepArrays::of(&plan(), kernels(64), &[None, Some(100), None], &mut words);
        assert_eq!(entries(&words, arrays.tiles), [[0, 64, 500, 0], [64, 6, 564, 0]]);
        assert_eq!((arrays.plain_rows.len, arrays.num_positions), (0, 1001));
        let [all, window] = &arrays.decode[..] else { panic!("two kinds of layers") };
        assert_eq!(entries(&words, all.units), [[70, 1000, 36, 0], [70, 1000, 36, 1]]);
        assert_eq!(entries(&words, all.rows), [[70, 0, 2]]);
        assert_eq!((window.window, entries(&words, window.units)), (Some(100), vec![[70, 1000, 36, 1]]));
        assert_eq!(entries::<1>(&words, arrays.ids)[69..], [[69], [DRAWN | 3]]);
        assert_eq!(entries::<1>(&words, arrays.block_tables)[36], [36]);
    }

    #[test]
    fn heads_without_a_prefill_kernel_go_row_by_row() {
        let mut words = Words::default();
        let arrays = StepArrays::of(&plan(), kernels(256), &[None], &mut words);
        // 12 rows end in the first part, 59 see two.
        assert_eq!((arrays.tiles.len, arrays.decode[0].rows.len, arrays.decode[0].units.len), (0, 71, 12 + 2 * 59));
        let arrays = StepArrays::of(&plan(), kernels(48), &[None], &mut words);
        assert_eq!((arrays.plain_rows.len, arrays.decode[0].rows.len), (71, 0));
        assert_eq!(entries::<3>(&words, arrays.plain_rows)[70], [70, 1000, 36]);
    }
}
