//! Measures kernels alone on a GPU, in the shapes of a model of 8B, each as a share of what a copy or a product of the
//! same run reaches: attention of prompts and of decode, products of few rows in bf16 and quantized, the library's
//! products, sampling, digests of KV, and KV between blocks and the host. Fails if the two kernels for attention of prompts are far apart.
//!
//! ```text
//! CUDA_HOME=$(kernels/cuda/install-nvcc) cargo run --release -p kernels --features cuda --example cuda_kernels
//! cuda_kernels --only decode,products --batch 1,8
//! ```
//!
//! What is read once in a step of a model is read once here: launches go through more memory than the second-level cache
//! holds. `--device host`, with the feature `fibres`, tries the program out where there is no GPU.

mod decode;
mod digests;
mod prefill;
mod products;
mod sampling;
mod staging;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use kernels::cuda::limits::{DeviceProbe, ProbeSizes, seconds_of};
use kernels::cuda::{Buffer, Device, DeviceError, Lane, Recording, limits};

/// What is measured.
#[derive(Debug, Parser)]
struct Args {
    /// A GPU such as cuda:0, or `host`.
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Some of them.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "prefill,decode,products,library,quantized,sampling,digests,staging"
    )]
    only: Vec<Part>,
    /// Tokens of prompts.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192,32768")]
    prompt_len: Vec<usize>,
    /// Sequences of decode attention.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64,256")]
    batch: Vec<usize>,
    /// Their contexts.
    #[arg(long, value_delimiter = ',', default_value = "512,8192,32768")]
    context: Vec<usize>,
    /// Rows of products of few rows.
    #[arg(long, value_delimiter = ',', default_value = "1,8,16")]
    rows: Vec<usize>,
    /// Rows of the library's products.
    #[arg(long, value_delimiter = ',', default_value = "32,64,256,2048")]
    library_rows: Vec<usize>,
    /// Rows that are sampled.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    samples: Vec<usize>,
    /// KiB of what is hashed, or goes to the host and back: extents of a transfer.
    #[arg(long, value_delimiter = ',', default_value = "1024,8192,32768")]
    extent_kib: Vec<usize>,
    /// MiB that launches go through at least before they come to the same memory again.
    #[arg(long, default_value_t = 512)]
    rotate_mib: usize,
    /// MiB of the copy that is the limit of memory.
    #[arg(long, default_value_t = 1024)]
    copy_mib: usize,
    /// Rows, columns and what is summed over of the product that is the limit of arithmetic.
    #[arg(long, default_value_t = 8192)]
    product: usize,
    /// The shapes divided by this, to try the program out.
    #[arg(long, default_value_t = 1)]
    smaller: usize,
    /// Launches of a graph at least, each of the next memory; more where there is more memory to go through.
    #[arg(long, default_value_t = 16)]
    launches: usize,
    /// Milliseconds of launches in one timing, of which the best of three counts.
    #[arg(long, default_value_t = 50)]
    millis: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Prefill,
    Decode,
    Products,
    Library,
    Quantized,
    Sampling,
    Digests,
    Staging,
}

/// The shapes of a model of 8B.
#[derive(Debug, Clone, Copy)]
struct Shapes {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    hidden: usize,
    ffn: usize,
    vocab: usize,
}

impl Shapes {
    fn new(smaller: usize) -> Self {
        let sized = |size: usize| (size / smaller).next_multiple_of(64);
        let num_kv_heads = (8 / smaller).max(1);
        Self {
            num_heads: 4 * num_kv_heads,
            num_kv_heads,
            head_dim: 128,
            hidden: sized(4096),
            ffn: sized(14_336),
            vocab: sized(128_256),
        }
    }

    /// Rows and columns of a layer's matrices, and the head.
    fn matrices(&self) -> [(&'static str, usize, usize); 5] {
        let Self { num_heads, num_kv_heads, head_dim, hidden, ffn, vocab } = *self;
        [
            ("qkv", (num_heads + 2 * num_kv_heads) * head_dim, hidden),
            ("output", hidden, num_heads * head_dim),
            ("gate and up", 2 * ffn, hidden),
            ("down", hidden, ffn),
            ("head", vocab, hidden),
        ]
    }
}

const BLOCK_SIZE: usize = 16;
const TIMINGS: usize = 3;

/// A device, what it can do, and what is measured on it.
struct Bench {
    args: Args,
    shapes: Shapes,
    device: Arc<dyn Device>,
    bytes_per_second: f64,
    ops_per_second: Option<f64>,
}

impl Bench {
    fn new(args: Args) -> Result<Self, DeviceError> {
        let device = open(&args.device)?;
        let sizes = ProbeSizes { copy_bytes: args.copy_mib << 20, product: args.product };
        let probe = DeviceProbe::new(&device, sizes)?;
        let (mut bytes_per_second, mut ops_per_second) = (0.0, None);
        for _ in 0..TIMINGS {
            bytes_per_second = probe.copied_bytes_per_second()?.max(bytes_per_second);
            ops_per_second = probe.product_ops_per_second()?.into_iter().chain(ops_per_second).reduce(f64::max);
        }
        println!("{}", device.name());
        println!(
            "limits: {:.0} GB/s read and written by a copy of {} MiB; bf16 product of {} cubed by the library: {}",
            bytes_per_second / 1e9,
            args.copy_mib,
            args.product,
            ops_per_second.map_or("it is not there, no shares".to_string(), |ops| format!("{:.1} TFLOP/s", ops / 1e12))
        );
        Ok(Self { shapes: Shapes::new(args.smaller), args, device, bytes_per_second, ops_per_second })
    }

    /// Of one launch of many that are recorded as a graph, so that the host, which launches slower than a small kernel
    /// runs, is not what is measured. `launch` is told its number, which begins anew with each replay: a graph has all
    /// of the `num_rotating` memories that numbers go through.
    fn seconds(
        &self,
        num_rotating: usize,
        mut launch: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> Result<f64, DeviceError> {
        let num_launches = self.args.launches.max(num_rotating);
        // Directly, so that the library has its plan.
        launch(0)?;
        let recording = Recording::begin(&self.device)?;
        (0..num_launches).try_for_each(&mut launch)?;
        let graph = recording.end()?;
        let (time, mut best) = (Duration::from_millis(self.args.millis), f64::INFINITY);
        for _ in 0..TIMINGS {
            best = best.min(seconds_of(&self.device, time, || graph.launch())?);
        }
        Ok(best / num_launches as f64)
    }

    /// A line of what is bound by memory.
    fn say_bytes(&self, what: &str, seconds: f64, num_bytes: usize) {
        let speed = num_bytes as f64 / seconds;
        let share = 100.0 * speed / self.bytes_per_second;
        println!("{what:<54}{:>10.1} us{:>9.1} GB/s{share:>7.1} % of the copy", seconds * 1e6, speed / 1e9);
    }

    /// A line of what is bound by arithmetic.
    fn say_ops(&self, what: &str, seconds: f64, num_ops: f64) {
        let speed = num_ops / seconds;
        print!("{what:<54}{:>10.1} us{:>9.1} TFLOP/s", seconds * 1e6, speed / 1e12);
        match self.ops_per_second {
            Some(peak) => println!("{:>7.1} % of the product", 100.0 * speed / peak),
            None => println!(),
        }
    }

    /// How many things of so many bytes are more than the second-level cache holds.
    fn num_to_rotate(&self, num_bytes: usize) -> usize {
        (self.args.rotate_mib << 20).div_ceil(num_bytes.max(1)).max(1)
    }

    /// Memory full of values between -1 and 1 in bf16; `None` where it does not fit beside what else is there.
    fn filled(&self, seed: u64, num_bytes: usize) -> Result<Option<Buffer>, DeviceError> {
        const PATTERN_BYTES: usize = 32 << 20;
        // For what else a measurement takes.
        const SPARE_BYTES: usize = 1 << 30;
        if num_bytes + SPARE_BYTES.min(num_bytes) > self.device.memory()?.free_bytes {
            return Ok(None);
        }
        let pattern = limits::uniform_bf16(&self.device, seed, num_bytes.min(PATTERN_BYTES) / 2)?;
        let buffer = Buffer::new(&self.device, num_bytes)?;
        for offset in (0..num_bytes).step_by(PATTERN_BYTES) {
            buffer.copy_from(Lane::Compute, offset, &pattern, 0, (num_bytes - offset).min(pattern.num_bytes()))?;
        }
        Ok(Some(buffer))
    }
}

fn open(name: &str) -> Result<Arc<dyn Device>, DeviceError> {
    #[cfg(feature = "fibres")]
    if name == "host" {
        return Ok(Arc::new(kernels::cuda::FibreDevice::new()));
    }
    let asked = format!("be {name}, which is no GPU such as cuda:0");
    let refused = DeviceError::Refused { asked, reason: "say another --device".to_string() };
    kernels::cuda::open(name.strip_prefix("cuda:").and_then(|number| number.parse().ok()).ok_or(refused)?)
}

fn measure(args: Args) -> Result<bool, DeviceError> {
    let bench = Bench::new(args)?;
    let mut are_close = true;
    for part in &bench.args.only {
        match part {
            Part::Prefill => are_close &= prefill::measure(&bench)?,
            Part::Decode => decode::measure(&bench)?,
            Part::Products => products::measure(&bench)?,
            Part::Library => products::measure_library(&bench)?,
            Part::Quantized => products::measure_quantized(&bench)?,
            Part::Sampling => sampling::measure(&bench)?,
            Part::Digests => digests::measure(&bench)?,
            Part::Staging => staging::measure(&bench)?,
        }
    }
    Ok(are_close)
}

fn main() -> ExitCode {
    match measure(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("the two kernels for attention of prompts are too far apart");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
