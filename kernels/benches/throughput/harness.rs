//! One line of the table: limits and operation in turn.

use std::time::Instant;

use kernels::Ctx;
use kernels::limits::{Arithmetic, ReadProbe, peak_ops_per_second};

/// An operation runs at least so long in each round.
const ROUND_SECONDS: f64 = 0.06;

/// What an operation cannot do without.
pub(crate) struct Work {
    /// Bytes that it reads.
    pub(crate) bytes: usize,
    /// Operations, two for each multiply-add.
    pub(crate) ops: f64,
    /// Of which kind.
    pub(crate) arithmetic: Arithmetic,
}

impl Work {
    /// Only reading.
    pub(crate) fn reading(bytes: usize) -> Work {
        Work { bytes, ops: 0.0, arithmetic: Arithmetic::F32 }
    }
}

/// What all lines have in common.
pub(crate) struct Bench<'a> {
    pub(crate) ctx: Ctx<'a>,
    filter: String,
    /// `None`: run once, measure nothing.
    rounds: Option<u32>,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(ctx: Ctx<'a>, filter: String, rounds: Option<u32>) -> Self {
        Bench { ctx, filter, rounds }
    }

    /// Whether a line is wanted: what it needs may take long to make.
    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Whether anything is measured; if not, small shapes will do.
    pub(crate) fn is_measuring(&self) -> bool {
        self.rounds.is_some()
    }

    /// Runs and prints one line; returns the seconds of a run.
    pub(crate) fn line(&self, name: &str, work: &Work, mut run: impl FnMut()) -> Option<f64> {
        if !self.wants(name) {
            return None;
        }
        run();
        let Some(rounds) = self.rounds else {
            println!("{name:<44} runs");
            return None;
        };
        let probe = (work.bytes > 0).then(|| ReadProbe::new(work.bytes));
        let (mut seconds, mut shares, mut limits) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let limit = Limit::measure(&self.ctx, work, probe.as_ref());
            let time = median_time(&mut run);
            seconds.push(time);
            if let Some(limit) = limit {
                shares.push(limit.seconds / time);
                limits.push(limit);
            }
        }
        let time = median(&mut seconds);
        let mut text = format!("{name:<44}{:>11.1} us", time * 1e6);
        if let Some(limit) = limits.last() {
            let (amount, unit) = limit.amount(work);
            let best = amount / limit.seconds * 1e-9;
            let share = 100.0 * median(&mut shares);
            text += &format!("{:>9.1} {unit:<7} {share:>5.0} % of {best:.1}", amount / time * 1e-9);
        }
        println!("{text}");
        Some(time)
    }
}

/// The shortest time that the machine would take.
struct Limit {
    seconds: f64,
    is_memory: bool,
}

impl Limit {
    fn measure(ctx: &Ctx<'_>, work: &Work, probe: Option<&ReadProbe>) -> Option<Limit> {
        let passes = |probe: &ReadProbe| (0..3).map(|_| probe.bytes_per_second(ctx)).fold(0.0, f64::max);
        let reading = probe.map_or(0.0, |probe| work.bytes as f64 / passes(probe));
        let peak = if work.ops > 0.0 { peak_ops_per_second(ctx, work.arithmetic) } else { None };
        let computing = peak.map_or(0.0, |peak| work.ops / peak);
        let seconds = reading.max(computing);
        (seconds > 0.0).then_some(Limit { seconds, is_memory: reading >= computing })
    }

    /// What the limit is a limit of.
    fn amount(&self, work: &Work) -> (f64, &'static str) {
        match (self.is_memory, work.arithmetic) {
            (true, _) => (work.bytes as f64, "GB/s"),
            (false, Arithmetic::Int8) => (work.ops, "GOP/s"),
            (false, _) => (work.ops, "GFLOP/s"),
        }
    }
}

fn median_time(run: &mut impl FnMut()) -> f64 {
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || begin.elapsed().as_secs_f64() < ROUND_SECONDS {
        let start = Instant::now();
        run();
        times.push(start.elapsed().as_secs_f64());
    }
    median(&mut times)
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Numbers between -0.5 and 0.5.
pub(crate) fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 10_007) as f32 / 10_007.0 - 0.5).collect()
}
