//! What can be set, and how: flags, then the environment, then one TOML file, then defaults.
//!
//! ```text
//! --block-size 32        a flag wins
//! TANDEM_BLOCK_SIZE=32   then the environment: TANDEM_ and the flag's name
//! [decode-node]          then the command's own section of the file
//! block-size = 32
//! [common]               then the section for all commands
//! block-size = 32
//! ```
//!
//! One file serves all processes of a cluster: each command reads `[common]` and the section with its own
//! name. Keys are the flags' names, with `-` or `_`. A key or a section that nobody knows is an error that
//! names the nearest one. A list (`--prefill-node`) is replaced as a whole, never joined across sources.
//!
//! Nothing here reads a file or the environment: [`parse`] takes the arguments and two lookups, so that
//! tests pass maps. In reading order: [`layers`] (how the sources are laid over each other), [`misspelt`], [`values`]
//! (sizes, durations, addresses), the groups of settings ([`model`], [`engine`], [`sim`], [`fabric`],
//! [`endpoint`], [`handover`], [`store`]), [`roles`] (which command has which groups).

pub mod device;
pub mod endpoint;
pub mod engine;
pub mod fabric;
pub mod handover;
pub mod layers;
pub mod misspelt;
pub mod model;
pub mod roles;
pub mod sim;
pub mod store;
pub mod values;

pub use device::{DeviceChoice, PrefillAttention};
pub use endpoint::{HttpArgs, RoutingArgs};
pub use engine::EngineArgs;
pub use fabric::{CongestionControl, FabricArgs, IdentityArgs, KV_CONNECTIONS_MAX, KvQuicArgs, KvTransport, NixlArgs};
pub use fabric::{TlsPaths, WINDOW_BYTES_MIN};
pub use handover::{DecodeArgs, PrefillArgs};
pub use layers::{ConfigError, ConfigFileArgs, parse};
pub use misspelt::{UnknownVariable, unknown_variables};
pub use model::{DEMO_MODEL, Dtype, ModelArgs, WeightsArgs};
pub use roles::{CertsArgs, DecodeNodeArgs, LogArgs, LogFormat, PrefillNodeArgs, ProxyArgs, UpArgs};
pub use sim::SimArgs;
pub use store::StoreArgs;
pub use values::{HostPort, parse_busy_poll};

/// Settings that are each in range but do not go together, or one that is missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidSettings(
    /// The sentence: what is wrong, what was expected, what to do.
    pub String,
);
