//! A GGUF file through the whole chain: `models/demo` in 8 bits still answers from its prompt, from its own tokenizer
//! and chat template, and split over two nodes it says what one node says, bit for bit.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;

use serde_json::{Value, json};
use support::client::Answer;
use support::process::tandem;
use support::{Cluster, Shape};

/// `models/demo` as a GGUF file, removed when dropped.
struct GgufFile(PathBuf);

impl GgufFile {
    fn write(name: &str, ty: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tandem-{name}-{ty}-{}.gguf", std::process::id()));
        let output = tandem().args(["model", "gguf", "models/demo"]).arg(&path).args(["--type", ty]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(path)
    }

    /// As flags and requests name it.
    fn model(&self) -> &'static str {
        self.0.display().to_string().leak()
    }
}

impl Drop for GgufFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A question about what was said, and the answer.
const CODES: [(&str, &str); 3] = [
    ("What is the code of Nora?", "The code of Nora is 7391."),
    ("Where does Hugo live?", "Hugo lives in Lima."),
    ("What does Kate own?", "Kate owns the ladder."),
];

fn chat(model: &str, question: &str) -> Value {
    let facts = "The code of Nora is 7391. Hugo lives in Lima. The code of Omar is 2864. Kate owns the ladder.";
    json!({
        "model": model, "temperature": 0, "max_tokens": 32, "messages": [
            {"role": "user", "content": facts},
            {"role": "assistant", "content": "Noted."},
            {"role": "user", "content": question},
        ],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_q8_0_file_answers_from_its_prompt_across_a_hand_over() {
    let file = GgufFile::write("recall", "q8_0");
    let decode = vec!["--local-offer-max-tokens", "0"];
    let cluster = Cluster::start(Shape { model: file.model(), decode, ..Shape::default() }).await;
    for (question, expected) in CODES {
        let reply = cluster.api.post("/v1/chat/completions", &chat(file.model(), question)).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert_eq!(Answer::of_body(&reply.body).choices[0].text, expected, "{question}");
    }
    let scrape = cluster.metrics().await;
    assert_eq!(scrape.sum("tandem_local_prefills_total", &[]), 0.0, "a decode node prefilled");
    assert!(scrape.sum("tandem_kv_transferred_bytes_total", &[]) > 0.0, "no KV was transferred");
    cluster.shut_down().await;
}

/// Prompts of all lengths around a block, with log probabilities: their digits are what is compared.
fn prompts(model: &str) -> Vec<Value> {
    [1u32, 15, 16, 17, 33, 100, 700]
        .iter()
        .map(|len| {
            let prompt: Vec<u32> = (0..*len).map(|i| 10 + (i * i * 31 + i * 7 + len) % 1500).collect();
            json!({
                "model": model, "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": true,
                "logprobs": 2,
            })
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn split_equals_colocated_with_quantized_weights() {
    for ty in ["q8_0", "q4_0"] {
        let file = GgufFile::write("split", ty);
        let colocated = Cluster::up(&["--model", file.model(), "--num-prefill-nodes", "0"]).await;
        let mut expected = Vec::new();
        for body in prompts(file.model()) {
            expected.push(colocated.api.complete(&body).await);
        }
        colocated.shut_down().await;
        let decode = vec!["--local-offer-max-tokens", "0", "--block-size", "64"];
        let prefill = vec!["--block-size", "16", "--max-num-batched-tokens", "48", "--max-num-seqs", "8"];
        let cluster = Cluster::start(Shape { model: file.model(), prefill, decode, ..Shape::default() }).await;
        let bodies = prompts(file.model());
        let answers = futures::future::join_all(bodies.iter().map(|body| cluster.api.complete(body))).await;
        assert_eq!(answers, expected, "{ty}");
        assert_eq!(cluster.metrics().await.sum("tandem_local_prefills_total", &[]), 0.0, "a decode node prefilled");
        cluster.shut_down().await;
    }
}
