//! Both ends of a hand-over.

use std::time::Duration;

use clap::Args;

use super::values::{parse_above_zero, parse_bytes, parse_bytes_above_zero, parse_duration_above_zero, parse_whole};
use super::{InvalidSettings, StoreArgs};
use crate::handover::{DecodeLimits, PrefillLimits};

/// The sending end.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Hand-over, prefill node")]
pub struct PrefillArgs {
    /// How long finished KV stays pinned for a decode node that neither takes it nor gives credit.
    ///
    /// Longer survives a slow network; shorter frees blocks from a peer that hangs.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration_above_zero)]
    pub transfer_stall_timeout: Duration,

    /// How long KV that is fetched from a decode node may stand still before the rest of it is computed.
    ///
    /// Beyond the decode nodes' --prefill-progress-timeout it has no effect: they stop sending then.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse_duration_above_zero)]
    pub fetch_stall_timeout: Duration,

    /// KV that may be on the way from a decode node for one request.
    #[arg(long, value_name = "BYTES", default_value = "32MiB", value_parser = parse_bytes_above_zero)]
    pub fetch_credit_bytes: u64,

    /// Expect KV to come from decode nodes at this many bytes per second, instead of measuring it.
    ///
    /// Decides whether a prefix that a decode node holds is fetched or computed again. 0 never fetches. Measured,
    /// it is a figure for each decode node from its last fetches; 500MB before the first.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub fetch_bytes_per_second: Option<u64>,

    /// Expect this node to compute this many prompt tokens per second, instead of measuring it.
    ///
    /// The other side of that decision; 2000 before the first prompt.
    #[arg(long, value_name = "TOKENS", value_parser = parse_above_zero)]
    pub prefill_tokens_per_second: Option<u32>,
}

impl PrefillArgs {
    /// Limits of one hand-over whose [`Prefill::deadline`](crate::wire::Prefill::deadline) is given.
    pub fn limits(&self, deadline: Duration) -> PrefillLimits {
        PrefillLimits { stall_timeout: self.transfer_stall_timeout, total_timeout: deadline }
    }
}

/// The receiving end, and what a decode node prefills by itself.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Hand-over, decode node")]
pub struct DecodeArgs {
    /// Time for a prompt's KV to arrive, all prefill nodes that are tried together.
    ///
    /// Must allow for the longest prompt behind a full queue; past it the request fails.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = parse_duration_above_zero)]
    pub prefill_timeout: Duration,

    /// Time for a prefill node to be reached and to accept, before the next one is asked.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse_duration_above_zero)]
    pub prefill_accept_timeout: Duration,

    /// Time without a step of the prefill node's engine, or behind token #1 without KV, before it is given up.
    ///
    /// Shorter notices a hang sooner; it must exceed the longest step and the longest transfer of one extent.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration_above_zero)]
    pub prefill_progress_timeout: Duration,

    /// KV that may be on the way to this node for one request.
    ///
    /// A larger window fills a fast network; all windows together bound the receive memory.
    #[arg(long, value_name = "BYTES", default_value = "32MiB", value_parser = parse_bytes_above_zero)]
    pub credit_bytes: u64,

    /// Blocks reserved for the answer together with the prompt's.
    ///
    /// More make it rarer that a running sequence must wait for a block; fewer admit more requests.
    #[arg(long, value_name = "BLOCKS", default_value_t = 2, value_parser = parse_above_zero)]
    pub growth_window_blocks: u32,

    /// Host memory for KV of preempted sequences. Default: all of --store-host-bytes if that is set, otherwise as
    /// much as the KV cache has.
    ///
    /// Where no block is left for a running sequence, the youngest gives way and is restored from here later; what
    /// has no room is computed again. It is part of --store-host-bytes: what is parked takes the place of the least
    /// recently used entries. 0 always computes again.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub parked_kv_bytes: Option<u64>,

    /// Prompt tokens that this node prefills by itself in one step.
    ///
    /// More finish local prefills sooner; fewer disturb the sequences that decode here less.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = parse_above_zero)]
    pub local_prefill_tokens: u32,

    /// If no more tokens than this are missing (the rest is cached, or arrived before a loss), this node
    /// computes them without asking a prefill node at all.
    ///
    /// A fixed rule; between this and --local-offer-max-tokens the cheaper of both is chosen by expected times.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, value_parser = parse_whole)]
    pub local_rest_max_tokens: u32,

    /// If no more tokens than this are missing, this node offers to compute them, and a prefill node that lacks
    /// what is cached here leaves them to it where that is faster than computing or fetching the rest itself.
    ///
    /// This is the budget of such work here: more saves transfers, fewer disturb the sequences that decode here
    /// less. 0 never offers.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = parse_whole)]
    pub local_offer_max_tokens: u32,

    /// Expect this node to compute this many prompt tokens per second beside its batch, instead of measuring it.
    ///
    /// What it offers is priced with it; 2000 before the first local prefill.
    #[arg(long, value_name = "TOKENS", value_parser = parse_above_zero)]
    pub local_prefill_tokens_per_second: Option<u32>,
}

impl DecodeArgs {
    /// Limits of one hand-over of a request that has `deadline` left.
    pub fn limits(&self, deadline: Duration) -> DecodeLimits {
        DecodeLimits {
            accept_timeout: self.prefill_accept_timeout,
            progress_timeout: self.prefill_progress_timeout,
            total_timeout: self.prefill_timeout.min(deadline),
            credit_window_bytes: self.credit_bytes,
            num_local_tokens_max: self.local_rest_max_tokens,
            num_offered_tokens_max: self.local_offer_max_tokens,
        }
    }

    /// Most bytes of KV that are parked, where the KV cache has `pool_bytes`.
    pub fn parked_bytes_max(&self, store: &StoreArgs, pool_bytes: u64) -> u64 {
        let default = if store.store_host_bytes > 0 { store.store_host_bytes } else { pool_bytes };
        self.parked_kv_bytes.unwrap_or(default)
    }

    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] if one try may take longer than all of them together, or a part is larger than the whole.
    pub fn validate(&self, store: &StoreArgs) -> Result<(), InvalidSettings> {
        if let Some(parked) = self.parked_kv_bytes
            && store.store_host_bytes > 0
            && parked > store.store_host_bytes
        {
            return Err(InvalidSettings(format!(
                "--parked-kv-bytes is {parked}, expected at most --store-host-bytes, which it is a part of and which is \
                 {}: lower the first or raise the second",
                store.store_host_bytes
            )));
        }
        for (flag, timeout) in [
            ("--prefill-accept-timeout", self.prefill_accept_timeout),
            ("--prefill-progress-timeout", self.prefill_progress_timeout),
        ] {
            if timeout > self.prefill_timeout {
                return Err(InvalidSettings(format!(
                    "{flag} is {timeout:?}, expected at most --prefill-timeout, which is {:?}: no other prefill node \
                     could be tried; lower the first or raise the second",
                    self.prefill_timeout
                )));
            }
        }
        Ok(())
    }
}
