//! Starts the two nodes of a row, and looks at them before and behind their connections.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use common::ids::Role;
use kv_connector::ClusterCa;

use super::PeersBenchArgs;
use super::holding::Holding;
use super::process::node;
use super::report::{End, Report, Row};
use crate::own_program::own_program;
use crate::usage::{Usage, of_process};

/// What the kernel and the nodes do about connections that were just made is over by then.
const SETTLE: Duration = Duration::from_secs(1);

/// Measures every row.
pub(super) fn measure(args: &PeersBenchArgs) -> anyhow::Result<Report> {
    let ca = ClusterCa::generate()?;
    // Removed however this ends: there are keys in it.
    let dir = tempfile::Builder::new().prefix("tandem-peers-bench-").tempdir().context("make a temporary folder")?;
    let mut report = Report { count: args.count, seconds: args.seconds, rows: Vec::new(), failures: Vec::new() };
    for holding in &args.holding {
        // Minutes of measuring are not lost because another kind of connection cannot be made.
        match measure_row(args, *holding, &ca, &dir.path().join(holding.as_str())) {
            Ok(row) => report.rows.push(row),
            Err(error) => report.failures.push((*holding, format!("{error:#}"))),
        }
    }
    Ok(report)
}

fn measure_row(args: &PeersBenchArgs, holding: Holding, ca: &ClusterCa, dir: &Path) -> anyhow::Result<Row> {
    ca.issue(Role::PrefillNode, &node(true))?.save(dir)?;
    ca.issue(holding.dialler(), &node(false))?.save(dir)?;
    std::fs::write(dir.join("ca.pem"), ca.certificate_pem()).context("write the CA's certificate")?;
    let (mut dialled, address) = NodeProcess::start(args, holding, dir, None)?;
    let address: SocketAddr =
        address.parse().with_context(|| format!("where the node listens: it said {address:?}"))?;
    let (mut dialler, _ready) = NodeProcess::start(args, holding, dir, Some(address))?;

    let before = [dialler.usage()?, dialled.usage()?];
    let dialled_at = Instant::now();
    dialler.tell("dial")?;
    let said = dialler.line()?;
    if said != "held" {
        bail!("the node that dials ended before it had {} connections: what it said is above", args.count);
    }
    let dialling = dialled_at.elapsed();
    std::thread::sleep(SETTLE);
    let held = [dialler.usage()?, dialled.usage()?];
    let watched_at = Instant::now();
    std::thread::sleep(Duration::from_secs(u64::from(args.seconds)));
    let idle = [dialler.usage()?, dialled.usage()?];
    let watched = watched_at.elapsed();
    let [dialler_end, dialled_end] = [0, 1].map(|end| End {
        resident_bytes: held[end].resident_bytes.saturating_sub(before[end].resident_bytes),
        cpu_seconds_to_dial: held[end].cpu_seconds - before[end].cpu_seconds,
        idle_cpu_share: (idle[end].cpu_seconds - held[end].cpu_seconds) / watched.as_secs_f64(),
    });
    dialler.end()?;
    dialled.end()?;
    Ok(Row { holding, dialling, dialler: dialler_end, dialled: dialled_end })
}

/// Killed with this value, unless it was ended.
struct NodeProcess {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl NodeProcess {
    /// A node, and what it said first.
    fn start(
        args: &PeersBenchArgs,
        holding: Holding,
        dir: &Path,
        dial: Option<SocketAddr>,
    ) -> anyhow::Result<(Self, String)> {
        let (program, role) = own_program()?;
        let mut command = Command::new(&program);
        command.args(role);
        command.arg("peers-node").arg("--identity").arg(dir).args(["--holding", holding.as_str()]);
        command.args(["--count", &args.count.to_string()]);
        if let Some(address) = dial {
            command.args(["--dial", &address.to_string()]);
        }
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.context("start a node")?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("the pipe that was asked for is there")?);
        let mut process = Self { child, stdin, stdout };
        let said = process.line()?;
        if said.is_empty() {
            bail!("a node did not start");
        }
        Ok((process, said))
    }

    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("it was ended already")?;
        writeln!(stdin, "{line}").context("tell a node")
    }

    /// The next line it says; empty if it has ended.
    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).context("hear from a node")?;
        Ok(line.trim().to_string())
    }

    fn usage(&self) -> anyhow::Result<Usage> {
        of_process(self.child.id()).context("there is no /proc to look at, or a node has ended")
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// If it found something wrong.
    fn end(&mut self) -> anyhow::Result<()> {
        drop(self.stdin.take());
        let status = self.child.wait().context("wait for a node")?;
        if status.success() { Ok(()) } else { bail!("a node ended with {status}") }
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // Fails if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
