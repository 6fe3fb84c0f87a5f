//! A run's figures as a table for people and as JSON under vLLM's keys.

use std::fmt;

use serde_json::{Map, Value, json};

use super::args::ServeArgs;
use super::detail;
use super::provenance::Provenance;
use super::record::RequestRecord;
use super::slo::{Metric, Objective};
use super::statistics::Samples;
use super::summary::Summary;

/// Figures with what was asked for and where they come from.
#[derive(Debug)]
pub struct Report {
    /// What was asked for.
    pub args: ServeArgs,
    /// Where it was run.
    pub provenance: Provenance,
    /// What was found.
    pub summary: Summary,
    /// User and system time of this process during the load, where there is a `/proc`: little, or the generator
    /// takes from what it measures. Loads of one process at the same time count together.
    pub client_cpu_s: Option<f64>,
    /// Every request.
    pub records: Vec<RequestRecord>,
}

/// `99`, `99.9`
fn percent_name(percent: f64) -> String {
    format!("{percent}")
}

fn metric_title(metric: Metric) -> &'static str {
    match metric {
        Metric::Ttft => "TTFT (time to first token)",
        Metric::Tpot => "TPOT (per request, behind the first token)",
        Metric::Itl => "ITL (between tokens)",
        Metric::E2el => "E2EL (whole answer)",
    }
}

impl Report {
    /// The result. A latency without a sample is `null`.
    pub fn to_json(&self) -> Value {
        let Self { args, provenance, summary, client_cpu_s, records } = self;
        let rate = args.request_rate.0;
        let errors: Map<String, Value> =
            summary.errors.iter().map(|(kind, (num, _))| (kind.clone(), json!(num))).collect();
        let mut result = json!({
            "model_id": args.model,
            "num_prompts": records.len(),
            "request_rate": if rate.is_finite() { json!(rate) } else { json!("inf") },
            "burstiness": if args.burstiness.is_finite() { json!(args.burstiness) } else { json!("inf") },
            "max_concurrency": args.max_concurrency,
            "seed": args.seed,
            "duration": summary.duration.as_secs_f64(),
            "completed": summary.completed,
            "failed": summary.failed,
            "cancelled": summary.cancelled,
            "errors_by_kind": errors,
            "total_input_tokens": summary.total_input_tokens,
            "total_output_tokens": summary.total_output_tokens,
            "request_throughput": summary.request_throughput(),
            "request_goodput": summary.request_goodput,
            "slo_attainment": summary.slo_attainment,
            "total_cached_tokens": summary.total_cached_tokens,
            "num_checked": summary.checked.map(|(num, _)| num),
            "num_right": summary.checked.map(|(_, num_right)| num_right),
            "output_throughput": summary.output_throughput(),
            "total_token_throughput": summary.total_token_throughput(),
            "num_itl_spread": summary.num_itl_spread,
            "client_cpu_s": client_cpu_s,
            "warnings": summary.warnings(),
        });
        let percents = &args.metric_percentiles;
        let fields = result.as_object_mut().expect("it was made as an object");
        for metric in Metric::ALL.into_iter().filter(|metric| args.percentile_metrics.contains(metric)) {
            add_samples(fields, metric.as_str(), summary.latencies[&metric].as_ref(), percents);
        }
        add_samples(fields, "scheduled_ttft", summary.scheduled_ttft.as_ref(), percents);
        add_samples(fields, "scheduled_e2el", summary.scheduled_e2el.as_ref(), percents);
        for (name, samples) in
            [("schedule_lag", &summary.schedule_lag), ("concurrency_wait", &summary.concurrency_wait)]
        {
            let samples = samples.as_ref();
            fields.insert(format!("mean_{name}_ms"), json!(samples.map(Samples::mean)));
            fields.insert(format!("p99_{name}_ms"), json!(samples.map(|samples| samples.percentile(99.0))));
            fields.insert(format!("max_{name}_ms"), json!(samples.map(Samples::max)));
        }
        for (objective, share) in &summary.attainment {
            let name = format!("{}_attainment", objective.metric.as_str());
            fields.insert(name, json!(share));
        }
        for (name, samples) in &summary.phases {
            add_samples(fields, name, Some(samples), percents);
        }
        if args.save_detailed {
            detail::add(fields, records);
        }
        if let Value::Object(provenance) = provenance.to_json() {
            fields.extend(provenance);
        }
        result
    }
}

fn add_samples(fields: &mut Map<String, Value>, name: &str, samples: Option<&Samples>, percents: &[f64]) {
    fields.insert(format!("mean_{name}_ms"), json!(samples.map(Samples::mean)));
    fields.insert(format!("median_{name}_ms"), json!(samples.map(|samples| samples.percentile(50.0))));
    fields.insert(format!("std_{name}_ms"), json!(samples.map(Samples::std)));
    for percent in percents {
        let value = samples.map(|samples| samples.percentile(*percent));
        fields.insert(format!("p{}_{name}_ms", percent_name(*percent)), json!(value));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { args, provenance, summary, .. } = self;
        writeln!(f, "{:<44}{:>12}", "Requests answered", summary.completed)?;
        if summary.cancelled > 0 {
            writeln!(f, "{:<44}{:>12}", "Requests left by the generator", summary.cancelled)?;
        }
        writeln!(f, "{:<44}{:>12}", "Requests failed", summary.failed)?;
        for (kind, (num, first)) in &summary.errors {
            writeln!(f, "  {kind:<42}{num:>12}   {first}")?;
        }
        writeln!(f, "{:<44}{:>12.3}", "Duration (s)", summary.duration.as_secs_f64())?;
        writeln!(f, "{:<44}{:>12}", "Prompt tokens", summary.total_input_tokens)?;
        if let Some(cached) = summary.total_cached_tokens {
            writeln!(f, "{:<44}{:>12}", "  of them cached", cached)?;
        }
        writeln!(f, "{:<44}{:>12}", "Generated tokens", summary.total_output_tokens)?;
        if let Some((num, num_right)) = summary.checked {
            writeln!(f, "{:<44}{:>12}", format!("Right answers, of {num}"), num_right)?;
        }
        writeln!(f, "{:<44}{:>12.3}", "Requests per second", summary.request_throughput())?;
        if let Some(goodput) = summary.request_goodput {
            writeln!(f, "{:<44}{goodput:>12.3}", "Goodput (requests per second)")?;
        }
        for (objective, share) in &summary.attainment {
            let Objective { metric, limit_ms } = objective;
            let title = format!("  {} within {limit_ms} ms (%)", metric.as_str().to_uppercase());
            writeln!(f, "{title:<44}{:>12.2}", share * 100.0)?;
        }
        writeln!(f, "{:<44}{:>12.2}", "Generated tokens per second", summary.output_throughput())?;
        writeln!(f, "{:<44}{:>12.2}", "All tokens per second", summary.total_token_throughput())?;
        write!(f, "\n{:<44}{:>12}{:>12}{:>12}", "Milliseconds", "mean", "median", "std")?;
        for percent in &args.metric_percentiles {
            write!(f, "{:>12}", format!("p{}", percent_name(*percent)))?;
        }
        writeln!(f)?;
        let rows = Metric::ALL
            .into_iter()
            .filter(|metric| args.percentile_metrics.contains(metric))
            .map(|metric| (metric_title(metric), &summary.latencies[&metric]))
            .chain([
                ("TTFT from the scheduled time", &summary.scheduled_ttft),
                ("E2EL from the scheduled time", &summary.scheduled_e2el),
                ("Schedule lag of the generator", &summary.schedule_lag),
                ("Wait for a place (--max-concurrency)", &summary.concurrency_wait),
            ])
            .map(|(title, samples)| (title.to_string(), samples.as_ref()));
        let phases = summary.phases.iter().map(|(name, samples)| (format!("At the endpoint: {name}"), Some(samples)));
        for (title, samples) in rows.chain(phases) {
            write!(f, "{title:<44}")?;
            let Some(samples) = samples else {
                writeln!(f, "{:>12}", "none")?;
                continue;
            };
            write!(f, "{:>12.3}{:>12.3}{:>12.3}", samples.mean(), samples.percentile(50.0), samples.std())?;
            for percent in &args.metric_percentiles {
                write!(f, "{:>12.3}", samples.percentile(*percent))?;
            }
            writeln!(f)?;
        }
        if let Some(lag) = &summary.schedule_lag {
            writeln!(f, "\nLargest schedule lag: {:.3} ms.", lag.max())?;
        }
        for warning in summary.warnings() {
            writeln!(f, "{warning}")?;
        }
        let unknown = || "unknown".to_string();
        let cores = provenance.num_cores.map_or_else(unknown, |cores| cores.to_string());
        let cpu_model = provenance.cpu_model.clone().unwrap_or_else(unknown);
        let commit = provenance.commit.clone().unwrap_or_else(unknown);
        write!(f, "\n{}\ncommit {commit}, {cores} cores of {cpu_model}", provenance.command)
    }
}
