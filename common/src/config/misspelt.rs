//! Names that nobody knows: the nearest one that somebody does.

use std::fmt;

use clap::builder::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Error};

use super::layers::known_settings;
use super::roles::UpArgs;

const PREFIX: &str = "TANDEM_";
/// Set without a flag: the file itself, a folder of rebuilt kernels, and what the project's tests and their build read.
const WITHOUT_A_FLAG: [&str; 5] = ["config", "cuda-kernels", "bin", "fibres-library", "host-driver-folder"];
/// So begin the others of the tests.
const OF_TESTS: &str = "test-";

/// A `TANDEM_` variable that sets nothing in any command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownVariable {
    name: String,
    near: Option<String>,
}

impl fmt::Display for UnknownVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the environment variable {} sets nothing: ", self.name)?;
        match &self.near {
            Some(near) => write!(f, "did you mean {near}?"),
            None => write!(f, "those that set something have the names of flags, as `--help` shows them"),
        }
    }
}

/// Those of `variables` (name and value) that look like settings and are none.
pub fn unknown_variables(variables: impl IntoIterator<Item = (String, String)>) -> Vec<UnknownVariable> {
    let mut known: Vec<String> = known_settings(&UpArgs::command()).into_values().flatten().collect();
    known.extend(WITHOUT_A_FLAG.map(str::to_owned));
    let unknown = |(name, value): (String, String)| {
        let key = name.strip_prefix(PREFIX)?.replace('_', "-").to_lowercase();
        if known.contains(&key) || key.starts_with(OF_TESTS) || is_of_kubernetes(&name, &value) {
            return None;
        }
        let near = near(&key, &known).map(|near| format!("{PREFIX}{}", near.replace('-', "_").to_uppercase()));
        Some(UnknownVariable { name, near })
    };
    variables.into_iter().filter_map(unknown).collect()
}

/// Kubernetes sets these in every container beside a service whose name begins with `tandem-`.
fn is_of_kubernetes(name: &str, value: &str) -> bool {
    let is_part = name.contains("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || name.contains("_PORT_");
    is_part || (name.ends_with("_PORT") && value.contains("://"))
}

/// Lets an error about an unknown flag suggest a known one only if it is near: clap's own measure finds
/// `--port` near `--gpu-memory-utilization`.
pub(super) fn with_near_suggestion(mut error: Error, command: &mut Command) -> Error {
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else { return error };
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let name = flag.trim_start_matches('-').to_owned();
    let known: Vec<String> = command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect();
    error.remove(ContextKind::SuggestedArg);
    if let Some(suggested) = near(&name, &known) {
        error.insert(ContextKind::SuggestedArg, ContextValue::String(format!("--{suggested}")));
    }
    error.insert(ContextKind::Usage, ContextValue::StyledStr(command.render_usage()));
    error
}

/// The nearest known name, if it is near enough to have been meant.
pub(super) fn near<'a>(name: &str, known: impl IntoIterator<Item = &'a String>) -> Option<String> {
    let nearest = nearest(name, known);
    let is_near = nearest.starts_with(name) || num_edits(name, &nearest) <= (name.len() / 3).max(2);
    is_near.then_some(nearest)
}

/// The known name that `name` begins, or else the one with the fewest edits.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a String>) -> String {
    let rank = |candidate: &&String| (!candidate.starts_with(name), num_edits(name, candidate));
    known.into_iter().min_by_key(rank).cloned().unwrap_or_default()
}

/// Levenshtein distance, one row at a time.
fn num_edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(variables: &[(&str, &str)]) -> Vec<String> {
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        unknown_variables(variables).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn misspelt_variable_is_told_with_the_nearest_name() {
        let known = [("TANDEM_BLOCK_SIZE", "1"), ("TANDEM_CONFIG", "x"), ("TANDEM_FABRIC_PORT", "1"), ("HOME", "/")];
        assert_eq!(told(&known), [""; 0]);
        assert_eq!(
            told(&[("TANDEM_BLOK_SIZE", "32"), ("TANDEM_API_KEYS", "s3cret")]),
            [
                "the environment variable TANDEM_BLOK_SIZE sets nothing: did you mean TANDEM_BLOCK_SIZE?",
                "the environment variable TANDEM_API_KEYS sets nothing: did you mean TANDEM_API_KEY?",
            ]
        );
    }

    #[test]
    fn what_is_set_without_a_flag_is_not_told() {
        let set =
            ["TANDEM_CUDA_KERNELS", "TANDEM_TEST_SEED", "TANDEM_TEST_NIXL", "TANDEM_BIN", "TANDEM_FIBRES_LIBRARY"];
        assert_eq!(told(&set.map(|name| (name, "x"))), [""; 0]);
        assert_eq!(
            told(&[("TANDEM_CUDA_KERNEL", "x")]),
            ["the environment variable TANDEM_CUDA_KERNEL sets nothing: did you mean TANDEM_CUDA_KERNELS?"]
        );
    }

    #[test]
    fn what_kubernetes_sets_beside_a_service_is_not_told() {
        let set = [
            ("TANDEM_PROXY_SERVICE_HOST", "10.0.0.1"),
            ("TANDEM_PROXY_SERVICE_PORT_HTTP", "8000"),
            ("TANDEM_PROXY_PORT", "tcp://10.0.0.1:8000"),
            ("TANDEM_PROXY_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ];
        assert_eq!(told(&set), [""; 0]);
        assert_eq!(told(&[("TANDEM_METRIC_PORT", "9000")]).len(), 1);
    }
}
