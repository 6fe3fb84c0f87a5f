//! The OpenAI endpoint, and how the proxy chooses nodes.

use std::time::Duration;

use clap::Args;

use super::values::{parse_above_zero, parse_api_key, parse_bytes_above_zero, parse_duration_above_zero, parse_origin};
use super::values::{parse_port, parse_seed, parse_share, parse_whole};

/// The HTTP side.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Endpoint")]
pub struct HttpArgs {
    /// Address of the OpenAI endpoint. 0.0.0.0 or :: takes clients from other hosts: set --api-key then.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: String,

    /// TCP port of the OpenAI endpoint. 0 takes a free one, which the log names.
    #[arg(long, value_name = "PORT", default_value_t = 8000, value_parser = parse_port)]
    pub port: u16,

    /// Key that clients must send as `Authorization: Bearer`; repeat it for several. Default: no key is asked.
    ///
    /// Better set by the environment (TANDEM_API_KEY) than on a command line that others can read.
    #[arg(long, value_name = "KEY", value_delimiter = ',', hide_default_value = true, value_parser = parse_api_key)]
    pub api_key: Vec<String>,

    /// Origin whose web pages may call the endpoint (CORS), with its scheme, as in `https://chat.example.org`; repeat it for
    /// several, `*` for all. Default: none may.
    ///
    /// A page that a user of this machine opens could otherwise use the endpoint with their network's rights.
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',', value_parser = parse_origin)]
    pub allowed_origins: Vec<String>,

    /// Names that clients may give as `model`; the first is the one in answers. Default: the value of --model.
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Vec<String>,

    /// Seed of requests that give none. Default: drawn at random for each.
    ///
    /// With it, equal requests get equal answers, which is for tests: clients that sample several answers
    /// by repeating a request get the same one.
    #[arg(long, value_name = "SEED", value_parser = parse_seed)]
    pub seed: Option<u64>,

    /// Largest request body.
    ///
    /// Bounds the memory that one client can take; long prompts need about 6 bytes per token.
    #[arg(long, value_name = "BYTES", default_value = "8MiB", value_parser = parse_bytes_above_zero)]
    pub max_body_bytes: u64,

    /// Requests in progress at most; one more is answered 429 with `Retry-After`.
    #[arg(long, value_name = "REQUESTS", default_value_t = 1024, value_parser = parse_above_zero)]
    pub max_concurrent_requests: u32,

    /// Time that one request may take, from its last byte to the last token of its answer.
    ///
    /// Longer serves long answers; shorter frees the nodes from clients that wait no more.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse_duration_above_zero)]
    pub request_timeout: Duration,
}

impl HttpArgs {
    /// The names clients may use, best first; never empty. `model` is the value of --model.
    pub fn served_model_names(&self, model: &str) -> Vec<String> {
        if self.served_model_name.is_empty() { vec![model.to_owned()] } else { self.served_model_name.clone() }
    }
}

/// Choice of nodes, and what happens when one is lost.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Routing")]
pub struct RoutingArgs {
    /// Prompts not longer than this are prefilled by the decode node itself. 0: never while a prefill node
    /// is there.
    ///
    /// A hand-over costs a short prompt more than it saves; but each local prefill lengthens a step of
    /// the sequences that decode there.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, value_parser = parse_whole)]
    pub local_prefill_max_tokens: u32,

    /// Prefill nodes that are proposed to the decode node for one request, best first.
    ///
    /// More survive more losses and full nodes before the decode node prefills by itself.
    #[arg(long, value_name = "NODES", default_value_t = 2, value_parser = parse_above_zero)]
    pub num_prefill_candidates: u32,

    /// Blocks of all nodes that the proxy remembers, to send requests where their prefix is. 0: none.
    ///
    /// About 40 bytes each. Too few leave blocks out (tandem_block_index_dropped_total), and requests then
    /// miss the nodes that hold them.
    #[arg(long, value_name = "BLOCKS", default_value_t = 1_000_000, value_parser = parse_whole)]
    pub block_index_max_blocks: u32,

    /// What one request more on a decode node weighs, in prompt tokens that another one already holds.
    ///
    /// Lower sends more requests where their prefix is, higher spreads them more evenly.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = parse_above_zero)]
    pub request_weight_tokens: u32,

    /// Node losses that one request survives; at the next it fails with 500 and is not tried again.
    ///
    /// More tries save more requests from unlucky nodes; fewer keep a prompt that kills nodes from
    /// reaching all of them.
    #[arg(long, value_name = "LOSSES", default_value_t = 2, value_parser = parse_whole)]
    pub max_resumes: u32,

    /// Resumes of all requests together, as a share of the requests served (10 are always allowed).
    ///
    /// Bounds the extra work after a large loss, so that it does not become an overload.
    #[arg(long, value_name = "SHARE", default_value_t = 0.2, value_parser = parse_share)]
    pub retry_budget: f64,
}
