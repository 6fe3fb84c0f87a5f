//! What long prompts do to those who are reading their answers: `tandem bench interference`.
//!
//! A few streams decode, first alone, then while long prompts keep arriving; what the inter-token latency of the
//! streams becomes is the figure. Splitting prefill from decode exists to keep it where it was. Every set-up gets
//! prompts at the same share of *its own* prefill speed, measured before: otherwise a slow one would be spared.
//!
//! Medians hide what a long prompt does, since most steps have none beside them: p99, the mean and the longest
//! stall tell it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;

use crate::compare::serve_args;
use crate::ratio::Ratio;
use crate::serve::provenance::Provenance;
use crate::serve::report::Report;
use crate::serve::slo::Metric;
use crate::serve::statistics::Samples;
use crate::serve::{ServeArgs, WarmedUp};
use crate::setup::rounds::{RoundsArgs, in_turn};
use crate::setup::server::Server;
use crate::setup::{self, Setup};
use crate::usage::cpu_seconds_between;

/// Long prompts that may be sent beside one run of the streams.
const NUM_PROMPTS_MAX: usize = 10_000;

/// What is measured.
#[derive(Debug, Clone, Args)]
pub struct InterferenceArgs {
    /// Set-ups and rounds.
    #[command(flatten)]
    pub rounds: RoundsArgs,
    /// Sequences that decode at the same time.
    #[arg(long, value_name = "SEQUENCES", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub num_streams: u64,
    /// Prompt tokens of a stream.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub stream_input_len: u64,
    /// Tokens that a stream generates.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    pub stream_output_len: u64,
    /// Tokens of a long prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub prompt_len: u64,
    /// Tokens that a long prompt generates: with 2 or more its KV goes to the decode node.
    #[arg(long, value_name = "TOKENS", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub prompt_output_len: u64,
    /// How many long prompts arrive, as a share of those that the set-up can prefill one after another.
    #[arg(long, value_name = "SHARE", default_value_t = 0.6)]
    pub load: f64,
    /// Long prompts that measure the prefill speed, one after another, in each round.
    #[arg(long, value_name = "PROMPTS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub num_calibrations: u64,
}

/// One set-up in one round.
#[derive(Debug, Clone)]
struct Figures {
    /// Long prompts per second that it prefills one after another.
    capacity: f64,
    /// TTFT of a long prompt that has the set-up for itself.
    idle_ttft: Samples,
    /// ITL of the streams alone.
    alone: Samples,
    /// ITL of the streams while long prompts arrive.
    beside: Samples,
    /// TTFT of the long prompts that arrived.
    prompt_ttft: Samples,
    /// What each process of the set-up, and this one, took meanwhile, in cores.
    cores: BTreeMap<String, f64>,
}

/// A figure of an ITL.
type Statistic = (&'static str, fn(&Samples) -> f64);
const STATISTICS: [Statistic; 4] = [
    ("p50", |samples| samples.percentile(50.0)),
    ("mean", Samples::mean),
    ("p99", |samples| samples.percentile(99.0)),
    ("max", Samples::max),
];

/// All rounds.
#[derive(Debug)]
pub struct Interference {
    names: Vec<String>,
    /// By round, then by set-up.
    rounds: Vec<Vec<Figures>>,
    load: f64,
    provenance: Provenance,
}

/// Runs all rounds.
///
/// # Errors
/// If the set-ups or flags are wrong, a server does not come up, or a load is not answered.
pub fn run(args: &InterferenceArgs, provenance: Provenance) -> anyhow::Result<Interference> {
    anyhow::ensure!((0.01..=10.0).contains(&args.load), "--load is {}, expected 0.01 to 10", args.load);
    let setups = setup::read(&args.rounds.setups)?;
    for setup in &setups {
        // Told before the first server is started.
        streams(args, setup, 0)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let rounds = runtime.block_on(in_turn(&setups, &args.rounds, async |round, index, server| {
        one_round(args, &setups[index], server, round, &provenance).await
    }))?;
    let names = setups.iter().map(|setup| setup.name.clone()).collect();
    let result = Interference { names, rounds, load: args.load, provenance };
    if let Some(path) = &args.rounds.save_result {
        let text = format!("{:#}\n", result.to_json());
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(result)
}

async fn one_round(
    args: &InterferenceArgs,
    setup: &Setup,
    server: &Server,
    round: u64,
    provenance: &Provenance,
) -> anyhow::Result<Figures> {
    let never = std::future::pending::<()>;
    let load = |flags: ServeArgs, stop| measured(flags, provenance.clone(), stop);
    let calibration = calibration(args, setup, round)?;
    let idle_ttft =
        samples(&load(calibration, Box::pin(never())).await.context("measure the prefill speed")?, Metric::Ttft)?;
    let capacity = 1e3 / idle_ttft.mean();
    let with_prompts = |seed| async move {
        let (streams_ended, stop) = oneshot::channel::<()>();
        let prompts = arriving(args, setup, seed, capacity * args.load)?;
        let decode = async {
            let report = measured(streams(args, setup, seed)?, provenance.clone(), Box::pin(never())).await;
            drop(streams_ended);
            report
        };
        let stop = Box::pin(async {
            // Dropped or sent: either way the streams are over.
            let _ = stop.await;
        });
        let (before, begun) = (server.usage(), Instant::now());
        let (decode, prompts) = tokio::join!(decode, measured(prompts, provenance.clone(), stop));
        let elapsed_seconds = begun.elapsed().as_secs_f64();
        let (decode, prompts) = (decode?, prompts.context("the long prompts beside the streams")?);
        let taken = before.zip(server.usage()).map(|(before, after)| cpu_seconds_between(&before, &after));
        let own = decode.client_cpu_s.map(|cpu_seconds| ("load generator".to_owned(), cpu_seconds));
        let cores = taken.into_iter().flatten().chain(own);
        let cores = cores.map(|(name, cpu_seconds)| (name, cpu_seconds / elapsed_seconds)).collect();
        anyhow::Ok((samples(&decode, Metric::Itl)?, samples(&prompts, Metric::Ttft)?, cores))
    };
    let without = |seed| async move {
        samples(&measured(streams(args, setup, seed)?, provenance.clone(), Box::pin(never())).await?, Metric::Itl)
    };
    // Which comes first alternates, so that a drift favours neither.
    let (alone, (beside, prompt_ttft, cores)) = if round.is_multiple_of(2) {
        let alone = without(2 * round).await?;
        (alone, with_prompts(2 * round + 1).await?)
    } else {
        let beside = with_prompts(2 * round + 1).await?;
        (without(2 * round).await?, beside)
    };
    Ok(Figures { capacity, idle_ttft, alone, beside, prompt_ttft, cores })
}

async fn measured(flags: ServeArgs, provenance: Provenance, stop: impl Future<Output = ()>) -> anyhow::Result<Report> {
    let api_key = std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty());
    let warmed_up = WarmedUp::new(flags, api_key).await?;
    let report = warmed_up.measure(provenance, &ProgressBar::hidden(), stop).await?;
    let summary = &report.summary;
    let first = summary.errors.values().next().map(|(_, first)| first.as_str()).unwrap_or_default();
    anyhow::ensure!(summary.failed == 0, "{} requests failed: {first}", summary.failed);
    for warning in summary.warnings() {
        eprintln!("{warning}");
    }
    Ok(report)
}

fn samples(report: &Report, metric: Metric) -> anyhow::Result<Samples> {
    report.summary.latencies[&metric].clone().with_context(|| format!("there is no {} to measure", metric.as_str()))
}

/// The long prompts, one after another, with the set-up for themselves.
fn calibration(args: &InterferenceArgs, setup: &Setup, round: u64) -> anyhow::Result<ServeArgs> {
    let num = args.num_calibrations as usize;
    requests(args, setup, 3_000_000 + round, num, args.prompt_len, args.prompt_output_len, &["--max-concurrency", "1"])
}

/// The streams: all begin at once.
fn streams(args: &InterferenceArgs, setup: &Setup, seed: u64) -> anyhow::Result<ServeArgs> {
    let num = args.num_streams as usize;
    requests(args, setup, 1_000_000 + seed, num, args.stream_input_len, args.stream_output_len, &[])
}

/// Long prompts at `rate` per second, more of them than the streams can outlast.
fn arriving(args: &InterferenceArgs, setup: &Setup, seed: u64, rate: f64) -> anyhow::Result<ServeArgs> {
    let (rate, limits) = (format!("{rate:.6}"), (args.prompt_len, args.prompt_output_len));
    let flags = ["--request-rate", &rate];
    requests(args, setup, 2_000_000 + seed, NUM_PROMPTS_MAX, limits.0, limits.1, &flags)
}

/// `num` random requests of `input` tokens that generate `output`. The seed keeps their prompts apart from all
/// others, so that no prefix cache has them.
fn requests(
    args: &InterferenceArgs,
    setup: &Setup,
    seed: u64,
    num: usize,
    input: u64,
    output: u64,
    more: &[&str],
) -> anyhow::Result<ServeArgs> {
    let mut flags = args.rounds.serve_flags.clone();
    let own = [
        ("--num-prompts", num as u64),
        ("--random-input-len", input),
        ("--random-output-len", output),
        ("--seed", seed),
    ];
    flags.extend(own.iter().flat_map(|(flag, value)| [(*flag).to_string(), value.to_string()]));
    flags.extend(more.iter().map(ToString::to_string));
    flags.push("--ignore-eos".into());
    serve_args(setup, &flags)
}

impl Interference {
    /// Of each round's figures of a set-up.
    fn each(&self, setup: usize, figure: impl Fn(&Figures) -> f64) -> Vec<f64> {
        self.rounds.iter().map(|round| figure(&round[setup])).collect()
    }

    /// What each process took beside the prompts, means over the rounds.
    fn cores(&self, setup: usize) -> BTreeMap<&str, f64> {
        let mut cores = BTreeMap::<&str, f64>::new();
        for (name, of_round) in self.rounds.iter().flat_map(|round| &round[setup].cores) {
            *cores.entry(name).or_default() += of_round / self.rounds.len() as f64;
        }
        cores
    }

    /// What long prompts multiply a statistic of the streams' ITL by.
    fn factor(&self, setup: usize, (_, statistic): Statistic) -> Option<Ratio> {
        let beside = self.each(setup, |figures| statistic(&figures.beside));
        Ratio::of_rounds(&beside, &self.each(setup, |figures| statistic(&figures.alone)))
    }

    /// Factors and every round's figures.
    pub fn to_json(&self) -> Value {
        let of_itl = |samples: &Samples| {
            let of = STATISTICS.iter().map(|(name, statistic)| (format!("{name}_ms"), json!(statistic(samples))));
            of.collect::<Map<_, _>>()
        };
        let of_round = |figures: &Figures| {
            json!({
                "prefill_capacity_per_s": figures.capacity,
                "idle_prompt_ttft_ms": figures.idle_ttft.mean(),
                "itl_alone": of_itl(&figures.alone),
                "itl_beside_prompts": of_itl(&figures.beside),
                "num_prompts": figures.prompt_ttft.len(),
                "cores_beside_prompts": figures.cores,
                "prompt_ttft_ms": {"p50": figures.prompt_ttft.percentile(50.0), "p99": figures.prompt_ttft.percentile(99.0)},
            })
        };
        let of_setup = |(index, name): (usize, &String)| {
            let factors = STATISTICS.iter().map(|statistic| {
                let factor = self.factor(index, *statistic).map_or(Value::Null, Ratio::to_json);
                (format!("{}_itl_factor", statistic.0), factor)
            });
            let mut of: Map<String, Value> = factors.collect();
            of.insert("rounds".into(), self.rounds.iter().map(|round| of_round(&round[index])).collect());
            (name.clone(), Value::Object(of))
        };
        let setups: Map<String, Value> = self.names.iter().enumerate().map(of_setup).collect();
        let mut result = json!({"load": self.load, "setups": setups});
        if let (Value::Object(fields), Value::Object(provenance)) = (&mut result, self.provenance.to_json()) {
            fields.extend(provenance);
        }
        result
    }
}

impl fmt::Display for Interference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        writeln!(
            f,
            "ITL of the streams in ms, means over {} rounds; factors with their 95 % interval.\n",
            self.rounds.len()
        )?;
        for (index, name) in self.names.iter().enumerate() {
            let capacity = mean(self.each(index, |figures| figures.capacity));
            let num_prompts = self.rounds.iter().map(|round| round[index].prompt_ttft.len()).sum::<usize>();
            let idle = mean(self.each(index, |figures| figures.idle_ttft.mean()));
            let busy = mean(self.each(index, |figures| figures.prompt_ttft.percentile(50.0)));
            writeln!(
                f,
                "{name}: prefills {capacity:.2} long prompts/s alone; {num_prompts} arrived at {:.2}/s",
                capacity * self.load
            )?;
            writeln!(f, "  TTFT of a long prompt: {idle:.1} alone, {busy:.1} at the median beside the streams")?;
            let cores: Vec<String> =
                self.cores(index).iter().map(|(process, cores)| format!("{process} {cores:.3}")).collect();
            writeln!(f, "  cores taken beside the prompts: {}", cores.join(", "))?;
            for statistic in STATISTICS {
                let alone = mean(self.each(index, |figures| statistic.1(&figures.alone)));
                let beside = mean(self.each(index, |figures| statistic.1(&figures.beside)));
                let factor = self.factor(index, statistic).map_or_else(|| "none".into(), |factor| factor.to_string());
                writeln!(f, "  {:<5}{alone:>10.2} alone{beside:>10.2} beside prompts   factor {factor}", statistic.0)?;
            }
        }
        write!(f, "\n{}", self.provenance.command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(alone: &[f64], beside: &[f64]) -> Figures {
        let of = |samples: &[f64]| Samples::new(samples.to_vec()).unwrap();
        Figures {
            capacity: 2.0,
            idle_ttft: of(&[500.0]),
            alone: of(alone),
            beside: of(beside),
            prompt_ttft: of(&[600.0, 700.0]),
            cores: [("a node".into(), 0.5)].into(),
        }
    }

    #[test]
    fn a_factor_is_the_geometric_mean_over_rounds_of_beside_by_alone() {
        let result = Interference {
            names: vec!["one".into(), "other".into()],
            rounds: vec![
                vec![figures(&[10.0, 10.0], &[10.0, 20.0]), figures(&[5.0], &[5.0])],
                vec![figures(&[10.0, 10.0], &[10.0, 80.0]), figures(&[5.0], &[5.0])],
            ],
            load: 0.6,
            provenance: Provenance::of_process(&[]),
        };
        let json = result.to_json();
        let factor = |name: &str, of: &str| json["setups"][name][of]["ratio"].as_f64().unwrap();
        assert!((factor("one", "max_itl_factor") - 4.0).abs() < 1e-9);
        assert!((factor("one", "mean_itl_factor") - (1.5f64 * 4.5).sqrt()).abs() < 1e-9);
        assert!((factor("other", "p99_itl_factor") - 1.0).abs() < 1e-9);
        assert_eq!(json["setups"]["one"]["rounds"][1]["num_prompts"], 2);
        let text = result.to_string();
        assert!(text.contains("4 arrived at 1.20/s") && text.contains("a node 0.500"), "{text}");
    }
}
