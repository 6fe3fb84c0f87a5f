//! A plan as the device wants it: all arrays in one copy, made once per step and read by every layer.
//!
//! Rows of attention are sorted by kernel: tiles of up to 64 rows of a sequence on tensor cores, single rows split
//! over their keys, or row by row where the device has no kernel on tensor cores. A row gets the same bits from the first two, so
//! which one it goes through is a matter of speed.
//!
//! A decode step may be padded to a bucket, so that steps of different sizes are the same launches on the same
//! addresses ([`graphs`](super::graphs)): lists have the bucket's lengths, and what is too many in them stands for
//! [`NOTHING`]. Block tables, whose length is anybody's, come last.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernels::cuda::ops::{AttentionKernels, NOTHING, PART_TOKENS, PREFILL_ROWS, Part};
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
    pub(crate) fn upload<'a>(
        &mut self,
        device: &Arc<dyn Device>,
        to: &'a mut Growing,
        moves: Option<&Moves>,
    ) -> &'a Buffer {
        self.0.push(0); // arrays without entries have an address too
        let bytes = kernels::cuda::device::as_bytes(&self.0);
        let buffer = to.at_least(device, bytes.len(), moves);
        done(buffer.write(Lane::Compute, 0, bytes));
        buffer
    }
}

/// How often memory of a runner's steps has got another address: launches that were recorded before are of no use then.
#[derive(Debug, Default)]
pub(crate) struct Moves(AtomicU64);

impl Moves {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Device memory that is used again by every step and grows to what one needed.
#[derive(Debug, Default)]
pub(crate) struct Growing(Option<Buffer>);

impl Growing {
    /// At least `num_bytes`, with anything in it if it had to grow, which is counted in `moves`; without, of memory that
    /// no recorded launch names.
    pub(crate) fn at_least(&mut self, device: &Arc<dyn Device>, num_bytes: usize, moves: Option<&Moves>) -> &Buffer {
        if self.0.as_ref().is_none_or(|buffer| buffer.num_bytes() < num_bytes) {
            if let Some(Moves(count)) = moves {
                count.fetch_add(1, Ordering::Relaxed);
            }
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
    dense: Mutex<Growing>,
    moves: Moves,
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

    /// A quantized matrix as a product of many rows wants it.
    pub(crate) fn dense(&self) -> MutexGuard<'_, Growing> {
        lock(&self.dense)
    }

    /// Of what the launches between `embed` and sampling name: inputs, partials, dense matrices, and activations.
    pub(crate) fn moves(&self) -> &Moves {
        &self.moves
    }
}

/// What a decode step is padded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// Rows of the step, and entries of each list of them.
    pub(crate) num_rows: usize,
    /// Units of decode attention, of each window.
    pub(crate) num_units: usize,
}

/// Rows up to which decode steps are padded; a larger one has launches of its own.
pub(crate) const BUCKET_ROWS_MAX: usize = 256;

/// What so many rows are padded to: few sizes, and at most 15 rows too many. [`SKINNY_ROWS_MAX`] is one of them, so
/// that up to there a product is the same with and without padding. Beyond, it is only where products are
/// batch-invariant: the library's algorithm depends on the number of rows.
///
/// [`SKINNY_ROWS_MAX`]: kernels::cuda::ops::SKINNY_ROWS_MAX
pub(crate) fn bucket_rows(num_rows: usize) -> usize {
    if num_rows <= 16 { num_rows.next_power_of_two() } else { num_rows.next_multiple_of(16) }
}

impl Bucket {
    /// For `plan`, if it is a decode step: single rows of which nobody wants to hear.
    pub(crate) fn of(plan: &StepPlan, kernels: AttentionKernels, windows: &[Option<u32>]) -> Option<Self> {
        let is_decode = |span: &Span| span.num_rows == 1 && !span.is_reported;
        if plan.samples.is_empty() || plan.num_rows() > BUCKET_ROWS_MAX || !plan.spans.iter().all(is_decode) {
            return None;
        }
        let num_rows = bucket_rows(plan.num_rows());
        let units = |window| plan.positions.iter().map(move |position| parts(window, *position as usize).count()).sum();
        let num_units = match kernels.has_decode {
            true => windows.iter().map(|window| units(*window)).max().unwrap_or(0),
            false => 0,
        };
        // Of units that stand for nothing there may be many: each ends at once.
        Some(Self { num_rows, num_units: if num_units == 0 { 0 } else { num_units.max(num_rows).next_power_of_two() } })
    }

    /// Makes `padded` the same step with the bucket's rows: those that are too many write no KV, and nobody reads them.
    pub(crate) fn pad(self, plan: &StepPlan, padded: &mut StepPlan) {
        padded.copy_from(plan);
        padded.tokens.resize(self.num_rows, 0);
        padded.positions.resize(self.num_rows, 0);
        padded.slots.resize(self.num_rows, NOTHING);
    }
}

/// Where a step's arrays lie in its inputs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Lays out `plan` for what kernels there are and a model whose layers have these `windows`; a plan that was
    /// [padded](Bucket::pad) with its bucket.
    pub(crate) fn of(
        plan: &StepPlan,
        kernels: AttentionKernels,
        windows: &[Option<u32>],
        bucket: Option<Bucket>,
        words: &mut Words,
    ) -> Self {
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
        let mut plain_rows: Vec<[u32; 3]> = spans().filter(is_plain).flat_map(single_rows).collect();
        if let Some(bucket) = bucket.filter(|_| !plain_rows.is_empty()) {
            plain_rows.resize(bucket.num_rows, [NOTHING, 0, 0]);
        }
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
            tiles: words.push(spans().filter(is_tiled).flat_map(tiles)),
            plain_rows: words.push(plain_rows),
            decode: distinct.iter().map(|window| DecodeArrays::of(&decoded, *window, bucket, words)).collect(),
            block_tables: words.push(one(&plan.block_tables)),
        }
    }

    /// Whether launches on `self` are launches on `other`: all lists at the same places and of the same lengths, but
    /// for block tables, which launches know by their beginning alone.
    pub(crate) fn is_laid_out_as(&self, other: &Self) -> bool {
        let Self { num_positions: _, ids, positions, slots, block_tables, tiles, plain_rows, decode } = self;
        (ids, positions, slots, tiles, plain_rows, decode, block_tables.offset)
            == (
                &other.ids,
                &other.positions,
                &other.slots,
                &other.tiles,
                &other.plain_rows,
                &other.decode,
                other.block_tables.offset,
            )
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

/// Parts of its keys that a query at `position` sees something of.
fn parts(window: Option<u32>, position: usize) -> std::ops::RangeInclusive<usize> {
    first_visible(window, position) / PART_TOKENS..=position / PART_TOKENS
}

impl DecodeArrays {
    fn of(rows: &[[u32; 3]], window: Option<u32>, bucket: Option<Bucket>, words: &mut Words) -> Self {
        let (mut units, mut ranges) = (Vec::new(), Vec::new());
        for &[row, position, table] in rows {
            let first_unit = units.len() as u32;
            units.extend(parts(window, position as usize).map(|part| [row, position, table, part as u32]));
            ranges.push([row, first_unit, units.len() as u32 - first_unit]);
        }
        if let Some(bucket) = bucket.filter(|_| !rows.is_empty()) {
            units.resize(bucket.num_units, [NOTHING, 0, 0, 0]);
            ranges.resize(bucket.num_rows, [NOTHING, 0, 0]);
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
        let arrays = StepArrays::of(&plan(), kernels(64), &[None, Some(100), None], None, &mut words);
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
        let arrays = StepArrays::of(&plan(), kernels(256), &[None], None, &mut words);
        // 12 rows end in the first part, 59 see two.
        assert_eq!((arrays.tiles.len, arrays.decode[0].rows.len, arrays.decode[0].units.len), (0, 71, 12 + 2 * 59));
        let arrays = StepArrays::of(&plan(), kernels(48), &[None], None, &mut words);
        assert_eq!((arrays.plain_rows.len, arrays.decode[0].rows.len), (71, 0));
        assert_eq!(entries::<3>(&words, arrays.plain_rows)[70], [70, 1000, 36]);
    }

    /// Rows at these positions, each of a sequence with as many blocks as it needs.
    fn decode_plan(positions: &[u32]) -> StepPlan {
        let params = Arc::new(common::sampling::SamplingParams::greedy(1));
        let mut plan = StepPlan::default();
        for (row, position) in positions.iter().enumerate() {
            let (first_position, table) = (*position as usize, plan.block_tables.len());
            plan.block_tables.extend(0..=position / 16);
            let (sequence, block_table) = (SequenceId(row as u64), table..plan.block_tables.len());
            plan.spans.push(Span {
                sequence,
                first_row: row,
                num_rows: 1,
                first_position,
                block_table,
                is_reported: false,
            });
            plan.tokens.push(7);
            plan.positions.push(*position);
            plan.slots.push(row as u32);
            plan.samples.push(crate::plan::SampleRow {
                row,
                sequence,
                choice: common::ids::ChoiceIndex(0),
                position: position + 1,
                params: params.clone(),
                is_stop_banned: false,
                history: None,
            });
        }
        plan
    }

    fn padded(positions: &[u32], windows: &[Option<u32>]) -> (Bucket, StepArrays, Words) {
        let (plan, mut padded, mut words) = (decode_plan(positions), StepPlan::default(), Words::default());
        let bucket = Bucket::of(&plan, kernels(64), windows).unwrap();
        bucket.pad(&plan, &mut padded);
        let arrays = StepArrays::of(&padded, kernels(64), windows, Some(bucket), &mut words);
        (bucket, arrays, words)
    }

    #[test]
    fn decode_steps_of_a_bucket_are_the_same_launches() {
        let windows = [None, Some(50)];
        let (bucket, one, words) = padded(&[3, 600, 40], &windows);
        assert_eq!(bucket, Bucket { num_rows: 4, num_units: 4 });
        assert_eq!(entries(&words, one.slots), [[0], [1], [2], [NOTHING]]);
        assert_eq!(entries(&words, one.decode[0].rows), [[0, 0, 1], [1, 1, 2], [2, 3, 1], [NOTHING, 0, 0]]);
        assert_eq!(entries::<4>(&words, one.decode[1].units)[2..], [[2, 40, 39, 0], [NOTHING, 0, 0, 0]]);
        let (_, other, _) = padded(&[500, 511, 1, 90], &windows);
        assert!(one.is_laid_out_as(&other) && one.block_tables.len != other.block_tables.len);
        for others in [&[3, 600][..], &[3, 600, 40, 50], &[3; 5]] {
            assert!(!one.is_laid_out_as(&padded(others, &windows).1), "{others:?}");
        }
    }

    #[test]
    fn buckets_are_few_and_only_for_decode_steps() {
        let sizes = [1, 2, 3, 5, 9, 16, 17, 33, 100, 256].map(bucket_rows);
        assert_eq!(sizes, [1, 2, 4, 8, 16, 16, 32, 48, 112, 256]);
        let bucket = |plan: &StepPlan, head_dim| Bucket::of(plan, kernels(head_dim), &[None]);
        let decode = decode_plan(&[3, 600, 40]);
        assert_eq!(bucket(&decode, 48), Some(Bucket { num_rows: 4, num_units: 0 }));
        let mut reported = decode.clone();
        reported.spans[1].is_reported = true;
        let unsampled = StepPlan { samples: Vec::new(), ..decode };
        assert_eq!((bucket(&reported, 64), bucket(&unsampled, 64), bucket(&plan(), 64)), (None, None, None));
        assert_eq!(bucket(&decode_plan(&[1; BUCKET_ROWS_MAX + 1]), 64), None);
    }
}
