//! Which command, with which settings.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use common::config::{CertsArgs, DecodeNodeArgs, PrefillNodeArgs, ProxyArgs, UpArgs};
use tokio::runtime::Runtime;

use crate::{console, shutdown};

/// What still runs when a role is over gets so much time to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

const OVERVIEW: &str = "\
Tandem serves large language models with prefill and decode on separate nodes.

Usage: tandem [COMMAND] [OPTIONS]

Commands:
  up            A prefill node, a decode node and the proxy in one process (the default)
  proxy         The OpenAI endpoint
  prefill-node  Computes prompts
  decode-node   Generates tokens
  certs         Makes the cluster's CA and certificates
  bench         Measures the engine, or any endpoint under load
  model         Writes checkpoints of random weights to measure with

`tandem COMMAND --help` explains each command's options.
";

/// A role with a binary of its own.
#[derive(Debug, Clone, Copy)]
pub enum Alone {
    /// `proxy`
    Proxy,
    /// `prefill-node`
    PrefillNode,
    /// `decode-node`
    DecodeNode,
}

/// `tandem COMMAND ...`
pub fn run() -> ExitCode {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let command = args.get(1).and_then(|arg| arg.to_str()).unwrap_or("up").to_string();
    match command.as_str() {
        "--help" | "-h" | "help" => {
            print!("{OVERVIEW}");
            return ExitCode::SUCCESS;
        }
        "--version" | "-V" => {
            println!("tandem {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    // `tandem --port 0` is `tandem up --port 0`.
    let name = if command.starts_with('-') { "up".to_string() } else { command };
    if args.get(1).is_some_and(|arg| arg.to_str() == Some(&name)) {
        args.remove(1);
    }
    args[0] = OsString::from(format!("tandem {name}"));
    match name.as_str() {
        "up" => run_role(args, UpArgs::validate, crate::up::run),
        "proxy" => run_role(args, ProxyArgs::validate, crate::endpoint::run),
        "prefill-node" => run_role(args, PrefillNodeArgs::validate, crate::nodes::run_prefill_node),
        "decode-node" => run_role(args, DecodeNodeArgs::validate, crate::nodes::run_decode_node),
        "certs" => match settings(args, CertsArgs::validate).and_then(|args| crate::certs::run(&args)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        "bench" => {
            raise_file_limit();
            bench::run(args)
        }
        "model" => bench::run_model(args),
        other => {
            eprintln!("tandem: \"{other}\" is not a command.\n\n{OVERVIEW}");
            ExitCode::from(2)
        }
    }
}

/// The binaries `proxy`, `prefill-node` and `decode-node`.
pub fn run_alone(role: Alone) -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    match role {
        Alone::Proxy => run_role(args, ProxyArgs::validate, crate::endpoint::run),
        Alone::PrefillNode => run_role(args, PrefillNodeArgs::validate, crate::nodes::run_prefill_node),
        Alone::DecodeNode => run_role(args, DecodeNodeArgs::validate, crate::nodes::run_decode_node),
    }
}

fn settings<T: Parser>(
    args: Vec<OsString>,
    validate: impl Fn(&T) -> Result<(), common::config::InvalidSettings>,
) -> anyhow::Result<T> {
    let read_file = |path: &Path| std::fs::read_to_string(path);
    // What is no text stays set: a key must not become no key.
    let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let settings = match common::config::parse::<T>(args, variable, read_file) {
        Ok(settings) => settings,
        Err(common::config::ConfigError::Args(error)) => error.exit(),
        Err(error) => return Err(error.into()),
    };
    let variables = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let variables = variables.map(|(name, value)| (name, value.to_string_lossy().into_owned()));
    for unknown in common::config::unknown_variables(variables) {
        console::complain(format_args!("tandem: {unknown}"));
    }
    validate(&settings)?;
    Ok(settings)
}

fn run_role<T: Parser, F: Future<Output = anyhow::Result<()>>>(
    args: Vec<OsString>,
    validate: impl Fn(&T) -> Result<(), common::config::InvalidSettings>,
    role: impl FnOnce(T) -> F,
) -> ExitCode {
    let settings = match settings(args, validate) {
        Ok(settings) => settings,
        Err(error) => return fail(&error),
    };
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        // Only this function installs one, once per process.
        return fail(&anyhow::anyhow!("a crypto provider was installed before"));
    }
    raise_file_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("start the async runtime")),
    };
    let status = match runtime.block_on(role(settings)) {
        Ok(()) => 0,
        Err(error) => {
            complain(&error);
            1
        }
    };
    end(runtime, status)
}

/// Waits for what still runs: engines above all, which give back what they have of a device. What does not end in time
/// must not meet the process's exit handlers, behind which no call of CUDA is defined.
fn end(runtime: Runtime, status: u8) -> ExitCode {
    let told_at = Instant::now();
    runtime.shutdown_timeout(END_TIMEOUT);
    if told_at.elapsed() >= END_TIMEOUT {
        shutdown::leave_at_once(status);
    }
    ExitCode::from(status)
}

/// Each client connection is a file: the soft limit is often 1024, fewer than the proxy takes or a load opens.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        console::complain(format_args!("tandem: the limit of open files stays as it is: {error}"));
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    complain(error);
    ExitCode::FAILURE
}

fn complain(error: &anyhow::Error) {
    console::complain(format_args!("tandem: {}", told(error)));
}

/// The error and its causes, without those that the sentence before them quotes already.
fn told(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .reduce(|mut told, cause| {
            if !told.contains(&cause) {
                told.push_str(": ");
                told.push_str(&cause);
            }
            told
        })
        .unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_that_was_quoted_is_not_told_again() {
        let cause = || std::io::Error::other("disk full");
        let quoting =
            Err::<(), _>(cause()).context("cannot write a (disk full): make room").context("save").unwrap_err();
        assert_eq!(told(&quoting), "save: cannot write a (disk full): make room");
        let plain = Err::<(), _>(cause()).context("cannot write a").unwrap_err();
        assert_eq!(told(&plain), "cannot write a: disk full");
    }
}
