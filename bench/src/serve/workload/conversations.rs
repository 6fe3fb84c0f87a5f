//! Conversations of a ShareGPT file: `[{"conversations": [{"from": "human", "value": ...}, ...]}, ...]`.

use anyhow::Context;
use serde_json::Value;

use super::{Message, Prompt, Session, Turn};

/// Where no output length is given, an answer is taken to have a token for so many bytes of the recorded one:
/// there is no tokenizer here.
const BYTES_PER_TOKEN: usize = 4;
/// Of an answer whose recorded one is longer, no more is asked for.
const OUTPUT_LEN_MAX: usize = 2048;

/// What is made of a conversation.
#[derive(Debug, Clone, Copy)]
pub struct ConversationShape {
    /// All its turns, each behind the answers that the endpoint really gave; otherwise its first alone.
    pub is_multi_turn: bool,
    /// Tokens to generate for each turn; `None`: from the length of the recorded answer.
    pub output_len: Option<usize>,
}

/// The first `num_max` conversations that have a question and an answer.
///
/// # Errors
/// If the file is not of the format, or has no such conversation.
pub fn parse(text: &str, num_max: usize, shape: ConversationShape) -> anyhow::Result<Vec<Session>> {
    let file: Value = serde_json::from_str(text).context("it is no JSON")?;
    let entries = file.as_array().context("it is no list of conversations, as ShareGPT files are")?;
    let sessions = entries.iter().filter_map(|entry| session(entry["conversations"].as_array()?, shape));
    let sessions: Vec<Session> = sessions.take(num_max).collect();
    anyhow::ensure!(!sessions.is_empty(), "it has no conversation in which a human asks and a model answers");
    Ok(sessions)
}

fn session(entries: &[Value], shape: ConversationShape) -> Option<Session> {
    let mut turns = Vec::new();
    for pair in entries.windows(2) {
        let (question, answer) = (text_of(&pair[0], &["human", "user"]), text_of(&pair[1], &["gpt", "assistant"]));
        let (Some(question), Some(answer)) = (question, answer) else { continue };
        let message = Message { role: "user".into(), content: question.into() };
        let max_tokens = shape.output_len.unwrap_or_else(|| answer.len().div_ceil(BYTES_PER_TOKEN).min(OUTPUT_LEN_MAX));
        turns.push(Turn { prompt: Prompt::Messages(vec![message]), max_tokens: max_tokens.max(1), expected: None });
        if !shape.is_multi_turn {
            break;
        }
    }
    (!turns.is_empty()).then_some(Session { turns })
}

fn text_of<'a>(entry: &'a Value, roles: &[&str]) -> Option<&'a str> {
    let role = entry["from"].as_str().or(entry["role"].as_str())?;
    let text = entry["value"].as_str().or(entry["content"].as_str())?;
    (roles.contains(&role) && !text.is_empty()).then_some(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const FILE: &str = r#"[
        {"id": "a", "conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "12345678"},
                                      {"from": "human", "value": "two?"}, {"from": "gpt", "value": "x"}]},
        {"id": "empty", "conversations": []},
        {"id": "no answer", "conversations": [{"from": "human", "value": "?"}]},
        {"id": "b", "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "three?"},
                                      {"from": "gpt", "value": "yes"}]}
    ]"#;

    fn questions(session: &Session) -> String {
        let all = session.turns.iter().map(|turn| match &turn.prompt {
            Prompt::Messages(messages) => format!("{} {}", messages[0].content, turn.max_tokens),
            other => panic!("{other:?}"),
        });
        all.collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn the_first_question_or_all_of_them_are_asked() {
        let one = parse(FILE, 10, ConversationShape { is_multi_turn: false, output_len: None }).unwrap();
        assert_eq!(one.iter().map(questions).collect::<Vec<_>>(), ["one? 2", "three? 1"]);
        let all = parse(FILE, 1, ConversationShape { is_multi_turn: true, output_len: Some(9) }).unwrap();
        assert_eq!(all.iter().map(questions).collect::<Vec<_>>(), ["one? 9, two? 9"]);
    }

    #[test]
    fn what_is_no_such_file_is_said() {
        let shape = ConversationShape { is_multi_turn: false, output_len: None };
        for (text, expected) in [("{", "no JSON"), ("{}", "no list"), ("[]", "no conversation"), ("[1]", "no conv")] {
            let reason = format!("{:#}", parse(text, 10, shape).unwrap_err());
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
