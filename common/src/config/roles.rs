//! Which command has which settings. Each can be a whole command line (a thin binary's) or a subcommand
//! (`tandem`'s).

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};

use super::values::{HostPort, parse_above_zero, parse_days, parse_port, parse_whole};
use super::{
    ConfigFileArgs, DecodeArgs, EngineArgs, FabricArgs, HttpArgs, IdentityArgs, InvalidSettings, KvQuicArgs,
    KvTransport, ModelArgs, NixlArgs, PrefillArgs, RoutingArgs, StoreArgs, WeightsArgs,
};
use crate::ids::NodeId;

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogArgs {
    /// error, warn, info, debug, trace, or a filter such as `info,proxy=debug`.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,

    /// Lines for people, or one JSON object per line.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Computes prompts, and sends their KV and first tokens to decode nodes.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "prefill-node", version)]
pub struct PrefillNodeArgs {
    /// The file.
    #[command(flatten)]
    pub config: ConfigFileArgs,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Its weights.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Where it listens.
    #[command(flatten)]
    pub fabric: FabricArgs,
    /// UDP port of bulk connections, which carry KV. 0 takes a free one, which decode nodes learn.
    #[arg(long, value_name = "PORT", default_value_t = 0, value_parser = parse_port, help_heading = "Fabric")]
    pub bulk_port: u16,
    /// The sending end.
    #[command(flatten)]
    pub prefill: PrefillArgs,
    /// KV beyond the pool.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

impl PrefillNodeArgs {
    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] of the engine, the transports or the store.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        KvTransport::check(&self.fabric.kv_transports)?;
        self.fabric.kv_quic.validate()?;
        self.engine.validate()?;
        self.store.validate(&self.engine)
    }
}

/// Receives the KV of prompts and generates tokens.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "decode-node", version)]
pub struct DecodeNodeArgs {
    /// The file.
    #[command(flatten)]
    pub config: ConfigFileArgs,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Its weights.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// The engine.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Where it listens.
    #[command(flatten)]
    pub fabric: FabricArgs,
    /// The receiving end.
    #[command(flatten)]
    pub decode: DecodeArgs,
    /// KV beyond the pool.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

impl DecodeNodeArgs {
    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] of the engine, the transports, the store or the hand-over.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        KvTransport::check(&self.fabric.kv_transports)?;
        self.fabric.kv_quic.validate()?;
        self.engine.validate()?;
        self.store.validate(&self.engine)?;
        self.decode.validate(&self.store)
    }
}

/// The OpenAI endpoint: routes requests to decode and prefill nodes.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "proxy", version)]
pub struct ProxyArgs {
    /// The file.
    #[command(flatten)]
    pub config: ConfigFileArgs,
    /// The model: its tokenizer and chat template are used here, never its weights.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The HTTP side.
    #[command(flatten)]
    pub http: HttpArgs,
    /// Choice of nodes.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Name and certificates.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// A prefill node, host:port; repeat it or separate several by commas.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', help_heading = "Fabric")]
    pub prefill_node: Vec<HostPort>,
    /// A decode node, host:port; repeat it or separate several by commas.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', help_heading = "Fabric")]
    pub decode_node: Vec<HostPort>,
    /// UDP port on --host where nodes announce themselves (--register). 0 takes a free one. Default: none may.
    #[arg(long, value_name = "PORT", value_parser = parse_port, help_heading = "Fabric")]
    pub fabric_port: Option<u16>,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

impl ProxyArgs {
    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] if no decode node can ever be known.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        if self.decode_node.is_empty() && self.fabric_port.is_none() {
            return Err(InvalidSettings(
                "no decode node: list at least one with --decode-node host:port, or let nodes announce themselves \
                 with --fabric-port"
                    .into(),
            ));
        }
        Ok(())
    }
}

/// A prefill node, a decode node and the proxy in one process, joined by the fabric over loopback.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "up", version)]
pub struct UpArgs {
    /// The file.
    #[command(flatten)]
    pub config: ConfigFileArgs,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Its weights.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Prefill nodes to start. With 0 the decode nodes prefill by themselves.
    ///
    /// More keep the time to the first token low under load; all nodes share this host's cores and each
    /// has its own KV memory.
    #[arg(long, value_name = "NODES", default_value_t = 1, value_parser = parse_whole, help_heading = "Nodes")]
    pub num_prefill_nodes: u32,
    /// Decode nodes to start.
    ///
    /// More hold more running sequences; all nodes share this host's cores and each has its own KV memory.
    #[arg(long, value_name = "NODES", default_value_t = 1, value_parser = parse_above_zero, help_heading = "Nodes")]
    pub num_decode_nodes: u32,
    /// How long running requests may go on after Ctrl-C. 0s: they are cut at once.
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "30s",
        value_parser = super::values::parse_duration,
        help_heading = "Nodes"
    )]
    pub drain_timeout: std::time::Duration,
    /// Ways that KV may take from prefill to decode nodes: quic, and any of shm, cuda-ipc and nixl.
    ///
    /// quic alone by default, so that what is tried here is what runs between machines. With shm, decode nodes
    /// read KV where it lies in the prefill nodes' memory.
    #[arg(
        long,
        value_enum,
        value_name = "TRANSPORTS",
        value_delimiter = ',',
        default_values_t = [KvTransport::Quic],
        help_heading = "Nodes"
    )]
    pub kv_transports: Vec<KvTransport>,
    /// KV through NIXL.
    #[command(flatten)]
    pub nixl: NixlArgs,
    /// KV over quic.
    #[command(flatten)]
    pub kv_quic: KvQuicArgs,
    /// Each node's engine; the memory is per node.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// The HTTP side.
    #[command(flatten)]
    pub http: HttpArgs,
    /// Choice of nodes.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// The sending end.
    #[command(flatten)]
    pub prefill: PrefillArgs,
    /// The receiving end.
    #[command(flatten)]
    pub decode: DecodeArgs,
    /// KV beyond the pool.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

impl UpArgs {
    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] of the engine, the transports, the store or the hand-over.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        KvTransport::check(&self.kv_transports)?;
        self.kv_quic.validate()?;
        self.engine.validate()?;
        self.store.validate(&self.engine)?;
        self.decode.validate(&self.store)
    }
}

/// Makes the cluster's CA and certificates for its processes.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "certs", version)]
pub struct CertsArgs {
    /// Folder to write to. A CA that is there already is used again, so nodes can be added later.
    #[arg(long, value_name = "FOLDER", default_value = "certs")]
    pub dir: PathBuf,

    /// Name of a prefill node; repeat it for several.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub prefill_node: Vec<NodeId>,

    /// Name of a decode node; repeat it for several.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub decode_node: Vec<NodeId>,

    /// Name of a proxy; repeat it for several.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub proxy: Vec<NodeId>,

    /// Days that the certificates are valid.
    ///
    /// Shorter limits what a stolen key is worth; longer means fewer renewals.
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = parse_days)]
    pub days: u32,
}

impl CertsArgs {
    /// Checks what single values cannot tell.
    ///
    /// # Errors
    /// [`InvalidSettings`] if nobody is named, or two by the same name.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        let names = || self.prefill_node.iter().chain(&self.decode_node).chain(&self.proxy);
        if names().next().is_none() {
            return Err(InvalidSettings(
                "no process is named: give at least one of --prefill-node, --decode-node and --proxy".into(),
            ));
        }
        let mut seen = std::collections::HashSet::new();
        match names().find(|name| !seen.insert(*name)) {
            Some(name) => Err(InvalidSettings(format!(
                "\"{name}\" is given twice: each process has its own name and certificate"
            ))),
            None => Ok(()),
        }
    }
}
