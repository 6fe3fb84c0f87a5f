//! A model's chat template, rendered as Transformers renders it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as JinjaValue};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde_json::{Map, Value, json};

use super::content_format::ContentFormat;
use super::python_json::dumps;
use super::strftime::strftime;
use crate::openai::ChatPrompt;

/// Instructions a rendering may take: a few thousand per message is usual. A template that loops is cut off.
const FUEL: u64 = 20_000_000;
/// Nesting of macros and includes.
const RECURSION_MAX: usize = 64;

/// A template that cannot be used, or that refused these messages.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// It does not parse.
    #[error("the model's chat template cannot be used: {reason}")]
    Invalid {
        /// Line and reason.
        reason: String,
    },
    /// The model has none.
    #[error("the model has no chat template: use /v1/completions, or add chat_template.jinja to its folder")]
    Missing,
    /// It raised an exception about these messages (`raise_exception`): the client's to solve.
    #[error("the model's chat template refuses these messages: {reason}")]
    Refused {
        /// Its own words.
        reason: String,
    },
    /// It failed on these messages.
    #[error("the model's chat template failed on these messages: {reason}")]
    Failed {
        /// Line and reason.
        reason: String,
    },
}

/// A compiled chat template with the variables that the model's tokenizer adds.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    content_format: ContentFormat,
    /// Its own template for requests with tools, if the model has one, and what that one expects.
    tool_content_format: Option<ContentFormat>,
    /// `bos_token`, `eos_token` and the others of the tokenizer's configuration.
    special_tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// Compiles `source`, and `tool_source` for requests with tools if the model has one of its own.
    ///
    /// # Errors
    /// [`TemplateError::Invalid`].
    pub fn new(
        source: String,
        tool_source: Option<String>,
        special_tokens: Map<String, Value>,
    ) -> Result<Self, TemplateError> {
        let mut env = Environment::new();
        // What Transformers sets.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| TemplateError::Invalid { reason: describe(&e) })?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(RECURSION_MAX);
        env.add_function("raise_exception", |reason: String| -> Result<JinjaValue, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason).with_source(Raised))
        });
        env.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
            strftime(&format, now.as_secs())
        });
        env.add_filter("tojson", |value: Serde<Value>, kwargs: Kwargs| -> Result<JinjaValue, Error> {
            let indent: Option<usize> = kwargs.get("indent")?;
            // Accepted for their callers; the output is the same.
            let _: (Option<bool>, Option<bool>) = (kwargs.get("ensure_ascii")?, kwargs.get("sort_keys")?);
            kwargs.assert_all_used()?;
            Ok(JinjaValue::from_safe_string(dumps(&value.0, indent.map(|n| n.min(16)))))
        });
        let invalid = |e: Error| TemplateError::Invalid { reason: describe(&e) };
        let content_format = ContentFormat::of_template(&source);
        let tool_content_format = tool_source.as_deref().map(ContentFormat::of_template);
        env.add_template_owned("chat", source).map_err(invalid)?;
        if let Some(tool_source) = tool_source {
            env.add_template_owned("tools", tool_source).map_err(invalid)?;
        }
        Ok(Self { env, content_format, tool_content_format, special_tokens })
    }

    /// The prompt's text.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] in the template's words, or [`TemplateError::Failed`].
    pub fn render(&self, prompt: &ChatPrompt) -> Result<String, TemplateError> {
        let (name, format) = match self.tool_content_format {
            Some(format) if prompt.tools.is_some() => ("tools", format),
            _ => ("chat", self.content_format),
        };
        let messages = prompt.messages.iter().map(|message| format.apply(message.clone())).collect();
        let template = self.env.get_template(name).map_err(|e| TemplateError::Invalid { reason: describe(&e) })?;
        let mut variables = self.special_tokens.clone();
        variables.extend(prompt.variables.clone());
        variables.insert("messages".into(), Value::Array(messages));
        variables.insert("tools".into(), json!(prompt.tools));
        variables.insert("documents".into(), Value::Null);
        variables.insert("add_generation_prompt".into(), prompt.add_generation_prompt.into());
        template.render(JinjaValue::from(Serde(&variables))).map_err(|error| {
            match std::error::Error::source(&error).is_some_and(|source| source.is::<Raised>()) {
                true => TemplateError::Refused { reason: error.detail().unwrap_or_default().to_string() },
                false => TemplateError::Failed { reason: describe(&error) },
            }
        })
    }
}

fn describe(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("{error} (line {line})"),
        None => error.to_string(),
    }
}

/// Marks an error as the template's own `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(messages: Value) -> ChatPrompt {
        ChatPrompt {
            messages: messages.as_array().unwrap().clone(),
            tools: None,
            add_generation_prompt: true,
            variables: Map::new(),
            add_special_tokens: false,
        }
    }

    fn render(source: &str, prompt: &ChatPrompt) -> Result<String, TemplateError> {
        let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone();
        ChatTemplate::new(source.into(), None, tokens).unwrap().render(prompt)
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role.startswith('u') %}\n\
                      [{{ m['content'].strip() | upper }}]{% endif %}\n{% endfor %}\n";
        let text = render(source, &prompt(json!([{"role": "user", "content": " hi "}]))).unwrap();
        assert_eq!(text, "<s>\n[HI]");
    }

    #[test]
    fn an_exception_of_the_template_is_the_clients() {
        let source = "{% if messages[0].role != 'user' %}{{ raise_exception('Start with the user.') }}{% endif %}";
        let error = render(source, &prompt(json!([{"role": "system", "content": "x"}]))).unwrap_err();
        assert!(matches!(&error, TemplateError::Refused { reason } if reason == "Start with the user."), "{error}");
        let error = render("{{ 1 / 0 }}{{ nothing.x.y }}", &prompt(json!([]))).unwrap_err();
        assert!(matches!(error, TemplateError::Failed { .. }));
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let source = "{{ messages[0] | tojson }}{{ tools is none }}";
        let text = render(source, &prompt(json!([{"role": "user", "content": "<é>"}]))).unwrap();
        assert_eq!(text, r#"{"role": "user", "content": "<é>"}True"#);
    }

    #[test]
    fn a_template_that_never_ends_is_cut_off() {
        let source = "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(source, &prompt(json!([]))), Err(TemplateError::Failed { .. })));
    }

    #[test]
    fn loop_controls_and_namespaces_work() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.content == 'stop' %}{% break %}\
                      {% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}";
        let messages = json!([{"content": "a"}, {"content": "stop"}, {"content": "b"}]);
        assert_eq!(render(source, &prompt(messages)).unwrap(), "1");
    }

    #[test]
    fn parts_reach_a_template_that_loops_over_them() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let asked = prompt(json!([{"role": "user", "content": parts}, {"role": "user", "content": "c"}]));
        let parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
        assert_eq!(render(parts, &asked).unwrap(), "[a][b][c]");
        let text = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
        assert_eq!(render(text, &asked).unwrap(), "[a\nb][c]");
    }

    #[test]
    fn constructs_of_published_templates_work() {
        let source = r#"{%- macro show(m, last=false) -%}[{{ m.role }}{{ '*' if last else '' }}]{%- endmacro -%}
{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif -%}
{%- for m in loop_messages[::-1] %}{{ show(m, last=loop.last) }}{% endfor -%}
{%- for m in loop_messages if m.role != 'tool' -%}
{{- '|' ~ loop.index0 ~ ':' }}
{%- if m.content is string and '</think>' in m.content -%}
{{- m.content.split('</think>')[-1].lstrip('\n') | trim -}}
{%- elif m.tool_calls is defined and m.tool_calls -%}
{%- for call in m.tool_calls %}{% set f = call.function %}{% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }};{% endfor %}{% endfor -%}
{%- else -%}{{- (m.get('content') or '').replace('a', 'b').upper() -}}{%- endif -%}
{%- endfor -%}
{{- '|' ~ (loop_messages | selectattr('role', 'equalto', 'user') | list | length) -}}
{%- if enable_thinking is defined and enable_thinking is false %}|off{% endif -%}
{%- if not nothing is defined %}|{{ messages | map(attribute='role') | join(',') }}{% endif -%}"#;
        let call = json!({"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": "z"}}});
        let mut prompt = prompt(json!([
            {"role": "system", "content": "s"},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "<think>t</think>\n\nhey"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "content": "r"},
        ]));
        prompt.variables.insert("enable_thinking".into(), false.into());
        assert_eq!(
            render(source, &prompt).unwrap(),
            "[tool][assistant][assistant][user*]|0:BB|1:hey|2:x=1;y=\"z\";|1|off|system,user,assistant,assistant,tool"
        );
    }

    #[test]
    fn broken_template_is_refused_with_its_line() {
        let error = ChatTemplate::new("a\n{% if %}".into(), None, Map::new()).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
