//! Speed of every operation on this machine, and its share of what the machine can do at that moment:
//! `cargo bench -p kernels -- [FILTER] [--threads 1,2] [--isa auto] [--rounds 3]`.
//!
//! An operation has so many bytes to read and so many multiply-adds to do; neither can be had faster than
//! [`kernels::limits`] measures it in the same round, just before: a buffer of as many bytes read by the same
//! threads, and the multiply-adds of the same instruction set in registers. The longer of the two times is the
//! limit, and the share is that time divided by the operation's. Reading is limited by the cache or memory that
//! holds as many bytes, so weights of 8 MiB are held against the third-level cache where there is one of that size,
//! and here alone, not in a model, they lie in it.
//!
//! Shapes: `M` is 2048 hidden, 32 heads, 8 KV heads, head_dim 64, ffn 8192; `S` is 512 hidden, ffn 1408.
//! Without `--bench`, which `cargo bench` adds, everything runs once and nothing is measured.
//!
//! No criterion: it times one function and knows no limit that is measured beside it in turn.
#![allow(missing_docs)]

mod attention;
mod harness;
mod products;
mod rows;
mod step;

use clap::Parser;
use kernels::{Ctx, Isa, Priority, WorkerPool};

use harness::Bench;

/// Speed of the kernels, beside the limits of the machine.
#[derive(Debug, Parser)]
struct Args {
    /// Only lines that contain this.
    #[arg(default_value = "")]
    filter: String,
    /// Numbers of threads.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// Instruction set.
    #[arg(long, default_value = "auto")]
    isa: String,
    /// Limits and operation take turns so often.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Measure.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), kernels::IsaError> {
    let args = Args::parse();
    let isa = Isa::parse(&args.isa)?;
    for threads in args.threads {
        let pool = WorkerPool::new(threads);
        let ctx = Ctx { pool: &pool, isa, priority: Priority::Prefill };
        let rounds = args.bench.then_some(args.rounds);
        let bench = Bench::new(ctx, args.filter.clone(), rounds);
        println!("\n{isa:?}, {} threads", pool.threads());
        products::run(&bench);
        attention::run(&bench);
        rows::run(&bench);
        step::run(&bench);
    }
    Ok(())
}
