//! The queue of requests that find every worker full: bounded, by priority, oldest first within one.
//!
//! One line for each model, and one for each worker that callers name. When a place may have become free, those who stand
//! first are asked one after the other, by priority and then by arrival whatever their line: lines that want the same
//! workers get their turns. Who is asked looks for a place, and the next one is asked when it has found one or none, or does
//! not come round to it for a while. A request that workers have failed is choosy: a place that it may not take is offered
//! to those behind it, up to the first that takes any. A full line sheds its last of a lower priority for a newcomer of a
//! higher one. Dropping a [`Ticket`] leaves the line.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::AdmissionConfig;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::sync::Mutex;
use crate::wire::Priority;

/// When somebody who found no place may come back.
const RETRY_AFTER_MS: u64 = 1_000;
/// Who was asked and has not looked for so long is passed over: nobody drives its future.
const PASSED_OVER_AFTER: Duration = Duration::from_millis(50);

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
    /// Those who are to be asked whether there is a place for them.
    owed: BTreeMap<Place, (Arc<str>, Arc<Waiter>)>,
    /// Who is asked now, and since when.
    asked: Option<(Place, Instant)>,
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
    /// It had its turn, and looks for a place.
    looks: AtomicBool,
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

    /// Whether somebody waits for what a newcomer of this line wants, in it or in one that `rivals` names: the newcomer goes
    /// behind.
    pub(super) fn is_waiting(&self, line: &str, rivals: impl Fn(&str) -> bool) -> bool {
        let others: Vec<Arc<str>> = {
            let lines = self.lines.lock();
            if lines.by_name.contains_key(line) {
                return true;
            }
            lines.by_name.keys().cloned().collect()
        };
        others.iter().any(|other| rivals(other))
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
        Ok(Ticket { admission: self.clone(), line: name, place, waiter, since: now, until, looks: AtomicBool::new(false) })
    }

    /// A place may have become free: the heads of every line are asked, one after the other.
    pub(super) fn wake(&self, now: Instant) {
        let mut lines = self.lines.lock();
        if lines.waiting > 0 {
            lines.owe_all();
            lines.ask(now);
        }
    }

    /// Passes over somebody who was asked and does not look.
    pub(super) fn move_on(&self, now: Instant) {
        self.lines.lock().ask(now);
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
        if standing.is_empty() {
            self.by_name.remove(line);
        }
        self.waiting -= 1;
        self.owed.remove(&place);
        self.has_looked(place);
        Some(left)
    }

    fn is_head(&self, line: &str, place: Place) -> bool {
        self.by_name.get(line).is_some_and(|line| heads(line).any(|(head, _)| *head == place))
    }

    /// The heads of a line are to be asked.
    fn owe(&mut self, name: &Arc<str>) {
        let Self { by_name, owed, .. } = self;
        let heads = by_name.get(name).into_iter().flat_map(heads);
        owed.extend(heads.map(|(place, head)| (*place, (name.clone(), head.clone()))));
    }

    fn owe_all(&mut self) {
        let names: Vec<_> = self.by_name.keys().cloned().collect();
        names.iter().for_each(|name| self.owe(name));
    }

    /// Asks the next one, unless somebody is asked and may still look.
    fn ask(&mut self, now: Instant) {
        if self.asked.is_some_and(|(_, since)| now.saturating_duration_since(since) < PASSED_OVER_AFTER) {
            return;
        }
        self.asked = None;
        while let Some((place, (line, waiter))) = self.owed.pop_first() {
            if self.is_head(&line, place) {
                self.asked = Some((place, now));
                waiter.turn.notify_one();
                return;
            }
        }
    }

    /// Whoever was asked has found a place, or none, or has gone.
    fn has_looked(&mut self, place: Place) {
        self.asked = self.asked.filter(|(asked, _)| *asked != place);
    }
}

/// Those who may try for a place: the first, and where that one is choosy the next, up to one that takes any.
fn heads(line: &Line) -> impl Iterator<Item = (&Place, &Arc<Waiter>)> {
    let mut behind = false;
    line.iter().take_while(move |(_, waiter)| !std::mem::replace(&mut behind, !waiter.choosy))
}

// === impl Ticket ===

impl Ticket {
    /// Returns when it is its turn: it is a head of its line, and a place may be free. To be called again when there was none
    /// after all.
    ///
    /// # Errors
    /// QUEUE_FULL: it waited for too long, or was shed for somebody of a higher priority.
    pub(super) async fn turn(&self) -> Result<(), ControllerError> {
        if self.looks.swap(false, Ordering::Relaxed) {
            self.pass();
        }
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
                        self.looks.store(true, Ordering::Relaxed);
                        return Ok(());
                    }
                    self.pass();
                }
                () = tokio::time::sleep_until(self.until) => return Err(self.expired()),
            }
        }
    }

    /// A newcomer that is the head of its line is asked at once, after those who stand before it in other lines.
    pub(super) fn nudge(&self, now: Instant) {
        let mut lines = self.admission.lines.lock();
        if lines.is_head(&self.line, self.place) {
            lines.owe_all();
            lines.ask(now);
        }
    }

    /// The next one may look.
    fn pass(&self) {
        let mut lines = self.admission.lines.lock();
        lines.has_looked(self.place);
        lines.ask(Instant::now());
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
        lines.owe(&self.line);
        lines.ask(Instant::now());
    }
}

#[cfg(test)]
mod model;
#[cfg(all(test, feature = "shuttle"))]
mod races;
