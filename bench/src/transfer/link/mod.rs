//! A link between the two processes of a transfer: round trip time, loss and a rate, for QUIC and TCP alike.
//!
//! ```text
//! receiver 10.77.0.1 ──> 10.77.1.2 ┐                      ┌ 10.77.1.1 ──> 10.77.0.2 sender
//!                                  └──> TUN ──> process ──┘
//! receiver 10.77.0.1 <── 10.77.1.2 ┌── TUN <── process <──┐ 10.77.1.1 <── 10.77.0.2 sender
//!                                  └                      ┘
//! ```
//!
//! Everything runs in a network namespace of its own, in which one TUN device leads to the addresses under which the
//! two ends know each other. A process reads the packets there, holds them as long as the link takes, drops those that
//! it loses, and puts them back with source and destination translated, so that the kernel delivers them to the other
//! end. Translating swaps one byte of the two addresses, which changes no checksum. The kernel takes packets of
//! TCP and of UDP for what they are, segmented to the device's MTU, so both protocols see the same link.
//!
//! Needed are `/dev/net/tun`, `ip` of iproute2 and `unshare` of util-linux; root is not, where users may have
//! namespaces.
//!
//! 1. `path`: what becomes of a packet. 2. `process`: the process between the ends.

mod path;
mod process;

use std::ffi::OsString;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use common::config::values::{parse_bytes_above_zero, parse_duration};
use kv_connector::FabricConfig;

use crate::kv_workload::DEADLINE;
use crate::own_program::own_program;

pub use process::run_link;
pub(super) use process::set_congestion_control;

/// Where the receiver is, and where the sender.
pub(super) const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub(super) const SENDER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The third byte of an address as its owner has it, and as the other end knows it.
const NEAR: u8 = 0;
const FAR: u8 = 1;

/// A link to emulate; none without `--rtt`.
#[derive(Debug, Clone, Args)]
pub struct LinkArgs {
    /// Measure over an emulated link with this round trip time, TCP too, instead of over loopback. shm, which is for
    /// one host, is left out. Needs /dev/net/tun, and root or user namespaces.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub rtt: Option<Duration>,
    /// Share of packets that the link loses, each way: 0.001 is one of a thousand.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = parse_loss, requires = "rtt")]
    pub loss: f64,
    /// Bits per second that the link carries, each way, IP headers included: 2Gbit for example. Default: unlimited.
    #[arg(long, value_name = "RATE", value_parser = parse_rate, requires = "rtt")]
    pub rate: Option<u64>,
    /// Bytes that wait in front of the link before packets are dropped; it has a queue only with --rate.
    #[arg(long, value_name = "BYTES", default_value = "1MiB", value_parser = parse_bytes_above_zero, requires = "rtt")]
    pub queue_bytes: u64,
    /// Largest IP packet of the link.
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u16).range(1280..), requires = "rtt")]
    pub mtu: u16,
    /// Which packets are lost.
    #[arg(long, value_name = "SEED", default_value_t = 0, requires = "rtt")]
    pub link_seed: u64,
    /// This process was started within the link's namespace.
    #[arg(long, hide = true)]
    pub is_in_namespace: bool,
}

/// The process between the ends; started by `transfer`, not by people.
#[derive(Debug, Args)]
pub struct TransferLinkArgs {
    /// What it emulates.
    #[command(flatten)]
    pub link: LinkArgs,
}

impl LinkArgs {
    /// Bytes per second of KV that the link could carry if there were no headers.
    pub(super) fn bytes_per_second(&self) -> Option<f64> {
        self.rate.map(|bits_per_second| bits_per_second as f64 / 8.0)
    }

    fn to_words(&self) -> Vec<String> {
        let mut words = vec![format!("--rtt={}us", self.rtt.unwrap_or_default().as_micros())];
        words.push(format!("--loss={}", self.loss));
        words.extend(self.rate.map(|rate| format!("--rate={rate}bit")));
        words.push(format!("--queue-bytes={}", self.queue_bytes));
        words.push(format!("--mtu={}", self.mtu));
        words.push(format!("--link-seed={}", self.link_seed));
        words
    }
}

impl fmt::Display for LinkArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rtt, loss, rate, queue_bytes, mtu, link_seed, .. } = self;
        write!(f, "a link of {:?} and {} % loss, packets of {mtu} bytes", rtt.unwrap_or_default(), loss * 100.0)?;
        if let Some(rate) = rate {
            write!(f, ", {} Mbit/s behind a queue of {} KiB", *rate as f64 / 1e6, queue_bytes / 1024)?;
        }
        write!(f, ", seed {link_seed}")
    }
}

/// Starts this program with the same arguments once more, in a network namespace of its own. Returns only if that
/// fails.
///
/// # Errors
/// Always.
pub(super) fn enter_namespace() -> anyhow::Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new("unshare");
    // Root keeps the right to put the link before others; a user becomes root of the new namespace only.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--net", "--"]).arg(program).args(std::env::args_os().skip(1)).arg("--is-in-namespace");
    Err(command.exec()).context("make a network namespace with unshare, which util-linux has")
}

/// The running process of a link. Killed with this value, unless it was ended.
pub(super) struct Link {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Link {
    /// Returns when packets get through.
    pub(super) fn start(args: &LinkArgs) -> anyhow::Result<Self> {
        let (program, role) = own_program()?;
        let mut words: Vec<OsString> = vec![program.into()];
        words.extend(role.map(OsString::from));
        words.push("transfer-link".into());
        words.extend(args.to_words().into_iter().map(OsString::from));
        // It stands for a network, which waits for no core: before the two ends, if this user may.
        if Command::new("chrt").args(["--rr", "1", "true"]).output().is_ok_and(|output| output.status.success()) {
            words.splice(0..0, ["chrt", "--rr", "1"].map(OsString::from));
        }
        let spawned = Command::new(&words[0]).args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.context("start the link")?;
        let stdout = BufReader::new(child.stdout.take().context("the pipe that was asked for is there")?);
        let mut link = Self { child, stdout };
        match link.line()?.as_str() {
            "ready" => Ok(link),
            _ => bail!("the link did not start: what it said is above"),
        }
    }

    /// Ends it; says what became of the packets.
    pub(super) fn end(mut self) -> anyhow::Result<String> {
        drop(self.child.stdin.take());
        self.line()
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).context("hear from the link")?;
        Ok(line.trim().to_string())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Fails if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is measured is how fast KV crosses the link, not how soon a bad one is given up.
pub(super) fn be_patient(config: &mut FabricConfig) {
    config.limits.hello_deadline = DEADLINE;
    config.limits.idle_timeout = DEADLINE;
    config.limits.extent_deadline = DEADLINE;
}

/// Where the receiver finds what listens at `addr`, an address of the sender.
pub(super) fn far(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(ip) if ip == SENDER => {
            let [a, b, _, d] = ip.octets();
            SocketAddr::from(([a, b, FAR, d], addr.port()))
        }
        _ => addr,
    }
}

fn parse_loss(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(loss) if (0.0..=0.5).contains(&loss) => Ok(loss),
        _ => Err("is not a share of packets: expected a number from 0 to 0.5, such as 0.001".into()),
    }
}

fn parse_rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a rate: expected one such as 500Mbit or 2Gbit");
    let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_len);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "bit" => 1.0,
        "kbit" => 1e3,
        "mbit" => 1e6,
        "gbit" => 1e9,
        _ => return Err(wrong()),
    };
    let bits_per_second = number.parse::<f64>().map_err(|_| wrong())? * factor;
    // Slower, a packet takes longer than anybody waits; faster, the clock's ticks are too coarse.
    if (1e5..=1e12).contains(&bits_per_second) {
        Ok(bits_per_second as u64)
    } else {
        Err(format!("{text} is out of range: use 100kbit to 1000Gbit"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        link: LinkArgs,
    }

    #[test]
    fn process_of_the_link_is_told_all_that_was_asked_for() {
        let asked = ["", "--rtt", "1.5ms", "--loss", "0.001", "--rate", "2Gbit", "--mtu", "9000", "--link-seed", "7"];
        let link = Command::parse_from(asked).link;
        assert_eq!((link.rtt, link.rate), (Some(Duration::from_micros(1500)), Some(2_000_000_000)));
        let told = Command::parse_from([String::new()].into_iter().chain(link.to_words())).link;
        assert_eq!(format!("{told:?}"), format!("{link:?}"));
        let without_rate = Command::parse_from(["", "--rtt", "0s"]).link;
        assert_eq!(without_rate.bytes_per_second(), None);
        let told = Command::parse_from([String::new()].into_iter().chain(without_rate.to_words())).link;
        assert_eq!(format!("{told:?}"), format!("{without_rate:?}"));
    }

    #[test]
    fn links_that_cannot_be_are_refused_in_words() {
        for (flags, reason) in [
            (vec!["--loss", "0.1"], "--rtt"),
            (vec!["--rtt", "1ms", "--loss", "1.5"], "from 0 to 0.5"),
            (vec!["--rtt", "1ms", "--rate", "2"], "such as 500Mbit or 2Gbit"),
            (vec!["--rtt", "1ms", "--rate", "1bit"], "use 100kbit to 1000Gbit"),
            (vec!["--rtt", "1ms", "--mtu", "1000"], "1280"),
        ] {
            let error = Command::try_parse_from(std::iter::once("").chain(flags)).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn only_the_sender_is_at_the_far_end() {
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(far(addr("10.77.0.2:443")), addr("10.77.1.2:443"));
        assert_eq!(far(addr("127.0.0.1:443")), addr("127.0.0.1:443"));
    }
}
