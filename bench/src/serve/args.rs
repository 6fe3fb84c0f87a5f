//! The flags of `bench serve`, under vLLM's names where it has the same.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use serde_json::{Map, Value};

use crate::mooncake::BLOCK_TOKENS;

use super::arrivals::{Arrivals, BURSTINESS_RANGE, REQUEST_RATE_RANGE, Rate};
use super::client::{Backend, Endpoint};
use super::load::Pace;
use super::slo::{Metric, Objective};
use super::workload::mooncake::TraceScale;
use super::workload::{FromFile, MooncakeTrace, RandomPrompts, Workload, conversations, read, tasks};

/// Requests of a run unless told otherwise, or the rows of a file if it has fewer.
const NUM_PROMPTS: usize = 1000;
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
    /// What the endpoint is: openai takes prompts as token ids, openai-chat takes messages (random prompts
    /// become words, one for a token: the endpoint's own count of tokens is reported).
    #[arg(long, value_enum, default_value = "openai")]
    pub backend: Backend,
    /// Its path. Default: /v1/completions or /v1/chat/completions. It must stream.
    #[arg(long, value_name = "PATH")]
    pub endpoint: Option<String>,
    /// The model's name at the endpoint.
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// What is asked: random prompts (random, prefix_repetition), a ShareGPT file, a trace in Mooncake's
    /// format, or tasks whose answers are checked (lines of {"messages": [...], "answer": "..."}).
    #[arg(long, value_enum, default_value = "random")]
    pub dataset_name: Dataset,
    /// The file of a dataset that has one.
    #[arg(long, value_name = "PATH")]
    pub dataset_path: Option<PathBuf>,
    /// Requests to measure; sessions with --multi-turn. Default: 1000, or all of a file that has fewer.
    #[arg(long, value_name = "REQUESTS", value_parser = up_to::<1_000_000>())]
    pub num_prompts: Option<usize>,
    /// Tokens in front of every random prompt that are the same for all.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, value_parser = from_zero_to::<10_000_000>())]
    pub random_prefix_len: usize,
    /// prefix_repetition: tokens of each shared prefix.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = up_to::<10_000_000>())]
    pub prefix_repetition_prefix_len: usize,
    /// prefix_repetition: tokens behind it.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = up_to::<10_000_000>())]
    pub prefix_repetition_suffix_len: usize,
    /// prefix_repetition: how many prefixes there are; requests take them in turn.
    #[arg(long, value_name = "PREFIXES", default_value_t = 10, value_parser = up_to::<1_000_000>())]
    pub prefix_repetition_num_prefixes: usize,
    /// prefix_repetition: tokens to generate.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = up_to::<10_000_000>())]
    pub prefix_repetition_output_len: usize,
    /// sharegpt: tokens to generate. Default: one for each four bytes of the recorded answer, at most 2048.
    #[arg(long, value_name = "TOKENS", value_parser = up_to::<10_000_000>())]
    pub sharegpt_output_len: Option<usize>,
    /// sharegpt: ask all questions of a conversation, each behind the answers that the endpoint gave.
    #[arg(long)]
    pub multi_turn: bool,
    /// Between an answer and the next turn of its session.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub think_time: f64,
    /// mooncake: divide all lengths by it. The tokens of a hash are divided too, so prefixes stay shared.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = up_to::<512>())]
    pub trace_length_divisor: usize,
    /// mooncake: send when the trace says, instead of at --request-rate.
    #[arg(long)]
    pub trace_timestamps: bool,
    /// mooncake: multiply the trace's times by it.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub trace_time_scale: f64,
    /// mooncake: add a random part of it to each time before that: the published times are rounded to 3 s.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    pub trace_jitter: f64,
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
    /// burstier, above more even, inf is constant gaps. Means nothing at --request-rate inf.
    #[arg(long, value_name = "SHAPE", default_value_t = 1.0)]
    pub burstiness: f64,
    /// Let the rate go from --ramp-up-start-rps at the first request to --ramp-up-end-rps at the last, instead
    /// of --request-rate.
    #[arg(long, value_enum, value_name = "HOW", requires = "ramp_up_start_rps", requires = "ramp_up_end_rps")]
    pub ramp_up_strategy: Option<RampUp>,
    /// Requests per second at the first request.
    #[arg(long, value_name = "R", requires = "ramp_up_strategy")]
    pub ramp_up_start_rps: Option<f64>,
    /// Requests per second at the last request.
    #[arg(long, value_name = "R", requires = "ramp_up_strategy")]
    pub ramp_up_end_rps: Option<f64>,
    /// Leave this share of the requests, each after a number of its tokens; which and when is drawn from the
    /// seed. They are in no figure but their own count.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub cancel_fraction: f64,
    /// Requests in progress at a time; further ones wait for a place. Default: no limit.
    #[arg(long, value_name = "REQUESTS", value_parser = up_to::<1_000_000>())]
    pub max_concurrency: Option<usize>,
    /// Requests before the run that are not measured, with prompts of their own.
    #[arg(long, value_name = "REQUESTS", default_value_t = 0, value_parser = from_zero_to::<1_000_000>())]
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
    /// Write the times of every request too: what `bench report` draws.
    #[arg(long)]
    pub save_detailed: bool,
    /// Generate the full length, whatever the model says (an extension that vLLM and Tandem take).
    #[arg(long)]
    pub ignore_eos: bool,
    /// Send nothing that OpenAI does not define. Otherwise the endpoint is asked to tell the tokens of each
    /// event (vLLM's continuous_usage_stats) and where the time went (Tandem's include_timeline).
    #[arg(long)]
    pub openai_strict: bool,
    /// Open a connection for every request. For endpoints that close one behind an answer without saying so
    /// (llama.cpp's server does), which is seen only when the next request is lost with it.
    #[arg(long)]
    pub no_keep_alive: bool,
    /// Further fields of every request's body, as a JSON object.
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    pub extra_body: Option<Map<String, Value>>,
    /// The header x-request-id is this and the request's number.
    #[arg(long, value_name = "PREFIX", default_value = "bench-")]
    pub request_id_prefix: String,
    /// A request that is not answered to its end in this time has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub request_timeout: f64,
}

fn from_zero_to<const MAX: u64>() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(0..=MAX)
}

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

/// `--dataset-name`, under vLLM's names where it has the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dataset {
    /// Random prompts.
    Random,
    /// Random prompts behind shared prefixes.
    #[value(name = "prefix_repetition")]
    PrefixRepetition,
    /// A ShareGPT file.
    Sharegpt,
    /// A trace in Mooncake's format.
    Mooncake,
    /// Questions with their answers.
    Tasks,
}

/// `--ramp-up-strategy`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RampUp {
    /// In even steps.
    Linear,
    /// In even factors.
    Exponential,
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
        let is_burstiness = self.burstiness == f64::INFINITY || BURSTINESS_RANGE.contains(&self.burstiness);
        anyhow::ensure!(is_burstiness, "--burstiness is {}, expected {BURSTINESS_RANGE:?} or inf", self.burstiness);
        for (flag, rate) in
            [("--ramp-up-start-rps", self.ramp_up_start_rps), ("--ramp-up-end-rps", self.ramp_up_end_rps)]
        {
            let is_rate = rate.is_none_or(|rate| REQUEST_RATE_RANGE.contains(&rate));
            anyhow::ensure!(is_rate, "{flag} is {rate:?}, expected {REQUEST_RATE_RANGE:?}");
        }
        for (flag, value, max) in [
            ("--cancel-fraction", self.cancel_fraction, 1.0),
            ("--think-time", self.think_time, 1e6),
            ("--trace-time-scale", self.trace_time_scale, 1e6),
            ("--trace-jitter", self.trace_jitter, 1e6),
        ] {
            anyhow::ensure!((0.0..=max).contains(&value), "{flag} is {value}, expected 0 to {max}");
        }
        self.validate_dataset()?;
        for percent in &self.metric_percentiles {
            anyhow::ensure!((0.0..=100.0).contains(percent), "--metric-percentiles has {percent}, expected 0 to 100");
        }
        let timeout = self.request_timeout;
        anyhow::ensure!((0.001..=1e6).contains(&timeout), "--request-timeout is {timeout}, expected 0.001 to 1e6");
        let random = self.random_prompts();
        let per_request = (random.input_len + random.output_len) as f64 * (1.0 + ratio) + random.prefix_len as f64;
        let num_prompts = self.num_prompts.unwrap_or(NUM_PROMPTS);
        let num_tokens = per_request * (num_prompts + self.num_warmups) as f64;
        anyhow::ensure!(
            num_tokens <= NUM_TOKENS_MAX,
            "--num-prompts and the lengths make {num_tokens:.1e} tokens, expected at most {NUM_TOKENS_MAX:.0e}"
        );
        Ok(())
    }

    fn validate_dataset(&self) -> anyhow::Result<()> {
        let has_file = matches!(self.dataset_name, Dataset::Sharegpt | Dataset::Mooncake | Dataset::Tasks);
        anyhow::ensure!(
            has_file == self.dataset_path.is_some(),
            "--dataset-path {} with this --dataset-name",
            if has_file { "is needed" } else { "means nothing" }
        );
        if matches!(self.dataset_name, Dataset::Sharegpt | Dataset::Tasks) {
            anyhow::ensure!(self.backend == Backend::OpenaiChat, "this --dataset-name needs --backend openai-chat");
        }
        let is_trace = self.dataset_name == Dataset::Mooncake;
        anyhow::ensure!(is_trace || !self.trace_timestamps, "--trace-timestamps needs --dataset-name mooncake");
        anyhow::ensure!(
            !self.trace_timestamps || (self.request_rate.0.is_infinite() && self.ramp_up_strategy.is_none()),
            "--trace-timestamps and a rate are two answers to the same question: give one"
        );
        let is_conversation = self.dataset_name == Dataset::Sharegpt;
        anyhow::ensure!(is_conversation || !self.multi_turn, "--multi-turn needs --dataset-name sharegpt");
        let divisor = self.trace_length_divisor;
        anyhow::ensure!(
            BLOCK_TOKENS.is_multiple_of(divisor),
            "--trace-length-divisor is {divisor}, expected a divisor of {BLOCK_TOKENS}"
        );
        Ok(())
    }

    /// When sessions begin.
    pub fn arrivals(&self, workload: &Workload) -> Arrivals {
        let rate = match (self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps) {
            (Some(RampUp::Linear), Some(start), Some(end)) => Rate::Linear { start, end },
            (Some(RampUp::Exponential), Some(start), Some(end)) => Rate::Exponential { start, end },
            _ if self.trace_timestamps => return Arrivals::Trace(workload.trace_times().unwrap_or_default()),
            _ if self.request_rate.0.is_infinite() => return Arrivals::AtOnce,
            _ => Rate::Constant(self.request_rate.0),
        };
        Arrivals::Gamma { rate, burstiness: self.burstiness }
    }

    /// How sessions go on.
    pub fn pace(&self) -> Pace {
        Pace { max_concurrency: self.max_concurrency, think_time: Duration::from_secs_f64(self.think_time) }
    }

    /// What they ask, and how many of them there are.
    ///
    /// # Errors
    /// If the file cannot be read, is not of its format, or has fewer than were asked for.
    pub fn workload(&self) -> anyhow::Result<(Workload, usize)> {
        let num_max = self.num_prompts.unwrap_or(NUM_PROMPTS);
        let from_file = match &self.dataset_path {
            Some(path) => Some(self.read_file(path, num_max).with_context(|| format!("read {}", path.display()))?),
            None => None,
        };
        let workload = Workload { random: self.random_prompts(), from_file };
        let num_sessions = workload.num_sessions().map_or(num_max, |num| num.min(num_max));
        if let Some(asked) = self.num_prompts {
            anyhow::ensure!(asked == num_sessions, "--num-prompts is {asked}, but the file has {num_sessions}");
        }
        Ok((workload, num_sessions))
    }

    fn read_file(&self, path: &Path, num_max: usize) -> anyhow::Result<FromFile> {
        let shape =
            conversations::ConversationShape { is_multi_turn: self.multi_turn, output_len: self.sharegpt_output_len };
        Ok(match self.dataset_name {
            Dataset::Mooncake => {
                let scale = TraceScale {
                    length_divisor: self.trace_length_divisor,
                    time_scale: self.trace_time_scale,
                    jitter: Duration::from_secs_f64(self.trace_jitter),
                };
                FromFile::Trace(MooncakeTrace::parse(&read(path)?, num_max, scale, self.vocab_size, self.seed)?)
            }
            Dataset::Tasks => FromFile::Sessions(tasks::parse(&read(path)?, num_max)?),
            Dataset::Sharegpt | Dataset::Random | Dataset::PrefixRepetition => {
                FromFile::Sessions(conversations::parse(&read(path)?, num_max, shape)?)
            }
        })
    }

    fn random_prompts(&self) -> RandomPrompts {
        let (input_len, output_len, prefix_len, num_prefixes) = match self.dataset_name {
            Dataset::PrefixRepetition => (
                self.prefix_repetition_suffix_len,
                self.prefix_repetition_output_len,
                self.prefix_repetition_prefix_len,
                self.prefix_repetition_num_prefixes,
            ),
            _ => (self.random_input_len, self.random_output_len, self.random_prefix_len, 1),
        };
        RandomPrompts {
            seed: self.seed,
            input_len,
            output_len,
            range_ratio: self.random_range_ratio,
            vocab_size: self.vocab_size,
            prefix_len,
            num_prefixes,
        }
    }

    /// Whom.
    pub fn endpoint(&self, api_key: Option<String>) -> Endpoint {
        let path = self.endpoint.as_deref().unwrap_or(self.backend.path());
        Endpoint {
            url: format!("{}/{}", self.base_url.trim_end_matches('/'), path.trim_start_matches('/')),
            backend: self.backend,
            model: self.model.clone(),
            ignore_eos: self.ignore_eos,
            is_strict: self.openai_strict,
            extra_body: self.extra_body.clone().unwrap_or_default(),
            cancel_fraction: self.cancel_fraction,
            seed: self.seed,
            request_id_prefix: self.request_id_prefix.clone(),
            api_key,
            request_timeout: Duration::from_secs_f64(self.request_timeout),
            keeps_alive: !self.no_keep_alive,
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
        let workload = args.workload().unwrap().0;
        assert_eq!(args.arrivals(&workload), Arrivals::Gamma { rate: Rate::Constant(2.5), burstiness: 0.5 });
        assert_eq!(args.goodput.len(), 2);
        assert_eq!(args.percentile_metrics, [Metric::Ttft, Metric::E2el]);
        assert_eq!(args.metric_percentiles, [50.0, 99.9]);
        assert_eq!(args.endpoint(None).url, "http://h:1/v1/completions");
        assert_eq!(parse(&["--request-rate", "inf"]).unwrap().arrivals(&workload), Arrivals::AtOnce);
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
            ["--cancel-fraction", "1.5"],
            ["--think-time", "NaN"],
            ["--trace-length-divisor", "3"],
            ["--dataset-name", "mooncake"],
            ["--dataset-path", "x"],
            ["--ramp-up-start-rps", "1"],
            ["--extra-body", "[]"],
        ] {
            let reason = parse(&flags).unwrap_err();
            assert!(reason.contains(flags[0]), "{flags:?}: {reason}");
        }
        assert!(parse(&["--num-prompts", "1000000", "--random-input-len", "10000"]).unwrap_err().contains("tokens"));
    }
}
