//! One self-contained HTML page of the results of `bench serve`, `compare` and `sweep`: `tandem bench report`.
//!
//! Every chart is an SVG inside the page; there is no script and nothing is fetched, so it opens anywhere.
//!
//! 1. [`runs`]: what the files hold. 2. `charts`: the pictures. 3. `page`: the HTML around them.

mod charts;
mod page;
pub mod runs;

use std::fmt;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

/// What is drawn.
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// Results of bench serve, compare or sweep. Those of serve and sweep have latencies of single requests only
    /// if they were run with --save-detailed.
    #[arg(required = true, value_name = "RESULT")]
    pub results: Vec<PathBuf>,
    /// Where the page is written.
    #[arg(long, short, value_name = "PATH", default_value = "report.html")]
    pub output: PathBuf,
    /// Its heading.
    #[arg(long, default_value = "Benchmark report")]
    pub title: String,
}

/// What was written.
#[derive(Debug)]
pub struct Written {
    path: PathBuf,
    num_runs: usize,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} runs are drawn in {}", self.num_runs, self.path.display())
    }
}

/// Reads the results and writes the page.
///
/// # Errors
/// If a file cannot be read or is no result, or the page cannot be drawn or written.
pub fn run(args: &ReportArgs) -> anyhow::Result<Written> {
    let mut runs = Vec::new();
    for path in &args.results {
        let about = || format!("read the result {}", path.display());
        let text = std::fs::read_to_string(path).with_context(about)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        runs.extend(runs::parse(&text, &name).with_context(about)?);
    }
    let page = page::page(&args.title, &runs)?;
    std::fs::write(&args.output, page).with_context(|| format!("write {}", args.output.display()))?;
    Ok(Written { path: args.output.clone(), num_runs: runs.len() })
}
