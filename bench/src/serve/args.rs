//! The flags of `bench serve`, under vLLM's names where it has the same.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;

use super::arrivals::{Arrivals, BURSTINESS_RANGE, REQUEST_RATE_RANGE};
use super::client::Endpoint;
use super::slo::{Metric, Objective};
use super::workload::Workload;

/// Prompt and generated tokens of a whole run: a run is held in memory until its end.
const NUM_TOKENS_MAX: f64 = 1e9;

fn up_to<const MAX: u64>() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=MAX)
}

/// What is sent, where to, and what is reported.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// The endpoint, without the path. The key in OPENAI_API_KEY is sent if there is one.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub base_url: String,
    /// Path of completions. It must stream and take prompts as token ids.
    #[arg(long, value_name = "PATH", default_value = "/v1/completions")]
    pub endpoint: String,
    /// The model's name at the endpoint.
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// Requests to measure.
    #[arg(long, value_name = "REQUESTS", default_value_t = 1000, value_parser = up_to::<1_000_000>())]
    pub num_prompts: usize,
    /// Tokens of a prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = up_to::<10_000_000>())]
    pub random_input_len: usize,
    /// Tokens to generate.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = up_to::<10_000_000>())]
    pub random_output_len: usize,
    /// Both lengths are drawn from [LEN (1 - R), LEN (1 + R)]; 0 to below 1.
    #[arg(long, value_name = "R", default_value_t = 0.0)]
    pub random_range_ratio: f64,
    /// Prompts are drawn from the token ids below this. The default fits every model; give the model's own
    /// where the choice of tokens matters, as with mixtures of experts.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub vocab_size: u32,
    /// Prompts, lengths and send times are a function of it.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Mean requests per second, or inf: all at the start.
    #[arg(long, value_name = "R|inf", default_value = "inf")]
    pub request_rate: RequestRate,
    /// Shape of the gamma distribution of the gaps between requests: 1 is a Poisson process, below is
    /// burstier, above more even. Means nothing at --request-rate inf.
    #[arg(long, value_name = "SHAPE", default_value_t = 1.0)]
    pub burstiness: f64,
    /// Requests in progress at a time; further ones wait for a place. Default: no limit.
    #[arg(long, value_name = "REQUESTS", value_parser = up_to::<1_000_000>())]
    pub max_concurrency: Option<usize>,
    /// Requests before the run that are not measured, with prompts of their own.
    #[arg(long, value_name = "REQUESTS", default_value_t = 0, value_parser = RangedU64ValueParser::<usize>::new().range(0..=1_000_000))]
    pub num_warmups: usize,
    /// What a request must meet to be good, in ms: any of ttft:MS tpot:MS itl:MS (its largest) e2el:MS.
    #[arg(long, value_name = "NAME:MS", num_args = 1..)]
    pub goodput: Vec<Objective>,
    /// Latencies to report.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_enum, default_value = "ttft,tpot,itl,e2el")]
    pub percentile_metrics: Vec<Metric>,
    /// Percentiles to report of each, 0 to 100.
    #[arg(long, value_name = "PERCENTS", value_delimiter = ',', default_value = "99")]
    pub metric_percentiles: Vec<f64>,
    /// Write the figures as JSON, under vLLM's keys.
    #[arg(long, value_name = "PATH")]
    pub save_result: Option<PathBuf>,
    /// Generate the full length, whatever the model says (an extension that vLLM and Tandem take).
    #[arg(long)]
    pub ignore_eos: bool,
    /// The header x-request-id is this and the request's number.
    #[arg(long, value_name = "PREFIX", default_value = "bench-")]
    pub request_id_prefix: String,
    /// A request that is not answered to its end in this time has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub request_timeout: f64,
}

/// `--request-rate`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RequestRate(pub f64);

impl FromStr for RequestRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rate: f64 = text.parse().map_err(|_| "expected requests per second, or inf".to_string())?;
        if rate == f64::INFINITY || REQUEST_RATE_RANGE.contains(&rate) {
            return Ok(Self(rate));
        }
        Err(format!("expected {} to {}, or inf", REQUEST_RATE_RANGE.start(), REQUEST_RATE_RANGE.end()))
    }
}

impl ServeArgs {
    /// What no single flag can tell.
    ///
    /// # Errors
    /// With the flag and the value that is wrong.
    pub fn validate(&self) -> anyhow::Result<()> {
        let ratio = self.random_range_ratio;
        anyhow::ensure!((0.0..1.0).contains(&ratio), "--random-range-ratio is {ratio}, expected 0 to below 1");
        anyhow::ensure!(
            BURSTINESS_RANGE.contains(&self.burstiness),
            "--burstiness is {}, expected {BURSTINESS_RANGE:?}",
            self.burstiness
        );
        for percent in &self.metric_percentiles {
            anyhow::ensure!((0.0..=100.0).contains(percent), "--metric-percentiles has {percent}, expected 0 to 100");
        }
        let timeout = self.request_timeout;
        anyhow::ensure!((0.001..=1e6).contains(&timeout), "--request-timeout is {timeout}, expected 0.001 to 1e6");
        let per_request = (self.random_input_len + self.random_output_len) as f64 * (1.0 + ratio);
        let num_tokens = per_request * (self.num_prompts + self.num_warmups) as f64;
        anyhow::ensure!(
            num_tokens <= NUM_TOKENS_MAX,
            "--num-prompts and the lengths make {num_tokens:.1e} tokens, expected at most {NUM_TOKENS_MAX:.0e}"
        );
        Ok(())
    }

    /// When requests are sent.
    pub fn arrivals(&self) -> Arrivals {
        match self.request_rate.0 {
            f64::INFINITY => Arrivals::AtOnce,
            request_rate => Arrivals::Gamma { request_rate, burstiness: self.burstiness },
        }
    }

    /// What they ask.
    pub fn workload(&self) -> Workload {
        Workload {
            seed: self.seed,
            input_len: self.random_input_len,
            output_len: self.random_output_len,
            range_ratio: self.random_range_ratio,
            vocab_size: self.vocab_size,
        }
    }

    /// Whom.
    pub fn endpoint(&self, api_key: Option<String>) -> Endpoint {
        Endpoint {
            url: format!("{}/{}", self.base_url.trim_end_matches('/'), self.endpoint.trim_start_matches('/')),
            model: self.model.clone(),
            ignore_eos: self.ignore_eos,
            request_id_prefix: self.request_id_prefix.clone(),
            api_key,
            request_timeout: Duration::from_secs_f64(self.request_timeout),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn parse(flags: &[&str]) -> Result<ServeArgs, String> {
        let args = ["serve", "--model", "m"].iter().chain(flags);
        let args = Command::try_parse_from(args).map_err(|error| error.to_string())?.args;
        args.validate().map_err(|error| error.to_string())?;
        Ok(args)
    }

    #[test]
    fn vllms_spelling_is_taken() {
        let flags = "--base-url http://h:1/ --num-prompts 5 --request-rate 2.5 --burstiness 0.5 --max-concurrency 3 \
                     --goodput ttft:500 itl:50 --percentile-metrics ttft,e2el --metric-percentiles 50,99.9";
        let args = parse(&flags.split_whitespace().collect::<Vec<_>>()).unwrap();
        assert_eq!(args.arrivals(), Arrivals::Gamma { request_rate: 2.5, burstiness: 0.5 });
        assert_eq!(args.goodput.len(), 2);
        assert_eq!(args.percentile_metrics, [Metric::Ttft, Metric::E2el]);
        assert_eq!(args.metric_percentiles, [50.0, 99.9]);
        assert_eq!(args.endpoint(None).url, "http://h:1/v1/completions");
        assert_eq!(parse(&["--request-rate", "inf"]).unwrap().arrivals(), Arrivals::AtOnce);
    }

    #[test]
    fn values_out_of_range_are_named() {
        for flags in [
            ["--random-range-ratio", "1"],
            ["--random-range-ratio", "NaN"],
            ["--burstiness", "0"],
            ["--metric-percentiles", "101"],
            ["--request-timeout", "inf"],
            ["--request-rate", "0"],
            ["--request-rate", "NaN"],
            ["--num-prompts", "0"],
            ["--max-concurrency", "0"],
            ["--vocab-size", "0"],
            ["--goodput", "p99:5"],
            ["--percentile-metrics", "latency"],
        ] {
            let reason = parse(&flags).unwrap_err();
            assert!(reason.contains(flags[0]), "{flags:?}: {reason}");
        }
        assert!(parse(&["--num-prompts", "1000000", "--random-input-len", "10000"]).unwrap_err().contains("tokens"));
    }
}
