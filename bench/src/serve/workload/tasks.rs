//! Questions with the answers they must get, one JSON object a line:
//! `{"messages": [{"role": "user", "content": ...}, ...], "answer": ..., "max_tokens": ...}`.

use anyhow::Context;
use serde_json::Value;

use super::{Message, Prompt, Session, Turn};

/// Tokens to generate where a task does not say it.
const MAX_TOKENS: usize = 64;

/// The first `num_max` tasks.
///
/// # Errors
/// With the number of the line that is wrong.
pub fn parse(text: &str, num_max: usize) -> anyhow::Result<Vec<Session>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(num_max);
    let sessions: Vec<Session> = lines
        .map(|(number, line)| parse_task(line).with_context(|| format!("line {}", number + 1)))
        .collect::<anyhow::Result<_>>()?;
    anyhow::ensure!(!sessions.is_empty(), "there is no task");
    Ok(sessions)
}

fn parse_task(line: &str) -> anyhow::Result<Session> {
    let task: Value = serde_json::from_str(line).context("it is no JSON object")?;
    let messages =
        task["messages"].as_array().filter(|messages| !messages.is_empty()).context("messages is no list")?;
    let message = |message: &Value| {
        Some(Message { role: message["role"].as_str()?.into(), content: message["content"].as_str()?.into() })
    };
    let messages: Option<Vec<Message>> = messages.iter().map(message).collect();
    let max_tokens = match &task["max_tokens"] {
        Value::Null => MAX_TOKENS,
        told => told.as_u64().filter(|told| (1..=1 << 20).contains(told)).context("max_tokens is no length")? as usize,
    };
    let turn = Turn {
        prompt: Prompt::Messages(messages.context("a message has no role or no text")?),
        max_tokens,
        expected: Some(task["answer"].as_str().context("answer is no text")?.trim().to_string()),
    };
    Ok(Session { turns: vec![turn] })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_messages_and_an_answer() {
        let text = "{\"messages\": [{\"role\": \"user\", \"content\": \"2+2?\"}], \"answer\": \" 4\\n\"}\n\n";
        let sessions = parse(text, 10).unwrap();
        let turn = &sessions[0].turns[0];
        assert_eq!((turn.expected.as_deref(), turn.max_tokens), (Some("4"), MAX_TOKENS));
        for (wrong, expected) in [
            ("[]", "messages"),
            (r#"{"messages": [{"role": "user"}], "answer": "4"}"#, "a message"),
            (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "answer"),
            (r#"{"messages": [{"role": "user", "content": "x"}], "answer": "4", "max_tokens": 0}"#, "max_tokens"),
        ] {
            let reason = format!("{:#}", parse(wrong, 10).unwrap_err());
            assert!(reason.contains("line 1") && reason.contains(expected), "{reason}");
        }
        assert!(parse("", 10).is_err());
    }
}
