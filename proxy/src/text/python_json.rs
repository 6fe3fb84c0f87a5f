//! JSON as Python's `json.dumps(..., ensure_ascii=False)` writes it, which is what chat templates were
//! trained with: a space behind `,` and `:`, nothing escaped for HTML.

use std::fmt::Write;

use serde_json::Value;

/// Writes `value`, indented by `indent` spaces per level if given.
pub fn dumps(value: &Value, indent: Option<usize>) -> String {
    let mut out = String::new();
    write_value(&mut out, value, indent, 0);
    out
}

fn write_value(out: &mut String, value: &Value, indent: Option<usize>, depth: usize) {
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                separate(out, i, indent, depth + 1);
                write_value(out, item, indent, depth + 1);
            }
            close(out, indent, depth, ']');
        }
        Value::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                separate(out, i, indent, depth + 1);
                write_string(out, key);
                out.push_str(": ");
                write_value(out, item, indent, depth + 1);
            }
            close(out, indent, depth, '}');
        }
        Value::String(text) => write_string(out, text),
        other => write!(out, "{other}").expect("writing to a String cannot fail"),
    }
}

fn write_string(out: &mut String, text: &str) {
    // serde_json escapes exactly what Python does without ensure_ascii.
    let text = Value::String(text.to_string()).to_string();
    // Python writes U+007F raw, as serde_json does.
    out.push_str(&text);
}

fn separate(out: &mut String, index: usize, indent: Option<usize>, depth: usize) {
    match (index, indent) {
        (0, None) => {}
        (_, None) => out.push_str(", "),
        (i, Some(width)) => {
            if i > 0 {
                out.push(',');
            }
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }
}

fn close(out: &mut String, indent: Option<usize>, depth: usize, bracket: char) {
    if let Some(width) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width * depth));
    }
    out.push(bracket);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn written_as_python_writes_it() {
        let value = json!({"name": "f<x>", "list": [1, 2.5, null, true], "empty": {}, "none": [], "ü": "\n\u{1}"});
        assert_eq!(
            dumps(&value, None),
            r#"{"name": "f<x>", "list": [1, 2.5, null, true], "empty": {}, "none": [], "ü": "\n\u0001"}"#
        );
        assert_eq!(dumps(&json!({"a": [1]}), Some(2)), "{\n  \"a\": [\n    1\n  ]\n}");
    }
}
