//! How sizes, durations and addresses are written.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Reads a number of bytes: `4096`, `512KiB`, `256MiB`, `2GiB`, or decimal `KB`, `MB`, `GB`.
///
/// # Errors
/// A sentence, if it is not one of these or exceeds 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "tib" | "t" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("\"{text}\" is not a size: expected a number of bytes such as 512MiB or 2GiB")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("\"{text}\" is not a size: expected a whole number, such as 512MiB"))?;
    number.checked_mul(factor).ok_or_else(|| format!("{text} is more bytes than 64 bits can count"))
}

/// As [`parse_bytes`], at least 1.
///
/// # Errors
/// A sentence.
pub fn parse_bytes_above_zero(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("must be above zero".into()),
        bytes => Ok(bytes),
    }
}

/// Reads a duration: `30` (seconds), `1.5s`, `500ms`, `50us`, `2m`, `1h`.
///
/// # Errors
/// A sentence, if it is not one of these.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text);
    let seconds_per_unit = match unit {
        "us" => 1e-6,
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("\"{text}\" is not a duration: expected one such as 500ms, 30s, 2m or 1h")),
    };
    let number: f64 = number.parse().map_err(|_| format!("\"{text}\" is not a duration: expected one such as 30s"))?;
    Duration::try_from_secs_f64(number * seconds_per_unit).map_err(|_| format!("{text} is out of range for a duration"))
}

/// As [`parse_duration`], at most a millisecond: for how long a thread may keep a core busy with waiting.
///
/// # Errors
/// A sentence.
pub fn parse_busy_poll(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        duration if duration <= Duration::from_millis(1) => Ok(duration),
        _ => {
            Err("is too long to keep a core busy with waiting: use at most 1ms, 50us for example, or 0s for off".into())
        }
    }
}

/// As [`parse_duration`], a minute at most: what a step of a simulated model can take before its request is given up.
///
/// # Errors
/// A sentence.
pub fn parse_sim_time(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        duration if duration <= Duration::from_secs(60) => Ok(duration),
        _ => Err("is longer than any step of a model: use at most 60s, 6ms for example".into()),
    }
}

/// As [`parse_duration`], above zero.
///
/// # Errors
/// A sentence.
pub fn parse_duration_above_zero(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("must be above zero".into()),
        duration => Ok(duration),
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// Reads a whole number of at least 1.
///
/// # Errors
/// A sentence.
pub fn parse_above_zero(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err(format!("\"{text}\" is not a whole number from 1 to {}", u32::MAX)),
    }
}

/// Reads the origin of a web page as browsers send it, scheme://host\[:port\], or `*`.
///
/// # Errors
/// A sentence: an origin that no browser sends would allow nobody without saying so.
pub fn parse_origin(text: &str) -> Result<String, String> {
    let is_host = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-:[]".contains(c);
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    if text == "*" || host.is_some_and(|host| !host.is_empty() && host.chars().all(is_host)) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "\"{text}\" is not an origin: expected one such as https://chat.example.org or http://localhost:3000, in lower \
         case and without a path, or * for all"
    ))
}

/// Reads a whole number.
///
/// # Errors
/// A sentence.
pub fn parse_whole(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("\"{text}\" is not a whole number from 0 to {}", u32::MAX))
}

/// Reads a port; 0 stands for any.
///
/// # Errors
/// A sentence.
pub fn parse_port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| format!("\"{text}\" is not a port: expected a whole number from 0 to {}", u16::MAX))
}

/// Reads a seed.
///
/// # Errors
/// A sentence.
pub fn parse_seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("\"{text}\" is not a seed: expected a whole number from 0 to {}", u64::MAX))
}

/// Reads how many there are for each other: 0 to 10.
///
/// # Errors
/// A sentence.
pub fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=10.0).contains(share));
    share.ok_or_else(|| format!("\"{text}\" is not a share from 0 to 10, such as 0.2 for one in five"))
}

/// Reads a part of a whole: above 0, at most 1.
///
/// # Errors
/// A sentence.
pub fn parse_fraction(text: &str) -> Result<f64, String> {
    let fraction = text.parse().ok().filter(|fraction| *fraction > 0.0 && *fraction <= 1.0);
    fraction.ok_or_else(|| format!("\"{text}\" is not a share above 0 and at most 1, such as 0.9"))
}

/// Reads a number of days that a certificate may be valid.
///
/// # Errors
/// A sentence.
pub fn parse_days(text: &str) -> Result<u32, String> {
    let days = text.parse().ok().filter(|days| (1..=36_500).contains(days));
    days.ok_or_else(|| format!("\"{text}\" is not a whole number of days from 1 to 36500"))
}

/// Reads an API key.
///
/// # Errors
/// A sentence: an empty key is no key.
pub fn parse_api_key(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("an empty key is no key".into()) } else { Ok(text.to_owned()) }
}

/// Host and port of a node as an operator writes them; the name is resolved when it is dialled.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// DNS name or IP address, an IPv6 address without its brackets.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

/// An address that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an address: expected host:port, such as 10.0.0.2:8101, prefill-0.local:8101 or [::1]:8101")]
pub struct InvalidHostPort(pub String);

impl FromStr for HostPort {
    type Err = InvalidHostPort;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidHostPort(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(invalid)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // Without brackets a colon cannot be told from the one before the port.
        let is_plain = bare.is_some() || !host.contains([':', '[', ']']);
        let host = bare.unwrap_or(host);
        if host.is_empty() || !is_plain || host.contains(char::is_whitespace) {
            return Err(invalid());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_binary_and_decimal_units() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("512MiB", 512 << 20), ("2 GiB", 2 << 30), ("1kB", 1000)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in ["", "MiB", "1.5GiB", "-1", "1 potato", "99999999999999999999", "99999999TiB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_seconds_unless_they_say_otherwise() {
        for (text, millis) in [("30", 30_000), ("1.5s", 1500), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["", "s", "-1s", "1 day", "1.2.3s", "1e99"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert!(parse_duration(&"9".repeat(40)).is_err());
        assert_eq!(parse_duration("50us"), Ok(Duration::from_micros(50)));
    }

    #[test]
    fn nobody_waits_busily_for_more_than_a_millisecond() {
        assert_eq!(parse_busy_poll("0s"), Ok(Duration::ZERO));
        assert_eq!(parse_busy_poll("1ms"), Ok(Duration::from_millis(1)));
        assert!(parse_busy_poll("50").unwrap_err().contains("use at most 1ms"));
    }

    #[test]
    fn fraction_is_above_zero_and_at_most_one() {
        assert_eq!((parse_fraction("0.9"), parse_fraction("1")), (Ok(0.9), Ok(1.0)));
        for bad in ["0", "-0.1", "1.1", "90%", "nan", ""] {
            assert!(parse_fraction(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn origin_is_what_a_browser_sends() {
        for good in ["*", "https://a.example", "http://localhost:3000", "http://[::1]:80"] {
            assert_eq!(parse_origin(good).as_deref(), Ok(good));
        }
        for bad in
            ["", "null", "a.example", "https://", "https://a/", "https://a/b", "https://A.example", "ftp://a", "**"]
        {
            assert!(parse_origin(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn address_needs_a_host_and_a_port() {
        for good in ["a:1", "10.0.0.2:8101", "[::1]:8101"] {
            assert_eq!(good.parse::<HostPort>().unwrap().to_string(), good);
        }
        for bad in ["", "a", "a:", ":1", "a:0", "a:65536", "::1:8101", "a b:1", "http://a:1"] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }
}
