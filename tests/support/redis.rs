//! A Redis of a test's own: a child process on a free port of loopback that ends with the test, by its handle.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

/// A free port may be taken by somebody else before Redis has it.
const NUM_TRIES: usize = 5;

/// A running `redis-server` (Debian's package of that name, which `./test` installs).
pub(crate) struct Redis {
    child: Child,
    port: u16,
}

impl Redis {
    /// An empty one that keeps nothing on the disk.
    pub(crate) fn start() -> Self {
        for _ in 0..NUM_TRIES {
            let port =
                TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
            if let Some(redis) = Self::start_on(port) {
                return redis;
            }
        }
        panic!("redis-server did not start in {NUM_TRIES} tries");
    }

    /// None if it ended before it was ready, as when the port is taken.
    pub(crate) fn start_on(port: u16) -> Option<Self> {
        let mut child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "no"])
            .args(["--dir", env!("CARGO_TARGET_TMPDIR"), "--loglevel", "notice"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("redis-server can be started: it is Debian's package redis-server, and ./test installs it");
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut line = String::new();
        while stdout.read_line(&mut line).is_ok_and(|num_bytes| num_bytes > 0) {
            if line.contains("Ready to accept connections") {
                // What it says later must not fill the pipe.
                std::thread::spawn(move || std::io::copy(&mut stdout.by_ref(), &mut std::io::sink()));
                return Some(Self { child, port });
            }
            line.clear();
        }
        child.wait().expect("it has ended");
        None
    }

    /// For `--store-remote-url`.
    #[allow(dead_code, reason = "each test file uses a part of it")]
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0?root=tandem", self.port)
    }

    /// Where it listens.
    #[allow(dead_code, reason = "each test file uses a part of it")]
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// One command, in the inline form; its whole answer if that is one line.
    #[allow(dead_code, reason = "each test file uses a part of it")]
    pub(crate) fn command(&self, command: &str) -> String {
        use std::io::Write;
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        stream.write_all(format!("{command}\r\n").as_bytes()).expect("it reads");
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).expect("it answers");
        answer.trim_end().to_string()
    }

    /// SIGSTOP: it keeps its connections and answers nothing.
    #[allow(dead_code, reason = "each test file uses a part of it")]
    pub(crate) fn freeze(&self) {
        let status = Command::new("sh").args(["-c", &format!("kill -STOP {}", self.child.id())]).status();
        assert!(status.expect("a shell can be run").success());
    }

    /// SIGKILL.
    #[allow(dead_code, reason = "each test file uses a part of it")]
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it has ended");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
