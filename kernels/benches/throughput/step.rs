//! A step: all layers, each with weights and KV of its own, which come from memory as in a model; of decode, or of a
//! whole prompt, of which the last row alone goes on behind the last layer's KV. Under its line, what share of its time
//! each operation has.

use std::cell::{Cell, RefCell};
use std::sync::Mutex;
use std::time::Instant;

use kernels::limits::Arithmetic;
use kernels::{
    AttentionParams, Columns, Ctx, KvArena, KvDtype, KvLayout, MatrixRef, Operand, PackedMatrix, Priority, Product,
    Qkv, QueryBatch, QuerySpan, RopeTable, SampleParams, WeightDtype, Weights, attention, multiply, multiply_gated,
    qkv_rope_write, rms_norm, sample_row,
};

use crate::harness::{Bench, Work, median, noise};

struct Shape {
    name: &'static str,
    hidden: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    ffn: usize,
    vocab: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "S", hidden: 512, num_layers: 8, num_heads: 8, num_kv_heads: 4, ffn: 1408, vocab: 4096 },
    Shape { name: "M", hidden: 2048, num_layers: 16, num_heads: 32, num_kv_heads: 8, ffn: 8192, vocab: 32000 },
];

const HEAD_DIM: usize = 64;
const BLOCK_SIZE: usize = 16;
const CONTEXT: usize = 512;
const ROWS: [usize; 5] = [1, 8, 32, 48, 64];
const PROMPTS: [usize; 2] = [512, 2048];
const EPS: f32 = 1e-5;

const OPERATIONS: [&str; 7] = ["qkv", "attention", "output", "gate_up", "down", "logits", "sample"];

pub(crate) fn run(bench: &Bench<'_>) {
    for shape in &SHAPES {
        let decode = |m: usize| {
            let sequences = Sequences { count: m, num_rows: 1, context: CONTEXT };
            (format!("step of {} bf16 x {m}, context {CONTEXT}", shape.name), sequences)
        };
        let prompt = |m: usize| {
            (format!("prompt of {} bf16 x {m}", shape.name), Sequences { count: 1, num_rows: m, context: m })
        };
        let steps = ROWS.into_iter().map(decode).chain(PROMPTS.into_iter().map(prompt));
        let steps: Vec<(String, Sequences)> = steps.filter(|(name, _)| bench.wants(name)).collect();
        if steps.is_empty() || (!bench.is_measuring() && shape.name != "S") {
            continue;
        }
        let model = Model::new(shape);
        for (name, sequences) in steps {
            model.step(bench, &name, sequences);
        }
    }
}

fn product<'a>(operand: Operand<'a>, w: &'a PackedMatrix, add: bool) -> Product<'a> {
    Product { operand, sections: [Some(MatrixRef::Float(w)), None, None], bias: None, add }
}

/// So many sequences of as many positions, of which the last are computed.
#[derive(Clone, Copy)]
struct Sequences {
    count: usize,
    num_rows: usize,
    context: usize,
}

struct Layer {
    qkv: PackedMatrix,
    output: PackedMatrix,
    gate_up: PackedMatrix,
    down: PackedMatrix,
}

impl Layer {
    fn matrices(&self) -> [&PackedMatrix; 4] {
        [&self.qkv, &self.output, &self.gate_up, &self.down]
    }
}

struct Model<'a> {
    shape: &'a Shape,
    layers: Vec<Layer>,
    head: PackedMatrix,
    norm: Vec<f32>,
}

impl<'a> Model<'a> {
    fn new(shape: &'a Shape) -> Self {
        let (hidden, ffn, heads) = (shape.hidden, shape.ffn, shape.num_heads * HEAD_DIM);
        let qkv_width = heads + 2 * shape.num_kv_heads * HEAD_DIM;
        // What they are does not matter, where they lie does.
        let longest = (2 * ffn).max(shape.vocab) * hidden;
        let values: Vec<half::bf16> =
            (0..longest).map(|i| half::bf16::from_f32((i % 97) as f32 * 1e-3 - 0.05)).collect();
        let matrix = |k: usize, n: usize| PackedMatrix::pack(WeightDtype::Bf16, k, &[Weights::Bf16(&values[..n * k])]);
        let layer = || Layer {
            qkv: matrix(hidden, qkv_width),
            output: matrix(heads, hidden),
            gate_up: matrix(hidden, 2 * ffn),
            down: matrix(ffn, hidden),
        };
        let layers = (0..shape.num_layers).map(|_| layer()).collect();
        Model { shape, layers, head: matrix(hidden, shape.vocab), norm: vec![1.0; hidden] }
    }

    fn matrices(&self) -> impl Iterator<Item = &PackedMatrix> {
        self.layers.iter().flat_map(Layer::matrices).chain(std::iter::once(&self.head))
    }

    fn normed<'x>(&'x self, x: &'x [f32]) -> Operand<'x> {
        Operand::Normed { x, weight: &self.norm, eps: EPS }
    }

    fn step(&self, bench: &Bench<'_>, name: &str, Sequences { count, num_rows, context }: Sequences) {
        let Shape { hidden, num_layers, num_heads, num_kv_heads, ffn, vocab, .. } = *self.shape;
        let m = count * num_rows;
        let priority = if num_rows == 1 { Priority::Decode } else { Priority::Prefill };
        let ctx = Ctx { priority, ..bench.ctx };
        let blocks_each = context / BLOCK_SIZE;
        let layout = KvLayout {
            num_layers,
            num_blocks: count * blocks_each,
            block_size: BLOCK_SIZE,
            num_kv_heads,
            head_dim: HEAD_DIM,
            dtype: KvDtype::Bf16,
        };
        let arena = KvArena::new(layout.total_bytes());
        let kv_width = num_kv_heads * HEAD_DIM;
        let (kv, columns) = (noise(count * context * kv_width), Columns::all(kv_width));
        let all_slots: Vec<u32> = (0..(count * context) as u32).collect();
        for layer in 0..num_layers {
            kernels::kv_write(&ctx, &arena, &layout, layer, &all_slots, &kv, columns, &kv, columns);
        }
        // Each sequence at its last positions.
        let block_tables: Vec<u32> = (0..layout.num_blocks as u32).collect();
        let spans_of = |num_rows: usize| {
            let span = |sequence: usize| QuerySpan {
                first_row: sequence * num_rows,
                num_rows,
                first_position: context - num_rows,
                block_table: sequence * blocks_each..(sequence + 1) * blocks_each,
            };
            (0..count).map(span).collect::<Vec<QuerySpan>>()
        };
        let (spans, last_spans) = (spans_of(num_rows), spans_of(1));
        let computed = |sequence: usize| (context - num_rows..context).map(move |position| (sequence, position));
        let computed: Vec<(usize, usize)> = (0..count).flat_map(computed).collect();
        let slots: Vec<u32> = computed.iter().map(|(sequence, at)| (sequence * context + at) as u32).collect();
        let positions: Vec<u32> = computed.iter().map(|(_, at)| *at as u32).collect();
        let angles = noise(context * HEAD_DIM / 2);
        let rope = RopeTable { cos: &angles, sin: &angles, rot_dim: HEAD_DIM };
        let params = AttentionParams { num_heads, scale: 0.125, window: None, softcap: None };

        let heads = num_heads * HEAD_DIM;
        let qkv_width = heads + 2 * kv_width;
        let mut memory = [hidden, hidden, qkv_width, heads, 2 * ffn, vocab].map(|width| vec![0.0; m * width + 16]);
        let [x, normed, qkv, attended, gate_up, logits] = &mut memory.each_mut().map(|memory| {
            let (start, len) = (memory.as_ptr().align_offset(64), memory.len() - 16);
            &mut memory[start..][..len]
        });
        let weights_of = |w: &PackedMatrix| w.rows() * w.cols();
        let of_layer: usize = self.layers[0].matrices().into_iter().map(weights_of).sum::<usize>();
        let (of_qkv, of_head) = (weights_of(&self.layers[0].qkv), weights_of(&self.head));
        // Of all rows, and of those that go on behind the last layer's KV.
        let (of_all, of_last) = ((num_layers - 1) * of_layer + of_qkv, of_layer - of_qkv + of_head);
        let seen_by_all = count * (context - num_rows + 1..context + 1).sum::<usize>();
        let seen = (num_layers - 1) * seen_by_all + count * context;
        let work = Work {
            bytes: self.matrices().map(PackedMatrix::size_bytes).sum::<usize>() + layout.total_bytes(),
            ops: 2.0 * (m * of_all + count * of_last + 2 * seen * heads) as f64,
            arithmetic: Arithmetic::Bf16,
        };
        let seconds: [RefCell<Vec<f64>>; OPERATIONS.len()] = Default::default();
        let (clock, current) = (Cell::new(Instant::now()), Cell::new([0.0; OPERATIONS.len()]));
        let end_of = |operation: usize| {
            let begun_at = clock.replace(Instant::now());
            let mut so_far = current.get();
            so_far[operation] += (clock.get() - begun_at).as_secs_f64();
            current.set(so_far);
        };
        bench.line(name, &work, || {
            x.iter_mut().zip(kv.iter().cycle()).for_each(|(x, value)| *x = *value);
            clock.set(Instant::now());
            for (index, layer) in self.layers.iter().enumerate() {
                let fused = Qkv {
                    product: product(self.normed(x), &layer.qkv, false),
                    num_heads,
                    head_norms: None,
                    rope,
                    positions: &positions,
                    arena: &arena,
                    layout: &layout,
                    layer: index,
                    slots: &slots,
                };
                qkv_rope_write(&ctx, &fused, qkv);
                end_of(0);
                let is_last = index + 1 == num_layers;
                let (m, spans) = if is_last { (count, &last_spans) } else { (m, &spans) };
                if is_last {
                    for sequence in 0..count {
                        let row = (sequence + 1) * num_rows - 1;
                        x.copy_within(row * hidden..(row + 1) * hidden, sequence * hidden);
                        qkv.copy_within(row * qkv_width..(row + 1) * qkv_width, sequence * qkv_width);
                    }
                }
                let (x, attended, gate_up) =
                    (&mut x[..m * hidden], &mut attended[..m * heads], &mut gate_up[..m * 2 * ffn]);
                let q_columns = Columns { first: 0, stride: qkv_width };
                let batch = QueryBatch { spans, block_tables: &block_tables };
                attention(&ctx, &arena, &layout, index, &qkv[..m * qkv_width], q_columns, batch, &params, attended);
                end_of(1);
                multiply(&ctx, &product(Operand::Rows(attended), &layer.output, true), x);
                end_of(2);
                let down = [Some(MatrixRef::Float(&layer.down)), None, None];
                let gated = multiply_gated(&ctx, &product(self.normed(x), &layer.gate_up, false), &down, gate_up);
                end_of(3);
                multiply(&ctx, &product(gated, &layer.down, true), x);
                end_of(4);
            }
            let m = count;
            rms_norm(&ctx, &x[..m * hidden], &self.norm, EPS, &mut normed[..m * hidden]);
            let logits = &mut logits[..m * vocab];
            multiply(&ctx, &product(Operand::Rows(&normed[..m * hidden]), &self.head, false), logits);
            end_of(5);
            let drawn = Mutex::new([0; ROWS[ROWS.len() - 1]]);
            ctx.pool.run(ctx.priority, m, &|row| {
                let sampled = sample_row(ctx.isa, &logits[row * vocab..][..vocab], &SampleParams::GREEDY);
                drawn.lock().expect("no tile panics")[row] = sampled.token;
            });
            end_of(6);
            let of_step = current.take();
            seconds.iter().zip(of_step).for_each(|(all, of_step)| all.borrow_mut().push(of_step));
        });
        if bench.is_measuring() && bench.wants(name) {
            let medians = OPERATIONS.iter().zip(&seconds);
            let medians =
                medians.map(|(name, of_steps)| format!("{name} {:.3}", median(&mut of_steps.borrow_mut()) * 1e3));
            println!("    ms of it: {}", medians.collect::<Vec<String>>().join(", "));
        }
    }
}
