//! `ClusterConfig` for Python.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyTuple, PyType};
use serde_json::{Map, Value};

use super::{errors, json};
use crate::config::{ClusterConfig, ConfigError};

/// The whole configuration; without arguments, all defaults.
///
/// Errors name the file, line, column and key, and say what would be right.
#[derive(Clone, PartialEq)]
#[pyclass(frozen, eq, module = "mlx_serving_router._native", name = "ClusterConfig")]
pub(super) struct PyClusterConfig(pub(super) ClusterConfig);

fn checked(py: Python<'_>, config: Result<ClusterConfig, ConfigError>) -> PyResult<PyClusterConfig> {
    config.map(PyClusterConfig).map_err(|error| errors::raise_config(py, &error))
}

#[pymethods]
impl PyClusterConfig {
    #[new]
    fn new() -> Self {
        Self(ClusterConfig::default())
    }

    /// Reads a YAML or JSON file, and the overrides `MLX_ROUTER__…` of the environment.
    ///
    /// Raises:
    ///     ConfigError: The file cannot be read, or something in it or in the environment is no valid configuration.
    #[classmethod]
    fn load(_class: &Bound<'_, PyType>, py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        checked(py, py.detach(|| ClusterConfig::load(path, std::env::vars_os())))
    }

    /// The defaults with the overrides `MLX_ROUTER__…` of the environment.
    ///
    /// Raises:
    ///     ConfigError: Something in the environment is no valid configuration.
    #[classmethod]
    fn from_environment(_class: &Bound<'_, PyType>, py: Python<'_>) -> PyResult<Self> {
        checked(py, ClusterConfig::from_environment(std::env::vars_os()))
    }

    /// A configuration of the shape of the file, with camelCase or snake_case keys. The environment is not looked at.
    ///
    /// Raises:
    ///     ConfigError: Something in it is no valid configuration.
    ///     TypeError: It holds what no file can hold.
    #[classmethod]
    fn from_dict(_class: &Bound<'_, PyType>, values: &Bound<'_, PyMapping>) -> PyResult<Self> {
        let value: Value = json::from_python("config", values.as_any())?;
        checked(values.py(), ClusterConfig::from_value(value))
    }

    /// All of it with camelCase keys. Secrets are in it.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0)
    }

    /// All of it with camelCase keys, to be shown: `***` stands for each secret.
    fn redacted<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::to_python(py, &self.0.redacted())
    }

    /// The JSON Schema (2020-12) of a configuration file.
    #[staticmethod]
    fn json_schema(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        json::to_python(py, &ClusterConfig::schema())
    }

    fn __hash__(&self) -> u64 {
        super::hash(&serde_json::to_string(&self.0).unwrap_or_default())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        super::reduce(slf.as_any(), slf.get().to_dict(slf.py())?)
    }

    /// What is not default, without secrets.
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let set = difference(&self.0.redacted(), &ClusterConfig::default().redacted());
        match set {
            None => Ok("ClusterConfig()".to_owned()),
            Some(set) => Ok(format!("ClusterConfig.from_dict({})", json::to_python(py, &set)?.repr()?)),
        }
    }
}

/// What of a value is not as in another; none where they are equal.
fn difference(value: &Value, other: &Value) -> Option<Value> {
    match (value, other) {
        (Value::Object(fields), Value::Object(others)) => {
            let differing = fields.iter().filter_map(|(key, field)| {
                let differs = others.get(key).map_or_else(|| Some(field.clone()), |other| difference(field, other))?;
                Some((key.clone(), differs))
            });
            let differing: Map<String, Value> = differing.collect();
            (!differing.is_empty()).then_some(Value::Object(differing))
        }
        _ => (value != other).then(|| value.clone()),
    }
}
