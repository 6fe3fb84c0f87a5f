//! Whether a chat template reads a message's content as a string, as a list of parts, or as either.
//!
//! OpenAI's API allows both, templates often only one. Which one is read off the template's text, since no
//! checkpoint says it: a template that knows parts loops over something called `content`.

use serde_json::{Value, json};

/// What a template expects of `message.content`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentFormat {
    /// A string: parts are joined, one per line.
    Text,
    /// A list of parts: a string becomes one part.
    Parts,
    /// It asks which of the two it got: content goes in as it came.
    Either,
}

impl ContentFormat {
    /// Reads it off a template's source.
    pub fn of_template(source: &str) -> Self {
        let has_loop = statements(source).any(is_loop_over_content);
        let asks_for_string = ["content is string", "content'] is string", "content\"] is string"]
            .iter()
            .any(|test| source.contains(test));
        match (has_loop, asks_for_string) {
            (false, _) => Self::Text,
            (true, true) => Self::Either,
            (true, false) => Self::Parts,
        }
    }

    /// The message with its content in this format. Content that is neither a string nor a list (null, of an
    /// assistant that only called tools) stays as it is.
    pub fn apply(self, mut message: Value) -> Value {
        if let Some(content) = message.get_mut("content") {
            match (self, &*content) {
                (Self::Text, Value::Array(parts)) => {
                    let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
                    *content = Value::String(texts.join("\n"));
                }
                (Self::Parts, Value::String(text)) => *content = json!([{"type": "text", "text": text}]),
                _ => {}
            }
        }
        message
    }
}

/// The insides of `{% ... %}`, without the marks that trim white space.
fn statements(source: &str) -> impl Iterator<Item = &str> {
    source.split("{%").skip(1).filter_map(|rest| {
        let (inside, _) = rest.split_once("%}")?;
        Some(inside.trim_matches(['-', '+']).trim())
    })
}

/// `for part in message.content`, `message['content']` or a variable of that name, filtered or not.
fn is_loop_over_content(statement: &str) -> bool {
    let Some((_, iterated)) = statement.strip_prefix("for ").and_then(|rest| rest.split_once(" in ")) else {
        return false;
    };
    let end = iterated.find(['|', ' ']).unwrap_or(iterated.len());
    let iterated = iterated[..end].trim_end_matches(['\'', '"', ']']);
    iterated.strip_suffix("content").is_some_and(|before| !before.ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_is_read_off_the_loop_and_the_question() {
        use ContentFormat::*;
        for (source, format) in [
            ("{% for m in messages %}{{ m.content }}{% endfor %}", Text),
            ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}", Text),
            ("{% for m in messages %}{%- for part in m.content -%}{{ part.text }}{% endfor %}{% endfor %}", Parts),
            ("{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{% endfor %}", Parts),
            ("{% if m[\"content\"] is string %}{% else %}{% for p in m[\"content\"] %}{% endfor %}{% endif %}", Either),
            (
                "{% macro show(content) %}{% if content is string %}{% endif %}{% for p in content %}{% endfor %}",
                Either,
            ),
            ("{% for p in discontent %}{% endfor %}", Text),
        ] {
            assert_eq!(ContentFormat::of_template(source), format, "{source}");
        }
    }

    #[test]
    fn content_is_turned_into_what_the_template_expects() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let content =
            |format: ContentFormat, content: &Value| format.apply(json!({"content": content}))["content"].clone();
        assert_eq!(content(ContentFormat::Text, &parts), "a\nb");
        assert_eq!(content(ContentFormat::Text, &json!("a")), "a");
        assert_eq!(content(ContentFormat::Parts, &json!("a")), json!([{"type": "text", "text": "a"}]));
        for kept in [&parts, &json!("a"), &Value::Null] {
            assert_eq!(content(ContentFormat::Either, kept), *kept);
        }
        assert_eq!(content(ContentFormat::Parts, &Value::Null), Value::Null);
    }
}
