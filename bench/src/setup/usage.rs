//! What a group of processes has taken: CPU time and memory, from `/proc`.

/// Of all processes of a group that are there, with the CPU time of the children they have waited for.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// User and system time.
    pub cpu_seconds: f64,
    /// The sum of their resident memory now; what they share counts for each.
    pub resident_bytes: u64,
}

/// Of the group that `leader` leads; `None` where there is no such group, or no `/proc`.
pub fn of_group(leader: u32) -> Option<Usage> {
    let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
    let page_bytes = rustix::param::page_size() as u64;
    let mut usage: Option<Usage> = None;
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        if !entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        // A process may end while it is looked at.
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some(stat) = parse(&stat).filter(|stat| stat.group == leader) else { continue };
        let sum = usage.get_or_insert_default();
        sum.cpu_seconds += stat.ticks as f64 / ticks_per_second;
        sum.resident_bytes += stat.resident_pages * page_bytes;
    }
    usage
}

#[derive(Debug, PartialEq)]
struct Stat {
    group: u32,
    ticks: u64,
    resident_pages: u64,
}

/// `/proc/PID/stat`: fields behind the name in parentheses, which may hold anything.
fn parse(stat: &str) -> Option<Stat> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // proc_pid_stat(5) counts from 1 and the state, the first one here, is its third.
    let field = |number: usize| fields.get(number - 3)?.parse::<i64>().ok();
    let ticks = (14..=17).map(field).sum::<Option<i64>>()?;
    Some(Stat {
        group: u32::try_from(field(5)?).ok()?,
        ticks: ticks.max(0) as u64,
        resident_pages: field(24)?.max(0) as u64,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_is_read_whatever_the_process_is_called() {
        let stat =
            "7 (a) b (c) S 1 42 7 0 -1 4194560 100 0 0 0 11 5 3 2 20 0 4 0 99 1000000 321 18446744073709551615 1";
        assert_eq!(parse(stat), Some(Stat { group: 42, ticks: 21, resident_pages: 321 }));
        assert_eq!(parse("7 (x) S 1"), None);
    }

    #[test]
    fn this_process_has_taken_something() {
        let group = parse(&std::fs::read_to_string("/proc/self/stat").unwrap()).unwrap().group;
        assert!(of_group(group).unwrap().resident_bytes > 1 << 20);
        assert_eq!(of_group(u32::MAX), None);
    }
}
