//! Two set-ups or more under the same loads, in turn: `tandem bench compare`.
//!
//! Machines drift, so nothing measured at one time is held against something measured at another: each seed is a
//! round in which every set-up gets the same load, beginning with another one each time. A figure of a set-up
//! over the first one's is a ratio within a round; what is told is the geometric mean of those ratios and its
//! 95 % confidence interval over the rounds.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Context;
use clap::{Args, Parser};
use serde_json::{Map, Value, json};

use crate::ratio::Ratio;
use crate::serve::provenance::Provenance;
use crate::serve::{ServeArgs, WarmedUp, progress_bar};
use crate::setup::rounds::{RoundsArgs, in_turn};
use crate::setup::server::Server;
use crate::setup::{self, Setup};
use crate::usage::{Usage, cpu_seconds_between};

/// Figures that are compared where a run has them.
const FIGURES: [&str; 19] = [
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_itl_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "mean_tpot_ms",
    "p99_tpot_ms",
    "mean_e2el_ms",
    "p99_e2el_ms",
    "median_first_gap_ms",
    "p99_first_gap_ms",
    "request_throughput",
    "output_throughput",
    "request_goodput",
    "slo_attainment",
    CPU_PER_1K,
    RESIDENT,
    "client_cpu_s",
];
const CPU_PER_1K: &str = "server_cpu_s_per_1k_output_tokens";
const RESIDENT: &str = "server_resident_mib";
const CPU_BY_PROCESS: &str = "server_cpu_s_by_process";

/// What is compared. The seeds of the rounds are --seed of the flags behind --, and the numbers behind it.
#[derive(Debug, Clone, Args)]
pub struct CompareArgs {
    /// Set-ups and rounds.
    #[command(flatten)]
    pub rounds: RoundsArgs,
}

/// `bench serve`'s flags, parsed as its command does.
#[derive(Debug, Parser)]
#[command(name = "serve")]
struct Serve {
    #[command(flatten)]
    args: ServeArgs,
}

/// Ratios of all set-ups to the first.
#[derive(Debug)]
pub struct Comparison {
    names: Vec<String>,
    /// By round, then by set-up.
    rounds: Vec<Vec<Value>>,
    provenance: Provenance,
}

/// The flags of one run of a set-up.
///
/// # Errors
/// If they are no flags of `bench serve`.
pub(crate) fn serve_args(setup: &Setup, flags: &[String]) -> anyhow::Result<ServeArgs> {
    let base = ["serve", "--base-url", &setup.base_url].map(str::to_string);
    let all = base.into_iter().chain(setup.flags.iter().cloned()).chain(flags.iter().cloned());
    let args = Serve::try_parse_from(all).map_err(|error| anyhow::anyhow!("{}: {error}", setup.name))?.args;
    args.validate().with_context(|| format!("the flags of {}", setup.name))?;
    Ok(args)
}

/// One run against a server that is there, as `bench serve` would write it, with what the server took behind the
/// warm-up.
pub(crate) async fn measure_setup(server: &Server, args: ServeArgs, provenance: Provenance) -> anyhow::Result<Value> {
    let api_key = std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty());
    let warmed_up = WarmedUp::new(args, api_key).await?;
    let before = server.usage();
    let report = warmed_up.measure(provenance, &progress_bar(), std::future::pending()).await?;
    let mut result = report.to_json();
    if let (Some(before), Some(after)) = (before, server.usage()) {
        let by_process = cpu_seconds_between(&before, &after);
        let cpu_seconds: f64 = by_process.values().sum();
        let tokens = report.summary.total_output_tokens.max(1) as f64;
        result["server_cpu_s"] = json!(cpu_seconds);
        result[CPU_BY_PROCESS] = json!(by_process);
        result[CPU_PER_1K] = json!(cpu_seconds / tokens * 1e3);
        result[RESIDENT] = json!(Usage::sum(after.values()).resident_bytes as f64 / f64::from(1 << 20));
    }
    Ok(result)
}

/// Runs all rounds.
///
/// # Errors
/// If the set-ups or flags are wrong, a server does not come up, or a run answers nothing.
pub fn run(args: &CompareArgs, provenance: Provenance) -> anyhow::Result<Comparison> {
    let setups = setup::read(&args.rounds.setups)?;
    anyhow::ensure!(setups.len() >= 2, "{} has one set-up, expected at least two", args.rounds.setups.display());
    let all_flags: Vec<ServeArgs> =
        setups.iter().map(|setup| serve_args(setup, &args.rounds.serve_flags)).collect::<anyhow::Result<_>>()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let rounds = runtime.block_on(in_turn(&setups, &args.rounds, async |round, index, server| {
        let flags = &all_flags[index];
        measure_setup(server, ServeArgs { seed: flags.seed + round, ..flags.clone() }, provenance.clone()).await
    }))?;
    let names = setups.iter().map(|setup| setup.name.clone()).collect();
    let comparison = Comparison { names, rounds, provenance };
    if let Some(path) = &args.rounds.save_result {
        let text = format!("{:#}\n", comparison.to_json());
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(comparison)
}

impl Comparison {
    /// Of a figure, every set-up's values by round; `None` if a run does not have it.
    fn values(&self, figure: &str) -> Option<Vec<Vec<f64>>> {
        let of = |index: usize| self.rounds.iter().map(|round| round[index][figure].as_f64()).collect();
        (0..self.names.len()).map(of).collect()
    }

    /// CPU seconds of a set-up's processes that took a hundredth of one, means over the rounds.
    fn cpu_by_process(&self, setup: usize) -> BTreeMap<&str, f64> {
        let mut sums = BTreeMap::<&str, f64>::new();
        for round in &self.rounds {
            for (name, cpu_seconds) in round[setup][CPU_BY_PROCESS].as_object().into_iter().flatten() {
                *sums.entry(name).or_default() += cpu_seconds.as_f64().unwrap_or_default() / self.rounds.len() as f64;
            }
        }
        sums.retain(|_, cpu_seconds| *cpu_seconds >= 0.01);
        sums
    }

    /// By figure, each set-up's ratio to the first.
    fn ratios(&self) -> BTreeMap<&'static str, Vec<Option<Ratio>>> {
        let of = |figure: &'static str| {
            let values = self.values(figure)?;
            let ratios = values.iter().map(|one| Ratio::of_rounds(one, &values[0])).collect();
            Some((figure, ratios))
        };
        FIGURES.into_iter().filter_map(of).collect()
    }

    /// Ratios and every run.
    pub fn to_json(&self) -> Value {
        let mut ratios = Map::new();
        for (figure, of_setups) in self.ratios() {
            let by_name = self.names.iter().zip(of_setups).skip(1);
            let by_name: Map<String, Value> =
                by_name.map(|(name, ratio)| (name.clone(), ratio.map_or(Value::Null, Ratio::to_json))).collect();
            ratios.insert(figure.into(), by_name.into());
        }
        let mut result = json!({"setups": self.names, "ratios_to_first": ratios, "rounds": self.rounds});
        if let (Value::Object(fields), Value::Object(provenance)) = (&mut result, self.provenance.to_json()) {
            fields.extend(provenance);
        }
        result
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Means over {} rounds; ratios to {} with their 95 % interval.\n",
            self.rounds.len(),
            self.names[0]
        )?;
        write!(f, "{:<36}{:>14}", "", self.names[0])?;
        for name in &self.names[1..] {
            write!(f, "{name:>14}{:>26}", "ratio")?;
        }
        writeln!(f)?;
        let ratios = self.ratios();
        for figure in FIGURES {
            let (Some(values), Some(ratios)) = (self.values(figure), ratios.get(figure)) else { continue };
            write!(f, "{figure:<36}")?;
            for (index, (values, ratio)) in values.iter().zip(ratios).enumerate() {
                write!(f, "{:>14.3}", values.iter().sum::<f64>() / values.len() as f64)?;
                match ratio {
                    _ if index == 0 => {}
                    Some(ratio) => write!(f, "{:>26}", ratio.to_string())?,
                    None => write!(f, "{:>26}", "none")?,
                }
            }
            writeln!(f)?;
        }
        for (index, name) in self.names.iter().enumerate() {
            let shares = self.cpu_by_process(index);
            if !shares.is_empty() {
                let shares: Vec<String> = shares.iter().map(|(process, cpu)| format!("{process} {cpu:.2}")).collect();
                write!(f, "\nCPU seconds of {name}: {}", shares.join(", "))?;
            }
        }
        write!(f, "\n{}", self.provenance.command)
    }
}
