//! What is compared or swept: an endpoint that is there, or a command that starts one.
//!
//! 1. This file: what a set-up is, from a TOML file. 2. [`server`]: its process, from start to end.
//! 3. [`rounds`]: several set-ups in turn.

pub mod rounds;
pub mod server;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

/// Set-ups of one file: more are no comparison that anybody reads.
const NUM_SETUPS_MAX: usize = 16;

/// A file of set-ups: `[[setup]]` tables.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SetupFile {
    setup: Vec<Setup>,
}

/// One way to serve.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// What reports call it.
    pub name: String,
    /// Where it answers.
    pub base_url: String,
    /// The command that starts it and runs until it is told to end; without one the endpoint must be there.
    pub start: Option<Vec<String>>,
    /// Further variables of the command's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Flags of `bench serve` that only this one needs, such as the model's name.
    #[serde(default)]
    pub flags: Vec<String>,
    /// How long it may take until it answers.
    #[serde(default = "default_ready_seconds")]
    pub ready_seconds: u64,
}

fn default_ready_seconds() -> u64 {
    300
}

/// The set-ups of a file, in its order.
///
/// # Errors
/// If it cannot be read, is not of the format, or two have the same name.
pub fn read(path: &Path) -> anyhow::Result<Vec<Setup>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read the set-ups of {}", path.display()))?;
    parse(&text).with_context(|| format!("read the set-ups of {}", path.display()))
}

fn parse(text: &str) -> anyhow::Result<Vec<Setup>> {
    let setups = toml::from_str::<SetupFile>(text)?.setup;
    anyhow::ensure!(
        (1..=NUM_SETUPS_MAX).contains(&setups.len()),
        "there are {} set-ups, expected 1 to {NUM_SETUPS_MAX}",
        setups.len()
    );
    for (index, setup) in setups.iter().enumerate() {
        let is_plain =
            !setup.name.is_empty() && setup.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        anyhow::ensure!(is_plain, "name = \"{}\" is no name: expected letters, digits, - _ .", setup.name);
        let is_new = setups[..index].iter().all(|other| other.name != setup.name);
        anyhow::ensure!(is_new, "two set-ups are called {}", setup.name);
        anyhow::ensure!(setup.start.as_ref().is_none_or(|start| !start.is_empty()), "start of {} is empty", setup.name);
        anyhow::ensure!((1..=86_400).contains(&setup.ready_seconds), "ready_seconds is not 1 to 86400");
    }
    Ok(setups)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_setups_is_read_and_what_is_wrong_is_said() {
        let text = "[[setup]]\nname = 'split'\nbase_url = 'http://h:1'\nstart = ['tandem', 'up']\n\
                    [[setup]]\nname = 'peer'\nbase_url = 'http://h:2'\nflags = ['--model', 'm']\n";
        let setups = parse(text).unwrap();
        assert_eq!((setups[0].start.as_ref().unwrap().len(), setups[1].flags.len()), (2, 2));
        assert_eq!(setups[1].ready_seconds, 300);
        let twice = text.replace("peer", "split");
        let wrong = text.replace("peer", "a b");
        let unknown = text.replace("flags", "flag");
        for (text, expected) in
            [(&*twice, "two set-ups"), (&wrong, "no name"), (&unknown, "unknown field"), ("", "setup")]
        {
            let reason = format!("{:#}", parse(text).unwrap_err());
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
