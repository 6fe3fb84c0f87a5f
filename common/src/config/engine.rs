//! How a node's engine batches, and what it may use.

use clap::{ArgAction, Args};

use super::InvalidSettings;
use super::device::{DeviceChoice, PrefillAttention};
use super::model::Dtype;
use super::sim::SimArgs;
use super::values::{parse_above_zero, parse_bytes_above_zero, parse_fraction, parse_whole};
use crate::content::GRANULE_TOKENS;
use crate::eviction::EvictionPolicy;
use crate::model::KvExchange;

/// Settings of an engine; names and meaning are vLLM's where there is one.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// What computes: `auto`, `cpu`, a GPU such as `cuda:0`; or nothing: `sim`.
    ///
    /// auto takes cuda:0 if this program was built with CUDA, the machine has a GPU and the model can run on it, and
    /// else the CPU; the log says which, and why. Part of the numerics id: a CPU and a GPU do not exchange KV unless
    /// --kv-exchange numerics says so. sim simulates a model of the shape in --model's config.json, without weights: its
    /// answers mean nothing, its times are what the --sim-... flags say, its KV has the model's size and is moved and
    /// verified as any other. For trying routing, scheduling and the network at a GPU's speeds.
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Share of a GPU's memory that may be in use, by everybody: what weights and steps leave of it is the KV cache.
    ///
    /// Only on a GPU, and only where --kv-cache-memory-bytes is not set. All nodes of one process share it.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = parse_fraction)]
    pub gpu_memory_utilization: f64,

    /// Sequences that run in one batch at most.
    ///
    /// More of them raise throughput and inter-token latency, and need more KV.
    #[arg(long, value_name = "SEQUENCES", default_value_t = 64, value_parser = parse_above_zero)]
    pub max_num_seqs: u32,

    /// Tokens of one step at most: one for each running sequence, the rest are prompt chunks.
    ///
    /// A larger budget prefills faster; a smaller one keeps steps short, so that running sequences and
    /// other prompts wait less.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = parse_above_zero)]
    pub max_num_batched_tokens: u32,

    /// Tokens of one KV block, a multiple of 16. May differ between nodes.
    ///
    /// Larger blocks mean fewer, larger transfers; smaller ones waste less at the end of a sequence and
    /// share more between prompts.
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = parse_block_size)]
    pub block_size: u32,

    /// Element type of the KV cache; `auto` takes that of --dtype.
    ///
    /// bfloat16 halves the memory and the transfer of KV, also where the model computes in float32. Part of the
    /// numerics id: nodes with different ones do not exchange KV unless --kv-exchange says so.
    #[arg(long, value_enum, value_name = "DTYPE", default_value_t = Dtype::Auto)]
    pub kv_cache_dtype: Dtype,

    /// With whom KV of the same model is exchanged; must be the same on all nodes of a cluster.
    ///
    /// same: the same tokens give the same bits on every node, whoever computed the prompt. dtypes: nodes with
    /// different --kv-cache-dtype work together; who receives float32 into bfloat16 rounds it, the other way is exact.
    /// numerics: nodes of different kernels or weight formats do, too. With the last two the text of an answer may
    /// depend on which node computed its prompt. Block size and order of bytes may differ under any of them.
    #[arg(long, value_enum, value_name = "NODES", default_value_t = KvExchange::Same)]
    pub kv_exchange: KvExchange,

    /// Memory of the paged KV cache, such as 512MiB or 2GiB. Default: 256MiB on a CPU, on a GPU what
    /// --gpu-memory-utilization leaves.
    ///
    /// Bounds how many tokens can run and stay cached at a time. All of it is taken at the start.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes_above_zero)]
    pub kv_cache_memory_bytes: Option<u64>,

    /// Give a sequence the same bits on a GPU whatever else is in the batch, as a CPU always does.
    ///
    /// Then a request's answer does not depend on other requests, nor on how its prompt was split; products of many
    /// rows take a slower way. Part of the numerics id.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = false,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        hide_possible_values = true
    )]
    pub batch_invariant: bool,

    /// Which kernel of a GPU computes the attention of prompts.
    ///
    /// portable runs on every GPU. auto takes the one for compute capability 9.0 (H100, H200) where it can run the
    /// model, and says why not; that one has been tested on the host alone, so it is not the default yet. Part of the
    /// numerics id.
    #[arg(long, value_enum, value_name = "KERNEL", default_value_t = PrefillAttention::Portable)]
    pub prefill_attention: PrefillAttention,

    /// Let launches on a GPU begin while the one ahead of each ends (programmatic dependent launch, on compute capability
    /// 9.0).
    ///
    /// Takes away most of the pause between two launches, of which a decode step has hundreds. Off until a GPU has shown
    /// what it gains; answers do not depend on it.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = false,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        hide_possible_values = true
    )]
    pub enable_pdl: bool,

    /// Launch every kernel of a decode step by itself on a GPU, not all of them at once as a graph.
    ///
    /// Slower; for profilers and debuggers, and to see what graphs save. Answers are the same.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = false,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        hide_possible_values = true
    )]
    pub enforce_eager: bool,

    /// Instruction set of a CPU: `auto` takes the fastest of the machine, and the log says which.
    ///
    /// portable, avx2, avx512, avx512vnni and avx512bf16 give the same bits. amx (tile registers, Intel since Sapphire
    /// Rapids) adds products of bfloat16 up in another order, which is part of the numerics id, and so does
    /// portable-tiles, which gives its bits slowly on any machine. Where some machines of a cluster have tiles and
    /// others do not, set avx512bf16 or less on all, or --kv-exchange numerics.
    #[arg(long, value_name = "ISA", default_value = "auto")]
    pub cpu_isa: String,

    /// Threads that compute. Default: one for each core.
    ///
    /// Fewer leave cores to other processes of the same host; results do not depend on it.
    #[arg(long, value_name = "THREADS", value_parser = parse_above_zero)]
    pub threads: Option<u32>,

    /// Reuse the KV of equal prompt beginnings; --no-enable-prefix-caching turns it off.
    ///
    /// Costs a hash of each prompt; worth turning off only to measure.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = true,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        hide_possible_values = true,
        overrides_with = "no_enable_prefix_caching"
    )]
    pub enable_prefix_caching: bool,

    /// Turns --enable-prefix-caching off.
    #[arg(long, hide = true, overrides_with = "enable_prefix_caching")]
    pub no_enable_prefix_caching: bool,

    /// Which KV block that nobody holds is given up first when room is needed.
    ///
    /// reuse-rate learns from the requests which kinds of blocks come back and when; lru gives up the least
    /// recently used.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = EvictionPolicy::ReuseRate)]
    pub eviction_policy: EvictionPolicy,

    /// Requests that may wait for their turn; one more is answered `Busy` at once.
    ///
    /// A long queue hides overload as waiting time; a short one lets the proxy choose another node.
    #[arg(long, value_name = "REQUESTS", default_value_t = 256, value_parser = parse_whole)]
    pub max_num_waiting: u32,

    /// What --device sim takes its time for.
    #[command(flatten)]
    pub sim: SimArgs,
}

/// The KV cache of a CPU if nothing is said.
const CPU_KV_CACHE_BYTES: u64 = 256 << 20;

impl EngineArgs {
    /// Memory of the KV cache where a CPU computes.
    pub fn kv_cache_bytes_on_cpu(&self) -> u64 {
        self.kv_cache_memory_bytes.unwrap_or(CPU_KV_CACHE_BYTES)
    }

    /// Whether KV is looked up and kept by content.
    pub fn has_prefix_caching(&self) -> bool {
        self.enable_prefix_caching && !self.no_enable_prefix_caching
    }

    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] if a full batch would not fit the token budget.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        let Self { max_num_batched_tokens, max_num_seqs, .. } = self;
        if max_num_batched_tokens < max_num_seqs {
            return Err(InvalidSettings(format!(
                "--max-num-batched-tokens is {max_num_batched_tokens}, expected at least --max-num-seqs, which is \
                 {max_num_seqs}: each running sequence takes one token of a step; raise the first or lower the second"
            )));
        }
        Ok(())
    }
}

fn parse_block_size(text: &str) -> Result<u32, String> {
    let size = parse_above_zero(text)?;
    if !(size as usize).is_multiple_of(GRANULE_TOKENS) {
        return Err(format!("a block has {size} tokens, expected a multiple of {GRANULE_TOKENS}"));
    }
    if size > 1024 { Err(format!("a block has {size} tokens, expected at most 1024")) } else { Ok(size) }
}
