//! Overrides from the environment: `MLX_ROUTER__REQUEST_ROUTING__RETRY__MAX_RETRIES=3`.
//!
//! Two underscores separate the levels, each level is a key in SNAKE_CASE, and the value is YAML (`3`, `true`,
//! `[nats://a:4222, nats://b:4222]`); where a text is wanted, it is taken as it stands. A variable with this prefix that
//! names no key is an error.

use std::ffi::OsStr;
use std::sync::Arc;

use super::error::{ConfigError, did_you_mean, snake};
use super::schema::{self, Place};
use super::tree::{Key, Node, Origin, Value};

/// In front of every override.
const PREFIX: &str = "MLX_ROUTER__";

struct Override {
    name: Arc<str>,
    /// camelCase.
    keys: Vec<String>,
    value: Node,
}

/// Puts the overrides of this environment into the tree.
pub(super) fn apply<K, V>(tree: &mut Node, environment: impl IntoIterator<Item = (K, V)>) -> Result<(), ConfigError>
where
    K: AsRef<OsStr>,
    V: AsRef<OsStr>,
{
    let schema = schema::own_keys();
    let mut overrides = Vec::new();
    for (name, value) in environment {
        if let Some(name) = name.as_ref().to_str()
            && let Some(levels) = name.strip_prefix(PREFIX)
        {
            overrides.push(read(&schema, name, levels, value.as_ref())?);
        }
    }
    // What is nearer to the top comes first, so that a single key wins over its section.
    overrides.sort_by(|one, other| (one.keys.len(), &one.name).cmp(&(other.keys.len(), &other.name)));
    overrides.into_iter().try_for_each(|change| set(tree, &change.keys, &change.name, change.value))
}

fn read(schema: &serde_json::Value, name: &str, levels: &str, value: &OsStr) -> Result<Override, ConfigError> {
    let name: Arc<str> = name.into();
    let error = |key: &[String], message| {
        let key = Some(key.join(".")).filter(|key| !key.is_empty());
        Origin::Variable(Arc::clone(&name)).error(key, message)
    };
    let mut place = Place::top(schema);
    let mut keys: Vec<String> = Vec::new();
    let mut known = PREFIX.to_owned();
    for level in levels.split("__") {
        let upper = |key: &str| snake(key).to_ascii_uppercase();
        let Some((key, inside)) = place.key(&level.to_ascii_lowercase()).filter(|(key, _)| upper(key) == level) else {
            let names: Vec<String> = place.keys().map(upper).collect();
            let message = if names.is_empty() {
                "nothing inside this key can be set alone; give its whole value".into()
            } else {
                format!("unknown name{}", did_you_mean(&known, level, names.iter().map(String::as_str)))
            };
            return Err(error(&keys, message));
        };
        keys.push(key.to_owned());
        known = format!("{known}{level}__");
        place = inside;
    }
    let text = value.to_str().ok_or_else(|| error(&keys, "the value is not UTF-8".into()))?;
    // A text that is no YAML is still a text.
    let mut value = Node::parse(text).unwrap_or_else(|_| Node::new(Value::Text(text.to_owned())));
    value.set_variable(&name);
    value.raw = Some(text.to_owned());
    Ok(Override { name, keys, value })
}

fn set(node: &mut Node, keys: &[String], name: &Arc<str>, value: Node) -> Result<(), ConfigError> {
    let Some((key, rest)) = keys.split_first() else {
        *node = value;
        return Ok(());
    };
    if matches!(node.value, Value::Null) {
        node.value = Value::Map(Vec::new());
    }
    let found = node.describe(true);
    let Value::Map(entries) = &mut node.value else {
        return Err(node.origin.error(None, format!("expected keys and values for {key}, found {found}")));
    };
    let position = entries.iter().position(|(written, _)| snake(&written.name) == snake(key));
    let position = position.unwrap_or_else(|| {
        let origin = Origin::Variable(Arc::clone(name));
        let mut inside = Node::new(Value::Null);
        inside.origin = origin.clone();
        entries.push((Key { name: key.clone(), origin }, inside));
        entries.len() - 1
    });
    set(&mut entries[position].1, rest, name, value)
}
