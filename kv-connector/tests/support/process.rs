//! A test's other process: a test of the same binary, which is run by it alone.
#![allow(dead_code, unreachable_pub, unsafe_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use kv_connector::{ClusterCa, Fabric};

use super::Cluster;

const CA_FOLDER: &str = "TANDEM_TEST_CA";
const LISTENS: &str = "listens ";

/// It ends with this.
pub struct OtherProcess {
    child: Child,
    folder: PathBuf,
    /// Where its fabric listens.
    pub address: SocketAddr,
}

impl OtherProcess {
    /// Runs the ignored test `name` as a process of `cluster`; returns when it [listens](tell_address).
    pub fn start(name: &str, cluster: &Cluster) -> Self {
        Self::start_with(name, cluster, &[])
    }

    /// As [`start`](Self::start), with variables in its environment.
    pub fn start_with(name: &str, cluster: &Cluster, variables: &[(&str, &str)]) -> Self {
        let folder = std::env::temp_dir().join(format!("tandem-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        cluster.ca.save(&folder).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--ignored", "--nocapture"])
            .env(CA_FOLDER, &folder)
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address =
            lines.find_map(|line| line.unwrap().strip_prefix(LISTENS).map(|address| address.parse().unwrap()));
        Self { child, folder, address: address.unwrap() }
    }

    /// From now on it does nothing, and is not gone.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// It goes on.
    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        // SAFETY: an integer call; the process is our child, which was not waited for.
        let sent = unsafe { libc::kill(self.child.id() as i32, signal) };
        assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for OtherProcess {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait(), std::fs::remove_dir_all(&self.folder));
    }
}

/// Runs the ignored test `name` in a process with `variables`, and fails if it does.
pub fn run_alone(name: &str, variables: &[(&str, &str)]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]).envs(variables.iter().copied());
    let status = command.status().unwrap();
    assert!(status.success(), "{name} with {variables:?}: {status}");
}

/// In the other process: the cluster that it belongs to.
pub fn cluster() -> Cluster {
    let folder = PathBuf::from(std::env::var_os(CA_FOLDER).expect("it is run by another test"));
    Cluster { ca: ClusterCa::load(&folder).unwrap() }
}

/// In the other process: what it is waited for.
pub fn tell_address(fabric: &Fabric) {
    println!("\n{LISTENS}{}", fabric.local_addr());
}
