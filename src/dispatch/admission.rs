//! The queue of requests that find every worker full: bounded, by priority, oldest first within one.
//!
//! One line for each model, and one for each worker that callers name. Whoever stands first is woken when a place may have
//! become free, takes it, and wakes the next. A request that workers have failed is choosy: a place that it may not take is
//! offered to those behind it, up to the first that takes any. A full line sheds its last of a lower priority for a
//! newcomer of a higher one. Dropping a [`Ticket`] leaves the line.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::AdmissionConfig;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::sync::Mutex;
use crate::wire::Priority;

/// When somebody who found no place may come back.
const RETRY_AFTER_MS: u64 = 1_000;

/// All lines.
#[derive(Debug)]
pub(super) struct Admission {
    max_queue: usize,
    max_wait: Duration,
    lines: Mutex<Lines>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Lines {
    /// Sorted, so that they are always woken in the same order.
    by_name: BTreeMap<Arc<str>, Line>,
    arrivals: u64,
    waiting: usize,
}

type Line = BTreeMap<Place, Arc<Waiter>>;

/// A higher priority and an earlier arrival stand before others.
type Place = (Reverse<Priority>, u64);

#[derive(Debug)]
struct Waiter {
    /// It may not take every place.
    choosy: bool,
    turn: Notify,
    shed: Notify,
}

/// A place in a line.
#[derive(Debug)]
pub(super) struct Ticket {
    admission: Arc<Admission>,
    line: Arc<str>,
    place: Place,
    waiter: Arc<Waiter>,
    since: Instant,
    until: Instant,
}

// === impl Admission ===

impl Admission {
    pub(super) fn new(config: &AdmissionConfig) -> Arc<Self> {
        Arc::new(Self {
            max_queue: config.max_queue,
            max_wait: Duration::from_millis(config.max_wait_ms),
            lines: Mutex::default(),
            arrived: Notify::new(),
        })
    }

    /// Whether somebody stands in this line: newcomers go behind.
    pub(super) fn is_waiting(&self, line: &str) -> bool {
        let lines = self.lines.lock();
        lines.waiting > 0 && lines.by_name.contains_key(line)
    }

    /// How many stand in all lines.
    pub(super) fn waiting(&self) -> usize {
        self.lines.lock().waiting
    }

    /// Returns when somebody stands in a line.
    pub(super) async fn somebody_waits(&self) {
        while self.waiting() == 0 {
            self.arrived.notified().await;
        }
    }

    /// Joins a line until `deadline` at the latest. `choosy`: not every place will do.
    pub(super) fn join(
        self: &Arc<Self>,
        line: &str,
        priority: Priority,
        choosy: bool,
        deadline: Instant,
        now: Instant,
    ) -> Result<Ticket, ControllerError> {
        let mut lines = self.lines.lock();
        lines.arrivals += 1;
        let place = (Reverse(priority), lines.arrivals);
        let standing = lines.by_name.get(line).map_or(0, BTreeMap::len);
        if standing >= self.max_queue {
            let last = lines.by_name.get(line).and_then(|line| line.keys().next_back().copied());
            match last {
                Some(last) if last.0 > place.0 => {
                    if let Some(shed) = lines.leave(line, last) {
                        shed.shed.notify_one();
                    }
                }
                _ => return Err(self.full(standing, "the queue of requests is full")),
            }
        }
        let waiter = Arc::new(Waiter { choosy, turn: Notify::new(), shed: Notify::new() });
        let name: Arc<str> = match lines.by_name.get_key_value(line) {
            Some((name, _)) => name.clone(),
            None => line.into(),
        };
        lines.by_name.entry(name.clone()).or_default().insert(place, waiter.clone());
        lines.waiting += 1;
        self.arrived.notify_one();
        let until = deadline.min(now + self.max_wait);
        Ok(Ticket { admission: self.clone(), line: name, place, waiter, since: now, until })
    }

    /// A place may have become free: the heads of every line try.
    pub(super) fn wake(&self) {
        let lines = self.lines.lock();
        if lines.waiting == 0 {
            return;
        }
        for (_, head) in lines.by_name.values().flat_map(heads) {
            head.turn.notify_one();
        }
    }

    fn full(&self, waiting: usize, what: &str) -> ControllerError {
        ControllerError::new(ControllerErrorCode::QueueFull, format!("{what}; every worker is busy, come back later"))
            .with("waiting", waiting)
            .with("maxQueue", self.max_queue)
            .with("retryAfterMs", RETRY_AFTER_MS)
    }
}

// === impl Lines ===

impl Lines {
    fn leave(&mut self, line: &str, place: Place) -> Option<Arc<Waiter>> {
        let standing = self.by_name.get_mut(line)?;
        let left = standing.remove(&place)?;
        self.waiting -= 1;
        if standing.is_empty() {
            self.by_name.remove(line);
        }
        Some(left)
    }

    fn is_head(&self, line: &str, place: Place) -> bool {
        self.by_name.get(line).is_some_and(|line| heads(line).any(|(head, _)| *head == place))
    }
}

/// Those who may try for a place: the first, and where that one is choosy the next, up to one that takes any.
fn heads(line: &Line) -> impl Iterator<Item = (&Place, &Arc<Waiter>)> {
    let mut behind = false;
    line.iter().take_while(move |(_, waiter)| !std::mem::replace(&mut behind, !waiter.choosy))
}

// === impl Ticket ===

impl Ticket {
    /// Returns when it is a head of its line and a place may be free. To be called again when there was none after all.
    ///
    /// # Errors
    /// QUEUE_FULL: it waited for too long, or was shed for somebody of a higher priority.
    pub(super) async fn turn(&self) -> Result<(), ControllerError> {
        loop {
            tokio::select! {
                biased;
                () = self.waiter.shed.notified() => {
                    return Err(self.admission.full(self.admission.max_queue, "a request of a higher priority took the place in the queue"));
                }
                () = self.waiter.turn.notified() => {
                    // Both may be there when nobody came round to it for a while.
                    if Instant::now() >= self.until {
                        return Err(self.expired());
                    }
                    if self.admission.lines.lock().is_head(&self.line, self.place) {
                        return Ok(());
                    }
                }
                () = tokio::time::sleep_until(self.until) => return Err(self.expired()),
            }
        }
    }

    /// Tries at once when it is called the first time and is a head.
    pub(super) fn nudge(&self) {
        if self.admission.lines.lock().is_head(&self.line, self.place) {
            self.waiter.turn.notify_one();
        }
    }

    fn expired(&self) -> ControllerError {
        let waited = self.until.saturating_duration_since(self.since).as_millis();
        self.admission.full(self.admission.waiting(), &format!("no place became free within {waited} ms"))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut lines = self.admission.lines.lock();
        lines.leave(&self.line, self.place);
        // There may be room for one more, or the chance to find it went away with this one.
        for (_, next) in lines.by_name.get(&self.line).into_iter().flat_map(heads) {
            next.turn.notify_one();
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(all(test, feature = "shuttle"))]
mod races;
