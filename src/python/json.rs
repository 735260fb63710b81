//! Python objects as JSON, and back.
//!
//! What comes from Python is written as text in one pass, and refused where JSON has no word for it, naming the place. What
//! goes to Python is read by the standard library's parser.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::wire::Json;

/// Deeper than any message, and not too deep for any parser of it.
const DEPTH_MAX: usize = 100;

/// The object as a value of this type. `name` is what errors call it.
///
/// # Errors
/// `TypeError`: it holds what JSON has no word for, or has another shape. `ValueError`: NaN, infinity, half a character.
pub(super) fn from_python<T: DeserializeOwned>(name: &str, object: &Bound<'_, PyAny>) -> PyResult<T> {
    let text = text(name, object)?;
    serde_json::from_str(&text).map_err(|error| {
        // The parser's own words may quote what it read.
        let what = if error.is_data() { "has not the shape that is wanted" } else { "cannot be read" };
        PyTypeError::new_err(format!("{name}: {what} (at byte {} of its JSON)", error.column()))
    })
}

/// The object as JSON that is passed on.
///
/// # Errors
/// As [`from_python`].
pub(super) fn passed_on(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Json> {
    let refused = |error| PyValueError::new_err(format!("{name}: cannot be written as JSON: {error}"));
    Json::from_text(text(name, object)?).map_err(refused)
}

/// The value as Python objects.
///
/// # Errors
/// The parser's own.
pub(super) fn to_python<'py, T: Serialize + ?Sized>(py: Python<'py>, value: &T) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value).map_err(|error| PyValueError::new_err(error.to_string()))?;
    parse(py, &text)
}

/// What was passed on, as Python objects; `None` where there is nothing.
///
/// # Errors
/// The parser's own.
pub(super) fn shown<'py>(py: Python<'py>, json: Option<&Json>) -> PyResult<Bound<'py, PyAny>> {
    json.map_or_else(|| Ok(py.None().into_bound(py)), |json| parse(py, json.text()))
}

fn parse<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyAny>> {
    static LOADS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    LOADS.import(py, "json", "loads")?.call1((text,))
}

fn text(name: &str, object: &Bound<'_, PyAny>) -> PyResult<String> {
    let mut writer = Writer { out: Vec::with_capacity(128), path: vec![name.to_owned()] };
    writer.write(object)?;
    // Only whole characters were written.
    String::from_utf8(writer.out).map_err(|_| PyValueError::new_err(format!("{name}: is no Unicode text")))
}

struct Writer {
    out: Vec<u8>,
    path: Vec<String>,
}

// === impl Writer ===

impl Writer {
    fn write(&mut self, object: &Bound<'_, PyAny>) -> PyResult<()> {
        if self.path.len() > DEPTH_MAX {
            return Err(PyValueError::new_err(format!("{}: is nested more than {DEPTH_MAX} levels deep", self.path[0])));
        }
        if object.is_none() {
            self.out.extend_from_slice(b"null");
        } else if let Ok(text) = object.cast::<PyString>() {
            self.write_text(text)?;
        } else if let Ok(truth) = object.cast::<PyBool>() {
            self.out.extend_from_slice(if truth.is_true() { b"true" } else { b"false" });
        } else if object.is_instance_of::<PyInt>() {
            match object.extract::<i64>() {
                Ok(number) => self.put(&number)?,
                Err(_) => self.out.extend_from_slice(object.call_method0("__repr__")?.extract::<String>()?.as_bytes()),
            }
        } else if object.is_instance_of::<PyFloat>() {
            let number: f64 = object.extract()?;
            if !number.is_finite() {
                return Err(PyValueError::new_err(format!("{}: is {number}, which JSON has no word for", self.place())));
            }
            self.put(&number)?;
        } else if let Ok(items) = object.cast::<PyDict>() {
            self.write_entries(items.iter().map(Ok))?;
        } else if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
            self.write_list(object)?;
        } else if let Ok(mapping) = object.cast::<PyMapping>() {
            let items = mapping.items()?;
            self.write_entries(items.iter().map(|item| item.extract()))?;
        } else {
            return Err(PyTypeError::new_err(format!(
                "{}: is of type {}, which JSON has no word for; dict, list, str, int, float, bool and None are right",
                self.place(),
                object.get_type().name()?
            )));
        }
        Ok(())
    }

    fn write_list(&mut self, items: &Bound<'_, PyAny>) -> PyResult<()> {
        self.out.push(b'[');
        for (index, item) in items.try_iter()?.enumerate() {
            if index > 0 {
                self.out.push(b',');
            }
            self.path.push(format!("[{index}]"));
            self.write(&item?)?;
            self.path.pop();
        }
        self.out.push(b']');
        Ok(())
    }

    fn write_entries<'py, I>(&mut self, entries: I) -> PyResult<()>
    where
        I: Iterator<Item = PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)>>,
    {
        self.out.push(b'{');
        for (index, entry) in entries.enumerate() {
            let (key, value) = entry?;
            if index > 0 {
                self.out.push(b',');
            }
            let key = match key.cast::<PyString>() {
                Ok(key) => key.clone(),
                // Token ids, as keys of a bias.
                Err(_) if key.is_instance_of::<PyInt>() && !key.is_instance_of::<PyBool>() => key.str()?,
                Err(_) => {
                    let kind = key.get_type().name()?;
                    return Err(PyTypeError::new_err(format!("{}: has a key of type {kind}; str is right", self.place())));
                }
            };
            self.write_text(&key)?;
            self.out.push(b':');
            self.path.push(format!(".{key}"));
            self.write(&value)?;
            self.path.pop();
        }
        self.out.push(b'}');
        Ok(())
    }

    fn write_text(&mut self, text: &Bound<'_, PyString>) -> PyResult<()> {
        match text.to_str() {
            Ok(text) => self.put(text),
            // Python's own error would quote the text.
            Err(_) => Err(PyValueError::new_err(format!("{}: holds half a character (a lone surrogate)", self.place()))),
        }
    }

    fn put<T: Serialize + ?Sized>(&mut self, value: &T) -> PyResult<()> {
        serde_json::to_writer(&mut self.out, value).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    fn place(&self) -> String {
        self.path.concat()
    }
}
