//! Waiting for a fact: the only place of these tests where time passes by itself.

use std::time::Duration;

use tokio::time::Instant;

/// Between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// For anything that takes moments on an idle machine: the tests share theirs with other builds and tests.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Looks again and again until `look` answers `Ok`; panics with its last `Err` once `deadline` has passed.
pub(crate) async fn until<T>(what: &str, deadline: Duration, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + deadline;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(reason) => assert!(Instant::now() < end, "not within {deadline:?}: {what}: {reason}"),
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The answer of `future`; panics once `deadline` has passed.
pub(crate) async fn within<T>(what: &str, deadline: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(deadline, future).await {
        Ok(answer) => answer,
        Err(_) => panic!("not within {deadline:?}: {what}"),
    }
}
