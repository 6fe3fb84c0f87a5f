//! `tandem bench compare`, `sweep` and `report` as a user runs them, on endpoints whose times are scripted.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use support::process::{Process, TANDEM, tandem};

/// A folder that is gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tandem-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A mock that runs, and its address.
async fn mock(name: &str, flags: &[&str], dir: &Path) -> (Process, String) {
    let args: Vec<String> = ["bench", "mock"].iter().chain(flags).map(|arg| arg.to_string()).collect();
    let mut process = Process::start(name, &args, dir);
    let find = |line: &str| line.strip_prefix("listening on ").map(str::to_string);
    let base_url = process.stdout_line("its address", find).await;
    (process, base_url)
}

async fn bench(args: Vec<String>) -> Output {
    let run = move || tandem().arg("bench").args(args).output().unwrap();
    tokio::task::spawn_blocking(run).await.unwrap()
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
}

fn ok(output: Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A port that was free a moment ago: a set-up's address must be known before its process is there.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

const LOAD: &str = "--model m --num-prompts 6 --random-input-len 16 --random-output-len 4 --save-detailed";

#[tokio::test(flavor = "multi_thread")]
async fn setups_are_compared_in_turn_and_drawn() {
    let folder = Folder::new("compare");
    let dir = &folder.0;
    let (_there, base_url) = mock("there", &["--ttft-ms", "1", "--itl-ms", "1"], dir).await;
    let port = free_port();
    let setups = format!(
        "[[setup]]\nname = 'there'\nbase_url = '{base_url}'\n\n\
         [[setup]]\nname = 'started'\nbase_url = 'http://127.0.0.1:{port}'\nready_seconds = 60\n\
         start = ['{TANDEM}', 'bench', 'mock', '--listen', '127.0.0.1:{port}', '--ttft-ms', '40', '--itl-ms', '20']\n"
    );
    std::fs::write(dir.join("setups.toml"), setups).unwrap();
    let result = dir.join("comparison.json");
    let paths = format!("--setups {} --save-result {}", dir.join("setups.toml").display(), result.display());
    let table = ok(bench(words(&format!("compare {paths} --num-seeds 2 -- {LOAD} --seed 5"))).await);
    assert!(table.contains("ratios to there") && table.contains("mean_ttft_ms"), "{table}");

    let comparison = json(&result);
    assert_eq!(comparison["setups"], serde_json::json!(["there", "started"]));
    let rounds = comparison["rounds"].as_array().unwrap();
    let seeds: Vec<[u64; 2]> = rounds.iter().map(|round| [0, 1].map(|i| round[i]["seed"].as_u64().unwrap())).collect();
    assert_eq!(seeds, [[5, 5], [6, 6]], "a round is the same load for all");
    let ratio = &comparison["ratios_to_first"]["mean_itl_ms"]["started"];
    let (low, mean, high) = (&ratio["low"], &ratio["ratio"], &ratio["high"]);
    assert!(low.as_f64() <= mean.as_f64() && mean.as_f64() <= high.as_f64(), "{ratio}");
    let product: f64 = rounds
        .iter()
        .map(|round| round[1]["mean_itl_ms"].as_f64().unwrap() / round[0]["mean_itl_ms"].as_f64().unwrap())
        .product();
    assert!((mean.as_f64().unwrap() - product.sqrt()).abs() < 1e-9, "{ratio}");
    // Only what was started here can be looked at.
    assert!(rounds[0][1]["server_cpu_s"].as_f64().is_some() && rounds[0][0]["server_cpu_s"].is_null());
    assert!(rounds[0][1]["server_cpu_s_by_process"]["tandem bench"].is_number(), "{}", rounds[0][1]);
    assert!(rounds[0][0]["client_cpu_s"].as_f64().is_some_and(|cpu_seconds| cpu_seconds >= 0.0));
    let gone = Command::new("ps").args(["-eo", "args"]).output().unwrap();
    let listen = format!("127.0.0.1:{port}");
    assert!(!String::from_utf8_lossy(&gone.stdout).contains(&listen), "what was started has been stopped");

    let page = dir.join("report.html");
    let flags = format!("report {} --output {} --title Mocks", result.display(), page.display());
    assert!(ok(bench(words(&flags)).await).contains("4 runs"));
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(
        html.contains("<h1>Mocks</h1>") && html.matches("<svg").count() >= 8,
        "{} charts",
        html.matches("<svg").count()
    );
    look_at(&page, dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn interference_sends_streams_alone_and_beside_prompts_and_counts_each() {
    let folder = Folder::new("interference");
    let dir = &folder.0;
    let (_mock, base_url) = mock("mock", &["--ttft-ms", "4", "--itl-ms", "8"], dir).await;
    let setups = format!("[[setup]]\nname = 'mock'\nbase_url = '{base_url}'\n");
    std::fs::write(dir.join("setups.toml"), setups).unwrap();
    let result = dir.join("interference.json");
    let paths = format!("--setups {} --save-result {}", dir.join("setups.toml").display(), result.display());
    let sizes = "--num-seeds 2 --num-streams 3 --stream-output-len 40 --prompt-len 32 --num-calibrations 4 --load 0.2";
    let table = ok(bench(words(&format!("interference {paths} {sizes} -- --model m"))).await);
    assert!(table.contains("beside prompts") && table.contains("p99"), "{table}");

    let mock = &json(&result)["setups"]["mock"];
    let rounds = mock["rounds"].as_array().unwrap();
    let num_prompts: u64 = rounds.iter().map(|round| round["num_prompts"].as_u64().unwrap()).sum();
    assert!(rounds.len() == 2 && num_prompts >= 2, "{mock}");
    let truth = reqwest::get(format!("{base_url}/truth")).await.unwrap().json::<Value>().await.unwrap();
    assert_eq!(truth["completed"].as_u64().unwrap(), 2 * (4 + 2 * 3) + num_prompts, "{mock}");
    let p99 = |round: &Value, of: &str| round[of]["p99_ms"].as_f64().unwrap();
    let factor = rounds.iter().map(|round| p99(round, "itl_beside_prompts") / p99(round, "itl_alone")).product::<f64>();
    let told = mock["p99_itl_factor"]["ratio"].as_f64().unwrap();
    assert!((told - factor.sqrt()).abs() < 1e-9, "{mock}");
}

/// Opens the page without a network and measures every picture where it is shown.
fn look_at(page: &Path, dir: &Path) {
    const MEASURE: &str = "<script>const boxes=[...document.querySelectorAll('svg')].map(svg=>{\
        const box=svg.getBoundingClientRect();const marks=[...svg.querySelectorAll('polyline,circle,rect')];\
        const seen=marks.filter(mark=>{const b=mark.getBoundingClientRect();\
        return b.right>=box.left&&b.left<=box.right&&b.bottom>=box.top&&b.top<=box.bottom});\
        return [box.width,box.height,seen.length,marks.length,svg.querySelectorAll('text').length]});\
        document.body.innerHTML='<pre>'+JSON.stringify({boxes,wide:document.documentElement.scrollWidth})+'</pre>';\
        </script></body>";
    let measured = dir.join("measured.html");
    std::fs::write(&measured, std::fs::read_to_string(page).unwrap().replace("</body>", MEASURE)).unwrap();
    let output = Command::new("chromium")
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom"])
        .arg("--host-resolver-rules=MAP * ~NOTFOUND")
        .arg(format!("--user-data-dir={}", dir.join("chromium").display()))
        .arg(format!("file://{}", measured.display()))
        .output()
        .expect("chromium is installed by ./test");
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = dom.split("<pre>").nth(1).and_then(|rest| rest.split("</pre>").next());
    let told = told.unwrap_or_else(|| panic!("{dom}\n{}", String::from_utf8_lossy(&output.stderr)));
    let told: Value = serde_json::from_str(told).unwrap();
    let boxes = told["boxes"].as_array().unwrap();
    assert!(boxes.len() >= 8, "{told}");
    for one in boxes {
        let at = |index: usize| one[index].as_f64().unwrap();
        assert!(at(0) > 300.0 && at(1) > 100.0, "a picture has a size: {told}");
        assert!(at(2) > 0.0 && at(2) == at(3), "every mark lies within its picture: {told}");
        assert!(at(4) > 4.0, "axes have numbers: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_goes_on_where_it_was_cut_off() {
    let folder = Folder::new("sweep");
    let dir = &folder.0;
    let port = free_port();
    let setups = format!(
        "[[setup]]\nname = 'mock'\nbase_url = 'http://127.0.0.1:{port}'\nready_seconds = 60\n\
         start = ['{TANDEM}', 'bench', 'mock', '--listen', '127.0.0.1:{port}', '--itl-ms', '1']\n"
    );
    std::fs::write(dir.join("setups.toml"), setups).unwrap();
    let out = dir.join("runs");
    let paths = format!("--setups {} --out {}", dir.join("setups.toml").display(), out.display());
    let params = "--server-param ttft-ms=1,2 --param max-concurrency=1,2 --maximize output_throughput";
    let command = format!("sweep {paths} {params} -- {LOAD}");
    let table = ok(bench(words(&command)).await);
    assert!(table.starts_with("4 runs, 0 of them were there"), "{table}");
    let name = |ttft: u8, max: u8| out.join(format!("mock,ttft-ms={ttft},max-concurrency={max}.json"));
    let first = json(&name(1, 1));
    assert_eq!((&first["label"], &first["max_concurrency"]), (&"mock".into(), &1.into()));

    std::fs::remove_file(name(2, 1)).unwrap();
    let table = ok(bench(words(&command)).await);
    assert!(table.starts_with("4 runs, 3 of them were there"), "{table}");
    assert_eq!(json(&name(1, 1)), first, "what is there is not run again");
    assert!(name(2, 1).exists());

    // Other settings would make a table of things that cannot be compared.
    let other = bench(words(&format!("{command} --random-range-ratio 0.5"))).await;
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(!other.status.success() && said.contains("a sweep with other settings"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_compared_is_said_before_anything_runs() {
    let folder = Folder::new("wrong");
    let path = folder.0.join("setups.toml");
    let setup =
        |name: &str, start: &str| format!("[[setup]]\nname = '{name}'\nbase_url = 'http://127.0.0.1:9'\n{start}\n");
    for (text, expected) in [
        (setup("a", ""), "expected at least two"),
        (setup("a", "") + &setup("a", ""), "two set-ups are called a"),
        (setup("a", "flags = ['--num-prompts', '0']") + &setup("b", ""), "a: error"),
        (setup("a", "start = ['/does/not/exist']") + &setup("b", ""), "start a"),
        (setup("a", "start = ['false']") + &setup("b", ""), "a ended before it answered"),
    ] {
        std::fs::write(&path, text).unwrap();
        let output = bench(words(&format!("compare --setups {} -- --model m", path.display()))).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(expected), "{expected}: {said}");
    }
}
