//! `tandem certs`: the cluster's CA and a certificate for each process.

use std::time::Duration;

use anyhow::Context;
use common::config::CertsArgs;
use common::ids::{NodeId, Role};
use kv_connector::certs::ClusterCa;

/// Makes what `args` asks for and prints what was written.
///
/// # Errors
/// If a file cannot be read or written.
pub fn run(args: &CertsArgs) -> anyhow::Result<()> {
    let ca = if args.dir.join("ca.key").exists() {
        ClusterCa::load(&args.dir).context("use the CA that is there already")?
    } else {
        let ca = ClusterCa::generate().context("make a CA")?;
        ca.save(&args.dir).context("write the new CA")?;
        println!(
            "{}: a new CA. Keep ca.key off the nodes: they need ca.pem and their own two files.",
            args.dir.display()
        );
        ca
    };
    let roles: [(Role, &Vec<NodeId>); 3] =
        [(Role::PrefillNode, &args.prefill_node), (Role::DecodeNode, &args.decode_node), (Role::Proxy, &args.proxy)];
    let valid_for = Duration::from_secs(u64::from(args.days) * 24 * 3600);
    for (role, nodes) in roles {
        for node in nodes {
            let identity = ca.issue_for(role, node, valid_for).context("make a certificate")?;
            identity.save(&args.dir).with_context(|| format!("write the certificate of {node}"))?;
            println!("{0}: {1}.pem, {1}.key ({role}, {2} days)", args.dir.display(), node, args.days);
        }
    }
    Ok(())
}
