//! The core's errors as Python exceptions. The classes are Python's own, in `mlx_serving_router/_errors.py`: those of the
//! stable ABI cannot extend exceptions.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString};
use pyo3::{PyErr, intern};
use serde_json::{Map, Value};

use super::json;
use crate::config::ConfigError;
use crate::dispatch::ControllerState;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::routing::CircuitState;

const MODULE: &str = "mlx_serving_router._errors";

/// The value, or the exception.
///
/// # Errors
/// The error, as the `ControllerError` that callers see.
pub(super) fn unwrap<T>(py: Python<'_>, result: Result<T, ControllerError>) -> PyResult<T> {
    result.map_err(|error| raise(py, &error))
}

/// The exception of an error, with those that led to it.
pub(super) fn raise(py: Python<'_>, error: &ControllerError) -> PyErr {
    exception(py, error).map_or_else(|failed| failed, PyErr::from_value)
}

fn exception<'py>(py: Python<'py>, error: &ControllerError) -> PyResult<Bound<'py, PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let options = PyDict::new(py);
    options.set_item(intern!(py, "context"), json::to_python(py, &snake_keys(error.context()))?)?;
    options.set_item(intern!(py, "timestamp"), error.timestamp_ms())?;
    let class = CLASS.import(py, MODULE, "ControllerError")?;
    let made = class.call((error.code().as_str(), error.message()), Some(&options))?;
    if let Some(cause) = error.cause() {
        made.setattr(intern!(py, "__cause__"), exception(py, cause)?)?;
    }
    Ok(made)
}

/// The exception of a configuration that cannot be used.
pub(super) fn raise_config(py: Python<'_>, error: &ConfigError) -> PyErr {
    let make = || {
        let options = PyDict::new(py);
        options.set_item("path", &error.path)?;
        options.set_item("line", error.line)?;
        options.set_item("column", error.column)?;
        options.set_item("key", &error.key)?;
        options.set_item("variable", &error.variable)?;
        py.import(MODULE)?.getattr("ConfigError")?.call((error.to_string(), &error.message), Some(&options))
    };
    make().map_or_else(|failed| failed, PyErr::from_value)
}

/// The exception of settings that a room refuses: what it blames is a key of the configuration.
pub(super) fn raise_settings(py: Python<'_>, error: &ControllerError) -> PyErr {
    match error.context().get("field").and_then(Value::as_str) {
        Some(key) if error.code() == ControllerErrorCode::RequestValidationFailed && key.contains('.') => {
            let message = error.message().strip_prefix(&format!("{key}: ")).unwrap_or(error.message()).to_owned();
            raise_config(py, &ConfigError { message, key: Some(key.to_owned()), ..ConfigError::default() })
        }
        _ => raise(py, error),
    }
}

/// A member of one of the enums in `_errors.py`.
pub(super) fn member<'py>(py: Python<'py>, class: &str, value: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import(intern!(py, MODULE))?.getattr(class)?.call1((value,))
}

/// The member of `CircuitState`.
pub(super) fn circuit_state(py: Python<'_>, state: CircuitState) -> PyResult<Bound<'_, PyAny>> {
    member(py, "CircuitState", state.as_str())
}

/// The member of `ControllerState`.
pub(super) fn controller_state(py: Python<'_>, state: ControllerState) -> PyResult<Bound<'_, PyAny>> {
    member(py, "ControllerState", state.as_str())
}

/// The code that a caller wrote, as text or as member of the enum.
///
/// # Errors
/// `ValueError`: there is no such code.
pub(super) fn code(name: &Bound<'_, PyString>) -> PyResult<ControllerErrorCode> {
    let name = name.to_str()?;
    ControllerErrorCode::parse(name).ok_or_else(|| {
        let known: Vec<_> = ControllerErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        PyValueError::new_err(format!("{name:?} is no error code; known are {}", known.join(", ")))
    })
}

/// The same facts under snake_case keys, as Python shows them.
pub(super) fn snake_keys(facts: &Map<String, Value>) -> Value {
    Value::Object(facts.iter().map(|(key, value)| (snake(key), snake_value(value))).collect())
}

fn snake_value(value: &Value) -> Value {
    match value {
        Value::Object(facts) => snake_keys(facts),
        Value::Array(items) => Value::Array(items.iter().map(snake_value).collect()),
        other => other.clone(),
    }
}

/// `totalWorkers` as `total_workers`.
pub(super) fn snake(key: &str) -> String {
    let mut snake = String::with_capacity(key.len() + 4);
    for letter in key.chars() {
        if letter.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}
