//! Every combination of flags of client and server, one run each: `tandem bench sweep`. Each result is a file,
//! so a sweep that was cut off goes on where it was.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use crate::compare::{measure_setup, serve_args};
use crate::serve::provenance::Provenance;
use crate::setup::server::Server;
use crate::setup::{self, Setup};

/// More runs than this are a mistake in the flags.
const NUM_POINTS_MAX: usize = 10_000;

/// What is swept.
#[derive(Debug, Clone, Args)]
pub struct SweepArgs {
    /// The set-ups, as for bench compare; every one is swept.
    #[arg(long, value_name = "PATH")]
    pub setups: PathBuf,
    /// A flag of bench serve and its values, as request-rate=1,2,4. May be given several times.
    #[arg(long, value_name = "FLAG=VALUES")]
    pub param: Vec<Param>,
    /// A flag of the set-ups' start command and its values, as max-num-batched-tokens=256,512.
    #[arg(long, value_name = "FLAG=VALUES")]
    pub server_param: Vec<Param>,
    /// Where the results are written, a file for each run. Runs whose file is there are not run again.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// The best runs are those with most of this figure of the results.
    #[arg(long, value_name = "KEY", default_value = "request_goodput")]
    pub maximize: String,
    /// Flags of bench serve, for all runs, behind --.
    #[arg(last = true, value_name = "FLAGS OF BENCH SERVE")]
    pub serve_flags: Vec<String>,
}

/// A flag and the values it takes in turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    name: String,
    values: Vec<String>,
}

impl FromStr for Param {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, values) = text.split_once('=').ok_or("expected FLAG=VALUES, such as request-rate=1,2,4")?;
        let name = name.trim_start_matches("--");
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if !is_name {
            return Err(format!("\"{name}\" is no flag"));
        }
        Ok(Self { name: name.into(), values: values.split(',').map(str::to_string).collect() })
    }
}

/// One run: a value of each flag.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Point {
    setup: usize,
    server: Vec<(String, String)>,
    client: Vec<(String, String)>,
}

fn flags(values: &[(String, String)]) -> Vec<String> {
    values.iter().flat_map(|(name, value)| [format!("--{name}"), value.clone()]).collect()
}

/// Server flags change last, so that a server is started once for all runs that it serves.
fn points(num_setups: usize, server: &[Param], client: &[Param]) -> Vec<Point> {
    let (server, client) = (combinations(server), combinations(client));
    let of_setup = |setup: usize| {
        let (server, client) = (&server, &client);
        server.iter().flat_map(move |server| {
            client.iter().map(move |client| Point { setup, server: server.clone(), client: client.clone() })
        })
    };
    (0..num_setups).flat_map(of_setup).collect()
}

fn combinations(params: &[Param]) -> Vec<Vec<(String, String)>> {
    params.iter().fold(vec![Vec::new()], |before, param| {
        let with = |chosen: &Vec<(String, String)>, value: &String| {
            let mut chosen = chosen.clone();
            chosen.push((param.name.clone(), value.clone()));
            chosen
        };
        before.iter().flat_map(|chosen| param.values.iter().map(move |value| with(chosen, value))).collect()
    })
}

/// All runs of a sweep.
#[derive(Debug)]
pub struct Sweep {
    maximize: String,
    /// What each run was, and its result.
    runs: Vec<(String, Value)>,
    num_found: usize,
}

/// Runs what has no result yet.
///
/// # Errors
/// If the set-ups or flags are wrong, a server does not come up, a run answers nothing, or a result that is
/// there is of another sweep.
pub fn run(args: &SweepArgs, provenance: Provenance) -> anyhow::Result<Sweep> {
    let setups = setup::read(&args.setups)?;
    let points = points(setups.len(), &args.server_param, &args.param);
    anyhow::ensure!(points.len() <= NUM_POINTS_MAX, "{} runs, expected at most {NUM_POINTS_MAX}", points.len());
    for point in &points {
        let all: Vec<String> = args.serve_flags.iter().cloned().chain(flags(&point.client)).collect();
        // Told before the first run, not at the last.
        serve_args(&setups[point.setup], &all)?;
    }
    std::fs::create_dir_all(&args.out).with_context(|| format!("make the folder {}", args.out.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(sweep(args, &setups, &points, provenance))
}

async fn sweep(args: &SweepArgs, setups: &[Setup], points: &[Point], provenance: Provenance) -> anyhow::Result<Sweep> {
    let mut sweep = Sweep { maximize: args.maximize.clone(), runs: Vec::new(), num_found: 0 };
    // The server of the run before, if the next one needs the same.
    let mut running: Option<(usize, Vec<String>, Server)> = None;
    for (number, point) in points.iter().enumerate() {
        let setup = &setups[point.setup];
        let server_flags = flags(&point.server);
        let client_flags: Vec<String> = args.serve_flags.iter().cloned().chain(flags(&point.client)).collect();
        let sweep_key = json!({"setup": setup.name, "start": setup.start, "env": setup.env, "base_url": setup.base_url,
            "setup_flags": setup.flags, "server_flags": server_flags, "client_flags": client_flags});
        let name = name_of(setup, point);
        let path = args.out.join(format!("{name}.json"));
        if let Ok(text) = std::fs::read_to_string(&path) {
            let result: Value = serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
            let is_same = result["sweep"] == sweep_key;
            anyhow::ensure!(is_same, "{} is of a sweep with other settings: give another --out", path.display());
            sweep.num_found += 1;
            sweep.runs.push((name, result));
            continue;
        }
        eprintln!("run {} of {}: {name}", number + 1, points.len());
        let is_there =
            running.as_ref().is_some_and(|(setup, flags, _)| (*setup, flags) == (point.setup, &server_flags));
        if !is_there {
            if let Some((_, _, server)) = running.take() {
                server.stop().await;
            }
            running = Some((point.setup, server_flags.clone(), Server::start(setup, &server_flags).await?));
        }
        let (_, _, server) = running.as_ref().expect("it was started if it was not there");
        let flags = serve_args(setup, &client_flags)?;
        let mut result = measure_setup(server, flags, provenance.clone()).await.with_context(|| name.clone())?;
        result["label"] = setup.name.clone().into();
        result["sweep"] = sweep_key;
        // Whole or not at all: a file that is there is a run that is done.
        let partial = path.with_extension("partial");
        std::fs::write(&partial, format!("{result:#}\n")).with_context(|| format!("write {}", partial.display()))?;
        std::fs::rename(&partial, &path).with_context(|| format!("write {}", path.display()))?;
        sweep.runs.push((name, result));
    }
    if let Some((_, _, server)) = running {
        server.stop().await;
    }
    Ok(sweep)
}

/// A file's name that says what the run was. Values that are no plain words are told apart by a digest.
fn name_of(setup: &Setup, point: &Point) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let all = point.server.iter().chain(&point.client);
    let values = all.map(|(name, value)| match value.chars().all(is_plain) && value.len() <= 32 {
        true => format!("{name}={value}"),
        false => format!("{name}=#{:08x}", fnv1a(value)),
    });
    [setup.name.clone()].into_iter().chain(values).collect::<Vec<_>>().join(",")
}

/// 32 bits of FNV-1a: stable between versions, which the standard library's hasher is not.
fn fnv1a(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

impl fmt::Display for Sweep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} runs, {} of them were there. Best {} first.\n",
            self.runs.len(),
            self.num_found,
            self.maximize
        )?;
        let figures = ["output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms"];
        let width = self.runs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        write!(f, "{:<width$}{:>20}", "", self.maximize)?;
        for figure in figures {
            write!(f, "{figure:>20}")?;
        }
        let value = |result: &Value, key: &str| result[key].as_f64();
        let mut runs: Vec<&(String, Value)> = self.runs.iter().collect();
        let rank = |run: &(String, Value)| value(&run.1, &self.maximize).unwrap_or(f64::NEG_INFINITY);
        runs.sort_by(|one, other| rank(other).total_cmp(&rank(one)));
        for (name, result) in runs {
            write!(f, "\n{name:<width$}")?;
            for key in [self.maximize.as_str()].into_iter().chain(figures) {
                match value(result, key) {
                    Some(value) => write!(f, "{value:>20.3}")?,
                    None => write!(f, "{:>20}", "none")?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_a_run_and_servers_change_last() {
        let param = |text: &str| text.parse::<Param>().unwrap();
        let server = [param("--max-num-seqs=4,8")];
        let client = [param("request-rate=1,2"), param("seed=0")];
        let points = points(1, &server, &client);
        let all: Vec<String> =
            points.iter().map(|point| [flags(&point.server), flags(&point.client)].concat().join(" ")).collect();
        assert_eq!(
            all,
            [
                "--max-num-seqs 4 --request-rate 1 --seed 0",
                "--max-num-seqs 4 --request-rate 2 --seed 0",
                "--max-num-seqs 8 --request-rate 1 --seed 0",
                "--max-num-seqs 8 --request-rate 2 --seed 0",
            ]
        );
        assert_eq!(super::points(2, &[], &[]).len(), 2);
        assert!("rate".parse::<Param>().is_err() && "a b=1".parse::<Param>().is_err());
    }

    #[test]
    fn a_run_is_named_by_its_values() {
        let setup: Setup = toml::from_str("name = 's'\nbase_url = 'u'").unwrap();
        let point = |value: &str| Point { setup: 0, server: vec![], client: vec![("goodput".into(), value.into())] };
        assert_eq!(name_of(&setup, &point("5")), "s,goodput=5");
        let odd = name_of(&setup, &point("ttft:5/x"));
        assert!(odd.starts_with("s,goodput=#") && odd != name_of(&setup, &point("ttft:6/x")), "{odd}");
    }
}
