//! Processes on cores of their own, by `taskset`.

use std::path::Path;
use std::process::Command;

/// Pins this process to the first core of two; the second, for the other processes, if that worked.
pub(crate) fn pin(cores: &[usize]) -> Option<usize> {
    let [own, others] = *cores else { return None };
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    if own == others || own.max(others) >= available {
        return None;
    }
    let pid = std::process::id().to_string();
    let pinned = Command::new("taskset").args(["-apc", &own.to_string(), &pid]).output();
    pinned.is_ok_and(|output| output.status.success()).then_some(others)
}

/// `program`, on this core if there is one for it.
pub(crate) fn on_core(core: Option<usize>, program: &Path) -> Command {
    let Some(core) = core else { return Command::new(program) };
    let mut command = Command::new("taskset");
    command.args(["-c", &core.to_string()]).arg(program);
    command
}
