//! A configuration as it was written: a tree of values that know their places.
//!
//! YAML, JSON, Python's dicts and environment variables all become this tree, so that there is one way on from here. It
//! knows places and nothing of what the keys mean.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::localizer::Localizer;
use serde_saphyr::{Location, SnippetMode, Spanned, UserMessageFormatter};

use super::error::{ConfigError, snake};

/// A value and its place.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub value: Value,
    pub origin: Origin,
    /// The text of an environment variable, before it was read as YAML.
    pub raw: Option<String>,
}

/// A value, as the notation alone tells it.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Negative(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key and its place.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub name: String,
    pub origin: Origin,
}

/// Where something was written.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// In the program.
    Program,
    /// In a text, at this line and column.
    Text { line: u32, column: u32 },
    /// In this environment variable.
    Variable(Arc<str>),
}

/// A step from a value to one inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Key(String),
    Index(usize),
}

// === impl Node ===

impl Node {
    /// A value that was written nowhere.
    pub fn new(value: Value) -> Self {
        Self { value, origin: Origin::Program, raw: None }
    }

    /// Reads YAML, of which JSON is a part. An empty text is null.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! {
            strict_booleans: true,
            with_snippet: false,
        };
        serde_saphyr::from_str_with_options::<Option<Self>>(text, options)
            .map(|node| node.unwrap_or_else(|| Self::new(Value::Null)))
            .map_err(|error| syntax_error(&error))
    }

    /// Marks everything in it as written in an environment variable.
    pub fn set_variable(&mut self, name: &Arc<str>) {
        self.origin = Origin::Variable(Arc::clone(name));
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|item| item.set_variable(name)),
            Value::Map(entries) => entries.iter_mut().for_each(|(key, value)| {
                key.origin = Origin::Variable(Arc::clone(name));
                value.set_variable(name);
            }),
            _ => {}
        }
    }

    /// The entry of a key, in whichever style it was written.
    pub fn entry(&self, key: &str) -> Option<&Node> {
        let Value::Map(entries) = &self.value else { return None };
        let key = snake(key);
        entries.iter().find(|(written, _)| snake(&written.name) == key).map(|(_, value)| value)
    }

    /// The place of what these steps lead to, or of the last thing on the way that exists.
    pub fn origin_of(&self, path: &[Segment]) -> &Origin {
        let Some((step, rest)) = path.split_first() else { return &self.origin };
        let inside = match (step, &self.value) {
            (Segment::Key(key), _) => self.entry(key),
            (Segment::Index(index), Value::List(items)) => items.get(*index),
            (Segment::Index(_), _) => None,
        };
        inside.map_or(&self.origin, |inside| inside.origin_of(rest))
    }

    /// What it is, for an error; its content too, unless that is a secret.
    pub fn describe(&self, secret: bool) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "keys and values".into(),
            Value::Text(_) if secret => "a text".into(),
            Value::Text(text) => format!("the text {:?}", text.chars().take(80).collect::<String>()),
            Value::Bool(_) | Value::Unsigned(_) | Value::Negative(_) | Value::Float(_) if secret => {
                "another kind of value".into()
            }
            Value::Bool(value) => format!("{value}"),
            Value::Unsigned(number) => format!("{number}"),
            Value::Negative(number) => format!("{number}"),
            Value::Float(number) => format!("{number:?}"),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { value, origin: referenced.into(), raw: None })
    }
}

impl From<serde_json::Value> for Node {
    fn from(value: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        Self::new(match value {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(value),
            Json::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => Value::Unsigned(number),
                (None, Some(number)) => Value::Negative(number),
                (None, None) => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Value::Text(text),
            Json::Array(items) => Value::List(items.into_iter().map(Self::from).collect()),
            Json::Object(entries) => {
                let key = |name| Key { name, origin: Origin::Program };
                Value::Map(entries.into_iter().map(|(name, value)| (key(name), value.into())).collect())
            }
        })
    }
}

// === impl Value ===

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Negative(value), Value::Unsigned))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(Spanned { value: name, referenced, .. }) = entries.next_key::<Spanned<String>>()? {
            map.push((Key { name, origin: referenced.into() }, entries.next_value()?));
        }
        Ok(Value::Map(map))
    }
}

// === impl Origin ===

impl Origin {
    /// An error at this place.
    pub fn error(&self, key: Option<String>, message: String) -> ConfigError {
        let error = ConfigError { message, key, ..ConfigError::default() };
        match self {
            Self::Program => error,
            Self::Text { line, column } => ConfigError { line: Some(*line), column: Some(*column), ..error },
            Self::Variable(name) => ConfigError { variable: Some(name.to_string()), ..error },
        }
    }
}

impl From<Location> for Origin {
    fn from(place: Location) -> Self {
        let (line, column) = (u32::try_from(place.line()), u32::try_from(place.column()));
        match (place == Location::UNKNOWN, line, column) {
            (false, Ok(line), Ok(column)) => Self::Text { line, column },
            _ => Self::Program,
        }
    }
}

// === impl Segment ===

/// The steps as a person writes them: `workers.static[0].url`.
pub(super) fn dotted(path: &[Segment]) -> String {
    let mut dotted = String::new();
    for segment in path {
        match segment {
            Segment::Key(key) if dotted.is_empty() => dotted.push_str(key),
            Segment::Key(key) => {
                dotted.push('.');
                dotted.push_str(key);
            }
            Segment::Index(index) => dotted.push_str(&format!("[{index}]")),
        }
    }
    dotted
}

/// Leaves places out of messages, which say them in front.
struct WithoutPlace;

impl Localizer for WithoutPlace {
    fn attach_location<'a>(&self, base: std::borrow::Cow<'a, str>, _: Location) -> std::borrow::Cow<'a, str> {
        base
    }
}

fn syntax_error(error: &serde_saphyr::Error) -> ConfigError {
    let formatter = UserMessageFormatter.with_localizer(&WithoutPlace);
    let message = error.render_with_options(serde_saphyr::render_options! { formatter: &formatter, snippets: SnippetMode::Off });
    error.location().map_or(Origin::Program, Origin::from).error(None, message)
}
