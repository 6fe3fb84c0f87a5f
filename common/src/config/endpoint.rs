//! The OpenAI endpoint, and how the proxy chooses nodes.

use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

use super::InvalidSettings;
use super::values::{parse_above_zero, parse_bytes_above_zero, parse_duration_above_zero, parse_origin};

/// The HTTP side.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Endpoint")]
pub struct HttpArgs {
    /// Address of the OpenAI endpoint. 0.0.0.0 or :: takes clients from other hosts: set --api-key then.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: String,

    /// TCP port of the OpenAI endpoint. 0 takes a free one, which the log names.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub port: u16,

    /// Key that clients must send as `Authorization: Bearer`; repeat it for several. Default: no key is asked.
    ///
    /// Better set by the environment (TANDEM_API_KEY) than on a command line that others can read.
    #[arg(long, value_name = "KEY", value_delimiter = ',', hide_default_value = true, value_parser = NonEmptyStringValueParser::new())]
    pub api_key: Vec<String>,

    /// Origin whose web pages may call the endpoint (CORS), such as https://chat.example.org; repeat it for
    /// several, `*` for all. Default: none may.
    ///
    /// A page that a user of this machine opens could otherwise use the endpoint with their network's rights.
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',', value_parser = parse_origin)]
    pub allowed_origins: Vec<String>,

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

/// Choice of nodes, and what happens when one is lost.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Routing")]
pub struct RoutingArgs {
    /// Prompts not longer than this are prefilled by the decode node itself. 0: never while a prefill node
    /// is there.
    ///
    /// A hand-over costs a short prompt more than it saves; but each local prefill lengthens a step of
    /// the sequences that decode there.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub local_prefill_max_tokens: u32,

    /// Prefill nodes that are proposed to the decode node for one request, best first.
    ///
    /// More survive more losses and full nodes before the decode node prefills by itself.
    #[arg(long, value_name = "NODES", default_value_t = 2, value_parser = parse_above_zero)]
    pub num_prefill_candidates: u32,

    /// Node losses that one request survives; at the next it fails with 500 and is not tried again.
    ///
    /// More tries save more requests from unlucky nodes; fewer keep a prompt that kills nodes from
    /// reaching all of them.
    #[arg(long, value_name = "LOSSES", default_value_t = 2)]
    pub max_resumes: u32,

    /// Resumes of all requests together, as a share of the requests served (10 are always allowed).
    ///
    /// Bounds the extra work after a large loss, so that it does not become an overload.
    #[arg(long, value_name = "SHARE", default_value_t = 0.2)]
    pub retry_budget: f64,
}

impl RoutingArgs {
    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] if the budget is no share.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        if (0.0..=10.0).contains(&self.retry_budget) {
            return Ok(());
        }
        Err(InvalidSettings(format!(
            "--retry-budget is {}, expected a share from 0 to 10, such as 0.2 for one resume in five requests",
            self.retry_budget
        )))
    }
}
