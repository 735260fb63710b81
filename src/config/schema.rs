//! The JSON Schema of the configuration, from the same structs that are read.

use schemars::schema_for;
use serde_json::{Map, Value, json};

use super::ClusterConfig;
use super::error::snake;
use super::tree::Segment;

/// Other names of strategies, and what they mean.
const OTHER_STRATEGIES: [(&str, &str); 2] = [("smart", "skills_based"), ("least_loaded", "least_requests")];

/// A place in the schema: one key of the configuration, with references followed.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    root: &'a Value,
    here: &'a Value,
}

// === impl ClusterConfig ===

impl ClusterConfig {
    /// The JSON Schema (2020-12) of a configuration file: descriptions, defaults and ranges of every key, in camelCase and
    /// snake_case, at the top or under one `cluster` key.
    #[must_use]
    pub fn schema() -> Value {
        let mut schema = own_keys();
        if let Some(definitions) = schema.get_mut("$defs").and_then(Value::as_object_mut) {
            definitions.values_mut().for_each(add_snake_case);
            let strategies = definitions.get_mut("Strategy").and_then(|strategy| strategy.get_mut("oneOf"));
            if let Some(strategies) = strategies.and_then(Value::as_array_mut) {
                strategies.extend(OTHER_STRATEGIES.map(
                    |(name, meant)| json!({"type": "string", "const": name, "description": format!("The same as {meant}.")}),
                ));
            }
        }
        add_snake_case(&mut schema);
        let Value::Object(mut top) = schema else { return schema };
        let definitions = top.remove("$defs");
        let dialect = top.remove("$schema");
        let mut definitions = definitions.and_then(|definitions| definitions.as_object().cloned()).unwrap_or_default();
        definitions.insert("ClusterConfig".into(), Value::Object(top));
        let cluster = json!({"$ref": "#/$defs/ClusterConfig"});
        json!({
            "$schema": dialect,
            "title": "mlx_serving_router configuration",
            "description": "Keys stand at the top, or all of them under one `cluster` key.",
            "anyOf": [
                cluster,
                {"type": "object", "properties": {"cluster": cluster}, "required": ["cluster"], "additionalProperties": false},
            ],
            "$defs": definitions,
        })
    }
}

/// The schema of the structs alone: camelCase keys, at the top.
pub(super) fn own_keys() -> Value {
    schema_for!(ClusterConfig).to_value()
}

/// Adds the snake_case way of writing each key.
fn add_snake_case(schema: &mut Value) {
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    let other: Map<String, Value> =
        properties.iter().filter(|(key, _)| snake(key) != **key).map(|(key, property)| (snake(key), property.clone())).collect();
    properties.extend(other);
}

// === impl Place ===

impl<'a> Place<'a> {
    /// The top of a schema.
    pub fn top(root: &'a Value) -> Self {
        Self { root, here: root }
    }

    /// The key as it is written in camelCase, and its place. `key` may be in either style.
    pub fn key(self, key: &str) -> Option<(&'a str, Self)> {
        let key = snake(key);
        let properties = self.here.get("properties")?.as_object()?;
        properties.iter().find(|(name, _)| snake(name) == key).map(|(name, here)| (name.as_str(), self.follow(here)))
    }

    /// All keys at this place; none where its keys are the user's own.
    pub fn keys(self) -> impl Iterator<Item = &'a str> {
        self.here.get("properties").and_then(Value::as_object).into_iter().flat_map(|keys| keys.keys().map(String::as_str))
    }

    /// What these steps lead to.
    pub fn at(self, path: &[Segment]) -> Option<Self> {
        path.iter().try_fold(self, |place, step| match step {
            Segment::Key(key) => place.key(key).map(|(_, place)| place),
            Segment::Index(_) => place.here.get("items").map(|items| place.follow(items)),
        })
    }

    /// `1 to 100`, `1 or more`, where the value has limits.
    pub fn range(self) -> Option<String> {
        match (self.here.get("minimum"), self.here.get("maximum")) {
            (Some(least), Some(most)) => Some(format!("{} to {}", plain(least), plain(most))),
            (Some(least), None) => Some(format!("{} or more", plain(least))),
            (None, Some(most)) => Some(format!("at most {}", plain(most))),
            (None, None) => None,
        }
    }

    fn follow(self, here: &'a Value) -> Self {
        let target = here.get("$ref").and_then(Value::as_str).and_then(|name| self.root.pointer(name.trim_start_matches('#')));
        Self { root: self.root, here: target.unwrap_or(here) }
    }
}

/// A number as a person writes it: `100` and not `100.0`.
pub(super) fn plain(number: &Value) -> String {
    let written = number.to_string();
    written.strip_suffix(".0").unwrap_or(&written).to_owned()
}
