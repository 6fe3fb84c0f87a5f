//! This program, for the processes that a measurement starts of it.

use std::path::PathBuf;

use anyhow::Context as _;

/// Where it is, and the word before a command of the benchmarks, if this process was started with it: `tandem bench`,
/// whatever the file is called, and not the program of the benchmarks alone.
///
/// # Errors
/// If the system does not say where the program is.
pub(crate) fn own_program() -> anyhow::Result<(PathBuf, Option<&'static str>)> {
    let program = std::env::current_exe().context("find this program")?;
    let has_role = std::env::args_os().nth(1).is_some_and(|word| word == "bench");
    Ok((program, has_role.then_some("bench")))
}
