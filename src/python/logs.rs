//! The log records of the core, for Python's `logging`.
//!
//! Records go into a bounded buffer, which a thread of the Python package (`_logs.py`) empties in batches: no record takes
//! the interpreter. A full buffer loses the newest, and the next batch tells how many.

use std::collections::VecDeque;
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::{json, runtime};

/// Records that wait at most.
const CAPACITY: usize = 4096;
/// The root of the loggers, and this crate's own target.
const ROOT: &str = "mlx_serving_router";

/// Python's level from which on records are wanted; 255: none, as nobody takes them.
static WANTED: AtomicU8 = AtomicU8::new(u8::MAX);

/// Whether that was another level the last time.
static CHANGED: AtomicBool = AtomicBool::new(false);

/// The records of one process that nobody has taken yet.
#[derive(Default)]
pub(super) struct Logs {
    buffer: Mutex<Buffer>,
    arrived: Condvar,
}

#[derive(Default)]
struct Buffer {
    records: VecDeque<Record>,
    lost: u64,
    closed: bool,
}

struct Record {
    level: u8,
    metadata: &'static Metadata<'static>,
    created: f64,
    message: String,
    fields: Map<String, Value>,
}

struct Forward;

/// Gathers what the core logs from now on. Once is enough.
pub(super) fn install() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        // Refused where an application that links this crate has its own subscriber: then records go there.
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Forward));
    });
}

/// Waits for records and takes all of them: `(logger, level, message, created, file, line, fields)` each. Records below
/// `level` are not gathered from now on. `None`: nothing will come any more.
#[pyfunction]
pub(super) fn take_logs(py: Python<'_>, level: u8, timeout: f64) -> PyResult<Option<Bound<'_, PyList>>> {
    let Some(process) = runtime::existing() else { return Ok(None) };
    want(level);
    let timeout = Duration::try_from_secs_f64(timeout).unwrap_or(Duration::from_secs(1));
    let (records, lost, closed) = py.detach(|| {
        let mut buffer = process.logs.buffer.lock();
        if buffer.records.is_empty() && !buffer.closed {
            process.logs.arrived.wait_for(&mut buffer, timeout);
        }
        (std::mem::take(&mut buffer.records), std::mem::take(&mut buffer.lost), buffer.closed)
    });
    if closed && records.is_empty() {
        return Ok(None);
    }
    let batch = PyList::empty(py);
    for record in records {
        batch.append((
            logger(record.metadata.target()),
            record.level,
            record.message,
            record.created,
            record.metadata.file(),
            record.metadata.line(),
            json::to_python(py, &record.fields)?,
        ))?;
    }
    if lost > 0 {
        let message = format!("{lost} log records were lost: they came faster than their handlers took them");
        batch.append((ROOT, 30_u8, message, now(), None::<&str>, None::<u32>, PyDict::new(py)))?;
    }
    Ok(Some(batch))
}

/// Ends the gathering: what waits is still given out.
#[pyfunction]
pub(super) fn close_logs() {
    want(u8::MAX);
    if let Some(process) = runtime::existing() {
        process.logs.buffer.lock().closed = true;
        process.logs.arrived.notify_all();
    }
}

/// Records below this level are not made from now on: what makes them is told, and then costs next to nothing.
fn want(level: u8) {
    let changed = WANTED.swap(level, Ordering::Relaxed) != level;
    // And once more at the next time: what makes its first record just now may have asked before the change and note the
    // answer after it.
    if CHANGED.swap(changed, Ordering::Relaxed) || changed {
        tracing::callsite::rebuild_interest_cache();
    }
}

/// `mlx_serving_router::dispatch::retry` is `mlx_serving_router.dispatch.retry`; what others log stands below the root too.
fn logger(target: &str) -> String {
    let dotted = target.replace("::", ".");
    if dotted == ROOT || dotted.starts_with("mlx_serving_router.") { dotted } else { format!("{ROOT}.{dotted}") }
}

fn number(level: Level) -> u8 {
    match level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        Level::DEBUG => 10,
        Level::TRACE => 5,
    }
}

fn is_wanted(metadata: &Metadata<'_>) -> bool {
    // What libraries say of themselves is wanted when something is wrong.
    let worth_it = metadata.target().starts_with(ROOT) || *metadata.level() <= LevelFilter::WARN;
    worth_it && number(*metadata.level()) >= WANTED.load(Ordering::Relaxed)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

// === impl Forward ===

impl<S: Subscriber> Layer<S> for Forward {
    /// Asked again whenever another level is wanted.
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if is_wanted(metadata) { Interest::always() } else { Interest::never() }
    }

    /// Asked where a place makes its first record in two threads at a time.
    fn enabled(&self, metadata: &Metadata<'_>, _context: Context<'_, S>) -> bool {
        is_wanted(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let wanted = WANTED.load(Ordering::Relaxed);
        let levels = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
        Some(levels.into_iter().find(|level| number(*level) >= wanted).map_or(LevelFilter::OFF, LevelFilter::from_level))
    }

    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let Some(process) = runtime::existing() else { return };
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let record =
            Record { level: number(*metadata.level()), metadata, created: now(), message: fields.message, fields: fields.others };
        let mut buffer = process.logs.buffer.lock();
        if buffer.closed || buffer.records.len() >= CAPACITY {
            buffer.lost += 1;
            return;
        }
        buffer.records.push_back(record);
        if buffer.records.len() == 1 {
            process.logs.arrived.notify_one();
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

// === impl Fields ===

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.others.insert(field.name().to_owned(), format!("{value:?}").into());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.others.insert(field.name().to_owned(), value.into());
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.others.insert(field.name().to_owned(), value.into());
    }
}
