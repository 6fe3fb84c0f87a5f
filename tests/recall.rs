//! `models/demo` answers from what its prompt says, so its answers show whether the prompt's KV is there: after
//! a hand-over, with a prefix that was cached, and when a node dies, also in the middle of an answer.
//!
//! The prompts are fixed, and of kinds that the model is sure of: each token of these answers is likelier than any
//! other by a factor of 80 or more, so that a CPU which rounds differently says the same.
#![allow(clippy::unwrap_used)]

mod support;

use futures::future::join_all;
use serde_json::{Value, json};
use support::client::{Answer, AnswerStream, Api};
use support::wait::{self, SOON};
use support::{Cluster, Shape};

/// Who lives where, has which code and owns what.
const PEOPLE: [(&str, &str, u32, &str); 12] = [
    ("Nora", "Oslo", 7391, "lamp"),
    ("Hugo", "Lima", 2864, "violin"),
    ("Kate", "Rome", 5127, "ladder"),
    ("Omar", "Kyoto", 9340, "basket"),
    ("Lena", "Dublin", 4618, "helmet"),
    ("Theo", "Cairo", 8253, "mirror"),
    ("Vera", "Prague", 3975, "kite"),
    ("Paul", "Seoul", 6482, "drum"),
    ("Mia", "Lagos", 1709, "clock"),
    ("Igor", "Vienna", 2536, "tent"),
    ("Rosa", "Quito", 6274, "flute"),
    ("Emil", "Boston", 5063, "stone"),
];

/// Turns of the copying that fills the batch while a decode node dies.
const NUM_STREAMS: usize = 24;
/// Rounds in which a node is killed, at most, until one was in the middle of an answer.
const NUM_ROUNDS_MAX: usize = 10;

/// All that is known, with sentences that say nothing between.
fn facts() -> String {
    let sentences = PEOPLE.map(|(name, city, code, thing)| {
        format!(
            "The code of {name} is {code}. The river is quiet today. {name} lives in {city}. {name} owns the {thing}."
        )
    });
    sentences.join(" ")
}

/// Questions about each of them, and their answers.
fn questions() -> Vec<(String, String)> {
    PEOPLE
        .iter()
        .flat_map(|(name, city, code, thing)| {
            [
                (format!("What is the code of {name}?"), format!("The code of {name} is {code}.")),
                (format!("Where does {name} live?"), format!("{name} lives in {city}.")),
                (format!("What does {name} own?"), format!("{name} owns the {thing}.")),
            ]
        })
        .collect()
}

/// A chat in which the facts were told before `question` is asked.
fn chat(question: &str, salt: &str) -> Value {
    json!({
        "model": "models/demo", "temperature": 0, "max_tokens": 64, "cache_salt": salt, "messages": [
            {"role": "user", "content": facts()},
            {"role": "assistant", "content": "Noted."},
            {"role": "user", "content": question},
        ],
    })
}

/// The answer, and how many tokens of its prompt were cached.
async fn ask(api: &Api, question: &str, salt: &str) -> (String, u64) {
    let reply = api.post("/v1/chat/completions", &chat(question, salt)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let cached = reply.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or_default();
    (Answer::of_body(&reply.body).choices[0].text.clone(), cached)
}

/// Every question, several at a time, is answered rightly.
async fn all_are_right(api: &Api, salt: &str) {
    let questions = questions();
    let answers = join_all(questions.iter().map(|(question, _)| ask(api, question, salt))).await;
    for ((question, expected), (answer, _)) in questions.iter().zip(&answers) {
        assert_eq!(answer, expected, "{question}");
    }
}

fn shape() -> Shape {
    // Decode nodes compute nothing of a prompt while a prefill node is there.
    let decode = vec!["--local-offer-max-tokens", "0"];
    Shape { model: "models/demo", decode, proxy: vec!["--retry-budget", "10"], ..Shape::default() }
}

async fn crosses_a_hand_over(shape: Shape) {
    let transport = shape.kv_transport();
    let cluster = Cluster::start(shape).await;
    for (index, (question, expected)) in questions().into_iter().enumerate() {
        // With a salt of its own nobody finds what another left.
        assert_eq!(ask(&cluster.api, &question, &format!("alone {index}")).await, (expected, 0), "{question}");
    }
    let scrape = cluster.metrics().await;
    assert_eq!(scrape.sum("tandem_local_prefills_total", &[]), 0.0, "a decode node prefilled");
    assert_eq!(scrape.kv_transports(), [transport]);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_is_recalled_across_a_hand_over_by_shm() {
    crosses_a_hand_over(shape()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_is_recalled_across_a_hand_over_by_quic() {
    crosses_a_hand_over(shape().over_quic()).await;
}

/// The answers of the other tests come from the prompt, not from the weights.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_said_is_not_known() {
    let cluster = Cluster::up(&["--model", "models/demo"]).await;
    let mut num_guessed = 0;
    for (question, expected) in questions() {
        let body = json!({
            "model": "models/demo", "temperature": 0, "max_tokens": 64,
            "messages": [{"role": "user", "content": question}],
        });
        let reply = cluster.api.post("/v1/chat/completions", &body).await;
        num_guessed += usize::from(Answer::of_body(&reply.body).choices[0].text == expected);
    }
    assert!(num_guessed <= 3, "{num_guessed} answers were guessed");
    cluster.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_is_recalled_across_a_prefix_hit() {
    let cluster = Cluster::start(shape()).await;
    let mut questions = questions().into_iter();
    let (first, expected) = questions.next().unwrap();
    assert_eq!(ask(&cluster.api, &first, "a").await, (expected, 0));
    // All blocks up to the question are found again; what differs is computed elsewhere and handed over.
    let told = cluster.api.post("/tokenize", &json!({"model": "models/demo", "prompt": facts()})).await;
    let told = told.body["count"].as_u64().unwrap();
    for (question, expected) in questions {
        let (answer, cached) = ask(&cluster.api, &question, "a").await;
        assert_eq!(answer, expected, "{question}");
        assert!(cached > told - 16, "{cached} tokens were cached, the facts are {told}");
    }
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_is_recalled_after_a_prefill_node_s_death() {
    let mut cluster = Cluster::start(Shape { num_prefill: 2, ..shape() }).await;
    all_are_right(&cluster.api, "both").await;
    // The prompts are on their way when it dies: the first answers are awaited with it gone.
    let api = cluster.api.clone();
    let asked = tokio::spawn(async move { all_are_right(&api, "one dies").await });
    cluster.node("prefill-0").process.kill();
    wait::within("every question is answered", SOON, asked).await.unwrap();
    // What it had computed is known to the decode node, and what it had not, to nobody.
    all_are_right(&cluster.api, "both").await;
    all_are_right(&cluster.api, "the other").await;
    cluster.node("prefill-1").process.kill();
    all_are_right(&cluster.api, "none").await;
    cluster.all_known().await;
    cluster.shut_down().await;
}

/// A list to be repeated, and the answer.
fn copying(turn: usize) -> (String, String) {
    let things: Vec<&str> = (0..20).map(|at| PEOPLE[(turn * 5 + at * 7) % PEOPLE.len()].3).collect();
    (format!("Repeat: {}", things.join(" ")), format!("Here it is: {}", things.join(" ")))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_goes_on_rightly_after_its_decode_node_s_death() {
    let mut cluster = Cluster::start(Shape { num_prefill: 1, num_decode: 2, ..shape() }).await;
    for round in 0..NUM_ROUNDS_MAX {
        let asked: Vec<_> = (0..NUM_STREAMS).map(copying).collect();
        let streams = join_all(asked.iter().map(|(question, _)| async {
            let body = chat(question, &format!("round {round}"));
            cluster.api.try_stream_at("/v1/chat/completions", &body).await.unwrap_or_else(|reply| panic!("{reply:?}"))
        }));
        let mut streams: Vec<AnswerStream> = wait::within("the streams begin", SOON, streams).await;
        streams[0].read_chunks(3).await;
        cluster.node("decode-0").process.kill();
        for (stream, (question, expected)) in streams.into_iter().zip(&asked) {
            let answer = stream.rest().await.unwrap_or_else(|reason| panic!("{reason}: {question}"));
            assert_eq!(&answer.choices[0].text, expected, "{question}");
        }
        all_are_right(&cluster.api, "afterwards").await;
        cluster.all_known().await;
        if cluster.metrics().await.sum("tandem_resumes_total", &[]) > 0.0 {
            return cluster.shut_down().await;
        }
        cluster.restart("decode-0").await;
        cluster.all_known().await;
    }
    panic!("no answer was interrupted in {NUM_ROUNDS_MAX} rounds");
}
