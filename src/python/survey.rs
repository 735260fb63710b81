//! A look at a fleet from outside, for `mlx-serving-router doctor`.

use std::time::Duration;

use pyo3::prelude::*;

use super::config::PyClusterConfig;
use super::controller::duration;
use super::{bridge, errors, json};
use crate::transport::nats;

/// Connects to the NATS server of a configuration, asks who is there, and listens for so many seconds.
///
/// Raises:
///     ControllerError: NATS_ERROR: no server answers, or it refuses us.
#[pyfunction]
pub(super) fn survey<'py>(py: Python<'py>, config: &PyClusterConfig, name: String, seconds: f64) -> PyResult<Bound<'py, PyAny>> {
    let span = errors::unwrap(py, duration("seconds", seconds))?;
    let interval = Duration::from_millis(config.0.discovery.heartbeat_interval_ms);
    let config = config.0.nats.clone();
    let survey = bridge::block_on(py, async move { nats::survey(&config, &name, interval, span).await })?;
    json::to_python(py, &survey)
}
