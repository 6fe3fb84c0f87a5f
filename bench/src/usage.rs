//! What processes have taken: CPU time and memory, from `/proc`.

use std::collections::BTreeMap;
use std::path::Path;

/// Of one process or several, with the CPU time of the children they have waited for.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// User and system time.
    pub cpu_seconds: f64,
    /// Resident memory now; what several share counts for each.
    pub resident_bytes: u64,
}

impl Usage {
    /// Of several together.
    pub fn sum<'a>(usages: impl IntoIterator<Item = &'a Self>) -> Self {
        usages.into_iter().fold(Self::default(), |sum, usage| Self {
            cpu_seconds: sum.cpu_seconds + usage.cpu_seconds,
            resident_bytes: sum.resident_bytes + usage.resident_bytes,
        })
    }
}

/// Of a process; `None` where it is not there, or no `/proc`.
pub fn of_process(pid: u32) -> Option<Usage> {
    Some(Stat::read(&Path::new("/proc").join(pid.to_string()))?.usage())
}

/// Of all processes of the group that `leader` leads, by what they are called: those of one name together. `None`
/// where there is no such group, or no `/proc`.
pub fn of_group(leader: u32) -> Option<BTreeMap<String, Usage>> {
    let mut by_name = BTreeMap::<String, Usage>::new();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        if !entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        // A process may end while it is looked at.
        let Some(stat) = Stat::read(&entry.path()).filter(|stat| stat.group == leader) else { continue };
        let command_line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let sum = by_name.entry(name(&command_line)).or_default();
        *sum = Usage::sum([&*sum, &stat.usage()]);
    }
    (!by_name.is_empty()).then_some(by_name)
}

/// CPU seconds that processes took from one look at their group to another, by what they are called.
pub fn cpu_seconds_between(before: &BTreeMap<String, Usage>, after: &BTreeMap<String, Usage>) -> BTreeMap<String, f64> {
    let since = |(name, usage): (&String, &Usage)| {
        let already = before.get(name).copied().unwrap_or_default();
        // What has ended takes its time away from the sum.
        (name.clone(), (usage.cpu_seconds - already.cpu_seconds).max(0.0))
    };
    after.iter().map(since).collect()
}

/// The program and its first argument, which says what it is to do; of paths the last part.
fn name(command_line: &[u8]) -> String {
    let words: Vec<String> = command_line
        .split(|byte| *byte == 0)
        .take(2)
        .map(|word| String::from_utf8_lossy(word))
        .map(|word| word.rsplit('/').next().unwrap_or_default().to_owned())
        .filter(|word| !word.is_empty() && !word.starts_with('-'))
        .collect();
    words.join(" ")
}

#[derive(Debug, PartialEq)]
struct Stat {
    group: u32,
    ticks: u64,
    resident_pages: u64,
}

impl Stat {
    fn read(process: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(process.join("stat")).ok()?)
    }

    /// Fields behind the name in parentheses, which may hold anything.
    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // proc_pid_stat(5) counts from 1 and the state, the first one here, is its third.
        let field = |number: usize| fields.get(number - 3)?.parse::<i64>().ok();
        let ticks = (14..=17).map(field).sum::<Option<i64>>()?;
        Some(Self {
            group: u32::try_from(field(5)?).ok()?,
            ticks: ticks.max(0) as u64,
            resident_pages: field(24)?.max(0) as u64,
        })
    }

    fn usage(&self) -> Usage {
        Usage {
            cpu_seconds: self.ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
            resident_bytes: self.resident_pages * rustix::param::page_size() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_is_read_whatever_the_process_is_called() {
        let stat =
            "7 (a) b (c) S 1 42 7 0 -1 4194560 100 0 0 0 11 5 3 2 20 0 4 0 99 1000000 321 18446744073709551615 1";
        assert_eq!(Stat::parse(stat), Some(Stat { group: 42, ticks: 21, resident_pages: 321 }));
        assert_eq!(Stat::parse("7 (x) S 1"), None);
    }

    #[test]
    fn a_process_is_called_by_its_program_and_what_that_is_to_do() {
        for (command_line, expected) in [
            ("/opt/tandem\0proxy\0--port\x001\0", "tandem proxy"),
            ("/usr/bin/python3\0/opt/bin/vllm\0serve\0", "python3 vllm"),
            ("llama-server\0-m\0m.gguf\0", "llama-server"),
            ("", ""),
        ] {
            assert_eq!(name(command_line.as_bytes()), expected);
        }
    }

    #[test]
    fn what_was_taken_between_two_looks_is_told_by_process() {
        let of = |all: &[(&str, f64)]| -> BTreeMap<String, Usage> {
            all.iter()
                .map(|(name, cpu_seconds)| ((*name).into(), Usage { cpu_seconds: *cpu_seconds, resident_bytes: 1 }))
                .collect()
        };
        let between = cpu_seconds_between(&of(&[("a", 1.0), ("b", 2.0)]), &of(&[("a", 1.5), ("b", 1.0), ("c", 3.0)]));
        assert_eq!(between, [("a".into(), 0.5), ("b".into(), 0.0), ("c".into(), 3.0)].into());
    }

    #[test]
    fn this_process_has_taken_something() {
        let this = of_process(std::process::id()).unwrap();
        assert!(this.resident_bytes > 1 << 20);
        let group = Stat::read(Path::new("/proc/self")).unwrap().group;
        assert!(Usage::sum(of_group(group).unwrap().values()).resident_bytes >= this.resident_bytes / 2);
        assert_eq!((of_group(u32::MAX), of_process(u32::MAX)), (None, None));
    }
}
