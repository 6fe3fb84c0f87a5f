//! Fields of a JSON object, with errors that name file, field, what was found and what was expected.

use std::ops::RangeInclusive;
use std::path::Path;

use common::tokens::Token;
use serde_json::Value;

use crate::spec::SpecError;

/// One object of a configuration file. `null` is the same as absent, unless asked.
pub(crate) struct Fields<'a> {
    path: &'a Path,
    prefix: String,
    object: &'a Value,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(path: &'a Path, object: &'a Value) -> Self {
        Self { path, prefix: String::new(), object }
    }

    /// The fields of `object`, found under `name`.
    pub(crate) fn inside(&self, name: &str, object: &'a Value) -> Self {
        Self { path: self.path, prefix: format!("{}{name}.", self.prefix), object }
    }

    pub(crate) fn path(&self) -> &Path {
        self.path
    }

    pub(crate) fn error(&self, field: &str, found: &Value, expected: &str) -> SpecError {
        let mut found = if found.is_null() { "missing".to_string() } else { found.to_string() };
        if found.chars().count() > 80 {
            found = found.chars().take(77).chain("...".chars()).collect();
        }
        SpecError::Field {
            path: self.path.to_path_buf(),
            field: format!("{}{field}", self.prefix),
            found,
            expected: expected.to_string(),
        }
    }

    pub(crate) fn optional(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is there and `null`.
    pub(crate) fn is_null(&self, field: &str) -> bool {
        self.object.get(field).is_some_and(Value::is_null)
    }

    /// A whole number in `range`; without a default it must be there.
    pub(crate) fn count(
        &self,
        field: &str,
        default: Option<usize>,
        range: RangeInclusive<usize>,
    ) -> Result<usize, SpecError> {
        let Some(value) = self.optional(field) else {
            return default.ok_or_else(|| self.count_error(field, &Value::Null, &range));
        };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.filter(|number| range.contains(number)).ok_or_else(|| self.count_error(field, value, &range))
    }

    fn count_error(&self, field: &str, found: &Value, range: &RangeInclusive<usize>) -> SpecError {
        self.error(field, found, &format!("a whole number from {} to {}", range.start(), range.end()))
    }

    /// A positive number.
    pub(crate) fn number(&self, field: &str, default: Option<f64>) -> Result<f64, SpecError> {
        self.number_in(field, default, f64::MIN_POSITIVE..=1e12)
    }

    pub(crate) fn number_in(
        &self,
        field: &str,
        default: Option<f64>,
        range: RangeInclusive<f64>,
    ) -> Result<f64, SpecError> {
        let expected = || match (*range.start(), *range.end()) {
            (f64::MIN_POSITIVE, _) => "a positive number".to_string(),
            (start, end) => format!("a number from {start} to {end}"),
        };
        let Some(value) = self.optional(field) else {
            return default.ok_or_else(|| self.error(field, &Value::Null, &expected()));
        };
        value.as_f64().filter(|number| range.contains(number)).ok_or_else(|| self.error(field, value, &expected()))
    }

    pub(crate) fn optional_number(&self, field: &str) -> Result<Option<f64>, SpecError> {
        self.optional(field).map(|_| self.number(field, None)).transpose()
    }

    pub(crate) fn switch(&self, field: &str, default: bool) -> Result<bool, SpecError> {
        match self.optional(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(field, value, "true or false")),
        }
    }

    pub(crate) fn text(&self, field: &str, default: Option<&str>) -> Result<String, SpecError> {
        match (self.optional(field), default) {
            (None, Some(default)) => Ok(default.to_string()),
            (found, _) => {
                let text = found.and_then(Value::as_str).map(str::to_string);
                text.ok_or_else(|| self.error(field, found.unwrap_or(&Value::Null), "text"))
            }
        }
    }

    /// One token id or a list of them; empty if the field is absent.
    pub(crate) fn token_ids(&self, field: &str, vocab_size: usize) -> Result<Vec<Token>, SpecError> {
        let Some(value) = self.optional(field) else { return Ok(Vec::new()) };
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        ids.iter()
            .map(|id| id.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as Token))
            .collect::<Option<Vec<Token>>>()
            .ok_or_else(|| self.error(field, value, &format!("a token id below {vocab_size}, or a list of them")))
    }
}
