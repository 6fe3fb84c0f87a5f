//! Which version of the protocol a connection speaks, negotiated by ALPN.
//!
//! ```text
//! control           bulk                  spoken behind it
//! tandem/2          tandem-bulk/2         the protocol, newest version first
//! tandem/1          tandem-bulk/1
//! tandem/versions   tandem-bulk/versions  nothing but the farewell below; offered last by every version
//! ```
//!
//! The accepter takes the newest version that both ends offer. Without one the handshake ends in
//! `versions`, the same for ever, so that both operators read which versions met instead of a TLS alert:
//!
//! ```text
//! dialler    its versions as decimal numbers between spaces  ->   accepter
//!            <-  closes the connection with a sentence that names both ends' versions
//! ```

use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, ConnectionError};

use crate::link::CLOSE_REFUSED;
use crate::socket::Traffic;

/// What is offered last, by every version.
const FAREWELL: &str = "versions";
/// Longest list of versions that is read from a peer.
const LIST_BYTES_MAX: usize = 256;
/// TLS' alert `no_application_protocol` (120) as a QUIC error code: a peer that does not even know the
/// farewell, so no node of this fabric, or the other kind of port.
pub(crate) const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;

/// The ALPN ids of one kind of connection: `versions` as given (newest first), and the farewell.
pub(crate) fn alpn_ids(traffic: Traffic, versions: &[u16]) -> Vec<Vec<u8>> {
    let ids = versions.iter().map(u16::to_string).chain([FAREWELL.to_string()]);
    ids.map(|id| format!("{}/{id}", family(traffic)).into_bytes()).collect()
}

fn family(traffic: Traffic) -> &'static str {
    match traffic {
        Traffic::Control => "tandem",
        Traffic::Bulk => "tandem-bulk",
    }
}

/// The version that the handshake ended in; `None`: there is no common one.
pub(crate) fn negotiated(connection: &Connection) -> Option<u16> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    let protocol = String::from_utf8(data.protocol?).ok()?;
    protocol.rsplit_once('/')?.1.parse().ok()
}

/// The dialler's part of the farewell: says what it speaks and returns how the accepter closes.
pub(crate) async fn part_as_dialler(connection: &Connection, ours: &[u16]) -> ConnectionError {
    let told = async {
        let (mut sender, receiver) = connection.open_bi().await?;
        sender.write_all(numbers(ours, " ").as_bytes()).await?;
        // Already ended at the other end: it closes all the same.
        let _ = sender.finish();
        Ok::<_, quinn::WriteError>((sender, receiver))
    };
    // The halves live until the end, or the accepter would read a reset. What could not be told is missing
    // in its sentence, no more.
    let _halves = told.await;
    connection.closed().await
}

/// The accepter's part: closes the connection with a sentence, which it returns.
pub(crate) async fn part_as_accepter(connection: &Connection, ours: &[u16]) -> String {
    let list = async {
        let (_sender, mut receiver) = connection.accept_bi().await.ok()?;
        receiver.read_to_end(LIST_BYTES_MAX).await.ok()
    };
    let theirs = list.await.and_then(|bytes| parse_list(&bytes));
    let sentence = no_common_version(theirs.as_deref(), ours);
    connection.close(CLOSE_REFUSED, sentence.as_bytes());
    sentence
}

fn parse_list(bytes: &[u8]) -> Option<Vec<u16>> {
    let words = std::str::from_utf8(bytes).ok()?.split_ascii_whitespace();
    let versions: Option<Vec<u16>> = words.map(|word| word.parse().ok()).collect();
    versions.filter(|versions| !versions.is_empty())
}

/// Neutral, so that it is true at both ends.
fn no_common_version(dialler: Option<&[u16]>, accepter: &[u16]) -> String {
    let dialler = dialler.map_or("others, which it does not name".to_string(), |versions| numbers(versions, " and "));
    format!(
        "no common protocol version: the dialling node speaks {dialler}, the accepting node {}: upgrade the older of the two",
        numbers(accepter, " and ")
    )
}

/// For a peer that knows neither one of `ours` nor the farewell.
pub(crate) fn no_common_protocol(ours: &[u16]) -> String {
    format!(
        "it speaks no version of this protocol (this node speaks {}): check that a node of this cluster is there, and the port",
        numbers(ours, " and ")
    )
}

fn numbers(versions: &[u16], between: &str) -> String {
    versions.iter().map(u16::to_string).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_offered_newest_first_and_the_farewell_last() {
        let ids = alpn_ids(Traffic::Bulk, &[2, 1]);
        assert_eq!(ids, [&b"tandem-bulk/2"[..], b"tandem-bulk/1", b"tandem-bulk/versions"]);
        assert_eq!(alpn_ids(Traffic::Control, &[1]), [&b"tandem/1"[..], b"tandem/versions"]);
    }

    #[test]
    fn list_of_versions_is_numbers_or_nothing() {
        assert_eq!(parse_list(b"3 2"), Some(vec![3, 2]));
        for bad in [&b""[..], b" ", b"3,2", b"-1", b"65536", b"3 x", &[0xff]] {
            assert_eq!(parse_list(bad), None, "{bad:?}");
        }
    }
}
