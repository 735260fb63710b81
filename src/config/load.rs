//! From a file, a text or a value to a checked [`ClusterConfig`].

use std::ffi::{OsStr, OsString};
use std::path::Path;

use garde::Validate;
use serde::Deserialize;

use super::error::ConfigError;
use super::read::Reader;
use super::schema::{self, Place, plain};
use super::tree::{Node, Segment, Value, dotted};
use super::{ClusterConfig, environment};

const NO_ENVIRONMENT: [(OsString, OsString); 0] = [];

// === impl ClusterConfig ===

impl ClusterConfig {
    /// Reads a YAML or JSON file and the overrides of an environment, usually [`std::env::vars_os`].
    ///
    /// # Errors
    /// The file cannot be read, or something in it or in the environment is no valid configuration.
    pub fn load<K, V>(path: impl AsRef<Path>, environment: impl IntoIterator<Item = (K, V)>) -> Result<Self, ConfigError>
    where
        K: AsRef<OsStr>,
        V: AsRef<OsStr>,
    {
        let path = path.as_ref();
        let name = path.display().to_string();
        let in_file = |error: ConfigError| ConfigError { path: Some(name.clone()), ..error };
        let text = std::fs::read_to_string(path)
            .map_err(|error| in_file(ConfigError { message: format!("cannot be read: {error}"), ..ConfigError::default() }))?;
        Node::parse(&text).and_then(|tree| build(tree, environment)).map_err(in_file)
    }

    /// The defaults with the overrides of an environment, usually [`std::env::vars_os`].
    ///
    /// # Errors
    /// Something in the environment is no valid configuration.
    pub fn from_environment<K, V>(environment: impl IntoIterator<Item = (K, V)>) -> Result<Self, ConfigError>
    where
        K: AsRef<OsStr>,
        V: AsRef<OsStr>,
    {
        build(Node::new(Value::Null), environment)
    }

    /// Reads a YAML or JSON text. `path` names it in errors.
    ///
    /// # Errors
    /// Something in it is no valid configuration.
    pub fn from_yaml(text: &str, path: Option<&str>) -> Result<Self, ConfigError> {
        Node::parse(text)
            .and_then(|tree| build(tree, NO_ENVIRONMENT))
            .map_err(|error| ConfigError { path: path.map(str::to_owned), ..error })
    }

    /// Reads a value of the same shape as the file.
    ///
    /// # Errors
    /// Something in it is no valid configuration.
    pub fn from_value(value: serde_json::Value) -> Result<Self, ConfigError> {
        build(value.into(), NO_ENVIRONMENT)
    }

    /// Checks a configuration that was put together in the program; one that was read is checked already.
    ///
    /// # Errors
    /// A value is out of range, or two of them contradict each other.
    pub fn check(&self) -> Result<(), ConfigError> {
        check(self, &Node::new(Value::Null))
    }
}

fn build<K, V>(tree: Node, environment: impl IntoIterator<Item = (K, V)>) -> Result<ClusterConfig, ConfigError>
where
    K: AsRef<OsStr>,
    V: AsRef<OsStr>,
{
    let mut tree = without_cluster_key(tree)?;
    environment::apply(&mut tree, environment)?;
    let config = ClusterConfig::deserialize(Reader::new(&tree)).map_err(|error| error.into_config_error())?;
    check(&config, &tree).map(|()| config)
}

/// The keys under `cluster`, where they stand there.
fn without_cluster_key(mut tree: Node) -> Result<Node, ConfigError> {
    let Value::Map(entries) = &mut tree.value else { return Ok(tree) };
    let Some(position) = entries.iter().position(|(key, _)| key.name == "cluster") else { return Ok(tree) };
    if entries.len() == 1 {
        return Ok(entries.swap_remove(position).1);
    }
    let (other, _) = &entries[usize::from(position == 0)];
    let message = "stands beside cluster; put all keys under it, or all of them at the top".to_owned();
    Err(other.origin.error(Some(other.name.clone()), message))
}

/// Ranges, and what a type alone cannot say. Places come from the tree.
fn check(config: &ClusterConfig, tree: &Node) -> Result<(), ConfigError> {
    let Err(report) = config.validate() else { return Ok(()) };
    let Some((path, error)) = report.iter().next() else { return Ok(()) };
    let schema = schema::own_keys();
    let path = as_written(&path.to_string(), Place::top(&schema));
    let message = match Place::top(&schema).at(&path).and_then(Place::range) {
        Some(range) => format!("{} is out of range; {range} is allowed", plain(&value_at(config, &path))),
        None => error.message().to_owned(),
    };
    Err(tree.origin_of(&path).error(Some(dotted(&path)), message))
}

/// The steps to a field, from its path in the structs (`workers.static[0].worker_id`), with camelCase keys.
fn as_written(path: &str, top: Place<'_>) -> Vec<Segment> {
    let mut steps = Vec::new();
    for part in path.split(['.', '[']) {
        let step = match part.strip_suffix(']').and_then(|index| index.parse().ok()) {
            Some(index) => Segment::Index(index),
            None => {
                let field = part.trim_start_matches("r#");
                let key = top.at(&steps).and_then(|place| place.key(field)).map_or(field, |(key, _)| key);
                Segment::Key(key.to_owned())
            }
        };
        steps.push(step);
    }
    steps
}

/// The value that these steps lead to. Only ever asked for numbers.
fn value_at(config: &ClusterConfig, path: &[Segment]) -> serde_json::Value {
    let value = serde_json::to_value(config).unwrap_or_default();
    let inside = path.iter().try_fold(&value, |value, step| match step {
        Segment::Key(key) => value.get(key),
        Segment::Index(index) => value.get(index),
    });
    inside.cloned().unwrap_or_default()
}
