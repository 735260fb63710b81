//! A body's fields, read one by one, so that an error names the field and never repeats what stood there.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::Json;

/// How deep lists and objects may stand in each other. Parsers of workers and templates recurse.
const MAX_DEPTH: usize = 128;

/// A field as it came: absent where it is missing or null.
pub(super) type Raw<'a> = Option<&'a RawValue>;

/// The fields that mean something; all others are ignored.
#[derive(Deserialize)]
pub(super) struct Body<'a> {
    #[serde(borrow)]
    pub model: Raw<'a>,
    pub messages: Raw<'a>,
    pub prompt: Raw<'a>,
    pub max_tokens: Raw<'a>,
    pub max_completion_tokens: Raw<'a>,
    pub temperature: Raw<'a>,
    pub top_p: Raw<'a>,
    pub top_k: Raw<'a>,
    pub min_p: Raw<'a>,
    pub seed: Raw<'a>,
    pub stop: Raw<'a>,
    pub repetition_penalty: Raw<'a>,
    pub presence_penalty: Raw<'a>,
    pub frequency_penalty: Raw<'a>,
    pub logit_bias: Raw<'a>,
    pub logprobs: Raw<'a>,
    pub top_logprobs: Raw<'a>,
    pub tools: Raw<'a>,
    pub tool_choice: Raw<'a>,
    pub response_format: Raw<'a>,
    pub n: Raw<'a>,
    pub best_of: Raw<'a>,
    pub echo: Raw<'a>,
    pub suffix: Raw<'a>,
    pub stream: Raw<'a>,
    pub stream_options: Raw<'a>,
    pub session_id: Raw<'a>,
    pub prompt_cache_key: Raw<'a>,
    pub user: Raw<'a>,
    pub priority: Raw<'a>,
}

/// An object with its keys in their order and its values as they came.
pub(super) struct Object<'a>(pub(super) Vec<(Cow<'a, str>, Cow<'a, RawValue>)>);

// === impl Body ===

impl<'a> Body<'a> {
    /// Reads a body.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED says where the JSON is broken.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, ControllerError> {
        let refused = |message: String| ControllerError::new(ControllerErrorCode::RequestValidationFailed, message);
        if too_deep(bytes) {
            return Err(refused(format!("the body nests lists and objects more than {MAX_DEPTH} deep")));
        }
        // Looked at once, the characters need not be looked at in each text.
        let body = std::str::from_utf8(bytes)
            .map_err(|error| refused(format!("the body is no JSON: byte {} is not of UTF-8", error.valid_up_to())))?;
        serde_json::from_str(body).map_err(|error| match error.classify() {
            // A parser's words about syntax name characters that it wanted, never text that it met.
            Category::Syntax | Category::Eof | Category::Io => refused(format!("the body is no JSON: {error}")),
            Category::Data => refused(format!(
                "the body has to be one JSON object that has each key once (line {}, column {})",
                error.line(),
                error.column()
            )),
        })
    }
}

// === impl Object ===

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                /// Borrows the key where it has no escapes.
                #[derive(Deserialize)]
                struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

                let mut entries = Vec::with_capacity(4);
                while let Some((key, value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    entries.push((key.0, Cow::Borrowed(value)));
                }
                Ok(Object(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// A field of a type; `wanted` completes "…; ___ is wanted".
pub(super) fn read<'a, T: Deserialize<'a>>(name: &str, raw: Raw<'a>, wanted: &str) -> Result<Option<T>, ControllerError> {
    raw.map(|raw| serde_json::from_str(raw.get()).map_err(|_| unsuitable(name, raw, wanted))).transpose()
}

/// A text.
pub(super) fn text(name: &str, raw: Raw<'_>) -> Result<Option<String>, ControllerError> {
    read(name, raw, "a text")
}

/// A whole number, also one that is written as `5.0`, as languages with one kind of number do.
pub(super) fn integer(name: &str, raw: Raw<'_>) -> Result<Option<i64>, ControllerError> {
    let Some(value) = raw else { return Ok(None) };
    match serde_json::from_str::<f64>(value.get()) {
        // Of the bounds the lower one is a whole number of 64 bits, the upper one the first that is none.
        #[allow(clippy::cast_possible_truncation)]
        Ok(number)
            if value.get().contains(['.', 'e', 'E'])
                && number.fract() == 0.0
                && (-2_f64.powi(63)..2_f64.powi(63)).contains(&number) =>
        {
            Ok(Some(number as i64))
        }
        _ => read(name, raw, "a whole number of 64 bits"),
    }
}

/// A number.
pub(super) fn number(name: &str, raw: Raw<'_>) -> Result<Option<f64>, ControllerError> {
    read(name, raw, "a number")
}

/// True or false; false where it is missing.
pub(super) fn flag(name: &str, raw: Raw<'_>) -> Result<bool, ControllerError> {
    read(name, raw, "true or false").map(Option::unwrap_or_default)
}

/// An object, passed on as it is.
pub(super) fn object(name: &str, raw: Raw<'_>) -> Result<Option<Json>, ControllerError> {
    raw.map(|raw| if starts_with(raw, b'{') { Ok(raw.into()) } else { Err(unsuitable(name, raw, "an object")) }).transpose()
}

/// A list that is not empty, passed on as it is.
pub(super) fn list(name: &str, raw: Raw<'_>) -> Result<Option<Json>, ControllerError> {
    match raw {
        Some(raw) if !starts_with(raw, b'[') => Err(unsuitable(name, raw, "a list")),
        Some(raw) if !raw.get()[1..].trim_start().starts_with(']') => Ok(Some(raw.into())),
        _ => Ok(None),
    }
}

/// A text or a list of texts.
pub(super) fn texts(name: &str, raw: Raw<'_>) -> Result<Option<Vec<String>>, ControllerError> {
    const WANTED: &str = "a text or a list of texts";
    match raw {
        Some(one) if starts_with(one, b'"') => read(name, raw, WANTED).map(|one: Option<String>| one.map(|one| vec![one])),
        _ => read(name, raw, WANTED).map(|all: Option<Vec<String>>| all.filter(|all| !all.is_empty())),
    }
}

/// Whether a value is a text (`"`), a list (`[`), an object (`{`).
pub(super) fn starts_with(raw: &RawValue, first: u8) -> bool {
    raw.get().as_bytes().first() == Some(&first)
}

/// The error of a field of a wrong type.
pub(super) fn unsuitable(name: &str, raw: &RawValue, wanted: &str) -> ControllerError {
    let found = match raw.get().as_bytes().first() {
        Some(b'"') => "a text",
        Some(b'[') => "a list",
        Some(b'{') => "an object",
        Some(b't' | b'f') => "true or false",
        Some(b'n') => "null",
        _ => "a number",
    };
    if wanted.contains(found) {
        ControllerError::validation(name, format_args!("cannot be read; {wanted} is wanted"))
    } else {
        ControllerError::validation(name, format_args!("is {found}; {wanted} is wanted"))
    }
}

fn too_deep(bytes: &[u8]) -> bool {
    // Mostly there are not even so many.
    if bytes.iter().filter(|byte| matches!(byte, b'[' | b'{')).count() <= MAX_DEPTH {
        return false;
    }
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in bytes {
        if in_text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_text = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => in_text = true,
                b'[' | b'{' => {
                    depth += 1;
                    if depth > MAX_DEPTH {
                        return true;
                    }
                }
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
        }
    }
    false
}
