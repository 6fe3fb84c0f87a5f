//! One process of the binary under test: started, watched, signalled and ended by its id.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::wait;

/// Lines of a log that are printed when a test fails.
const LOG_TAIL_LINES: usize = 150;

/// The binary under test.
pub(crate) const TANDEM: &str = env!("CARGO_BIN_EXE_tandem");
/// The repository's root, where every process runs.
pub(crate) const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A command of the binary under test, with nothing of the caller's settings.
pub(crate) fn tandem() -> Command {
    let mut command = Command::new(TANDEM);
    command.current_dir(ROOT).stdin(Stdio::null()).env("NO_COLOR", "1");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TANDEM_") {
            command.env_remove(name);
        }
    }
    command
}

/// Variables and their values.
pub(crate) type Environment = [(&'static str, String)];

/// A running process. Killed when dropped.
pub(crate) struct Process {
    name: String,
    child: Child,
    stdout: Arc<Mutex<Vec<String>>>,
    log: PathBuf,
    exit: Option<ExitStatus>,
}

impl Process {
    /// Starts `tandem` with `args`; its log goes to `dir`.
    pub(crate) fn start(name: &str, args: &[String], dir: &Path) -> Self {
        Self::start_in(name, args, dir, &[])
    }

    /// The same with an environment.
    pub(crate) fn start_in(name: &str, args: &[String], dir: &Path, environment: &Environment) -> Self {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("the log file can be made");
        Self::spawn(name, args, log, environment, Stdio::from(file))
    }

    /// One whose log goes into a pipe that nobody reads any more.
    pub(crate) fn start_unread(name: &str, args: &[String], dir: &Path) -> Self {
        let mut process = Self::spawn(name, args, dir.join("nothing.log"), &[], Stdio::piped());
        drop(process.child.stderr.take());
        process
    }

    fn spawn(name: &str, args: &[String], log: PathBuf, environment: &Environment, stderr: Stdio) -> Self {
        let mut child = tandem()
            .args(args)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {TANDEM}: {error}"));
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let reader = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let seen = lines.clone();
        std::thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                seen.lock().unwrap().push(line);
            }
        });
        Self { name: name.to_string(), child, stdout: lines, log, exit: None }
    }

    /// Its name in logs and messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed on stdout so far.
    pub(crate) fn stdout(&self) -> Vec<String> {
        self.stdout.lock().unwrap().clone()
    }

    /// What it has logged so far, over all its lives.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for a line on stdout for which `find` has an answer.
    pub(crate) async fn stdout_line<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let what = format!("{} prints {what}", self.name);
        wait::until(&what, wait::SOON, async || {
            let lines = self.stdout();
            if let Some(found) = lines.iter().find_map(|line| find(line)) {
                return Ok(found);
            }
            if let Some(status) = self.exit_status() {
                panic!("{} left with {status} before it printed {what}\n{}", self.name, self.tail());
            }
            Err(format!("it printed {lines:?}"))
        })
        .await
    }

    /// Waits for a line of the log for which `find` has an answer.
    pub(crate) async fn log_line<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let what = format!("{} logs {what}", self.name);
        wait::until(&what, wait::SOON, async || {
            self.log().lines().find_map(&find).ok_or_else(|| format!("its log:\n{}", self.tail()))
        })
        .await
    }

    /// Its status if it has ended.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        if self.exit.is_none() {
            self.exit = self.child.try_wait().expect("a child can be waited for");
        }
        self.exit
    }

    /// Whether it runs, or is stopped.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.exit_status().is_none()
    }

    /// Waits for its end.
    pub(crate) async fn exited(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("{} ends", self.name);
        wait::until(&what, deadline, async || self.exit_status().ok_or_else(|| self.tail())).await
    }

    /// Asks it to drain and leave.
    pub(crate) fn terminate(&mut self) {
        self.signal(libc::SIGTERM);
    }

    /// Ctrl-C.
    pub(crate) fn interrupt(&mut self) {
        self.signal(libc::SIGINT);
    }

    /// Freezes it.
    pub(crate) fn freeze(&mut self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets it go on.
    pub(crate) fn thaw(&mut self) {
        self.signal(libc::SIGCONT);
    }

    /// Ends it at once and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        if self.exit.is_none() {
            // It may have ended by itself in this moment.
            let _ = self.child.kill();
            self.exit = self.child.wait().ok();
        }
    }

    fn signal(&mut self, signal: i32) {
        assert!(self.is_alive(), "{} has left\n{}", self.name, self.tail());
        let id = i32::try_from(self.child.id()).expect("process ids fit 31 bits");
        // SAFETY: `kill` takes two integers; the id is that of a child that has not been waited for, so it
        // cannot have been given to another process.
        let result = unsafe { libc::kill(id, signal) };
        assert_eq!(result, 0, "signal {signal} to {}", self.name);
    }

    /// The end of its log.
    pub(crate) fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(LOG_TAIL_LINES);
        format!("---- {} ({}), last lines of its log\n{}", self.name, self.child.id(), lines[from..].join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            println!("{}\n---- its stdout\n{}", self.tail(), self.stdout().join("\n"));
        }
    }
}
