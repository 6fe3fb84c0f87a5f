//! A cluster of real processes: `tandem up`, or a proxy and nodes that are processes of their own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::client::Api;
use super::metrics::Scrape;
use super::process::{Environment, Process, tandem};
use super::{accounting, wait};

/// An idle cluster gives everything back within this time; a lost connection alone takes 2 seconds.
const SETTLE_DEADLINE: Duration = Duration::from_secs(30);
/// Longer than any drain of these tests.
const EXIT_DEADLINE: Duration = Duration::from_secs(45);

/// What is served unless a test says otherwise: its every token depends on the whole prompt, and no two
/// prompts make it say the same.
pub(crate) const NOISE_MODEL: &str = "models/tiny";

/// What processes a cluster has, and their flags.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    /// What all of them serve.
    pub(crate) model: &'static str,
    pub(crate) num_prefill: usize,
    pub(crate) num_decode: usize,
    /// Flags of all nodes.
    pub(crate) nodes: Vec<&'static str>,
    /// Flags of prefill nodes.
    pub(crate) prefill: Vec<&'static str>,
    /// Flags of decode nodes.
    pub(crate) decode: Vec<&'static str>,
    /// Flags of the proxy.
    pub(crate) proxy: Vec<&'static str>,
    /// The environment of each node, by its name; of `""`: of those that have none.
    pub(crate) environments: BTreeMap<&'static str, Vec<(&'static str, String)>>,
}

impl Shape {
    /// KV between the processes over QUIC, as between hosts, instead of shared memory.
    pub(crate) fn over_quic(mut self) -> Self {
        self.nodes.extend(["--kv-transports", "quic"]);
        self
    }

    /// KV between the processes through NIXL, if that is there; if not, says that what needs it is skipped.
    pub(crate) fn over_nixl(mut self) -> Option<Self> {
        let Ok(library) = std::env::var("TANDEM_TEST_NIXL") else {
            println!("SKIPPED: TANDEM_TEST_NIXL does not name NIXL's libnixl_capi.so; ./test installs it and sets it");
            return None;
        };
        self.nodes.extend(["--kv-transports", "quic,nixl", "--nixl-library", library.leak()]);
        Some(self)
    }

    /// What its KV travels over.
    pub(crate) fn kv_transport(&self) -> &'static str {
        let listed = self.nodes.iter().skip_while(|flag| **flag != "--kv-transports").nth(1);
        listed.map_or("shm", |listed| listed.rsplit(',').next().expect("a list has a last part"))
    }
}

impl Default for Shape {
    fn default() -> Self {
        // Several nodes share two cores here.
        let nodes = vec!["--threads", "1", "--kv-cache-memory-bytes", "32MiB"];
        Self {
            model: NOISE_MODEL,
            num_prefill: 1,
            num_decode: 1,
            nodes,
            prefill: vec![],
            decode: vec![],
            proxy: vec![],
            environments: BTreeMap::new(),
        }
    }
}

/// A prefill or decode node that is a process of its own.
pub(crate) struct Node {
    pub(crate) process: Process,
    pub(crate) role: &'static str,
    /// Its control listener.
    pub(crate) address: String,
    /// Its own `/metrics`.
    pub(crate) api: Api,
    args: Vec<String>,
    environment: Vec<(&'static str, String)>,
    is_frozen: bool,
}

/// Running processes that end with it.
pub(crate) struct Cluster {
    /// The OpenAI endpoint.
    pub(crate) api: Api,
    /// The proxy, or all roles in one.
    pub(crate) proxy: Process,
    /// Prefill nodes, then decode nodes; none of `tandem up`, which has them inside.
    pub(crate) nodes: Vec<Node>,
    proxy_args: Vec<String>,
    total_blocks: BTreeMap<String, f64>,
    scratch: Scratch,
}

impl Cluster {
    /// `tandem up` with these flags.
    pub(crate) async fn up(flags: &[&str]) -> Self {
        Self::up_in(flags, &[]).await
    }

    /// The same with an environment.
    pub(crate) async fn up_in(flags: &[&str], environment: &Environment) -> Self {
        let scratch = Scratch::new();
        let mut args = strings(&["up", "--port", "0"]);
        args.extend(strings(flags));
        if !flags.contains(&"--model") {
            args.extend(strings(&["--model", NOISE_MODEL]));
        }
        if !flags.contains(&"--kv-cache-memory-bytes") {
            args.extend(strings(&["--kv-cache-memory-bytes", "64MiB"]));
        }
        let mut proxy = Process::start_in("up", &args, scratch.path(), environment);
        let api = Api::new(&endpoint_url(&mut proxy).await);
        let total_blocks = accounting::total_blocks(&api.try_metrics().await.unwrap());
        let cluster = Self { api, proxy, nodes: vec![], proxy_args: args, total_blocks, scratch };
        cluster.settle().await;
        cluster
    }

    /// A proxy that lists `num_prefill` and `num_decode` nodes, each a process with a certificate of one CA.
    pub(crate) async fn start(shape: Shape) -> Self {
        let scratch = Scratch::new();
        let names = |role: &str, num: usize| (0..num).map(|i| format!("{role}-{i}")).collect::<Vec<_>>();
        let (prefill, decode) = (names("prefill", shape.num_prefill), names("decode", shape.num_decode));
        make_certs(scratch.path(), &prefill, &decode);
        let dir = scratch.path();
        let mut starting = Vec::new();
        for (role, names, flags) in
            [("prefill-node", &prefill, &shape.prefill), ("decode-node", &decode, &shape.decode)]
        {
            for name in names {
                let mut args = node_args(role, name, dir);
                args.extend(strings(&["--model", shape.model]));
                args.extend(strings(&shape.nodes));
                args.extend(strings(flags));
                let of_all = shape.environments.get("");
                let environment = shape.environments.get(name.as_str()).or(of_all).cloned().unwrap_or_default();
                let process = Process::start_in(name, &with_port(&args, 0), dir, &environment);
                starting.push((role, process, args, environment));
            }
        }
        let mut nodes = Vec::new();
        for (role, process, args, environment) in starting {
            nodes.push(Node::ready(role, process, args, environment).await);
        }
        let mut proxy_args = strings(&["proxy", "--model", shape.model, "--tls-dir", &dir.display().to_string()]);
        for node in &nodes {
            proxy_args.extend([format!("--{}", node.role), node.address.clone()]);
        }
        proxy_args.extend(strings(&shape.proxy));
        let mut proxy = Process::start("proxy", &with_port(&proxy_args, 0), dir);
        let api = Api::new(&endpoint_url(&mut proxy).await);
        let mut cluster = Self { api, proxy, nodes, proxy_args, total_blocks: BTreeMap::new(), scratch };
        cluster.all_known().await;
        cluster
    }

    /// Waits until the proxy knows every node that runs, and nobody else.
    pub(crate) async fn all_known(&mut self) {
        let mut num_alive = BTreeMap::from([("prefill-node", 0.0), ("decode-node", 0.0)]);
        for node in &mut self.nodes {
            if !node.is_frozen && node.process.is_alive() {
                *num_alive.entry(node.role).or_default() += 1.0;
            }
        }
        let api = &self.api;
        wait::until("the proxy knows the nodes that run", SETTLE_DEADLINE, async || {
            let scrape = api.try_metrics().await?;
            let known = |role: &str| scrape.sum("tandem_ready_nodes", &[("node_role", role)]);
            let is_known = num_alive.iter().all(|(role, num)| known(role) == *num);
            let found = format!("{} prefill and {} decode nodes", known("prefill-node"), known("decode-node"));
            is_known.then_some(()).ok_or_else(|| format!("it knows {found}, expected {num_alive:?}"))
        })
        .await;
        self.settle().await;
        for node in self.nodes.iter_mut().filter(|node| !node.is_frozen) {
            if let Ok(scrape) = node.api.try_metrics().await {
                self.total_blocks.extend(accounting::total_blocks(&scrape));
            }
        }
    }

    /// The node of this name.
    pub(crate) fn node(&mut self, name: &str) -> &mut Node {
        let found = self.nodes.iter_mut().find(|node| node.process.name() == name);
        found.unwrap_or_else(|| panic!("there is no node {name}"))
    }

    /// What all processes that run say about themselves.
    pub(crate) async fn metrics(&self) -> Scrape {
        let proxy = self.api.try_metrics().await.unwrap_or_else(|reason| panic!("no metrics: {reason}"));
        Scrape::join([proxy, self.node_metrics().await])
    }

    /// What the nodes that run say about themselves.
    pub(crate) async fn node_metrics(&self) -> Scrape {
        let mut scrapes = Vec::new();
        for node in self.nodes.iter().filter(|node| !node.is_frozen) {
            // A node that was killed says nothing.
            scrapes.extend(node.api.try_metrics().await);
        }
        Scrape::join(scrapes)
    }

    /// Waits until no process that runs holds anything of any request.
    pub(crate) async fn settle(&self) {
        wait::until("everything is given back", SETTLE_DEADLINE, async || {
            let scrape = self.metrics().await;
            let mut held = self.held(&scrape);
            held.extend(accounting::streams_beyond_watches(&scrape));
            if held.is_empty() { Ok(()) } else { Err(held.join("; ")) }
        })
        .await;
    }

    /// The same of the nodes alone, whose proxy is gone or frozen.
    pub(crate) async fn nodes_settle(&self) {
        wait::until("the nodes give everything back", SETTLE_DEADLINE, async || {
            let scrape = self.node_metrics().await;
            let mut held = self.held(&scrape);
            for (node, num) in scrape.by_node("tandem_fabric_streams", &[("traffic", "control")]) {
                if num != 0.0 {
                    held.push(format!("{node}: {num} control streams to a proxy that does not answer"));
                }
            }
            if held.is_empty() { Ok(()) } else { Err(held.join("; ")) }
        })
        .await;
    }

    fn held(&self, scrape: &Scrape) -> Vec<String> {
        let nodes = scrape.by_node("tandem_kv_blocks_free", &[]);
        let total = self.total_blocks.iter().filter(|(node, _)| nodes.contains_key(*node));
        let total = total.map(|(node, blocks)| (node.clone(), *blocks)).collect();
        accounting::held(scrape, &total)
    }

    /// Starts a node's process again, at the address the proxy has listed.
    pub(crate) async fn restart(&mut self, name: &str) {
        let dir = self.scratch.path().to_path_buf();
        let node = self.node(name);
        node.process.kill();
        let port = node.address.rsplit_once(':').expect("an address has a port").1.parse().expect("a number");
        let (role, args, environment) = (node.role, node.args.clone(), node.environment.clone());
        let process = Process::start_in(name, &with_port(&args, port), &dir, &environment);
        *node = Node::ready(role, process, args, environment).await;
    }

    /// Starts another proxy with the same settings and waits until it knows the nodes.
    pub(crate) async fn restart_proxy(&mut self) {
        self.proxy.kill();
        self.proxy = Process::start("proxy", &with_port(&self.proxy_args, 0), self.scratch.path());
        self.api = Api::new(&endpoint_url(&mut self.proxy).await);
        self.all_known().await;
    }

    /// Ends every process by SIGTERM; each must drain and leave with status 0.
    pub(crate) async fn shut_down(self) {
        self.shut_down_in_order().await;
    }

    /// The same, for who looks at their logs.
    pub(crate) async fn shut_down_in_order(mut self) -> Self {
        self.settle().await;
        self.proxy.terminate();
        assert!(self.proxy.exited(EXIT_DEADLINE).await.success(), "{}", self.proxy.tail());
        for node in &mut self.nodes {
            if node.process.is_alive() {
                node.process.terminate();
                assert!(node.process.exited(EXIT_DEADLINE).await.success(), "{}", node.process.tail());
            }
        }
        self
    }

    /// Where its certificates and logs are.
    pub(crate) fn dir(&self) -> &Path {
        self.scratch.path()
    }
}

impl Node {
    async fn ready(
        role: &'static str,
        mut process: Process,
        args: Vec<String>,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        let prefix = format!("{role} {} ready on ", process.name());
        let address =
            process.stdout_line("that it is ready", |line| line.strip_prefix(&prefix).map(str::to_string)).await;
        // Of several lives in one log, the last one counts.
        let log = process.log();
        let url = log.lines().rev().find_map(|line| line.split_once("metrics on ")?.1.strip_suffix("/metrics"));
        let api = Api::new(url.unwrap_or_else(|| panic!("no metrics address\n{}", process.tail())));
        Self { process, role, address, api, args, environment, is_frozen: false }
    }

    /// SIGSTOP.
    pub(crate) fn freeze(&mut self) {
        self.process.freeze();
        self.is_frozen = true;
    }

    /// SIGCONT.
    pub(crate) fn thaw(&mut self) {
        self.process.thaw();
        self.is_frozen = false;
    }
}

/// The address of the endpoint, which a proxy prints when it is ready.
pub(crate) async fn endpoint_url(proxy: &mut Process) -> String {
    let url = |line: &str| {
        let from = line.find("http://127.0.0.1:")?;
        let rest = &line[from + "http://".len()..];
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.' && c != ':').unwrap_or(rest.len());
        Some(format!("http://{}", rest[..end].trim_end_matches([':', '.'])))
    };
    proxy.stdout_line("its address", url).await
}

/// `tandem certs` for these nodes and a proxy called `proxy`.
pub(crate) fn make_certs(dir: &Path, prefill: &[String], decode: &[String]) {
    let mut command = tandem();
    command.args(["certs", "--dir"]).arg(dir).args(["--proxy", "proxy"]);
    for (flag, names) in [("--prefill-node", prefill), ("--decode-node", decode)] {
        for name in names {
            command.args([flag, name]);
        }
    }
    let output = command.output().expect("the command can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The command line of a node whose certificates are in `dir`, without its port.
pub(crate) fn node_args(role: &str, name: &str, dir: &Path) -> Vec<String> {
    let dir = dir.display().to_string();
    strings(&[role, "--node-id", name, "--tls-dir", &dir, "--metrics-port", "0"])
}

/// A command line with its port.
pub(crate) fn with_port(args: &[String], port: u16) -> Vec<String> {
    args.iter().cloned().chain(["--port".to_string(), port.to_string()]).collect()
}

/// Owned strings.
pub(crate) fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| arg.to_string()).collect()
}

/// A folder of its own, removed unless the test fails.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("e2e-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).expect("a scratch folder can be made");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("logs and certificates are left in {}", self.0.display());
        } else {
            // What cannot be removed is left to `cargo clean`.
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
