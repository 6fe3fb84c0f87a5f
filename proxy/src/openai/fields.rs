//! Reading a request's JSON field by field, so that every refusal names its parameter.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object and the path that led to it. `null` counts as absent, as in OpenAI's API.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a str,
}

/// What a value is, in words.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn wrong_type(param: String, value: &Value, expected: &str) -> ApiError {
    ApiError::invalid(&param, format!("{param} is {}, expected {expected}", kind_of(value)))
}

impl<'a> Fields<'a> {
    /// The fields of the request itself.
    ///
    /// # Errors
    /// If the body is not an object.
    pub fn of_body(value: &'a Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, path: "" }),
            other => Err(ApiError::new(
                super::error::ErrorKind::InvalidRequest,
                format!("the body is {}, expected a JSON object", kind_of(other)),
            )),
        }
    }

    /// The fields of the object at `path`.
    ///
    /// # Errors
    /// If the value there is not an object.
    pub fn at(path: &'a str, value: &'a Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, path }),
            other => Err(wrong_type(path.to_string(), other, "an object")),
        }
    }

    /// The full path of a field.
    pub fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    /// The raw value, unless absent or null.
    pub fn value(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// All of it.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// A field that must be there.
    ///
    /// # Errors
    /// If it is absent.
    pub fn required(&self, name: &str) -> Result<&'a Value, ApiError> {
        self.value(name).ok_or_else(|| {
            let path = self.path_of(name);
            ApiError::invalid(&path, format!("{path} is missing"))
        })
    }

    /// A string.
    ///
    /// # Errors
    /// If it is something else.
    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong_type(self.path_of(name), other, "a string")),
        }
    }

    /// A boolean, `default` if absent.
    ///
    /// # Errors
    /// If it is something else.
    pub fn boolean(&self, name: &str, default: bool) -> Result<bool, ApiError> {
        match self.value(name) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(wrong_type(self.path_of(name), other, "true or false")),
        }
    }

    /// A number within `range`.
    ///
    /// # Errors
    /// If it is something else or outside.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let Some(number) = value.as_f64() else { return Err(wrong_type(self.path_of(name), value, "a number")) };
        if !range.contains(&number) {
            return Err(self.outside(name, number, range.start(), range.end()));
        }
        Ok(Some(number as f32))
    }

    /// A whole number within `range`.
    ///
    /// # Errors
    /// If it is something else or outside.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let Some(as_float) = value.as_f64().filter(|float| float.fract() == 0.0) else {
            return Err(wrong_type(self.path_of(name), value, "a whole number"));
        };
        // 3.0 is what some clients write for 3. Beyond 64 bits the cast would clip.
        let is_exact = as_float.abs() < i64::MAX as f64;
        let whole = value.as_i64().or_else(|| is_exact.then_some(as_float as i64));
        match whole.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.outside(name, value, range.start(), range.end())),
        }
    }

    fn outside(&self, name: &str, found: impl Display, first: impl Display, last: impl Display) -> ApiError {
        let path = self.path_of(name);
        ApiError::invalid(&path, format!("{path} is {found}, expected {first} to {last}"))
    }

    /// A list of token ids, each below `vocab_size`.
    ///
    /// # Errors
    /// If it is something else, too long, or holds an id that the model does not have.
    pub fn token_ids(&self, name: &str, len_max: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let path = self.path_of(name);
        let Value::Array(items) = value else { return Err(wrong_type(path, value, "a list of token ids")) };
        if items.len() > len_max {
            return Err(ApiError::invalid(&path, format!("{path} has {} entries, at most {len_max}", items.len())));
        }
        parse_token_ids(&path, items).map(Some)
    }
}

/// Token ids from JSON numbers. Whether the model has them is checked where its vocabulary is known.
///
/// # Errors
/// If one is not a token id.
pub fn parse_token_ids(path: &str, items: &[Value]) -> Result<Vec<u32>, ApiError> {
    let mut ids = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        match item.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => ids.push(id),
            None => return Err(ApiError::invalid(path, format!("{path}[{i}] is {item}, expected a token id"))),
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn wrong_type_and_range_name_the_parameter() {
        let body = json!({"temperature": "hot", "top_p": 2, "n": 1.5, "seed": null, "max_tokens": 3.0});
        let fields = Fields::of_body(&body).unwrap();
        assert_eq!(fields.number("temperature", 0.0..=2.0).unwrap_err().param.as_deref(), Some("temperature"));
        let error = fields.number("top_p", 0.0..=1.0).unwrap_err();
        assert_eq!(error.message, "top_p is 2, expected 0 to 1");
        let error = fields.integer("n", 1..=8).unwrap_err();
        assert_eq!(error.message, "n is a number, expected a whole number");
        assert_eq!(fields.integer("seed", 0..=8).unwrap(), None);
        assert_eq!(fields.integer("max_tokens", 1..=8).unwrap(), Some(3));
    }

    #[test]
    fn number_beyond_64_bits_is_shown_and_never_clipped_into_range() {
        for (written, range) in [
            ("9223372036854775808", i64::MIN..=i64::MAX),
            ("18446744073709551615", 1..=8),
            // JSON numbers beyond 64 bits are floats here, and shown as such.
            ("-9.3e+18", i64::MIN..=i64::MAX),
            ("1e+30", i64::MIN..=i64::MAX),
            ("9", 1..=8),
        ] {
            let body: Value = serde_json::from_str(&format!("{{\"max_tokens\": {written}}}")).unwrap();
            let error = Fields::of_body(&body).unwrap().integer("max_tokens", range.clone()).unwrap_err();
            let expected = format!("max_tokens is {written}, expected {} to {}", range.start(), range.end());
            assert_eq!(error.message, expected);
        }
        let body = json!({"seed": i64::MAX, "least": i64::MIN});
        let fields = Fields::of_body(&body).unwrap();
        assert_eq!(fields.integer("seed", i64::MIN..=i64::MAX).unwrap(), Some(i64::MAX));
        assert_eq!(fields.integer("least", i64::MIN..=i64::MAX).unwrap(), Some(i64::MIN));
    }
}
