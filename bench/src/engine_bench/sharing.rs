//! A prefill and a decode engine on the same cores, in one process and in two, each beside itself alone:
//! `tandem bench engine --sharing`.
//!
//! ```text
//! round   decode alone    prefill alone    both, one process    both, two processes
//!                                          one pool of threads  a pool of threads each
//! ```
//!
//! Decode generates the tokens it was asked for and so decides how long both go on; prefill computes prompt after prompt
//! from the moment on that every sequence has its first token. In one process decode has precedence between two tiles
//! of a product; two processes are told apart by the system alone.

use std::fmt;
use std::io::{BufRead, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ValueEnum;
use engine::model::Model;
use serde_json::{Value, json};

use super::load::{DecodeRun, EngineLoad};
use super::peers::Talker;
use super::{EngineBenchArgs, Row, target};
use crate::ratio::Ratio;
use crate::serve::provenance::Provenance;

/// Of a step at most.
const SHARED_STEP_TOKENS: usize = 2048;

/// What one arm of a round showed; zero where an engine did not run.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Figures {
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    /// Between two tokens of a sequence.
    gap_p50_ms: f64,
    gap_p99_ms: f64,
}

impl Figures {
    fn set_decode(&mut self, run: &DecodeRun) {
        self.decode_tokens_per_second = run.tokens_per_second;
        let mut gaps = run.gaps.clone();
        gaps.sort_unstable();
        let at = |share: f64| gaps.get(((gaps.len() as f64 * share) as usize).min(gaps.len().saturating_sub(1)));
        let ms = |gap: Option<&Duration>| gap.map_or(f64::NAN, |gap| gap.as_secs_f64() * 1e3);
        (self.gap_p50_ms, self.gap_p99_ms) = (ms(at(0.5)), ms(at(0.99)));
    }

    fn to_json(self) -> Value {
        json!({
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "gap_p50_ms": self.gap_p50_ms,
            "gap_p99_ms": self.gap_p99_ms,
        })
    }
}

/// One round.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Round {
    alone: Figures,
    one_process: Figures,
    two_processes: Figures,
}

/// All rounds.
#[derive(Debug)]
pub struct SharingReport {
    setting: String,
    rounds: Vec<Round>,
    provenance: Provenance,
}

/// Runs all rounds.
///
/// # Errors
/// If the other process cannot be started, or an engine fails.
pub fn run(args: &EngineBenchArgs, model: &Arc<Model>, provenance: Provenance) -> anyhow::Result<SharingReport> {
    let (prefill, decode) = rows(args)?;
    let mut decoding = start(model, decode).context("start the engine that decodes")?;
    let mut prefilling = start(model, prefill).context("start the engine that prefills")?;
    let threads = model.backend().ctx().pool.threads();
    let mut other = Talker::start(other_process(args, &prefill, threads)?, "prefill")?;
    other.answer().context("start the process that prefills")?;
    // The first run of each warms caches and pages.
    decoding.decode(&decode, || ())?;
    prefilling.measure(&prefill)?;

    let mut rounds = Vec::new();
    for round in 0..args.rounds {
        eprintln!("round {} of {}", round + 1, args.rounds);
        let mut figures = Round::default();
        let begin = Instant::now();
        figures.alone.set_decode(&decoding.decode(&decode, || ())?);
        let duration = begin.elapsed();
        let begin = Instant::now();
        figures.alone.prefill_tokens_per_second = prefilling.prefill_while(&prefill, || begin.elapsed() < duration)?;

        let is_over = AtomicBool::new(false);
        let (all_started, when_all_started) = mpsc::channel();
        (prefilling, figures.one_process) = std::thread::scope(|scope| {
            let is_over = &is_over;
            let beside = scope.spawn(move || {
                // Closed if decode failed before.
                when_all_started.recv().context("decode did not start")?;
                let speed = prefilling.prefill_while(&prefill, || !is_over.load(Ordering::Relaxed))?;
                anyhow::Ok((prefilling, speed))
            });
            // The receiver is gone only if prefill has failed, which is told below.
            let run = decoding.decode(&decode, move || {
                let _ = all_started.send(());
            });
            is_over.store(true, Ordering::Relaxed);
            let beside = beside.join().expect("it returns its errors");
            // First, since without it prefill has failed, too.
            let run = run?;
            let (prefilling, speed) = beside?;
            let mut figures = Figures { prefill_tokens_per_second: speed, ..Figures::default() };
            figures.set_decode(&run);
            anyhow::Ok((prefilling, figures))
        })?;

        let mut start = Ok(());
        figures.two_processes.set_decode(&decoding.decode(&decode, || start = other.ask(&json!("start")))?);
        start?;
        other.ask(&json!("stop"))?;
        let speed = other.answer()?;
        figures.two_processes.prefill_tokens_per_second =
            speed.as_f64().with_context(|| format!("the process that prefills said {speed} and no speed"))?;
        rounds.push(figures);
    }
    let setting = format!("{}, {threads} threads, {} beside {}", args.model.display(), prefill.name(), decode.name());
    Ok(SharingReport { setting, rounds, provenance })
}

fn start(model: &Arc<Model>, row: Row) -> anyhow::Result<EngineLoad> {
    EngineLoad::start(&[row], SHARED_STEP_TOKENS, |num_tokens, longest| target::cpu_runner(model, num_tokens, longest))
}

/// The process that prefills: a prompt after the other between two lines that it reads, then the speed as a line.
///
/// # Errors
/// If the engine fails, or nobody reads.
pub fn run_other(args: &EngineBenchArgs, model: Arc<Model>) -> anyhow::Result<()> {
    let (prefill, _) = rows(args)?;
    let mut load = start(&model, prefill).context("start the engine")?;
    load.measure(&prefill)?;
    let answer = |line: &Value| {
        let mut out = std::io::stdout();
        writeln!(out, "{line}").and_then(|()| out.flush()).context("answer")
    };
    answer(&json!("ready"))?;
    let mut orders = std::io::stdin().lock().lines();
    let mut next = || orders.next().transpose().context("read an order");
    while next()?.is_some() {
        let is_over = AtomicBool::new(false);
        let speed = std::thread::scope(|scope| {
            let computing = scope.spawn(|| load.prefill_while(&prefill, || !is_over.load(Ordering::Relaxed)));
            let order = next();
            is_over.store(true, Ordering::Relaxed);
            order.and(computing.join().expect("it returns its errors"))
        })?;
        answer(&json!(speed))?;
    }
    Ok(())
}

/// This program again, as the process that prefills.
fn other_process(args: &EngineBenchArgs, prefill: &Row, threads: usize) -> anyhow::Result<Command> {
    let Row::Prefill { num_tokens } = prefill else { unreachable!("rows() gives a prompt first") };
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(&program);
    // The same program may be `tandem`, whose first word is the role.
    if program.file_stem().is_some_and(|name| name == "tandem") {
        command.arg("bench");
    }
    let dtype = args.dtype.to_possible_value().context("a type without a name")?;
    command.args(["engine", "--sharing-prefill", "--model"]).arg(&args.model);
    command.args(["--dtype", dtype.get_name(), "--isa", &args.isa, "--batch", "1"]);
    command.args(["--prompt-len", &num_tokens.to_string(), "--threads", &threads.to_string()]);
    Ok(command)
}

fn rows(args: &EngineBenchArgs) -> anyhow::Result<(Row, Row)> {
    let rows = args.rows();
    let prefill = rows.iter().find(|row| matches!(row, Row::Prefill { .. }));
    let decode = rows.iter().find(|row| matches!(row, Row::Decode { .. }));
    let both = prefill.copied().zip(decode.copied());
    both.context("--sharing needs a prompt length and a batch: the first of each is taken")
}

impl SharingReport {
    /// The result.
    pub fn to_json(&self) -> Value {
        let rounds = self.rounds.iter().map(|round| {
            json!({
                "alone": round.alone.to_json(),
                "one_process": round.one_process.to_json(),
                "two_processes": round.two_processes.to_json(),
            })
        });
        let mut result = json!({"setting": self.setting, "rounds": rounds.collect::<Vec<_>>()});
        if let (Value::Object(fields), Value::Object(provenance)) = (&mut result, self.provenance.to_json()) {
            fields.extend(provenance);
        }
        result
    }
}

/// A figure's name, and where it is.
type Column = (&'static str, fn(&Figures) -> f64);

/// What an engine runs beside, and its figures.
type Arm = (&'static str, fn(&Round) -> &Figures);

const COLUMNS: [Column; 4] = [
    ("prefill, tok/s", |figures| figures.prefill_tokens_per_second),
    ("decode, tok/s", |figures| figures.decode_tokens_per_second),
    ("gap p50, ms", |figures| figures.gap_p50_ms),
    ("gap p99, ms", |figures| figures.gap_p99_ms),
];

impl fmt::Display for SharingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.setting)?;
        let arms: [Arm; 3] = [
            ("alone", |round| &round.alone),
            ("one process", |round| &round.one_process),
            ("two processes", |round| &round.two_processes),
        ];
        writeln!(f, "{:<16}{:<16}{:>10}  of alone", "", "", "median")?;
        for (arm, of_round) in arms {
            for (name, figure) in COLUMNS {
                let values = |arm: fn(&Round) -> &Figures| self.rounds.iter().map(move |round| figure(arm(round)));
                let of_arm: Vec<f64> = values(of_round).collect();
                let mut sorted = of_arm.clone();
                sorted.sort_by(f64::total_cmp);
                write!(f, "{arm:<16}{name:<16}{:>10.1}", sorted.get(sorted.len() / 2).unwrap_or(&f64::NAN))?;
                let alone: Vec<f64> = values(|round| &round.alone).collect();
                match Ratio::of_rounds(&of_arm, &alone) {
                    Some(ratio) if arm != "alone" => writeln!(f, "  {ratio}")?,
                    _ => writeln!(f)?,
                }
            }
        }
        let commit = self.provenance.commit.as_deref().unwrap_or("unknown");
        let cpu_model = self.provenance.cpu_model.as_deref().unwrap_or("an unknown processor");
        write!(f, "\n{}\ncommit {commit}, {cpu_model}", self.provenance.command)
    }
}
