//! Where figures come from: a number without its command, commit and machine is not to be trusted.

use std::ffi::OsString;

use serde_json::{Value, json};

/// Command, commit and machine of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// What was run.
    pub command: String,
    /// The commit of the repository it was run in, with `-dirty` behind it if files differ from it; `None`
    /// outside of one.
    pub commit: Option<String>,
    /// The processor's name.
    pub cpu_model: Option<String>,
    /// Cores that the generator may use.
    pub num_cores: Option<usize>,
}

impl Provenance {
    /// Of this process, here and now.
    pub fn of_process(args: &[OsString]) -> Self {
        let git = std::process::Command::new("git")
            .args(["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
            .output();
        let commit = git.ok().filter(|output| output.status.success());
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            command: command_line(args),
            commit: commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string()),
            cpu_model: cpu_model(&cpuinfo),
            num_cores: std::thread::available_parallelism().ok().map(usize::from),
        }
    }

    /// As part of a result.
    pub fn to_json(&self) -> Value {
        json!({
            "command": self.command,
            "commit": self.commit,
            "machine": {"cpu_model": self.cpu_model, "num_cores": self.num_cores},
        })
    }
}

/// A line that a shell takes. The program's name may have a space of its own (`tandem bench`).
fn command_line(args: &[OsString]) -> String {
    let is_plain =
        |text: &str| !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "-_./:,=+%@".contains(c));
    let words = args.iter().enumerate().map(|(index, arg)| {
        let text = arg.to_string_lossy();
        if index == 0 || is_plain(&text) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
    });
    words.collect::<Vec<_>>().join(" ")
}

fn cpu_model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_can_be_pasted() {
        let args = ["tandem bench", "serve", "--model", "it's", "--base-url", "http://h:1", ""].map(OsString::from);
        assert_eq!(command_line(&args), r"tandem bench serve --model 'it'\''s' --base-url http://h:1 ''");
    }

    #[test]
    fn the_processor_is_named_by_its_first_core() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A CPU: fast\nprocessor\t: 1\nmodel name\t: B\n";
        assert_eq!(cpu_model(cpuinfo).as_deref(), Some("A CPU: fast"));
        assert_eq!(cpu_model("Hardware : board"), None);
    }
}
