//! Lines for who started the process. That nobody reads them any more is no reason to fail, as it is for `println!`.

use std::fmt::Display;
use std::io::Write;

/// A line on stdout.
pub fn say(line: impl Display) {
    // Nobody reads it: there is nobody to tell.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line on stderr, for what is no matter of the log.
pub fn complain(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
