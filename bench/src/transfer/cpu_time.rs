//! CPU time of a process, from `/proc`.

use std::time::Duration;

/// Linux counts in hundredths of a second for everybody who asks through `/proc`.
const TICK: Duration = Duration::from_millis(10);

/// User and system time that `pid` has used; `None` if there is no such process.
pub(super) fn of(pid: u32) -> Option<Duration> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 14 and 15; the second field is a name in parentheses that may hold anything.
fn parse(stat: &str) -> Option<Duration> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(TICK * (user + system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_added_whatever_the_name() {
        let stat = "7 (a ) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 250 13 0 0 20 0 1 0 5 1 1";
        assert_eq!(parse(stat), Some(Duration::from_millis(2630)));
        assert_eq!(parse("7 (a) S 1"), None);
        assert!(of(std::process::id()).is_some());
    }
}
