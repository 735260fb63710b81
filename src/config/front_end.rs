//! The parts of `controller` that concern its web front-end alone: keys, signs of life in streams, other origins.

use std::fmt;

use garde::Validate;
use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{redact, rules};

/// A key that opens `/v1` and `/api`: a text, or an object with its limits. Never shown.
#[derive(Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ApiKey {
    /// A key without limits.
    Plain(String),
    /// A key with limits.
    Limited(LimitedKey),
}

/// A key with a name and limits.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LimitedKey {
    /// The key itself. Never shown.
    pub key: String,
    /// What messages call it; its place in the list where left out.
    #[serde(default)]
    pub name: Option<String>,
    /// The most completions that run at a time.
    #[serde(default, alias = "max_concurrent")]
    pub max_concurrent: Option<u32>,
    /// The most completions that begin in a minute.
    #[serde(default, alias = "requests_per_minute")]
    pub requests_per_minute: Option<u32>,
}

/// What a stream carries while there is nothing to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SseKeepalive {
    /// A comment line, which clients skip.
    #[default]
    Comment,
    /// A chunk without text, for what cuts streams that carry comments alone.
    Chunk,
    /// Nothing.
    Off,
}

/// Which web pages of other origins may ask.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct CorsConfig {
    /// Origins such as `https://chat.example`, or `*` for all; empty: none.
    #[serde(alias = "allow_origins")]
    #[garde(custom(rules::origins))]
    pub allow_origins: Vec<String>,
}

// === impl ApiKey ===

impl ApiKey {
    /// The key itself.
    #[must_use]
    pub fn secret(&self) -> &str {
        match self {
            Self::Plain(key) => key,
            Self::Limited(limited) => &limited.key,
        }
    }
}

/// Shows everything but the key.
impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(_) => f.write_str(redact::HIDDEN),
            Self::Limited(limited) => limited.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for ApiKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ApiKeyVisitor;

        impl<'de> Visitor<'de> for ApiKeyVisitor {
            type Value = ApiKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key (a text in quotes) or an object with key and limits")
            }

            fn visit_str<E: de::Error>(self, key: &str) -> Result<ApiKey, E> {
                Ok(ApiKey::Plain(key.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ApiKey, A::Error> {
                LimitedKey::deserialize(MapAccessDeserializer::new(map)).map(ApiKey::Limited)
            }
        }

        deserializer.deserialize_any(ApiKeyVisitor)
    }
}

// === impl LimitedKey ===

/// Shows everything but the key.
impl fmt::Debug for LimitedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitedKey")
            .field("key", &redact::HIDDEN)
            .field("name", &self.name)
            .field("max_concurrent", &self.max_concurrent)
            .field("requests_per_minute", &self.requests_per_minute)
            .finish()
    }
}
