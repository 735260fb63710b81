//! The extension module `mlx_serving_router._native`: the core for Python.
//!
//! | file | it holds |
//! |---|---|
//! | `runtime`, `event_loop`, `wake`, `bridge` | the tokio runtime, and how Python waits for it |
//! | `errors`, `json`, `logs` | what crosses the border in passing |
//! | `request`, `answer`, `metadata`, `fleet`, `events`, `config` | data, frozen |
//! | `controller`, `stream`, `router`, `worker`, `thread`, `job`, `openai`, `script`, `scripted` | what does something |
//!
//! The public face of all this is Python, in `python/mlx_serving_router`; `_native.pyi` describes it for type checkers.

mod answer;
mod bridge;
mod config;
mod controller;
mod errors;
mod event_loop;
mod events;
mod fleet;
mod job;
mod json;
mod logs;
mod metadata;
mod openai;
mod request;
mod router;
mod runtime;
mod script;
mod scripted;
mod stream;
mod survey;
mod thread;
mod wake;
mod worker;

use std::hash::{DefaultHasher, Hash, Hasher};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::dispatch::ControllerState;
use crate::error::ControllerErrorCode;

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::answer::{PyInferenceResponse, PyTokenEvent, PyUsage};
    #[pymodule_export]
    use super::bridge::Call;
    #[pymodule_export]
    use super::config::PyClusterConfig;
    #[pymodule_export]
    use super::controller::PyController;
    #[pymodule_export]
    use super::events::{PyControllerEvent, PyEvents};
    #[pymodule_export]
    use super::fleet::{PyClusterStatus, PyWorkerInfo};
    #[pymodule_export]
    use super::job::{PyJob, PyJobQueue};
    #[pymodule_export]
    use super::logs::{close_logs, take_logs};
    #[pymodule_export]
    use super::metadata::PyRequestMetadata;
    #[pymodule_export]
    use super::openai::{
        PyCompletionCall, PyRelayedCall, PyRelayedStream, PyStreamEncoder, error_answer, error_body, model, models,
    };
    #[pymodule_export]
    use super::request::{PyInferenceRequest, prefix_hashes};
    #[pymodule_export]
    use super::router::{PyLease, PyRouter};
    #[pymodule_export]
    use super::runtime::{exits, forked, shutdown};
    #[pymodule_export]
    use super::script::PyScript;
    #[pymodule_export]
    use super::scripted::{PyReceivedCancel, PyReceivedRequest, PyScriptedWorker};
    #[pymodule_export]
    use super::stream::{BlockingTokenStream, Next, PyTokenStream, TokenBatches};
    #[pymodule_export]
    use super::survey::survey;
    #[pymodule_export]
    use super::thread::PyThread;
    #[pymodule_export]
    use super::worker::PyWorker;
    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        let codes = PyDict::new(py);
        for code in ControllerErrorCode::ALL {
            codes.set_item(code.as_str(), code.retryable())?;
        }
        module.add("VERSION", env!("CARGO_PKG_VERSION"))?;
        module.add("ERROR_CODES", codes)?;
        module.add("CIRCUIT_STATES", PyTuple::new(py, fleet::CIRCUIT_STATES.map(|state| state.as_str()))?)?;
        module.add("CONTROLLER_STATES", PyTuple::new(py, ControllerState::ALL.map(ControllerState::as_str))?)?;
        // Everything, private names too, for `import *`, which nobody does here.
        module.delattr("__all__")
    }
}

/// For `__reduce__`: the object is made again from its dictionary.
fn reduce<'py>(object: &Bound<'py, PyAny>, fields: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
    let py = object.py();
    let from_dict = object.get_type().getattr(intern!(py, "from_dict"))?;
    (from_dict, (fields,)).into_pyobject(py)
}

/// For `__repr__`: a text in Python's usual quotes.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'").replace(char::is_control, "?"))
}

/// For `__repr__`: a list of texts.
fn quoted_list(texts: &[String]) -> String {
    format!("[{}]", texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(", "))
}

/// For `__hash__`.
fn hash<T: Hash>(value: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
