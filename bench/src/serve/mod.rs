//! A load generator for any endpoint that speaks OpenAI's completions or chats: `tandem bench serve`.
//!
//! Prompts, lengths and send times are drawn from a seed or read from a file in advance; sessions begin at those
//! times whatever became of the ones before, so that a stall of the endpoint is measured by every request that
//! meets it and not hidden by requests that were never sent. `docs/bench.md` defines every figure.
//!
//! It does not search for settings, and it starts no endpoint.
//!
//! 1. [`args`]: the flags. [`workload`] and [`arrivals`]: what is sent and when, from the seed.
//! 2. [`load`] sends by the schedule; [`client`] is one request; [`answer_stream`] reads its answer.
//! 3. [`record`]: what one request did. [`statistics`], [`slo`], [`summary`]: the figures.
//! 4. [`report`], `detail`: as a table and JSON, with its [`provenance`].
pub mod answer_stream;
pub mod args;
pub mod arrivals;
pub mod client;
mod detail;
pub mod load;
pub mod provenance;
pub mod record;
pub mod report;
pub mod slo;
pub mod statistics;
pub mod summary;
pub mod workload;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

pub use args::ServeArgs;
use client::Client;
use provenance::Provenance;
use report::Report;
use summary::Summary;
use workload::{Phase, Workload};

use crate::usage::of_process;

/// Runs the load and writes the result, if that was asked for.
///
/// # Errors
/// If the settings are wrong, a warm-up fails, no request is answered, or the result cannot be written.
pub fn run(args: ServeArgs, provenance: Provenance) -> anyhow::Result<Report> {
    args.validate()?;
    if let Some(folder) = args.save_result.as_deref().and_then(Path::parent) {
        // Told before the run, not after it.
        let is_there = folder.as_os_str().is_empty() || folder.is_dir();
        anyhow::ensure!(is_there, "--save-result: the folder {} does not exist", folder.display());
    }
    let api_key = std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let report = runtime.block_on(measure(args, provenance, api_key))?;
    if let Some(path) = &report.args.save_result {
        let text = format!("{:#}\n", report.to_json());
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(report)
}

/// Warms up, then measures.
///
/// # Errors
/// If a warm-up fails or no request is answered.
pub async fn measure(args: ServeArgs, provenance: Provenance, api_key: Option<String>) -> anyhow::Result<Report> {
    WarmedUp::new(args, api_key).await?.measure(provenance, &progress_bar(), std::future::pending()).await
}

/// How far a run is, for people.
pub fn progress_bar() -> ProgressBar {
    ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{elapsed_precise} [{bar:40}] {pos}/{len} requests, {per_sec}, {eta} left")
            .expect("the template is right"),
    )
}

/// An endpoint that has answered its warm-up requests, and the load that it is to get.
pub struct WarmedUp {
    args: ServeArgs,
    client: Arc<Client>,
    workload: Workload,
    num_sessions: usize,
}

impl WarmedUp {
    /// Makes the load and sends the warm-up requests.
    ///
    /// # Errors
    /// If the load cannot be made, or a warm-up fails.
    pub async fn new(args: ServeArgs, api_key: Option<String>) -> anyhow::Result<Self> {
        let client = Arc::new(Client::new(args.endpoint(api_key))?);
        let (workload, num_sessions) = args.workload()?;
        let times = vec![Duration::ZERO; args.num_warmups];
        let (hidden, never) = (ProgressBar::hidden(), std::future::pending());
        let records = load::run(client.clone(), &workload, Phase::Warmup, &times, args.pace(), &hidden, never).await;
        if let Some(failure) = records.into_iter().find_map(|record| record.outcome.err()) {
            return Err(anyhow::Error::new(failure).context("a warm-up request failed"));
        }
        Ok(Self { args, client, workload, num_sessions })
    }

    /// Sends the load. What has not begun when `stop` completes is not sent. `progress` is moved by each session.
    ///
    /// # Errors
    /// If no request is answered.
    pub async fn measure(
        self,
        provenance: Provenance,
        progress: &ProgressBar,
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<Report> {
        let Self { args, client, workload, num_sessions } = self;
        let schedule = args.arrivals(&workload).schedule(num_sessions, args.seed);
        progress.set_length(num_sessions as u64);
        progress.reset();
        let cpu_seconds = || of_process(std::process::id()).map(|usage| usage.cpu_seconds);
        let before = cpu_seconds();
        let records = load::run(client, &workload, Phase::Measured, &schedule, args.pace(), progress, stop).await;
        let client_cpu_s = before.zip(cpu_seconds()).map(|(before, after)| after - before);
        progress.finish_and_clear();
        let summary = Summary::new(&records, &args.goodput);
        if summary.completed == 0 {
            let kinds = summary.errors.iter().map(|(kind, (num, first))| format!("{num} {kind} ({first})"));
            let kinds: Vec<String> = kinds.collect();
            let why = if kinds.is_empty() { "all were left by the generator".into() } else { kinds.join(", ") };
            anyhow::bail!("none of {} requests was answered: {why}", records.len());
        }
        Ok(Report { args, provenance, summary, client_cpu_s, records })
    }
}
