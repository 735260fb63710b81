//! From the tree as it was written to the structs: a serde deserializer whose errors name keys and places.
//!
//! Strict on types (a text is no number, a number no text), because a configuration that means something else than it
//! says is worse than one that is refused. A section without anything in it stands for its defaults.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};

use super::error::{ConfigError, did_you_mean, did_you_mean_value};
use super::redact::{self, is_secret};
use super::tree::{Key, Node, Origin, Segment, Value, dotted};

/// Reads a value from a node.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    node: &'a Node,
    secret: bool,
}

/// What went wrong, with the steps that led there, innermost first.
#[derive(Debug)]
pub(super) struct ReadError {
    message: String,
    path: Vec<Segment>,
    origin: Option<Origin>,
}

// === impl ReadError ===

impl ReadError {
    fn within(mut self, segment: Segment, origin: &Origin) -> Self {
        self.path.push(segment);
        self.origin.get_or_insert_with(|| origin.clone());
        self
    }

    /// The error as its reader sees it.
    pub fn into_config_error(mut self) -> ConfigError {
        self.path.reverse();
        let key = Some(dotted(&self.path)).filter(|key| !key.is_empty());
        self.origin.unwrap_or(Origin::Program).error(key, self.message)
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { message: message.to_string(), path: Vec::new(), origin: None }
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let found = match found {
            Unexpected::Unit | Unexpected::Option => "nothing",
            Unexpected::Seq => "a list",
            Unexpected::Map => "keys and values",
            Unexpected::Str(_) => "a text",
            Unexpected::Bool(_) => "true or false",
            Unexpected::Unsigned(_) | Unexpected::Signed(_) | Unexpected::Float(_) => "a number",
            _ => "something else",
        };
        Self::custom(format_args!("expected {expected}, found {found}"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(format_args!("unknown key{}", did_you_mean("", field, expected.iter().copied())))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let variant: String = variant.chars().take(80).collect();
        Self::custom(format_args!("unknown value {variant:?}{}", did_you_mean_value(&variant, expected)))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::custom(format_args!("{field} is required"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::custom(format_args!("{field} is given twice, in two ways of writing it"))
    }
}

// === impl Reader ===

impl<'a> Reader<'a> {
    /// Reads the whole of a tree.
    pub fn new(node: &'a Node) -> Self {
        Self { node, secret: false }
    }

    fn wrong_type(&self, expected: impl fmt::Display) -> ReadError {
        let found = self.node.describe(self.secret);
        ReadError {
            message: format!("expected {expected}, found {found}"),
            path: Vec::new(),
            origin: Some(self.node.origin.clone()),
        }
    }

    fn whole_number(&self, most: u64) -> Result<u64, ReadError> {
        match self.node.value {
            Value::Unsigned(number) if number <= most => Ok(number),
            Value::Unsigned(_) | Value::Negative(_) => Err(self.wrong_type(format_args!("a whole number from 0 to {most}"))),
            _ => Err(self.wrong_type("a whole number")),
        }
    }

    fn entries(&self) -> Result<Entries<'a>, ReadError> {
        let entries = match &self.node.value {
            Value::Map(entries) => entries.as_slice(),
            Value::Null => &[],
            _ => return Err(self.wrong_type("keys and values")),
        };
        Ok(Entries { entries: entries.iter(), current: None, secret: self.secret })
    }
}

macro_rules! whole_numbers {
    ($($method:ident $visit:ident $type:ty,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
            let number = self.whole_number(<$type>::MAX.into())?;
            <$type>::try_from(number).map_err(|_| self.wrong_type("a smaller number")).and_then(|number| visitor.$visit(number))
        }
    )*};
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(number) => visitor.visit_u64(*number),
            Value::Negative(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Text(text) => visitor.visit_str(text),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) => self.deserialize_map(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.node.value {
            Value::Bool(value) => visitor.visit_bool(value),
            _ => Err(self.wrong_type("true or false")),
        }
    }

    whole_numbers! {
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64,
    }

    #[allow(clippy::cast_precision_loss)]
    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.node.value {
            Value::Unsigned(number) => visitor.visit_f64(number as f64),
            Value::Negative(number) => visitor.visit_f64(number as f64),
            Value::Float(number) => visitor.visit_f64(number),
            _ => Err(self.wrong_type("a number")),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match (&self.node.value, &self.node.raw) {
            // A variable's text is meant as it stands (a password with a '#', or of digits alone), unless it is quoted.
            (_, Some(raw)) if !raw.starts_with(['"', '\'']) => visitor.visit_str(raw),
            (Value::Text(text), _) => visitor.visit_str(text),
            (Value::Bool(_) | Value::Unsigned(_) | Value::Negative(_) | Value::Float(_), _) => {
                Err(self.wrong_type("a text (in quotes)"))
            }
            _ => Err(self.wrong_type("a text")),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match (&self.node.value, self.node.raw.as_deref()) {
            (Value::Null, None | Some("" | "null" | "~")) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::List(items) => visitor.visit_seq(Items { items: items.iter().enumerate(), secret: self.secret }),
            _ => Err(self.wrong_type("a list")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_map(self.entries()?)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_map(self.entries()?)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Text(text) => visitor.visit_enum(StrDeserializer::new(text)),
            _ => Err(self.wrong_type(format_args!("one of {}", variants.join(", ")))),
        }
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 char bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct identifier
        ignored_any
    }
}

/// The items of a list, one after another.
struct Items<'a> {
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
    secret: bool,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        seed.deserialize(Reader { node, secret: self.secret })
            .map(Some)
            .map_err(|error| error.within(Segment::Index(index), &node.origin))
    }
}

/// The entries of a mapping, one after another.
struct Entries<'a> {
    entries: std::slice::Iter<'a, (Key, Node)>,
    current: Option<&'a (Key, Node)>,
    secret: bool,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        self.current = self.entries.next();
        let Some((key, _)) = self.current else { return Ok(None) };
        let name: StrDeserializer<'_, ReadError> = key.name.as_str().into_deserializer();
        // What stands among secrets in the place of a key may be one itself.
        let shown = if self.secret { redact::HIDDEN.to_owned() } else { key.name.clone() };
        seed.deserialize(name).map(Some).map_err(|error| error.within(Segment::Key(shown), &key.origin))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        let Some((key, node)) = self.current else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        seed.deserialize(Reader { node, secret: self.secret || is_secret(&key.name) })
            .map_err(|error| error.within(Segment::Key(key.name.clone()), &node.origin))
    }
}
