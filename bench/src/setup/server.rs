//! The process of a set-up: started, waited for, told to end.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process_group};

use super::Setup;
use crate::usage::{Usage, of_group};

/// Between two looks at an endpoint that is not there yet, or a process that is ending.
const POLL: Duration = Duration::from_millis(100);
/// A process that was told to end has this long for it.
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// One look at an endpoint.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// A running set-up. Its process and all that it started end with it.
#[derive(Debug)]
pub struct Server {
    child: Option<Child>,
}

impl Server {
    /// Starts the set-up's command with `more_flags` behind it, if it has one, and waits until `base_url` answers.
    ///
    /// # Errors
    /// If the command cannot be run, ends by itself, or does not answer in time; if something else answers there.
    pub async fn start(setup: &Setup, more_flags: &[String]) -> anyhow::Result<Self> {
        let mut server = Self { child: None };
        if let Some(start) = &setup.start {
            is_free(setup).await?;
            let mut command = Command::new(&start[0]);
            command.args(&start[1..]).args(more_flags).envs(&setup.env);
            // A group of its own: peers have workers, which must end with them.
            command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
            let child = command.spawn().with_context(|| format!("start {} ({})", setup.name, start[0]))?;
            server.child = Some(child);
        } else {
            anyhow::ensure!(more_flags.is_empty(), "{} has no start command to give server flags to", setup.name);
        }
        let ready = server.ready(setup);
        let deadline = Duration::from_secs(setup.ready_seconds);
        match tokio::time::timeout(deadline, ready).await {
            Ok(ready) => ready?,
            Err(_) => anyhow::bail!("{} did not answer at {} within {deadline:?}", setup.name, setup.base_url),
        }
        Ok(server)
    }

    async fn ready(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let http = crate::serve::client::http(false)?;
        let base = setup.base_url.trim_end_matches('/');
        loop {
            if let Some(status) = self.child.as_mut().map(Child::try_wait).transpose()?.flatten() {
                anyhow::bail!("{} ended before it answered ({status}); its last words are above", setup.name);
            }
            let look = |path: &str| http.get(format!("{base}{path}")).timeout(LOOK_TIMEOUT).send();
            // Not every endpoint has /health; one that has it may name its model before it can serve.
            let is_there = look("/v1/models").await.is_ok_and(|response| response.status().is_success());
            let is_waiting = || async {
                look("/health").await.is_ok_and(|response| response.status() == StatusCode::SERVICE_UNAVAILABLE)
            };
            if is_there && !is_waiting().await {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// What its processes have taken so far, by what they are called; `None` of an endpoint that was there.
    pub fn usage(&self) -> Option<BTreeMap<String, Usage>> {
        of_group(self.child.as_ref()?.id())
    }

    /// Tells it to end and waits for it.
    pub async fn stop(mut self) {
        let Some(child) = &mut self.child else { return };
        signal_group(child, Signal::TERM);
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline {
            if !matches!(child.try_wait(), Ok(None)) {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Whoever answers before the command is started would be measured in its place.
async fn is_free(setup: &Setup) -> anyhow::Result<()> {
    let look = crate::serve::client::http(false)?.get(&setup.base_url).timeout(LOOK_TIMEOUT).send().await;
    anyhow::ensure!(
        look.is_err(),
        "something answers at {} already, and would be measured instead of {}: end it, or give the set-up another port",
        setup.base_url,
        setup.name
    );
    Ok(())
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // Also what a process that has ended left behind.
        signal_group(&child, Signal::KILL);
        let _ = child.wait();
    }
}

fn signal_group(child: &Child, signal: Signal) {
    let group = Pid::from_raw(child.id().cast_signed()).expect("a child has an id");
    let _ = kill_process_group(group, signal);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use axum::Router;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_is_there_already_is_not_measured_in_place_of_the_set_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, Router::new()).await });
        let setup = Setup {
            name: "split".to_owned(),
            base_url: format!("http://{address}"),
            start: Some(vec!["true".to_owned()]),
            env: BTreeMap::new(),
            flags: Vec::new(),
            ready_seconds: 5,
        };
        let refused = Server::start(&setup, &[]).await.unwrap_err().to_string();
        assert!(refused.contains("answers") && refused.contains("another port"), "{refused}");
    }
}
