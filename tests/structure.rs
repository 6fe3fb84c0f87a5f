//! What no compiler checks: which crate may know which, where `unsafe` may stand, and that no test sleeps.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Who may know whom among the workspace's crates; `docs/architecture.md` says why.
const MAY_KNOW: [(&str, &[&str]); 9] = [
    ("common", &[]),
    ("kernels", &[]),
    ("engine", &["common", "kernels"]),
    ("kv-connector", &["common"]),
    ("prefill-node", &["common", "engine", "kv-connector"]),
    ("decode-node", &["common", "engine", "kv-connector"]),
    ("proxy", &["common", "kv-connector"]),
    ("bench", &["common", "engine", "kv-connector"]),
    ("tandem", &["bench", "common", "decode-node", "engine", "kernels", "kv-connector", "prefill-node", "proxy"]),
];

/// Who else may be known to a crate's tests: both ends of a hand-over, in one process; the host as a device.
const TESTS_MAY_KNOW: [(&str, &str); 2] = [("decode-node", "prefill-node"), ("bench", "kernels")];

/// What the crates without I/O must not know from outside either.
const PURE_CRATES: [&str; 2] = ["common", "kernels"];
const IO_CRATES: [&str; 9] = ["tokio", "quinn", "axum", "reqwest", "rustls", "futures", "metrics", "tracing", "hyper"];

/// Dependencies of each workspace crate, those of tests and build scripts included, but for what
/// [`TESTS_MAY_KNOW`] names.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1"])
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let names = |package: &Value| {
        let dependencies = package["dependencies"].as_array().unwrap();
        let name = |named: &Value| named["name"].as_str().unwrap().to_string();
        let is_tests = |dependency: &&Value| {
            let pair = (&name(package)[..], &name(dependency)[..]);
            dependency["kind"] == "dev" && TESTS_MAY_KNOW.contains(&pair)
        };
        dependencies.iter().filter(|dependency| !is_tests(dependency)).map(name).collect()
    };
    let packages = metadata["packages"].as_array().unwrap();
    packages.iter().map(|package| (package["name"].as_str().unwrap().to_string(), names(package))).collect()
}

#[test]
fn dependencies_run_one_way() {
    let dependencies = dependencies();
    let rules: BTreeMap<&str, &[&str]> = MAY_KNOW.into();
    let crates: BTreeSet<&str> = dependencies.keys().map(String::as_str).collect();
    assert_eq!(crates, rules.keys().copied().collect(), "every crate of the workspace has a rule, and only those");
    for (name, known) in &dependencies {
        for other in known.iter().filter(|other| crates.contains(other.as_str())) {
            assert!(rules[name.as_str()].contains(&other.as_str()), "{name} must not know {other}");
        }
    }
    for name in PURE_CRATES {
        for other in IO_CRATES {
            assert!(!dependencies[name].contains(other), "{name} does no I/O, so it must not know {other}");
        }
    }
}

/// All files below `dir` with this ending.
fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn crate_folders() -> Vec<PathBuf> {
    let members = MAY_KNOW.iter().map(|(name, _)| if *name == "tandem" { "." } else { name });
    members.map(|name| Path::new(ROOT).join(name)).collect()
}

/// Crates that map memory or call intrinsics. Each names the modules that may.
const CRATES_WITH_UNSAFE: [&str; 3] = ["kernels", "kv-connector", "engine"];

#[test]
fn unsafe_code_is_forbidden_or_named() {
    for folder in crate_folders() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let lib = std::fs::read_to_string(folder.join("src/lib.rs")).unwrap();
        let has_own_rule = CRATES_WITH_UNSAFE.contains(&name.as_str()) && lib.contains("#![deny(unsafe_");
        assert!(
            lib.contains("#![forbid(unsafe_code)]") || has_own_rule,
            "{}: expected #![forbid(unsafe_code)] (or deny, in {CRATES_WITH_UNSAFE:?})",
            folder.join("src/lib.rs").display()
        );
    }
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let folders: Vec<PathBuf> =
        crate_folders().iter().flat_map(|folder| [folder.join("src"), folder.join("tests")]).collect();
    for path in folders.iter().flat_map(|folder| files(folder, "rs")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !(code.contains("unsafe {") || code.contains("unsafe impl")) || path.ends_with("tests/structure.rs") {
                continue;
            }
            // One sentence may cover a few blocks in a row.
            let above = &lines[index.saturating_sub(12)..=index];
            assert!(above.iter().any(|line| line.contains("SAFETY:")), "{}:{}: no SAFETY:", path.display(), index + 1);
        }
    }
}

/// Where a condition that no event announces is looked at again and again, with a deadline.
const MAY_SLEEP: [&str; 2] = ["tests/support/wait.rs", "kv-connector/tests/support/mod.rs"];

#[test]
fn no_test_sleeps() {
    let mut sources: Vec<(PathBuf, String)> = Vec::new();
    for folder in crate_folders() {
        for path in files(&folder.join("tests"), "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            sources.push((path, text));
        }
        for path in files(&folder.join("src"), "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            if let Some(from) = text.find("#[cfg(test)]\nmod ") {
                let tests = text[from..].to_string();
                sources.push((path, tests));
            }
        }
    }
    assert!(!sources.is_empty());
    for (path, text) in sources {
        if MAY_SLEEP.iter().any(|allowed| path.ends_with(allowed)) || path.ends_with("tests/structure.rs") {
            continue;
        }
        // Under paused time nothing is waited for.
        let is_paused = text.contains("start_paused = true") || text.contains("time::pause()");
        let sleeps = text.lines().find(|line| line.contains("thread::sleep(") || line.contains("time::sleep("));
        assert!(is_paused || sleeps.is_none(), "{} sleeps: {}", path.display(), sleeps.unwrap_or_default());
    }
}
