//! Who a process is in the cluster, and where it listens.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::InvalidSettings;
use super::values::{HostPort, parse_duration, parse_port};
use crate::ids::NodeId;

/// Name, certificates and farewell of any process of the cluster.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Identity")]
pub struct IdentityArgs {
    /// Name in the cluster, unique, and the one in the certificate: a-z, 0-9 and '-'. Default: the role's name.
    #[arg(long, value_name = "NAME")]
    pub node_id: Option<NodeId>,

    /// Folder that `tandem certs` made: ca.pem, NAME.pem and NAME.key are read from it.
    #[arg(long, value_name = "FOLDER")]
    pub tls_dir: Option<PathBuf>,

    /// The cluster's CA certificate (PEM), instead of the one in --tls-dir.
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// This process's certificate chain (PEM), instead of the one in --tls-dir.
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert (PEM), instead of the one in --tls-dir.
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// How long running requests may go on after SIGTERM or Ctrl-C. 0s: they are cut at once.
    ///
    /// Longer loses fewer requests; shorter makes roll-outs quicker.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub drain_timeout: Duration,
}

/// The three files of mutual TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificate of the cluster's CA.
    pub ca: PathBuf,
    /// Certificate chain of this process.
    pub cert: PathBuf,
    /// Private key of `cert`.
    pub key: PathBuf,
}

impl IdentityArgs {
    /// The name in the cluster, `default` if none was given.
    pub fn node_id_or(&self, default: NodeId) -> NodeId {
        self.node_id.clone().unwrap_or(default)
    }

    /// Where the certificates of the process called `node` are.
    ///
    /// # Errors
    /// [`InvalidSettings`] if one of the three is given neither alone nor by --tls-dir.
    pub fn tls_paths(&self, node: &NodeId) -> Result<TlsPaths, InvalidSettings> {
        let pick = |given: &Option<PathBuf>, name: String, flag: &str| {
            given.clone().or_else(|| self.tls_dir.as_ref().map(|dir| dir.join(name))).ok_or_else(|| {
                InvalidSettings(format!(
                    "no certificates: {flag} is missing and there is no --tls-dir; make them with `tandem certs` and \
                     give its folder as --tls-dir"
                ))
            })
        };
        Ok(TlsPaths {
            ca: pick(&self.tls_ca, "ca.pem".into(), "--tls-ca")?,
            cert: pick(&self.tls_cert, format!("{node}.pem"), "--tls-cert")?,
            key: pick(&self.tls_key, format!("{node}.key"), "--tls-key")?,
        })
    }
}

/// Where a prefill or decode node listens, and to whom it announces itself.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Fabric")]
pub struct FabricArgs {
    /// Name and certificates.
    #[command(flatten)]
    pub identity: IdentityArgs,

    /// Address to listen on. 0.0.0.0 or :: takes connections from other hosts.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Fabric")]
    pub host: String,

    /// UDP port of control connections. 0 takes a free one: then the node must --register.
    #[arg(long, value_name = "PORT", default_value_t = 0, value_parser = parse_port, help_heading = "Fabric")]
    pub port: u16,

    /// Fabric address of a proxy to announce this node to, host:port; repeat it for several.
    ///
    /// Without it the proxy must list the node (--prefill-node, --decode-node).
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', help_heading = "Fabric")]
    pub register: Vec<HostPort>,

    /// Ways that KV may take from prefill to decode nodes: quic, or quic,shm.
    ///
    /// With shm at both ends, a decode node on the same host (and in the same network namespace, as the same
    /// user) reads KV where it lies in the prefill node's memory, in one pass and without encryption; any other
    /// pair of nodes uses quic. Nodes joined by shm are one trust domain: each decode node can read the whole
    /// KV pool of the prefill node. The pool of a prefill node with shm is in huge pages only if
    /// /sys/kernel/mm/transparent_hugepage/shmem_enabled says advise. quic alone turns shm off.
    #[arg(
        long,
        value_enum,
        value_name = "TRANSPORTS",
        value_delimiter = ',',
        default_values_t = [KvTransport::Quic, KvTransport::Shm],
        help_heading = "Fabric"
    )]
    pub kv_transports: Vec<KvTransport>,

    /// TCP port of the node's own /metrics and /health on --host. 0 takes a free one. Default: off.
    #[arg(long, value_name = "PORT", value_parser = parse_port, help_heading = "Fabric")]
    pub metrics_port: Option<u16>,
}

/// A way that KV may take between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvTransport {
    /// Serves between any two nodes.
    Quic,
    /// Memory of the prefill node that a decode node on the same host reads.
    Shm,
}

impl KvTransport {
    /// Checks a node's list.
    ///
    /// # Errors
    /// [`InvalidSettings`] without quic.
    pub fn check(transports: &[KvTransport]) -> Result<(), InvalidSettings> {
        if transports.contains(&KvTransport::Quic) {
            return Ok(());
        }
        Err(InvalidSettings(
            "--kv-transports lists shm alone: add quic, which is what serves between hosts and wherever shm cannot be had"
                .into(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quic_is_always_among_the_transports() {
        assert!(KvTransport::check(&[KvTransport::Quic]).is_ok());
        assert!(KvTransport::check(&[KvTransport::Shm, KvTransport::Quic]).is_ok());
        assert!(KvTransport::check(&[KvTransport::Shm]).unwrap_err().0.contains("add quic"));
    }
}
